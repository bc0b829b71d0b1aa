"""Comparison pictures: the same image from several sources side by side, and a detail of each below it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LARGEST_SIDE = 800  # pixels; larger images are reduced to this in the overview, their detail is not
COLUMN = 240  # pixels; the narrowest column, wide enough for a caption of two metrics
ZOOM = 4  # the detail is so much larger than the overview

PAPER, INK, GREY, HAIRLINE, ACCENT = '#ffffff', '#1c1c1e', '#6e6e73', '#d2d2d7', '#e6007e'


class Panel(NamedTuple):
    """One column.

    Attributes:
        title: Short, for example ``'HR'``.
        notes: Set below the title, for example ``['PSNR 31.42', 'SSIM 0.8971']``; wrapped where the column is narrow.
        image: uint8 in [0, 255], (h, w, 3) in BGR order or (h, w) grey, as BasicSR's ``tensor2img`` gives it.
    """

    title: str
    notes: Sequence[str]
    image: np.ndarray


def draw(heading: str, subheading: str, panels: Sequence[Panel]) -> Image.Image:
    """Draw panels side by side with captions, and under each the same region enlarged.

    Images up to 800 pixels a side are shown pixel by pixel, narrow ones (below 240 pixels) enlarged by a whole factor
    without smoothing, larger ones reduced (Lanczos). The enlarged region is where the first panel is furthest from the
    last, so with bicubic first and HR last it is where bicubic fails most; a frame around it marks it in each image.

    Args:
        heading: The image's name.
        subheading: Set below the heading, smaller; the size in pixels is added to it.
        panels: At least two, whose images have the same shape.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: Fewer than two panels, or their images differ in shape.
    """
    shapes = [panel.image.shape for panel in panels]
    if len(shapes) < 2 or len(set(shapes)) != 1:
        raise ValueError(f'A comparison needs two or more images of one shape, and got {len(shapes)}: {shapes}.')
    height, width = shapes[0][:2]
    factor = _overview_factor(height, width)
    shown = max(1, round(width * factor)), max(1, round(height * factor))
    column = max(shown[0], COLUMN)
    zoom = ZOOM * max(1, round(factor))
    # The detail fills the column and is neither taller than square nor a strip, as far as the image reaches. Sizes are
    # (width, height); the region is rounded up and the excess cut off.
    room = column, min(column, max(shown[1], column // 3))
    region = min(-(-room[0] // zoom), width), min(-(-room[1] // zoom), height)
    detail = min(room[0], region[0] * zoom), min(room[1], region[1] * zoom)
    left, top = worst_region(panels[0].image, panels[-1].image, *region)

    text = max(12, min(24, column // 24))
    margin, gap, line, frame = 2 * text, text, round(text * 1.4), max(2, text // 6)
    small, medium, large = (ImageFont.load_default(round(text * size)) for size in (1, 1.25, 1.8))
    notes = [wrap(panel.notes, small, column) for panel in panels]

    y_subheading = margin + 2 * line
    y_title = y_subheading + 2 * line
    y_notes = y_title + round(text * 1.8)
    y_image = y_notes + max(len(lines) for lines in notes) * line + gap // 2
    y_detail = y_image + shown[1] + gap
    y_foot = y_detail + detail[1] + gap
    inner = len(panels) * column + (len(panels) - 1) * gap

    picture = Image.new('RGB', (inner + 2 * margin, y_foot + text + margin), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((margin, margin), shorten(heading, large, inner), INK, large)
    subheading = f'{subheading}, {width} x {height} pixels'
    pen.text((margin, y_subheading), shorten(subheading, small, inner), GREY, small)
    for i, (panel, lines) in enumerate(zip(panels, notes, strict=True)):
        x = margin + i * (column + gap)
        pen.text((x, y_title), shorten(panel.title, medium, column), INK, medium)
        for j, note in enumerate(lines):
            pen.text((x, y_notes + j * line), note, GREY, small)
        whole = to_pil(panel.image)
        outline(pen, (x, y_image, *shown), HAIRLINE, 1)
        picture.paste(resized(whole, shown), (x, y_image))
        mark = [round(value * factor) for value in (left, top, *region)]
        box = x + mark[0], y_image + mark[1], mark[2], mark[3]
        outline(pen, box, PAPER, frame + 1)
        outline(pen, box, ACCENT, frame)
        enlarged = whole.crop((left, top, left + region[0], top + region[1]))
        enlarged = enlarged.resize((region[0] * zoom, region[1] * zoom), Image.Resampling.NEAREST)
        outline(pen, (x, y_detail, *detail), ACCENT, frame)
        picture.paste(enlarged.crop((0, 0, *detail)), (x, y_detail))
    foot = f'Framed: where {panels[0].title} is furthest from {panels[-1].title}, each pixel {zoom} x {zoom}.'
    pen.text((margin, y_foot), shorten(foot, small, inner), GREY, small)
    return picture


def worst_region(image: np.ndarray, reference: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Where an image is furthest from a reference: the left and top of the region with the largest squared error.

    Args:
        image: (h, w) or (h, w, c), any real type.
        reference: Same shape.
        width: The region's, at most w.
        height: The region's, at most h.
    """
    error = (image.astype(np.float64) - reference) ** 2
    error = error.reshape(*error.shape[:2], -1).sum(2)
    # Summed-area table: sums[y, x] is the error above and left of (y, x), a region's error is four look-ups.
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    regions = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(regions.argmax(), regions.shape)
    return int(left), int(top)


def _overview_factor(height: int, width: int) -> float:
    """Reduce to LARGEST_SIDE, or enlarge by the whole number that fills a narrow column and stays below that."""
    longest = max(height, width)
    if longest > LARGEST_SIDE:
        return LARGEST_SIDE / longest
    return max(1, min(-(-COLUMN // width), LARGEST_SIDE // longest))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """At another size (width, height): smaller by Lanczos, larger without smoothing."""
    smaller = size[0] < image.width
    return image.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 (h, w, 3) BGR or (h, w) grey to RGB."""
    return Image.fromarray(image if image.ndim == 2 else np.ascontiguousarray(image[..., ::-1])).convert('RGB')


def outline(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, thickness: int) -> None:
    """A frame around (left, top, width, height) that leaves the pixels inside as they are."""
    left, top, width, height = box
    outer = left - thickness, top - thickness, left + width + thickness - 1, top + height + thickness - 1
    pen.rectangle(outer, outline=colour, width=thickness)


def wrap(words: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Join notes by spaces into as few lines as fit; a note too long for a line is shortened."""
    lines: list[str] = []
    for word in words:
        joined = f'{lines[-1]}    {word}' if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(shorten(word, font, width))
    return lines


def shorten(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or as much of its start as fits."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f'{words}...') > width:
        words = words[:-1]
    return f'{words}...'
