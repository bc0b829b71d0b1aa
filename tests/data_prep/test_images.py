"""Image files of every kind: what is taken, what is done to it, what is refused and in which words."""

import hashlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_files import (
    COLOUR,
    DARK,
    GREY,
    HALF_CLEAR,
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
from PIL import Image

from attnsr.data_prep import images
from attnsr.data_prep.images import ImageFile, ImageProblem
from attnsr.data_prep.lmdb_dataset import DataSetError

AGAIN = 'copy or download it again'

# What the module silences for its process, pytest would list anew for each test.
pytestmark = pytest.mark.filterwarnings(r'ignore::UserWarning:PIL\.')


JPEG = encoded(COLOUR, 'JPEG', quality=95)
SCANLINES = b''.join(b'\0' + row.tobytes() for row in PIXELS)
DEFLATED = zlib.compress(SCANLINES)


def interlaced() -> bytes:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [b'\0' + row.tobytes() for x, y, dx, dy in passes for row in PIXELS[y::dy, x::dx]]
    return png(chunk(b'IDAT', zlib.compress(b''.join(rows))), interlace=1)


def inspected(folder: Path, content: bytes, name: str = 'photo.png') -> ImageFile:
    path = folder / name
    path.write_bytes(content)
    return images.inspect(path)


ALPHA = 'opaque alpha channel left out'
PALETTE = 'palette turned into RGB'
PROFILE = 'colour profile ignored'
UPRIGHT = 'turned upright by its orientation tag'

# Content, channels, whether it is stored as it is, and treatment.
GOOD = {
    'png rgb': (PNG, 3, True, ''),
    'png grey': (encoded(GREY), 1, True, ''),
    'png interlaced': (interlaced(), 3, True, ''),
    'png with text and gamma': (
        with_chunk(b'gAMA', struct.pack('>I', 99999), with_chunk(b'tEXt', b'transparency\0b')),
        3,
        True,
        '',
    ),
    'png with more behind': (PNG + b'more', 3, True, ''),
    'png upright': (encoded(COLOUR, exif=exif(1)), 3, True, ''),
    'png damaged exif': (with_chunk(b'eXIf', b'II*\0\x08\0\0\0\xff\xff'), 3, True, ''),
    'png turned': (encoded(COLOUR, exif=exif(6)), 3, False, UPRIGHT),
    'png grey turned': (encoded(GREY, exif=exif(5)), 1, False, UPRIGHT),
    'png profile': (encoded(COLOUR, icc_profile=SRGB), 3, True, PROFILE),
    'png turned, with profile': (encoded(COLOUR, icc_profile=SRGB, exif=exif(3)), 3, False, f'{UPRIGHT}, {PROFILE}'),
    'png damaged profile': (with_chunk(b'iCCP', b'x\0\0no profile'), 3, False, PROFILE),
    'png colour spaces': (
        with_chunk(b'cICP', bytes([9, 16, 0, 1]), with_chunk(b'sRGB', b'\0')),
        3,
        True,
        '',
    ),
    'png orientation at the end': (
        PNG[:-12] + chunk(b'eXIf', exif(6).tobytes()[6:]) + PNG[-12:],
        3,
        False,
        UPRIGHT,
    ),
    'png 1 bit': (png(packed_grey(1), bits=1, colour=0), 1, False, '1-bit grey scaled to 8 bits'),
    'png 2 bits': (png(packed_grey(2), bits=2, colour=0), 1, False, '2-bit grey scaled to 8 bits'),
    'png 4 bits': (png(packed_grey(4), bits=4, colour=0), 1, False, '4-bit grey scaled to 8 bits'),
    'png palette': (encoded(COLOUR.quantize(64)), 3, False, PALETTE),
    'png small palette': (encoded(COLOUR.quantize(4), bits=2), 3, False, PALETTE),
    'png opaque palette': (encoded(COLOUR.quantize(64), transparency=b'\xff' * 64), 3, False, f'{PALETTE}, {ALPHA}'),
    'png rgba': (encoded(with_alpha(COLOUR, 255)), 3, False, ALPHA),
    'png grey alpha': (encoded(with_alpha(GREY, 255)), 1, False, ALPHA),
    'png unused transparent colour': (encoded(COLOUR, transparency=(0, 255, 1)), 3, False, ALPHA),
    'png unused transparent grey': (with_chunk(b'tRNS', b'\0\xff', encoded(DARK)), 1, False, ALPHA),
    'jpeg': (JPEG, 3, False, ''),
    'jpeg 4:2:0': (encoded(COLOUR, 'JPEG', subsampling='4:2:0'), 3, False, ''),
    'jpeg 4:2:2': (encoded(COLOUR, 'JPEG', subsampling='4:2:2'), 3, False, ''),
    'jpeg grey': (encoded(GREY, 'JPEG'), 1, False, ''),
    'jpeg progressive': (encoded(COLOUR, 'JPEG', progressive=True), 3, False, ''),
    'jpeg restarts': (encoded(COLOUR, 'JPEG', restart_marker_blocks=3), 3, False, ''),
    'jpeg with more behind': (JPEG + b'more', 3, False, ''),
    'jpeg profile': (encoded(COLOUR, 'JPEG', icc_profile=b'no profile'), 3, False, PROFILE),
    'jpeg damaged exif': (encoded(COLOUR, 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff'), 3, False, ''),
    **{f'jpeg {n}': (encoded(COLOUR, 'JPEG', exif=exif(n)), 3, False, UPRIGHT) for n in range(2, 9)},
    'jpeg with previews': (encoded(COLOUR, 'MPO', save_all=True, append_images=[COLOUR]), 3, False, ''),
    'bmp': (encoded(COLOUR, 'BMP'), 3, False, ''),
    'bmp grey': (encoded(GREY, 'BMP'), 1, False, ''),
    'bmp palette': (encoded(COLOUR.quantize(64), 'BMP'), 3, False, PALETTE),
    'ppm': (encoded(COLOUR, 'PPM'), 3, False, ''),
    'pgm': (encoded(GREY, 'PPM'), 1, False, ''),
    'tiff': (encoded(COLOUR, 'TIFF'), 3, False, ''),
    'tiff lzw': (encoded(COLOUR, 'TIFF', compression='tiff_lzw'), 3, False, ''),
    'tiff rgba': (encoded(with_alpha(COLOUR, 255), 'TIFF'), 3, False, ALPHA),
    'tiff palette': (encoded(COLOUR.quantize(64), 'TIFF'), 3, False, PALETTE),
    'tiff 1 bit': (encoded(GREY.convert('1'), 'TIFF'), 1, False, '1-bit grey scaled to 8 bits'),
    'tiff turned': (encoded(COLOUR, 'TIFF', tiffinfo={0x0112: 6}), 3, False, UPRIGHT),
    'webp': (encoded(COLOUR, 'WEBP'), 3, False, ''),
    'webp lossless': (encoded(COLOUR, 'WEBP', lossless=True), 3, False, ''),
    'webp turned': (encoded(COLOUR, 'WEBP', exif=exif(8)), 3, False, UPRIGHT),
}


@pytest.mark.parametrize('kind', GOOD)
def test_reads_what_basicsr_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    content, channels, as_is, treatment = GOOD[kind]
    file = inspected(tmp_path, content)
    image = images.read(file)
    assert capfd.readouterr() == ('', '')

    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert expected is not None
    height, width = size = expected.shape[:2]
    sha256 = hashlib.sha256(content).hexdigest()
    assert file == ImageFile(tmp_path / 'photo.png', height, width, channels, len(content), sha256, as_is, treatment)
    assert images.read_bytes(file) == content
    assert image.flags.c_contiguous
    assert image.dtype == np.uint8
    assert image.shape == ((*size, 3) if channels == 3 else size)
    np.testing.assert_array_equal(np.broadcast_to(image.reshape(*size, channels), (*size, 3)), expected)


def test_pixels_of_lossless_files_are_those_written(tmp_path: Path) -> None:
    bgr, grey = PIXELS[..., ::-1], np.asarray(GREY)
    for kind, expected in [
        ('png rgb', bgr),
        ('png interlaced', bgr),
        ('png grey', grey),
        ('png rgba', bgr),
        ('png turned', np.rot90(bgr, -1)),
        ('tiff turned', np.rot90(bgr, -1)),
        ('tiff lzw', bgr),
        ('bmp', bgr),
        ('ppm', bgr),
        ('webp lossless', bgr),
        ('png 2 bits', (grey >> 6) * 85),
    ]:
        np.testing.assert_array_equal(images.read(inspected(tmp_path, GOOD[kind][0])), expected, kind)


def test_levels_other_than_255_are_scaled(tmp_path: Path) -> None:
    file = inspected(tmp_path, b'P5\n# four levels\n4 1\n3\n\0\1\2\3', 'photo.pgm')
    np.testing.assert_array_equal(images.read(file), [[0, 85, 170, 255]])


TRANSPARENT = 'has transparent pixels; flatten it onto a background first'
BITS = 'has {} bits a channel; convert it to 8'
COLOURS = 'has {} colours, whose RGB depends on a profile; convert it to RGB'
DAMAGED = f'is truncated or damaged; {AGAIN}'
SEVERAL = 'holds 2 images; save the one that is wanted as a file of its own'
NO_IMAGE = 'is no BMP, JPEG, PGM, PNG, PPM, TIFF or WebP image; save it as one of them'
SCAN = JPEG.index(b'\xff\xda') + 14
PROGRESSIVE = encoded(COLOUR, 'JPEG', progressive=True)
RESTARTS = encoded(COLOUR, 'JPEG', restart_marker_blocks=3)
RESTART = RESTARTS.index(b'\xff\xd1')
LZW = encoded(COLOUR, 'TIFF', compression='tiff_lzw')
SIXTEEN = PIXELS.astype(np.uint16) * 257
FIRST, SECOND = chunk(b'IDAT', DEFLATED[:99]), chunk(b'IDAT', DEFLATED[99:])

# The one of these of which a library, libtiff, writes a remark to the terminal.
TIFF_DAMAGED = 'tiff damaged'

BAD = {
    'empty': (b'', f'is empty; {AGAIN}'),
    'text': (b'<html>404 Not Found</html>', NO_IMAGE),
    'gif': (encoded(COLOUR, 'GIF'), NO_IMAGE),
    # PNG
    'png truncated': (PNG[:-200], DAMAGED),
    'png without its end': (PNG[:-12], DAMAGED),
    'png without the last byte': (PNG[:-1], DAMAGED),
    'png damaged': (damaged(PNG, 999), DAMAGED),
    'png half the pixels': (png(chunk(b'IDAT', DEFLATED[:-999])), DAMAGED),
    'png unknown filter': (
        png(chunk(b'IDAT', zlib.compress(SCANLINES[: -3 * WIDTH - 1] + b'\5' + SCANLINES[-3 * WIDTH :]))),
        DAMAGED,
    ),
    'png without pixels': (png(), DAMAGED),
    'png interrupted': (png(FIRST, chunk(b'tEXt', b'a\0b'), SECOND), DAMAGED),
    'png without palette': (png(FIRST, SECOND, colour=3), DAMAGED),
    'png too wide': (
        png(size=(1_000_001, 1)),
        'is 1000001 pixels wide and 1 high, more than OpenCV reads (1,000,000 on a side, 1,073,741,824 in all); '
        'cut it into parts',
    ),
    'png animation': (
        encoded(COLOUR, save_all=True, append_images=[COLOUR.rotate(180)]),
        SEVERAL,
    ),
    'png rgba': (encoded(HALF_CLEAR), TRANSPARENT),
    'png grey alpha': (encoded(with_alpha(GREY, GREY)), TRANSPARENT),
    'png palette': (encoded(COLOUR.quantize(64), transparency=3), TRANSPARENT),
    'png colour': (encoded(COLOUR, transparency=tuple(PIXELS[7, 9].tolist())), TRANSPARENT),
    'png 2-bit grey': (png(chunk(b'tRNS', b'\0\3'), packed_grey(2), bits=2, colour=0), TRANSPARENT),
    'png 16-bit rgb': (cv2.imencode('.png', SIXTEEN)[1].tobytes(), BITS.format(16)),
    'png 16-bit grey': (cv2.imencode('.png', SIXTEEN[..., 0])[1].tobytes(), BITS.format(16)),
    # JPEG
    'jpeg truncated': (JPEG[:-99], DAMAGED),
    'jpeg without its end': (JPEG[:-2], DAMAGED),
    'jpeg partly downloaded': (JPEG[:-999].ljust(len(JPEG), b'\0'), DAMAGED),
    'jpeg truncated and closed': (JPEG[:-99] + b'\xff\xd9', DAMAGED),
    'jpeg truncated in a late scan': (PROGRESSIVE[:-99] + b'\xff\xd9', DAMAGED),
    'jpeg hole before a restart': (RESTARTS[: RESTART - 40] + RESTARTS[RESTART:], DAMAGED),
    'jpeg cmyk': (encoded(COLOUR.convert('CMYK'), 'JPEG'), COLOURS.format('CMYK')),
    # The others
    'bmp truncated': (encoded(COLOUR, 'BMP')[:-9], DAMAGED),
    'ppm truncated': (encoded(COLOUR, 'PPM')[:-9], DAMAGED),
    'ppm 16-bit': (cv2.imencode('.ppm', SIXTEEN)[1].tobytes(), BITS.format(16)),
    'pgm 16-bit': (cv2.imencode('.pgm', SIXTEEN[..., 0])[1].tobytes(), BITS.format(16)),
    'ppm 10-bit, as text': (b'P3 1 1 1023 5 6 7', BITS.format(16)),
    TIFF_DAMAGED: (LZW[:999] + b'\xff' * 99 + LZW[1098:], DAMAGED),
    'tiff truncated': (encoded(COLOUR, 'TIFF')[:-99], DAMAGED),
    'tiff pages': (encoded(COLOUR, 'TIFF', save_all=True, append_images=[GREY]), SEVERAL),
    'tiff 16-bit': (cv2.imencode('.tif', SIXTEEN)[1].tobytes(), BITS.format(16)),
    'tiff float': (encoded(GREY.convert('F'), 'TIFF'), BITS.format(32)),
    'tiff cmyk': (encoded(COLOUR.convert('CMYK'), 'TIFF'), COLOURS.format('CMYK')),
    'tiff lab': (encoded(Image.new('LAB', (9, 9)), 'TIFF'), COLOURS.format('LAB')),
    'tiff rgba': (encoded(HALF_CLEAR, 'TIFF'), TRANSPARENT),
    'webp alpha': (encoded(HALF_CLEAR, 'WEBP', lossless=True), TRANSPARENT),
    'webp animation': (encoded(COLOUR, 'WEBP', save_all=True, append_images=[COLOUR.rotate(180)]), SEVERAL),
}


@pytest.mark.parametrize('kind', BAD)
def test_refuses_what_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    content, problem = BAD[kind]
    with pytest.raises(ImageProblem) as raised:
        inspected(tmp_path, content)
    assert str(raised.value) == f'{tmp_path}/photo.png: {problem}'
    out, err = capfd.readouterr()
    assert out == ''
    assert err == '' or kind == TIFF_DAMAGED


def test_names_what_pillow_stumbles_over(tmp_path: Path) -> None:
    remedy = f'{AGAIN}, or save it as an 8-bit PNG file'
    for content in [
        encoded(COLOUR, 'WEBP')[:-99],
        JPEG[:20],
        cv2.imencode('.tif', PIXELS.astype(np.float32))[1].tobytes(),
        PNG[:8],
        PNG[:8] + PNG[33:],
        damaged(PNG, 20),
        png(FIRST, SECOND, size=(WIDTH, 0)),
        png(FIRST, SECOND, bits=4),
        with_chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2**21))),
    ]:
        with pytest.raises(ImageProblem, match=rf'^{tmp_path}/photo\.png: cannot be understood \(.+\); {remedy}$'):
            inspected(tmp_path, content)


def test_a_jpeg_file_cut_anywhere_and_closed_is_found(tmp_path: Path) -> None:
    for end in range(SCAN, len(JPEG) - 12, 61):
        with pytest.raises(ImageProblem, match='is truncated or damaged'):
            inspected(tmp_path, JPEG[:end] + b'\xff\xd9')


def test_a_wrong_byte_anywhere_in_a_png_file_is_found(tmp_path: Path) -> None:
    for position in range(8, len(PNG), 61):
        with pytest.raises(ImageProblem, match=r'is truncated or damaged; |cannot be understood \('):
            inspected(tmp_path, damaged(PNG, position))


def test_larger_than_pillow_would_open(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    packer = zlib.compressobj(1)
    rows = b''.join(packer.compress(bytes(2501) * 1000) for _ in range(10)) + packer.flush()
    file = inspected(tmp_path, png(chunk(b'IDAT', rows), bits=1, colour=0, size=(20_000, 10_000)))
    assert (file.height, file.width, file.channels) == (10_000, 20_000, 1)
    assert not recwarn


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'link.png').symlink_to('nowhere.png')
    os.mkfifo(tmp_path / 'pipe.png')
    for name, problem in [
        ('folder.png', 'is a folder with the name of an image file; rename it, or move it away'),
        ('link.png', 'is a link to a file that is not there; mend or remove it'),
        ('pipe.png', 'is not a regular file; move it away'),
        ('none.png', 'cannot be read: No such file or directory; make it readable, or move it away'),
    ]:
        with pytest.raises(ImageProblem) as raised:
            images.inspect(tmp_path / name)
        assert str(raised.value) == f'{tmp_path}/{name}: {problem}'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every file')
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / 'secret.png'
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(ImageProblem, match=r'secret\.png: cannot be read: Permission denied; make it readable'):
        images.inspect(path)


def test_a_file_that_has_changed(tmp_path: Path) -> None:
    file = inspected(tmp_path, PNG)
    for content in (PNG + b'more', damaged(PNG, 999), encoded(GREY)):
        file.path.write_bytes(content)
        for function in (images.read, images.read_bytes):
            with pytest.raises(ImageProblem) as raised:
                function(file)
            assert str(raised.value) == f'{file.path}: has changed since it was checked; run the command again'
    file.path.unlink()
    with pytest.raises(ImageProblem, match=r'photo\.png: cannot be read: No such file or directory'):
        images.read(file)


def test_a_folder_with_everything(tmp_path: Path) -> None:
    """All problems in one go, in the order of the files, from a process of its own."""
    for number, content in enumerate([row[0] for row in BAD.values()] + [row[0] for row in GOOD.values()]):
        (tmp_path / f'{number:03d}.png').write_bytes(content)
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'link.png').symlink_to('nowhere.png')
    script = (
        'import sys, warnings; from pathlib import Path; from attnsr.data_prep import images\n'
        'assert "PIL" not in repr(warnings.filters), "importing it has changed the filters of the process"\n'
        'paths = images.find(Path(sys.argv[1])); advanced = []\n'
        'files, problems = images.inspect_all(paths, 4, lambda: advanced.append(1))\n'
        'for file in files: images.read(file)\n'
        'print(len(files), len(advanced), *problems, sep="\\n")'
    )
    done = subprocess.run([sys.executable, '-c', script, tmp_path], capture_output=True, text=True, check=False)
    assert len(done.stderr.splitlines()) <= 1  # libtiff's, of the damaged TIFF file
    expected = [f'{tmp_path}/{number:03d}.png: {problem}' for number, (_, problem) in enumerate(BAD.values())]
    expected += [
        f'{tmp_path}/folder.png: is a folder with the name of an image file; rename it, or move it away',
        f'{tmp_path}/link.png: is a link to a file that is not there; mend or remove it',
    ]
    assert done.stdout.splitlines() == [str(len(GOOD)), str(len(GOOD) + len(BAD) + 2), *expected]


def test_whatever_the_number_of_threads(tmp_path: Path) -> None:
    paths: list[Path] = []
    for name, content in [('b.png', PNG), ('a.jpg', JPEG), ('empty.png', b''), ('c.png', encoded(GREY))] * 3:
        paths.append(tmp_path / f'{len(paths)}_{name}')
        paths[-1].write_bytes(content)
    files, problems = images.inspect_all(paths, 1, lambda: None)
    assert [file.path for file in files] == [path for path in paths if 'empty' not in path.name]
    assert problems == [f'{path}: is empty; {AGAIN}' for path in paths if 'empty' in path.name]
    assert images.inspect_all(paths, 3, lambda: None) == (files, problems)
    assert images.inspect_all([], 2, lambda: None) == ([], [])


def test_find(tmp_path: Path) -> None:
    for name in [
        'b.PNG',
        'a.jpeg',
        '.hidden.png',
        'notes.txt',
        'x/y/c.Tif',
        'x/.cache/d.png',
        'x.lmdb/e.png',
        'x.d/f.webp',
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'g.png').mkdir()
    (tmp_path / 'g.png' / 'inside.png').write_bytes(b'')
    (tmp_path / 'x' / 'round').symlink_to(tmp_path)
    (tmp_path / 'h.bmp').symlink_to('nowhere')
    found = [str(path.relative_to(tmp_path)) for path in images.find(tmp_path)]
    assert found == ['a.jpeg', 'b.PNG', 'g.png', 'h.bmp', 'x/y/c.Tif', 'x.d/f.webp']


def test_find_says_what_is_there_instead(tmp_path: Path) -> None:
    def problem(folder: Path) -> str:
        with pytest.raises(DataSetError) as raised:
            images.find(folder)
        return str(raised.value)

    nothing = 'holds no image files (.bmp, .jpg, .jpeg, .pgm, .png, .ppm, .tif, .tiff, .webp)'
    assert problem(tmp_path / 'none') == f'{tmp_path}/none: there is no such folder'
    assert problem(tmp_path) == f'{tmp_path}: {nothing}'
    for name in ('y.txt', 'x.txt', 'z.zip'):
        (tmp_path / name).write_bytes(b'')
    assert problem(tmp_path) == f'{tmp_path}: {nothing}; it holds 3 others, for example x.txt'
    assert problem(tmp_path / 'x.txt') == f'{tmp_path}/x.txt: is a file; give the folder that holds the images'


@pytest.mark.parametrize(
    ('name', 'key'),
    [('0001.png', '0001'), ('img_001_SRF_4-HR.png', 'img_001_SRF_4-HR'), ('v1.2 (é).png', 'v1_2____')],
)
def test_key(name: str, key: str) -> None:
    assert images.key(Path('some.folder', name)) == key
