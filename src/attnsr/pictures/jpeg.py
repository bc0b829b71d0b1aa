"""Writing JPEG files band by band.

Pillow encodes a whole picture only, from four bytes a pixel in memory. So each band is encoded by Pillow as a picture
of its own, and the compressed data of all are joined by restart markers, which every program reads: behind one,
decoding begins anew, as at the beginning of a file. The pixels of the result are those of a picture encoded in one go.
"""

import struct
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from attnsr.pictures.encoding import Encoder, Layout
from attnsr.pictures.metadata import Metadata, resized

__all__ = ['JpegEncoder', 'MAX_EXIF']

# Side of the blocks of pixels that are encoded, without reduced colours.
SIDE = 8

# Blocks between two restart markers, at most.
MAX_BLOCKS = 65535

# Of pixels in a band.
BAND_BYTES = 2**20

# What a segment of a JPEG file holds, beside what EXIF data begin with there.
MAX_EXIF = 65533 - 6

START_OF_FRAME, START_OF_SCAN, RESTART_INTERVAL, RESTART, END = 0xC0, 0xDA, 0xDD, 0xD0, 0xD9


class JpegEncoder(Encoder):
    """Writes grey or RGB of 8 bits, baseline, colours at full resolution (4:4:4)."""

    def __init__(self, file: BinaryIO, layout: Layout, metadata: Metadata, quality: int) -> None:
        super().__init__(file, layout)
        blocks = -(-layout.width // SIDE)
        strips = min(MAX_BLOCKS // blocks, max(1, BAND_BYTES // (SIDE * layout.row_bytes)))
        self.block_rows = SIDE * strips
        self.interval = strips * blocks
        self.settings: dict[str, Any] = {'quality': quality, 'subsampling': '4:4:4'}
        self.metadata: dict[str, Any] = {}
        if metadata.icc is not None:
            self.metadata['icc_profile'] = metadata.icc
        if metadata.resolution is not None:
            self.metadata['dpi'] = tuple(min(round(value), 65535) for value in metadata.resolution)
        if metadata.exif is not None and len(metadata.exif) <= MAX_EXIF:
            self.metadata['exif'] = b'Exif\0\0' + resized(metadata.exif, layout.height, layout.width)
        self.bands = 0

    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> bytes:
        image = Image.fromarray(rows[..., 0] if self.layout.channels == 1 else rows)
        file = BytesIO()
        image.save(file, 'JPEG', **self.settings, **(self.metadata if above is None else {}))
        return file.getvalue()

    def append(self, encoded: bytes) -> None:
        frame, scan, pixels = _places(encoded)
        if not self.bands:
            height = struct.pack('>H', self.layout.height)
            self.file.write(encoded[: frame + 5] + height + encoded[frame + 7 : scan])
            if self.block_rows < self.layout.height:
                self.file.write(struct.pack('>BBHH', 0xFF, RESTART_INTERVAL, 4, self.interval))
            self.file.write(encoded[scan:pixels])
        else:
            self.file.write(bytes([0xFF, RESTART + (self.bands - 1) % 8]))
        self.file.write(encoded[pixels:-2])
        self.bands += 1

    def finish(self) -> None:
        self.file.write(bytes([0xFF, END]))


def _places(jpeg: bytes) -> tuple[int, int, int]:
    """Where the header of the frame, that of its only scan, and the compressed data begin."""
    place, frame = 2, 0
    while True:
        kind, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], 'big')
        if kind == START_OF_FRAME:
            frame = place
        if kind == START_OF_SCAN:
            return frame, place, place + 2 + length
        place += 2 + length
