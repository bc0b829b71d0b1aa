"""How many images a second does BasicSR's data set give, from which kind of storage, and how many does training need?

    python -m attnsr.benchmarks.data_loading PHOTOS

``PairedImageDataset`` with BasicSR's sampler and loader reads x4 pairs of a folder of photographs, each patch from an
image chosen at random, in batches of 16: sub-images of several sizes and whole photographs, in LMDBs and in folders.
Whole photographs of 2040 x 1404, the size of DIV2K's, are made of the folder's, mirrored. All files are in the page
cache, so that what is measured is the work of the processor. The data set decodes a whole image for every patch; that
of the last rows cuts the patch out before it turns it into float32, which shows what a type of our own could gain.

The need is that of the step of training (forward, backward, Adam) on the processor, as many images a second as it
takes. What a GPU needs was not measured. From the multiply-accumulates of a step, three times those of the forward, it
is told how many images a second a device takes that sustains 10^13 floating-point operations a second.
"""

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
from basicsr.data import build_dataloader
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils import FileClient, imfrombytes, img2tensor

from attnsr.archs.variants import VARIANTS
from attnsr.benchmarks import tables
from attnsr.benchmarks.data_preparation import BASICSR_COMPRESSION, SCALE, imdecode, imread
from attnsr.benchmarks.measuring import machine
from attnsr.data_prep import images
from attnsr.data_prep.pairs import Job, Pair, prepare, windows
from attnsr.errors import UsageError

NAME = 'data_loading'

BATCH = 16
PATCHES = 192, 256
WORKERS = 0, 1, 2

#: The size of DIV2K's images.
LARGE = 1404, 2040

#: Networks whose step of training is measured, on so many patches of 64 x 64 LR pixels.
NETWORKS, STEP_BATCH, STEP_SIDE = ('elan_light', 'asid'), 4, 64


@dataclass(frozen=True)
class Storage:
    """How pairs are kept.

    Attributes:
        title: In tables.
        crop: Side of the sub-images; None for whole images.
        step: From one sub-image to the next.
        compression: Of PNG; None where files are as they are.
        files: In a folder rather than in an LMDB.
        large: Of :data:`LARGE` pixels.
        own: Read by :class:`CutFirst`.
    """

    title: str
    crop: int | None = None
    step: int | None = None
    compression: int = 1
    files: bool = False
    large: bool = False
    own: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f'{self.crop}_{self.step}_{self.compression}_{"large" if self.large else "photographs"}'

    def fits(self, patch: int) -> bool:
        return self.crop is None or self.crop >= patch


STORAGES = (
    Storage('sub-images 480/240, LMDB, compression 1', 480, 240),
    Storage('sub-images 480/240, LMDB, compression 0', 480, 240, 0),
    Storage(f'sub-images 480/240, files, compression {BASICSR_COMPRESSION}', 480, 240, BASICSR_COMPRESSION, True),
    Storage('sub-images 384/192, LMDB, compression 1', 384, 192),
    Storage('sub-images 384/192, LMDB, compression 0', 384, 192, 0),
    Storage('sub-images 288/144, LMDB, compression 1', 288, 144),
    Storage('sub-images 288/144, LMDB, compression 0', 288, 144, 0),
    Storage('sub-images 240/120, LMDB, compression 1', 240, 120),
    Storage('sub-images 240/120, LMDB, compression 0', 240, 120, 0),
    Storage('whole photographs, LMDB'),
    Storage('whole photographs, files', files=True),
    Storage('whole 2040 x 1404, LMDB', large=True),
    Storage('whole 2040 x 1404, files', files=True, large=True),
    Storage('sub-images 480/240, LMDB, compression 1, cut before float32', 480, 240, own=True),
    Storage('sub-images 480/240, LMDB, compression 0, cut before float32', 480, 240, 0, own=True),
)


class CutFirst(PairedImageDataset):
    """``PairedImageDataset`` for training from LMDBs that turns no more than the patch into float32."""

    client: FileClient | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.client is None:
            self.client = FileClient(self.io_backend_opt.pop('type'), **self.io_backend_opt)
        key = self.paths[index]['gt_path']
        gt, lq = (imfrombytes(self.client.get(key, which)) for which in ('gt', 'lq'))
        gt, lq = paired_random_crop(gt, lq, self.opt['gt_size'], self.opt['scale'], key)
        gt, lq = augment([image.astype(np.float32) / 255 for image in (gt, lq)], True, True)
        gt, lq = img2tensor([gt, lq], bgr2rgb=True, float32=True)
        return {'lq': lq, 'gt': gt, 'lq_path': key, 'gt_path': key}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table."""
    parser = tables.parser(NAME, __doc__)
    parser.add_argument(
        'photos', type=Path, metavar='PHOTOS', help='folder of photographs of 480 pixels a side at least'
    )
    parser.add_argument(
        '--seconds', type=float, default=1.5, help='of each reading, in each round (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error('--rounds: at least 1 is needed')
    try:
        path = tables.result_file(args.output, NAME)
        photographs = images.find(args.photos)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    content = {
        'device': machine('cpu'),
        **tables.environment(),
        'rounds': args.rounds,
        'need': [need(network) for network in NETWORKS],
    }
    with tempfile.TemporaryDirectory() as folder:
        _make(photographs, Path(folder))
        taken = rates(Path(folder), list(itertools.product(PATCHES, WORKERS)), args.rounds, args.seconds)
        content['storages'] = [
            {
                'title': storage.title,
                'crop': storage.crop,
                'step': storage.step,
                'megabytes': _bytes(storage, Path(folder)) / 1e6,
                'used': {str(patch): _used(storage, patch, Path(folder)) for patch in PATCHES if storage.fits(patch)},
                'positions': {
                    str(patch): _positions(storage, patch, Path(folder)) for patch in PATCHES if storage.fits(patch)
                },
                'rates': taken[storage.title],
            }
            for storage in STORAGES
        ]
    markdown = _markdown(content)
    tables.save(path, content, markdown)
    print('\n'.join(['', *markdown, '', str(path), str(path.with_suffix('.md'))]))
    return 0


# What is read ---------------------------------------------------------------------------------------------------------


def _make(photographs: Sequence[Path], folder: Path) -> None:
    """Every storage in the folder, as an LMDB or as files in ``HR`` and ``LR``."""
    large = folder / 'large'
    large.mkdir()
    for path in photographs:
        image = _mirrored(imread(path))
        if image.shape[:2] == LARGE:
            cv2.imwrite(str(large / f'{path.stem}.png'), image, [cv2.IMWRITE_PNG_COMPRESSION, BASICSR_COMPRESSION])
    for storage in {storage.name: storage for storage in STORAGES}.values():
        files = images.find(large) if storage.large else photographs
        pairs = tuple(Pair(images.key(path), path) for path in files)
        job = Job(folder / storage.name, pairs, (SCALE,), crop=storage.crop, step=storage.step)
        prepare([job], storage.compression, quiet=True)
    for storage in STORAGES:
        for name in ('HR', f'LR_x{SCALE}') if storage.files else ():
            out = folder / storage.name / name
            out.mkdir()
            with lmdb.open(f'{out}.lmdb', readonly=True, lock=False) as environment, environment.begin() as transaction:
                for key, png in transaction.cursor():
                    file = out / f'{key.decode()}.png'
                    if storage.crop is None:
                        file.write_bytes(png)
                    else:  # as BasicSR's script writes it
                        cv2.imwrite(str(file), imdecode(png), [cv2.IMWRITE_PNG_COMPRESSION, BASICSR_COMPRESSION])


def _mirrored(image: np.ndarray) -> np.ndarray:
    """A photograph and its mirror images, cut to :data:`LARGE` where it is large enough."""
    wide = np.concatenate([image, image[:, ::-1]], axis=1)
    return np.concatenate([wide, wide[::-1]], axis=0)[: LARGE[0], : LARGE[1]]


def _shapes(storage: Storage, folder: Path) -> list[tuple[int, int]]:
    """Heights and widths of the HR images."""
    lines = (folder / storage.name / 'meta_info_HR.txt').read_text().splitlines()
    shapes = (line.partition(' (')[2].split(',') for line in lines)
    return [(int(height), int(width)) for height, width, _ in shapes]


def _bytes(storage: Storage, folder: Path) -> int:
    names = 'HR', f'LR_x{SCALE}'
    if storage.files:
        return sum(file.stat().st_size for name in names for file in (folder / storage.name / name).iterdir())
    return sum((folder / storage.name / f'{name}.lmdb' / 'data.mdb').stat().st_size for name in names)


def _used(storage: Storage, patch: int, folder: Path) -> float:
    """The share of the decoded HR pixels that are in a patch."""
    shapes = _shapes(storage, folder)
    return patch**2 * len(shapes) / sum(height * width for height, width in shapes)


def _positions(storage: Storage, patch: int, folder: Path) -> float:
    """The share of all patches of the photographs that lie whole in a sub-image."""
    if storage.crop is None or storage.step is None:
        return 1.0
    found = every = 0
    for height, width in _shapes(Storage('', large=storage.large), folder):
        rows: set[int] = set()
        columns: set[int] = set()
        for top, left, h, w in windows(height, width, storage.crop, storage.step):
            rows.update(range(top, top + h - patch + 1))
            columns.update(range(left, left + w - patch + 1))
        found += len(rows) * len(columns)
        every += (height - patch + 1) * (width - patch + 1)
    return found / every


# What training needs --------------------------------------------------------------------------------------------------


def need(network: str) -> dict[str, Any]:
    """Images a second that a step of training takes on this processor."""
    net = VARIANTS[network].build(SCALE)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    lq = torch.rand(STEP_BATCH, 3, STEP_SIDE, STEP_SIDE)
    gt = torch.rand(STEP_BATCH, 3, SCALE * STEP_SIDE, SCALE * STEP_SIDE)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
    return {
        'network': VARIANTS[network].title,
        'images a second': STEP_BATCH / median(seconds[1:]),  # the first one sets things up
    }


# Reading --------------------------------------------------------------------------------------------------------------


def rates(
    folder: Path, combinations: Sequence[tuple[int, int]], rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Images a second by storage, and by patch and number of workers ('192, 2'); in turns, one value each round."""
    taken: dict[str, dict[str, list[float]]] = {storage.title: {} for storage in STORAGES}
    for _ in range(rounds):
        for storage, (patch, workers) in itertools.product(STORAGES, combinations):
            if storage.fits(patch):
                rate = _rate(storage, folder, patch, workers, seconds)
                taken[storage.title].setdefault(f'{patch}, {workers}', []).append(rate)
    return taken


def _rate(storage: Storage, folder: Path, patch: int, workers: int, seconds: float) -> float:
    end = '' if storage.files else '.lmdb'
    root = folder / storage.name
    options: dict[str, Any] = {
        'phase': 'train',
        'scale': SCALE,
        'dataroot_gt': f'{root}/HR{end}',
        'dataroot_lq': f'{root}/LR_x{SCALE}{end}',
        'io_backend': {'type': 'disk' if storage.files else 'lmdb'},
        'gt_size': patch,
        'use_hflip': True,
        'use_rot': True,
        'num_worker_per_gpu': workers,
        'batch_size_per_gpu': BATCH,
    }
    dataset = (CutFirst if storage.own else PairedImageDataset)(options)
    sampler = EnlargedSampler(dataset, 1, 0, 10**5 // len(dataset))  # more than are ever read
    batches = iter(build_dataloader(dataset, options, num_gpu=1, sampler=sampler, seed=0))
    for _ in range(1 + 2 * workers):  # workers start, and have two batches each ready before they are asked for
        next(batches)
    begun = time.perf_counter()
    read = 0
    while read < 2 or time.perf_counter() - begun < seconds:
        next(batches)
        read += 1
    rate = read * BATCH / (time.perf_counter() - begun)
    del batches
    gc.collect()  # ends the workers
    return rate


# Table ----------------------------------------------------------------------------------------------------------------


def _markdown(content: Mapping[str, Any]) -> list[str]:
    versions = ', '.join(f'{name} {content[name]}' for name in tables.environment())
    columns = list(itertools.product(PATCHES, WORKERS))
    titles = ['', 'MB']
    titles += [f'{patch}: {text}' for patch in PATCHES for text in ('pixels used', 'patches')]
    titles += [f'{patch}: {workers} workers' for patch, workers in columns]
    rows = []
    for storage in content['storages']:
        row = [storage['title'], f'{storage["megabytes"]:.0f}']
        for patch in PATCHES:
            row += [_percent(storage[share].get(str(patch))) for share in ('used', 'positions')]
        row += [_median(storage['rates'].get(f'{patch}, {workers}')) for patch, workers in columns]
        rows.append(row)
    needs = [[each['network'], f'{each["images a second"]:.1f}'] for each in content['need']]
    return [
        f'# Loading of data, {content["device"]}',
        '',
        f'## Images a second by patch and workers, x{SCALE}',
        '',
        *tables.table(titles, rows),
        '',
        f'- Measured with {versions}; median of {content["rounds"]} rounds, in turns, files in the page cache, '
        f'batches of {BATCH}.',
        '- Pixels used: the share of the decoded HR pixels that are in the patch. Patches: the share of all patches of '
        'the photographs that lie whole in a sub-image.',
        '',
        f'## Images a second that a step of training takes, x{SCALE}, LR patches of {STEP_SIDE} x {STEP_SIDE}',
        '',
        *tables.table(['', 'images a second'], needs),
        '',
        f'- Measured in float32 on the processor, {STEP_BATCH} patches at a time. Not run on a GPU.',
    ]


def _percent(share: float | None) -> str:
    return '' if share is None else f'{share:.0%}'


def _median(values: Sequence[float] | None) -> str:
    return f'{median(values):.0f}' if values else ''


if __name__ == '__main__':
    raise SystemExit(main())
