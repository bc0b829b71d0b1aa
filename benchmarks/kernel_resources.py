"""What do the Triton kernels take of each GPU? Compiled for all targets, without any of them.

Every published network, and every form of an operation that none of them uses, runs forward, in inference and in
training, and backward, on the CPU and with few blocks of each kind, while the launches of its kernels are noted down
and not run. Each distinct configuration is then compiled as Triton would for the device itself, and the registers,
shared memory and stack of the machine code are read. A stack is memory that registers are spilled to.

That takes minutes, so what was found is kept in docs/kernel_resources.json, each under what it was compiled from:
--update compiles what is not there, and --check sees that nothing has changed since, and compiles some again.
"""

import argparse
import hashlib
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.variants import VARIANTS
from attnsr.benchmarks.command import OPERATIONS
from attnsr.files import write_atomically
from attnsr.ops import dispatch, launching
from attnsr.ops.dynamic_conv import aggregate
from attnsr.ops.launching import Launch
from attnsr.ops.window_attention import window_attention

#: Compute capability of each target, and the bytes of shared memory that a program may take there.
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: Bytes of stack that a thread may have: 20 registers of 255, where the compiler prefers spilling to fewer programs;
#: and 64 where a product of float32 is three of TF32, as both parts of each factor take registers then, and tensor
#: cores make up for more.
STACK_LIMIT, EXACT_STACK_LIMIT = 80, 256

#: The variants that differ in more than the number of blocks, with as few as have all kinds: computing and sharing,
#: straight and shifted windows, first and later.
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

RECORD, DOCUMENT = 'kernel_resources.json', 'kernels.md'
MARKS = ('<!-- kernel resources: begin -->', '<!-- kernel resources: end -->')


@dataclass(frozen=True)
class Resources:
    """What one configuration of a kernel takes on one target.

    Attributes:
        source: Digest of all that is compiled, but for the target.
        operation: The folder of the kernel.
        kernel: Name of the function.
        dtype: Of the tensors, and of products of float32.
        configuration: Its constants, and warps and stages.
        target: Compute capability, such as 90.
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        stack: Bytes of stack of a thread, which spilled registers take.
    """

    source: str
    operation: str
    kernel: str
    dtype: str
    configuration: str
    target: int
    registers: int
    shared: int
    stack: int

    @property
    def stack_limit(self) -> int:
        return EXACT_STACK_LIMIT if 'PRECISION=tf32x3' in self.configuration else STACK_LIMIT

    @property
    def fits(self) -> bool:
        return self.stack <= self.stack_limit and self.shared <= SHARED_LIMITS[self.target]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit status: 1 where a configuration does not fit its target, or has changed."""
    parser = argparse.ArgumentParser(prog='python -m attnsr.benchmarks.kernel_resources', description=__doc__)
    add = parser.add_argument
    add('--operation', nargs='+', choices=OPERATIONS, default=OPERATIONS, help='compile only these')
    add('--target', nargs='+', type=int, choices=list(SHARED_LIMITS), default=list(SHARED_LIMITS))
    add('--jobs', type=int, default=os.cpu_count(), help='processes that compile (%(default)s)')
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        '--update', type=Path, metavar='DOCS', help=f'compile what DOCS/{RECORD} lacks; write it, and DOCS/{DOCUMENT}'
    )
    kept.add_argument('--check', type=Path, metavar='DOCS', help=f'compare with DOCS/{RECORD} and DOCS/{DOCUMENT}')
    args = parser.parse_args(argv)
    docs = args.update or args.check
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    if docs and (len(args.operation), len(args.target)) != (len(OPERATIONS), len(SHARED_LIMITS)):
        parser.error('--update and --check are of all operations and targets; leave out --operation and --target')
    for name in (DOCUMENT, RECORD) if args.check else (DOCUMENT,) if docs else ():
        if not (docs / name).is_file():
            parser.error(f'{docs} has no {name}; DOCS is the folder docs of the repository')
    if docs and not all(mark in (docs / DOCUMENT).read_text() for mark in MARKS):
        parser.error(f'{docs / DOCUMENT} lacks the lines that the table stands between: {" and ".join(MARKS)}')
    if launching.runs_on_cpu():
        parser.error('TRITON_INTERPRET is set, and nothing is compiled then; unset it')
    launches = distinct_launches()
    if args.check is not None:
        return _told(list(check(launches, args.check, args.jobs)))
    if args.update is not None:
        return _told(_misfits(update(launches, args.update, args.jobs)))
    chosen = [launch for launch in launches if _operation(launch) in args.operation]
    found = compiled([(launch, target) for launch in chosen for target in args.target], args.jobs)
    print(table(found))
    return _told(_misfits(found))


def _told(lines: Sequence[str]) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return int(bool(lines))


def _misfits(results: Sequence[Resources]) -> list[str]:
    return [
        f'{result.operation}.{result.kernel} ({result.dtype}, {result.configuration}) on sm_{result.target}: '
        f'{result.stack} bytes of stack (at most {result.stack_limit}), {result.shared} bytes of shared memory '
        f'(at most {SHARED_LIMITS[result.target]})'
        for result in results
        if not result.fits
    ]


def update(launches: Sequence[Launch], docs: Path, jobs: int) -> list[Resources]:
    """Bring the record and the table up to date, compiling only what another source or another Triton left there."""
    record = docs / RECORD
    compiler, known = _read(record) if record.exists() else ('', {})
    if compiler != triton.__version__:
        known = {}
    work = [(launch, target) for launch in launches for target in SHARED_LIMITS]
    missing = [(launch, target) for launch, target in work if (_source(launch), target) not in known]
    known |= {(result.source, result.target): result for result in compiled(missing, jobs)}
    results = [known[_source(launch), target] for launch, target in work]
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        row = rows.setdefault(result.source, {**{name: getattr(result, name) for name in _OF_ALL_TARGETS}, 'on': {}})
        row['on'][result.target] = {name: getattr(result, name) for name in _OF_A_TARGET}
    text = ',\n'.join(json.dumps(row) for row in rows.values())
    with write_atomically(record) as file:
        file.write(f'{{"triton": "{triton.__version__}", "resources": [\n{text}\n]}}\n'.encode())
    before, _, after = _parts(docs / DOCUMENT)
    with write_atomically(docs / DOCUMENT) as file:
        file.write(f'{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}'.encode())
    return results


def check(launches: Sequence[Launch], docs: Path, jobs: int) -> Iterator[str]:
    """What is wrong with the record, and with the configurations in it; another Triton's figures may differ.

    Of each kernel the configuration with the most registers is compiled again, for one of the targets.
    """
    record = docs / RECORD
    compiler, known = _read(record)
    same = compiler == triton.__version__
    if not same:
        print(f'{record} is of Triton {compiler}, and this is {triton.__version__}', file=sys.stderr)
    by_source = {_source(launch): launch for launch in launches}
    wanted = {(source, target) for source in by_source for target in SHARED_LIMITS}
    again = f'run `python -m attnsr.benchmarks.kernel_resources --update {docs}`'
    for source, target in sorted(wanted - known.keys()) if same else ():
        launch = by_source[source]
        yield f'{record} lacks {_operation(launch)}.{launch.kernel.__name__} as it is now, on sm_{target}: {again}'
    for of in sorted(known.keys() - wanted) if same else ():
        yield f'{record} has {known[of].operation}.{known[of].kernel} as it is no more: {again}'
    if _parts(docs / DOCUMENT)[1].strip() != table(list(known.values())):
        yield f'{docs / DOCUMENT} has another table than {record}: {again}'
    yield from _misfits(list(known.values()))

    largest: dict[tuple[str, str], Resources] = {}
    for result in known.values():
        kernel = result.operation, result.kernel
        if result.source in by_source and result.registers > (largest[kernel].registers if kernel in largest else 0):
            largest[kernel] = result
    targets = list(SHARED_LIMITS)
    sample = [(result.source, targets[i % len(targets)]) for i, result in enumerate(largest.values())]
    for of, found in zip(
        sample, compiled([(by_source[source], target) for source, target in sample], jobs), strict=True
    ):
        if same and found != known[of]:
            yield f'{record} has {known[of]}, and it is {found} now: {again}'
        elif not found.fits:
            yield from _misfits([found])


_OF_ALL_TARGETS = ('source', 'operation', 'kernel', 'dtype', 'configuration')
_OF_A_TARGET = ('registers', 'shared', 'stack')


def _read(record: Path) -> tuple[str, dict[tuple[str, int], Resources]]:
    """The Triton that compiled what is on record, and that by source and target."""
    content = json.loads(record.read_text())
    found = [
        Resources(**{name: row[name] for name in _OF_ALL_TARGETS}, target=int(target), **of_target)
        for row in content['resources']
        for target, of_target in row['on'].items()
    ]
    return content['triton'], {(result.source, result.target): result for result in found}


def _parts(document: Path) -> tuple[str, str, str]:
    """Before the table, the table, and after it."""
    before, rest = document.read_text().split(MARKS[0])
    inside, after = rest.split(MARKS[1])
    return before, inside, after


def distinct_launches() -> list[Launch]:
    """One launch of every configuration that the published networks have, and of forms that none of them uses."""
    found: dict[Any, Launch] = {}
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        with _launches(tf32) as launches:
            for name, few in FEW_BLOCKS.items():
                variant = VARIANTS[name]  # the others are the same but for the number of blocks
                network = variant.network(upscale=1, **{**variant.arguments, **few})
                if dtype != torch.float32:
                    with torch.autocast('cpu', dtype):
                        _run_network(network)
                _run_network(network.to(dtype))
            _run_other_forms(dtype)
        for launch in launches:
            found.setdefault(_key(launch), launch)
    return list(found.values())


@contextmanager
def _launches(tf32: bool) -> Iterator[list[Launch]]:
    backend, precision = dispatch.get_backend(), torch.backends.cuda.matmul.fp32_precision
    dispatch.set_backend('triton')
    torch.backends.cuda.matmul.fp32_precision = 'tf32' if tf32 else 'ieee'
    try:
        with launching.noted() as launches:
            yield launches
    finally:
        dispatch.set_backend(backend)
        torch.backends.cuda.matmul.fp32_precision = precision


def _run_network(network: SRNetwork) -> None:
    x = torch.rand(1, 3, *SIZE, dtype=next(network.parameters()).dtype)
    network.train()(x).sum().backward()
    with torch.inference_mode():
        network.eval()(x)


def _run_other_forms(dtype: torch.dtype) -> None:
    """Dynamic convolution with given kernels, as many as DLGSANet has, and biases in windows as large as ELAN's."""
    for channels, kernels in ((48, 8), (90, 15)):
        u = torch.rand(1, channels, *SIZE, dtype=dtype, requires_grad=True)
        for memory in (torch.contiguous_format, torch.channels_last):
            given = torch.rand(1, kernels * 49, *SIZE, dtype=dtype).to(memory_format=memory).requires_grad_()
            aggregate(u, given).sum().backward()
    for channels in (12, 24, 36):
        table = torch.rand(31**2, requires_grad=True)
        x = torch.rand(1, 3 * channels, *SIZE, dtype=dtype, requires_grad=True)
        window_attention(x, [16], symmetric=False, relative_bias=[table])[0].sum().backward()


def _key(launch: Launch) -> Any:
    """Equal for launches that differ in sizes of the map only."""
    types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in launch.arguments.values())
    return launch.kernel.__name__, tuple(launch.constants.items()), types, launch.num_warps, launch.num_stages


def _operation(launch: Launch) -> str:
    return launch.kernel.__module__.split('.')[-2]


def _source(launch: Launch) -> str:
    """Digest of a configuration: the functions and constants of its modules, and what decides how it is compiled."""
    used = vars(sys.modules[launch.kernel.__module__]).values()
    modules = sorted({x.__module__ for x in used if isinstance(x, triton.JITFunction)})
    names = [x for module in modules for x in vars(sys.modules[module]).values()]
    texts = [x.src if isinstance(x, triton.JITFunction) else repr(x) for x in names if isinstance(x, _COMPILED)]
    numbers = [
        None if isinstance(x, Tensor) else (x == 1, x % 16 == 0) if isinstance(x, int) else x
        for x in launch.arguments.values()
    ]
    return hashlib.sha256(repr((texts, _key(launch), numbers, launching.OPTIONS)).encode()).hexdigest()[:16]


_COMPILED = (triton.JITFunction, tl.constexpr)


def compiled(work: Sequence[tuple[Launch, int]], jobs: int) -> list[Resources]:
    """The resources of each launch on the target beside it."""
    global _of_workers
    _of_workers = work
    with ProcessPoolExecutor(jobs, multiprocessing.get_context('fork')) as pool:
        found = pool.map(_compile, range(len(work)))
        return list(tqdm(found, total=len(work), desc='compiling', leave=False, disable=None))


# What processes inherit: a kernel cannot be sent to them.
_of_workers: Sequence[tuple[Launch, int]] = ()


def _compile(number: int) -> Resources:
    launch, target = _of_workers[number]
    driver.set_active(_Target(target))
    options = {'num_warps': launch.num_warps, 'num_stages': launch.num_stages, **launching.OPTIONS}
    machine_code = launch.kernel.warmup(*launch.arguments.values(), **launch.constants, **options, grid=(1,))
    dtypes = {x.dtype for x in launch.arguments.values() if isinstance(x, Tensor) and x.is_floating_point()}
    dtype = next(
        (d for d in dispatch.DTYPES if d in dtypes and (d != torch.float32 or len(dtypes) == 1)), torch.float32
    )
    precision = ', TF32' if 'tf32' in launch.constants.values() else ''
    return Resources(
        source=_source(launch),
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
