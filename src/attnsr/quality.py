"""``basicsr test`` without an option file: weights, measured on data sets, with bicubic and the paper's figures beside.

What is measured and how is said in ``docs/evaluation.md``. The same weights and data give the same figures to the last
digit, on any number of threads: an image is computed by one thread, and several images at once.
"""

import argparse
import csv
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from torch import Tensor
from tqdm import tqdm

from attnsr import iqa, published, reports, sets, sheets
from attnsr.archs.state_dicts import identify
from attnsr.data_prep.layouts import BENCHMARKS
from attnsr.data_prep.lmdb_dataset import write_errors
from attnsr.data_prep.parallel import available_cores, in_order
from attnsr.errors import UsageError
from attnsr.evaluate import ImageResult, device_name, enlarge, now, number, shortest, versions
from attnsr.inference import DTYPES, Dtype, choose_device, exact_convolutions
from attnsr.memory import is_out_of_memory
from attnsr.reports import Column, difference, mean
from attnsr.upscaler import OVERLAP, Upscaler
from attnsr.weights import find_weights, load_network

__all__ = [
    'BICUBIC',
    'Metric',
    'Model',
    'Results',
    'SetResults',
    'add_arguments',
    'ensemble_x8',
    'load',
    'metrics',
    'run',
    'run_command',
]

#: The name of the baseline, in the place of a network's.
BICUBIC = 'bicubic'


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        name: As the folder of its results is called.
        title: As tables have it, for example ``'ELAN-light x4'``.
        scale: The scale factor.
        variant: One of :data:`attnsr.archs.variants.VARIANTS`; None for any other.
        upscaler: The network; None for bicubic.
        device: Where it computes; None for bicubic.
        weights: Its file; None for bicubic.
        ensemble: Whether the output is the mean over the eight flips and rotations.
        settings: How it computes, for the results: device, dtype, tile and the like.
    """

    name: str
    title: str
    scale: int
    variant: str | None = None
    upscaler: Upscaler | None = None
    device: torch.device | None = None
    weights: Path | None = None
    ensemble: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, lr: Tensor) -> np.ndarray:
        """Upscale one image.

        Args:
            lr: (3, h, w) RGB, float32 in [0, 1], on the CPU.

        Returns:
            uint8 (scale * h, scale * w, 3) BGR, rounded as BasicSR's ``tensor2img`` does.

        Raises:
            UsageError: the network gives values that are no numbers.
        """
        if self.upscaler is None:
            return enlarge(lr, self.scale)
        upscale = self.upscaler.tensor
        x = lr[None]
        y = ensemble_x8(upscale, x) if self.ensemble else upscale(x)
        try:
            return tensor2img(self.upscaler.checked(y))
        except UsageError as error:
            raise UsageError(f'{self.weights}: {error}') from None


def ensemble_x8(upscale: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Self-ensemble: Timofte et al., "Seven ways to improve example-based single image super resolution", CVPR 2016.

    Args:
        upscale: Takes (B, 3, h, w) and gives (B, 3, s * h, s * w), float32.
        x: (B, 3, h, w).

    Returns:
        The mean of what ``upscale`` makes of the eight flips and rotations of ``x``, each turned back; float32.
    """
    total: Tensor | None = None
    for flipped in (False, True):
        for turns in range(4):
            turned = torch.rot90(x.flip(3) if flipped else x, turns, (2, 3))
            y = torch.rot90(upscale(turned.contiguous()), -turns, (2, 3))
            y = y.flip(3) if flipped else y
            total = y.clone() if total is None else total.add_(y)
    assert total is not None
    return total.div_(8)


def load(
    network: str | None,
    weights: str | PathLike[str] | None,
    scale: int | None = None,
    *,
    device: str = 'auto',
    dtype: Dtype = 'float32',
    tile: int | None = None,
    overlap: int = OVERLAP,
    ensemble: bool = False,
) -> Model:
    """What the arguments of the command line say is to be measured.

    Args:
        network: See :func:`attnsr.weights.load_network`, or ``'bicubic'``.
        weights: See :func:`attnsr.weights.find_weights`; None for bicubic.
        scale: For bicubic; of a network, whose weights tell it, it must be the same.
        device: See :func:`attnsr.inference.choose_device`.
        dtype: What the network computes in.
        tile: Side of the tiles in LR pixels; None for whole images.
        overlap: Of the tiles, in LR pixels.
        ensemble: Self-ensemble over the eight flips and rotations.

    Raises:
        UsageError: An argument is missing or contradicts another one, or the file is no checkpoint of the network.
        OSError: The file cannot be read.
    """
    if network == BICUBIC:
        if weights is not None:
            raise UsageError(
                f'--network {BICUBIC} has no weights: leave out -w {weights}, or name the network they are of'
            )
        if scale is None or scale < 2:
            raise UsageError(f'--network {BICUBIC} needs the scale: --scale 2, 3 or 4')
        if ensemble or tile is not None or dtype != 'float32':
            raise UsageError(f'--network {BICUBIC} has no ensemble, tiles or dtype; leave these options out')
        return Model(f'{BICUBIC}_x{scale}', f'Bicubic x{scale}', scale)
    if network is not None and network.startswith(f'{BICUBIC}_x'):
        raise UsageError(
            f'--network {network}: write --network {BICUBIC} --scale {network.removeprefix(f"{BICUBIC}_x")}'
        )
    if weights is None:
        raise UsageError(f'{f"--network {network}" if network else "--data"} needs the weights: -w FILE')
    weights, net = find_weights(weights), load_network(network, weights)
    identity = identify(net.state_dict())
    variant = identity.variant if identity else None
    title = f'{variant.title if variant else type(net).__name__} x{net.upscale}'
    if scale not in (None, net.upscale):
        raise UsageError(f'{weights}: this is a checkpoint of {title}, and --scale is {scale}; leave it out')
    place, stem = choose_device(device), weights.stem
    kind = f'{variant.name if variant else type(net).__name__.lower()}_x{net.upscale}'
    return Model(
        name=stem if kind in stem else f'{kind}_{stem}',
        title=title,
        scale=net.upscale,
        variant=variant.name if variant else None,
        upscaler=Upscaler(net, device=place, dtype=dtype, tile=tile, overlap=overlap),
        device=place,
        weights=weights,
        ensemble=ensemble,
        settings={
            'device': device_name(place),
            'dtype': dtype,
            'tile': tile,
            'overlap': None if tile is None else overlap,
            'ensemble': 'x8' if ensemble else None,
        },
    )


# Metrics -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One figure of an image.

    Attributes:
        name: In results, for example ``'psnr_rgb'``.
        title: In tables, for example ``'PSNR RGB'``.
        options: How it is computed, as BasicSR's option files say it.
        calculate: Takes an image and the HR image, uint8 (h, w, 3) BGR.
        describe: For the table's notes.
    """

    name: str
    title: str
    options: dict[str, Any]
    calculate: Callable[[np.ndarray, np.ndarray], float]
    describe: str


def metrics(scale: int, rgb: bool = False, perceptual: Sequence[str] = (), device: str = 'auto') -> list[Metric]:
    """The metrics of a test: PSNR and SSIM, and what is asked for beside them.

    Args:
        scale: So many pixels are left out along each border.
        rgb: PSNR and SSIM on RGB too.
        perceptual: Of :data:`attnsr.iqa.METRICS`.
        device: Where these are computed.

    Raises:
        UsageError: pyiqa, which the perceptual ones need, is not installed.
        OSError: What they need cannot be downloaded.
    """
    found = []
    for suffix, on_y in (('', True), ('_rgb', False))[: 1 + rgb]:
        for kind, function in (('psnr', calculate_psnr), ('ssim', calculate_ssim)):
            options: dict[str, Any] = {'crop_border': scale, 'test_y_channel': on_y}
            name = kind + suffix
            title = name.upper().replace('_', ' ')
            how = 'on Y (ITU-R BT.601, as MATLAB)' if on_y else 'on RGB'
            describe = f"BasicSR's, {how} of 8-bit images without a border of {scale} pixels"
            found.append(
                Metric(name, title, {'type': f'calculate_{kind}', **options}, _basicsr(function, options), describe)
            )
    for name in perceptual:
        options = {'type': f'pyiqa {name}', 'crop_border': scale}
        better = iqa.METRICS[name]
        describe = f'pyiqa {iqa.version()}, on RGB without a border of {scale} pixels; {better}'
        found.append(Metric(name, name.upper(), options, iqa.create(name, scale, device), describe))
    return found


def _basicsr(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda image, hr: float(function(image, hr, **options))


# Results -------------------------------------------------------------------------------------------------------------


@dataclass
class SetResults:
    """What was measured on one set; the images in the order of their names.

    Attributes:
        name: The set's.
        source: Folder or LMDB of its HR images.
        notes: What is to be known of it.
        images: The figures of each image.
        paper: What the paper publishes of the network on this set; None where that is not known, or where the set has
            not all of its images.
    """

    name: str
    source: str
    notes: tuple[str, ...]
    images: list[ImageResult]
    paper: published.PublishedResult | None = None


@dataclass
class Results:
    """What a test found.

    Attributes:
        root: Where :meth:`write` writes.
        model: What was measured.
        info: ``name``, ``date``, ``network``, ``scale``, ``weights``, ``sha256``, ``settings``, ``versions``.
        metrics: What of each image.
        sets: One entry a set.
    """

    root: Path
    model: Model
    info: dict[str, Any]
    metrics: Sequence[Metric]
    sets: list[SetResults] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as ``results.json`` has it, except that infinite values are floats here."""
        return {
            **self.info,
            'metrics': {metric.name: metric.options for metric in self.metrics},
            'datasets': [self._summary(each) for each in self.sets],
        }

    def _summary(self, each: SetResults) -> dict[str, Any]:
        means = {
            kind: {m.name: mean([getattr(image, kind).get(m.name) for image in each.images]) for m in self.metrics}
            for kind in ('metrics', 'bicubic')
        }
        paper = asdict(each.paper) if each.paper else None
        return {
            'name': each.name,
            'source': each.source,
            'notes': list(each.notes),
            'images': len(each.images),
            **means,
            'paper': paper,
            'difference': paper
            and {kind: difference(means['metrics'][kind], paper[kind]) for kind in ('psnr', 'ssim')},
            'per_image': [
                {'name': image.name, 'metrics': image.metrics, 'bicubic': image.bicubic} for image in each.images
            ],
        }

    def table(self) -> str:
        """The table as plain text; empty where no set was finished."""
        if not self.sets:
            return ''
        return '\n'.join([self._title(), '', *reports.plain(self._columns(), self._rows()), '', *self._notes()])

    def markdown(self) -> str:
        """The table as Markdown, then one of all images for each set."""
        notes = [f'- {note}' for note in self._notes()]
        lines = [f'# {self._title()}', '', *reports.markdown(self._columns(), self._rows()), '', *notes, '']
        for each in self.sets:
            columns = [Column('', 'image', number=False), *self._figure_columns()]
            rows = [[image.name, *self._figures(image.metrics, image.bicubic)] for image in each.images]
            sheet = f'![{each.name}: the worst three, the median and the best image]({quote(each.name)}.png)'
            lines += [f'## {each.name}', '', *reports.markdown(columns, rows), '', sheet, '']
        return '\n'.join(lines)

    def csv(self) -> str:
        """One line an image, below a line of names; all digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        kinds = ['', *(f'{BICUBIC}_' for _ in range(self._has_baseline))]
        writer.writerow(['data_set', 'image', *(f'{kind}{metric.name}' for kind in kinds for metric in self.metrics)])
        for each in self.sets:
            for image in each.images:
                values = [image.metrics, image.bicubic][: len(kinds)]
                writer.writerow([each.name, image.name, *(found[m.name] for found in values for m in self.metrics)])
        return text.getvalue()

    def write(self) -> None:
        """Write ``results.json``, ``results.md`` and ``results.csv`` below :attr:`root`, each whole or not at all.

        Raises:
            OSError: A file cannot be written.
        """
        files = {'json': reports.json_text(self.as_dict()), 'md': self.markdown(), 'csv': self.csv()}
        for suffix, text in files.items():
            path = self.root / f'results.{suffix}'
            with write_errors(path):
                reports.write(path, text)

    @property
    def _has_baseline(self) -> bool:
        return self.model.upscaler is not None

    @property
    def _has_paper(self) -> bool:
        return any(each.paper for each in self.sets)

    def _figure_columns(self) -> list[Column]:
        over = ['', *([BICUBIC] * self._has_baseline)]
        return [Column(whose, metric.title) for whose in over for metric in self.metrics]

    def _figures(self, ours: dict[str, Any], bicubic: dict[str, Any]) -> list[str]:
        values = [ours, *([bicubic] * self._has_baseline)]
        return [number(found.get(metric.name), metric.options) for found in values for metric in self.metrics]

    def _columns(self) -> list[Column]:
        beside = [Column(over, title) for over in ('paper', 'difference') for title in ('PSNR', 'SSIM')]
        return [
            Column('', 'data set', number=False),
            Column('', 'images'),
            *self._figure_columns(),
            *(beside if self._has_paper else []),
        ]

    def _rows(self) -> list[list[str]]:
        options = {metric.name: metric.options for metric in self.metrics}
        rows = []
        for each in map(self._summary, self.sets):
            row = [each['name'], str(each['images']), *self._figures(each['metrics'], each['bicubic'])]
            if self._has_paper:
                row += [number((each['paper'] or {}).get(kind), options[kind]) for kind in ('psnr', 'ssim')]
                row += [number((each['difference'] or {}).get(kind), options[kind], '+') for kind in ('psnr', 'ssim')]
            rows.append(row)
        return rows

    def _title(self) -> str:
        settings = self.model.settings
        if not settings:
            return self.model.title
        how = 'whole images' if settings['tile'] is None else f'tiles of {settings["tile"]}'
        ensemble = ', mean over eight flips and rotations' if self.model.ensemble else ''
        return f'{self.model.title}, {how}, {settings["dtype"]}{ensemble}, on {settings["device"]}'

    def _notes(self) -> list[str]:
        notes = []
        if self.model.weights:
            notes.append(f'Weights: {shortest(str(self.model.weights))}, SHA-256 {self.info["sha256"][:16]}.')
        for describe in dict.fromkeys(metric.describe for metric in self.metrics):
            titles = ', '.join(metric.title for metric in self.metrics if metric.describe == describe)
            notes.append(f'{titles}: {describe}.')
        notes.append('Bicubic: the same LR images, enlarged by imresize of BasicSR and rounded to 8 bits.')
        notes += [f'{each.name}: {note}.' for each in self.sets for note in each.notes]
        for each in dict.fromkeys(each.paper.source for each in self.sets if each.paper):
            measured = next(s.paper.measured for s in self.sets if s.paper and s.paper.source == each)
            notes.append(f'Paper: {each}. {measured}')
        return notes


# The test ------------------------------------------------------------------------------------------------------------


def run(
    model: Model,
    data: Sequence[Path],
    root: Path,
    chosen: Sequence[Metric],
    threads: int | None = None,
    save_images: bool = False,
) -> Results:
    """Measure on all sets that are found, and write the results after each of them.

    Args:
        model: What to measure.
        data: Folders and LMDBs, see :func:`attnsr.sets.find`.
        root: Folder for the results: ``results.json``, ``results.md``, ``results.csv``, a contact sheet
            ``<set>.png`` for each set, and with ``save_images`` ``images/<set>/<image>.png``.
        chosen: The metrics, see :func:`metrics`.
        threads: Images that are computed at once, each by one thread; one a core by default. On a GPU images are
            computed one after the other.
        save_images: Keep the upscaled images.

    Raises:
        DataSetError: See :func:`attnsr.sets.find`; nothing was measured.
        UsageError: ``threads`` is below 1.
        OSError: A folder or file cannot be written, or an image does not fit into memory. Sets that were finished
            before are written.
    """
    if threads is not None and threads < 1:
        raise UsageError(f'--threads: is {threads}; at least 1 is needed')
    workers = threads or available_cores()
    found = sets.find(data, model.scale, workers)
    with write_errors(root, 'name another folder by -o DIR'):
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()  # seen now, not when hours have passed
    results = Results(root, model, _info(model), chosen)
    with _reproducible():
        for each in found:
            with tempfile.TemporaryDirectory(prefix='attnsr-') as temporary:
                images = root / 'images' / each.name if save_images else Path(temporary)
                measured = _measure(model, each, chosen, workers, images)
                results.sets.append(measured)
                results.write()
                sheet = root / f'{each.name}.png'
                with write_errors(sheet):
                    reports.write(sheet, _sheet(model, each, measured, images))
    return results


def _measure(
    model: Model, each: sets.PhotographSet, chosen: Sequence[Metric], workers: int, images: Path
) -> SetResults:
    if model.device is not None and model.device.type != 'cpu':
        workers = 1

    def measure(photograph: sets.Photograph) -> ImageResult:
        torch.set_num_threads(1)  # of this thread: OpenMP has a setting for each
        hr, lr = photograph.read()
        x = to_tensor(lr)
        bicubic = enlarge(x, model.scale)
        try:
            ours = bicubic if model.upscaler is None else model(x)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OSError(
                f'{each.name}: {photograph.name} ({lr.shape[1]} x {lr.shape[0]} LR pixels) does not fit into memory; '
                'compute it in tiles (--tile 128), or fewer images at once (--threads 1)'
            ) from None
        with write_errors(images / f'{photograph.name}.png'):
            reports.write(images / f'{photograph.name}.png', _png(ours))
        figures = [{m.name: m.calculate(image, hr) for m in chosen} for image in (ours, bicubic)]
        return ImageResult(photograph.name, figures[0], figures[1] if model.upscaler else {}, None)

    measured = in_order(measure, each.photographs, workers)
    bar = tqdm(measured, desc=each.name, total=len(each.photographs), unit='image', disable=None)
    usual = BENCHMARKS[each.name].images if each.name in BENCHMARKS else None
    paper = published.find(model.variant, model.scale, each.name) if usual == len(each.photographs) else None
    return SetResults(each.name, str(each.source), each.notes, list(bar), paper)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) BGR to float32 (3, h, w) RGB in [0, 1], to the bit as BasicSR reads images."""
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)).astype(np.float32) / 255.0)


def _sheet(model: Model, each: sets.PhotographSet, measured: SetResults, images: Path) -> bytes:
    photographs = {photograph.name: photograph for photograph in each.photographs}
    rows = []
    for label, index in sheets.choose([image.metrics['psnr'] for image in measured.images]):
        image = measured.images[index]
        hr, lr = photographs[image.name].read()
        file = images / f'{image.name}.png'
        ours = cv2.imread(str(file))
        if ours is None:
            raise OSError(f'{file}: was written a moment ago, and cannot be read')
        shown = [(model.title, _caption(image.metrics, image.bicubic), ours)]
        if image.bicubic:
            shown.insert(0, ('Bicubic', _caption(image.bicubic), enlarge(to_tensor(lr), model.scale)))
        rows.append(sheets.Row(label, image.name, hr, shown))
    picture = sheets.draw(f'{each.name}, {model.title}', rows)
    encoded = io.BytesIO()
    picture.save(encoded, format='PNG')
    return encoded.getvalue()


def _caption(figures: dict[str, float], baseline: Mapping[str, float] | None = None) -> str:
    gain = difference(figures['psnr'], baseline['psnr']) if baseline else None
    more = '' if gain is None else f' ({gain:+.2f})'
    return f'PSNR {figures["psnr"]:.2f}{more}   SSIM {figures["ssim"]:.4f}'


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image)[1].tobytes()


def _info(model: Model) -> dict[str, Any]:
    digest = None
    if model.weights:
        with open(model.weights, 'rb') as file:
            digest = sha256(file.read()).hexdigest()
    return {
        'name': model.name,
        'date': now(),
        'network': model.title,
        'variant': model.variant,
        'scale': model.scale,
        'weights': str(model.weights) if model.weights else None,
        'sha256': digest,
        'settings': model.settings,
        'versions': versions(),
    }


_settings = threading.Lock()


@contextmanager
def _reproducible() -> Iterator[None]:
    """Settings of the process under which the same input gives the same bits, until the block ends."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when cuBLAS is first used
    backends: Any = torch.backends  # whose annotations lack some of what follows
    cudnn, matmuls = backends.cudnn, (backends.cuda.matmul, backends.mkldnn.matmul)
    with _settings, exact_convolutions():
        cudnn_before = cudnn.benchmark, cudnn.deterministic
        deterministic = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        threads, cv_threads, precision = torch.get_num_threads(), cv2.getNumThreads(), _precision_of_products()
        precisions = [matmul.fp32_precision for matmul in matmuls]
        cudnn.benchmark, cudnn.deterministic = False, True
        cv2.setNumThreads(1)
        torch.set_float32_matmul_precision('highest')  # by the older name, which is refused beside others by newer ones
        for matmul in matmuls:
            matmul.fp32_precision = 'ieee'
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = cudnn_before
            torch.set_num_threads(threads)
            cv2.setNumThreads(cv_threads)
            torch.set_float32_matmul_precision(precision)
            for matmul, before in zip(matmuls, precisions, strict=True):
                matmul.fp32_precision = before
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)


def _precision_of_products() -> str:
    """By PyTorch's older name, which it says only where the newer ones agree."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return 'highest'


# The command line ----------------------------------------------------------------------------------------------------

#: Options of a test of data sets, and of one by an option file; none of them is there unless it is given.
OWN = {
    name: f'--{name.replace("_", "-")}'
    for name in (
        *('network', 'data', 'scale', 'tile', 'overlap', 'ensemble', 'rgb', 'metrics', 'dtype', 'device', 'threads'),
        *('output', 'save_images'),
    )
}
OF_OPTION_FILES = {name: f'--{name}' for name in ('compare', 'force_yml', 'launcher', 'debug', 'auto_resume')}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a test of data sets, which has no option file."""
    group = parser.add_argument_group('without an option file')
    add = group.add_argument
    add(
        '--data',
        type=Path,
        nargs='+',
        metavar='PATH',
        help='folders of benchmark sets in any layout of `basicsr prepare benchmark`, or HR LMDBs; whatever is in '
        'another folder is a set of its name',
    )
    add(
        '--network',
        metavar='NAME',
        help=f'what the weights are of, to be checked: as elan_light_x4, or an option file; or {BICUBIC}, with --scale '
        'and without weights',
    )
    add('--scale', type=int, metavar='N', help='of bicubic; that of a network is told by its weights')
    add('--tile', type=int, metavar='N', help='side of tiles in LR pixels; default: whole images')
    add('--overlap', type=int, metavar='N', help=f'of tiles, in LR pixels; default: {OVERLAP}')
    add('--ensemble', choices=['x8'], help='self-ensemble: the mean over eight flips and rotations')
    add('--rgb', action='store_true', help='PSNR and SSIM on RGB beside those on Y')
    add(
        '--metrics',
        nargs='+',
        choices=list(iqa.METRICS),
        help="through pyiqa, which is an extra: pip install 'attnsr[iqa]'",
    )
    add('--dtype', choices=list(DTYPES), help='what the network computes in; default: float32')
    add('--device', help='auto, cpu, cuda or cuda:N; default: auto')
    add('--threads', type=int, metavar='N', help='images computed at once on the CPU; default: one a core')
    add('-o', '--output', type=Path, metavar='DIR', help='for the results; default: results/NAME, by the weights')
    add('--save-images', action='store_true', help='keep the upscaled images, in DIR/images')


def run_command(args: argparse.Namespace) -> Results | None:
    """Do what the arguments say, if they ask for a test of data sets; None if they name an option file.

    Raises:
        UsageError: They ask for both or for neither, or see :func:`load`, :func:`metrics` and :func:`run`.
        OSError: See there.
    """
    own, others = _given(args, OWN), _given(args, OF_OPTION_FILES)
    if args.opt is not None:
        if own:
            raise UsageError(
                f'-opt and {own[0]} exclude each other: a test is of an option file (-opt FILE), or of data sets '
                '(-w FILE --data PATH ...)'
            )
        return None
    if args.data is None:
        right = '-w FILE --data PATH ... (of bicubic --network bicubic --scale N --data PATH ...)'
        raise UsageError(
            f'--data PATH ... is missing: {right}'
            if own or args.weights
            else f'a test needs an option file, -opt FILE, or weights and data sets, {right}'
        )
    if others:
        raise UsageError(f'{others[0]} is for tests by an option file, -opt FILE; leave it out')
    if args.overlap is not None and args.tile is None:
        raise UsageError('--overlap has no meaning without --tile')
    given = {
        name: getattr(args, name) for name in ('device', 'dtype', 'tile', 'overlap') if getattr(args, name) is not None
    }
    model = load(args.network, args.weights, args.scale, ensemble=args.ensemble is not None, **given)
    root = args.output or Path('results', model.name)
    args.advice = f'; sets that were finished are in {root}'
    chosen = metrics(model.scale, args.rgb, args.metrics or (), args.device or 'auto')
    return run(model, args.data, root, chosen, args.threads, args.save_images)


def _given(args: argparse.Namespace, names: Mapping[str, str]) -> list[str]:
    """Those of some options that are given."""
    absent = (None, False, 'none')
    return [flag for name, flag in names.items() if not any(getattr(args, name) is each for each in absent)]
