"""Training curves from the logs of experiments: losses, learning rate and validation metrics over iterations."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnsr.data_prep.lmdb_dataset import write_errors
from attnsr.errors import UsageError
from attnsr.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['FORMATS', 'Curves', 'draw', 'find', 'read', 'require_matplotlib', 'write']

FORMATS = ('.png', '.pdf', '.svg')

# What BasicSR's loggers write.
LOGS = 'train_*.log'
NUMBER = r'[-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|inf|nan)'
ITERATION = re.compile(r'\[epoch: *\d+, iter: *(?P<iteration>[\d,]+), lr:\((?P<rates>[^)]*)\)\](?P<rest>.*)')
LOSS = re.compile(rf'\b(\w+): ({NUMBER})(?=\s|$)')
START = re.compile(r'Start training from epoch: \d+, iter: (\d+)')
VALIDATION = re.compile(r'INFO: Validation (.+)')
METRIC = re.compile(rf'\t # (\w+): ({NUMBER})')
OPTION = re.compile(r'\s+(val_freq|total_iter): (\d+)')

# Of runs, and of a benchmark's contestants; told apart by the colour-blind too (Okabe and Ito).
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
# Of data sets.
LINES = ('-', '--', ':', '-.')
#: A loss is drawn as the mean over so large a share of its values, and the values themselves behind it.
SMOOTHED = 1 / 50


@dataclass
class Curves:
    """One experiment; all values by iteration.

    Attributes:
        name: The experiment's name.
        losses: By the names in the log, such as ``l_pix``.
        rate: The learning rate, of the first group of parameters.
        metrics: By metric and data set, such as ``('psnr', 'Set5')``.
    """

    name: str
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)
    metrics: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def _all(self) -> Iterator[dict[int, float]]:
        yield from (*self.losses.values(), self.rate, *self.metrics.values())

    def forget_after(self, iteration: int) -> None:
        """Drop what came after an iteration that another run has gone on from."""
        for values in self._all():
            for later in [each for each in values if each > iteration]:
                del values[later]


def find(name: str) -> Path:
    """The folder of an experiment, by its path or by its name below ``./experiments``.

    Raises:
        UsageError: There is none; the message lists those that there are.
    """
    for folder in (Path(name), Path('experiments') / name):
        if folder.is_dir():
            return folder
    known = sorted(path.name for path in Path('experiments').glob('*') if path.is_dir())
    there = f'there {"is" if len(known) == 1 else "are"} {", ".join(known)}' if known else 'there is none'
    raise UsageError(f'{name}: there is no such folder, nor an experiment of this name; in ./experiments {there}')


def read(folder: Path) -> Curves:
    """The curves of an experiment, from all of its logs in the order they were begun.

    Where a run was resumed, what an earlier log has after that iteration is left out: it was lost with the process
    that wrote it. BasicSR does not log the iteration of a validation; it is the multiple of ``val_freq`` that follows
    from the lines around it.

    Args:
        folder: The experiment's folder, with BasicSR's ``train_*.log`` in it.

    Raises:
        UsageError: There is no log, or none with an iteration in it.
        OSError: A log cannot be read.
    """
    logs = sorted(folder.glob(LOGS), key=_begun)
    if not logs:
        raise UsageError(f'{folder}: holds no {LOGS}; name the folder of an experiment, such as experiments/NAME')
    curves = Curves(folder.resolve().name)
    for log in logs:
        with open(log, encoding='utf-8', errors='replace') as file:
            _read_log(curves, file)
    if not curves.rate:
        raise UsageError(f'{folder}: its logs hold no iteration yet; BasicSR writes one every logger.print_freq')
    return curves


def draw(experiments: Sequence[Curves]) -> 'Figure':
    """A panel for losses, one for the learning rate, and one for each metric, with the runs in colours."""
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(loss for curves in experiments for loss in curves.losses))
    metrics = list(dict.fromkeys(metric for curves in experiments for metric, _ in curves.metrics))
    data_sets = list(dict.fromkeys(name for curves in experiments for _, name in curves.metrics))
    panels = [*losses, 'learning rate', *metrics]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 0.6 + 3.4 * rows), layout='constrained', dpi=100)
    grid = [axes for row in figure.subplots(rows, 2, squeeze=False) for axes in row]
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(f'{panel.upper()}{", dB" * (panel == "psnr")}' if panel in metrics else panel, loc='left')
        axes.set_xlabel('iteration')
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        if panel == 'learning rate':
            axes.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        for number, curves in enumerate(experiments):
            colour = COLOURS[number % len(COLOURS)]
            if panel == 'learning rate':
                axes.plot(*_points(curves.rate), color=colour, label=curves.name, drawstyle='steps-post')
            elif panel in curves.losses:
                _draw_loss(axes, curves.losses[panel], colour, curves.name)
            for place, data_set in enumerate(data_sets):
                if values := curves.metrics.get((panel, data_set)):
                    label = data_set if len(experiments) == 1 else f'{curves.name}, {data_set}'
                    line = LINES[place % len(LINES)]
                    axes.plot(*_points(values), line, color=colour, label=label, marker='.' if len(values) < 40 else '')
        if panel in metrics or len(experiments) > 1:
            axes.legend(fontsize=9)
        if panel in losses and _wide(curves.losses.get(panel, {}) for curves in experiments):
            axes.set_yscale('log')
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(', '.join(curves.name for curves in experiments), fontweight='bold')
    return figure


def write(names: Sequence[str], output: Path | None) -> Path:
    """Read experiments, draw them in one figure, and write it.

    Args:
        names: Folders or names of experiments.
        output: File to write, of one of :data:`FORMATS`; ``curves.png`` in the folder of a single experiment, or in
            the current one, if None.

    Returns:
        The file.

    Raises:
        UsageError: An experiment has no curves, the format is another, or matplotlib is not installed.
        OSError: A file cannot be read or written.
    """
    folders = [find(name) for name in names]
    if output is None:
        output = (folders[0] if len(folders) == 1 else Path()) / 'curves.png'
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f'{output}: the name of the figure must end in {", ".join(FORMATS[:-1])} or {FORMATS[-1]}')
    require_matplotlib()
    figure = draw([read(folder) for folder in folders])
    with write_errors(output), write_atomically(output) as file:
        figure.savefig(file, format=output.suffix[1:].lower())
    return output


def require_matplotlib() -> None:
    """Raise :class:`UsageError`, which says how to install it, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError:
        raise UsageError("matplotlib is not installed; pip install 'attnsr[plot]'") from None


def _begun(log: Path) -> str:
    """The time in a log's name, train_NAME_20261121_230458.log."""
    return log.stem[-15:]


def _read_log(curves: Curves, lines: Iterable[str]) -> None:
    frequency, total, earliest = 1, 0, 1  # the earliest iteration that the next lines may be of
    ended = False
    data_set = ''
    validated: dict[str, int] = {}  # the iteration of the last validation, by data set
    for line in lines:
        if match := OPTION.match(line):
            if match[1] == 'val_freq':
                frequency = max(1, int(match[2]))
            else:
                total = int(match[2])
        elif match := START.search(line):
            earliest = int(match[1]) + 1
            curves.forget_after(int(match[1]))
        elif match := ITERATION.search(line):
            earliest = now = int(match['iteration'].replace(',', ''))
            curves.rate[now] = float(match['rates'].split(',')[0])
            losses = match['rest'].rpartition(']')[2]  # after the times
            for name, value in LOSS.findall(losses):
                curves.losses.setdefault(name, {})[now] = float(value)
        elif 'INFO: End of training' in line:
            ended = True
        elif match := VALIDATION.search(line):
            data_set = match[1].strip()
            after_last = validated.get(data_set, 0) + frequency
            validated[data_set] = total if ended else max(math.ceil(earliest / frequency) * frequency, after_last)
        elif (match := METRIC.match(line)) and data_set:
            curves.metrics.setdefault((match[1], data_set), {})[validated[data_set]] = float(match[2])


def _points(values: dict[int, float]) -> tuple[list[int], list[float]]:
    iterations = sorted(values)
    return iterations, [values[iteration] for iteration in iterations]


def _draw_loss(axes: 'Axes', values: dict[int, float], colour: str, label: str) -> None:
    """The values, pale, and their running mean."""
    iterations, losses = _points(values)
    half = int(len(losses) * SMOOTHED / 2)
    if half:
        axes.plot(iterations, losses, color=colour, alpha=0.2, linewidth=0.8)
    means = []
    for place in range(len(losses)):
        around = losses[max(0, place - half) : place + half + 1]
        means.append(sum(around) / len(around))
    axes.plot(iterations, means, color=colour, label=label)


def _wide(all_values: Iterable[dict[int, float]]) -> bool:
    """Whether values are positive and span more than a power of ten."""
    values = [value for each in all_values for value in each.values() if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)
