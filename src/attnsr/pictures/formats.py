"""The kinds of picture files: what each can hold, and how large it can be."""

from dataclasses import dataclass
from pathlib import Path

from attnsr.pictures.opening import PictureError

__all__ = ['FORMATS', 'Format', 'check_fits', 'format_named', 'format_of']


@dataclass(frozen=True)
class Format:
    """What files of a kind can hold, as this package writes them."""

    name: str
    suffixes: tuple[str, ...]
    """Endings of its files' names; the first is the usual one."""
    max_side: int
    """Pixels on a side, at most."""
    depths: tuple[int, ...] = (8,)
    """Bits a channel."""
    grey: bool = True
    """Whether grey takes one channel; else it is stored as RGB."""
    alpha: bool = True
    icc: bool = True
    """Whether it keeps colour profiles."""
    exif: bool = True
    max_bytes: int | None = None
    """Of the pixels as they are stored, at most."""


#: By key. The greatest sides are those of the formats, but of PNG libpng's, which nearly all programs read it with, and
#: of JPEG libjpeg's.
FORMATS = {
    'png': Format('PNG', ('.png',), 1_000_000, depths=(8, 16)),
    'jpg': Format('JPEG', ('.jpg', '.jpeg'), 65_500, alpha=False),
    'webp': Format('WebP', ('.webp',), 16_383, grey=False),
    'tif': Format('TIFF', ('.tif', '.tiff'), 2**31 - 1, depths=(8, 16), exif=False),
    'bmp': Format('BMP', ('.bmp',), 2**31 - 1, icc=False, exif=False, max_bytes=2**32 - 2**12),
}

SYNONYMS = {'jpeg': 'jpg', 'tiff': 'tif'}


def format_named(name: str) -> str:
    """The key in :data:`FORMATS` that a user means, in any case and with or without a dot.

    Raises:
        PictureError: There is no such format; the message lists them.
    """
    key = name.lower().removeprefix('.')
    key = SYNONYMS.get(key, key)
    if key not in FORMATS:
        raise PictureError(f"'{name}' is no format of pictures that can be written; valid: {', '.join(FORMATS)}")
    return key


def format_of(path: Path) -> str:
    """The key in :data:`FORMATS` of a file to be written, by the ending of its name.

    Raises:
        PictureError: It has none of the endings; the message lists them.
    """
    for key, form in FORMATS.items():
        if path.suffix.lower() in form.suffixes:
            return key
    valid = ', '.join(suffix for form in FORMATS.values() for suffix in form.suffixes)
    raise PictureError(f'{path}: the ending of the name must say the format; valid: {valid}')


def stored_channels(key: str, channels: int) -> int:
    """How many channels, of 1 to 4 as in ``Picture.pixels``, a format stores a picture of ``channels`` as."""
    form = FORMATS[key]
    if not form.alpha:
        channels -= channels % 2 == 0
    # BMP files have no grey with alpha either.
    if not form.grey or (key == 'bmp' and channels == 2):
        channels += 2 * (channels < 3)
    return channels


def check_fits(path: Path, key: str, height: int, width: int, channels: int) -> None:
    """Refuse a picture that is too large for its format, before any of it is computed.

    Raises:
        PictureError: The message names the limit and the formats that have a higher one.
    """
    if not (problem := _excess(key, height, width, channels)):
        return
    others = [FORMATS[other].name for other in FORMATS if not _excess(other, height, width, channels)]
    remedy = f'write {" or ".join(others)}' if others else 'cut the picture into parts'
    raise PictureError(f'{path}: would be {width:,} pixels wide and {height:,} high; {problem}; {remedy}')


def _excess(key: str, height: int, width: int, channels: int) -> str:
    form = FORMATS[key]
    if max(height, width) > form.max_side:
        return f'{form.name} files hold {form.max_side:,} on a side at most'
    size = height * width * stored_channels(key, channels)
    if form.max_bytes is not None and size > form.max_bytes:
        return f'{form.name} files hold {form.max_bytes / 1e9:.1f} GB at most, and this takes {size / 1e9:.1f}'
    return ''
