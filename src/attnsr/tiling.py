"""Upscaling in tiles: large pictures in bounded memory, a band of finished rows at a time.

Along each axis the picture is cut into tiles that overlap. They begin at multiples of the network's own grid, so that
attention windows lie where they do in the whole picture. In the middle of an overlap the weight goes from one tile to
the next along a ramp; its outer quarters, where a tile lacks what is around it most, are not used at all. The weights
of all tiles sum to 1 at every pixel: where two tiles agree nothing is changed, and where they differ by d on a ramp of
r pixels, neighbouring pixels differ by d / r more than in either tile.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from attnsr.data_prep.matlab_resize import contributions, resize_tensor

__all__ = ['Axis', 'Cut', 'cut_axis', 'upscale_bands']


@dataclass(frozen=True)
class Cut:
    """What one tile is along one axis.

    Attributes:
        start: First LR pixel that the network sees.
        stop: Behind the last.
        first: First pixel of the result that the tile has a part in.
        last: Behind the last.
        weights: Of the tile at these pixels: float32, (last - first,), in (0, 1].
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor

    @property
    def extent(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Axis:
    """One axis of a picture, cut into tiles.

    Attributes:
        cuts: From the first pixel to the last; the first pixels of the result that each has a part in ascend.
        length: Of the result.
        factor: The network's scale factor.
        taps: Weights and indices of the network's pixels that make up each pixel of the result, as
            :func:`attnsr.data_prep.matlab_resize.contributions` gives them; None where the result is the network's.
    """

    cuts: list[Cut]
    length: int
    factor: int
    taps: tuple[np.ndarray, np.ndarray] | None

    def resized(self, y: Tensor, dim: int, cut: Cut) -> Tensor:
        """Of the network's output for a tile: the pixels of the result that the tile has a part in, along ``dim``."""
        begin = cut.start * self.factor
        if self.taps is None:
            return y.narrow(dim, cut.first - begin, cut.last - cut.first)
        weights, indices = (table[cut.first : cut.last] for table in self.taps)
        return resize_tensor(y, dim, weights, (indices - begin).clip(0, y.shape[dim] - 1))


def cut_axis(side: int, tile: int | None, overlap: int, multiple: int, factor: int, scale: Fraction) -> Axis:
    """Cut an axis into as few tiles of one size as there can be, evenly.

    Args:
        side: LR pixels.
        tile: Of what the network sees, in LR pixels, a multiple of ``multiple``; None for all of them.
        overlap: Of two tiles at least, in LR pixels, a multiple of ``multiple`` and at most half of ``tile``.
        multiple: Tiles begin at multiples of this.
        factor: The network's scale factor.
        scale: Of the result.
    """
    length = math.ceil(side * scale)
    taps = None if scale == factor else contributions(side * factor, scale / factor, True, 'replicate')
    padded = math.ceil(side / multiple) * multiple
    if tile is None or padded <= tile:
        return Axis([Cut(0, side, 0, length, torch.ones(length))], length, factor, taps)
    count = math.ceil((padded - overlap) / (tile - overlap))
    starts = [i * (padded - tile) // ((count - 1) * multiple) * multiple for i in range(count)]
    stops = [min(start + tile, side) for start in starts]
    # Where each pixel of the result lies among those of the picture, and how much of it comes from a tile or those
    # after it: all for the first tile, and for each other one a ramp from 0 to 1 in its overlap with the one before.
    places = (np.arange(length) + 0.5) / float(scale)
    middles = [(start + stop) / 2 for start, stop in zip(starts[1:], stops, strict=False)]
    room = [(after - before) / 2 for before, after in itertools.pairwise(middles)]
    shares = [np.ones(length)]
    for i, middle in enumerate(middles):
        half = min((stops[i] - starts[i + 1]) / 4, *room[max(i - 1, 0) : i + 1], math.inf)
        half = max(half, 1e-6)  # without overlap, a step
        shares.append(((places - middle) / (2 * half) + 0.5).clip(0, 1))
    shares.append(np.zeros(length))
    cuts = []
    for start, stop, share, later in zip(starts, stops, shares, shares[1:], strict=False):
        weights = share - later
        used = np.flatnonzero(weights)
        first, last = int(used[0]), int(used[-1]) + 1
        cuts.append(Cut(start, stop, first, last, torch.from_numpy(weights[first:last]).float()))
    return Axis(cuts, length, factor, taps)


def upscale_bands(
    rows: Axis, columns: Axis, run: Callable[[Cut, Cut], Tensor], advance: Callable[[int], object] = lambda _: None
) -> Iterator[Tensor]:
    """Upscale tile by tile.

    Args:
        rows: The picture's height.
        columns: Its width.
        run: The network's output for the tile of a cut of the rows and one of the columns: (B, C, factor * extent,
            factor * extent), floating point.
        advance: Called after each tile with the pixels of the result that are new, of all images together.

    Yields:
        (B, C, height, width) of the rows that are finished, from top to bottom. What is in memory is a tile, and as
        many rows of the whole width as a tile has.
    """
    carried: Tensor | None = None
    after = [*(cut.first for cut in rows.cuts[1:]), rows.length]
    for row, finished in zip(rows.cuts, after, strict=True):
        band: Tensor | None = None
        told = 0
        for column in columns.cuts:
            y = rows.resized(run(row, column), -2, row)
            y = columns.resized(y, -1, column)
            new = (finished - row.first) * (column.last - told) * len(y)
            told = column.last
            if len(rows.cuts) == len(columns.cuts) == 1:
                advance(new)
                yield y
                return
            if band is None:
                band = y.new_zeros((*y.shape[:2], row.last - row.first, columns.length))
            weights = row.weights.to(y)[:, None] * column.weights.to(y)
            band[..., column.first : column.last].addcmul_(y, weights)
            del y
            advance(new)
        assert band is not None
        if carried is not None:
            band[..., : carried.shape[-2], :] += carried
        carried = band[..., finished - row.first :, :].clone()
        yield band[..., : finished - row.first, :]
