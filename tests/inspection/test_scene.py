"""The picture and the pixel: where cuts begin, what is an edge, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from inspection import scenes
from PIL import Image

from attnsr.errors import UsageError
from attnsr.inspection import scene


def write(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_is_rgb_with_the_pixel_on_its_strongest_edge(tmp_path: Path) -> None:
    pixels = np.full((40, 60), 50, np.uint8)
    pixels[:, 37:] = 200
    read = scene.read(write(tmp_path / 'grey.png', pixels))
    assert read.image.shape == (40, 60, 3)
    assert read.pixel[0] in (36, 37)
    assert read.whole == (60, 40)
    assert read.box == scene.Box(0, 0, 60, 40)
    np.testing.assert_array_equal(read.image[..., 0], pixels.astype(np.float32) / 255)

    colours = np.zeros((20, 20, 3), np.uint8)
    colours[3, 5] = 255, 0, 51
    image = scene.read(write(tmp_path / 'colours.png', colours), (5, 3)).image
    np.testing.assert_allclose(image[3, 5], (1, 0, 0.2), atol=1e-6)


@pytest.mark.parametrize(
    ('pixel', 'left', 'width', 'top'), [((0, 0), 0, 48, 0), ((99, 63), 64, 36, 16), ((60, 40), 32, 48, 16)], ids=str
)
def test_a_cut_has_the_pixel_and_begins_where_windows_do(
    pixel: tuple[int, int], left: int, width: int, top: int
) -> None:
    image = np.arange(64 * 100 * 3, dtype=np.float32).reshape(64, 100, 3)
    whole = scene.Scene('x', image, pixel, scene.Box(0, 0, 100, 64), (100, 64))
    cut = whole.cut(48, aligned=16)
    assert cut.box == scene.Box(left, top, width, 48)
    np.testing.assert_array_equal(cut.image, image[top : top + 48, left : left + width])
    np.testing.assert_array_equal(cut.image[cut.place], image[pixel[1], pixel[0]])
    again = cut.cut(10)
    np.testing.assert_array_equal(again.image[again.place], image[pixel[1], pixel[0]])
    assert '10 x 10 at (' in again.describe()
    assert 'shown' not in whole.describe()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / 'x.png', np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UsageError, match=r'--pixel 30,0 is outside .*: X is from 0 to 29, Y from 0 to 19'):
        scene.read(path, (30, 0))
    with pytest.raises(UsageError, match=r'nowhere\.png: there is no such file'):
        scene.read(tmp_path / 'nowhere.png')
    small = write(tmp_path / 'small.png', np.zeros((20, 15, 3), np.uint8))
    with pytest.raises(UsageError, match=r'small\.png: has 15 x 20 pixels; needs at least 16 x 16'):
        scene.read(small)
    clear = write(tmp_path / 'clear.png', np.zeros((20, 20, 4), np.uint8))
    with pytest.raises(UsageError, match='has transparent pixels'):
        scene.read(clear)
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(UsageError, match=r'text\.png: is no BMP'):
        scene.read(tmp_path / 'text.png')


def test_a_scene_is_what_the_networks_take() -> None:
    made = scenes.make()
    x = made.tensor()
    assert x.shape == (1, 3, 40, 48)
    np.testing.assert_array_equal(x[0, :, 18, 21].numpy(), made.image[made.place])
