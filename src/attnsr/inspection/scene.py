"""The picture that is looked at, and the pixel of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from attnsr.data_prep import images
from attnsr.data_prep.images import ImageProblem
from attnsr.errors import UsageError

__all__ = ['ALIGNED', 'LEAST_SIDE', 'Box', 'Scene', 'read', 'strongest_edge']

#: The least side in pixels of a picture to look into.
LEAST_SIDE = 16

#: A multiple of the sides of all windows.
ALIGNED = 16

# What gradients are taken of is smoothed by so much, and what a single pixel says of them too.
EDGE_SCALE = 1.5


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels, by its upper left corner and its sides."""

    left: int
    top: int
    width: int
    height: int

    def __str__(self) -> str:
        return f'{self.width} x {self.height} at ({self.left}, {self.top})'


@dataclass(frozen=True)
class Scene:
    """A picture, or what is cut out of it, and a pixel in it.

    Coordinates are those of the whole picture: (x, y) from the upper left pixel, which is (0, 0).

    Attributes:
        name: The picture's.
        image: What the network is shown: (h, w, 3), float32, RGB in [0, 1].
        pixel: (x, y).
        box: Where in the picture ``image`` lies.
        whole: (width, height) of the picture.
    """

    name: str
    image: np.ndarray
    pixel: tuple[int, int]
    box: Box
    whole: tuple[int, int]

    @property
    def place(self) -> tuple[int, int]:
        """(row, column) of the pixel in ``image``."""
        return self.pixel[1] - self.box.top, self.pixel[0] - self.box.left

    @property
    def grey(self) -> np.ndarray:
        """(h, w), float32 in [0, 1]: the luma."""
        return grey(self.image)

    def tensor(self, device: torch.device | str = 'cpu') -> Tensor:
        """As the networks take it: (1, 3, h, w), float32, RGB in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(self.image.transpose(2, 0, 1)))[None].to(device)

    def cut(self, side: int, around: tuple[float, float] | None = None, aligned: int = 1) -> 'Scene':
        """At most ``side`` pixels wide and high, with the pixel, or the point (x, y) ``around``, near the middle.

        It begins at multiples of ``aligned``, so that windows may lie as in the whole picture.
        """
        box, middle = self.box, around or self.pixel
        left, width = _stretch(middle[0] - box.left, side, box.width, aligned)
        top, height = _stretch(middle[1] - box.top, side, box.height, aligned)
        return replace(
            self,
            image=self.image[top : top + height, left : left + width],
            box=Box(box.left + left, box.top + top, width, height),
        )

    def describe(self) -> str:
        """What is shown, for a figure's subtitle."""
        width, height = self.whole
        shown = f'{self.name}, {width} x {height} pixels'
        return shown if (self.box.width, self.box.height) == self.whole else f'{shown}; shown: {self.box}'


def _stretch(middle: float, side: int, available: int, aligned: int) -> tuple[int, int]:
    """Where a cut begins along an axis, and how long it is."""
    start = min(max(round(middle - side / 2), 0), max(available - side, 0)) // aligned * aligned
    if start + side <= middle:  # by the alignment, at the end of the picture
        start += aligned
    return start, min(side, available - start)


def grey(image: np.ndarray) -> np.ndarray:
    """Luma (BT.601) of (h, w, 3), RGB."""
    return (image @ np.array([0.299, 0.587, 0.114], image.dtype)).astype(image.dtype)


def gradient(image: np.ndarray, sigma: float = EDGE_SCALE) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives (along y, along x) of (h, w), smoothed by a Gaussian."""
    down, right = (ndimage.gaussian_filter(image, sigma, order=order, mode='nearest') for order in ((1, 0), (0, 1)))
    return down, right


def strongest_edge(image: np.ndarray) -> tuple[int, int]:
    """(row, column) in (h, w, 3) where the gradient of the luma is largest, away from the borders if there is room."""
    strength = ndimage.gaussian_filter(np.hypot(*gradient(grey(image))), EDGE_SCALE, mode='nearest')
    margin = [min(ALIGNED, side // 4) for side in strength.shape]
    inner = strength[margin[0] : strength.shape[0] - margin[0], margin[1] : strength.shape[1] - margin[1]]
    row, column = np.unravel_index(inner.argmax(), inner.shape)
    return int(row) + margin[0], int(column) + margin[1]


def read(path: Path, pixel: Sequence[int] | None = None) -> Scene:
    """The scene of an image file, the whole of it.

    Args:
        path: A file that :mod:`attnsr.data_prep.images` reads: 8 bits a channel, opaque; grey becomes RGB.
        pixel: (x, y), or None for that of the strongest edge.

    Raises:
        ImageProblem: The file cannot be used; the message says why.
        UsageError: The pixel is outside, or the picture is smaller than :data:`LEAST_SIDE`.
    """
    if not path.exists():
        raise ImageProblem(f'{path}: there is no such file')
    if path.is_dir():
        raise ImageProblem(f'{path}: is a folder; name one image file')
    pixels = images.read(images.inspect(path))
    rgb = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)
    image = rgb.astype(np.float32) / 255
    height, width = image.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise UsageError(f'{path}: has {width} x {height} pixels; needs at least {LEAST_SIDE} x {LEAST_SIDE}')
    if pixel is None:
        row, column = strongest_edge(image)
        at = column, row
    else:
        at = pixel[0], pixel[1]
        if not (0 <= at[0] < width and 0 <= at[1] < height):
            raise UsageError(
                f'--pixel {at[0]},{at[1]} is outside {path}: X is from 0 to {width - 1}, Y from 0 to {height - 1}'
            )
    return Scene(path.stem, image, at, Box(0, 0, width, height), (width, height))
