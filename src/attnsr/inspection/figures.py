"""What the figures share: pages laid out in inches, pictures with coordinates, colours, and writing them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnsr.compare import ACCENT, GREY, HAIRLINE, INK, PAPER
from attnsr.data_prep.lmdb_dataset import write_errors
from attnsr.files import write_atomically
from attnsr.inspection.scene import Box, Scene
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    'Page',
    'diverging',
    'fit',
    'frame',
    'heat',
    'heat_on_white',
    'mark',
    'overview',
    'pale',
    'positive',
    'show',
    'write',
]

DPI = 130
MARGIN = 0.45  # inches round a page
#: The height over the width that pictures have at most room for.
TALLEST = 1.3
#: Above an axes: its title, and a line of notes below that; and below it, the labels of its ticks.
TITLE, NOTE, TICKS = 0.27, 0.2, 0.3


class Page:
    """A figure whose parts are placed in inches from its upper left corner.

    Args:
        width: In inches, as ``height``.
        title: Of the figure.
        lines: Set below the title, smaller.

    Attributes:
        figure: The figure.
        top: Where the room below the title begins.
    """

    def __init__(self, width: float, height: float, title: str, lines: Sequence[str]) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
        self.text(MARGIN, MARGIN + 0.12, title, size=19, weight='bold')
        for number, line in enumerate(lines):
            self.text(MARGIN, MARGIN + 0.52 + 0.25 * number, line, size=11.5, color=GREY)
        self.top = self.head(lines)

    @staticmethod
    def head(lines: Sequence[str]) -> float:
        """How far the title and the lines below it reach."""
        return MARGIN + 0.6 + 0.25 * len(lines)

    def text(self, x: float, y: float, words: str, **style: Any) -> Any:
        """Words, from ``x`` on, centred along ``y``."""
        style = {'size': 11, 'color': INK, 'ha': 'left', 'va': 'center', **style}
        return self.figure.text(x / self.width, 1 - y / self.height, words, **style)

    def axes(
        self, left: float, top: float, width: float, height: float, title: str = '', note: str = '', **style: Any
    ) -> 'Axes':
        """Axes of this size, whose title and note stand above ``top``."""
        axes = self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height), **style
        )
        axes.set_facecolor(PAPER)
        axes.spines[:].set_color(HAIRLINE)
        axes.tick_params(colors=GREY, labelsize=9, length=3, width=0.8)
        above = top - 0.13
        if note:
            self.text(left, above, note, size=10, color=GREY)
            above -= NOTE
        if title:
            # The title of the axes, too, for whoever looks for it; drawn by the page, which knows inches.
            axes.set_label(title)
            self.text(left, above, title, size=12, weight='bold')
        return axes

    def colour_bar(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        colours: 'Colormap',
        limits: tuple[float, float],
        label: str,
        labels: Sequence[str] | None = None,
        under: str = PAPER,
    ) -> 'Axes':
        """A bar of colours from ``limits[0]`` to ``limits[1]``, upright where it is higher than wide."""
        axes = self.axes(left, top, width, height)
        upright = height > width
        values = np.linspace(0, 1, 256)
        strip = colours(values[::-1, None] if upright else values[None])
        axes.set_facecolor(under)
        low, high = limits
        axes.imshow(strip, aspect='auto', extent=(0, 1, low, high) if upright else (low, high, 0, 1))
        axis: Axis = axes.yaxis if upright else axes.xaxis
        (axes.xaxis if upright else axes.yaxis).set_ticks([])
        if labels is not None:
            axis.set_ticks(np.linspace(low, high, len(labels)), labels)
        if upright:
            axes.yaxis.tick_right()
            axes.yaxis.set_label_position('right')
        axis.set_label_text(label, color=GREY, fontsize=10)
        return axes

    def heat_bar(self, left: float, top: float, width: float, height: float) -> 'Axes':
        """The bar of :func:`heat`, over the grey that pictures have below it."""
        label = 'weight / largest of the panel'
        return self.colour_bar(left, top, width, height, heat(), (0, 1), label, under='#c0c0c0')


def show(axes: 'Axes', image: np.ndarray, box: Box, ticks: bool = True, **style: Any) -> Any:
    """An image (h, w, 3) in [0, 1], or (h, w) with colours, at its place in the picture, with few ticks."""
    edges = box.left - 0.5, box.left + box.width - 0.5, box.top + box.height - 0.5, box.top - 0.5
    drawn = axes.imshow(image, extent=edges, interpolation='nearest', **style)
    axes.set_xlim(*edges[:2])
    axes.set_ylim(*edges[2:])
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])
        return drawn
    from matplotlib.ticker import MaxNLocator

    for axis, length in ((axes.xaxis, box.width), (axes.yaxis, box.height)):
        axis.set_major_locator(MaxNLocator(nbins=4 if length > 8 else 3, integer=True, steps=[1, 2, 4, 5, 10]))
    return drawn


def pale(image: np.ndarray) -> np.ndarray:
    """A grey image (h, w) in [0, 1] as a light background for colours, (h, w, 3)."""
    return np.repeat(0.45 + 0.55 * image[..., None], 3, axis=2)


def frame(axes: 'Axes', box: Box, colour: str = ACCENT, width: float = 1.8, **style: Any) -> None:
    """A frame round pixels, white below so that it is seen on every picture."""
    from matplotlib.patches import Rectangle

    for line, shade in ((width + 1.6, PAPER), (width, colour)):
        axes.add_patch(
            Rectangle(
                (box.left - 0.5, box.top - 0.5),
                box.width,
                box.height,
                fill=False,
                edgecolor=shade,
                linewidth=line,
                joinstyle='miter',
                **style,
            )
        )


def mark(axes: 'Axes', x: float, y: float, size: float = 9, colour: str = ACCENT) -> None:
    """A ring round a pixel."""
    for line, shade in ((3.4, PAPER), (1.9, colour)):
        axes.plot(x, y, 'o', markersize=size, markerfacecolor='none', markeredgecolor=shade, markeredgewidth=line)


@functools.cache
def heat() -> 'Colormap':
    """From nothing, which leaves the picture as it is, over orange to dark red."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ((0, '#fdd49e00'), (0.12, '#fdbb84a0'), (0.4, '#f26b3ddd'), (0.7, '#c51b2bf2'), (1, '#5c0018ff'))
    return LinearSegmentedColormap.from_list('heat', stops)


@functools.cache
def heat_on_white() -> 'Colormap':
    """The colours of :func:`heat` without a picture below."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list('heat_on_white', ('#ffffff', '#fdc69a', '#f26b3d', '#c51b2b', '#5c0018'))


@functools.cache
def diverging() -> 'Colormap':
    """From blue over white to vermilion, for values of both signs."""
    from matplotlib.colors import LinearSegmentedColormap

    dark_blue, blue, vermilion, dark_vermilion = '#003a5c', COLOURS[0], COLOURS[1], '#6e3000'
    return LinearSegmentedColormap.from_list(
        'diverging', ((0, dark_blue), (0.2, blue), (0.5, '#ffffff'), (0.8, vermilion), (1, dark_vermilion))
    )


@functools.cache
def positive() -> 'Colormap':
    """From pale to dark blue, for values above 0: none of them is white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list('positive', ('#e3eef6', '#8fc1e0', COLOURS[0], '#00283f'))


def fit(box: Box, width: float) -> tuple[float, float]:
    """Width and height of a picture that is drawn as wide as said, or less so, where it would be too high."""
    wide = width * min(1, TALLEST * box.width / box.height)
    return wide, wide * box.height / box.width


def overview(page: Page, scene: Scene, left: float, top: float, width: float) -> 'Axes':
    """What the network was shown, with the pixel; as :func:`fit` has it."""
    note = f'ring: pixel ({scene.pixel[0]}, {scene.pixel[1]})'
    axes = page.axes(left, top, *fit(scene.box, width), 'Picture', note)
    show(axes, scene.image, scene.box)
    mark(axes, *scene.pixel)
    return axes


def write(figure: 'Figure', path: Path) -> None:
    """Write a figure as PNG file, whole or not at all.

    Raises:
        OSError: It cannot be written; the message names the file and says why.
    """
    with write_errors(path), write_atomically(path) as file:
        figure.savefig(file, format='png')
