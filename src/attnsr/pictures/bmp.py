"""Writing BMP files: 8-bit grey, RGB, and RGB with alpha in the fourth version of the header, from the bottom up."""

import struct
from typing import BinaryIO

import numpy as np

from attnsr.pictures.encoding import Encoder, Layout
from attnsr.pictures.metadata import Metadata

__all__ = ['BmpEncoder']

# Of pixels that are written at once.
BLOCK_BYTES = 2**20

MASKS = struct.pack('<4I', 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
BITFIELDS = 3


class BmpEncoder(Encoder):
    """Writes one channel, three, or four.

    The rows of BMP files lie upside down. Those that are not are allowed, but not all programs read them.
    """

    def __init__(self, file: BinaryIO, layout: Layout, metadata: Metadata) -> None:
        super().__init__(file, layout)
        height, width, channels = layout.height, layout.width, layout.channels
        self.row_bytes = layout.row_bytes + -layout.row_bytes % 4
        self.block_rows = layout.rows_in(BLOCK_BYTES)
        alpha, grey = channels == 4, channels == 1
        per_metre = [min(round(value / 0.0254), 2**31 - 1) for value in metadata.resolution or (0, 0)]
        # Of the fourth version of the header: masks of the channels, 'sRGB', and room for another colour space.
        version_4 = MASKS + b'BGRs' + bytes(48) if alpha else b''
        palette = b''.join(bytes([level, level, level, 0]) for level in range(256)) if grey else b''
        size = self.row_bytes * height
        header = struct.pack(
            '<IiiHHIIiiII',
            40 + len(version_4),
            width,
            height,
            1,
            8 * channels,
            BITFIELDS if alpha else 0,
            size,
            *per_metre,
            256 if grey else 0,
            0,
        )
        self.begin = 14 + len(header) + len(version_4) + len(palette)
        file.write(struct.pack('<2sIII', b'BM', self.begin + size, 0, self.begin) + header + version_4 + palette)
        self.remaining = height

    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> np.ndarray:
        lines = np.zeros((len(rows), self.row_bytes), np.uint8)
        pixels = rows[::-1] if self.layout.channels == 1 else rows[::-1, :, [2, 1, 0, 3][: self.layout.channels]]
        lines[:, : self.layout.row_bytes] = pixels.reshape(len(rows), -1)
        return lines

    def append(self, encoded: np.ndarray) -> None:
        self.remaining -= len(encoded)
        self.file.seek(self.begin + self.remaining * self.row_bytes)
        self.file.write(encoded.data)

    def finish(self) -> None:
        pass
