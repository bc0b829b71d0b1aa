"""Picture files of every format, depth and mode, made by other libraries; and all that can be wrong with them."""

import contextlib
import io
import os
import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import (
    COLOUR,
    GREY,
    HALF_CLEAR,
    HEIGHT,
    PIXELS,
    PNG,
    SRGB,
    WIDTH,
    chunk,
    damaged,
    encoded,
    exif,
    packed_grey,
    png,
    with_alpha,
    with_chunk,
)
from PIL import Image, ImageOps, TiffImagePlugin

from attnsr import pictures
from attnsr.pictures import Picture, PictureError, opening, reading
from attnsr.pictures.opening import exif_orientation

# What the module silences for its process, pytest would list anew for each test.
pytestmark = pytest.mark.filterwarnings(r'ignore::UserWarning:PIL\.')

AGAIN = 'copy or download it again'
DAMAGED = f'is truncated or damaged; {AGAIN}'
FEWER_BITS = 'has {} bits a channel; convert it to 8 or 16'
COLOURS = 'has {} colours, whose RGB depends on a profile; convert it to RGB'
SEVERAL = 'holds 2 images; save the one that is wanted as a file of its own'
NO_PICTURE = 'is no BMP, JPEG, PNG, TIFF or WebP image; save it as one of them'

# Transparency that varies; and all four modes of pixels, with values that use all bits.
ALPHA = (ROWS_AND_COLUMNS := np.add.outer(3 * np.arange(HEIGHT), 2 * np.arange(WIDTH)))[..., None].astype(np.uint8)
MODES = {
    1: np.asarray(GREY)[..., None],
    2: np.concatenate([np.asarray(GREY)[..., None], ALPHA], axis=2),
    3: PIXELS,
    4: np.concatenate([PIXELS, ALPHA], axis=2),
}
SIXTEEN = {
    channels: np.random.default_rng(channels).integers(0, 2**16, (HEIGHT, WIDTH, channels)).astype(np.uint16)
    for channels in MODES
}


def image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def png16(pixels: np.ndarray, *more: bytes) -> bytes:
    """A 16-bit PNG file made by hand: no library at hand writes grey with alpha."""
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(*more, chunk(b'IDAT', zlib.compress(rows)), bits=16, colour=colour, size=(width, height))


def by_opencv(suffix: str, pixels: np.ndarray, *parameters: int) -> bytes:
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    done, data = cv2.imencode(suffix, np.ascontiguousarray(pixels[..., order]), parameters)
    assert done
    return data.tobytes()


def by_tifffile(pixels: np.ndarray, planar: bool = False, **options: Any) -> bytes:
    """A TIFF file; 16 bits are compressed, and kept in tiles, by no other library at hand."""
    file = io.BytesIO()
    channels = pixels.shape[2]
    settings: dict[str, Any] = {'metadata': None, 'photometric': 'rgb' if channels > 2 else 'minisblack', **options}
    if channels % 2 == 0:
        settings.setdefault('extrasamples', ['unassalpha'])
    if channels > 1:
        settings['planarconfig'] = 'separate' if planar else 'contig'
        pixels = np.moveaxis(pixels, 2, 0) if planar else pixels
    else:
        pixels = pixels[..., 0]
    tifffile.imwrite(file, pixels, **settings)
    return file.getvalue()


def read(folder: Path, content: bytes, name: str = 'photo.png') -> Picture:
    path = folder / name
    path.write_bytes(content)
    picture = pictures.read(path)
    assert picture.pixels.flags.c_contiguous
    assert pictures.header(path) == picture.pixels.shape
    return picture


def problem(folder: Path, content: bytes) -> str:
    """What is said of a file; its header alone may be in order."""
    path = folder / 'photo.png'
    path.write_bytes(content)
    with pytest.raises(PictureError) as raised:
        pictures.read(path)
    start, text = str(raised.value).split(': ', 1)
    assert start == str(path)
    return text


# Format, content, and what is to be read of it: exactly.
EXACT: dict[str, tuple[str, bytes, np.ndarray]] = {
    **{f'png {n} 8': ('png', encoded(image(MODES[n])), MODES[n]) for n in MODES},
    **{f'png {n} 16': ('png', png16(SIXTEEN[n]), SIXTEEN[n]) for n in MODES},
    **{f'png {n} 16 opencv': ('png', by_opencv('.png', SIXTEEN[n]), SIXTEEN[n]) for n in (1, 3, 4)},
    **{
        f'png {bits} bits': ('png', png(packed_grey(bits), bits=bits, colour=0), (MODES[1] >> 8 - bits) * factor)
        for bits, factor in [(1, 255), (2, 85), (4, 17)]
    },
    'png opaque': ('png', encoded(with_alpha(COLOUR, 255)), np.dstack([PIXELS, np.full_like(ALPHA, 255)])),
    'png more behind': ('png', PNG + b'more', PIXELS),
    'jpeg grey': ('jpg', encoded(GREY, 'JPEG'), np.asarray(Image.open(io.BytesIO(encoded(GREY, 'JPEG'))))[..., None]),
    **{
        f'jpeg {name}': ('jpg', data, np.asarray(Image.open(io.BytesIO(data))))
        for name, data in [
            ('4:4:4', encoded(COLOUR, 'JPEG', subsampling='4:4:4')),
            ('4:2:0', encoded(COLOUR, 'JPEG')),
            ('progressive', encoded(COLOUR, 'JPEG', progressive=True)),
            ('with previews', encoded(COLOUR, 'MPO', save_all=True, append_images=[COLOUR.rotate(180)])),
            ('opencv', by_opencv('.jpg', PIXELS)),
        ]
    },
    'webp': ('webp', encoded(COLOUR, 'WEBP', lossless=True), PIXELS),
    'webp alpha': ('webp', encoded(image(MODES[4]), 'WEBP', lossless=True, exact=True), MODES[4]),
    'webp opencv': ('webp', by_opencv('.webp', PIXELS, cv2.IMWRITE_WEBP_QUALITY, 101), PIXELS),
    'bmp': ('bmp', encoded(COLOUR, 'BMP'), PIXELS),
    'bmp grey': ('bmp', encoded(GREY, 'BMP'), MODES[1]),
    'bmp alpha': ('bmp', by_opencv('.bmp', MODES[4]), MODES[4]),
    **{f'tiff {n} 8': ('tif', encoded(image(MODES[n]), 'TIFF'), MODES[n]) for n in MODES},
    **{f'tiff {n} 8 lzw': ('tif', encoded(image(MODES[n]), 'TIFF', compression='tiff_lzw'), MODES[n]) for n in MODES},
    **{f'tiff {n} 16 lzw': ('tif', by_opencv('.tif', SIXTEEN[n]), SIXTEEN[n]) for n in (1, 3, 4)},
    **{f'tiff {n} 16 big': ('tif', by_tifffile(SIXTEEN[n], bigtiff=True), SIXTEEN[n]) for n in MODES},
    **{
        f'tiff {n} 16 {order}{"separate" if planar else ""} {compression} {predictor} {tile}'.replace('None', ''): (
            'tif',
            by_tifffile(
                SIXTEEN[n],
                planar,
                byteorder=order,
                compression=compression,
                predictor=predictor,
                tile=tile,
                rowsperstrip=None if tile else 7,
            ),
            SIXTEEN[n],
        )
        for n, order, planar, (compression, predictor), tile in product(
            MODES, '<>', (False, True), [(None, None), ('zlib', None), ('zlib', True)], [None, (32, 16)]
        )
        if n > 1 or not planar
    },
    'tiff 8 separate': ('tif', by_tifffile(PIXELS, planar=True), PIXELS),
    'tiff 16 white is zero': ('tif', by_tifffile(65535 - SIXTEEN[1], photometric='miniswhite'), SIXTEEN[1]),
    'tiff 16 white is zero, alpha': (
        'tif',
        by_tifffile(np.dstack([65535 - SIXTEEN[2][..., 0], SIXTEEN[2][..., 1]]), photometric='miniswhite'),
        SIXTEEN[2],
    ),
    'tiff 16 other channel': ('tif', by_tifffile(SIXTEEN[4], extrasamples=['unspecified']), SIXTEEN[4][..., :3]),
    'tiff 1 bit': ('tif', encoded(GREY.convert('1'), 'TIFF'), np.asarray(GREY.convert('1').convert('L'))[..., None]),
}  # fmt: skip


@pytest.mark.parametrize('kind', EXACT)
def test_exact(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    name, content, expected = EXACT[kind]
    picture = read(tmp_path, content)
    assert picture.format == name
    assert picture.pixels.dtype == expected.dtype
    np.testing.assert_array_equal(picture.pixels, expected)
    assert capfd.readouterr() == ('', '')


def test_palettes(tmp_path: Path) -> None:
    few = COLOUR.quantize(16)
    for kind in ('PNG', 'BMP', 'TIFF'):
        np.testing.assert_array_equal(read(tmp_path, encoded(few, kind)).pixels, np.asarray(few.convert('RGB')), kind)
    for transparency in (3, bytes(range(0, 256, 16))):
        few.info['transparency'] = transparency
        expected = np.asarray(few.convert('RGBA'))
        assert len(np.unique(expected[..., 3])) > 1
        np.testing.assert_array_equal(read(tmp_path, encoded(few, transparency=transparency)).pixels, expected)
    opaque = read(tmp_path, encoded(few, transparency=b'\xff' * 16)).pixels
    np.testing.assert_array_equal(opaque, np.asarray(few.convert('RGB').convert('RGBA')))


def test_transparent_colours(tmp_path: Path) -> None:
    """They become alpha: of 8 and 16 bits, and of fewer, where levels are scaled."""
    colour = PIXELS[7, 9]
    pixels = read(tmp_path, encoded(COLOUR, transparency=tuple(colour.tolist()))).pixels
    np.testing.assert_array_equal(pixels, np.dstack([PIXELS, 255 * (colour != PIXELS).any(axis=2)]))
    for bits, factor in [(1, 255), (2, 85), (4, 17), (8, 1)]:
        level = MODES[1][7, 9, 0] >> (8 - bits)
        body = packed_grey(bits) if bits < 8 else chunk(b'IDAT', zlib.compress(np.insert(MODES[1][..., 0], 0, 0, 1)))
        content = png(chunk(b'tRNS', struct.pack('>H', level)), body, bits=bits, colour=0)
        levels = MODES[1] >> (8 - bits)
        np.testing.assert_array_equal(
            read(tmp_path, content).pixels, np.dstack([levels * factor, 255 * (levels != level)]), f'{bits} bits'
        )
    for channels in (1, 3):
        pixels = SIXTEEN[channels] | 1  # the low byte alone makes the difference
        pixels[7, 9] = pixels[5, 4] - 1
        content = png16(pixels, chunk(b'tRNS', pixels[7, 9].astype('>u2').tobytes()))
        expected = np.dstack([pixels, 65535 * (pixels != pixels[7, 9]).any(axis=2)])
        assert np.count_nonzero(expected[..., -1] == 0) == 1
        np.testing.assert_array_equal(read(tmp_path, content).pixels, expected)


def test_colours_multiplied_by_alpha(tmp_path: Path) -> None:
    """What was multiplied is divided again, up to half a level; what is transparent is black."""
    for channels, (most, dtype) in product((2, 4), [(255, np.uint8), (65535, np.uint16)]):
        if most == 255 and channels == 2 and (b'II', 1, (1,), 1, (8, 8), (1,)) not in TiffImagePlugin.OPEN_INFO:
            continue  # an older Pillow, which refuses such files
        straight = MODES[channels] if dtype is np.uint8 else SIXTEEN[channels]
        colours, alpha = straight[..., :-1].astype(np.float64), straight[..., -1:].astype(np.float64)
        multiplied = np.concatenate([np.rint(colours * alpha / most), alpha], axis=2).astype(dtype)
        pixels = read(tmp_path, by_tifffile(multiplied, extrasamples=['assocalpha'])).pixels
        np.testing.assert_array_equal(pixels[..., -1:], alpha)
        wrong = np.abs(pixels[..., :-1] - colours) * alpha / most  # as it would be seen
        assert wrong.max() <= 1
        assert (pixels[..., :-1][alpha[..., 0] == 0] == 0).all()


ORIENTATIONS = range(1, 9)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', ORIENTATIONS)
def test_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    options = {'tiffinfo': {0x0112: orientation}} if kind == 'TIFF' else {'exif': exif(orientation)}
    options |= {'lossless': True} if kind == 'WEBP' else {}
    content = encoded(COLOUR, kind, dpi=(100, 50), **options)
    picture = read(tmp_path, content)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(picture.pixels, np.asarray(expected))
    assert orientation == 1 or not np.array_equal(picture.pixels, np.asarray(Image.open(io.BytesIO(encoded(COLOUR)))))
    if kind != 'TIFF':
        assert picture.metadata.exif is not None
        assert exif_orientation(picture.metadata.exif) == 1
    if kind != 'WEBP':
        assert picture.metadata.resolution == pytest.approx((50, 100) if orientation > 4 else (100, 50), rel=1e-3)


@pytest.mark.parametrize('orientation', ORIENTATIONS)
def test_upright_with_16_bits(tmp_path: Path, orientation: int) -> None:
    """OpenCV does not turn them too."""
    eight = Image.fromarray(PIXELS)
    eight.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(eight)).astype(np.uint16) * 256 + 7
    pixels = PIXELS.astype(np.uint16) * 256 + 7
    for content in (
        png16(pixels, chunk(b'eXIf', exif(orientation).tobytes()[6:])),
        by_tifffile(pixels, extratags=[(0x0112, 3, 1, orientation, True)]),
    ):
        np.testing.assert_array_equal(read(tmp_path, content).pixels, expected)


def test_orientation_behind_the_pixels(tmp_path: Path) -> None:
    content = PNG[:-12] + chunk(b'eXIf', exif(6).tobytes()[6:]) + PNG[-12:]
    np.testing.assert_array_equal(read(tmp_path, content).pixels, np.rot90(PIXELS, -1))


def test_metadata(tmp_path: Path) -> None:
    data = exif(1)
    data[0x010F] = 'Maker'
    for kind in ('PNG', 'JPEG', 'WEBP', 'TIFF'):
        more = {} if kind == 'TIFF' else {'exif': data}
        metadata = read(tmp_path, encoded(COLOUR, kind, icc_profile=SRGB, dpi=(300, 150), **more)).metadata
        assert metadata.icc == SRGB, kind
        assert metadata.colour_space == 'RGB'
        if kind != 'WEBP':
            assert metadata.resolution == pytest.approx((300, 150), rel=1e-3), kind
        if kind != 'TIFF':
            assert metadata.exif is not None
            assert b'Maker' in metadata.exif, kind
    assert read(tmp_path, by_tifffile(SIXTEEN[3], iccprofile=SRGB)).metadata.icc == SRGB
    assert read(tmp_path, png16(SIXTEEN[3], chunk(b'iCCP', b'a\0\0' + zlib.compress(SRGB)))).metadata.icc == SRGB
    assert read(tmp_path, encoded(COLOUR)).metadata == pictures.Metadata()


def test_resolutions(tmp_path: Path) -> None:
    """In whatever unit, and from EXIF data where there is no other."""
    in_exif = exif(1)
    in_exif[0x011A], in_exif[0x011B], in_exif[0x0128] = 120.0, 60.0, 3
    jpeg = encoded(COLOUR, 'JPEG', dpi=(1, 1))
    density = jpeg.index(b'JFIF\0') + 7
    for content, expected in [
        (encoded(COLOUR, 'BMP', dpi=(300, 150)), (300, 150)),
        (encoded(COLOUR, 'WEBP', exif=in_exif), (304.8, 152.4)),
        (encoded(COLOUR, exif=in_exif), (304.8, 152.4)),
        (encoded(COLOUR, dpi=(72, 72), exif=in_exif), (72, 72)),
        (jpeg[:density] + struct.pack('>BHH', 2, 40, 20) + jpeg[density + 5 :], (101.6, 50.8)),
        (jpeg[:density] + struct.pack('>BHH', 0, 4, 3) + jpeg[density + 5 :], None),  # a ratio only
        (jpeg[:density] + struct.pack('>BHH', 1, 0, 0) + jpeg[density + 5 :], None),
        (with_chunk(b'pHYs', struct.pack('>IIB', 4, 3, 0)), None),
        (by_tifffile(SIXTEEN[1], resolution=(100, 50), resolutionunit=3), (254, 127)),
        (by_tifffile(SIXTEEN[1], resolution=(100, 50), resolutionunit=1), None),
    ]:
        found = read(tmp_path, content).metadata.resolution
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_colours_of_png_files(tmp_path: Path) -> None:
    chunks = {
        b'cICP': bytes([9, 16, 0, 1]),
        b'sRGB': b'\0',
        b'gAMA': struct.pack('>I', 45455),
        b'cHRM': bytes(range(32)),
    }
    content = PNG
    for kind, body in reversed(chunks.items()):
        content = with_chunk(kind, body, content)
    assert read(tmp_path, content).metadata.png_colour == tuple(chunks.items())


BAD = {
    'empty': (b'', f'is empty; {AGAIN}'),
    'text': (b'<html>404 Not Found</html>', NO_PICTURE),
    'gif': (encoded(COLOUR, 'GIF'), NO_PICTURE),
    'ppm': (encoded(COLOUR, 'PPM'), NO_PICTURE),
    'png animation': (encoded(COLOUR, save_all=True, append_images=[COLOUR.rotate(180)]), SEVERAL),
    'webp animation': (encoded(COLOUR, 'WEBP', save_all=True, append_images=[COLOUR.rotate(180)]), SEVERAL),
    'tiff pages': (encoded(COLOUR, 'TIFF', save_all=True, append_images=[GREY]), SEVERAL),
    'tiff 16-bit pages': (
        (lambda file: [tifffile.imwrite(file, np.stack([SIXTEEN[3]] * 2), photometric='rgb', metadata=None), file])(
            io.BytesIO()
        )[1].getvalue(),
        SEVERAL,
    ),
    'jpeg cmyk': (encoded(COLOUR.convert('CMYK'), 'JPEG'), COLOURS.format('CMYK')),
    'tiff cmyk': (encoded(COLOUR.convert('CMYK'), 'TIFF'), COLOURS.format('CMYK')),
    'tiff 16-bit cmyk': (by_tifffile(SIXTEEN[4], photometric='separated', extrasamples=[]), COLOURS.format('CMYK')),
    'tiff lab': (encoded(Image.new('LAB', (9, 9)), 'TIFF'), COLOURS.format('LAB')),
    'tiff float': (by_tifffile(PIXELS.astype(np.float32)), FEWER_BITS.format(32)),
    'tiff 32-bit': (by_tifffile(PIXELS.astype(np.uint32)), FEWER_BITS.format(32)),
    'tiff half': (
        by_tifffile(PIXELS.astype(np.float16)),
        'has signed or floating-point numbers; convert it to 8 or 16 bits a channel',
    ),
    'tiff signed': (
        by_tifffile(SIXTEEN[1].astype(np.int16)),
        'has signed or floating-point numbers; convert it to 8 or 16 bits a channel',
    ),
    'png half the pixels': (
        png(chunk(b'IDAT', zlib.compress(np.insert(PIXELS.reshape(HEIGHT, -1), 0, 0, 1).tobytes())[:-999])),
        DAMAGED,
    ),
    'png 16-bit half the pixels': (png16(SIXTEEN[3][:9]).replace(struct.pack('>I', 9), struct.pack('>I', 41), 1), None),
    'png damaged': (damaged(PNG, 999), DAMAGED),
    'png 16-bit damaged': (damaged(png16(SIXTEEN[3]), 999), DAMAGED),
    'jpeg partly downloaded': ((jpeg := encoded(COLOUR, 'JPEG', quality=95))[:-999].ljust(len(jpeg), b'\0'), DAMAGED),
}


@pytest.mark.parametrize('kind', BAD)
def test_refused(tmp_path: Path, kind: str) -> None:
    content, expected = BAD[kind]
    found = problem(tmp_path, content)
    assert found == expected or (expected is None and AGAIN in found)


WHOLE = {
    'png': PNG,
    'png 16': png16(SIXTEEN[3]),
    'jpeg': encoded(COLOUR, 'JPEG', quality=95),
    'webp': encoded(COLOUR, 'WEBP', quality=95),
    'webp alpha': encoded(HALF_CLEAR, 'WEBP', lossless=True),
    'bmp': encoded(COLOUR, 'BMP'),
    'tiff': encoded(COLOUR, 'TIFF'),
    'tiff 16': by_tifffile(SIXTEEN[3]),
    'tiff 16 deflated': by_tifffile(SIXTEEN[3], compression='zlib'),
    'tiff 16 lzw': by_opencv('.tif', SIXTEEN[3]),
}


@pytest.mark.parametrize('kind', WHOLE)
def test_truncated(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]
    assert read(tmp_path, content)
    for length in [1, 2, 5, 9, 20, 40, *np.linspace(60, len(content) - 5, 12, dtype=int)]:
        found = problem(tmp_path, content[:length])
        assert AGAIN in found or found == NO_PICTURE, length


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_damaged_anyhow(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """A file of which bytes are others is read, or refused in words."""
    content = bytearray(WHOLE[kind])
    places = st.integers(0, 120) | st.integers(max(0, len(content) - 300), len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / 'damaged.png'
    path.write_bytes(content)
    for function in (pictures.read, pictures.header):
        with contextlib.suppress(PictureError):
            function(path)


def test_enormous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that promises more than memory holds ends in words, before anything is decoded."""
    pixels, wide = chunk(b'IDAT', zlib.compress(b'')), (MODES[3], SIXTEEN[3])
    for content in (
        png(pixels, size=(1_000_000, 1_000_000)),
        png(pixels, size=(1_000_000, 1_000_000), bits=16),
        *(by_tifffile(pixels).replace(struct.pack('<I', WIDTH), struct.pack('<I', 2**30)) for pixels in wide),
    ):
        found = problem(tmp_path, content)
        assert ' pixels wide and ' in found
        assert 'GiB of memory' in found
        assert found.endswith('cut it into parts')
        with pytest.raises(PictureError, match='GiB of memory'):
            pictures.header(tmp_path / 'photo.png')
    monkeypatch.setattr(reading, 'free_memory', lambda device: 10_000)
    found = problem(tmp_path, PNG)
    assert found.startswith('is 58 pixels wide and 41 high; reading it takes 0.0 GiB of memory, and 0.0 are free')


def test_no_memory_while_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, '_upright', fail)
    assert problem(tmp_path, PNG).endswith('cut it into parts')


def test_larger_than_pillow_would_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for kind, content in WHOLE.items():
        read(tmp_path, content)
        assert Image.MAX_IMAGE_PIXELS == 100, kind
    assert not recwarn


def test_limit_of_pillow_is_back_after_the_last_user() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with opening.without_size_limit():
        with opening.without_size_limit():
            assert Image.MAX_IMAGE_PIXELS is None
        assert Image.MAX_IMAGE_PIXELS is None
    assert limit == Image.MAX_IMAGE_PIXELS
    assert limit is not None


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'link.png').symlink_to('nowhere.png')
    os.mkfifo(tmp_path / 'pipe.png')
    for name, expected in [
        ('folder.png', 'is a folder with the name of an image file; rename it, or move it away'),
        ('link.png', 'is a link to a file that is not there; mend or remove it'),
        ('pipe.png', 'is not a regular file; move it away'),
        ('none.png', 'cannot be read: No such file or directory; make it readable, or move it away'),
    ]:
        for function in (pictures.read, pictures.header):
            with pytest.raises(PictureError) as raised:
                function(tmp_path / name)
            assert str(raised.value) == f'{tmp_path}/{name}: {expected}'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every file')
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / 'secret.png'
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(PictureError, match=r'secret\.png: cannot be read: Permission denied; make it readable'):
        pictures.read(path)
