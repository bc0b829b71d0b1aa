"""``basicsr bench``: what is measured, and where the results go."""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import attnsr
from attnsr.archs.variants import VARIANTS
from attnsr.benchmarks import networks, operations, results
from attnsr.benchmarks import report as reporting
from attnsr.benchmarks.measuring import DTYPES, SIZES, Limits, Size, limits, machine
from attnsr.benchmarks.results import NETWORKS, Measurement, Results
from attnsr.errors import UsageError

#: The mechanisms that are measured; each has its cases in the script of its name.
OPERATIONS = (
    'window_attention',
    'shift_linear',
    'dynamic_conv',
    'channel_attention',
    'separable_conv',
    'gated_feed_forward',
    'cluster_attention',
)

#: What can be asked for, and what it is.
SUBJECTS = {
    'all': 'All mechanisms, then the networks.',
    'ops': 'All mechanisms.',
    **{name: f'The mechanism of ops/{name}: kernel, reference and what else can express it.' for name in OPERATIONS},
    NETWORKS: 'Whole networks.',
}

#: Contestants that can be left out.
OPTIONAL = ('scaled_dot_product_attention', operations.COMPILED)

#: Where results are kept, unless it is said or ``--quick``.
OUTPUT = Path('benchmarks/results')


def add_arguments(parser: argparse.ArgumentParser, subject: str) -> None:
    """Add the arguments with which one of :data:`SUBJECTS` is measured."""
    add = parser.add_argument
    if subject == NETWORKS:
        default = ', '.join(networks.DEFAULT)
        add(
            'network', nargs='*', type=_network, metavar='NETWORK', help=f'of {", ".join(VARIANTS)}; default: {default}'
        )
    add('--device', choices=['cpu', 'cuda'], help='default: cuda where there is one, and cpu elsewhere')
    add('--dtype', nargs='+', choices=list(DTYPES), default=list(DTYPES), help='default: all')
    add('--size', nargs='+', choices=list(SIZES), help=f'{_sizes()}; default: what suits the device')
    add('--seconds', type=_seconds, default=1.0, help='for the rounds of each comparison (default: 1)')
    if subject != NETWORKS:
        add('--without', nargs='+', choices=OPTIONAL, default=[], help='leave out these contestants')
    add(
        '--with',
        nargs='+',
        choices=[operations.COMPILED],
        default=[],
        dest='including',
        help='also this contestant, which --quick and whole networks leave out otherwise: it takes minutes a network',
    )
    add('--quick', action='store_true', help='tiny inputs, few rounds, no torch.compile: does everything work?')
    add('--threads', type=_count, default=torch.get_num_threads(), help='of the CPU (default: %(default)s)')
    add('--output', type=Path, metavar='DIR', help=f'default: {OUTPUT}; with --quick nothing is written without this')
    add('--no-report', action='store_true', help='write no tables and plots; `basicsr bench report` does it later')


def run(args: argparse.Namespace) -> int:
    """Measure as :func:`add_arguments` has it; returns the exit status: 1 where something is wrong, and 0."""
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device: this PyTorch finds no CUDA device; valid here: cpu')
    subjects = {'all': (*OPERATIONS, NETWORKS), 'ops': OPERATIONS}.get(args.subject, (args.subject,))
    steps = [name for name in args.size or () if SIZES[name].training]
    if NETWORKS in subjects and device == 'cpu' and steps:
        raise UsageError(f'--size {steps[0]}: steps of training of networks are measured on a GPU only')
    both = set(args.including).intersection(getattr(args, 'without', ()))
    if both:
        raise UsageError(f'--with and --without: both name {", ".join(both)}')
    torch.set_num_threads(args.threads)
    folder = args.output or (None if args.quick else OUTPUT)
    path = folder and folder / f'{results.slug(machine(device))}.json'
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'--output: {folder} cannot be made: {error.strerror}; name another folder') from None
    kept = results.load(path) if path and path.exists() else Results(machine(device))
    failed = False
    # Convolutions of float32 are to be computed in float32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for what, measurements in _measured(subjects, args, device):
            print(f'\n{what}, {kept.device}\n', flush=True)
            done: list[Measurement] = []
            titles: list[str] = []
            for measurement in measurements:
                measurement.environment = _environment(device)
                kept.add(measurement)
                if path:
                    kept.save(path)
                done.append(measurement)
                if not titles:
                    titles = results.columns(done)
                    print('\n'.join(results.heading(titles)))
                print('\n'.join(results.rows(measurement, titles)), flush=True)
            print('\n'.join(['', *results.notes(done)]))
            failed |= any(measurement.failed for measurement in done)
    if path:
        print('\n'.join(['', str(path), *([] if args.no_report else reporting.write(kept, path))]))
    else:
        print('\nnothing was written: what --quick measures is kept only where --output DIR says so')
    return int(failed)


def report(path: Path) -> None:
    """Write tables and plots of a file of results."""
    if not path.is_file():
        raise UsageError(f'{path} is no file; `basicsr bench` writes <device>.json, into benchmarks/results by default')
    print('\n'.join(reporting.write(results.load(path), path)))


def _measured(
    subjects: Sequence[str], args: argparse.Namespace, device: str
) -> Iterator[tuple[str, Iterator[Measurement]]]:
    seconds = 0.0 if args.quick else args.seconds
    measured: Limits | None = None
    for what in subjects:
        if what == NETWORKS:
            yield what, _networks(args, device, seconds)
            continue
        if measured is None:
            measured = limits(device, args.dtype)
            print(_told(measured))
        cases: Sequence[operations.Case] = importlib.import_module(f'attnsr.benchmarks.{what}').CASES
        without = dict.fromkeys(args.without, 'left out by --without')
        if args.quick and operations.COMPILED not in args.including:
            without.setdefault(operations.COMPILED, 'left out by --quick')
        sizes = _chosen(args, ('tiny', 'tiny_patches'), _OF_OPERATIONS[device])
        yield what, operations.measurements(what, cases, sizes, device, args.dtype, measured, seconds, without)


_OF_OPERATIONS = {'cpu': ('small', '720p', 'patches'), 'cuda': ('720p', '1080p', 'training', '4K')}


def _networks(args: argparse.Namespace, device: str, seconds: float) -> Iterator[Measurement]:
    for name in getattr(args, 'network', None) or networks.DEFAULT:
        for size in _chosen(args, ('tiny',), networks.default_sizes(name, device)):
            compiled = networks.COMPILED in args.including
            yield from networks.measurements(name, size, device, args.dtype, seconds, compiled)


def _chosen(args: argparse.Namespace, quick: Sequence[str], default: Sequence[str]) -> list[Size]:
    return [SIZES[name] for name in args.size or (quick if args.quick else default)]


def _told(found: Limits) -> str:
    products = ', '.join(f'{flops / 1e12:.3g} TFLOP/s in {dtype}' for dtype, flops in found.flops_per_second.items())
    return f'limits of the device: {found.bytes_per_second / 1e9:.4g} GB/s in a copy; {products} in a matrix product'


def _environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {'attnsr': attnsr.__version__, 'torch': torch.__version__}
    if device == 'cpu':
        found['threads'] = torch.get_num_threads()
    return {**found, 'on': date.today().isoformat()}


def _sizes() -> str:
    return '; '.join(f'{size.name}: {size.batch} x {size.height} x {size.width}' for size in SIZES.values())


def _network(text: str) -> str:
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f'there is no network {text!r}; valid: {", ".join(VARIANTS)}')
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be a number of at least 0, got {text}')
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)
