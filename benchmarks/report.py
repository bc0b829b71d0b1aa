"""Tables and plots of results: time and memory over size for each mechanism, and the networks beside each other."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnsr.benchmarks.results import NETWORKS, Measurement, Results, case_title, markdown, threads_differ
from attnsr.files import write_atomically
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the dtypes: the line, and how a marker is filled.
LINES: Mapping[str, Any] = {'bfloat16': '-', 'float32': '--'}
FILLS: Mapping[str, Any] = {'bfloat16': 'full', 'float32': 'none'}


def write(results: Results, path: Path) -> list[str]:
    """Write tables and plots beside the JSON file ``path``, under its name.

    Returns:
        Lines that tell what was written, and why there are no plots where there are none.
    """
    table = path.with_suffix('.md')
    with write_atomically(table) as file:
        file.write(markdown(results).encode())
    lines = [str(table)]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        missing = "no plots: matplotlib is not installed; pip install 'attnsr[bench]', then basicsr bench report"
        return [*lines, f'{missing} {path}']
    for what in results.what():
        figure = Figure(layout='constrained', dpi=100)
        (_draw_networks if what == NETWORKS else _draw_operation)(figure, results.of(what))
        figure.suptitle(f'{what}, {results.device}', fontweight='bold')
        plot = path.with_name(f'{path.stem}_{what}.png')
        with write_atomically(plot) as file:
            figure.savefig(file, format='png')
        lines.append(str(plot))
    return lines


def _draw_operation(figure: 'Figure', measurements: Sequence[Measurement]) -> None:
    """A row for each case: time and memory over the pixels of the input."""
    differ = threads_differ(measurements)
    cases = list(dict.fromkeys(case_title(m, differ) for m in measurements))
    passes = list(dict.fromkeys(m.computed for m in measurements))
    names = dict.fromkeys(name for m in measurements for name in m.figures)
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    figure.set_size_inches(1.5 + 8.5 * len(passes), 2 + 2.7 * len(cases))
    grid = figure.subplots(len(cases), 2 * len(passes), squeeze=False, sharex=True)
    for row, case in zip(grid, cases, strict=True):
        for i, computed in enumerate(passes):
            shown = [m for m in measurements if (case_title(m, differ), m.computed) == (case, computed)]
            _draw_case(row[2 * i], row[2 * i + 1], shown, colours)
            for axes, unit in ((row[2 * i], 'ms'), (row[2 * i + 1], 'peak memory, MB')):
                axes.set_title(f'{case}: {computed}', fontsize=10)
                axes.set_ylabel(unit)
                axes.set_visible(bool(shown))
                axes.set(xscale='log', yscale='log')
                axes.grid(which='both', alpha=0.2)
    _label_sizes(grid, measurements)
    _add_legend(figure, colours, measurements)


def _draw_case(time: 'Axes', memory: 'Axes', measurements: Sequence[Measurement], colours: Mapping[str, str]) -> None:
    for dtype in dict.fromkeys(m.dtype for m in measurements):
        style = {'linestyle': LINES[dtype], 'fillstyle': FILLS[dtype]}
        ordered = sorted((m for m in measurements if m.dtype == dtype), key=_pixels)
        for name, colour in colours.items():
            found = [(m, m.figures[name]) for m in ordered if name in m.figures]
            _draw_curve(time, [(m, 1e3 * of.seconds) for m, of in found], color=colour, **style)
            in_megabytes = [(m, of.peak / 1e6) for m, of in found if of.peak]
            _draw_curve(memory, in_megabytes, color=colour, **style)
        limit = [(m, 1e3 * m.least_seconds[0]) for m in ordered if m.least_seconds]
        _draw_curve(time, limit, color='grey', linewidth=1, **style)


def _draw_curve(axes: 'Axes', points: Sequence[tuple[Measurement, float]], **style: Any) -> None:
    """Single images are joined by a line; a batch stands for itself."""
    for batch, marker in ((False, 'o'), (True, 's')):
        chosen = [(_pixels(m), value) for m, value in points if (m.extent[0] > 1) == batch]
        if chosen:
            joined = {**style, 'linestyle': 'none'} if batch else style
            axes.plot(*zip(*chosen, strict=True), marker=marker, markersize=4, **joined)


def _label_sizes(grid: Any, measurements: Sequence[Measurement]) -> None:
    """Ticks where something was measured, those that would overlap written as one."""
    from matplotlib.ticker import LogFormatter, NullLocator

    labels: dict[int, str] = {}
    for m in sorted(measurements, key=_pixels):
        near = next((pixels for pixels in labels if _pixels(m) < 1.2 * pixels), _pixels(m))
        names = labels.get(near, '').split('\n') if near in labels else []
        labels[near] = '\n'.join(dict.fromkeys([*names, m.size]))
    for axes in grid.flat:
        axes.set_xticks(list(labels), list(labels.values()), fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelbottom=True)
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.tick_params(axis='y', which='minor', labelsize=7)


def _add_legend(figure: 'Figure', colours: Mapping[str, str], measurements: Sequence[Measurement]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color='grey', linewidth=1, label='limit of the device'))
    for dtype in dict.fromkeys(m.dtype for m in measurements):
        style = {'linestyle': LINES[dtype], 'fillstyle': FILLS[dtype], 'marker': 'o', 'markersize': 4}
        handles.append(Line2D([], [], color='black', label=dtype, **style))
    for marker, label in (('o', 'one image'), ('s', 'a batch of patches')):
        handles.append(Line2D([], [], color='black', linestyle='none', marker=marker, fillstyle='none', label=label))
    figure.legend(handles=handles, loc='outside lower center', ncols=5)


def _draw_networks(figure: 'Figure', measurements: Sequence[Measurement]) -> None:
    """A row for each network, bars of time and memory at each size; what they are compared with is grey."""
    groups: dict[str, dict[str, list[Measurement]]] = {}
    differ = threads_differ(measurements)
    for m in measurements:
        case = case_title(m, differ)
        groups.setdefault(case, {}).setdefault(f'{case}, {m.size}: {m.computed}', []).append(m)
    columns = max(map(len, groups.values()))
    heights = [max(sum(map(_bars, of_size)) for of_size in of_case.values()) for of_case in groups.values()]
    figure.set_size_inches(2 + 7 * columns, 1 + 0.22 * sum(heights) + 0.8 * len(heights))
    grid = figure.subplots(len(groups), 2 * columns, squeeze=False, gridspec_kw={'height_ratios': heights})
    for row, of_case, height in zip(grid, groups.values(), heights, strict=True):
        for axes in row[2 * len(of_case) :]:
            axes.set_visible(False)
        for i, (title, of_size) in enumerate(of_case.items()):
            for axes, unit in ((row[2 * i], 'ms'), (row[2 * i + 1], 'peak memory, MB')):
                axes.set_title(title, fontsize=10)
                axes.set_xlabel(unit)
                axes.spines[['top', 'right']].set_visible(False)
            _draw_bars(row[2 * i], row[2 * i + 1], of_size, height)


def _draw_bars(time: 'Axes', memory: 'Axes', measurements: Sequence[Measurement], height: float) -> None:
    places: dict[float, str] = {}
    place = 0.0
    for m in measurements:
        base = m.figures.get(m.base)
        for name, of in m.figures.items():
            colour = '#999999' if name == m.base else COLOURS[0]
            places[place] = name if any(dtype in name for dtype in LINES) else f'{name}, {m.dtype}'
            faster = base and base.seconds / of.seconds
            _draw_bar(time, place, 1e3 * of.seconds, colour, f'{faster:.2f} x as fast' if faster else '')
            if of.peak:
                part = base and base.peak and of.peak / base.peak
                _draw_bar(memory, place, of.peak / 1e6, colour, f'{part:.2f} x as much' if part else '')
            place += 1
        place += 0.6
    time.set_yticks(list(places), list(places.values()), fontsize=8)
    memory.set_yticks([])
    for axes in (time, memory):
        axes.set_ylim(height - 1, -0.8)
        axes.margins(x=0.5)


def _draw_bar(axes: 'Axes', place: float, value: float, colour: str, text: str) -> None:
    axes.barh(place, value, color=colour)
    shown = f'{value:.0f}' if value >= 100 else f'{value:.3g}'
    axes.text(value, place, f' {shown}  {text}', va='center', fontsize=8)


def _bars(m: Measurement) -> float:
    return len(m.figures) + 0.6


def _pixels(m: Measurement) -> int:
    return math.prod(m.extent)
