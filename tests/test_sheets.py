"""``attnsr.sheets``: which images a contact sheet shows, and that what it shows is true."""

from attnsr import sheets  # first, since it makes basicsr importable on current libraries

# isort: split
import math

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from attnsr.compare import worst_region
from attnsr.sheets import Row, choose, draw, error_colours, error_on_y, error_scale


def photograph(top: int, height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(skimage.data.coffee()[top : top + height, 100 : 100 + width, ::-1])


def row(label: str, top: int, sigma: float = 1.5, height: int = 120, width: int = 160) -> Row:
    hr = photograph(top, height, width)
    bicubic, ours = (cv2.GaussianBlur(hr, (0, 0), each) for each in (2 * sigma, sigma))
    return Row(label, f'img_{top}', hr, [('Bicubic', 'PSNR 20.00', bicubic), ('Net x2', 'PSNR 22.00', ours)])


def pixels(picture: Image.Image) -> np.ndarray:
    """BGR, as OpenCV has it."""
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])


def find(picture: np.ndarray, image: np.ndarray) -> tuple[int, int, float]:
    """Left and top of the place where an image is most alike, and the share of pixels that are equal there."""
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(picture, image, cv2.TM_SQDIFF))
    part = picture[y : y + image.shape[0], x : x + image.shape[1]]
    return x, y, float((part == image).all(-1).mean())


@pytest.mark.parametrize(
    ('psnr', 'chosen'),
    [
        ([], []),
        ([30.0], [('worst, median, best', 0)]),
        ([30.0, 20.0], [('worst, median', 1), ('second worst, best', 0)]),
        (
            [25.0, 24.0, 23.0, 22.0, 21.0],
            [('worst', 4), ('second worst', 3), ('third worst, median', 2), ('best', 0)],
        ),
        (
            [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0],
            [('worst', 1), ('second worst', 3), ('third worst', 5), ('median', 7), ('best', 0)],
        ),
        ([math.inf, 30.0, 30.0], [('worst', 1), ('second worst, median', 2), ('third worst, best', 0)]),
    ],
    ids=len,
)
def test_the_worst_three_the_median_and_the_best_are_chosen(psnr: list[float], chosen: list[tuple[str, int]]) -> None:
    assert choose(psnr) == chosen


def test_the_error_is_that_on_y() -> None:
    hr, ours = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    # ITU-R BT.601 as MATLAB's rgb2ycbcr has it.
    weights = np.array([24.966, 128.553, 65.481]) / 255
    np.testing.assert_allclose(error_on_y(ours, hr), abs(ours @ weights - hr @ weights), atol=1e-4)
    assert (error_on_y(hr, hr) == 0).all()


def test_colours_grow_with_the_error_and_end_at_the_scale() -> None:
    errors = np.arange(0, 64, 4, dtype=np.float32)[None]
    colours = error_colours(errors, 48)[0].astype(int)
    # Lightness grows, and nothing above the scale is told apart.
    lightness = colours @ [0.0722, 0.7152, 0.2126]
    assert (np.diff(lightness[:13]) > 0).all()
    assert (colours[12:] == colours[12]).all()
    assert lightness[0] < 3
    assert lightness[12] > 230


def test_the_scale_is_round_and_holds_for_all_but_a_thousandth() -> None:
    error = np.zeros((100, 100), np.float32)
    error[0, :10] = 200
    assert error_scale([error]) == 8
    error[1, :10] = 30
    assert error_scale([error]) == 32
    assert error_scale([error, np.full((200, 2), 219, np.float32)]) == 255


def test_a_sheet_shows_the_rows_in_order_and_the_columns_pixel_by_pixel() -> None:
    rows = [row('worst', 20), row('median', 150), row('best', 270, 0.5)]
    picture = pixels(draw('Set5, Net x2', rows))
    scale = error_scale([error_on_y(each.ours, each.hr) for each in rows])
    tops = []
    for each in rows:
        size = min(160, sheets.COLUMN // sheets.ZOOM), min(120, sheets.DETAIL // sheets.ZOOM)
        left, top = worst_region(each.ours, each.hr, *size)
        colours = error_colours(error_on_y(each.ours, each.hr), scale)
        places = []
        for number, image in enumerate((each.hr, *(image for *_, image in each.shown), colours)):
            start = sheets.MARGIN + number * (sheets.COLUMN + sheets.GAP)
            column = picture[:, start : start + sheets.COLUMN]
            x, y, equal = find(column, image.repeat(2, 0).repeat(2, 1))  # narrow images are enlarged
            assert x == 0
            assert equal > 0.9, 'all but the frame'
            detail = image[top : top + size[1], left : left + size[0]].repeat(4, 0).repeat(4, 1)
            x, y_detail, equal = find(column, detail)
            assert (x, equal) == (0, 1)
            assert y_detail > y
            places.append(y)
        assert len(set(places)) == 1
        tops.append(places[0])
    assert tops == sorted(tops)


def test_error_maps_of_large_images_are_reduced_before_they_are_coloured() -> None:
    each = row('worst', 0, height=400, width=500)
    picture = pixels(draw('Set5', [each]))
    error = error_on_y(each.ours, each.hr)
    size = sheets.COLUMN, round(400 * sheets.COLUMN / 500)
    colours = error_colours(cv2.resize(error, size, interpolation=cv2.INTER_AREA), error_scale([error]))
    x, _, equal = find(picture[:, sheets.MARGIN + 3 * (sheets.COLUMN + sheets.GAP) :], colours)
    assert x == 0
    assert equal > 0.9


def test_bicubic_alone_has_three_columns() -> None:
    each = row('worst', 20)
    alone = Row(each.label, each.name, each.hr, each.shown[1:])
    both, one = (draw('Set5', [which]) for which in (each, alone))
    assert both.width - one.width == sheets.COLUMN + sheets.GAP


def test_what_is_no_row_is_refused() -> None:
    each = row('worst', 20)
    for rows in ([], [Row('worst', 'img', each.hr[:-1], each.shown)]):
        with pytest.raises(ValueError, match='in each row images of one shape'):
            draw('Set5', rows)
