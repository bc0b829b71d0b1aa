"""Picture files that are written: read by other libraries, in whatever pieces they come, and never half."""

import errno
import io
import os
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import util
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import SRGB, chunks
from PIL import Image

from attnsr import pictures
from attnsr.pictures import FORMATS, Metadata, Picture, PictureError, PictureWriter, bmp, jpeg, png, tiff, webp

HEIGHT, WIDTH = 83, 61
SUFFIXES = {key: form.suffixes[0] for key, form in FORMATS.items()}

# Grey with alpha, RGB and so on: smooth as photographs with noise, so that all filters have their turns.
WAVES = 120 + 100 * np.sin(np.add.outer(np.arange(HEIGHT) / 9, np.arange(WIDTH) / 5))[..., None] * [1, 0.9, 0.5, 0.7]
NOISE = np.random.default_rng(0).normal(0, 1, (HEIGHT, WIDTH, 4)) * np.linspace(0, 15, HEIGHT)[:, None, None]
PHOTO = (WAVES + NOISE).clip(0, 255)


def photo(channels: int, dtype: type = np.uint8) -> np.ndarray:
    return np.ascontiguousarray((PHOTO[..., :channels] * (257 if dtype is np.uint16 else 1)).astype(dtype))


def make_blocks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, 'BLOCK_BYTES', 1500)
    monkeypatch.setattr(png, 'GROUP_BYTES', 500)
    monkeypatch.setattr(tiff, 'STRIP_SIZE', 1500)
    monkeypatch.setattr(bmp, 'BLOCK_BYTES', 1500)
    monkeypatch.setattr(jpeg, 'BAND_BYTES', 1500)
    monkeypatch.setattr(webp, 'BLOCK_BYTES', 1500)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that small pictures have many."""
    make_blocks_small(monkeypatch)


def by_opencv(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]]


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def by_tifffile(path: Path) -> np.ndarray:
    pixels = tifffile.imread(path)
    return pixels.reshape(*pixels.shape[:2], -1)


def lossless(key: str) -> int | None:
    return webp.LOSSLESS if key == 'webp' else None


EXACT = [
    (key, channels, dtype)
    for key, channels, dtype in product(('png', 'tif', 'bmp', 'webp'), (1, 2, 3, 4), (np.uint8, np.uint16))
    if (8 * np.dtype(dtype).itemsize in FORMATS[key].depths)
    and (channels > 2 or FORMATS[key].grey)
    and not (key == 'bmp' and channels == 2)
]


@pytest.mark.parametrize(('key', 'channels', 'dtype'), EXACT)
@pytest.mark.usefixtures('small_blocks')
def test_other_libraries_read_what_was_written(tmp_path: Path, key: str, channels: int, dtype: type) -> None:
    path, pixels = tmp_path / f'x{SUFFIXES[key]}', photo(channels, dtype)
    pictures.write(path, pixels, quality=lossless(key))
    readers = [by_opencv]
    if dtype is np.uint8:
        readers.append(by_pillow)
    if key == 'tif':
        readers.append(by_tifffile)
    # OpenCV makes RGB of PNG files with grey and alpha, reads no such TIFF files, and multiplies 8 bits by alpha there.
    if channels == 2 or (key == 'tif' and pixels.shape[2:] == (4,) and dtype is np.uint8):
        readers.remove(by_opencv)
        if key == 'png':
            np.testing.assert_array_equal(by_opencv(path)[..., [0, 3]], pixels)
    for reader in readers:
        found = reader(path)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, pixels, reader.__name__)
    picture = pictures.read(path)
    assert picture.format == key
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.usefixtures('small_blocks')
def test_a_jpeg_file_in_bands_has_the_pixels_of_one_in_one_go(tmp_path: Path, channels: int) -> None:
    path, pixels = tmp_path / 'x.jpg', photo(channels)
    pixels = np.tile(pixels, (3, 1, 1))  # more bands than there are restart markers
    pictures.write(path, pixels, quality=90)
    assert path.read_bytes().count(b'\xff\xd0') > 1
    whole = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(
        whole, 'JPEG', quality=90, subsampling='4:4:4', icc_profile=None
    )
    expected = np.asarray(Image.open(whole)).reshape(pixels.shape)
    np.testing.assert_array_equal(by_pillow(path), expected)
    np.testing.assert_array_equal(pictures.read(path).pixels, expected)
    assert np.abs(by_opencv(path).astype(int) - expected).max() <= 1  # it may bring libjpeg's other decoder along


def test_a_jpeg_file_of_the_greatest_width(tmp_path: Path) -> None:
    """A band has as many blocks of pixels as may lie between two markers, and no more."""
    pixels = np.zeros((80, 65_500, 1), np.uint8)
    pixels[::3, ::5] = 200
    pictures.write(tmp_path / 'x.jpg', pixels)
    whole = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(whole, 'JPEG', quality=95)
    np.testing.assert_array_equal(by_pillow(tmp_path / 'x.jpg')[..., 0], np.asarray(Image.open(whole)))


def test_a_small_jpeg_file_is_pillows(tmp_path: Path) -> None:
    pixels, expected = photo(3), io.BytesIO()
    pictures.write(tmp_path / 'x.jpg', pixels, Metadata(SRGB, (300, 300)))
    Image.fromarray(pixels).save(expected, 'JPEG', quality=95, subsampling='4:4:4', icc_profile=SRGB, dpi=(300, 300))
    assert (tmp_path / 'x.jpg').read_bytes() == expected.getvalue()


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(sorted(FORMATS)),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    workers=st.integers(1, 4),
)
def test_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    key: str,
    height: int,
    width: int,
    channels: int,
    dtype: type,
    cuts: list[int],
    workers: int,
) -> None:
    """Any sizes; the bytes are the same whatever rows come at once and however many threads there are."""
    folder = tmp_path_factory.getbasetemp()
    pixels = np.resize(photo(channels, dtype), (height, width, channels))
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        pictures.write(folder / 'whole', pixels, format=key, quality=lossless(key))
        with PictureWriter(
            folder / 'pieces', key, height, width, channels, dtype, None, lossless(key), workers=workers
        ) as writer:
            for piece in np.split(pixels, sorted(min(cut, height) for cut in cuts)):
                writer.write(piece)
    assert (folder / 'whole').read_bytes() == (folder / 'pieces').read_bytes()
    picture = pictures.read(folder / 'whole')
    assert picture.pixels.shape[:2] == (height, width)
    if (key, channels, dtype) in EXACT:
        np.testing.assert_array_equal(picture.pixels, pixels)


@pytest.mark.usefixtures('small_blocks')
def test_png_files_are_valid_throughout(tmp_path: Path) -> None:
    """Checksums that not all programs look at; every filter in use; runs and repetitions."""
    path = tmp_path / 'x.png'
    text = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    text[np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.1] = 255
    for pixels in (photo(3), photo(4, np.uint16), text):
        pictures.write(path, pixels, Metadata(SRGB, (300, 300)))
        content = path.read_bytes()
        data = b''.join(body for kind, body in chunks(content) if kind == b'IDAT')
        lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(HEIGHT, -1)  # compares the checksum
        assert lines.shape[1] == 1 + pixels[0].nbytes
        assert pixels is text or set(lines[:, 0]) >= {1, 2, 3, 4}
        if shutil.which('pngcheck'):
            subprocess.run(['pngcheck', '-q', path], check=True)


def test_the_nearest_of_three_neighbours() -> None:
    """The filter without differences of more than 8 bits, against its definition."""
    levels = np.array([0, 1, 2, 3, 100, 127, 128, 129, 200, 254, 255], np.uint8)
    left, up, corner = (axis.reshape(1, -1) for axis in np.meshgrid(levels, levels, levels))
    a, b, c = (axis.astype(int) for axis in (left, up, corner))
    to_left, to_up, to_corner = (np.abs(a + b - c - near) for near in (a, b, c))
    nearest = np.where((to_left <= to_up) & (to_left <= to_corner), a, np.where(to_up <= to_corner, b, c))
    np.testing.assert_array_equal(png._paeth(left, up, corner), nearest)
    np.testing.assert_array_equal(png._average(left, up), (a + b) // 2)


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_of_parts(first: bytes, second: bytes) -> None:
    assert png._adler_of_both(zlib.adler32(first), zlib.adler32(second), len(second)) == zlib.adler32(first + second)


def test_repetitions_are_found_where_there_are_some() -> None:
    random = np.random.default_rng(0)
    photograph = random.normal(0, 3, 2**20).astype(np.int8).view(np.uint8)
    glyphs = random.integers(0, 256, (20, 50), np.uint8)
    drawing = glyphs[random.integers(0, 20, 2**20 // 50)]
    for data, most in [(photograph, 0.5), (drawing, 0.05)]:
        packed = png.deflate(data)
        assert zlib.decompress(packed) == data.tobytes()
        assert len(packed) < most * data.size


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize(('channels', 'dtype'), [(1, np.uint8), (4, np.uint16)])
def test_a_tiff_file_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: type) -> None:
    path, pixels = tmp_path / 'x.tif', photo(channels, dtype)
    metadata = Metadata(SRGB if channels > 2 else None, (300, 150))
    for limit, big in [(2**32 - 1, False), (1000, True)]:
        monkeypatch.setattr(tiff, 'CLASSIC_SIZE', limit)
        pictures.write(path, pixels, metadata)
        with tifffile.TiffFile(path) as file:
            assert file.is_bigtiff == big
            assert file.pages.first.predictor == 2
            assert file.pages.first.iccprofile == metadata.icc
        np.testing.assert_array_equal(by_tifffile(path), pixels)
        np.testing.assert_array_equal(by_opencv(path), pixels)
        picture = pictures.read(path)
        np.testing.assert_array_equal(picture.pixels, pixels)
        assert picture.metadata == metadata


ORIENTED = Image.Exif()
ORIENTED[0x010F], ORIENTED[0x0112] = 'Maker', 1


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('key', FORMATS)
def test_metadata_go_round(tmp_path: Path, key: str) -> None:
    """To a file, read by Pillow, and by us, and from there to a second file."""
    form, path = FORMATS[key], tmp_path / f'x{SUFFIXES[key]}'
    first = Metadata(SRGB, (300, 150), ORIENTED.tobytes()[6:])
    pictures.write(path, photo(3), first)
    with Image.open(path) as image:
        assert image.info.get('icc_profile') == (SRGB if form.icc else None)
        if key != 'webp':
            assert image.info['dpi'] == pytest.approx((300, 150), rel=1e-4)
        if form.exif:
            assert image.getexif()[0x010F] == 'Maker'
            assert key != 'webp' or image.getexif()[0x011A] == 300
    second = pictures.read(path).metadata
    assert second.icc == (SRGB if form.icc else None)
    assert second.resolution == pytest.approx((300, 150), rel=1e-4)
    assert (second.exif is not None) == form.exif
    pictures.write(tmp_path / 'again', photo(3), second, format=key)
    assert pictures.read(tmp_path / 'again').metadata == second
    pictures.write(path, photo(3))
    assert pictures.read(path).metadata == Metadata()


def test_resolutions_stay_as_they_are(tmp_path: Path) -> None:
    """Through every format, whatever its unit, to the digit that programs show."""
    for value, (key, suffix) in product((72, 96, 150, 240, 300, 600, 1200), SUFFIXES.items()):
        path = tmp_path / f'x{suffix}'
        pictures.write(path, np.zeros((1, 1, 3), np.uint8), Metadata(resolution=(value, value)))
        found = pictures.read(path).metadata.resolution
        assert found is not None, key
        assert [round(number, 1) for number in found] == [value, value], key


def test_meaning_of_colours_of_png_files(tmp_path: Path) -> None:
    colour = ((b'cICP', bytes([1, 13, 0, 1])), (b'sRGB', b'\1'), (b'gAMA', struct.pack('>I', 45455)))
    metadata = Metadata(png_colour=colour)
    path = tmp_path / 'x.png'
    pictures.write(path, photo(3), metadata)
    assert pictures.read(path).metadata == metadata
    order = [kind for kind, _ in chunks(path.read_bytes())]
    assert order.index(b'sRGB') < order.index(b'IDAT')
    pictures.write(path, photo(3), Metadata(SRGB, png_colour=colour))
    assert b'sRGB' not in dict(chunks(path.read_bytes()))  # a file has this or a profile
    for channels in (1, 2):  # of grey, no profile for RGB
        pictures.write(path, photo(channels), Metadata(SRGB))
        assert pictures.read(path).metadata.icc is None
    pictures.write(tmp_path / 'x.tif', photo(3), metadata)
    assert pictures.read(tmp_path / 'x.tif').metadata == Metadata()


def test_what_formats_cannot_hold(tmp_path: Path) -> None:
    """It is reduced, and said."""
    deep = photo(4, np.uint16)
    picture = Picture(deep, 'png', Metadata(SRGB, None, b'MM\0*' + bytes(70_000), ((b'gAMA', b'1234'),)))
    assert pictures.notes_on('png', picture) == []
    assert pictures.notes_on('TIFF', picture) == ['EXIF data left out']
    assert pictures.notes_on('jpg', picture) == [
        '16 bits a channel reduced to 8',
        'alpha flattened onto white',
        'EXIF data left out',
    ]
    assert pictures.notes_on('bmp', picture) == [
        '16 bits a channel reduced to 8',
        'colour profile left out',
        'EXIF data left out',
    ]
    assert pictures.notes_on('webp', Picture(photo(1), 'png', Metadata(png_colour=((b'gAMA', b'1234'),)))) == [
        'grey stored as RGB',
        'gamma and primaries left out',
    ]
    assert pictures.notes_on('png', Picture(photo(2), 'tif', Metadata(SRGB))) == ['colour profile left out']
    assert pictures.notes_on('jpg', Picture(photo(1), 'png', Metadata(png_colour=((b'sRGB', b'\0'),)))) == []

    # Rounded to the nearest of 256 levels; put onto white with all 16 bits.
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1)
    pictures.write(tmp_path / 'x.bmp', levels)
    expected = np.rint(levels / 257)
    np.testing.assert_array_equal(pictures.read(tmp_path / 'x.bmp').pixels, expected)
    for dtype in (np.uint8, np.uint16):
        most = np.iinfo(dtype).max
        colour, alpha = np.meshgrid(*2 * [np.linspace(0, most, 256).astype(dtype)])
        writer = PictureWriter(tmp_path / 'x.jpg', None, 256, 256, 2, dtype)
        found = writer._stored(np.dstack([colour, alpha]))
        assert found.dtype == np.uint8
        share = alpha / most
        np.testing.assert_allclose(found[..., 0], (colour * share + most * (1 - share)) * 255 / most, atol=0.51)
    pictures.write(tmp_path / 'x.bmp', photo(2))
    np.testing.assert_array_equal(by_opencv(tmp_path / 'x.bmp'), photo(2)[..., [0, 0, 0, 1]])
    pictures.write(tmp_path / 'x.webp', photo(1), quality=100)
    np.testing.assert_array_equal(by_pillow(tmp_path / 'x.webp'), photo(1)[..., [0, 0, 0]])


def test_qualities(tmp_path: Path) -> None:
    for suffix in ('.jpg', '.webp'):
        sizes = []
        for quality in (0, 50, None, 99):
            pictures.write(tmp_path / f'x{suffix}', photo(3), quality=quality)
            sizes.append((tmp_path / f'x{suffix}').stat().st_size)
        assert sizes == sorted(set(sizes)), suffix
    for name, quality, message in [
        ('x.png', 90, 'PNG files have no quality; those that have one: JPEG, WebP'),
        ('x.jpg', 101, 'quality 101: must be 0 to 100, where WebP is lossless with 100'),
        ('x.jpg', -1, 'quality -1: must be 0 to 100, where WebP is lossless with 100'),
    ]:
        with pytest.raises(PictureError) as raised:
            pictures.write(tmp_path / name, photo(3), quality=quality)
        assert str(raised.value) == message


def test_names_of_formats() -> None:
    for name, key in [('x.png', 'png'), ('x.JPEG', 'jpg'), ('x.jpg', 'jpg'), ('x.tiff', 'tif'), ('a.b.WebP', 'webp')]:
        assert pictures.format_of(Path(name)) == key
    for name, key in [('png', 'png'), ('JPEG', 'jpg'), ('.tiff', 'tif'), ('Bmp', 'bmp')]:
        assert pictures.format_named(name) == key
    with pytest.raises(PictureError, match=r'^x\.gif: the ending .* valid: \.png, \.jpg, \.jpeg, \.webp, \.tif'):
        pictures.format_of(Path('x.gif'))
    with pytest.raises(PictureError, match=r"^'gif' is no format .* valid: png, jpg, webp, tif, bmp$"):
        pictures.format_named('gif')


@pytest.mark.parametrize(
    ('name', 'size', 'message'),
    [
        ('x.jpg', (1, 65_501, 3), 'JPEG files hold 65,500 on a side at most; write PNG or TIFF or BMP'),
        ('x.webp', (16_384, 1, 3), 'WebP files hold 16,383 on a side at most; write PNG or JPEG or TIFF or BMP'),
        ('x.bmp', (36_000, 48_000, 3), 'BMP files hold 4.3 GB at most, and this takes 5.2; write PNG or JPEG or TIFF'),
        ('x.png', (1, 1_000_001, 1), 'PNG files hold 1,000,000 on a side at most; write TIFF or BMP'),
        ('x.tif', (1, 2**31, 1), 'TIFF files hold 2,147,483,647 on a side at most; cut the picture into parts'),
    ],
)
def test_too_large_for_a_format(tmp_path: Path, name: str, size: tuple[int, int, int], message: str) -> None:
    path = tmp_path / name
    start = f'{path}: would be {size[1]:,} pixels wide and {size[0]:,} high; '
    with pytest.raises(PictureError) as raised:
        pictures.check_fits(path, pictures.format_of(path), *size)
    assert str(raised.value) == start + message
    with pytest.raises(PictureError, match=r' at most'):
        PictureWriter(path, None, *size, np.uint8)
    for key, form in FORMATS.items():
        if form.max_bytes is None:
            pictures.check_fits(path, key, form.max_side, form.max_side, 4)


def test_pieces_that_make_no_picture(tmp_path: Path) -> None:
    def writer(**changed: Any) -> PictureWriter:
        return PictureWriter(**{
            'path': tmp_path / 'x.png', 'format': None, 'height': 4, 'width': 5, 'channels': 3, 'dtype': np.uint8,
            **changed,
        })  # fmt: skip

    def written(writer: PictureWriter, pieces: list[np.ndarray]) -> None:
        with writer:
            for piece in pieces:
                writer.write(piece)

    for changed in ({'height': 0}, {'width': 0}, {'channels': 5}, {'dtype': np.float32}):
        with pytest.raises(ValueError, match='no picture'):
            writer(**changed)
    rows = np.zeros((3, 5, 3), np.uint8)
    for pieces, message in [
        ([rows], 'not all of its 4 rows were written'),
        ([], 'not all of its 4 rows were written'),
        ([rows, rows], 'has 4 rows, and more are written'),
        ([rows[:, 1:]], r'rows must be \(rows, 5, 3\) of uint8, and these are \(3, 4, 3\) of uint8'),
        ([rows.astype(np.uint16)], r'and these are \(3, 5, 3\) of uint16'),
    ]:
        with pytest.raises(ValueError, match=message):
            written(writer(), pieces)
        assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('key', FORMATS)
def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path, key: str) -> None:
    path = tmp_path / f'x{SUFFIXES[key]}'
    path.write_text('before')
    pixels = photo(3)

    def interrupted() -> None:
        with PictureWriter(path, None, *pixels.shape, np.uint8) as writer:
            writer.write(pixels)
            assert path.read_text() == 'before'
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == 'before'
    pictures.write(path, pixels)
    assert pictures.read(path).pixels.shape == pixels.shape
    assert os.listdir(tmp_path) == [path.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'small', str(folder)]
    if not shutil.which('mount') or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('no disk can be mounted here')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


FULL = 'cannot be written: No space left on device; the disk is full: free some space, or write to another one'


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('key', FORMATS)
def test_full_disk(small_disk: Path, key: str) -> None:
    path = small_disk / f'x{SUFFIXES[key]}'
    path.write_text('before')
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    with pytest.raises(PictureError) as raised:
        pictures.write(path, noise)
    assert str(raised.value) == f'{path}: {FULL}'
    assert os.listdir(small_disk) == [path.name]
    assert path.read_text() == 'before'


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('key', FORMATS)
def test_file_that_grows_too_large(tmp_path: Path, key: str) -> None:
    path = tmp_path / f'x{SUFFIXES[key]}'
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(PictureError) as raised:
            pictures.write(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(raised.value).startswith(f'{path}: cannot be written: File too large; such large files are not allowed')
    assert os.listdir(tmp_path) == []


def test_disk_that_turns_out_to_be_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say so only when a file is flushed, or renamed."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / 'x.png'
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(PictureError) as raised:
                pictures.write(path, photo(3))
        assert str(raised.value) == f'{path}: {FULL}'
        assert os.listdir(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'file').write_text('')
    long = 'x' * 300 + '.png'
    for name, message in [
        ('folder.png', 'is a folder; give the name of a file'),
        ('none/x.png', 'cannot be written: No such file or directory; make the folder first'),
        ('file/x.png', 'cannot be written: Not a directory; give another folder'),
        (long, 'cannot be written: File name too long; give a shorter name'),
    ]:
        with pytest.raises(PictureError) as raised:
            pictures.write(tmp_path / name, photo(3))
        assert str(raised.value) == f'{tmp_path}/{name}: {message}'
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder.png']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PictureError, match=r'x\.png: cannot be written: Permission denied; make the folder writ'):
            pictures.write(tmp_path / 'x.png', photo(3))
    finally:
        tmp_path.chmod(0o700)


def test_an_encoder_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread: the error arrives, and no file does."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(png, '_filtered', fail)
    with pytest.raises(MemoryError):
        pictures.write(tmp_path / 'x.png', photo(3))
    monkeypatch.setattr(Image.Image, 'save', lambda *_, **__: (_ for _ in ()).throw(ValueError('encoding error 1')))
    with pytest.raises(PictureError, match=r'x\.webp: libwebp cannot encode .*\(encoding error 1\); write PNG or TIFF'):
        pictures.write(tmp_path / 'x.webp', photo(3))
    assert os.listdir(tmp_path) == []


def test_webp_files_too_large_for_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = Image.Image.save

    def overflow(image: Image.Image, *arguments: Any, **options: Any) -> None:
        if 'lossless' not in options:
            raise ValueError('encoding error 6')
        save(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, 'save', overflow)
    monkeypatch.setattr(webp.logger, 'propagate', True)
    pictures.write(tmp_path / 'x.webp', photo(4), Metadata(SRGB, (300, 150)))
    picture = pictures.read(tmp_path / 'x.webp')
    np.testing.assert_array_equal(picture.pixels, photo(4))
    assert (picture.metadata.icc, picture.metadata.resolution) == (SRGB, (300, 150))
    assert caplog.messages == [f'{tmp_path}/x.webp: is too large to be compressed with losses, and is written without']


def test_a_failure_that_the_caller_does_not_heed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not appear, even if it was the last rows that failed."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(PictureWriter, '_submit', fail)
    pixels = photo(3)

    def write() -> None:
        with PictureWriter(tmp_path / 'x.png', None, *pixels.shape, np.uint8) as writer, pytest.raises(PictureError):
            writer.write(pixels)

    with pytest.raises(ValueError, match='not all of its 83 rows were written'):
        write()
    assert os.listdir(tmp_path) == []


# Writes a picture of 117 MB in every format, from bands, and prints by how many bytes memory has grown at most.
LARGE = """
import re, sys
from pathlib import Path
import numpy as np
from attnsr import pictures

def memory(what):
    return 1024 * int(re.search(what + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])

band = np.tile(np.arange(13_000, dtype=np.uint16).astype(np.uint8)[None, :, None] // 50, (100, 1, 3))
for suffix in sys.argv[1:]:
    pictures.write('small' + suffix, band[:8, :8].copy())
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')
    with pictures.PictureWriter('large' + suffix, None, 3000, 13_000, 3, np.uint8, workers=2) as writer:
        for _ in range(30):
            writer.write(band)
    print(memory('VmHWM') - before)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the system does not tell')
def test_memory_for_large_pictures(tmp_path: Path) -> None:
    suffixes = ['.png', '.tif', '.bmp', '.jpg']
    done = util.run('-c', LARGE, *suffixes, cwd=tmp_path)
    for suffix, grown in zip(suffixes, done.stdout.split(), strict=True):
        assert int(grown) < 40e6, suffix
        assert pictures.header(tmp_path / f'large{suffix}') == (3000, 13_000, 3)
