"""Finding, checking and reading the image files that a data set is made of.

What a file may hold, judged by its content and not by its name, and what becomes of it:

=====================================================  ================================================================
RGB or grey, 8 bits a channel                          taken as it is; grey stays one channel
grey of 1, 2 or 4 bits                                 scaled to 8 bits
palette                                                turned into RGB
alpha channel, transparent colour or palette entries   left out where every pixel is opaque, else a problem
orientation in EXIF or TIFF tags                       turned upright, as BasicSR reads it
colour profile (ICC)                                   left out and ignored, as BasicSR does
16 or 32 bits a channel, floating point                a problem
CMYK, YCCK, Lab and all other colours                  a problem: their RGB depends on a profile
animation, several pages                               a problem; previews inside a JPEG file are ignored
empty, truncated, damaged, no image, unreadable        a problem
more than 1 000 000 pixels on a side, 2**30 in all     a problem: OpenCV, and so BasicSR, does not read them
=====================================================  ================================================================

What can be told of damage depends on the kind of file. In PNG files all checksums are compared, those of the chunks
and that of the pixels. JPEG files have none: that data end early is found in each of their segments, but a wrong byte
within mostly leaves other pixels and no sign. BMP, PGM, PPM, TIFF and WebP files are decoded.

PNG files are read by OpenCV, as BasicSR does with those in an LMDB. All others are read by Pillow, to the same pixels:
OpenCV leaves parts of damaged TIFF files black, does not scale PGM and PPM files of other than 255 levels, and has
libjpeg write remarks to the terminal.
"""

import os
import re
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile as PillowImage

from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.parallel import in_order

__all__ = ['EXTENSIONS', 'ImageFile', 'ImageProblem', 'find', 'inspect', 'inspect_all', 'key', 'read']

EXTENSIONS = ('.bmp', '.jpg', '.jpeg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

# libpng's limit on sides, below OpenCV's own of 2**20, and OpenCV's on pixels.
MAX_SIDE = 1_000_000
MAX_PIXELS = 2**30

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# What a decoder must know of. Nothing else is given to libpng, which remarks on odd metadata to the terminal.
PNG_CRITICAL = (b'IHDR', b'PLTE', b'IDAT', b'IEND')
# By colour type: values to a pixel, and the bits that each may have. Types 4 and 6 have an alpha channel.
PNG_GREY, PNG_PALETTE = 0, 3
PNG_CHANNELS = {PNG_GREY: 1, 2: 3, PNG_PALETTE: 1, 4: 2, 6: 4}
PNG_BITS = {PNG_GREY: (1, 2, 4, 8, 16), 2: (8, 16), PNG_PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# First column and row, and the steps between columns and rows, of the seven passes of an interlaced PNG file.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

# The classes are called by themselves: Image.open() would warn of, or refuse, images that are not too large for us.
PILLOW = (
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

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
"""What makes an image upright, by the value of its EXIF orientation; 1 and all others need nothing."""

# Pillow warns of odd metadata, which nothing is read from. The filters belong to the whole process, so that they cannot
# be set around single calls in threads.
warnings.filterwarnings('ignore', module=r'PIL\.')


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
    as_is: bool
    """A PNG file that needs no treatment: BasicSR reads from its bytes exactly what :func:`read` gives."""
    treatment: str
    """What :func:`read` does to the image, such as 'palette turned into RGB'; empty where it does nothing."""


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
    """Find out what a file holds, and that :func:`read` can give the whole of it. Reads it, and mostly decodes nothing.

    Raises:
        ImageProblem: The image cannot be used, for one of the reasons in the table above.
    """
    data = _bytes(path)
    if data.startswith(PNG_SIGNATURE):
        height, width, channels, treatments = _inspect_png(path, data)
    else:
        height, width, channels, treatments = _inspect_other(path, data)
    as_is = data.startswith(PNG_SIGNATURE) and not treatments
    return ImageFile(path, height, width, channels, len(data), as_is, ', '.join(treatments))


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
        ImageProblem: The file is not the one that was inspected any more, or cannot be read any more.
    """
    data = _bytes(file.path)
    if len(data) == file.bytes:
        image = (_read_png if data.startswith(PNG_SIGNATURE) else _read_other)(file.path, data)
        if image.shape == ((file.height, file.width, 3) if file.channels == 3 else (file.height, file.width)):
            return np.ascontiguousarray(image)
    raise ImageProblem(f'{file.path}: has changed since it was inspected; run again when nothing writes to it')


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


def _transparent(path: Path) -> ImageProblem:
    return ImageProblem(f'{path}: has transparent pixels; flatten it onto a background first')


def _check_bits(path: Path, bits: int) -> None:
    if bits > 8:
        raise ImageProblem(f'{path}: has {bits} bits a channel; convert it to 8')


def _check_size(path: Path, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ImageProblem(
            f'{path}: is {width} pixels wide and {height} high, more than OpenCV reads '
            f'({MAX_SIDE:,} on a side, {MAX_PIXELS:,} in all); cut it into parts'
        )


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 where they have none that can be read: they say nothing of the pixels."""
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        value = parsed.get(0x0112)
    except Exception:  # of many classes: whatever the parsing of damaged data runs into
        return 1
    return value if value in TURNS else 1


def _treatments(palette: bool, grey_bits: int, alpha: bool, turned: bool, profile: bool) -> list[str]:
    """What reading does to an image, in a few words each."""
    applied = {
        'palette turned into RGB': palette,
        f'{grey_bits}-bit grey scaled to 8 bits': grey_bits < 8,
        'opaque alpha channel left out': alpha,
        'turned upright by its orientation tag': turned,
        'colour profile left out': profile,
    }
    return [treatment for treatment, applies in applied.items() if applies]


# PNG files


@dataclass(frozen=True)
class _Png:
    """A PNG file whose chunks are whole."""

    width: int
    height: int
    bits: int
    colour: int
    interlaced: bool
    chunks: list[tuple[bytes, memoryview]]
    """Type, and the whole chunk with length, type and checksum."""

    def body(self, kind: bytes) -> bytes:
        """What the first chunk of a type holds; nothing where there is none."""
        return next((bytes(chunk[8:-4]) for each, chunk in self.chunks if each == kind), b'')

    def decode(self, flags: int, *more: bytes) -> np.ndarray | None:
        """The image as OpenCV gives it, not turned, from what the pixels are made from and chunks of more types."""
        kinds = {b'IHDR', b'IDAT', b'IEND', *([b'PLTE'] if self.colour == PNG_PALETTE else []), *more}
        data = b''.join([PNG_SIGNATURE, *(chunk for kind, chunk in self.chunks if kind in kinds)])
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)


def _png(path: Path, data: bytes) -> _Png:
    """Take a PNG file apart; refuses what has a wrong checksum, is not complete or not allowed."""
    chunks = list(_chunks(path, data))
    kinds = [kind for kind, _ in chunks]
    header = chunks[0][1][8:-4]
    if kinds[0] != b'IHDR' or len(header) != 13:
        raise _broken(path, 'is damaged: it has no PNG header')
    width, height, bits, colour, compression, filtering, interlace = struct.unpack('>IIBBBBB', header)
    allowed = bits in PNG_BITS.get(colour, ()) and compression == filtering == 0 and interlace <= 1
    if not width or not height or not allowed:
        raise _broken(path, 'is damaged: its PNG header has impossible values')
    for kind in kinds:
        if kind not in PNG_CRITICAL and chr(kind[0]).isupper():
            raise ImageProblem(f'{path}: is of an unknown kind of PNG (chunk {kind.decode()}); save it as a plain one')
    png = _Png(width, height, bits, colour, interlace == 1, chunks)
    if colour == PNG_PALETTE and not 0 < len(png.body(b'PLTE')) <= 3 * 2**bits:
        raise _broken(path, 'is damaged: its palette is missing or too long')
    return png


def _chunks(path: Path, data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Type and bytes of each chunk up to IEND; what follows that is no part of the image."""
    view = memoryview(data)
    start = len(PNG_SIGNATURE)
    kind = b''
    while kind != b'IEND':
        end = start + 12 + int.from_bytes(view[start : start + 4], 'big')
        if end > len(data):
            raise _broken(path, 'is truncated')
        kind = data[start + 4 : start + 8]
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], 'big') or not kind.isalpha():
            raise _broken(path, f'is damaged: a checksum is wrong, {start:,} bytes from its start')
        yield kind, view[start:end]
        start = end


def _inspect_png(path: Path, data: bytes) -> tuple[int, int, int, list[str]]:
    png = _png(path, data)
    _check_bits(path, png.bits)
    _check_size(path, png.height, png.width)
    kinds = {kind for kind, _ in png.chunks}
    if b'acTL' in kinds:
        raise ImageProblem(f'{path}: is an animation; save the frame that is wanted as a file of its own')
    _check_pixels(path, png)
    alpha = png.colour >= 4 or b'tRNS' in kinds
    if alpha:
        _check_opaque(path, png)
    orientation = _orientation(png.body(b'eXIf'))
    treatments = _treatments(
        palette=png.colour == PNG_PALETTE,
        grey_bits=png.bits if png.colour == PNG_GREY else 8,
        alpha=alpha,
        turned=orientation > 1,
        profile=not kinds.isdisjoint({b'iCCP', b'cICP'}),
    )
    height, width = (png.width, png.height) if orientation >= 5 else (png.height, png.width)
    return height, width, 1 if png.colour in (PNG_GREY, 4) else 3, treatments


def _check_pixels(path: Path, png: _Png) -> None:
    """Inflate all pixels, in little memory: as many as the header says, rightly filtered, and their checksum right."""
    filters, expected = _filter_positions(png)
    kinds = [kind for kind, _ in png.chunks]
    parts = [chunk[8:-4] for kind, chunk in png.chunks if kind == b'IDAT']
    if not parts or set(kinds[kinds.index(b'IDAT') :][: len(parts)]) != {b'IDAT'}:
        raise _broken(path, 'is damaged: its pixels are missing or interrupted')
    inflater = zlib.decompressobj()
    held = 0

    def check(pixels: bytes) -> None:
        nonlocal held
        first, last = np.searchsorted(filters, (held, held + len(pixels)))
        held += len(pixels)
        if held > expected:
            raise _broken(path, 'is damaged: it holds more pixels than it should')
        if (np.frombuffer(pixels, np.uint8)[filters[first:last] - held + len(pixels)] > 4).any():
            raise _broken(path, 'is damaged: its pixels are filtered in an unknown way')

    try:
        for part in parts:
            for start in range(0, len(part), 2**16):
                piece: bytes | memoryview = part[start : start + 2**16]
                while piece:
                    check(inflater.decompress(piece, 2**20))
                    piece = inflater.unconsumed_tail
        check(inflater.flush())
    except zlib.error as error:
        raise _broken(path, 'is damaged: its pixels cannot be inflated') from error
    if not inflater.eof or held < expected:
        raise _broken(path, 'is truncated: its pixels end early')
    if inflater.unused_data:
        raise _broken(path, 'is damaged: it holds more pixels than it should')


def _filter_positions(png: _Png) -> tuple[np.ndarray, int]:
    """Where in the inflated pixels the byte stands that names a row's filter, 0 to 4; and how many bytes there are."""
    positions, end = [], 0
    for left, top, across, down in ADAM7 if png.interlaced else ((0, 0, 1, 1),):
        columns, rows = len(range(left, png.width, across)), len(range(top, png.height, down))
        if columns:
            row = 1 + (columns * png.bits * PNG_CHANNELS[png.colour] + 7) // 8
            positions.append(end + row * np.arange(rows))
            end += row * rows
    return np.concatenate(positions), end


def _check_opaque(path: Path, png: _Png) -> None:
    """Refuse a PNG file with an alpha channel, or a transparent colour or palette, that is of use."""
    if png.colour == PNG_GREY:  # OpenCV does not give the transparency of these
        image = png.decode(cv2.IMREAD_GRAYSCALE)
        level = int.from_bytes(png.body(b'tRNS'), 'big') * 255 // (2**png.bits - 1)
        transparent = image is not None and bool((image == level).any())
    else:
        image = png.decode(cv2.IMREAD_UNCHANGED, *([b'tRNS'] if png.colour < 4 else []))
        transparent = image is not None and image.shape[2] == 4 and int(image[..., 3].min()) < 255
    if image is None:
        raise _broken(path, 'is damaged: it cannot be decoded')
    if transparent:
        raise _transparent(path)


def _read_png(path: Path, data: bytes) -> np.ndarray:
    png = _png(path, data)
    image = png.decode(cv2.IMREAD_GRAYSCALE if png.colour in (PNG_GREY, 4) else cv2.IMREAD_COLOR)
    if image is None:
        raise _broken(path, 'is damaged: it cannot be decoded')
    return _turned(image, _orientation(png.body(b'eXIf')))


# All other files


def _opened(path: Path, data: bytes) -> PillowImage:
    """What a file is by its header, not decoded; refuses what is of a kind that cannot be used."""
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
    _check_bits(path, bits)
    _check_size(path, image.height, image.width)
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ImageProblem(f'{path}: has {image.mode} colours, whose RGB depends on a profile; convert it to RGB')
    return image


def _bits(image: PillowImage) -> int:
    """Bits a channel; 8 where there are fewer."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(8, *image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if isinstance(image, PpmImagePlugin.PpmImageFile):
        decoder, *_, arguments = image.tile[0]
        # Decoders that scale are told of the highest value. Without one there are 8 bits, or 16 of mode I.
        scaled = decoder.startswith('ppm') and isinstance(arguments, tuple) and arguments[1] > 255
        return 16 if scaled or image.mode == 'I' else 8
    return 8


def _inspect_other(path: Path, data: bytes) -> tuple[int, int, int, list[str]]:
    image = _opened(path, data)
    orientation = _orientation(image.info.get('exif', b''))
    alpha = image.mode in ('LA', 'PA', 'RGBA')
    treatments = _treatments(
        palette=image.mode in ('P', 'PA'),
        grey_bits=1 if image.mode == '1' else 8,
        alpha=alpha,
        turned=orientation > 1 or _turned_by_pillow(image),
        profile='icc_profile' in image.info,
    )
    if not _is_whole(path, data, image):
        raise _broken(path, 'is truncated or damaged')
    if alpha and image.getchannel('A').getextrema() != (255, 255):
        raise _transparent(path)
    height, width = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    return height, width, 1 if image.mode in GREY_MODES else 3, treatments


def _turned_by_pillow(image: PillowImage) -> bool:
    """Whether decoding will turn the image upright, which Pillow does for TIFF files alone."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(0x0112) in TURNS


def _is_whole(path: Path, data: bytes, image: PillowImage) -> bool:
    """Whether all pixels are there, as far as can be told. Decodes the image, unless it is a JPEG file."""
    try:
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            return _reduced(data) == _reduced(_refilled(data))
        if image.tile and image.tile[0][0] == 'libtiff' and not _libtiff_decodes(data):
            return False
        image.load()
    except Image.DecompressionBombError as error:
        raise ImageProblem(f'{path}: is larger than Pillow reads of this kind; save it as a PNG file') from error
    except Exception:  # of many classes: whatever the decoding runs into
        return False
    return True


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
    raise ValueError(
        'there is no marker at the end'
    )  # Pillow would do without if zeros follow, as in a broken download


def _libtiff_decodes(tiff: bytes) -> bool:
    """Whether libtiff decodes a file without a remark; in a process apart, as it writes remarks to the terminal."""
    script = 'import io, sys; from PIL import TiffImagePlugin as tiff\n'
    script += 'tiff.TiffImageFile(io.BytesIO(sys.stdin.buffer.read())).load()'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], input=tiff, capture_output=True, check=False)
    return done.returncode == 0 and not done.stderr


def _read_other(path: Path, data: bytes) -> np.ndarray:
    image = _opened(path, data)
    mode = 'L' if image.mode in GREY_MODES else 'RGB'
    try:
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # of many classes: whatever the decoding runs into
        raise _broken(path, 'is truncated or damaged') from error
    if mode == 'RGB':
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return _turned(pixels, _orientation(image.info.get('exif', b'')))


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    return TURNS[orientation](image) if orientation in TURNS else image
