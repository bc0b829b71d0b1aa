"""PNG files: their chunks, and writing them row by row.

Written here because Pillow writes no 16-bit RGB, and Pillow and OpenCV write from the whole picture in memory only.
"""

import struct
import zlib
from typing import BinaryIO

import numpy as np

from attnsr.pictures.encoding import Encoder, Layout, deflate
from attnsr.pictures.metadata import Metadata, resized

__all__ = ['CHANNELS', 'COLOUR_CHUNKS', 'PngEncoder', 'chunks', 'pixels_only']

SIGNATURE = b'\x89PNG\r\n\x1a\n'

#: Of each type of colour without a palette, as the file has them.
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
COLOUR_TYPES = {channels: kind for kind, channels in CHANNELS.items()}

#: By which a file says what its numbers mean, beside a profile.
COLOUR_CHUNKS = (b'cICP', b'sRGB', b'gAMA', b'cHRM')

# Pixels are compressed in blocks of about so many bytes, each by itself, so that threads can share the work.
BLOCK_BYTES = 2**20

# Filters are chosen and applied to so many bytes at once, for the sake of the processor's caches.
GROUP_BYTES = 2**17

# Modulus of the Adler-32 checksum.
ADLER = 65521


def chunks(data: bytes) -> dict[bytes, bytes]:
    """The first chunk of each kind of a PNG file, without those of pixels and as far as the file goes."""
    found: dict[bytes, bytes] = {}
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        if kind == b'IEND':
            break
        if kind != b'IDAT':
            found.setdefault(kind, data[position + 8 : position + 8 + length])
        position += 12 + length
    return found


def pixels_only(data: bytes) -> bytes:
    """A PNG file without all that does not bear on the numbers of its pixels."""
    parts = [SIGNATURE]
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        if kind in (b'IHDR', b'IDAT', b'IEND'):
            parts.append(data[position : position + 12 + length])
        position += 12 + length
    return b''.join(parts)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(body, zlib.crc32(kind)))


class PngEncoder(Encoder):
    """Writes grey or RGB, with alpha or without, of 8 or 16 bits, filtered as suits each row best, and compressed."""

    def __init__(self, file: BinaryIO, layout: Layout, metadata: Metadata) -> None:
        super().__init__(file, layout)
        self.pixel_bytes = layout.channels * layout.dtype.itemsize
        self.block_rows = layout.rows_in(BLOCK_BYTES)
        self.adler = 1
        kind = 8 * layout.dtype.itemsize, COLOUR_TYPES[layout.channels]
        header = struct.pack('>IIBBBBB', layout.width, layout.height, *kind, 0, 0, 0)
        self.before = [SIGNATURE, chunk(b'IHDR', header), *_metadata_chunks(metadata, layout)]
        self.before_pixels = b'\x78\x9c'  # what a zlib stream begins with
        self.started = False

    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> tuple[bytes, int, int]:
        """Compressed data of some rows, and checksum and number of the bytes that they were made of."""
        lines = _filtered(_bytes_of(rows), None if above is None else _bytes_of(above[None])[0], self.pixel_bytes)
        # Flushed, a block ends at a whole byte, and the next one can follow.
        return deflate(lines, zlib.Z_SYNC_FLUSH, raw=True), zlib.adler32(lines.data), lines.size

    def append(self, encoded: tuple[bytes, int, int]) -> None:
        packed, adler, size = encoded
        self._start()
        self.adler = _adler_of_both(self.adler, adler, size)
        self.file.write(chunk(b'IDAT', self.before_pixels + packed))
        self.before_pixels = b''

    def finish(self) -> None:
        self._start()
        last = b'\x03\0'  # an empty block that is the last one
        self.file.write(chunk(b'IDAT', self.before_pixels + last + struct.pack('>I', self.adler)))
        self.file.write(chunk(b'IEND', b''))

    def _start(self) -> None:
        for part in self.before:
            self.file.write(part)
        self.before.clear()


def _metadata_chunks(metadata: Metadata, layout: Layout) -> list[bytes]:
    result = []
    if keeps_profile(metadata, layout.channels) and metadata.icc is not None:
        result.append(chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(metadata.icc, 9)))
    for kind, body in metadata.png_colour:
        if kind != b'sRGB' or metadata.icc is None:  # not both
            result.append(chunk(kind, body))
    if metadata.resolution is not None:
        per_metre = [min(round(value / 0.0254), 2**31 - 1) for value in metadata.resolution]
        result.append(chunk(b'pHYs', struct.pack('>IIB', *per_metre, 1)))
    if metadata.exif is not None:
        result.append(chunk(b'eXIf', resized(metadata.exif, layout.height, layout.width)))
    return result


def keeps_profile(metadata: Metadata, channels: int) -> bool:
    """Whether a profile is for grey or for RGB as the picture is: PNG files hold no others."""
    return metadata.colour_space in (None, 'GRAY' if channels < 3 else 'RGB')


def _bytes_of(rows: np.ndarray) -> np.ndarray:
    """(rows, bytes) of pixels as a PNG file has them."""
    return np.ascontiguousarray(rows.reshape(len(rows), -1).astype(rows.dtype.newbyteorder('>'))).view(np.uint8)


def _filtered(lines: np.ndarray, above: np.ndarray | None, step: int) -> np.ndarray:
    """Rows of a PNG file with the filter of each, chosen as libpng does: that with the least sum of absolute values.

    Args:
        lines: (rows, bytes), uint8.
        above: The row above, None at the top.
        step: Bytes a pixel.

    Returns:
        (rows, 1 + bytes), uint8.
    """
    height, width = lines.shape
    result = np.empty((height, 1 + width), np.uint8)
    # The row above and the pixel at the left of each, zeros at the edges.
    padded = np.zeros((height + 1, step + width), np.uint8)
    padded[1:, step:] = lines
    if above is not None:
        padded[0, step:] = above
    rows = max(1, GROUP_BYTES // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        here = padded[top + 1 : bottom + 1, step:]
        left = padded[top + 1 : bottom + 1, :-step]
        up = padded[top:bottom, step:]
        corner = padded[top:bottom, :-step]
        candidates = np.empty((5, *here.shape), np.uint8)
        candidates[0] = here
        for kind, prediction in enumerate([left, up, _average(left, up), _paeth(left, up, corner)], start=1):
            np.subtract(here, prediction, out=candidates[kind])
        # Taken as signed, the absolute value of -128 wraps to 128, as it should.
        weights = np.abs(candidates.view(np.int8)).view(np.uint8).sum(axis=2, dtype=np.uint64)
        best = weights.argmin(axis=0)
        result[top:bottom, 0] = best
        result[top:bottom, 1:] = candidates[best, np.arange(bottom - top)]
    return result


def _average(left: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Half of the sum, rounded down, without leaving 8 bits."""
    return (left & up) + ((left ^ up) >> 1)


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """That of the three which is nearest to left + up - corner, of equals the first, without leaving 8 bits."""
    # The differences between left + up - corner and each of the three.
    to_left = np.maximum(up, corner) - np.minimum(up, corner)
    to_up = np.maximum(left, corner) - np.minimum(left, corner)
    # Where left and up lie on the same side of the corner, it is the sum of both, and so never the least.
    to_corner = np.maximum(to_left, to_up) - np.minimum(to_left, to_up)
    to_corner |= _mask((left > corner) == (up > corner))
    nearest = corner ^ ((up ^ corner) & _mask(to_up <= to_corner))
    return nearest ^ ((left ^ nearest) & _mask((to_left <= to_up) & (to_left <= to_corner)))


def _mask(condition: np.ndarray) -> np.ndarray:
    """All bits where it is so, none elsewhere."""
    return -condition.view(np.uint8)


def _adler_of_both(first: int, second: int, size: int) -> int:
    """The Adler-32 checksum of data whose parts have these, and the second one this size."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + size * ((first & 0xFFFF) - 1)
    return high % ADLER << 16 | low % ADLER
