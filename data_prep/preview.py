"""A picture of some HR and LR pairs, as LMDBs hold them: a look at it shows whether they belong together."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import lmdb
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnsr.compare import GREY, INK, PAPER

__all__ = ['SUFFIX', 'draw']

#: What the names of these pictures end in. They lie beside LMDBs and belong to no data set.
SUFFIX = '.preview.png'

ROWS = 4
SEARCHED = 2000  # pixels on a side
SIDE = 240  # HR pixels of a detail, or the image's side if that is less
GAP, MARGIN, LINE = 16, 32, 20


def draw(hr: Path, lr: Mapping[int, Path], keys: Sequence[str]) -> Image.Image:
    """Draw the same region of HR and LR images side by side, LR pixels as squares of the size they stand for.

    Args:
        hr: LMDB of HR images.
        lr: LMDBs of LR images by scale.
        keys: The images to choose from: the first, the last and two between. Of each, the region with the strongest
            edges is shown.

    Returns:
        The picture, RGB.
    """
    multiple = math.lcm(*lr)
    chosen = sorted({round(place * (len(keys) - 1) / (ROWS - 1)) for place in range(ROWS)})
    rows = []
    for key in (keys[place] for place in chosen):
        large = _image(hr, key)
        height, width = (max(1, min(side, SIDE) // multiple) * multiple for side in large.shape[:2])
        top, left = (value // multiple * multiple for value in _strongest_edges(large, height, width))
        columns = [('HR', large.shape, large[top : top + height, left : left + width])]
        for scale, path in sorted(lr.items()):
            small = _image(path, key)
            part = small[top // scale :, left // scale :][: height // scale, : width // scale]
            # A pair of different sizes, which this picture is there to show, leaves part of its square empty.
            canvas = np.full((height, width, 3), 255, np.uint8)
            squares = part.repeat(scale, 0).repeat(scale, 1)
            canvas[: squares.shape[0], : squares.shape[1]] = squares
            columns.append((f'LR x{scale}', small.shape, canvas))
        rows.append((key, columns))

    names, title = ImageFont.load_default(13), ImageFont.load_default(17)
    width = 2 * MARGIN + len(rows[0][1]) * (SIDE + GAP) - GAP
    heights = [columns[0][2].shape[0] + 2 * LINE + GAP for _, columns in rows]
    picture = Image.new('RGB', (width, 2 * MARGIN + 2 * LINE + sum(heights)), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), f'Details of {hr.stem} and its LR images', INK, title)
    y = MARGIN + 2 * LINE
    for (key, columns), height in zip(rows, heights, strict=True):
        pen.text((MARGIN, y), key, INK, names)
        for number, (name, shape, region) in enumerate(columns):
            x = MARGIN + number * (SIDE + GAP)
            pen.text((x, y + LINE - 3), f'{name}, {shape[1]} x {shape[0]} pixels', GREY, names)
            picture.paste(Image.fromarray(np.ascontiguousarray(region[..., ::-1])), (x, y + 2 * LINE))
        y += height
    return picture


def _image(path: Path, key: str) -> np.ndarray:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        value = transaction.get(key.encode('ascii'))
    assert value is not None
    image = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def _strongest_edges(image: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Where the region with the largest sum of absolute differences begins, (top, left)."""
    # In the middle of a large image, since what follows takes twenty bytes a pixel.
    y, x = (max(0, side - SEARCHED) // 2 for side in image.shape[:2])
    grey = cv2.cvtColor(image[y : y + SEARCHED, x : x + SEARCHED], cv2.COLOR_BGR2GRAY).astype(np.float32)
    edges = np.abs(cv2.Sobel(grey, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    total = cv2.integral(edges)
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return y + int(top), x + int(left)
