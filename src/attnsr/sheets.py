"""Contact sheets: of a set, the images that come out worst, in the middle and best, and where they are wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from basicsr.metrics.metric_util import to_y_channel
from PIL import Image, ImageDraw, ImageFont

from attnsr.compare import (
    ACCENT,
    GREY,
    HAIRLINE,
    INK,
    PAPER,
    outline,
    resized,
    shorten,
    to_pil,
    worst_region,
)

__all__ = ['Row', 'choose', 'draw', 'error_colours', 'error_on_y', 'error_scale']

#: The worst images that are shown.
WORST = ('worst', 'second worst', 'third worst')

#: Pixels: of a column, of the tallest overview, of a detail; and how many a pixel of a detail is wide.
COLUMN, OVERVIEW, DETAIL, ZOOM = 340, 300, 204, 4

MARGIN, GAP, LINE, FRAME = 36, 14, 20, 2

#: Values of Y that an error map's colours may end at.
SCALES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 255)

#: Of all pixels, the share that the colours need not tell apart.
CLIPPED = 0.001


@dataclass(frozen=True)
class Row:
    """One image of a sheet.

    Attributes:
        label: Why it is shown, for example ``'worst'``.
        name: The image's.
        hr: uint8 (h, w, 3) BGR.
        shown: What is compared with it: title, caption (for example ``'PSNR 28.42   SSIM 0.8104'``) and image, of the
            same form. The last one is what is measured.
    """

    label: str
    name: str
    hr: np.ndarray
    shown: Sequence[tuple[str, str, np.ndarray]]

    @property
    def ours(self) -> np.ndarray:
        """What is measured."""
        return self.shown[-1][2]


def choose(psnr: Sequence[float]) -> list[tuple[str, int]]:
    """The images that a sheet shows: the worst three, the worst first, the median and the best.

    Args:
        psnr: Of all images.

    Returns:
        What each is, and its place in ``psnr``. Of few images each is there once, and is all that it is: the worst of
        five are the median too. Of an even number, the median is the worse of the two in the middle.
    """
    order = sorted(range(len(psnr)), key=lambda index: (psnr[index], index))
    if not order:
        return []
    places = list(enumerate(WORST))
    places += [((len(order) - 1) // 2, 'median'), (len(order) - 1, 'best')]
    labels: dict[int, list[str]] = {}
    for place, label in places:
        if place < len(order):
            labels.setdefault(order[place], []).append(label)
    return [(', '.join(labels[index]), index) for index in order if index in labels]


def error_on_y(image: np.ndarray, hr: np.ndarray) -> np.ndarray:
    """The absolute difference on Y as PSNR has it, in units of 8 bits.

    Args:
        image: uint8 (h, w, 3) BGR.
        hr: The same.

    Returns:
        (h, w), float32, in [0, 219].
    """
    y = [to_y_channel(each)[..., 0].astype(np.float32) for each in (image, hr)]
    return np.abs(y[0] - y[1])


def error_scale(errors: Sequence[np.ndarray]) -> int:
    """The error at which the colours of a sheet end: one of a few round numbers, above all but 0.1 % of the pixels."""
    largest = float(np.quantile(np.concatenate([error.ravel() for error in errors]), 1 - CLIPPED))
    return next(scale for scale in SCALES if largest <= scale)


def error_colours(error: np.ndarray, scale: int) -> np.ndarray:
    """An error map: black for none, over violet and orange to light yellow at ``scale`` and above.

    Args:
        error: (h, w), in units of 8 bits.
        scale: The error that has the last colour.

    Returns:
        uint8 (h, w, 3) BGR.
    """
    levels = np.clip(error * (255 / scale), 0, 255).round().astype(np.uint8)
    return cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)


def draw(heading: str, rows: Sequence[Row]) -> Image.Image:
    """Draw a contact sheet.

    A row is an image: HR, what is compared with it, and the error map of the last of these, reduced to a column's width
    where they are wider; below each the region where the last is furthest from HR, every pixel four by four. The error
    maps of all rows have the same scale, which stands at the top.

    Args:
        heading: At the top.
        rows: At least one; all with the same titles.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: There is no row, or the images of a row differ in shape.
    """
    if not rows or any(image.shape != row.hr.shape for row in rows for *_, image in row.shown):
        raise ValueError('A contact sheet needs rows, and in each row images of one shape.')
    title = rows[0].shown[-1][0]
    errors = [error_on_y(row.ours, row.hr) for row in rows]
    scale = error_scale(errors)
    places = [_Place(row) for row in rows]
    large, medium, small = (ImageFont.load_default(size) for size in (26, 17, 13))

    count = len(rows[0].shown) + 2
    width = 2 * MARGIN + count * COLUMN + (count - 1) * GAP
    y_rows = MARGIN + 4 * LINE
    heights = [3 * LINE + place.shown[1] + GAP + place.detail[1] + 2 * GAP + LINE for place in places]
    picture = Image.new('RGB', (width, y_rows + sum(heights) + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), shorten(heading, large, width - 2 * MARGIN - COLUMN - GAP), INK, large)
    foot = f'Framed: where {title} is furthest from HR, each pixel {ZOOM} x {ZOOM} below.'
    pen.text((MARGIN, MARGIN + 2 * LINE - 4), shorten(foot, small, width - 2 * MARGIN - COLUMN - GAP), GREY, small)
    _legend(picture, pen, width - MARGIN - COLUMN, scale, small)

    top = y_rows
    for row, place, error, height in zip(rows, places, errors, heights, strict=True):
        pen.line((MARGIN, top, width - MARGIN, top), HAIRLINE, 1)
        label = row.label[:1].upper() + row.label[1:]
        pen.text((MARGIN, top + 8), label, INK, medium)
        pen.text(
            (MARGIN + round(medium.getlength(label)) + GAP, top + 8),
            shorten(row.name, medium, width - 2 * MARGIN - medium.getlength(label) - GAP),
            GREY,
            medium,
        )
        size = f'{row.hr.shape[1]} x {row.hr.shape[0]} pixels'
        levels = f'mean {error.mean():.2f}   largest {error.max():.0f}'
        columns: list[tuple[str, str, np.ndarray | None]] = [
            ('HR', size, row.hr),
            *row.shown,
            ('Error on Y', levels, None),
        ]
        for number, (name, caption, image) in enumerate(columns):
            left = MARGIN + number * (COLUMN + GAP)
            y = top + 2 * LINE
            pen.text((left, y), _head(name, caption, small), INK, small)
            pen.text((left + small.getlength(f'{name}   '), y), _tail(name, caption, small), GREY, small)
            shown, detail = place.views(error, scale) if image is None else place.views_of(image)
            place.paste(picture, pen, left, top + 3 * LINE + 4, shown, detail)
        top += height
    return picture


class _Place:
    """Where a row's images and details lie; all four columns have the same."""

    def __init__(self, row: Row) -> None:
        self.height, self.width = row.hr.shape[:2]
        self.factor = min(COLUMN / self.width, OVERVIEW / self.height)
        if self.factor > 1:
            self.factor = math.floor(self.factor)
        self.shown = max(1, round(self.width * self.factor)), max(1, round(self.height * self.factor))
        self.region = min(self.width, COLUMN // ZOOM), min(self.height, DETAIL // ZOOM)
        self.detail = self.region[0] * ZOOM, self.region[1] * ZOOM
        self.corner = worst_region(row.ours, row.hr, *self.region)

    def views_of(self, image: np.ndarray) -> tuple[Image.Image, Image.Image]:
        """Overview and detail of an image."""
        left, top = self.corner
        part = image[top : top + self.region[1], left : left + self.region[0]]
        return resized(to_pil(image), self.shown), to_pil(part.repeat(ZOOM, 0).repeat(ZOOM, 1))

    def views(self, error: np.ndarray, scale: int) -> tuple[Image.Image, Image.Image]:
        """The same of an error map, which is reduced before it is coloured: a mean of colours would be none."""
        overview = cv2.resize(error, self.shown, interpolation=cv2.INTER_AREA) if self.factor < 1 else error
        whole, detail = self.views_of(error_colours(error, scale))
        return (to_pil(error_colours(overview, scale)) if self.factor < 1 else whole), detail

    def paste(
        self,
        picture: Image.Image,
        pen: ImageDraw.ImageDraw,
        left: int,
        top: int,
        shown: Image.Image,
        detail: Image.Image,
    ) -> None:
        """Put both into the sheet, framed."""
        outline(pen, (left, top, *self.shown), HAIRLINE, 1)
        picture.paste(shown, (left, top))
        mark = [round(value * self.factor) for value in (*self.corner, *self.region)]
        box = left + mark[0], top + mark[1], mark[2], mark[3]
        outline(pen, box, PAPER, FRAME + 1)
        outline(pen, box, ACCENT, FRAME)
        below = top + self.shown[1] + GAP
        outline(pen, (left, below, *self.detail), ACCENT, FRAME)
        picture.paste(detail, (left, below))


def _legend(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    left: int,
    scale: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """The colours of the error maps, over their numbers."""
    pen.text((left, MARGIN), 'Error on Y, in levels of 8 bits, one scale for all', GREY, font)
    ramp = np.linspace(0, scale, COLUMN, dtype=np.float32)[None].repeat(14, 0)
    picture.paste(to_pil(error_colours(ramp, scale)), (left, MARGIN + LINE))
    for quarter in range(5):
        value = scale * quarter / 4
        text = f'{value:g}' + ('+' if quarter == 4 else '')
        anchor = 'la' if quarter == 0 else 'ra' if quarter == 4 else 'ma'
        pen.text((left + (COLUMN - 1) * quarter / 4, MARGIN + LINE + 17), text, GREY, font, anchor=anchor)


def _head(name: str, caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    return shorten(name, font, COLUMN - font.getlength(f'   {caption}')) if caption else name


def _tail(name: str, caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    return shorten(caption, font, COLUMN - font.getlength(f'{name}   '))
