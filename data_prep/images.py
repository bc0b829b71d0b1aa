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

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
from PIL import PngImagePlugin, TiffImagePlugin
from PIL.ImageFile import ImageFile as PillowImage

from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.parallel import in_order
from attnsr.pictures import opening
from attnsr.pictures.opening import PictureError

__all__ = [
    'EXTENSIONS',
    'ImageFile',
    'ImageProblem',
    'check_folder',
    'find',
    'inspect',
    'inspect_all',
    'key',
    'read',
    'read_bytes',
    'search',
]

EXTENSIONS = ('.bmp', '.jpg', '.jpeg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

# libpng's limit on sides, below OpenCV's own of 2**20, and OpenCV's on pixels.
MAX_SIDE = 1_000_000
MAX_PIXELS = 2**30


class ImageProblem(DataSetError):
    """One file that cannot be used; the message names it and says what is wrong, and what would be right."""


@contextlib.contextmanager
def _problems() -> Iterator[None]:
    """Of data sets, what is wrong with a picture file is an :class:`ImageProblem`."""
    try:
        yield
    except PictureError as error:
        raise ImageProblem(str(error)) from error


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


def find(folder: Path, recursive: bool = True) -> list[Path]:
    """All image files below a folder, or in it alone, by their extension, sorted.

    Raises:
        DataSetError: As :func:`search`, or there is no image file below it.
    """
    images, others = search(folder, recursive)
    if not images:
        example = f'; it holds {len(others)} others, for example {others[0].relative_to(folder)}' if others else ''
        raise DataSetError(f'{folder}: holds no image files ({", ".join(EXTENSIONS)}){example}')
    return images


def check_folder(folder: Path) -> None:
    """See that there is such a folder.

    Raises:
        DataSetError: There is none, or it is a file.
    """
    if not folder.exists():
        raise DataSetError(f'{folder}: there is no such folder')
    if not folder.is_dir():
        raise DataSetError(f'{folder}: is a file; give the folder that holds the images')


def search(folder: Path, recursive: bool = True) -> tuple[list[Path], list[Path]]:
    """All files below a folder, or in it alone: images, by their extension, and others; sorted.

    Links to folders are followed. Hidden files and folders, and LMDBs, are left out.

    Raises:
        DataSetError: There is no such folder, or it cannot be read.
    """
    check_folder(folder)
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
                if recursive
                and not name.startswith('.')
                and not name.endswith('.lmdb')
                and not _is_image_name(name)
                and os.path.realpath(os.path.join(root, name)) not in visited
            ]
            for name in names:
                if not name.startswith('.'):
                    (images if _is_image_name(name) else others).append(Path(root, name))
    except OSError as error:
        raise DataSetError(f'{error.filename}: cannot be read: {error.strerror}; make the folder readable') from error
    return sorted(images), sorted(others)


def key(path: Path) -> str:
    """The name of an image in an LMDB: that of the file, with '_' for what BasicSR's keys cannot hold."""
    return re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)


@_problems()
def inspect(path: Path) -> ImageFile:
    """Find out what a file holds, and that :func:`read` can give the whole of it. Decodes it, JPEG files at an eighth.

    Raises:
        ImageProblem: The image cannot be used, for one of the reasons in the table above.
    """
    data = opening.file_bytes(path)
    image, bits = _opened(path, data)
    # Decoding turns these, and then they have no such tag any more.
    turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(0x0112) in opening.TURNS
    opening.check_whole(path, data, image)
    alpha = opening.has_alpha(image)
    if alpha and not _is_opaque(image, bits):
        raise ImageProblem(f'{path}: has transparent pixels; flatten it onto a background first')
    orientation = opening.exif_orientation(image.info.get('exif', b''))
    grey = image.mode in opening.GREY_MODES
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


@_problems()
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
            raise opening.broken(file.path, 'is damaged: OpenCV cannot decode it')
        return pixels
    image, _ = _opened(file.path, data)
    upright = image.convert('RGB' if file.channels == 3 else 'L')
    if (orientation := opening.exif_orientation(image.info.get('exif', b''))) > 1:
        upright = upright.transpose(opening.TURNS[orientation])
    pixels = np.array(upright)
    return pixels if file.channels == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


@_problems()
def read_bytes(file: ImageFile) -> bytes:
    """The bytes of a file that was inspected.

    Raises:
        ImageProblem: They are not those that were inspected any more, or cannot be read any more.
    """
    data = opening.file_bytes(file.path)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ImageProblem(f'{file.path}: has changed since it was checked; run the command again')
    return data


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_image_name(name: str) -> bool:
    return not name.startswith('.') and os.path.splitext(name)[1].lower() in EXTENSIONS


def _opened(path: Path, data: bytes) -> tuple[PillowImage, int]:
    """What a usable file is by its header, not decoded, and its bits a channel."""
    image, bits = opening.open_image(path, data, opening.kind_of(path, data))
    if bits > 8:
        raise ImageProblem(f'{path}: has {bits} bits a channel; convert it to 8')
    if max(image.size) > MAX_SIDE or image.height * image.width > MAX_PIXELS:
        raise ImageProblem(
            f'{path}: is {image.width} pixels wide and {image.height} high, more than OpenCV reads '
            f'({MAX_SIDE:,} on a side, {MAX_PIXELS:,} in all); cut it into parts'
        )
    if image.mode not in opening.GREY_MODES + opening.COLOUR_MODES:
        raise ImageProblem(f'{path}: has {image.mode} colours, whose RGB depends on a profile; convert it to RGB')
    return image, bits


def _is_opaque(image: PillowImage, bits: int) -> bool:
    """Whether no pixel of an image with an alpha channel, or with a transparent colour or palette, is transparent."""
    if 'transparency' in image.info:
        opening.scale_transparent_level(image, bits)
        return image.convert('RGBA').getchannel('A').getextrema() == (255, 255)
    return image.getchannel('A').getextrema() == (255, 255)
