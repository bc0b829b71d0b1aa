"""What a picture file says of its pixels: colour profile, resolution, EXIF data.

EXIF data are edited where they lie and not written anew: makers' notes in them point to places that must not move.
"""

import struct
from dataclasses import dataclass, replace
from fractions import Fraction

from attnsr.pictures.opening import exif_orientation

__all__ = ['Metadata', 'exif_resolution', 'resized', 'tidied', 'with_resolution']

# Tags of TIFF and EXIF directories.
WIDTH, HEIGHT = 0x0100, 0x0101
ORIENTATION = 0x0112
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
THUMBNAIL, THUMBNAIL_LENGTH = 0x0201, 0x0202
EXIF_DIRECTORY = 0x8769
EXIF_WIDTH, EXIF_HEIGHT = 0xA002, 0xA003

INCH, CENTIMETRE = 2, 3
SHORT, LONG, RATIONAL = 3, 4, 5


@dataclass(frozen=True)
class Metadata:
    """What is kept of a file beside its pixels."""

    icc: bytes | None = None
    """Colour profile, as it is in the file."""
    resolution: tuple[float, float] | None = None
    """Dots per inch, horizontally and vertically, of the upright picture."""
    exif: bytes | None = None
    """EXIF data, beginning with their byte order, of an upright picture and without thumbnail."""
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    """Kind and body of the chunks by which a PNG file says what its numbers mean, where it has no profile: sRGB, gAMA,
    cHRM, cICP."""

    @property
    def colour_space(self) -> str | None:
        """'RGB', 'GRAY' or the like, that the profile is for."""
        return self.icc[16:20].decode('latin-1').strip() if self.icc and len(self.icc) >= 128 else None

    def upright(self, orientation: int) -> 'Metadata':
        """Those of the picture when it has been turned by its orientation."""
        if self.resolution is None or orientation < 5:
            return self
        return replace(self, resolution=self.resolution[::-1])


class _Directory:
    """One directory of EXIF data: where its entries lie.

    Raises:
        struct.error, ValueError: There is none at this place.
    """

    def __init__(self, exif: bytes, offset: int | None = None) -> None:
        order = {b'II': '<', b'MM': '>'}.get(exif[:2])
        if order is None:
            raise ValueError('EXIF data begin with their byte order')
        self.exif, self.order = exif, order
        self.offset = offset if offset is not None else self.number('I', 4)
        count = self.number('H', self.offset)
        self.entries: dict[int, int] = {}
        for position in range(self.offset + 2, self.offset + 2 + 12 * count, 12):
            self.entries.setdefault(self.number('H', position), position)
        self.next = self.offset + 2 + 12 * count
        """Where the offset of the next directory lies."""
        self.number('I', self.next)

    def number(self, kind: str, position: int) -> int:
        return struct.unpack_from(f'{self.order}{kind}', self.exif, position)[0]

    def value(self, tag: int) -> int | None:
        """A whole number that lies in the entry itself."""
        position = self.entries.get(tag)
        if position is None:
            return None
        kind = self.number('H', position + 2)
        return self.number('H', position + 8) if kind == SHORT else self.number('I', position + 8)

    def fraction(self, tag: int) -> float | None:
        position = self.entries.get(tag)
        if position is None or self.number('H', position + 2) != RATIONAL:
            return None
        place = self.number('I', position + 8)
        divisor = self.number('I', place + 4)
        return self.number('I', place) / divisor if divisor else None

    def entry(self, tag: int, kind: int, value: int) -> bytes:
        """An entry of one value; of a fraction, ``value`` is its place."""
        filler = 'H' if kind == SHORT else ''
        return struct.pack(
            f'{self.order}HHI{"H" if kind == SHORT else "I"}{filler}', tag, kind, 1, value, *([0] if filler else [])
        )


def without_prefix(exif: bytes) -> bytes:
    """EXIF data as they are in JPEG files, without what they begin with there."""
    while exif.startswith(b'Exif\0\0'):
        exif = exif[6:]
    return exif


def tidied(exif: bytes | None) -> bytes | None:
    """EXIF data of the upright picture: with a reset orientation, and without the thumbnail of the picture before.

    None where they make no sense: some program might find an orientation in them all the same.
    """
    if not exif:
        return None
    tidy = bytearray(without_prefix(exif))
    try:
        directory = _Directory(bytes(tidy))
        if (position := directory.entries.get(ORIENTATION)) is not None:
            tidy[position : position + 12] = directory.entry(ORIENTATION, SHORT, 1)
        if following := directory.number('I', directory.next):
            tidy[directory.next : directory.next + 4] = bytes(4)
            previews = _Directory(bytes(tidy), following)
            start, length = previews.value(THUMBNAIL), previews.value(THUMBNAIL_LENGTH)
            # What lies behind it has to stay where it is.
            if start is not None and length is not None and start > previews.next and start + length >= len(tidy) - 3:
                del tidy[start:]
    except (struct.error, ValueError):
        return None
    return bytes(tidy) if exif_orientation(bytes(tidy)) == 1 else None


def resized(exif: bytes, height: int, width: int) -> bytes:
    """EXIF data of the same picture at another size: what of them is the size."""
    result = bytearray(exif)
    try:
        directory = _Directory(exif)
        directories = [directory]
        if (offset := directory.value(EXIF_DIRECTORY)) is not None:
            directories.append(_Directory(exif, offset))
        for found in directories:
            for tag, size in [(WIDTH, width), (HEIGHT, height), (EXIF_WIDTH, width), (EXIF_HEIGHT, height)]:
                if (position := found.entries.get(tag)) is not None:
                    result[position : position + 12] = found.entry(tag, LONG, size)
    except (struct.error, ValueError):  # the part of them that has the size makes no sense to any program
        return exif
    return bytes(result)


def exif_resolution(exif: bytes | None) -> tuple[float, float] | None:
    """Dots per inch, horizontally and vertically, where EXIF data have them."""
    try:
        directory = _Directory(without_prefix(exif or b''))
        x, y = directory.fraction(X_RESOLUTION), directory.fraction(Y_RESOLUTION)
        unit = directory.value(RESOLUTION_UNIT)
    except (struct.error, ValueError):
        return None
    return in_inches(x, y, INCH if unit is None else unit)


def in_inches(x: float | None, y: float | None, unit: int) -> tuple[float, float] | None:
    """Dots per inch of a resolution in a unit of TIFF's, None if it is no resolution."""
    if not x or not y or unit not in (INCH, CENTIMETRE):
        return None
    return (x, y) if unit == INCH else (2.54 * x, 2.54 * y)


def rational(value: float) -> tuple[int, int]:
    """Numerator and denominator, below 2**32, of a positive number below 2**32."""
    fraction = Fraction(value).limit_denominator(10**4)
    return (fraction.numerator, fraction.denominator) if fraction.numerator < 2**32 else (round(value), 1)


def with_resolution(exif: bytes | None, resolution: tuple[float, float]) -> bytes:
    """EXIF data that have this resolution and, if there are any, all that is in ``exif``.

    The first directory is written anew behind the data, which stay in their places.
    """
    exif = exif or b'MM\0*\0\0\0\x08' + bytes(6)
    directory = _Directory(exif)
    exif += bytes(len(exif) % 2)
    place = len(exif)
    entries = {tag: exif[position : position + 12] for tag, position in directory.entries.items()}
    entries[X_RESOLUTION] = directory.entry(X_RESOLUTION, RATIONAL, place)
    entries[Y_RESOLUTION] = directory.entry(Y_RESOLUTION, RATIONAL, place + 8)
    entries[RESOLUTION_UNIT] = directory.entry(RESOLUTION_UNIT, SHORT, INCH)
    order = directory.order
    return b''.join(
        [
            exif[:4],
            struct.pack(f'{order}I', place + 16),
            exif[8:],
            *(struct.pack(f'{order}II', *rational(value)) for value in resolution),
            struct.pack(f'{order}H', len(entries)),
            *(entries[tag] for tag in sorted(entries)),
            bytes(4),
        ]
    )
