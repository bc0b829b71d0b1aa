"""TIFF files: their directories, 16-bit pixels, and writing them strip by strip.

None of the libraries at hand reads all kinds of 16-bit pictures: Pillow gives 8 bits, OpenCV mixes up the channels of
files that store them one after the other, tifffile knows no LZW. So they are read as what they are as well, 8-bit grey
pictures of their bytes, by Pillow, whose libtiff undoes all compressions and says if data are damaged.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import TiffImagePlugin

from attnsr.pictures import metadata
from attnsr.pictures.encoding import Encoder, Layout, deflate
from attnsr.pictures.opening import PictureError, broken, not_understood, several

__all__ = ['Directory', 'SixteenBits', 'TiffEncoder', 'read_directory', 'write_directory']

WIDTH, HEIGHT = metadata.WIDTH, metadata.HEIGHT
BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 273, metadata.ORIENTATION, 277, 278, 279
PLANAR, PREDICTOR = 284, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, ICC = 338, 339, 34675

# Of the types that have whole numbers: NumPy's name.
NUMBERS = {1: 'u1', 3: 'u2', 4: 'u4', 6: 'i1', 8: 'i2', 9: 'i4', 13: 'u4', 16: 'u8', 17: 'i8', 18: 'u8'}
SIZES = {kind: int(name[1]) for kind, name in NUMBERS.items()} | {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8}
SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 3, 4, 5, 7, 16

UNSIGNED, ADOBE_DEFLATE, HORIZONTAL = 1, 8, 2
# Compressions that a predictor goes with: LZW, deflate under two numbers, LZMA, Zstandard.
PREDICTED = (5, ADOBE_DEFLATE, 32946, 34925, 50000)

UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2

# Of the pixels in a strip, about.
STRIP_SIZE = 2**20

# Of a whole file that is no BigTIFF file, at most.
CLASSIC_SIZE = 2**32 - 1


@dataclass(frozen=True)
class Directory:
    """What the only directory of a TIFF file says."""

    order: str
    """Of bytes: ``'<'`` or ``'>'``."""
    big: bool
    numbers: dict[int, list[int]]
    """By tag, the values of tags with whole numbers."""
    others: dict[int, tuple[int, bytes]]
    """By tag, type and bytes of all other values."""

    def first(self, tag: int, default: int) -> int:
        return self.numbers.get(tag, [default])[0]

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each channel."""
        return tuple(self.numbers.get(BITS, [1]))

    @property
    def resolution(self) -> tuple[float, float] | None:
        """Dots per inch."""
        values: list[float | None] = []
        for tag in (metadata.X_RESOLUTION, metadata.Y_RESOLUTION):
            kind, body = self.others.get(tag, (0, b''))
            over, under = struct.unpack(f'{self.order}II', body) if kind == RATIONAL and len(body) == 8 else (0, 0)
            values.append(over / under if under else None)
        x, y = values
        return metadata.in_inches(x, y, self.first(metadata.RESOLUTION_UNIT, metadata.INCH))

    @property
    def icc(self) -> bytes | None:
        return self.others.get(ICC, (0, b''))[1] or None


def read_directory(path: Path, data: bytes) -> Directory:
    """Read the directory of a TIFF file.

    Raises:
        PictureError: It makes no sense, or there are several.
    """
    try:
        order = '<' if data[:1] == b'I' else '>'
        big = struct.unpack_from(f'{order}H', data, 2)[0] == 43
        offset = struct.unpack_from(f'{order}Q', data, 8)[0] if big else struct.unpack_from(f'{order}I', data, 4)[0]
        first, following = _directory_at(data, order, big, offset)
        offsets = {offset}
        while following and following not in offsets:
            offsets.add(following)
            following = _directory_at(data, order, big, following)[1]
    except (struct.error, ValueError) as error:
        raise not_understood(path, error) from error
    if len(offsets) > 1:
        raise several(path, len(offsets))
    if min(first.first(WIDTH, 0), first.first(HEIGHT, 0)) < 1:
        raise not_understood(path, 'it has no width or no height')
    return first


def _directory_at(data: bytes, order: str, big: bool, offset: int) -> tuple[Directory, int]:
    """A directory, and the offset of the next one."""
    counts, longs = ('Q', 'Q') if big else ('H', 'I')
    room = struct.calcsize(f'={longs}')
    size = 4 + 2 * room
    (count,) = struct.unpack_from(f'{order}{counts}', data, offset)
    start = offset + struct.calcsize(f'={counts}')
    if start + size * count > len(data):
        raise ValueError('the directory is cut off')
    numbers: dict[int, list[int]] = {}
    others: dict[int, tuple[int, bytes]] = {}
    for position in range(start, start + size * count, size):
        tag, kind, values = struct.unpack_from(f'{order}HH{longs}', data, position)
        length = SIZES.get(kind, 0) * values
        place = position + 4 + room
        if length > room:
            (place,) = struct.unpack_from(f'{order}{longs}', data, place)
        if place + length > len(data):
            raise ValueError(f'the values of tag {tag} are cut off')
        body = data[place : place + length]
        if kind in NUMBERS and values:
            numbers[tag] = np.frombuffer(body, order + NUMBERS[kind]).tolist()
        else:
            others[tag] = kind, body
    (following,) = struct.unpack_from(f'{order}{longs}', data, start + size * count)
    return Directory(order, big, numbers, others), following


def write_directory(tags: Mapping[int, tuple[int, Sequence[int] | bytes]], offset: int, order: str, big: bool) -> bytes:
    """A directory, the only or last one of its file, with its values behind it.

    Args:
        tags: By tag, type and values; of :data:`RATIONAL`, numerators and denominators by turns.
        offset: Where it will lie.
        order: Of bytes, ``'<'`` or ``'>'``.
        big: For a BigTIFF file.
    """
    counts, longs = ('Q', 'Q') if big else ('H', 'I')
    room = struct.calcsize(f'={longs}')
    place = offset + struct.calcsize(f'={counts}') + (4 + 2 * room) * len(tags) + room
    entries, behind = [struct.pack(f'{order}{counts}', len(tags))], []
    for tag, (kind, values) in sorted(tags.items()):
        if isinstance(values, bytes):
            body = values
        else:
            body = np.array(values).astype(order + NUMBERS.get(kind, 'u4')).tobytes()
        entries.append(struct.pack(f'{order}HH{longs}', tag, kind, len(body) // SIZES[kind]))
        if len(body) <= room:
            entries.append(body.ljust(room, b'\0'))
        else:
            body += bytes(-len(body) % 8)
            entries.append(struct.pack(f'{order}{longs}', place))
            behind.append(body)
            place += len(body)
    return b''.join([*entries, bytes(room), *behind])


class SixteenBits:
    """The pixels of a TIFF file with 16 bits a channel.

    Args:
        path: For messages.
        data: The file.
        directory: Its directory, whose :attr:`~Directory.bits` are all 16.

    Attributes:
        height, width: As they are stored.
        channels: 1 to 4: grey, grey with alpha, RGB, RGB with alpha.

    Raises:
        PictureError: Its colours or numbers are none that can be used.
    """

    def __init__(self, path: Path, data: bytes, directory: Directory) -> None:
        self.path, self.data, self.directory = path, data, directory
        self.height, self.width = directory.first(HEIGHT, 0), directory.first(WIDTH, 0)
        photometric = directory.first(PHOTOMETRIC, 1)
        if photometric not in (0, 1, 2):
            names = {5: 'CMYK', 6: 'YCbCr', 8: 'LAB', 9: 'LAB', 10: 'LAB'}
            name = names.get(photometric, f'photometric {photometric}')
            raise PictureError(f'{path}: has {name} colours, whose RGB depends on a profile; convert it to RGB')
        if set(directory.numbers.get(SAMPLE_FORMAT, [UNSIGNED])) != {UNSIGNED}:
            raise PictureError(f'{path}: has signed or floating-point numbers; convert it to 8 or 16 bits a channel')
        if (compression := directory.first(COMPRESSION, 1)) not in TiffImagePlugin.COMPRESSION_INFO:
            raise not_understood(path, f'its compression is number {compression}')
        self.samples = directory.first(SAMPLES, 1)
        colours = 3 if photometric == 2 else 1
        if not colours <= self.samples <= 64 or len(directory.bits) not in (1, self.samples):
            raise not_understood(path, f'it has {self.samples} channels')
        # As Pillow takes it for 8 bits: one more channel is alpha unless it is said that it is something else.
        extra = directory.numbers.get(EXTRA_SAMPLES, [UNASSOCIATED])[0] if self.samples > colours else UNSPECIFIED
        self.inverted = photometric == 0
        self.associated = extra == ASSOCIATED
        self.channels = colours + (extra != UNSPECIFIED)

    def decode(self) -> np.ndarray:
        """The pixels as they are stored.

        Returns:
            uint16 (height, width, channels), C-contiguous, alpha not multiplied into colours.

        Raises:
            PictureError: They are truncated or damaged.
        """
        separate = self.directory.first(PLANAR, 1) == 2 and self.samples > 1
        if separate:
            pixels = np.empty((self.height, self.width, self.channels), np.uint16)
            for channel in range(self.channels):
                pixels[..., channel] = self._plane(channel, self.samples, 1)[..., 0]
        else:
            pixels = np.ascontiguousarray(self._plane(0, 1, self.samples)[..., : self.channels])
        if self.inverted:
            colours = pixels[..., :1]
            np.subtract(65535, colours, out=colours)
        if self.associated:
            _divide_by_alpha(pixels)
        return pixels

    def _plane(self, index: int, planes: int, samples: int) -> np.ndarray:
        """One plane of several, of so many samples a pixel: (height, width, samples)."""
        directory, order = self.directory, self.directory.order
        tiled = TILE_OFFSETS in directory.numbers
        kinds = (TILE_OFFSETS, TILE_BYTES) if tiled else (STRIP_OFFSETS, STRIP_BYTES)
        tags: dict[int, tuple[int, Sequence[int] | bytes]] = {
            WIDTH: (LONG, [self.width * samples * 2]),
            HEIGHT: (LONG, [self.height]),
            BITS: (SHORT, [8]),
            COMPRESSION: (SHORT, [directory.first(COMPRESSION, 1)]),
            PHOTOMETRIC: (SHORT, [1]),
            SAMPLES: (SHORT, [1]),
            FILL_ORDER: (SHORT, [directory.first(FILL_ORDER, 1)]),
        }
        try:
            each = len(directory.numbers[kinds[0]]) // planes
            offsets, lengths = (directory.numbers[tag][index * each : (index + 1) * each] for tag in kinds)
            self._check_ends(offsets, lengths, samples)
            number = LONG8 if directory.big else LONG
            tags[kinds[0]], tags[kinds[1]] = (number, offsets), (number, lengths)
            if tiled:
                tags[TILE_WIDTH] = LONG, [directory.numbers[TILE_WIDTH][0] * samples * 2]
                tags[TILE_HEIGHT] = LONG, directory.numbers[TILE_HEIGHT]
            elif ROWS_PER_STRIP in directory.numbers:
                tags[ROWS_PER_STRIP] = LONG, [min(directory.first(ROWS_PER_STRIP, 1), self.height)]
            place = len(self.data) + len(self.data) % 2
            if directory.big:
                header = self.data[:8] + struct.pack(f'{order}Q', place)
            else:
                header = self.data[:4] + struct.pack(f'{order}I', place)
            rest, gap = memoryview(self.data)[len(header) :], bytes(len(self.data) % 2)
            file = b''.join([header, rest, gap, write_directory(tags, place, order, directory.big)])
            image = TiffImagePlugin.TiffImageFile(BytesIO(file))
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # of many classes: whatever the decoding runs into
            raise broken(self.path, 'is truncated or damaged') from error
        plane = np.empty((self.height, self.width, samples), np.uint16)
        rows = max(1, 2**24 // (self.width * samples * 2))
        for top in range(0, self.height, rows):
            bottom = min(top + rows, self.height)
            part = np.asarray(image.crop((0, top, self.width * samples * 2, bottom)))
            plane[top:bottom] = part.view(f'{order}u2').reshape(bottom - top, self.width, samples)
        if directory.first(PREDICTOR, 1) == HORIZONTAL and directory.first(COMPRESSION, 1) in PREDICTED:
            step = directory.numbers[TILE_WIDTH][0] if tiled else self.width
            for left in range(0, self.width, step):  # sums begin anew in each tile, and wrap around
                part = plane[:, left : left + step]
                np.add.accumulate(part, axis=1, out=part)
        return plane

    def _check_ends(self, offsets: Sequence[int], lengths: Sequence[int], samples: int) -> None:
        """Pixels that lie behind the end of the file would be read from what is put there.

        Raises:
            ValueError: There are some.
        """
        directory = self.directory
        if directory.first(COMPRESSION, 1) == 1:  # then the lengths are not looked at
            if TILE_OFFSETS in directory.numbers:
                pixels = directory.numbers[TILE_WIDTH][0] * directory.numbers[TILE_HEIGHT][0]
                lengths = [2 * samples * pixels] * len(offsets)
            else:
                rows = min(directory.first(ROWS_PER_STRIP, self.height), self.height)
                heights = [min(rows, self.height - top) for top in range(0, self.height, rows)]
                lengths = [2 * samples * self.width * height for height in heights]
        if any(offset + length > len(self.data) for offset, length in zip(offsets, lengths, strict=True)):
            raise ValueError('the file ends before its pixels')


def _divide_by_alpha(pixels: np.ndarray) -> None:
    """Undo, in place, the multiplication of colours by alpha; what is wholly transparent stays black."""
    for row in pixels:  # not much of a large picture in float64 at once
        alpha = row[..., -1:].astype(np.float64)
        colours = row[..., :-1] * 65535.0 / np.maximum(alpha, 1)
        row[..., :-1] = np.minimum(np.rint(colours), 65535).astype(np.uint16)


class TiffEncoder(Encoder):
    """Writes grey or RGB, with alpha or without, of 8 or 16 bits, as deflated strips of horizontal differences.

    What all comes to is known at the end only: then it becomes a BigTIFF file if it takes more than 4 GiB.
    """

    def __init__(self, file: BinaryIO, layout: Layout, kept: metadata.Metadata) -> None:
        super().__init__(file, layout)
        self.kept = kept
        self.block_rows = layout.rows_in(STRIP_SIZE)
        self.place = 16  # of the next strip; a header takes no more
        self.offsets: list[int] = []
        self.lengths: list[int] = []

    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> bytes:
        differences = rows.astype(rows.dtype.newbyteorder('<'))
        np.subtract(rows[:, 1:], rows[:, :-1], out=differences[:, 1:])
        return deflate(differences)

    def append(self, encoded: bytes) -> None:
        if not self.offsets:
            self.file.write(bytes(self.place))
        self.offsets.append(self.place)
        self.lengths.append(len(encoded))
        encoded += bytes(len(encoded) % 2)  # what is pointed to lies at even places
        self.file.write(encoded)
        self.place += len(encoded)

    def finish(self) -> None:
        # The directory takes less than 2**12 bytes beside profile, offsets and lengths.
        big = self.place + 2**12 + len(self.kept.icc or b'') + 8 * len(self.offsets) > CLASSIC_SIZE
        self.file.write(write_directory(self._tags(big), self.place, '<', big))
        self.file.seek(0)
        self.file.write(
            struct.pack('<2sHHHQ', b'II', 43, 8, 0, self.place) if big else b'II*\0' + struct.pack('<I', self.place)
        )

    def _tags(self, big: bool) -> dict[int, tuple[int, Sequence[int] | bytes]]:
        layout = self.layout
        tags: dict[int, tuple[int, Sequence[int] | bytes]] = {
            WIDTH: (LONG, [layout.width]),
            HEIGHT: (LONG, [layout.height]),
            BITS: (SHORT, [8 * layout.dtype.itemsize] * layout.channels),
            COMPRESSION: (SHORT, [ADOBE_DEFLATE]),
            PHOTOMETRIC: (SHORT, [1 if layout.channels < 3 else 2]),
            STRIP_OFFSETS: (LONG8 if big else LONG, self.offsets),
            SAMPLES: (SHORT, [layout.channels]),
            ROWS_PER_STRIP: (LONG, [self.block_rows]),
            STRIP_BYTES: (LONG, self.lengths),
            PLANAR: (SHORT, [1]),
            PREDICTOR: (SHORT, [HORIZONTAL]),
            SAMPLE_FORMAT: (SHORT, [UNSIGNED] * layout.channels),
        }
        if layout.channels % 2 == 0:
            tags[EXTRA_SAMPLES] = SHORT, [UNASSOCIATED]
        if self.kept.resolution is not None:
            x, y = self.kept.resolution
            tags[metadata.X_RESOLUTION] = RATIONAL, metadata.rational(x)
            tags[metadata.Y_RESOLUTION] = RATIONAL, metadata.rational(y)
            tags[metadata.RESOLUTION_UNIT] = SHORT, [metadata.INCH]
        if self.kept.icc is not None:
            tags[ICC] = UNDEFINED, self.kept.icc
        return tags
