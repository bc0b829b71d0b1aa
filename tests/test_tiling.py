"""Cutting into tiles and blending them: nothing is lost, nothing is changed where tiles agree, and no step is large."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.data_prep.matlab_resize import imresize
from attnsr.tiling import Axis, Cut, cut_axis, upscale_bands

CASES = [
    (side, tile, overlap, multiple)
    for side in (1, 7, 63, 64, 65, 100, 127, 128, 129, 200, 511, 1000)
    for tile, overlap, multiple in ((64, 32, 8), (64, 16, 16), (64, 0, 8), (96, 48, 16), (128, 32, 8))
]


@pytest.mark.parametrize('scale', [Fraction(2), Fraction(27, 10), Fraction(1, 3)], ids=str)
@pytest.mark.parametrize(('side', 'tile', 'overlap', 'multiple'), CASES)
def test_tiles_lie_on_the_grid_and_their_weights_sum_to_one(
    side: int, tile: int, overlap: int, multiple: int, scale: Fraction
) -> None:
    axis = cut_axis(side, tile, overlap, multiple, 2, scale)
    cuts = axis.cuts
    total = torch.zeros(axis.length)
    for cut in cuts:
        assert cut.start % multiple == 0
        assert 0 < cut.extent <= tile
        assert cut.weights.min() > 0
        # What a tile gives lies where the network saw something.
        assert cut.first >= cut.start * float(scale) - 1
        assert cut.last <= cut.stop * float(scale) + 1
        total[cut.first : cut.last] += cut.weights
    assert (total - 1).abs().max() < 1e-6
    assert (cuts[0].start, cuts[-1].stop) == (0, side)
    assert [cut.first for cut in cuts] == sorted({cut.first for cut in cuts})
    for before, after in itertools.pairwise(cuts):
        assert before.stop - after.start >= min(overlap, side - after.start)
    padded = -(-side // multiple) * multiple
    assert len(cuts) == (1 if padded <= tile else -(-(padded - overlap) // (tile - overlap)))  # no more than needed


def convolutions(x: Tensor) -> Tensor:
    """A network that sees three pixels around each, with zeros beyond the border, x2."""
    kernels = torch.randn(2, 12, 12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    y = F.conv2d(x, kernels[0][:, :3], padding=1)
    return F.pixel_shuffle(F.conv2d(F.conv2d(y, kernels[1], padding=1), kernels[0], padding=1), 2)


def assemble(x: Tensor, tile: int | None, overlap: int, scale: Fraction) -> tuple[Tensor, list[int]]:
    rows, columns = (cut_axis(side, tile, overlap, 8, 2, scale) for side in x.shape[2:])
    told: list[int] = []

    def run(row: Cut, column: Cut) -> Tensor:
        return convolutions(x[:, :, row.start : row.stop, column.start : column.stop])

    bands = list(upscale_bands(rows, columns, run, told.append))
    assert sum(told) == len(x) * rows.length * columns.length
    return torch.cat(bands, 2), [band.shape[2] for band in bands]


@pytest.mark.parametrize('scale', [Fraction(2), Fraction(3), Fraction(27, 10), Fraction(1, 2)], ids=str)
@pytest.mark.parametrize(('height', 'width'), [(150, 203), (40, 300), (65, 64)])
def test_what_sees_less_than_the_overlap_is_the_same_in_tiles(height: int, width: int, scale: Fraction) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, _ = assemble(x, None, 0, scale)
    tiled, heights = assemble(x, 64, 32, scale)
    assert torch.allclose(whole, convolutions(x) if scale == 2 else imresize(convolutions(x), scale / 2), atol=1e-12)
    assert (tiled - whole).abs().max() < 1e-6 * whole.abs().max()  # weights are float32
    assert len(heights) == len(cut_axis(height, 64, 32, 8, 2, scale).cuts)


def test_where_tiles_differ_neighbours_differ_by_little() -> None:
    axis = cut_axis(400, 128, 64, 8, 1, Fraction(1))
    constants = iter([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])

    def run(row: Cut, column: Cut) -> Tensor:
        return torch.full((1, 1, row.extent, column.extent), next(constants))

    one = Axis([Cut(0, 4, 0, 4, torch.ones(4))], 4, 1, None)
    (band,) = upscale_bands(one, axis, run)
    assert len(axis.cuts) == 6
    assert (band[0, 0, 0].min(), band[0, 0, 0].max()) == (0, 1)
    # Ramps are half as long as the overlaps, which are 72 to 80 pixels here.
    assert band.diff(dim=3).abs().max() <= 1 / 35
