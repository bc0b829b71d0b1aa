"""``attnsr.Upscaler`` and ``attnsr.load``: every kind of image, whole and in tiles, in whatever memory there is."""

import doctest
import io
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import skimage.data
import torch
import util
import yaml
from PIL import Image

import attnsr
from attnsr import Upscaler, upscaler
from attnsr.data_prep.matlab_resize import imresize
from attnsr.errors import UsageError
from attnsr.tiling import Axis, Cut

#: (96, 120, 3) uint8.
PHOTOGRAPH = skimage.data.chelsea()[90:186, 130:250]


@pytest.fixture(scope='module')
def upscale() -> Upscaler:
    return Upscaler(networks.build('ASID', upscale=2), device='cpu')


def expected(upscale: Upscaler, image: np.ndarray) -> np.ndarray:
    """What the network makes of an RGB image in [0, 1], float64 in [0, 1]."""
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float()
    with torch.no_grad():
        return upscale.net(x).clamp(0, 1)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize(
    ('dtype', 'largest', 'error'),
    [('uint8', 255, 0.501), ('uint16', 65535, 0.51), ('float16', 1, 5e-4), ('float32', 1, 0), ('float64', 1, 0)],
)
def test_arrays_of_every_dtype(upscale: Upscaler, dtype: str, largest: int, error: float) -> None:
    image = (PHOTOGRAPH / 255 * largest).astype(dtype)
    result = upscale(image)
    assert (result.shape, result.dtype) == ((192, 240, 3), image.dtype)
    wanted = expected(upscale, image.astype(np.float32) / np.float32(largest)) * largest
    assert np.abs(result - wanted).max() <= error


def test_the_same_image_in_every_form_is_the_same_result(upscale: Upscaler) -> None:
    array = upscale(PHOTOGRAPH)
    tensor = torch.from_numpy(PHOTOGRAPH.transpose(2, 0, 1).copy())
    assert np.array_equal(np.asarray(upscale(Image.fromarray(PHOTOGRAPH))), array)
    assert np.array_equal(upscale(tensor).permute(1, 2, 0).numpy(), array)
    both = upscale(torch.stack((tensor, tensor.flip(2))))
    assert both.dtype == torch.uint8
    assert np.abs(both[0].permute(1, 2, 0).numpy().astype(int) - array).max() <= 1  # products of other sizes
    floating = upscale(tensor[None].double() / 255)
    assert (floating.shape, floating.dtype) == ((1, 3, 192, 240), torch.float64)
    assert np.array_equal((floating[0] * 255).round().permute(1, 2, 0).numpy(), array)
    backwards = upscale(PHOTOGRAPH[::-1, :, ::-1][::-1, :, ::-1])  # a view of negative strides
    assert np.array_equal(backwards, array)


def test_grey_is_the_mean_of_grey_rgb(upscale: Upscaler) -> None:
    grey = PHOTOGRAPH[..., 1]
    with torch.no_grad():
        rgb = upscale.net(torch.from_numpy(grey / 255).float().expand(1, 3, -1, -1))
    wanted = (255 * rgb.mean(1)[0].clamp(0, 1)).numpy()
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        assert np.abs(np.asarray(upscale(image)).reshape(192, 240) - wanted).max() < 0.501
    deep = upscale(Image.fromarray(grey.astype(np.uint16) * 257))
    assert deep.mode == 'I;16'
    assert np.abs(np.asarray(deep) / 257 - wanted).max() < 0.51


@pytest.mark.parametrize(
    ('mode', 'given'),
    [('1', 'L'), ('L', 'L'), ('LA', 'LA'), ('P', 'RGB'), ('PA', 'RGBA'), ('RGB', 'RGB'), ('RGBA', 'RGBA')],
)
def test_pil_images_of_every_mode(upscale: Upscaler, mode: str, given: str) -> None:
    image = Image.fromarray(PHOTOGRAPH).convert('LA').convert(mode) if mode == 'PA' else None
    image = image or Image.fromarray(PHOTOGRAPH).convert(mode)
    image.info.update(dpi=(300, 200), icc_profile=b'profile', comment=b'of the small one')
    result = upscale(image)
    assert (result.mode, result.size) == (given, (240, 192))
    assert result.info == {'dpi': (300, 200), 'icc_profile': b'profile'}
    assert result.tobytes() == upscale(image.convert(given)).tobytes()


def test_pil_images_are_turned_upright_and_transparent_colours_become_alpha(upscale: Upscaler) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(buffer, 'PNG', exif=exif)
    turned = upscale(Image.open(buffer))
    assert np.array_equal(np.asarray(turned), upscale(np.rot90(PHOTOGRAPH, -1)))
    assert 0x0112 not in turned.getexif()
    buffer = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(buffer, 'PNG', transparency=tuple(map(int, PHOTOGRAPH[5, 5])))
    assert upscale(Image.open(buffer)).mode == 'RGBA'


def test_a_palette_with_a_transparent_entry_has_alpha(upscale: Upscaler) -> None:
    image = Image.new('P', (20, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (10, 0, 20, 10))
    image.info['transparency'] = 0
    result = np.asarray(upscale(image))
    assert result.shape == (20, 40, 4)
    assert (result[:, :12, 3] == 255).all()
    assert (result[:, 28:, 3] == 0).all()


def test_transparent_pixels_have_no_influence_and_leave_no_fringe() -> None:
    """A red disc whose surroundings are transparent green: no green is seen, on any background."""
    upscale = Upscaler(networks.build('ELAN', upscale=2), device='cpu')
    y, x = np.mgrid[:64, :80]
    inside = (y - 32) ** 2 + (x - 40) ** 2 < 400
    disc = np.zeros((64, 80, 4), np.uint8)
    disc[..., 1] = 255
    disc[inside] = (255, 0, 0, 255)
    other = disc.copy()
    other[~inside] = (1, 2, 3, 0)
    result = upscale(disc)
    assert np.array_equal(result, upscale(other))
    plain = upscale(np.full((64, 80, 3), (255, 0, 0), np.uint8)).astype(int)
    seen = result[..., 3] > 0
    assert np.abs(result[seen][:, :3].astype(int) - plain[seen]).max() <= 1
    # Far from the edge alpha is as it was, and it goes from one to the other without ringing.
    rows = (result[..., 3] > 127).sum(1)
    assert abs(rows.max() - 80) <= 4
    assert (result[60:68, 60:100, 3] == 255).all()
    assert (result[:16, :, 3] == 0).all()


def test_wholly_transparent_and_wholly_opaque_images(upscale: Upscaler) -> None:
    for alpha in (0, 77, 255):
        image = np.dstack((PHOTOGRAPH, np.full(PHOTOGRAPH.shape[:2], alpha, np.uint8)))
        result = upscale(image)
        assert (result[..., 3] == alpha).all()
        assert np.array_equal(result[..., :3], upscale(PHOTOGRAPH))


@pytest.mark.parametrize('scale', [1, 1.5, 3, Fraction(27, 10), 0.5])
def test_other_scales_resize_what_the_network_gives(upscale: Upscaler, scale: Any) -> None:
    x = torch.from_numpy(PHOTOGRAPH.transpose(2, 0, 1)[None] / 255).float()
    other = Upscaler(upscale.net, scale=scale, device='cpu', tile=None)
    with torch.no_grad():
        wanted = imresize(upscale.net(x), Fraction(scale) / 2)
    assert torch.equal(other.tensor(x), wanted)
    assert other(PHOTOGRAPH).shape[:2] == other.size(96, 120) == tuple(wanted.shape[2:])


#: Of networks without training, in grey levels of 8 bits; docs/upscaling.md has those of trained ones.
SEAMS = {'ELAN': 0.3, 'DLGSANet': 10.0, 'ASID': 1.0, 'LCoAN': 0.1}


@pytest.mark.parametrize('name', list(networks.SMALL))
def test_seams_are_bounded(name: str) -> None:
    """No row or column of pixels differs from its neighbour by more than it does in the whole picture, but for this."""
    x = torch.from_numpy(PHOTOGRAPH.transpose(2, 0, 1)[None] / 255).float()
    net = networks.build(name, upscale=2)
    whole, tiled = (255 * Upscaler(net, device='cpu', tile=tile).tensor(x) for tile in (None, 64))
    d = tiled - whole
    assert d.abs().max() > 0  # tiles there are
    seam = max(float(d.diff(dim=dim).mean(5 - dim).abs().max()) for dim in (2, 3))
    assert seam < SEAMS[name]


def test_bands_are_the_image_from_top_to_bottom() -> None:
    upscale = Upscaler(networks.build('ELAN', upscale=2), device='cpu', tile=64, overlap=16)
    told: list[int] = []
    bands = list(upscale.bands(PHOTOGRAPH, told.append))
    assert len(bands) == 2
    assert np.array_equal(np.concatenate(bands), upscale(PHOTOGRAPH))
    assert sum(told) == 192 * 240
    assert len(told) == 2 * 3


class Hungry(networks.archs.ASID):
    """Has no memory for more than so many pixels."""

    most = 70 * 70

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] * x.shape[3] > self.most:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return super().reconstruct(x)


@pytest.fixture
def hungry() -> Hungry:
    net = Hungry(upscale=2, **networks.SMALL['ASID'])
    net.load_state_dict(networks.build('ASID', upscale=2).state_dict())
    return net


def test_out_of_memory_halves_the_tile_and_says_so(hungry: Hungry, caplog: pytest.LogCaptureFixture) -> None:
    upscale = Upscaler(hungry, device='cpu')
    with caplog.at_level(logging.WARNING, 'attnsr'):
        result = upscale(PHOTOGRAPH)
        again = upscale(PHOTOGRAPH[::-1])
    assert [record.getMessage() for record in caplog.records] == [
        'out of memory with a tile of 120 x 120 pixels; going on with tiles of 64'
    ]
    assert np.array_equal(result, Upscaler(hungry, device='cpu', tile=64)(PHOTOGRAPH))
    assert again.shape == result.shape


def test_out_of_memory_where_nothing_can_be_halved(hungry: Hungry) -> None:
    with pytest.raises(UsageError, match='out of memory with a tile of 96 x 96 pixels; choose a smaller one, or auto'):
        Upscaler(hungry, device='cpu', tile=96)(PHOTOGRAPH)
    hungry.most = 1000
    with pytest.raises(UsageError, match='out of memory even with a tile of 64 x 64 pixels; close other programs'):
        Upscaler(hungry, device='cpu')(PHOTOGRAPH)


def test_out_of_memory_while_tiles_are_put_together(
    upscale: Upscaler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resized(self: Axis, y: torch.Tensor, dim: int, cut: Cut) -> torch.Tensor:
        if cut.extent > 64:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return original(self, y, dim, cut)

    original = Axis.resized
    monkeypatch.setattr(Axis, 'resized', resized)
    with caplog.at_level(logging.WARNING, 'attnsr'):
        result = Upscaler(upscale.net, device='cpu')(PHOTOGRAPH)
    assert [record.getMessage() for record in caplog.records] == [
        'out of memory with a tile of 120 x 120 pixels; going on with tiles of 64'
    ]
    assert np.array_equal(result, Upscaler(upscale.net, device='cpu', tile=64)(PHOTOGRAPH))


def test_out_of_memory_later_goes_on_from_the_rows_that_are_done(
    upscale: Upscaler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Axis.resized

    def resized(self: Axis, y: torch.Tensor, dim: int, cut: Cut) -> torch.Tensor:
        if cut.extent > 64 and cut.start > 0:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return original(self, y, dim, cut)

    image = np.tile(PHOTOGRAPH, (3, 1, 1))
    monkeypatch.setattr(Axis, 'resized', resized)
    monkeypatch.setattr(Upscaler, '_affordable', lambda *_: 120)
    told: list[int] = []
    with caplog.at_level(logging.WARNING, 'attnsr'):
        bands = list(Upscaler(upscale.net, device='cpu').bands(image, told.append))
    result = np.concatenate(bands)
    assert len(caplog.records) == 1
    assert result.shape == (576, 240, 3)
    assert sum(told) == 576 * 240
    monkeypatch.undo()
    first = len(bands[0])
    large, small = (Upscaler(upscale.net, device='cpu', tile=tile)(image) for tile in (120, 64))
    assert np.array_equal(result[:first], large[:first])
    assert np.array_equal(result[first:], small[first:])


def test_values_that_are_no_numbers_are_an_error(upscale: Upscaler) -> None:
    class Overflowing(networks.archs.ASID):
        def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
            return super().reconstruct(x) * float('inf')

    for dtype, advice in (('float16', 'choose float32'), ('float32', 'look at the weights')):
        net = Overflowing(upscale=2, **networks.SMALL['ASID'])
        with pytest.raises(UsageError, match=f'in {dtype} the network gives values that are no numbers; {advice}'):
            Upscaler(net, device='cpu', dtype=dtype)(PHOTOGRAPH)


def test_other_errors_of_a_network_are_not_taken_for_too_little_memory(upscale: Upscaler) -> None:
    class Broken(networks.archs.ASID):
        def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError('CUDA error: an illegal memory access was encountered')

    with pytest.raises(RuntimeError, match='illegal memory access'):
        Upscaler(Broken(upscale=2, **networks.SMALL['ASID']), device='cpu')(PHOTOGRAPH)


# What a process takes beyond 150 MB is refused by the system, and the free memory that it is told of is not there.
REALLY_OUT_OF_MEMORY = """
import logging, resource, sys
sys.path.insert(0, sys.argv[1])
import networks, numpy as np, torch
from attnsr import Upscaler

logging.basicConfig(format='%(message)s', stream=sys.stdout)
upscale = Upscaler(networks.build('ASID', upscale=2), device='cpu')
upscale(np.zeros((64, 64, 3), np.uint8))
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)
image = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
print(upscale(image).shape)
"""


def test_memory_that_really_runs_out_on_the_cpu(tmp_path: Path) -> None:
    told = util.run('-c', REALLY_OUT_OF_MEMORY, Path(__file__).parent, cwd=tmp_path).stdout.splitlines()
    assert told[-1] == '(1000, 800, 3)'
    assert len(told) > 1
    assert all(re.fullmatch(r'out of memory with a tile of .*; going on with tiles of \d+', line) for line in told[:-1])


def test_the_tile_follows_from_the_memory_that_is_free(upscale: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {}
    for free in (2**22, 2**28, 2**30, 2**36):
        monkeypatch.setattr(upscaler, 'free_memory', lambda device, free=free: free)
        tiles[free] = upscale._affordable(1, 3, 3000, 4000)
    assert tiles[2**22] == upscaler.LEAST_TILE
    assert upscaler.LEAST_TILE < tiles[2**28] < tiles[2**30] <= upscaler.LARGEST_TILE
    assert tiles[2**36] is None


def test_several_threads_at_once(upscale: Upscaler) -> None:
    images = [np.roll(PHOTOGRAPH, 7 * number, 1) for number in range(8)]
    alone = [upscale(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(upscale, images))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ('image', 'error', 'message'),
    [
        (np.zeros((4, 4, 5), np.uint8), ValueError, r'must be \(H, W\) or \(H, W, C\) with C from 1 to 4'),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r'\(0, 4, 3\)'),
        (np.zeros((4, 4, 3), np.int32), TypeError, 'uint8, uint16 or floating point, got int32'),
        (np.full((4, 4, 3), 255.0), ValueError, r'must be in \[0, 1\], got values from 255 to 255'),
        (np.full((4, 4, 3), np.nan), ValueError, r'must be in \[0, 1\], got values from nan to nan'),
        (torch.zeros(3, 4), ValueError, r'must be \(C, H, W\) or \(B, C, H, W\)'),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, 'uint8 or floating point, got torch.int64'),
        (torch.full((3, 4, 4), 17.0), ValueError, r'must be in \[0, 1\], got values from 17 to 17'),
        (Image.new('CMYK', (4, 4)), ValueError, 'of mode 1, L, LA, I;16, P, PA, RGB, RGBA, got CMYK'),
        ('photo.png', TypeError, 'a NumPy array, a PIL image or a torch tensor, not str'),
    ],
    ids=lambda value: re.sub(r'\W+', '_', str(getattr(value, 'shape', value)))[:20],
)
def test_what_is_no_image(upscale: Upscaler, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upscale(image)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'scale': float('nan')}, 'scale must be from 1/16 to 64, got nan'),
        ({'scale': float('inf')}, 'scale must be from 1/16 to 64, got inf'),
        ({'tile': 30}, "tile must be 'auto', None for whole pictures, or at least 64 pixels, got 30"),
        ({'tile': 'small'}, "tile must be 'auto', None for whole pictures, or at least 64 pixels, got 'small'"),
        ({'tile': 64, 'overlap': 33}, 'overlap must be at most half of the tile: of 64 pixels 32, got 40'),
        ({'overlap': -1}, 'overlap must be at least 0 pixels, got -1'),
        ({'scale': 0}, 'scale must be from 1/16 to 64, got 0'),
        ({'dtype': 'float8'}, 'dtype must be one of auto, float32, bfloat16, float16, got float8'),
        ({'device': 'tpu'}, 'device tpu; valid here: auto, cpu'),
        pytest.param(
            {'device': 'cuda'},
            'device cuda: this PyTorch finds no CUDA device; valid here: auto, cpu',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device'),
        ),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Upscaler(networks.build('ASID', upscale=2), **settings)


def test_half_precision_stays_near_float32() -> None:
    for dtype, bound in (('bfloat16', 0.03), ('float16', 0.004)):
        for name in networks.SMALL:
            torch.manual_seed(0)
            x = torch.rand(1, 3, 40, 56)
            exact = Upscaler(networks.build(name, upscale=2), device='cpu').tensor(x)
            half = Upscaler(networks.build(name, upscale=2), device='cpu', dtype=dtype).tensor(x)
            assert (half - exact).norm() / exact.norm() < bound, (name, dtype)


def test_load_takes_files_and_trainings(
    trained: util.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.folder)
    image = PHOTOGRAPH[:16, :16]
    options = yaml.safe_load(next(trained.experiment.glob('*.yml')).read_text())['network_g']
    net = getattr(attnsr.archs, options.pop('type'))(**options)
    state = torch.load(trained.experiment / 'models' / 'net_g_latest.pth', weights_only=True)
    net.load_state_dict(state['params_ema'])
    wanted = Upscaler(net, device='cpu')(image)
    for name in (trained.experiment, 'tiny', trained.experiment / 'models' / 'net_g_latest.pth'):
        assert np.array_equal(attnsr.load(name, device='cpu')(image), wanted), name
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'experiments' / 'ASID_x2' / 'models').mkdir(parents=True)
    net = networks.archs.ASID(upscale=2)
    torch.save({'params': net.state_dict()}, tmp_path / 'experiments' / 'ASID_x2' / 'models' / 'net_g_5.pth')
    assert np.array_equal(attnsr.load('asid_x2', device='cpu')(image), Upscaler(net, device='cpu')(image))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'asid_x2',
            'asid_x2: there is no training of this name in ./experiments (ASID_x2); `basicsr train -opt asid_x2',
        ),
        (
            'mine.yml',
            'mine.yml: there is no training of this name in ./experiments (mine); `basicsr train -opt mine.yml',
        ),
        ('other/empty', 'other/empty: there is no such file, and no such training in ./experiments'),
        ('nothing.pth', 'nothing.pth: there is no such file, and no such training in ./experiments'),
        ('empty', 'empty: holds no checkpoint (models/net_g_*.pth); name a file, or train first'),
        ('text.pth', 'text.pth: this file is torn'),
    ],
)
def test_load_says_what_is_missing(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'experiments' / 'empty').mkdir(parents=True)
    (tmp_path / 'mine.yml').write_text('name: mine\n')
    (tmp_path / 'text.pth').write_text('no tensors')
    with pytest.raises(UsageError, match=re.escape(message)):
        attnsr.load(name)


def test_the_examples_in_docstrings_are_right() -> None:
    assert doctest.testmod(upscaler).failed == 0
    assert doctest.testmod(upscaler).attempted >= 6
