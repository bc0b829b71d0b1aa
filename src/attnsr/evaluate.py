"""What ``basicsr test`` shows at its end: a table of quality and time, bicubic beside it, and comparison pictures.

BasicSR's own ``test_pipeline`` does the testing, with whichever model type the option file names. A recorder looks
on: it times ``model.test``, notes the metrics BasicSR computes, and computes the same metrics, with the same options,
on the bicubic upscaling of the same low-resolution (LR) images. Nothing changes in what BasicSR computes or saves.
"""

import functools
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import basicsr.metrics
import basicsr.test
import numpy as np
import torch
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.matlab_functions import imresize

import attnsr
from attnsr import reports
from attnsr.compare import Panel, draw
from attnsr.reports import Column, difference, mean


@dataclass
class ImageResult:
    """One image.

    Attributes:
        name: The LR file's name without folder and extension.
        metrics: Of the network's output, by the metrics' names in the option file.
        bicubic: The same of the bicubic upscaling; empty where there is none (video, an output of another size).
        seconds: Time in ``model.test``, from LR tensor to output tensor, without reading and saving files.
    """

    name: str
    metrics: dict[str, float]
    bicubic: dict[str, float]
    seconds: float | None


@dataclass
class DataSetResult:
    """The images of one data set, in the order tested."""

    name: str
    images: list[ImageResult] = field(default_factory=list)


@dataclass
class Results:
    """What a test run found.

    Attributes:
        root: BasicSR's ``results_root``, where :meth:`write` writes.
        info: ``name``, ``date``, ``model``, ``network``, ``weights``, ``param_key``, ``scale``, ``device``,
            ``versions``.
        metrics: The option file's ``val.metrics``: name -> options. Empty if it has none.
        sets: One entry a data set; empty in all processes but the first of a distributed run.
    """

    root: Path
    info: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    sets: list[DataSetResult] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as ``results.json`` has it, except that infinite values are floats here.

        :attr:`info` and :attr:`metrics`, then ``datasets``: a list of ``name``, ``images`` (how many), the means
        ``metrics`` and ``bicubic``, their difference ``gain``, ``seconds`` (``median`` and ``mean``) and ``per_image``;
        with several data sets also ``all_images``, the same over all of them. What is not known is None.
        """
        report: dict[str, Any] = {**self.info, 'metrics': self.metrics}
        report['datasets'] = [
            {'name': s.name, **self._summary(s.images), 'per_image': [asdict(image) for image in s.images]}
            for s in self.sets
        ]
        if len(self.sets) > 1:
            report['all_images'] = self._summary([image for s in self.sets for image in s.images])
        return report

    def table(self) -> str:
        """The table as plain text, one line a data set; an empty string if this process tested nothing.

        With several data sets a last line 'all images' gives the mean over every single image (not over data sets,
        which would weigh a picture of a small set more). Seconds are the median over images: the first image, and on
        a GPU the first of each size, also pays for warming up.
        """
        if not self.sets:
            return ''
        return '\n'.join([self._title(), '', *reports.plain(self._columns(), self._rows()), '', *self._notes()])

    def markdown(self) -> str:
        """The same table as Markdown, as ``results.md`` has it."""
        notes = [f'- {note}' for note in self._notes()]
        return '\n'.join([self._title(), '', *reports.markdown(self._columns(), self._rows()), '', *notes, ''])

    def write(self) -> None:
        """Write ``results.json`` and ``results.md`` below :attr:`root`, each whole or not at all."""
        reports.write(self.root / 'results.json', reports.json_text(self.as_dict()))
        reports.write(self.root / 'results.md', self.markdown())

    def _summary(self, images: Sequence[ImageResult]) -> dict[str, Any]:
        ours = {name: mean([image.metrics.get(name) for image in images]) for name in self.metrics}
        bicubic = {name: mean([image.bicubic.get(name) for image in images]) for name in self.metrics}
        seconds = [image.seconds for image in images if image.seconds is not None]
        return {
            'images': len(images),
            'metrics': ours,
            'bicubic': bicubic,
            'gain': {name: difference(ours[name], bicubic[name]) for name in self.metrics},
            'seconds': {
                'median': statistics.median(seconds) if seconds else None,
                'mean': statistics.fmean(seconds) if seconds else None,
            },
        }

    def _columns(self) -> list[Column]:
        decibels = [name for name, options in self.metrics.items() if _is_psnr(options)]
        return [
            Column('', 'data set', number=False),
            Column('', 'images'),
            *(Column('', name.upper()) for name in self.metrics),
            *(Column('bicubic', name.upper()) for name in self.metrics),
            *(Column('gain' if len(decibels) == 1 else f'{name.upper()} gain', 'in dB') for name in decibels),
            Column('seconds', 'an image'),
        ]

    def _rows(self) -> list[list[str]]:
        report = self.as_dict()
        summaries = [(s['name'], s) for s in report['datasets']]
        if 'all_images' in report:
            summaries.append(('all images', report['all_images']))
        return [
            [
                name,
                str(s['images']),
                *(number(s['metrics'][metric], options) for metric, options in self.metrics.items()),
                *(number(s['bicubic'][metric], options) for metric, options in self.metrics.items()),
                *(number(s['gain'][metric], o, '+') for metric, o in self.metrics.items() if _is_psnr(o)),
                '-' if s['seconds']['median'] is None else f'{s["seconds"]["median"]:.3f}',
            ]
            for name, s in summaries
        ]

    def _title(self) -> str:
        return f'{self.info["network"].get("type", self.info["model"])} x{self.info["scale"]} on {self.info["device"]}'

    def _notes(self) -> list[str]:
        weights = (
            f'{shortest(self.info["weights"])} ({self.info["param_key"]})' if self.info['weights'] else 'untrained'
        )
        notes = [
            f'Weights: {weights}.',
            *(
                f'{name.upper()}: {", ".join(option(key, value) for key, value in options.items())}.'
                for name, options in self.metrics.items()
            ),
        ]
        if self.metrics:
            notes.append('Bicubic: the same LR images, enlarged by imresize of BasicSR and rounded to 8 bits.')
        return [*notes, 'Seconds: median over the images, reading and saving left out.']


def run(root_path: str, compare: bool = False) -> Results:
    """Test as ``basicsr.test.test_pipeline(root_path)`` does, and record it.

    ``results.json`` and ``results.md`` are written after each data set, so that a run which fails later keeps those it
    has finished. In a distributed run only the process of rank 0 records and writes.

    Args:
        root_path: The folder below which BasicSR puts ``results/``. The option file is read from ``sys.argv``.
        compare: Also write ``comparison/<data set>/<image>.png`` below the results: LR enlarged by bicubic, the
            network's output and HR side by side (see :func:`attnsr.compare.draw`).

    Returns:
        The results; printing ``results.table()`` is left to the caller.

    Raises:
        Whatever BasicSR raises, unchanged; BasicSR's functions are put back first.
    """
    with ExitStack() as hooks:
        recorder = _Recorder(compare, hooks)
        basicsr.test.test_pipeline(root_path)
    return recorder.results


class _Sample:
    """The image in progress."""

    def __init__(self, data: Mapping[str, Any], scale: float, index: int) -> None:
        path = data.get('lq_path', str(index))
        while isinstance(path, list | tuple):  # one path an image of the batch, in video models one a frame
            path = path[0]
        self.name = Path(path).stem
        self.lq: torch.Tensor | None = data.get('lq')
        self.scale = scale
        self.seconds: float | None = None
        # Lists, since video models compute each metric once a frame.
        self.metrics: dict[str, list[float]] = {}
        self.bicubic_metrics: dict[str, list[float]] = {}
        self.visuals: Mapping[str, torch.Tensor] = {}

    @functools.cached_property
    def bicubic(self) -> np.ndarray | None:
        """uint8 (h * scale, w * scale, 3) BGR or (h * scale, w * scale) grey, as tensor2img; None for video."""
        if self.lq is None or self.lq.ndim != 4 or self.lq.shape[0] != 1 or self.lq.shape[1] not in (1, 3):
            return None
        return enlarge(self.lq[0].float().cpu(), self.scale)


class _Recorder:
    """Hooks into a test run; the hooks are undone when ``hooks`` closes."""

    results: Results

    def __init__(self, compare: bool, hooks: ExitStack) -> None:
        self._compare = compare
        self._hooks = hooks
        self._sample: _Sample | None = None
        self._hook(basicsr.test, 'build_model', self._after_build)

    def _hook(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        self._hooks.enter_context(_replaced(owner, name, functools.wraps(original)(wrap(original))))

    def _after_build(self, build_model: Callable[..., Any]) -> Callable[..., Any]:
        def build(opt: dict[str, Any]) -> Any:
            model = build_model(opt)
            self._begin(model, opt)
            return model

        return build

    def _begin(self, model: Any, opt: dict[str, Any]) -> None:
        self._scale = opt.get('scale', 1)
        metrics = dict(opt['val'].get('metrics') or {})
        self.results = Results(Path(opt['path']['results_root']), _info(model, opt), metrics)
        if opt['rank'] != 0:
            return
        self._synchronize = torch.cuda.synchronize if model.device.type == 'cuda' else lambda: None
        self._hook(model, 'validation', self._around_validation)
        self._hook(model, 'feed_data', self._around_feed_data)
        self._hook(model, 'test', self._around_test)
        if self._compare:
            self._hook(model, 'get_current_visuals', self._around_visuals)
        # Models import calculate_metric by name, so it is replaced in the files of the model's class and its parents.
        for module in {basicsr.metrics, *(sys.modules.get(cls.__module__) for cls in type(model).__mro__)}:
            if hasattr(module, 'calculate_metric'):
                self._hook(module, 'calculate_metric', self._around_metric)

    def _around_validation(self, validation: Callable[..., Any]) -> Callable[..., Any]:
        def record(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
            self.results.sets.append(DataSetResult(dataloader.dataset.opt['name']))
            value = validation(dataloader, *args, **kwargs)
            self._finish_image()
            self.results.write()
            return value

        return record

    def _around_feed_data(self, feed_data: Callable[..., Any]) -> Callable[..., Any]:
        def record(data: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.results.sets:  # not when a model warms itself up before its first validation
                self._finish_image()
                self._sample = _Sample(data, self._scale, len(self.results.sets[-1].images))
            return feed_data(data, *args, **kwargs)

        return record

    def _around_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            start = time.perf_counter()
            value = test(*args, **kwargs)
            self._synchronize()
            if self._sample is not None:
                self._sample.seconds = (self._sample.seconds or 0) + time.perf_counter() - start
            return value

        return record

    def _around_visuals(self, get_current_visuals: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            visuals = get_current_visuals(*args, **kwargs)
            if self._sample is not None:
                self._sample.visuals = visuals
            return visuals

        return record

    def _around_metric(self, calculate_metric: Callable[..., Any]) -> Callable[..., Any]:
        def record(data: Mapping[str, Any], opt: Mapping[str, Any]) -> Any:
            value = calculate_metric(data, opt)
            sample = self._sample
            names = [name for name, options in self.results.metrics.items() if options == opt]
            if sample is None or not names:
                return value
            bicubic = sample.bicubic
            has_bicubic = bicubic is not None and 'img' in data and bicubic.shape == data['img'].shape
            baseline = calculate_metric({**data, 'img': bicubic}, opt) if has_bicubic else None
            for name in names:
                sample.metrics.setdefault(name, []).append(float(value))
                if baseline is not None:
                    sample.bicubic_metrics.setdefault(name, []).append(float(baseline))
            return value

        return record

    def _finish_image(self) -> None:
        sample, self._sample = self._sample, None
        if sample is None:
            return
        image = ImageResult(
            sample.name,
            {name: statistics.fmean(values) for name, values in sample.metrics.items()},
            {name: statistics.fmean(values) for name, values in sample.bicubic_metrics.items()},
            sample.seconds,
        )
        data_set = self.results.sets[-1]
        data_set.images.append(image)
        if self._compare:
            self._draw(sample, image, data_set.name)

    def _draw(self, sample: _Sample, image: ImageResult, data_set: str) -> None:
        tensors = [sample.visuals[key] for key in ('result', 'gt') if key in sample.visuals]
        images = [sample.bicubic, *(tensor2img([tensor]) for tensor in tensors if tensor.ndim == 4)]
        if len(images) < 2 or any(img is None or img.shape != images[-1].shape for img in images):
            get_root_logger().warning(
                f'No comparison picture of {data_set}/{sample.name}: it needs one still image whose output has '
                f'{self._scale} times the size of its LR image.'
            )
            return
        captions = [
            ('LR (bicubic)', self._captions(image.bicubic)),
            (self.results.info['network'].get('type', 'output'), self._captions(image.metrics, image.bicubic)),
            ('HR', []),
        ]
        panels = [Panel(*caption, img) for caption, img in zip(captions, images, strict=False)]
        picture = draw(sample.name, f'{data_set}, x{self._scale}', panels)
        encoded = io.BytesIO()
        picture.save(encoded, format='PNG')
        reports.write(self.results.root / 'comparison' / data_set / f'{sample.name}.png', encoded.getvalue())

    def _captions(self, values: Mapping[str, float], baseline: Mapping[str, float] | None = None) -> list[str]:
        captions = []
        for name, value in values.items():
            options = self.results.metrics[name]
            gain = difference(value, (baseline or {}).get(name))
            caption = f'{name.upper()} {number(value, options)}'
            captions.append(caption if gain is None else f'{caption} ({number(gain, options, "+")})')
        return captions


def enlarge(lr: torch.Tensor, scale: float) -> np.ndarray:
    """Bicubic, the baseline of all tables: BasicSR's ``imresize``, rounded to 8 bits.

    Args:
        lr: (3, h, w) RGB or (1, h, w) grey, float32 in [0, 1], on the CPU.
        scale: Scale factor.

    Returns:
        uint8 (h * scale, w * scale, 3) BGR or (h * scale, w * scale) grey, as BasicSR's ``tensor2img`` gives it.
    """
    return tensor2img(imresize(lr, scale))


def versions() -> dict[str, str]:
    """Of what computes the figures."""
    return {'attnsr': attnsr.__version__, 'basicsr': basicsr.__version__, 'torch': torch.__version__}


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``'CPU'``."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'


def now() -> str:
    """ISO 8601, with the time zone."""
    return datetime.now().astimezone().isoformat(timespec='seconds')


def _info(model: Any, opt: Mapping[str, Any]) -> dict[str, Any]:
    device = device_name(model.device)
    return {
        'name': opt['name'],
        'date': now(),
        'model': opt['model_type'],
        'network': dict(opt.get('network_g') or {}),
        'weights': opt['path'].get('pretrain_network_g'),
        'param_key': opt['path'].get('param_key_g', 'params'),
        'scale': opt.get('scale', 1),
        'device': device if model.device.type == 'cuda' else f'{device}, threads: {torch.get_num_threads()}',
        'versions': versions(),
    }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or an object until the block ends."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:  # a method, which the class still has
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _is_psnr(options: Mapping[str, Any]) -> bool:
    return str(options.get('type')).startswith('calculate_psnr')


def number(value: float | None, options: Mapping[str, Any], sign: str = '') -> str:
    """A metric's value as tables have it, by the metric's options: PSNR in hundredths of a dB, others to 1e-4."""
    if value is None:
        return '-'
    return format(value, f'{sign}.2f' if _is_psnr(options) else f'{sign}.4f')


def shortest(path: str) -> str:
    """The path, or the one from the current directory, whichever is shorter."""
    return min(os.path.relpath(path), path, key=len)


def option(key: str, value: Any) -> str:
    """An option of a metric in words."""
    return str(value) if key == 'type' else f'{key} {str(value).lower()}'
