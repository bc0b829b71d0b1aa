"""What do the Triton kernels take of each GPU? Compiled for all targets, without any of them.

Every published network runs forward, in inference and in training, and backward, on the CPU and with few blocks of each
kind, while the launches of its kernels are noted down and not run. Each distinct configuration is then compiled as
Triton would for the device itself, and the registers, shared memory and stack of the machine code are read. A stack is
memory that registers are spilled to.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.variants import VARIANTS
from attnsr.files import write_atomically
from attnsr.ops import dispatch, launching
from attnsr.ops.launching import Launch

#: Compute capability of each target, and the bytes of shared memory that a program may take there.
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: Bytes of stack that a thread may have: a few spilled registers, where the compiler prefers that to fewer programs.
STACK_LIMIT = 64

#: Variants with as few blocks as have all kinds: computing and sharing, straight and shifted windows, first and later.
FEW_BLOCKS = {
    'elan': {'m_elan': 2},
    'elan_light': {'m_elan': 4},
    'dlgsanet': {'num_groups': 1, 'num_blocks': 1, 'tlc_size': 48},
    'dlgsanet_light': {'num_groups': 1, 'num_blocks': 1, 'tlc_size': 48},
    'asid': {'num_groups': 2},
    'lcoan': {'num_groups': 2, 'num_blocks': 1},
}

#: LR height and width, that all windows divide and that overlapping windows are cut out of.
SIZE = (32, 64)

MARKS = ('<!-- kernel resources: begin -->', '<!-- kernel resources: end -->')


@dataclass(frozen=True)
class Resources:
    """What one configuration of a kernel takes on one target.

    Attributes:
        operation: The folder of the kernel.
        kernel: Name of the function.
        dtype: Of the tensors, and of products of float32.
        configuration: Its constants, and warps and stages.
        target: Compute capability, such as 90.
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        stack: Bytes of stack of a thread, which spilled registers take.
    """

    operation: str
    kernel: str
    dtype: str
    configuration: str
    target: int
    registers: int
    shared: int
    stack: int

    @property
    def fits(self) -> bool:
        return self.stack <= STACK_LIMIT and self.shared <= SHARED_LIMITS[self.target]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit status: 1 where a configuration does not fit its target."""
    parser = argparse.ArgumentParser(prog='python -m attnsr.benchmarks.kernel_resources', description=__doc__)
    add = parser.add_argument
    add('--operation', nargs='+', metavar='NAME', help='only these, such as shift_linear')
    add('--target', nargs='+', type=int, choices=list(SHARED_LIMITS), default=list(SHARED_LIMITS))
    add('--jobs', type=int, default=os.cpu_count(), help='processes that compile (%(default)s)')
    add('--json', action='store_true', help='every configuration on every target, in a list')
    add('--write', type=Path, metavar='FILE', help=f'put the table into FILE, between the lines {" and ".join(MARKS)}')
    args = parser.parse_args(argv)
    if launching.runs_on_cpu():
        parser.error('TRITON_INTERPRET is set, and nothing is compiled then; unset it')
    launches = [launch for launch in distinct_launches() if not args.operation or _operation(launch) in args.operation]
    results = list(compiled(launches, args.target, args.jobs))
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        print(table(results))
    if args.write is not None:
        text = args.write.read_text()
        before, rest = text.split(MARKS[0])
        with write_atomically(args.write) as file:
            file.write(f'{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}'.encode())
    misfits = [result for result in results if not result.fits]
    for result in misfits:
        print(
            f'{result.operation}.{result.kernel} ({result.dtype}, {result.configuration}) on sm_{result.target}: '
            f'{result.stack} bytes of stack (at most {STACK_LIMIT}), {result.shared} bytes of shared memory (at most '
            f'{SHARED_LIMITS[result.target]})',
            file=sys.stderr,
        )
    return int(bool(misfits))


def distinct_launches() -> list[Launch]:
    """One launch of every configuration that the published networks have."""
    found: dict[Any, Launch] = {}
    for name, variant in VARIANTS.items():
        if name not in FEW_BLOCKS:  # the same as another but for the number of blocks
            continue
        for dtype, tf32 in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.bfloat16, False),
            (torch.float16, False),
        ):
            torch.manual_seed(0)
            network = variant.network(upscale=1, **{**variant.arguments, **FEW_BLOCKS[name]}).to(dtype)
            for launch in _launches(network, torch.rand(1, 3, *SIZE, dtype=dtype), tf32):
                found.setdefault(_key(launch), launch)
    return list(found.values())


def _launches(network: SRNetwork, x: Tensor, tf32: bool) -> list[Launch]:
    backend, allowed = dispatch.get_backend(), torch.backends.cuda.matmul.allow_tf32
    dispatch.set_backend('triton')
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with launching.noted() as launches:
            network.train()(x).sum().backward()
            with torch.inference_mode():
                network.eval()(x)
        return launches
    finally:
        dispatch.set_backend(backend)
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _key(launch: Launch) -> Any:
    """Equal for launches that differ in sizes of the map only."""
    types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in launch.arguments.values())
    return launch.kernel.__name__, tuple(launch.constants.items()), types, launch.num_warps, launch.num_stages


def _operation(launch: Launch) -> str:
    return launch.kernel.__module__.split('.')[-2]


def compiled(launches: Sequence[Launch], targets: Sequence[int], jobs: int) -> Iterator[Resources]:
    """The resources of each launch on each target, in order."""
    global _of_workers
    _of_workers = launches
    work = [(i, target) for i in range(len(launches)) for target in targets]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context('fork')) as pool:
        yield from tqdm(pool.map(_compile, work), total=len(work), desc='compiling', leave=False, disable=None)


# What processes inherit: a kernel cannot be sent to them.
_of_workers: Sequence[Launch] = ()


def _compile(work: tuple[int, int]) -> Resources:
    launch, target = _of_workers[work[0]], work[1]
    driver.set_active(_Target(target))
    options = {'num_warps': launch.num_warps, 'num_stages': launch.num_stages, **launching.OPTIONS}
    machine_code = launch.kernel.warmup(*launch.arguments.values(), **launch.constants, **options, grid=(1,))
    dtypes = {x.dtype for x in launch.arguments.values() if isinstance(x, Tensor) and x.is_floating_point()}
    dtype = next(
        (d for d in dispatch.DTYPES if d in dtypes and (d != torch.float32 or len(dtypes) == 1)), torch.float32
    )
    precision = ', TF32' if 'tf32' in launch.constants.values() else ''
    return Resources(
        operation=_operation(launch),
        kernel=launch.kernel.__name__,
        dtype=str(dtype).removeprefix('torch.') + precision,
        configuration=', '.join(
            f'{k}={v}' for k, v in {**launch.constants, **options}.items() if k != 'enable_fp_fusion'
        ),
        target=target,
        shared=machine_code.metadata.shared,
        **_usage(machine_code.asm['cubin']),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
        text = subprocess.run(
            [tool, '--dump-resource-usage', file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r'REG:(\d+) STACK:(\d+)', text)[0]
    return {'registers': int(registers), 'stack': int(stack)}


class _Target:
    """A GPU that kernels are compiled for, and that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def table(results: Sequence[Resources]) -> str:
    """In Markdown, a row a kernel and dtype: the most that any of its configurations takes on each target."""
    rows: defaultdict[tuple[str, str, str], list[Resources]] = defaultdict(list)
    for result in results:
        rows[result.operation, result.kernel, result.dtype].append(result)
    targets = sorted({result.target for result in results})
    lines = [
        ['operation', 'kernel', 'dtype', 'configurations', *(f'sm_{target}' for target in targets)],
        ['---'] * (4 + len(targets)),
    ]
    for (operation, kernel, dtype), found in sorted(rows.items()):
        cells = []
        for target in targets:
            here = [result for result in found if result.target == target]
            registers, shared, stack = (
                max(getattr(r, name) for r in here) for name in ('registers', 'shared', 'stack')
            )
            cells.append(f'{registers} / {shared / 1024:.0f} / {stack}')
        count = len({result.configuration for result in found})
        lines.append([operation, f'`{kernel.lstrip("_")}`', dtype, str(count), *cells])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


if __name__ == '__main__':
    raise SystemExit(main())
