"""Opening image files by what they hold, whatever their name, and finding out whether all of it is there.

The preparation of data sets opens its files here too.
"""

import contextlib
import re
import stat
import threading
import warnings
from collections.abc import Collection, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

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

from attnsr.errors import UsageError

__all__ = [
    'COLOUR_MODES',
    'GREY_MODES',
    'PictureError',
    'TURNS',
    'bits',
    'broken',
    'check_whole',
    'exif_orientation',
    'file_bytes',
    'has_alpha',
    'kind_of',
    'not_understood',
    'open_image',
    'scale_transparent_level',
    'several',
    'too_large',
    'without_size_limit',
]

# The last chunk of every PNG file, whole.
PNG_END = b'\0\0\0\0IEND\xaeB`\x82'

# The classes are called by themselves: Image.open() would warn of, or refuse, images that are not too large for us.
PILLOW = {
    'BMP': (b'BM', BmpImagePlugin.BmpImageFile),
    'JPEG': (b'\xff\xd8\xff', JpegImagePlugin.JpegImageFile),
    'PGM': (b'P[25][\\s#]', PpmImagePlugin.PpmImageFile),
    'PNG': (b'\x89PNG\r\n\x1a\n', PngImagePlugin.PngImageFile),
    'PPM': (b'P[1346][\\s#]', PpmImagePlugin.PpmImageFile),
    'TIFF': (b'II[*+]\0|MM\0[*+]', TiffImagePlugin.TiffImageFile),
    'WebP': (b'(?s)RIFF....WEBP', WebPImagePlugin.WebPImageFile),
}
GREY_MODES = ('1', 'L', 'LA')
COLOUR_MODES = ('P', 'PA', 'RGB', 'RGBA')

# Any bytes without a marker (0xFF) that are not taken for a run of zeros.
FILLER = bytes(range(37, 229, 3))

#: What makes an image upright, by the value of its EXIF orientation; 1 and all others need nothing.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_size_limit = threading.Lock()
_users_without_size_limit = 0
_found_size_limit: int | None = None


class PictureError(UsageError):
    """One picture file that cannot be used or written; the message names it, what is wrong and what would be right."""


def broken(path: Path, how: str) -> PictureError:
    """The error for a file that lacks something."""
    return PictureError(f'{path}: {how}; copy or download it again')


def too_large(path: Path) -> PictureError:
    """The error for a file that memory does not suffice for."""
    return PictureError(f'{path}: is too large for the memory that is free; cut it into parts')


def several(path: Path, images: int) -> PictureError:
    """The error for an animation, or a file of several pages."""
    return PictureError(f'{path}: holds {images} images; save the one that is wanted as a file of its own')


def not_understood(path: Path, reason: object) -> PictureError:
    """The error for a file whose header makes no sense."""
    return PictureError(
        f'{path}: cannot be understood ({reason}); copy or download it again, or save it as an 8-bit PNG file'
    )


def file_bytes(path: Path) -> bytes:
    """The content of a file that may not be there, not be a file, or not be readable.

    Raises:
        PictureError: It is so, or the file is empty.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise PictureError(f'{path}: is a folder with the name of an image file; rename it, or move it away')
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise PictureError(f'{path}: is not a regular file; move it away')
        data = path.read_bytes()
    except OSError as error:
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            raise PictureError(f'{path}: is a link to a file that is not there; mend or remove it') from error
        raise PictureError(f'{path}: cannot be read: {error.strerror}; make it readable, or move it away') from error
    if not data:
        raise broken(path, 'is empty')
    return data


def exif_orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 where they have none that can be read: they say nothing of the pixels."""
    parsed = Image.Exif()
    try:
        parsed.load(exif)
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


@contextlib.contextmanager
def without_size_limit() -> Iterator[None]:
    """Have Pillow take images of any size. Its limit belongs to the whole process, and is back after the last user."""
    global _users_without_size_limit, _found_size_limit
    with _size_limit:
        if not _users_without_size_limit:
            _found_size_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _users_without_size_limit += 1
    try:
        yield
    finally:
        with _size_limit:
            _users_without_size_limit -= 1
            if not _users_without_size_limit:
                Image.MAX_IMAGE_PIXELS = _found_size_limit


def kind_of(path: Path, data: bytes, kinds: Collection[str] = PILLOW.keys()) -> str:
    """Which of ``kinds``, keys of :data:`PILLOW`, a file is by its first bytes.

    Raises:
        PictureError: It is none of them.
    """
    for kind in kinds:
        if re.match(PILLOW[kind][0], data):
            return kind
    *names, last = sorted(kinds, key=str.lower)
    raise PictureError(f'{path}: is no {", ".join(names)} or {last} image; save it as one of them')


def open_image(path: Path, data: bytes, kind: str) -> tuple[PillowImage, int]:
    """What a file of a kind is by its header, not decoded, and its bits a channel.

    Raises:
        PictureError: The header makes no sense, or the file holds several images.
    """
    _silence_pillow()
    try:
        image = PILLOW[kind][1](BytesIO(data))
        frames, depth = getattr(image, 'n_frames', 1), bits(image)
    except Exception as error:  # of many classes: whatever the parsing runs into
        raise not_understood(path, error) from error
    if frames > 1:
        raise several(path, frames)
    return image, depth


def bits(image: PillowImage) -> int:
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


def has_alpha(image: PillowImage) -> bool:
    """Whether an image has an alpha channel, or a transparent colour or palette entries."""
    # A str would be a comment of that name.
    return image.mode in ('LA', 'La', 'PA', 'RGBA') or isinstance(image.info.get('transparency'), int | tuple | bytes)


def scale_transparent_level(image: PillowImage, depth: int) -> None:
    """Scale the level of grey that is transparent, if there is one, as Pillow scales the pixels, to 8 bits."""
    if image.mode == 'L' and isinstance(image.info.get('transparency'), int):
        image.info['transparency'] *= 255 // (2**depth - 1)


def check_whole(path: Path, data: bytes, image: PillowImage) -> None:
    """Refuse an image of which pixels are missing or wrong, as far as can be told. Decodes it, unless a JPEG file.

    Raises:
        PictureError: It is so.
    """
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
        raise PictureError(f'{path}: is larger than Pillow reads of this kind; save it as a PNG file') from error
    except MemoryError as error:
        raise too_large(path) from error
    except Exception as error:  # of many classes: whatever the decoding runs into
        raise broken(path, 'is truncated or damaged') from error
    if not whole:
        raise broken(path, 'is truncated or damaged')


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
