"""How fast and how large is inference, against SwinIR in its lightweight setting on the same machine?

Both networks run in one process in turns, so that a machine that slows down slows both. That process does nothing else,
since what ran before decides how much memory the C library gives back and must fetch anew: with glibc as it comes, a
network of many large intermediate maps spends half its time on that. So the times are taken twice, with the C library
as it comes and told to keep all memory. Before anything is measured, what inference gives is compared with what the
same network gives under autograd in double precision; where they disagree there are no figures.
"""

import argparse
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from basicsr.archs.swinir_arch import SwinIR
from torch import Tensor, nn
from tqdm import tqdm

from attnsr.archs.lcoan_arch import SphericalKMeans
from attnsr.archs.variants import VARIANTS
from attnsr.benchmarks.published_lcoan import PublishedLCoAN
from attnsr.files import write_atomically

EPILOG = """\
examples:
  python -m attnsr.benchmarks.inference
  python -m attnsr.benchmarks.inference --network asid --repeats 9
  python -m attnsr.benchmarks.inference --network lcoan --baseline published_lcoan --size 96 96
  python -m attnsr.benchmarks.inference --device cuda --dtype bfloat16 --output benchmarks/results/inference.md
"""

# Largest error of an element that agreement allows, as a fraction of the standard deviation of the output.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.2}
# Has glibc keep the memory that is freed.
KEEPING = {'MALLOC_MMAP_THRESHOLD_': str(2**30), 'MALLOC_TRIM_THRESHOLD_': str(2**33)}
# LR height and width on which agreement is checked: large enough that inference works in several pieces.
CHECKED_SIZE = (64, 96)


def swinir_light(upscale: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid')
        return SwinIR(
            upscale=upscale,
            img_size=64,
            window_size=8,
            img_range=1.0,
            embed_dim=60,
            depths=[6] * 4,
            num_heads=[6] * 4,
            mlp_ratio=2,
            upsampler='pixelshuffledirect',
        )


def published_lcoan(upscale: int) -> nn.Module:
    return PublishedLCoAN(upscale=upscale)


@dataclass(frozen=True)
class Entry:
    """A network that can be measured.

    Attributes:
        title: Its name in the table.
        build: From the scale.
        multiple: The sides of its input must be multiples of this; for SwinIR of its windows, since it pads nothing.
    """

    title: str
    build: Callable[[int], nn.Module]
    multiple: int = 1


NETWORKS = {
    **{variant.name: Entry(variant.title, variant.build) for variant in VARIANTS.values()},
    'swinir_light': Entry('SwinIR-light', swinir_light, multiple=8),
    'published_lcoan': Entry('LCoAN as published', published_lcoan),
}
BASELINES = [name for name in NETWORKS if name not in VARIANTS]


@dataclass
class Measurement:
    """What was measured of one network.

    Attributes:
        title: As in the table.
        size: LR height and width.
        parameters: How many are trained.
        error: Largest error of an element at :data:`CHECKED_SIZE`, over the standard deviation of the output.
        seconds: Of each forward, in the order measured.
        seconds_keeping: The same with a C library that keeps freed memory; empty on a GPU.
        held: Bytes just before the first forward in a fresh process.
        peak: Largest number of bytes at any moment of that forward, what was held included.
    """

    title: str
    size: tuple[int, int]
    parameters: int
    error: float
    seconds: list[float]
    seconds_keeping: list[float]
    held: int
    peak: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 0, or 1 where a network's inference is wrong."""
    parser = argparse.ArgumentParser(
        prog='python -m attnsr.benchmarks.inference',
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--network', default='elan_light', choices=list(VARIANTS))
    add('--baseline', default='swinir_light', choices=BASELINES)
    add('--scale', type=_positive, default=4, help='upscaling factor (4)')
    add('--size', type=_positive, nargs=2, default=(180, 320), metavar=('H', 'W'), help='LR pixels (180 320)')
    add('--dtype', default='float32', choices=list(TOLERANCES), help='of the networks and their input (float32)')
    add('--repeats', type=_positive, default=5, help='forwards of each network that are timed (5)')
    add('--threads', type=_positive, default=torch.get_num_threads(), help='on the CPU (%(default)s)')
    add('--device', default='cpu', choices=['cpu', 'cuda'])
    add('--output', type=Path, metavar='FILE', help='write the table to FILE.md, or all figures to FILE.json')
    # How this program calls itself for a process in which nothing else has run.
    add('--part', choices=['error', 'memory', 'seconds'], help=argparse.SUPPRESS)
    add('--of', choices=list(NETWORKS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('argument --device: this PyTorch finds no CUDA device; valid here: cpu')
    if args.output is not None and args.output.suffix not in ('.md', '.json'):
        parser.error(f'argument --output: the name must end in .md or .json, got {args.output}')
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f'argument --output: there is no folder {args.output.parent}')

    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    # Not a later cast: SwinIR makes its masks in the default type on every forward.
    torch.set_default_dtype(getattr(torch, args.dtype))
    if args.part is not None:
        parts = {'error': _error, 'memory': _memory_of_first_forward, 'seconds': _seconds_in_turns}
        print(json.dumps(parts[args.part](args)))
        return 0
    try:
        results = measure(args)
    except Disagreement as error:
        print(f'No figures: {error}', file=sys.stderr)
        return 1
    report = _markdown(results)
    print(report)
    if args.output is not None:
        with write_atomically(args.output) as file:
            file.write((report if args.output.suffix == '.md' else json.dumps(results, indent=2) + '\n').encode())
    return 0


class Disagreement(Exception):
    """Inference gives something else than the network is."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the report tells, baseline first.

    Raises:
        Disagreement: inference of one of the networks is not within :data:`TOLERANCES` of the network.
    """
    names = (args.baseline, args.network)
    errors = [_in_fresh_process('error', args, name) for name in names]
    for name, error in zip(names, errors, strict=True):
        if not error <= TOLERANCES[args.dtype]:
            raise Disagreement(
                f'inference of {NETWORKS[name].title} is off by {error:.2g} standard deviations of its output, '
                f'where {args.dtype} allows {TOLERANCES[args.dtype]:.2g}'
            )
    memory = [_in_fresh_process('memory', args, name) for name in names]
    seconds = _in_fresh_process('seconds', args)
    keeping = _in_fresh_process('seconds', args, environment=KEEPING) if args.device == 'cpu' else [[], []]
    measurements = [
        Measurement(
            title=NETWORKS[name].title,
            size=_size(name, args),
            parameters=sum(p.numel() for p in _network(name, args).parameters()),
            error=errors[i],
            seconds=seconds[i],
            seconds_keeping=keeping[i],
            **memory[i],
        )
        for i, name in enumerate(names)
    ]
    return {
        'scale': args.scale,
        'dtype': args.dtype,
        'device': args.device,
        'machine': _machine(args.device),
        'torch': torch.__version__,
        'threads': args.threads,
        'networks': [asdict(measurement) for measurement in measurements],
        'times_as_fast': {
            'ratio_of_medians': statistics.median(seconds[0]) / statistics.median(seconds[1]),
            'median_of_pairwise_ratios': statistics.median(a / b for a, b in zip(*seconds, strict=True)),
        },
    }


def _network(name: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name].build(args.scale).to(args.device)
    if any(isinstance(module, SphericalKMeans) for module in network.modules()):
        _train_once(network, args)  # without cluster centres there is no inference
    return network.eval()


def _train_once(network: nn.Module, args: argparse.Namespace) -> None:
    """Take the statistics of BatchNorm and the centres of k-means from a batch."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(_image((32, 32), args))
    network.eval()


def _size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    height, width = (-(-side // NETWORKS[name].multiple) * NETWORKS[name].multiple for side in args.size)
    return height, width


def _image(size: tuple[int, int], args: argparse.Namespace) -> Tensor:
    return torch.rand(1, 3, *size, device=args.device)


def _seconds(network: nn.Module, x: Tensor) -> float:
    _finish(x.device.type)
    start = time.perf_counter()
    with torch.inference_mode():
        network(x)
    _finish(x.device.type)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _in_fresh_process(
    part: str, args: argparse.Namespace, name: str | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    command = [sys.executable, '-m', 'attnsr.benchmarks.inference', '--part', part]
    for option in ('network', 'baseline', 'scale', 'dtype', 'repeats', 'threads', 'device'):
        command.append(f'--{option}={getattr(args, option)}')
    command += ['--size', *map(str, args.size)] + ([f'--of={name}'] if name else [])
    environment = os.environ | (environment or {})
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout)


def _seconds_in_turns(args: argparse.Namespace) -> list[list[float]]:
    """The seconds of each forward of the baseline, and of the network."""
    names = (args.baseline, args.network)
    networks, inputs = [_network(name, args) for name in names], [_image(_size(name, args), args) for name in names]
    for network, x in zip(networks, inputs, strict=True):
        _seconds(network, x)  # to warm up
    seconds: list[list[float]] = [[], []]
    for _ in tqdm(range(args.repeats), desc='in turns', leave=False, disable=None):
        for network, x, taken in zip(networks, inputs, seconds, strict=True):
            taken.append(_seconds(network, x))
    return seconds


def _error(args: argparse.Namespace) -> float:
    """``error`` of :class:`Measurement`."""
    network, x = _network(args.of, args), _image(CHECKED_SIZE, args)
    _train_once(network, args)  # features that nothing has normalised saturate every softmax, where rounding decides
    expected = copy.deepcopy(network).double()(x.double()).detach()
    with torch.inference_mode():
        return ((network(x).double() - expected).abs().max() / expected.std()).item()


def _memory_of_first_forward(args: argparse.Namespace) -> dict[str, int]:
    """``held`` and ``peak`` of :class:`Measurement`, of this process."""
    network, x = _network(args.of, args), _image(_size(args.of, args), args)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        _seconds(network, x)
        return {'held': held, 'peak': torch.cuda.max_memory_allocated()}
    Path('/proc/self/clear_refs').write_text('5')  # forgets the peak of loading
    held = _resident('VmRSS')
    _seconds(network, x)
    return {'held': held, 'peak': _resident('VmHWM')}


def _resident(field: str) -> int:
    """Bytes in memory, now (VmRSS) or at most so far (VmHWM). Not ``ru_maxrss``, which begins with the parent's."""
    return 1024 * int(re.findall(rf'^{field}:\s*(\d+) kB$', Path('/proc/self/status').read_text(), re.MULTILINE)[0])


def _machine(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    models = re.findall(r'^model name\s*:\s*(.+)$', cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f'{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores'


def _markdown(results: dict[str, Any]) -> str:
    base, ours = (Measurement(**network) for network in results['networks'])
    fast = results['times_as_fast']
    medians = [statistics.median(m.seconds) for m in (base, ours)]
    above = [m.peak - m.held for m in (base, ours)]
    megabytes = '{:.0f}'.format
    keeping: list[tuple[str, ...]] = []
    if base.seconds_keeping:
        kept_medians = [statistics.median(m.seconds_keeping) for m in (base, ours)]
        times = f'{kept_medians[0] / kept_medians[1]:.2f} times as fast'
        keeping = [('seconds, median, memory kept', *(f'{m:.3g}' for m in kept_medians), times)]
    rows: list[tuple[str, ...]] = [
        ('', base.title, ours.title, 'ratio'),
        ('---',) * 4,
        ('LR height x width', *(f'{m.size[0]} x {m.size[1]}' for m in (base, ours)), ''),
        ('parameters', f'{base.parameters:,}', f'{ours.parameters:,}', f'{ours.parameters / base.parameters:.2f}'),
        ('seconds, median', *(f'{m:.3g}' for m in medians), f'**{fast["ratio_of_medians"]:.2f} times as fast**'),
        ('seconds, pair by pair', '', '', f'{fast["median_of_pairwise_ratios"]:.2f} times as fast'),
        ('seconds, least to most', *(f'{min(m.seconds):.3g} to {max(m.seconds):.3g}' for m in (base, ours)), ''),
        *keeping,
        ('peak memory of the forward, MB', *(megabytes(m / 1e6) for m in above), f'**{above[1] / above[0]:.2f}**'),
        ('peak memory in all, MB', *(megabytes(m.peak / 1e6) for m in (base, ours)), f'{ours.peak / base.peak:.2f}'),
        ('error', *(f'{m.error:.1g}' for m in (base, ours)), ''),
    ]
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
    threads = f', {results["threads"]} thread{"s" * (results["threads"] > 1)}' if results['device'] == 'cpu' else ''
    checked = ' x '.join(map(str, CHECKED_SIZE))
    note = ' Memory kept: with\n  a C library that keeps what is freed, where it otherwise fetches it anew.' * bool(
        keeping
    )
    kept = 'resident memory' if results['device'] == 'cpu' else "memory of PyTorch's allocator"
    return f"""\
# Inference: {ours.title} x{results['scale']} against {base.title}

{results['machine']}{threads}, PyTorch {results['torch']}, {results['dtype']}, batch 1.

{table}

- Seconds of one forward: after one of each network to warm up, {len(base.seconds)} of each in turns. Their ratio is
  that of the medians; pair by pair, the median of the ratios of one forward to the next.{note}
- Memory: {kept} at the highest moment of the first forward in a fresh process. In all: with what the process
  held; of the forward: less what it held just before (libraries, parameters and the image).
- Error: the largest of an element against the same network under autograd in float64, over the standard deviation of
  the output, at LR {checked}. Above {TOLERANCES[results['dtype']]:.2g} there are no figures.
"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)


if __name__ == '__main__':
    raise SystemExit(main())
