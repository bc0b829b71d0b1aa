"""The attention of one pixel within its windows: out of what a layer leaves to those that share it, and drawn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnsr.inspection.figures import Page, frame, heat, mark, pale, show
from attnsr.inspection.scene import Box, Scene, grey
from attnsr.ops.window_attention import MapScores, SharedAttention
from attnsr.ops.window_attention.reference import probabilities, to_windows
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['Attended', 'attended', 'draw']


@dataclass(frozen=True)
class Attended:
    """What a pixel attends to in one window.

    Attributes:
        size: Side of the window in tokens, T = size^2 in all.
        rows: (T,), int64: of the window's pixels in the map, in the order of the tokens.
        columns: (T,), int64.
        weights: (T,), float64: the attention, which sums to 1.
    """

    size: int
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    @property
    def spread(self) -> float:
        """Over how many tokens the attention is spread: exp of its entropy, from 1 to T."""
        positive = self.weights[self.weights > 0]
        return float(np.exp(-(positive * np.log(positive)).sum()))

    @property
    def corner(self) -> Box:
        """The window's pixels where they lie side by side, from the first; some may be beyond the map's border."""
        return Box(int(self.columns[0]), int(self.rows[0]), self.size, self.size)

    def view(self) -> Box:
        """The window with some of what is round it."""
        around = max(2, self.size * 3 // 8)
        side = self.size + 2 * around
        return Box(self.corner.left - around, self.corner.top - around, side, side)

    def note(self) -> str:
        """The weights in a line."""
        return f'largest {100 * self.weights.max():.1f} %, spread over {self.spread:.1f} of {len(self.weights)}'


def attended(shared: SharedAttention, place: tuple[int, int]) -> list[Attended]:
    """What the pixel at (row, column) of a single image attends to, for each window size."""
    layout, attention = shared.layout, shared.attention
    _, height, width = layout.extent
    if isinstance(attention, MapScores):
        attention = tuple(attention.scores(layout))
    # The numbers of the pixels, cut into windows as the network's own maps are.
    numbers = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    found = []
    for size, windows, run in zip(
        layout.window_sizes,
        to_windows(numbers.expand(1, len(layout.window_sizes), -1, -1), layout),
        attention,
        strict=True,
    ):
        index = windows[..., 0].long()
        window, token = (int(at) for at in torch.nonzero(index == place[0] * width + place[1])[0])
        part = slice(window, window + 1)
        a = run[part] if isinstance(run, torch.Tensor) else probabilities(run.part(part))
        pixels = index[window].numpy()
        found.append(Attended(size, pixels // width, pixels % width, a[0, token].double().cpu().numpy()))
    return found


def draw(
    page: Page, left: float, top: float, side: float, title: str, window: Attended, padded: np.ndarray, scene: Scene
) -> 'Axes':
    """The attention over a window whose pixels lie side by side, as heat over the picture in grey.

    Args:
        page: Where to.
        left: In inches, as ``top`` and ``side``.
        top: See above.
        side: See above.
        title: Of the panel.
        window: What is attended to.
        padded: (H, W, 3), RGB in [0, 1]: the picture as the network pads it.
        scene: The picture.
    """
    axes = page.axes(left, top, side, side, title, window.note())
    shown, extent = window.view(), padded.shape[:2]
    show(axes, pale(grey(cyclic(padded, shown))), placed(shown, scene))
    weights = np.full(extent, np.nan)
    weights[window.rows, window.columns] = window.weights / window.weights.max()
    corner = window.corner
    show_within(axes, cyclic(weights, corner), placed(corner, scene))
    frame(axes, placed(corner, scene), COLOURS[0], 1.2)
    # Where the pixel is in a window that goes on round a border.
    y, x = (
        (at - first) % length + first + offset
        for at, first, length, offset in zip(
            scene.place, (corner.top, corner.left), extent, (scene.box.top, scene.box.left), strict=True
        )
    )
    mark(axes, x, y, size=8 if window.size > 8 else 11)
    draw_borders(axes, placed(shown, scene), scene, extent)
    return axes


def show_within(axes: 'Axes', weights: np.ndarray, box: Box) -> None:
    """Relative weights (h, w) in [0, 1] as heat, without changing what the axes show."""
    limits = axes.get_xlim(), axes.get_ylim()
    edges = box.left - 0.5, box.left + box.width - 0.5, box.top + box.height - 0.5, box.top - 0.5
    axes.imshow(weights, extent=edges, interpolation='nearest', cmap=heat(), vmin=0, vmax=1)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def cyclic(x: np.ndarray, box: Box) -> np.ndarray:
    """What a box has of (h, w, ...), going on round the borders as shifted windows do."""
    rows = np.arange(box.top, box.top + box.height) % x.shape[0]
    columns = np.arange(box.left, box.left + box.width) % x.shape[1]
    return x[rows[:, None], columns]


def placed(box: Box, scene: Scene) -> Box:
    """A box of the map in the coordinates of the whole picture."""
    return Box(box.left + scene.box.left, box.top + scene.box.top, box.width, box.height)


def draw_borders(axes: 'Axes', shown: Box, scene: Scene, extent: tuple[int, ...]) -> None:
    """Dashed lines where the map ends, and goes on from its other side."""
    box = scene.box
    for first, length, start, side, line in (
        (box.left, extent[1], shown.left, shown.width, axes.axvline),
        (box.top, extent[0], shown.top, shown.height, axes.axhline),
    ):
        for border in (first, first + length):
            if start < border < start + side:
                line(border - 0.5, color=COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)))
