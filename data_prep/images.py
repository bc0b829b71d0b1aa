"""Finding, checking and reading the image files that a data set is made of.

What a file may hold, judged by its content and not by its name, and what becomes of it:

=====================================================  ================================================================
RGB or grey, 8 bits a channel                          taken as it is; grey stays one channel
grey of 1, 2 or 4 bits                                 scaled to 8 bits
palette                                                turned into RGB
alpha channel, transparent colour or palette entries   left out where every pixel is opaque, else a problem
orientation in EXIF or TIFF tags                       turned upright, as BasicSR reads it
colour profile (ICC)                                   ignored, as BasicSR does
16 or 32 bits a channel, floating point                a problem
CMYK, YCCK, Lab and all other colours                  a problem: their RGB depends on a profile
animation, several pages                               a problem; previews inside a JPEG file are ignored
empty, truncated, damaged, no image, unreadable        a problem
more than 1 000 000 pixels on a side, 2**30 in all     a problem: OpenCV, and so BasicSR, does not read them
=====================================================  ================================================================

What can be told of damage depends on the kind of file. All are decoded. In PNG files the checksums of all chunks are
compared as well. JPEG files have none: that data end early is found in each of their segments, but a wrong byte within
mostly leaves other pixels and no sign. Metadata that Pillow cannot take are a problem too, such as a text or profile
of more than 1 MiB, when inflated, in a PNG file.

PNG files that need no treatment are read by OpenCV, as BasicSR does with those in an LMDB. All others are read by
Pillow, to the same pixels: OpenCV leaves parts of damaged TIFF files black, does not scale PGM and PPM files of other
than 255 levels, and has libjpeg write remarks to the terminal. Of damaged TIFF files, libtiff writes some there.
"""

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile as PillowImage

from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.parallel import in_order

__all__ = ['EXTENSIONS', 'ImageFile', 'ImageProblem', 'find', 'inspect', 'inspect_all', 'key', 'read', 'read_bytes']

EXTENSIONS = ('.bmp', '.jpg', '.jpeg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

# libpng's limit on sides, below OpenCV's own of 2**20, and OpenCV's on pixels.
MAX_SIDE = 1_000_000
MAX_PIXELS = 2**30

# The last chunk of every PNG file, whole.
PNG_END = b'\0\0\0\0IEND\xaeB`\x82'

# The classes are called by themselves: Image.open() would warn of, or refuse, images that are not too large for us.
PILLOW = (
    (b'\x89PNG\r\n\x1a\n', PngImagePlugin.PngImageFile),
    (b'\xff\xd8\xff', JpegImagePlugin.JpegImageFile),
    (b'BM', BmpImagePlugin.BmpImageFile),
    (b'P[1-6][\\s#]', PpmImagePlugin.PpmImageFile),
    (b'(?s)RIFF....WEBP', WebPImagePlugin.WebPImageFile),
    (b'II[*+]\0|MM\0[*+]', TiffImagePlugin.TiffImageFile),
)
GREY_MODES = ('1', 'L', 'LA')
COLOUR_MODES = ('P', 'PA', 'RGB', 'RGBA')

# Any bytes without a marker (0xFF) that are not taken for a run of zeros.
FILLER = bytes(range(37, 229, 3))

# What makes an image upright, by the value of its EXIF orientation; 1 and all others need nothing.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageProblem(DataSetError):
    """One file that cannot be used; the message names it and says what is wrong, and what would be right."""


@dataclass(frozen=True)
class ImageFile:
    """An image file that :func:`inspect` found to be right."""

    path: Path
    height: int
    """Of the image that :func:`read` gives."""
    width: int
    """Of the image that :func:`read` gives."""
    channels: int
    """1 or 3, of the image that :func:`read` gives."""
    bytes: int
    """Length of the file."""
    sha256: str
    """Of the file's bytes."""
    as_is: bool
    """A PNG file that needs no treatment: BasicSR reads from its bytes exactly what :func:`read` gives."""
    treatment: str
    """What :func:`read` does to the image, such as 'palette turned into RGB', or ignores; empty where nothing."""


def find(folder: Path) -> list[Path]:
    """All image files below a folder, by their extension, sorted.

    Links to folders are followed. Hidden files and folders, and LMDBs, are left out.

    Raises:
        DataSetError: There is no such folder, it cannot be read, or there is no image file below it.
    """
    if not folder.exists():
        raise DataSetError(f'{folder}: there is no such folder')
    if not folder.is_dir():
        raise DataSetError(f'{folder}: is a file; give the folder that holds the images')
    images: list[Path] = []
    others: list[Path] = []
    visited: set[str] = set()  # a link may lead back to a folder above it
    try:
        for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            visited.add(os.path.realpath(root))
            # A folder that is named like an image is no image, which is said when it is looked into.
            names += [name for name in folders if _is_image_name(name)]
            folders[:] = [
                name
                for name in folders
                if not name.startswith('.')
                and not name.endswith('.lmdb')
                and not _is_image_name(name)
                and os.path.realpath(os.path.join(root, name)) not in visited
            ]
            for name in names:
                if not name.startswith('.'):
                    (images if _is_image_name(name) else others).append(Path(root, name))
    except OSError as error:
        raise DataSetError(f'{error.filename}: cannot be read: {error.strerror}; make the folder readable') from error
    if not images:
        example = f'; it holds {len(others)} others, for example {min(others).relative_to(folder)}' if others else ''
        raise DataSetError(f'{folder}: holds no image files ({", ".join(EXTENSIONS)}){example}')
    return sorted(images)


def key(path: Path) -> str:
    """The name of an image in an LMDB: that of the file, with '_' for what BasicSR's keys cannot hold."""
    return re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)


def inspect(path: Path) -> ImageFile:
    """Find out what a file holds, and that :func:`read` can give the whole of it. Decodes it, JPEG files at an eighth.

    Raises:
        ImageProblem: The image cannot be used, for one of the reasons in the table above.
    """
    data = _bytes(path)
    image = _opened(path, data)
    bits = _bits(image)
    # Decoding turns these, and then they have no such tag any more.
    turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(0x0112) in TURNS
    _check_whole(path, data, image)
    # A str would be a comment of that name.
    alpha = image.mode in ('LA', 'PA', 'RGBA') or isinstance(image.info.get('transparency'), int | tuple | bytes)
    if alpha and not _is_opaque(image, bits):
        raise ImageProblem(f'{path}: has transparent pixels; flatten it onto a background first')
    orientation = _orientation(image)
    grey = image.mode in GREY_MODES
    changes = {
        'palette turned into RGB': image.mode in ('P', 'PA'),
        f'{bits}-bit grey scaled to 8 bits': grey and bits < 8,
        'opaque alpha channel left out': alpha,
        'turned upright by its orientation tag': turned or orientation > 1,
    }
    treatment = [change for change, applies in changes.items() if applies]
    # None is one that cannot be inflated. Were the file stored as it is, libpng would write a remark to the terminal
    # whenever BasicSR reads it.
    profile = image.info.get('icc_profile', b'')
    as_is = isinstance(image, PngImagePlugin.PngImageFile) and not treatment and profile is not None
    if profile != b'':
        treatment.append('colour profile ignored')
    height, width = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    sha256 = hashlib.sha256(data).hexdigest()
    return ImageFile(path, height, width, 1 if grey else 3, len(data), sha256, as_is, ', '.join(treatment))


def inspect_all(
    paths: Sequence[Path], workers: int, advance: Callable[[], object]
) -> tuple[list[ImageFile], list[str]]:
    """Inspect many files, with all their problems in one go.

    Args:
        paths: The files.
        workers: Number of threads.
        advance: Called after each file, for a progress bar.

    Returns:
        The files that are right, and one line for each of the others, both in the order of ``paths``.
    """

    def checked(path: Path) -> ImageFile | str:
        try:
            return inspect(path)
        except ImageProblem as problem:
            return str(problem)

    files: list[ImageFile] = []
    problems: list[str] = []
    for result in in_order(checked, paths, workers):
        if isinstance(result, str):
            problems.append(result)
        else:
            files.append(result)
        advance()
    return files, problems


def read(file: ImageFile) -> np.ndarray:
    """The image in a file that was inspected.

    Returns:
        uint8 array, C-contiguous, of shape (height, width, 3), channels in OpenCV's order BGR, or for a grey image
        (height, width).

    Raises:
        ImageProblem: As :func:`read_bytes`.
    """
    data = read_bytes(file)
    if file.as_is:
        flag = cv2.IMREAD_COLOR if file.channels == 3 else cv2.IMREAD_GRAYSCALE
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if pixels is None:
            raise _broken(file.path, 'is damaged: OpenCV cannot decode it')
        return pixels
    image = _opened(file.path, data)
    upright = image.convert('RGB' if file.channels == 3 else 'L')
    if (orientation := _orientation(image)) > 1:
        upright = upright.transpose(TURNS[orientation])
    pixels = np.array(upright)
    return pixels if file.channels == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


def read_bytes(file: ImageFile) -> bytes:
    """The bytes of a file that was inspected.

    Raises:
        ImageProblem: They are not those that were inspected any more, or cannot be read any more.
    """
    data = _bytes(file.path)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ImageProblem(f'{file.path}: has changed since it was checked; run the command again')
    return data


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_image_name(name: str) -> bool:
    return not name.startswith('.') and os.path.splitext(name)[1].lower() in EXTENSIONS


def _bytes(path: Path) -> bytes:
    """The content of a file that may not be there, not be a file, or not be readable."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageProblem(f'{path}: is a folder with the name of an image file; rename it, or move it away')
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise ImageProblem(f'{path}: is not a regular file; move it away')
        data = path.read_bytes()
    except OSError as error:
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            raise ImageProblem(f'{path}: is a link to a file that is not there; mend or remove it') from error
        raise ImageProblem(f'{path}: cannot be read: {error.strerror}; make it readable, or move it away') from error
    if not data:
        raise _broken(path, 'is empty')
    return data


def _broken(path: Path, how: str) -> ImageProblem:
    return ImageProblem(f'{path}: {how}; copy or download it again')


def _orientation(image: PillowImage) -> int:
    """The orientation in EXIF data, 1 where they have none that can be read: they say nothing of the pixels."""
    parsed = Image.Exif()
    try:
        parsed.load(image.info.get('exif', b''))
        value = parsed.get(0x0112)
    except Exception:  # of many classes: whatever the parsing of damaged data runs into
        return 1
    return value if value in TURNS else 1


@cache
def _silence_pillow() -> None:
    """Have Pillow not warn of odd metadata, which nothing is read from.

    The filters belong to the whole process, so that they cannot be set around single calls in threads.
    """
    warnings.filterwarnings('ignore', module=r'PIL\.')


def _opened(path: Path, data: bytes) -> PillowImage:
    """What a file is by its header, not decoded; refuses what is of a kind that cannot be used."""
    _silence_pillow()
    plugin = next((plugin for signature, plugin in PILLOW if re.match(signature, data)), None)
    if plugin is None:
        raise ImageProblem(f'{path}: is no BMP, JPEG, PGM, PNG, PPM, TIFF or WebP image; save it as one of them')
    try:
        image = plugin(BytesIO(data))
        frames, bits = getattr(image, 'n_frames', 1), _bits(image)
    except Exception as error:  # of many classes: whatever the parsing runs into
        raise ImageProblem(
            f'{path}: cannot be understood ({error}); copy or download it again, or save it as an 8-bit PNG file'
        ) from error
    if frames > 1:
        raise ImageProblem(f'{path}: holds {frames} images; save the one that is wanted as a file of its own')
    if bits > 8:
        raise ImageProblem(f'{path}: has {bits} bits a channel; convert it to 8')
    if max(image.size) > MAX_SIDE or image.height * image.width > MAX_PIXELS:
        raise ImageProblem(
            f'{path}: is {image.width} pixels wide and {image.height} high, more than OpenCV reads '
            f'({MAX_SIDE:,} on a side, {MAX_PIXELS:,} in all); cut it into parts'
        )
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ImageProblem(f'{path}: has {image.mode} colours, whose RGB depends on a profile; convert it to RGB')
    return image


def _bits(image: PillowImage) -> int:
    """Bits a channel, as far as it matters: more than 8, or grey of fewer."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile:
        bits = re.search(r'\d+', str(image.tile[0][3]))  # in '1', 'L', 'L;4', 'RGB;16B' or the like
        return int(bits[0]) if bits else 8
    if isinstance(image, PpmImagePlugin.PpmImageFile):
        decoder, *_, arguments = image.tile[0]
        # Decoders that scale are told of the highest value. Without one there are 8 bits, or 16 of mode I.
        if image.mode == 'I' or (decoder.startswith('ppm') and isinstance(arguments, tuple) and arguments[1] > 255):
            return 16
    return 1 if image.mode == '1' else 8


def _check_whole(path: Path, data: bytes, image: PillowImage) -> None:
    """Refuse an image of which pixels are missing or wrong, as far as can be told. Decodes it, unless a JPEG file."""
    whole = True
    try:
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            whole = _reduced(data) == _reduced(_refilled(data))
        else:
            image.load()
        if isinstance(image, PngImagePlugin.PngImageFile):
            PngImagePlugin.PngImageFile(BytesIO(data)).verify()  # compares all checksums but that of the last chunk
            whole = PNG_END in data
    except Image.DecompressionBombError as error:
        raise ImageProblem(f'{path}: is larger than Pillow reads of this kind; save it as a PNG file') from error
    except Exception as error:  # of many classes: whatever the decoding runs into
        raise _broken(path, 'is truncated or damaged') from error
    if not whole:
        raise _broken(path, 'is truncated or damaged')


def _is_opaque(image: Image.Image, bits: int) -> bool:
    """Whether no pixel of an image with an alpha channel, or with a transparent colour or palette, is transparent."""
    if 'transparency' in image.info:
        if image.mode == 'L':  # Pillow scales the pixels to 8 bits, and not this level
            image.info['transparency'] *= 255 // (2**bits - 1)
        image = image.convert('RGBA')
    return image.getchannel('A').getextrema() == (255, 255)


def _reduced(jpeg: bytes) -> bytes:
    """The pixels of a JPEG file, made from all of its data but reduced to an eighth where that takes less time."""
    image = JpegImagePlugin.JpegImageFile(BytesIO(jpeg))
    if 'progressive' not in image.info:  # there, an eighth is made from the first scans alone
        image.draft(None, (1, 1))
    return image.tobytes()


def _refilled(jpeg: bytes) -> bytes:
    """A JPEG file with more bytes at the end of each segment of compressed data.

    Where a segment ends early, libjpeg goes on as if zeros followed, with no more than a remark. The added bytes are
    then read instead, and pixels change. They are not read where the segment is complete.
    """
    parts, start = [], 0
    for end in _segment_ends(jpeg):
        parts += [jpeg[start:end], FILLER]
        start = end
    return b''.join([*parts, jpeg[start:]])


def _segment_ends(jpeg: bytes) -> Iterator[int]:
    """Where compressed data of a JPEG file end: before each restart marker and after each scan.

    Raises:
        ValueError: The file has no end.
    """
    marker = re.compile(rb'\xff+([^\0\xff])')
    scanning = False
    match = marker.search(jpeg, 2)
    while match:
        kind, start = match[1][0], match.end()
        if scanning:
            yield match.start()
        if kind == 0xD9:  # end of image
            return
        if not 0xD0 <= kind <= 0xD7:  # all but restarts are followed by the length of what belongs to them
            start += int.from_bytes(jpeg[start : start + 2], 'big')
            scanning = kind == 0xDA
        match = marker.search(jpeg, start)
    # Pillow would do without if zeros follow, as in a broken download.
    raise ValueError('there is no marker at the end')
