"""Reading picture files: whole, upright, with all their bits.

Judged by its content and not by its name, a file may be PNG, JPEG, WebP, TIFF or BMP, and hold:

===================================================  ==================================================================
grey or RGB of 8 or 16 bits, with alpha or without   taken as it is; an alpha channel stays, opaque or not
grey of 1, 2 or 4 bits                               scaled to 8 bits
palette                                              turned into RGB, with alpha where it has transparent entries
transparent colour                                   turned into alpha
alpha multiplied into the colours (TIFF)             divided out again
orientation in EXIF or TIFF tags                     turned upright
colour profile (ICC), resolution, EXIF data          kept, see :mod:`attnsr.pictures.metadata`
other numbers of bits, signed or floating point      an error
CMYK, YCCK, Lab and all other colours                an error: their RGB depends on a profile
animation, several pages                             an error; previews inside a JPEG file are ignored
empty, truncated, damaged, no picture, unreadable    an error
more pixels than free memory can hold                an error
===================================================  ==================================================================

8 bits are read by Pillow. 16 bits are read from PNG files by OpenCV, as Pillow knows no 16-bit RGB, and from TIFF files
as :mod:`attnsr.pictures.tiff` says.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import BmpImagePlugin
from PIL.ImageFile import ImageFile as PillowImage

from attnsr.memory import free_memory
from attnsr.pictures import opening, png, tiff
from attnsr.pictures.metadata import CENTIMETRE, INCH, Metadata, exif_resolution, in_inches, tidied
from attnsr.pictures.opening import PictureError

__all__ = ['Picture', 'header', 'memory_needed', 'read']

KINDS = {'BMP': 'bmp', 'JPEG': 'jpg', 'PNG': 'png', 'TIFF': 'tif', 'WebP': 'webp'}
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
GREY_MODES = (*opening.GREY_MODES, 'La')

# OpenCV's limit, for 16-bit PNG files.
OPENCV_PIXELS = 2**30

# Pixels go through Pillow's and OpenCV's hands in bands of so many bytes, so that there are not three copies of all.
BAND_BYTES = 2**22


@dataclass(frozen=True)
class Picture:
    """A picture as it is in a file."""

    pixels: np.ndarray
    """uint8 or uint16 (height, width, channels), C-contiguous, upright; one channel for grey, two for grey and alpha,
    three for RGB, four for RGB and alpha."""
    format: str
    """Key in ``FORMATS`` of the file."""
    metadata: Metadata


@dataclass(frozen=True)
class _Source:
    """What a file holds, before it is decoded."""

    format: str
    stored: tuple[int, int]
    """Width and height in the file."""
    channels: int
    dtype: type[np.uint8] | type[np.uint16]
    orientation: int
    metadata: Metadata
    decode: Callable[[], np.ndarray]
    turns: bool = False
    """Whether :attr:`decode` gives upright pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        width, height = self.stored
        return (width, height) if self.orientation >= 5 else (height, width)

    @property
    def memory(self) -> int:
        """Bytes that decoding takes at most."""
        # Pillow's copy has four bytes a pixel at most, and libwebp has two more; turning needs a second one of ours.
        others = 12 if self.format == 'webp' else 4
        copies = 2 if self.dtype is np.uint16 or self.orientation > 1 else 1
        return math.prod(self.stored) * (others + copies * self.channels * self.dtype().itemsize)


def read(path: Path) -> Picture:
    """Read a picture file.

    Raises:
        PictureError: It cannot be used, for one of the reasons in the table above.
    """
    with opening.without_size_limit():
        source = _open(path)
        _check_memory(path, source)
        try:
            pixels = source.decode()
            if not source.turns:
                pixels = _upright(pixels, source.orientation)
        except MemoryError as error:
            raise opening.too_large(path) from error
    return Picture(pixels, source.format, source.metadata.upright(source.orientation))


def header(path: Path) -> tuple[int, int, int]:
    """Height, width and channels of the pixels that :func:`read` gives, without decoding them.

    Raises:
        PictureError: As :func:`read`, but for what only decoding shows.
    """
    with opening.without_size_limit():
        source = _open(path)
        _check_memory(path, source)
    return *source.size, source.channels


def memory_needed(path: Path) -> int:
    """How many bytes of memory :func:`read` takes at most, whether they are free or not.

    Raises:
        PictureError: As :func:`header`.
    """
    with opening.without_size_limit():
        return _open(path).memory


def _open(path: Path) -> _Source:
    """Find out what a file holds, and that it can be decoded."""
    try:
        data = opening.file_bytes(path)
        kind = opening.kind_of(path, data, KINDS)
        source = _open_tiff(path, data) if kind == 'TIFF' else _open_other(path, data, kind)
    except MemoryError as error:
        raise opening.too_large(path) from error
    return source


def _open_other(path: Path, data: bytes, kind: str) -> _Source:
    image, bits = opening.open_image(path, data, kind)
    chunks = png.chunks(data) if kind == 'PNG' else {}
    exif = chunks.get(b'eXIf', image.info.get('exif'))  # Pillow does not see yet what follows the pixels
    orientation = opening.exif_orientation(exif or b'')
    metadata = Metadata(
        icc=image.info.get('icc_profile') or None,
        resolution=_resolution(image, chunks) or exif_resolution(exif),
        exif=tidied(exif),
        png_colour=tuple((name, chunks[name]) for name in png.COLOUR_CHUNKS if name in chunks),
    )
    if chunks and bits == 16:
        channels = png.CHANNELS[chunks[b'IHDR'][9]] + (b'tRNS' in chunks)
        decode = partial(_decode_png16, path, data, image, channels)
        return _Source('png', image.size, channels, np.uint16, orientation, metadata, decode)
    channels = _channels(path, image, bits)
    decode = partial(_decode, path, data, image, bits, channels)
    return _Source(KINDS[kind], image.size, channels, np.uint8, orientation, metadata, decode)


def _open_tiff(path: Path, data: bytes) -> _Source:
    directory = tiff.read_directory(path, data)
    orientation = directory.first(tiff.ORIENTATION, 1)
    orientation = orientation if orientation in opening.TURNS else 1
    metadata = Metadata(icc=directory.icc, resolution=directory.resolution)
    size = directory.first(tiff.WIDTH, 0), directory.first(tiff.HEIGHT, 0)
    if set(directory.bits) == {16}:
        sixteen = tiff.SixteenBits(path, data, directory)
        return _Source('tif', size, sixteen.channels, np.uint16, orientation, metadata, sixteen.decode)
    _check_bits(path, max(directory.bits))  # of some, Pillow says no more than that it does not know them
    image, bits = opening.open_image(path, data, 'TIFF')
    channels = _channels(path, image, bits)
    decode = partial(_decode, path, data, image, bits, channels)
    return _Source('tif', size, channels, np.uint8, orientation, metadata, decode, turns=True)


def _check_bits(path: Path, bits: int) -> None:
    if bits > 8:
        raise PictureError(f'{path}: has {bits} bits a channel; convert it to 8 or 16')


def _channels(path: Path, image: PillowImage, bits: int) -> int:
    """Of the pixels of an image that Pillow decodes, of no more than 8 bits; refuses colours that cannot be used."""
    _check_bits(path, bits)
    if image.mode not in GREY_MODES + opening.COLOUR_MODES:
        raise PictureError(f'{path}: has {image.mode} colours, whose RGB depends on a profile; convert it to RGB')
    return (1 if image.mode in GREY_MODES else 3) + opening.has_alpha(image)


def _resolution(image: PillowImage, chunks: Mapping[bytes, bytes]) -> tuple[float, float] | None:
    """Dots per inch, horizontally and vertically, that a file of another format than TIFF has outside its EXIF data."""
    if len(chunks.get(b'pHYs', b'')) == 9:
        x, y, per_metre = struct.unpack('>IIB', chunks[b'pHYs'])
        return in_inches(x / 100, y / 100, CENTIMETRE if per_metre == 1 else 0)
    if 'jfif_density' in image.info:
        x, y = image.info['jfif_density']
        return in_inches(x, y, {1: INCH, 2: CENTIMETRE}.get(image.info.get('jfif_unit', 0), 0))
    if isinstance(image, BmpImagePlugin.BmpImageFile):
        x, y = image.info.get('dpi', (0, 0))
        return in_inches(x, y, INCH)
    return None


def _check_memory(path: Path, source: _Source) -> None:
    """Refuse what would end the process for want of memory, or keep the machine busy with swapping."""
    height, width = source.size
    if (needed := source.memory) > (free := free_memory(torch.device('cpu'))):
        raise PictureError(
            f'{path}: is {width:,} pixels wide and {height:,} high; reading it takes {needed / 2**30:,.1f} GiB of '
            f'memory, and {free / 2**30:,.1f} are free; cut it into parts'
        )


def _decode(path: Path, data: bytes, image: PillowImage, bits: int, channels: int) -> np.ndarray:
    """The pixels of an image of no more than 8 bits."""
    opening.check_whole(path, data, image)
    opening.scale_transparent_level(image, bits)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # of many classes: whatever the decoding runs into
        raise opening.broken(path, 'is truncated or damaged') from error
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top, bottom in bands(image.height, 4 * image.width):
        part = image.crop((0, top, image.width, bottom))
        if channels == 2 and part.mode not in ('LA', 'La'):
            # A transparent level: Pillow makes alpha of it for RGB in all its versions.
            pixels[top:bottom] = np.asarray(part.convert('RGBA'))[..., [0, 3]]
        else:
            pixels[top:bottom] = np.asarray(part.convert(MODES[channels])).reshape(bottom - top, -1, channels)
    return pixels


def _decode_png16(path: Path, data: bytes, image: PillowImage, channels: int) -> np.ndarray:
    """The pixels of a PNG file of 16 bits a channel."""
    if image.width * image.height > OPENCV_PIXELS:
        raise PictureError(
            f'{path}: is {image.width:,} pixels wide and {image.height:,} high, more than OpenCV reads with 16 bits '
            f'({OPENCV_PIXELS:,} pixels); cut it into parts, or save it as a TIFF file'
        )
    opening.check_whole(path, data, image)
    transparent = png.chunks(data).get(b'tRNS')
    # Nothing but the pixels: OpenCV would make alpha of a transparent colour, and have libpng write remarks on others.
    try:
        decoded = cv2.imdecode(np.frombuffer(png.pixels_only(data), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise MemoryError from error  # all else that is wrong has been found before
    if decoded is None or decoded.dtype != np.uint16:
        raise opening.broken(path, 'is damaged: OpenCV cannot decode it')
    decoded = decoded.reshape(image.height, image.width, -1)
    grey = channels < 3
    colours = [0] if grey else [2, 1, 0]
    pixels = np.empty((image.height, image.width, channels), np.uint16)
    for top, bottom in bands(image.height, 8 * image.width):
        part = decoded[top:bottom]
        pixels[top:bottom, :, : len(colours)] = part[..., colours]
        if transparent is not None:
            level = np.frombuffer(transparent, '>u2')[: len(colours)]
            pixels[top:bottom, :, -1] = 65535 * (part[..., colours] != level).any(axis=2)
        elif channels > len(colours):
            pixels[top:bottom, :, -1] = part[..., 3]
    return pixels


def bands(height: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First row, and the one behind the last, of bands of a picture."""
    rows = max(1, BAND_BYTES // max(1, row_bytes))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The upright pixels of an image with an EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
