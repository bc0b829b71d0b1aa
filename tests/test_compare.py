"""``attnsr.compare``: pictures of the same image from several sources."""

from attnsr import compare  # first, since it makes basicsr importable on current libraries

# isort: split
import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from attnsr.compare import Panel, draw

PAPER = (255, 255, 255)


def photograph(height: int, width: int) -> np.ndarray:
    """BGR uint8, each pixel's neighbourhood unlike any other."""
    rgb = skimage.data.retina()
    rgb = rgb[500 : 500 + height, 200 : 200 + width] if max(height, width) < 800 else rgb[:height, :width]
    return np.ascontiguousarray(rgb[..., ::-1])


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def panels(hr: np.ndarray) -> list[Panel]:
    return [
        Panel('LR (bicubic)', ['PSNR 30.12', 'SSIM 0.8123'], blurred(hr, 2)),
        Panel('ELAN', ['PSNR 31.34 (+1.22)', 'SSIM 0.8456 (+0.0333)'], blurred(hr, 1)),
        Panel('HR', [], hr),
    ]


def pixels(picture: Image.Image) -> np.ndarray:
    """BGR, as OpenCV has it."""
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])


def find(picture: np.ndarray, image: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Left and top of the place where an image is most alike, and which of its pixels are equal there, (h, w) bool."""
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(picture, image, cv2.TM_SQDIFF))
    part = picture[y : y + image.shape[0], x : x + image.shape[1]]
    return x, y, (part == image).all(-1)


@pytest.mark.parametrize(
    ('size', 'factor'), [((200, 320), 1), ((160, 120), 2), ((30, 40), 6), ((400, 60), 2)], ids=lambda v: str(v)
)
def test_each_image_is_there_pixel_by_pixel_but_for_the_frame(size: tuple[int, int], factor: int) -> None:
    hr = photograph(*size)
    made = panels(hr)
    picture = pixels(draw('retina', 'Photographs, x2', made))
    lefts = []
    for panel in made:
        x, y, equal = find(picture, panel.image.repeat(factor, 0).repeat(factor, 1))
        framed = np.argwhere(~equal)
        (top, left), (bottom, right) = framed.min(0), framed.max(0)
        assert equal[top + 6 : bottom - 5, left + 6 : right - 5].all(), 'the framed region itself is not touched'
        colours = {tuple(colour) for colour in picture[y : y + equal.shape[0], x : x + equal.shape[1]][~equal]}
        assert colours == {PAPER, (126, 0, 230)}, 'the frame is magenta with a white edge'
        lefts.append(x)
    assert lefts == sorted(set(lefts)), 'not side by side in the given order'


def test_the_detail_is_the_worst_region_of_each_enlarged() -> None:
    hr = photograph(200, 320)
    made = panels(hr)
    # One region of bicubic is made much worse than the rest, another of the network's output, which does not matter.
    made[0].image[90:110, 230:260] = 0
    made[1].image[10:40, 10:60] = 255
    left, top = compare.worst_region(made[0].image, hr, 80, 50)
    assert 180 <= left <= 230
    assert 60 <= top <= 90
    picture = pixels(draw('retina', 'Photographs, x2', made))
    for panel in made:
        detail = panel.image[top : top + 50, left : left + 80].repeat(4, 0).repeat(4, 1)
        assert find(picture, detail)[2].all()


@pytest.mark.parametrize('channels', [(), (3,)], ids=['grey', 'colour'])
@pytest.mark.parametrize(('width', 'height'), [(1, 1), (7, 5), (23, 17)])
def test_worst_region_is_the_best_of_all_tried(width: int, height: int, channels: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    image, reference = generator.integers(0, 256, (2, 17, 23, *channels), dtype=np.uint8)
    error = (image.astype(int) - reference) ** 2
    tried = {
        (x, y): error[y : y + height, x : x + width].sum()
        for y in range(17 - height + 1)
        for x in range(23 - width + 1)
    }
    assert compare.worst_region(image, reference, width, height) == max(tried, key=lambda place: tried[place])


def test_large_images_are_reduced_but_not_their_detail() -> None:
    hr = photograph(900, 1200)
    made = panels(hr)
    picture = pixels(draw('retina', 'Photographs, x4', made))
    assert picture.shape[1] < 3 * 800 + 200
    left, top = compare.worst_region(made[0].image, hr, 200, 150)
    for panel in made:
        assert find(picture, panel.image[top : top + 150, left : left + 200].repeat(4, 0).repeat(4, 1))[2].all()
        reduced = cv2.resize(panel.image, (800, 600), interpolation=cv2.INTER_AREA)
        x, y, _ = find(picture, reduced)
        shown = picture[y : y + 600, x : x + 800].astype(float)
        assert np.median(abs(shown - reduced)) <= 2


def test_grey_images_are_drawn_grey() -> None:
    grey = skimage.data.camera()[:100, :300]
    picture = pixels(draw('camera', 'Photographs, x2', [Panel('A', [], blurred(grey, 2)), Panel('B', [], grey)]))
    assert find(picture, np.repeat(grey[..., None], 3, 2))[2].mean() > 0.9


@pytest.mark.parametrize('width', [40, 120, 300])
def test_long_texts_stay_in_their_columns(width: int) -> None:
    hr = photograph(60, width)
    long = 'a title that is far too long for any column of this picture, whatever its size may be'
    made = [Panel(long, [long, 'SSIM 0.8123', 'PSNR 30.12', 'NIQE 3.1234'], hr) for _ in range(3)]
    picture = pixels(draw(long * 3, long * 3, made))
    plain = pixels(draw('short', 'short', [Panel('A', [], hr)] * 3))
    assert picture.shape[1] == plain.shape[1], 'texts do not widen the picture'
    column = max(240, width)
    margin = 2 * max(12, column // 24)
    first_image = np.argmax((picture[:, margin : margin + column] != PAPER).any(-1).mean(1) > 0.9)
    # The two lines at the top run over all columns; below them come the titles and the notes. Identical images have
    # their frame in the corner, where it reaches 5 pixels above the image.
    titles = picture[margin + 4 * round(margin * 0.7) : first_image - 5]
    ink = (titles != PAPER).any(-1).any(0)
    gap = margin // 2
    for i in range(3):
        start = margin + i * (column + gap)
        assert ink[start : start + column].any()
        assert not ink[start + column + 1 : start + column + gap].any(), 'a text runs into the next column'


@pytest.mark.parametrize(
    'shapes', [[(20, 30, 3)], [(20, 30, 3), (20, 32, 3)], [(20, 30, 3), (20, 30)]], ids=['one', 'sizes', 'colours']
)
def test_refuses_what_cannot_be_compared(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r'two or more images of one shape.*\(20, 30, 3\)'):
        draw('name', 'set', [Panel('A', [], np.zeros(shape, np.uint8)) for shape in shapes])
