"""ASID: the attention maps that all groups share, and the channels that information distillation leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import nn

from attnsr.archs.arch_util import pad_by_zeros
from attnsr.archs.asid_arch import ASID, IDSA, Group, GroupAttention
from attnsr.compare import GREY, HAIRLINE
from attnsr.inspection import windows
from attnsr.inspection.capture import watched
from attnsr.inspection.figures import MARGIN, NOTE, TICKS, TITLE, Page, fit, frame, heat, mark, overview, pale, show
from attnsr.inspection.scene import Scene
from attnsr.inspection.windows import Attended, attended
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Distilled', 'SharedMaps', 'draw_distillation', 'draw_maps', 'examine_distillation', 'examine_maps']

# The quarters of the channels that the last 1x1 convolution of a group puts together again, in their order.
PARTS = {
    'd1': 'left after\nstep 1',
    'd2': 'left after\nstep 2',
    't': 'attended in\nstep 3',
    'loc': 'local in\nstep 3',
}


@dataclass(frozen=True)
class SharedMaps:
    """What a pixel attends to in the maps that the first group computes.

    Attributes:
        local: By SLA1, SLA2 and SLA3, in its window.
        grid: By SGA1, SGA2 and SGA3, on its grid.
    """

    local: list[Attended]
    grid: list[Attended]


@dataclass(frozen=True)
class Distilled:
    """The parts of the features that a group's information distillation ends with.

    Attributes:
        group: Number of the group, from 0.
        parts: (channels / 4, h, w), float32, each: d1, d2, t and loc, cropped to the picture.
    """

    group: int
    parts: dict[str, np.ndarray]


def examine_maps(net: ASID, scene: Scene) -> SharedMaps:
    """What the scene's pixel attends to: its rows of ``softmax(q k^T / sqrt(n) + b)`` in the six shared maps."""
    x = scene.tensor(next(net.parameters()).device)
    shared = cast(GroupAttention, watched(net, x, {0: net.get_submodule('block0')}).passed[0].output[1])
    local, grid = ([attended(each, scene.place)[0] for each in maps] for maps in (shared.local, shared.grid))
    return SharedMaps(local, grid)


def examine_distillation(net: ASID, scene: Scene, number: int) -> Distilled:
    """What a group's last 1x1 convolution is given: the channels d1, d2, t and loc."""
    group = cast(Group, net.get_submodule(f'block{number}'))
    idsa = group.residual_layer[0] if isinstance(group.residual_layer, nn.ModuleList) else group.residual_layer
    x = scene.tensor(next(net.parameters()).device)
    features = watched(net, x, {0: cast(IDSA, idsa).pw3}).passed[0].inputs[0]
    height, width = scene.image.shape[:2]
    parts = features[0, :, :height, :width].float().cpu().numpy().reshape(len(PARTS), -1, height, width)
    return Distilled(number, dict(zip(PARTS, parts, strict=True)))


def draw_maps(net: ASID, scene: Scene, found: SharedMaps, title: str) -> 'Figure':
    """A row for the windows, a row for the grid, a column for each step, beside the picture."""
    side, gap = 3.0, 0.55
    wide, tall = fit(scene.box, side)
    sharing = (
        'The first group computes these six maps, and there is no other.'
        if net.num_groups == 1
        else f'The first group computes these six maps, and the other {net.num_groups - 1} reuse them.'
    )
    lines = [scene.describe(), f'{sharing} Each panel: softmax(q kᵀ/√n + b) of the ringed pixel.']
    row = TITLE + NOTE + side + TICKS + 0.25
    width = 2 * MARGIN + 0.25 + 4 * side + 3 * gap + 0.85
    page = Page(width, Page.head(lines) + row + TITLE + NOTE + tall + TICKS + MARGIN, f'{title}: shared maps', lines)
    padded = pad_by_zeros(scene.tensor(), net.multiple)[0].permute(1, 2, 0).numpy()
    x, top = MARGIN + 0.25, page.top + TITLE + NOTE
    view = windows.placed(found.local[0].view(), scene)

    detail = page.axes(x, top, side, side, 'Window', 'blue frame below')
    show(detail, windows.cyclic(padded, found.local[0].view()), view)
    frame(detail, windows.placed(found.local[0].corner, scene), COLOURS[0])
    mark(detail, *scene.pixel, size=11)
    windows.draw_borders(detail, view, scene, padded.shape[:2])
    below = top + row
    frame(overview(page, scene, x, below, side), view, COLOURS[0], 1.4)

    for step, (local, grid) in enumerate(zip(found.local, found.grid, strict=True), 1):
        left = x + step * (side + gap)
        windows.draw(page, left, top, side, f'SLA{step}, window', local, padded, scene)
        axes = page.axes(left, below, wide, tall, f'SGA{step}, grid', grid.note())
        show(axes, pale(scene.grey), scene.box)
        _grid(axes, grid, scene, padded.shape)
        mark(axes, *scene.pixel)
    page.heat_bar(x + 4 * side + 3 * gap + 0.2, top, 0.16, side)
    return page.figure


def _grid(axes: 'Axes', grid: Attended, scene: Scene, extent: Sequence[int]) -> None:
    """Squares on the tokens of a grid, coloured by their weights, half as wide as the tokens are apart."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    apart = min(extent[0], extent[1]) / grid.size
    half = max(0.5, 0.28 * apart)
    squares = [
        Rectangle((column + scene.box.left - half, row + scene.box.top - half), 2 * half, 2 * half)
        for row, column in zip(grid.rows, grid.columns, strict=True)
    ]
    drawn = PatchCollection(squares, cmap=heat(), edgecolor=HAIRLINE, linewidth=0.6)
    drawn.set_array(grid.weights / grid.weights.max())
    drawn.set_clim(0, 1)
    axes.add_collection(drawn)


def draw_distillation(scene: Scene, found: Distilled, title: str) -> 'Figure':
    """A row of small multiples for each of d1, d2, t and loc, a column for each channel."""
    count = len(found.parts['d1'])
    gap, label = 0.08, 1.15
    tile = min(1.9, (15.5 - 2 * MARGIN - label) / count - gap)
    wide, tall = fit(scene.box, tile)
    lines = [
        scene.describe(),
        f'The {4 * count} channels that the last 1 x 1 convolution of group {found.group} puts together; grey from the '
        '1st to the 99th percentile of each.',
    ]
    row = max(tall, 0.72) + gap + 0.06  # of the words beside it, at least
    page = Page(
        2 * MARGIN + label + count * (tile + gap),
        Page.head(lines) + 0.3 + len(PARTS) * row + MARGIN,
        f'{title}: distilled channels',
        lines,
    )
    top = page.top + 0.32
    for channel in range(count):
        page.text(
            MARGIN + label + channel * (tile + gap) + tile / 2,
            top - 0.14,
            f'{channel}',
            ha='center',
            size=10,
            color=GREY,
        )
    for name, maps in found.parts.items():
        middle = top + tall / 2
        page.text(MARGIN, middle - 0.22, name, weight='bold', size=13)
        page.text(MARGIN, middle + 0.14, PARTS[name], color=GREY, size=10)
        for channel, values in enumerate(maps):
            axes = page.axes(MARGIN + label + channel * (tile + gap), top, wide, tall)
            axes.set_label(f'{name}, channel {channel}')
            low, high = np.percentile(values, (1, 99))
            show(axes, values, scene.box, ticks=False, cmap='gray', vmin=low, vmax=max(high, low + 1e-12))
        top += row
    return page.figure
