"""How fast are data sets prepared, and in how much memory: against BasicSR's own chain, and by the number of images?

    python -m attnsr.benchmarks.data_preparation PHOTOS      a folder of photographs, against BasicSR's chain
    python -m attnsr.benchmarks.data_preparation --scaling   on 500, 1000, 2000 and 4000 images

BasicSR's chain to sub-image LMDBs of x4 is what its documentation has users do, without MATLAB:

1. LR images by ``basicsr.utils.matlab_functions.imresize``, here in as many processes as there are cores;
2. sub-images of HR and LR by ``scripts/data_preparation/extract_subimages.py``, in 20 processes as it comes. The
   script is no part of the package: :func:`_extract_subimages` does what it does;
3. LMDBs by ``basicsr.utils.lmdb_util.make_lmdb_from_imgs`` with its defaults.

Both are compared first: the same keys and HR pixels, and LR pixels that differ by their rounding. Every run is a fresh
process that begins to count after its imports. Memory is that of a run of its own, as looking at it takes time: the
largest sum of the resident set of the process and of what those that it starts have each for itself alone.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import cv2
import lmdb
import numpy as np
import torch
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.matlab_functions import imresize

from attnsr.benchmarks import tables
from attnsr.benchmarks.measuring import machine
from attnsr.data_prep import images, sample
from attnsr.data_prep.pairs import Job, Pair, prepare
from attnsr.data_prep.parallel import available_cores
from attnsr.errors import UsageError
from attnsr.files import write_atomically
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = 'data_preparation'

SCALE = 4
CROP, STEP = 480, 240

#: Processes of extract_subimages.py as it comes, and the compression of the PNG files that it writes.
BASICSR_PROCESSES, BASICSR_COMPRESSION = 20, 3

#: Largest share of LR values that may differ by more than 1: near borders, which BasicSR mirrors and MATLAB repeats.
LARGE_DIFFERENCES = 0.01

# Of the synthetic images, which have six sub-images each.
COUNTS = (500, 1000, 2000, 4000)
SYNTHETIC = 240, 320
SYNTHETIC_CROP, SYNTHETIC_STEP = 160, 80

#: Name of a file that is there while a fresh process prepares: not while it imports or ends.
PREPARING = 'preparing'

OURS, BASICSR = 'basicsr prepare pairs', "BasicSR's chain"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write tables and a plot."""
    parser = tables.parser(NAME, __doc__)
    parser.add_argument(
        'photos', nargs='?', type=Path, metavar='PHOTOS', help="folder to prepare as BasicSR's chain does"
    )
    parser.add_argument(
        '--scaling',
        nargs='*',
        type=int,
        metavar='N',
        help=f'prepare so many synthetic images (default: {" ".join(map(str, COUNTS))})',
    )
    args = parser.parse_args(argv)
    if args.photos is None and args.scaling is None:
        parser.error('name a folder of photographs, or --scaling')
    if args.rounds < 1 or min(args.scaling or COUNTS) < 1:
        parser.error('--rounds and --scaling: at least 1 is needed')
    try:
        path = tables.result_file(args.output, NAME)
        content = {'device': machine('cpu'), **tables.load(path)}
        if args.photos is not None:
            content['comparison'] = {**tables.environment(), **compare(args.photos, args.rounds)}
            tables.save(path, content, _markdown(content))
        if args.scaling is not None:
            content['scaling'] = {**tables.environment(), **scaling(args.scaling or COUNTS, args.rounds)}
            tables.save(path, content, _markdown(content))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print('\n'.join(['', *_markdown(content), '', str(path), str(path.with_suffix('.md')), *_plot(content, path)]))
    return 0


# Against BasicSR's chain ----------------------------------------------------------------------------------------------


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Times and memory of both on a folder of photographs, in turns, after both were seen to give the same.

    Raises:
        UsageError: A photograph is smaller than a sub-image, where BasicSR fails; or the results are not the same.
    """
    photographs = images.find(folder)
    sizes = [imread(path).shape[:2] for path in photographs]
    for path, size in zip(photographs, sizes, strict=True):
        if min(size) // SCALE * SCALE < CROP:
            raise UsageError(f"{path}: is smaller than {CROP} pixels, and BasicSR's chain cannot cut it")

    def run(what: str, out: str, memory: bool = False) -> dict[str, Any]:
        return _in_fresh_process({'what': what, 'folder': str(folder), 'out': out}, memory)

    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        watched = {OURS: run(OURS, ours, memory=True), BASICSR: run(BASICSR, theirs, memory=True)}
        agreement = _agreement(Path(ours), Path(theirs))
    taken: dict[str, list[dict[str, Any]]] = {OURS: [], BASICSR: []}
    for number in range(rounds):
        for what, answers in taken.items():
            with tempfile.TemporaryDirectory() as out:
                answers.append(run(what, out))
            print(f'round {number + 1}: {what}: {answers[-1]["seconds"]:.2f} s', flush=True)
    return {
        'photographs': len(photographs),
        'pixels': sum(height * width for height, width in sizes),
        'cores': available_cores(),
        'agreement': agreement,
        'runs': {
            what: {
                'seconds': [answer['seconds'] for answer in answers],
                'parts': {part: median(a['parts'][part] for a in answers) for part in answers[0]['parts']},
                'peak': max(watched[what]['peak'], *(answer['resident'] for answer in answers)),
                'held': watched[what]['held'],
                'bytes': watched[what]['bytes'],
            }
            for what, answers in taken.items()
        },
    }


def _agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """How the LMDBs of both differ.

    Raises:
        UsageError: In more than rounding and borders.
    """
    differences = np.zeros(256, np.int64)
    for name in ('HR', f'LR_x{SCALE}'):
        entries = [_entries(folder / f'{name}.lmdb') for folder in (ours, theirs)]
        if entries[0].keys() != entries[1].keys():
            raise UsageError(f'{name}: the LMDBs have other keys; no figures')
        differences[:] = 0
        for key, png in entries[0].items():
            our_pixels, their_pixels = imdecode(png), imdecode(entries[1][key])
            if our_pixels.shape != their_pixels.shape:
                raise UsageError(f"{name}: '{key}' is of another size; no figures")
            differences += np.bincount(cv2.absdiff(our_pixels, their_pixels).ravel(), minlength=256)
        large = differences[2:].sum() / differences.sum()
        if large > (0 if name == 'HR' else LARGE_DIFFERENCES) or (name == 'HR' and differences[1]):
            raise UsageError(f'{name}: the LMDBs have other pixels; no figures')
    return {
        'keys': len(entries[0]),
        'LR values': int(differences.sum()),
        'identical': differences[0] / differences.sum(),
        'off by 1': differences[1] / differences.sum(),
        'off by more': large,
        'largest difference': int(np.flatnonzero(differences).max()),
    }


def imread(path: Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """An image as BasicSR's tools read it."""
    image = cv2.imread(str(path), flags)
    if image is None:
        raise UsageError(f'{path}: OpenCV cannot read it')
    return image


def imdecode(png: bytes) -> np.ndarray:
    """An entry as BasicSR's data sets read it."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def _entries(path: Path) -> dict[str, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {key.decode(): value for key, value in transaction.cursor()}


def _prepare(photographs: Sequence[Path], out: Path, crop: int = CROP, step: int = STEP) -> dict[str, float]:
    pairs = tuple(Pair(images.key(path), path) for path in photographs)
    prepare([Job(out, pairs, (SCALE,), crop=crop, step=step)], quiet=True)
    return {}


def _basicsr_chain(photographs: Sequence[Path], out: Path) -> dict[str, float]:
    """The seconds that its parts take."""
    parts = {}
    begun = time.perf_counter()
    reduced = out / 'LR'
    reduced.mkdir()
    with Pool(available_cores()) as pool:
        pool.map(partial(_reduce, out=reduced), photographs, chunksize=1)
    parts['LR images'] = time.perf_counter() - begun

    folders = {'HR': out / 'HR_sub', f'LR_x{SCALE}': out / 'LR_sub'}
    sources = photographs, sorted(reduced.iterdir())
    begun = time.perf_counter()
    for sub_images, files, factor in zip(folders.values(), sources, (1, SCALE), strict=True):
        _extract_subimages(files, sub_images, CROP // factor, STEP // factor)
    parts['sub-images'] = time.perf_counter() - begun

    begun = time.perf_counter()
    for name, sub_images in folders.items():
        file_names = sorted(path.name for path in sub_images.iterdir())
        keys = [file_name.removesuffix('.png') for file_name in file_names]
        make_lmdb_from_imgs(str(sub_images), str(out / f'{name}.lmdb'), file_names, keys)
    parts['LMDBs'] = time.perf_counter() - begun
    return parts


def _reduce(path: Path, out: Path) -> None:
    torch.set_num_threads(1)  # there are as many processes as cores, and BasicSR multiplies row by row
    image = imread(path)
    height, width = (side // SCALE * SCALE for side in image.shape[:2])
    reduced = imresize(image[:height, :width].astype(np.float32) / 255, 1 / SCALE)
    cv2.imwrite(str(out / f'{path.stem}.png'), (reduced * 255).clip(0, 255).round().astype(np.uint8))


def _extract_subimages(files: Sequence[Path], out: Path, crop: int, step: int) -> None:
    """As BasicSR's script, with its threshold of 0; HR images are cut to a multiple of the scale besides."""
    out.mkdir()
    with Pool(BASICSR_PROCESSES) as pool:
        pool.map(partial(_extract, out=out, crop=crop, step=step), files, chunksize=1)


def _extract(path: Path, out: Path, crop: int, step: int) -> None:
    image = imread(path, cv2.IMREAD_UNCHANGED)
    multiple = SCALE if crop == CROP else 1
    height, width = (side // multiple * multiple for side in image.shape[:2])
    starts = []
    for side in (height, width):
        space = np.arange(0, side - crop + 1, step)
        starts.append(np.append(space, side - crop) if side - (space[-1] + crop) > 0 else space)
    number = 0
    for top in starts[0]:
        for left in starts[1]:
            number += 1
            part = np.ascontiguousarray(image[top : top + crop, left : left + crop, ...])
            file = out / f'{path.stem}_s{number:03d}.png'
            cv2.imwrite(str(file), part, [cv2.IMWRITE_PNG_COMPRESSION, BASICSR_COMPRESSION])


# By the number of images ----------------------------------------------------------------------------------------------


def scaling(counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times and memory by the number of images, which are made for it."""
    taken: dict[int, list[dict[str, Any]]] = {count: [] for count in sorted(counts)}
    with tempfile.TemporaryDirectory() as folder:
        synthetic = Path(folder, 'photographs')
        _make_images(synthetic, max(counts))
        for number in range(rounds):
            for count, answers in taken.items():
                out = Path(folder, 'out')
                out.mkdir()
                answers.append(_in_fresh_process({'what': count, 'folder': str(synthetic), 'out': str(out)}))
                shutil.rmtree(out)
                print(f'round {number + 1}: {count} images: {answers[-1]["seconds"]:.2f} s', flush=True)
    return {
        'cores': available_cores(),
        'runs': [
            {
                'images': count,
                'seconds': [answer['seconds'] for answer in answers],
                'held': median(answer['held'] for answer in answers),
                'resident': [answer['resident'] for answer in answers],
            }
            for count, answers in taken.items()
        ],
    }


def _make_images(folder: Path, count: int) -> None:
    """PNG files, each of a random detail of one of scikit-image's photographs, mirrored or not."""
    folder.mkdir()
    photographs = [sample.photograph(file) for file in (*sample.TRAINING, *sample.VALIDATION)]
    random = np.random.default_rng(0)
    for number in range(count):
        image = photographs[random.integers(len(photographs))]
        height, width = SYNTHETIC
        top, left = (random.integers(side - part + 1) for side, part in zip(image.shape, SYNTHETIC, strict=False))
        part = image[top : top + height, left : left + width][:, :: random.choice((-1, 1))]
        cv2.imwrite(str(folder / f'{number:04d}.png'), np.ascontiguousarray(part))


# Fresh processes ------------------------------------------------------------------------------------------------------


def _in_fresh_process(request: Mapping[str, Any], memory: bool = False) -> dict[str, Any]:
    """What :func:`answer` prints; with ``memory`` also ``peak``, the most bytes in memory of all processes."""
    script = f'import sys; from attnsr.benchmarks import {NAME}; {NAME}.answer(sys.argv[1])'
    peak = 0
    with tempfile.TemporaryFile('w+') as output:
        process = subprocess.Popen([sys.executable, '-c', script, json.dumps(request)], stdout=output, stderr=output)
        while memory and process.poll() is None:
            with contextlib.suppress(*_ENDED):
                Path(request['out'], PREPARING).stat()
                first, *others = _processes(process.pid) or [process.pid]
                peak = max(peak, _resident('VmRSS', first) + sum(map(_private, others)))
            time.sleep(0.02)
        process.wait()
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode:
        raise UsageError(f'{request["what"]}: its process ended with status {process.returncode}: {lines[-1:]}')
    found = json.loads(next(line for line in reversed(lines) if line.startswith('{')))
    return {**found, 'peak': peak} if memory else found


def answer(request: str) -> None:
    """What a fresh process is for: prepare, and print the seconds, those of parts, and bytes as JSON."""
    asked_for = json.loads(request)
    out = Path(asked_for['out'])
    photographs = images.find(Path(asked_for['folder']))
    held = _resident('VmRSS')
    (out / PREPARING).touch()
    begun = time.perf_counter()
    if asked_for['what'] == BASICSR:
        parts = _basicsr_chain(photographs, out)
    elif asked_for['what'] == OURS:
        parts = _prepare(photographs, out)
    else:
        parts = _prepare(photographs[: asked_for['what']], out, SYNTHETIC_CROP, SYNTHETIC_STEP)
    seconds = time.perf_counter() - begun
    (out / PREPARING).unlink()
    size = sum(path.stat().st_size for path in out.glob('*.lmdb/data.mdb'))
    found = {'seconds': seconds, 'parts': parts, 'held': held, 'resident': _resident('VmHWM'), 'bytes': size}
    print(json.dumps(found))


# What is raised, or missing, where the files of a process that has ended are read.
_ENDED = FileNotFoundError, ProcessLookupError, IndexError


def _resident(field: str, process: int | str = 'self') -> int:
    """Bytes in memory, now (VmRSS) or at most so far (VmHWM)."""
    return _bytes(Path(f'/proc/{process}/status'), field)


def _private(process: int) -> int:
    """Bytes in memory that no other process shares."""
    path = Path(f'/proc/{process}/smaps_rollup')
    try:
        return _bytes(path, 'Private_Clean') + _bytes(path, 'Private_Dirty')
    except _ENDED:
        return 0


def _bytes(path: Path, field: str) -> int:
    return 1024 * int(re.findall(rf'^{field}:\s*(\d+) kB$', path.read_text(), re.MULTILINE)[0])


def _processes(process: int) -> list[int]:
    """A process and all below it."""
    try:
        below = [Path(task, 'children').read_text().split() for task in Path(f'/proc/{process}/task').iterdir()]
    except _ENDED:
        return []
    return [process, *(each for children in below for child in children for each in _processes(int(child)))]


# Tables and plot ------------------------------------------------------------------------------------------------------


def _markdown(content: Mapping[str, Any]) -> list[str]:
    lines = [f'# Preparation of data, {content["device"]}']
    if 'comparison' in content:
        lines += ['', *_comparison_lines(content['comparison'])]
    if 'scaling' in content:
        lines += ['', *_scaling_lines(content['scaling'])]
    return lines


def _comparison_lines(found: Mapping[str, Any]) -> list[str]:
    runs, agreed = found['runs'], found['agreement']
    base = median(runs[BASICSR]['seconds'])
    rows = [
        [
            what,
            f'{median(run["seconds"]):.2f}',
            f'{min(run["seconds"]):.2f} to {max(run["seconds"]):.2f}',
            f'{base / median(run["seconds"]):.2f}',
            f'{run["peak"] / 1e6:.0f}',
            f'{run["held"] / 1e6:.0f}',
            f'{run["bytes"] / 1e6:.1f}',
        ]
        for what, run in runs.items()
    ]
    titles = ['', 's', 'least and most', 'times as fast', 'peak memory, MB', 'of these the libraries', 'LMDBs, MB']
    parts = ', '.join(f'{part} {seconds:.2f} s' for part, seconds in runs[BASICSR]['parts'].items())
    return [
        f"## Against BasicSR's chain, x{SCALE}, {found['photographs']} photographs of "
        f'{found["pixels"] / found["photographs"] / 1e6:.2f} million pixels, sub-images {CROP}/{STEP}',
        '',
        *tables.table(titles, rows),
        '',
        f'- {_measured(found)}; median of {len(runs[OURS]["seconds"])} rounds, in turns, files in the page cache.',
        f"- Parts of BasicSR's chain: {parts}.",
        '- Peak memory is the largest sum of the resident set and of what processes that it starts have by themselves.',
        f'- Both give the same {agreed["keys"]} keys and HR pixels. Of {agreed["LR values"]:,} LR values, '
        f'{agreed["off by 1"]:.1%} differ by 1 and {agreed["off by more"]:.2%} by more, '
        f'{agreed["largest difference"]} at most: BasicSR rounds once, at the end, and mirrors at borders.',
    ]


def _scaling_lines(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            str(run['images']),
            f'{median(run["seconds"]):.1f}',
            f'{min(run["seconds"]):.1f} to {max(run["seconds"]):.1f}',
            f'{1e3 * median(run["seconds"]) / run["images"]:.2f}',
            f'{median(run["resident"]) / 1e6:.0f}',
            f'{min(run["resident"]) / 1e6:.0f} to {max(run["resident"]) / 1e6:.0f}',
            f'{run["held"] / 1e6:.0f}',
        ]
        for run in found['runs']
    ]
    titles = [
        'images',
        's',
        'least and most',
        'ms an image',
        'peak memory, MB',
        'least and most',
        'of these the libraries',
    ]
    height, width = SYNTHETIC
    return [
        f'## By the number of images: {width} x {height}, x{SCALE}, sub-images {SYNTHETIC_CROP}/{SYNTHETIC_STEP}',
        '',
        *tables.table(titles, rows),
        '',
        f'- {_measured(found)}; median of {len(found["runs"][0]["seconds"])} rounds, in turns, in fresh processes.',
        "- The images are random details of scikit-image's photographs. Peak memory is the largest resident set.",
    ]


def _measured(found: Mapping[str, Any]) -> str:
    versions = ', '.join(f'{name} {found[name]}' for name in tables.environment())
    return f'Measured with {versions}, on {found["cores"]} cores'


def _plot(content: Mapping[str, Any], path: Path) -> list[str]:
    """Draw times and memory over the number of images; returns lines that tell what was written."""
    if 'scaling' not in content:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no plot: matplotlib is not installed; pip install 'attnsr[bench]'"]
    figure = Figure(figsize=(10, 4), layout='constrained', dpi=100)
    _draw(figure, content['scaling']['runs'])
    figure.suptitle(f'Preparation of data, {content["device"]}', fontweight='bold')
    plot = path.with_suffix('.png')
    with write_atomically(plot) as file:
        figure.savefig(file, format='png')
    return [str(plot)]


def _draw(figure: 'Figure', runs: Sequence[Mapping[str, Any]]) -> None:
    time_axes, memory_axes = figure.subplots(1, 2)
    counts = [run['images'] for run in runs]
    seconds = [median(run['seconds']) for run in runs]
    rate = math.fsum(seconds) / sum(counts)
    time_axes.plot([0, max(counts)], [0, rate * max(counts)], color='grey', linewidth=1, label='proportional')
    time_axes.plot(counts, seconds, 'o', color=COLOURS[0], label='measured')
    time_axes.set_ylabel('s')
    time_axes.legend()
    memory_axes.plot(counts, [median(run['resident']) / 1e6 for run in runs], 'o-', color=COLOURS[0], label='in all')
    memory_axes.plot(counts, [run['held'] / 1e6 for run in runs], color='grey', linewidth=1, label='the libraries')
    memory_axes.set_ylabel('peak memory, MB')
    memory_axes.legend()
    for axes in (time_axes, memory_axes):
        axes.set_xlabel('images')
        axes.set(xlim=(0, None), ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.grid(alpha=0.2)


if __name__ == '__main__':
    raise SystemExit(main())
