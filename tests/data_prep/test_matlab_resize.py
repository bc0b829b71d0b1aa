"""``imresize`` is MATLAB's: to the value on MATLAB's own pairs, and by its definition everywhere else.

MATLAB's pairs are not part of the project. With ``ATTNSR_MATLAB_PAIRS`` naming a folder that holds
``Set5/HR_x4``, ``Set5/LR_bicubic_x4``, ``Set14/HR_x4``, ... (x2, x3 and x4), they are compared as well.
"""

import math
import os
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils.matlab_functions import imresize as basicsr_imresize
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.matlab_resize import Border, imresize

PAIRS = os.environ.get('ATTNSR_MATLAB_PAIRS')

some = settings(max_examples=30, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 20)
scales = st.sampled_from(sorted({Fraction(over, under) for over in range(1, 12) for under in range(1, 9)}))
borders = st.sampled_from(['replicate', 'symmetric'])
seeds = st.integers(0, 2**32 - 1)


def keys(x: Fraction) -> Fraction:
    """Cubic convolution with a = -0.5."""
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    if x < 2:
        return Fraction(-1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
    return Fraction(0)


def within(pixel: int, side: int, border: Border) -> int:
    """The pixel that stands for one beyond the border."""
    if border == 'replicate':
        return min(max(pixel, 0), side - 1)
    while not 0 <= pixel < side:
        pixel = -1 - pixel if pixel < 0 else 2 * side - 1 - pixel
    return pixel


def definition(side: int, scale: Fraction, antialiasing: bool, border: Border) -> np.ndarray:
    """What ``imresize`` does to ``side`` pixels in a line, as a matrix: written out, in exact fractions."""
    stretch = min(scale, Fraction(1)) if antialiasing else Fraction(1)
    matrix = np.zeros((math.ceil(side * scale), side))
    for row in range(len(matrix)):
        centre = (row + Fraction(1, 2)) / scale - Fraction(1, 2)
        reach = range(math.floor(centre - 2 / stretch), math.ceil(centre + 2 / stretch) + 1)
        values = {pixel: keys(stretch * (centre - pixel)) for pixel in reach}
        for pixel, value in values.items():
            matrix[row, within(pixel, side, border)] += value / sum(values.values())
    return matrix


def half_up(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def noise(seed: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image if image.ndim == 2 else image.transpose(2, 0, 1)))


def array(image: torch.Tensor) -> np.ndarray:
    return image.numpy() if image.ndim == 2 else image.numpy().transpose(1, 2, 0)


@some
@given(sides, sides, scales, st.booleans(), borders, seeds)
def test_definition(height: int, width: int, scale: Fraction, antialiasing: bool, border: Border, seed: int) -> None:
    image = floats(seed, height, width, 2)
    rows, columns = (definition(side, scale, antialiasing, border) for side in (height, width))
    expected = np.einsum('ih,hwc,jw->ijc', rows, image, columns)
    np.testing.assert_allclose(imresize(image, scale, antialiasing, border), expected, rtol=0, atol=1e-12)


@some
@given(sides, sides, st.sampled_from([1 / 8, 1 / 4, 1 / 2, 1, 2, 4]), st.booleans(), borders, seeds)
def test_definition_8_bits(
    height: int, width: int, scale: float, antialiasing: bool, border: Border, seed: int
) -> None:
    # Powers of two: no sum is rounded in double precision, so that one half is exactly one half.
    image = noise(seed, height, width, 2)
    rows, columns = (definition(side, Fraction(scale), antialiasing, border) for side in (height, width))
    tall = half_up(np.einsum('ih,hwc->iwc', rows, image))
    expected = half_up(np.einsum('iwc,jw->ijc', tall, columns))
    np.testing.assert_array_equal(imresize(image, scale, antialiasing, border), expected)


@some
@given(sides, scales, st.booleans(), borders, seeds)
def test_nearest_8_bit_value(side: int, scale: Fraction, antialiasing: bool, border: Border, seed: int) -> None:
    image = noise(seed, side, 1)
    exact = definition(side, scale, antialiasing, border) @ image
    found = imresize(image, scale, antialiasing, border)[:, :1]
    assert np.abs(found - exact.clip(0, 255)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ('image', 'expected'),
    [
        ([[0], [1]], [[1]]),  # 0.5; to even 0
        ([[4], [5]], [[5]]),  # 4.5; to even 4
        ([[0, 1], [0, 0]], [[1]]),  # columns 0 and 0.5, hence 0 and 1, hence 0.5; rounded once 0.25, hence 0
        ([[1, 0], [2, 1]], [[2]]),  # columns 1.5 and 0.5, hence 2 and 1, hence 1.5; to even 2 and 0, hence 1
        ([[1, 1], [2, 0]], [[2]]),  # columns 1.5 and 0.5, hence 2 and 1, hence 1.5; rows, if they came first, 1 and 1
        ([[1, 2], [1, 0]], [[1]]),  # columns 1 and 1; rows, if they came first, 1.5 and 0.5, hence 2 and 1, hence 2
        ([[255, 0], [255, 0], [255, 0], [0, 0]], [[128], [64]]),  # 267, clipped to 255; 134 if it were not
        ([[0, 255], [0, 255], [0, 255], [255, 255]], [[128], [192]]),  # -12, clipped to 0; 122 if it were not
    ],
    ids=str,
)
def test_rounds_half_up_and_clips_after_each_dimension(image: list[list[int]], expected: list[list[int]]) -> None:
    pixels = np.array(image, np.uint8)
    np.testing.assert_array_equal(imresize(pixels, 1 / 2), expected)
    np.testing.assert_array_equal(imresize(torch.from_numpy(pixels), 1 / 2), expected)


def test_16_bits() -> None:
    image = np.array([[65535, 0], [65535, 0], [65535, 0], [0, 0]], np.uint16)
    np.testing.assert_array_equal(imresize(image, 1 / 2), [[32768], [16384]])  # as with 8 bits, each times 257
    np.testing.assert_array_equal(imresize(tensor(image), 1 / 2), [[32768], [16384]])


def test_borders() -> None:
    line = np.array([[0.0, 0, 0, 256, 256, 0, 0, 0]])
    # Weights of reducing by 2: (-3, -9, 29, 111, 111, 29, -9, -3) / 256, from the third pixel before.
    row = imresize(np.repeat(line, 2, axis=0), 1 / 2)
    np.testing.assert_array_equal(row, [[-12, 140, 140, -12]])
    edge = np.array([[256.0, 0, 0, 0, 0, 0]])
    assert imresize(edge, 1 / 2)[0, 0] == 111 + 29 - 9 - 3
    assert imresize(edge, 1 / 2, border='symmetric')[0, 0] == 111 + 29
    second = np.array([[0.0, 256, 0, 0, 0, 0]])
    assert imresize(second, 1 / 2)[0, 0] == 111
    assert imresize(second, 1 / 2, border='symmetric')[0, 0] == 111 - 9


@some
@given(sides, sides, scales, st.booleans(), borders, seeds)
def test_linear(height: int, width: int, scale: Fraction, antialiasing: bool, border: Border, seed: int) -> None:
    one, other = floats(seed, 2, height, width)
    sums = imresize(3 * one - 2 * other, scale, antialiasing, border)
    parts = [imresize(image, scale, antialiasing, border) for image in (one, other)]
    np.testing.assert_allclose(sums, 3 * parts[0] - 2 * parts[1], rtol=0, atol=1e-12)


@some
@given(sides, sides, scales, st.booleans(), borders, st.integers(0, 255))
def test_keeps_constants(
    height: int, width: int, scale: Fraction, antialiasing: bool, border: Border, value: int
) -> None:
    shape = [math.ceil(side * scale) for side in (height, width)]
    for dtype, tolerance in ((np.uint8, 0), (np.uint16, 0), (np.float64, 1e-12)):
        found = imresize(np.full((height, width), value, dtype), scale, antialiasing, border)
        np.testing.assert_allclose(found, np.full(shape, value), rtol=0, atol=tolerance * 255)


@some
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(['1/4', '1/3', '1/2', '2', '3', '4']), borders, seeds)
def test_flips_commute(rows: int, columns: int, scale: str, border: Border, seed: int) -> None:
    factor = Fraction(scale)
    # Whole output pixels only: one that reaches beyond the image at its end would reach beyond its start when flipped.
    image = noise(seed, rows * factor.denominator, columns * factor.denominator, 3)
    for axis in (0, 1):
        flipped = imresize(np.flip(image, axis), factor, border=border)
        np.testing.assert_array_equal(flipped, np.flip(imresize(image, factor, border=border), axis))


@some
@given(sides, sides, scales, st.booleans(), borders, seeds)
def test_transpose_commutes(
    height: int, width: int, scale: Fraction, antialiasing: bool, border: Border, seed: int
) -> None:
    image = floats(seed, height, width)
    transposed = imresize(image.T, scale, antialiasing, border)
    np.testing.assert_allclose(transposed, imresize(image, scale, antialiasing, border).T, rtol=0, atol=1e-12)


@some
@given(sides, sides, scales, st.booleans(), borders, seeds)
def test_tensors_as_arrays(
    height: int, width: int, scale: Fraction, antialiasing: bool, border: Border, seed: int
) -> None:
    for dtype in (np.uint8, np.uint16):
        image = noise(seed, height, width, 3, dtype=dtype)
        found = imresize(tensor(image), scale, antialiasing, border)
        np.testing.assert_array_equal(array(found), imresize(image, scale, antialiasing, border))
    for floating, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        image = floats(seed, height, width).astype(floating)
        found = imresize(tensor(image), scale, antialiasing, border)
        np.testing.assert_allclose(array(found), imresize(image, scale, antialiasing, border), rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize('scale', [1 / 4, 1 / 3, 0.7, 2.5], ids=str)
def test_gpu_as_array(scale: float) -> None:
    image = noise(0, 61, 43, 3)
    np.testing.assert_array_equal(array(imresize(tensor(image).cuda(), scale).cpu()), imresize(image, scale))


def test_batches() -> None:
    batch = torch.from_numpy(noise(0, 2, 3, 13, 9))
    found = imresize(batch, 1 / 3)
    for images, results in zip(batch, found, strict=True):
        for image, result in zip(images, results, strict=True):
            np.testing.assert_array_equal(result, imresize(image.numpy(), 1 / 3))


@pytest.mark.parametrize('scale', [1 / 3, 0.8, 2], ids=str)
@pytest.mark.parametrize('border', ['replicate', 'symmetric'])
def test_gradients(scale: float, border: Border) -> None:
    image = torch.from_numpy(floats(0, 2, 5, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: imresize(each, scale, border=border), image)


@pytest.mark.parametrize(
    ('scale', 'antialiasing'),
    [
        *((scale, True) for scale in (1 / 4, 1 / 3, 1 / 2, 1.5, 2, 4)),
        *(
            (scale, False) for scale in (1 / 3, 1 / 2)
        ),  # BasicSR fails at 1 / 4, where nothing beyond the border is used
    ],
)
def test_agrees_with_basicsr(scale: float, antialiasing: bool) -> None:
    image = np.random.default_rng(0).random((36, 24, 3), np.float32)
    expected = basicsr_imresize(image, scale, antialiasing)
    np.testing.assert_allclose(imresize(image, scale, antialiasing, 'symmetric'), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('side', 'scale', 'expected'),
    [
        (300, 1 / 3, 100),
        (49, 1 / 49, 1),  # 49 * (1 / 49) is 0.999...
        (70, 1.1, 77),  # 70 * 1.1 is 77.000...01
        (70, Fraction(11, 10), 77),
        (10, 0.7, 7),
        (10, np.float32(0.5), 5),
        (10, np.int64(2), 20),
        (301, 1 / 3, 101),
        (1, 1 / 4, 1),
        (10, math.pi / 10, 4),
        (10, 2.0000001, 21),
    ],
    ids=str,
)
def test_size(side: int, scale: Any, expected: int) -> None:
    assert imresize(np.zeros((side, 1)), scale).shape == (expected, math.ceil(scale))


def test_float_is_its_fraction() -> None:
    image = noise(0, 31, 22, 3)
    np.testing.assert_array_equal(imresize(image, 1 / 3), imresize(image, Fraction(1, 3)))
    np.testing.assert_array_equal(imresize(image, 2.0), imresize(image, 2))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.float64])
def test_input_is_left_as_it_was_and_any_strides_do(dtype: Any) -> None:
    image = noise(0, 24, 36, 3).astype(dtype)
    before = image.copy()
    view = image[::-1, 4:28:2, ::-1]
    found = imresize(view, 1 / 2)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, imresize(np.ascontiguousarray(view), 1 / 2))
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(imresize(image, 1), image)


@pytest.mark.parametrize('shape', [(16, 70_000), (70_000, 16)], ids=str)
def test_strips(shape: tuple[int, int]) -> None:
    # Many strips along one of the dimensions, of which every one must be what its pixels alone make it.
    image = noise(0, *shape)
    found = imresize(image, 1 / 4)
    for start in range(64, 69_000, 9999 // 8 * 8):
        rows, columns = (slice(start - 64, start + 64) if side > 16 else slice(None) for side in shape)
        part = imresize(image[rows, columns], 1 / 4)
        rows, columns = (slice(start // 4 - 8, start // 4 + 8) if side > 16 else slice(None) for side in shape)
        inner_rows, inner_columns = (slice(8, 24) if side > 16 else slice(None) for side in shape)
        np.testing.assert_array_equal(found[rows, columns], part[inner_rows, inner_columns])


def test_memory() -> None:
    image = noise(0, 1404, 2040, 3)
    tracemalloc.start()
    try:
        result = imresize(image, 1 / 2)
        assert tracemalloc.get_traced_memory()[1] < result.nbytes + image.nbytes / 2 + 6 * 2**20
    finally:
        tracemalloc.stop()


NUMBERS = r'uint8, uint16, float32 or float64'


@pytest.mark.parametrize(
    ('image', 'options', 'message'),
    [
        ([[1]], {}, 'image must be a NumPy array or a torch tensor, not list'),
        (np.zeros((2, 2), bool), {}, f'image must be {NUMBERS}, and is bool'),
        (np.zeros((2, 2), np.float16), {}, f'image must be {NUMBERS}, and is float16'),
        (torch.zeros(2, 2, dtype=torch.int64), {}, f'image must be {NUMBERS}, and is int64'),
        (np.zeros(3), {}, r'an array must be \(height, width\) or \(height, width, channels\), and is \(3,\)'),
        (np.zeros((1, 3, 4, 4)), {}, r'and is \(1, 3, 4, 4\)'),
        (torch.zeros(3), {}, r'a tensor must be \(\.\.\., height, width\), and is \(3,\)'),
        (np.zeros((0, 4, 3)), {}, r'image has no pixels: its shape is \(0, 4, 3\)'),
        (torch.zeros(1, 3, 4, 0), {}, r'image has no pixels: its shape is \(1, 3, 4, 0\)'),
        (np.zeros((2, 2)), {'scale': 0}, r'scale must be a number above 0, .*not 0'),
        (np.zeros((2, 2)), {'scale': -0.5}, r'scale must be a number above 0, .*not -0\.5'),
        (np.zeros((2, 2)), {'scale': math.nan}, r'scale must be a number above 0, .*not nan'),
        (np.zeros((2, 2)), {'scale': math.inf}, r'scale must be a number above 0, .*not inf'),
        (np.zeros((2, 2)), {'scale': '1/2'}, r"scale must be a number above 0, .*not '1/2'"),
        (np.zeros((2, 2)), {'border': 'reflect'}, "border must be 'replicate' or 'symmetric', and is 'reflect'"),
    ],
)
def test_refuses(image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataSetError, match=f'^imresize: [^\n]*{message}$'):
        imresize(image, **{'scale': 2, **options})


@pytest.mark.skipif(PAIRS is None, reason="ATTNSR_MATLAB_PAIRS does not name a folder of MATLAB's pairs")
@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('data_set', ['Set5', 'Set14'])
def test_matlab_pairs(data_set: str, scale: int) -> None:
    folder = Path(str(PAIRS)) / data_set
    files = sorted((folder / f'HR_x{scale}').glob('*.png'))
    assert len(files) == int(data_set.removeprefix('Set'))
    for file in files:
        hr = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        lr = cv2.imread(str(folder / f'LR_bicubic_x{scale}' / file.name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(imresize(hr, 1 / scale), lr, err_msg=str(file))
