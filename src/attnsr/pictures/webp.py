"""Writing WebP files: libwebp encodes a whole picture only, which a temporary file holds until then."""

import contextlib
import logging
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from attnsr.pictures.encoding import Encoder, Layout
from attnsr.pictures.metadata import Metadata, exif_resolution, resized, with_resolution
from attnsr.pictures.opening import PictureError

__all__ = ['LOSSLESS', 'WebpEncoder']

#: The quality that stands for lossless compression.
LOSSLESS = 100

LOSSLESS_SETTINGS = {'lossless': True, 'exact': True}

# What Pillow says where a picture compressed with losses has more to say of its blocks than 512 KiB hold. That depends
# on the picture, and befalls some of more than 100 million pixels.
PARTITION_OVERFLOW = 'encoding error 6'

BLOCK_BYTES = 2**20

logger = logging.getLogger('attnsr')


class WebpEncoder(Encoder):
    """Writes RGB of 8 bits, with alpha or without; what is too large for compression with losses, without them.

    Args:
        path: Of the file, beside which the temporary one has its place. The latter has no name, so that nothing is left
            of it however the process ends.
        quality: 0 to 99, or :data:`LOSSLESS`.
    """

    def __init__(self, file: BinaryIO, layout: Layout, metadata: Metadata, quality: int, path: Path) -> None:
        super().__init__(file, layout)
        self.path = path
        self.block_rows = layout.rows_in(BLOCK_BYTES)
        self.settings: dict[str, Any] = (
            dict(LOSSLESS_SETTINGS) if quality == LOSSLESS else {'quality': quality, 'alpha_quality': 100}
        )
        if metadata.icc is not None:
            self.settings['icc_profile'] = metadata.icc
        exif = metadata.exif
        if exif is not None:
            exif = resized(exif, layout.height, layout.width)
        if metadata.resolution is not None and metadata.resolution != exif_resolution(exif):
            exif = with_resolution(exif, metadata.resolution)
        if exif is not None:
            self.settings['exif'] = exif
        self.rows: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by close())

    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> np.ndarray:
        if self.layout.channels == 4:
            return rows
        result = np.full((*rows.shape[:2], 4), 255, np.uint8)
        result[..., :3] = rows
        return result

    def append(self, encoded: np.ndarray) -> None:
        # Not through memory that is mapped to the file: on a full disk that would end the process.
        self.rows.write(encoded.data)

    def finish(self) -> None:
        self.rows.flush()
        mode = 'RGBA' if self.layout.channels == 4 else 'RGBX'
        result = BytesIO()
        pixels = np.memmap(self.rows, np.uint8, 'r')
        image = Image.frombuffer(mode, (self.layout.width, self.layout.height), pixels, 'raw', mode, 0, 1)
        try:
            self._save(image, result)
        except (OSError, ValueError) as error:
            raise PictureError(
                f'{self.path}: libwebp cannot encode the picture ({error}); write PNG or TIFF'
            ) from error
        self.file.write(result.getbuffer())

    def _save(self, image: Image.Image, file: BinaryIO) -> None:
        try:
            image.save(file, 'WEBP', **self.settings)
        except ValueError as error:
            if PARTITION_OVERFLOW not in str(error) or 'lossless' in self.settings:
                raise
            # After all the work, a larger file is better than none.
            logger.warning('%s: is too large to be compressed with losses, and is written without', self.path)
            del self.settings['quality'], self.settings['alpha_quality']
            file.seek(0)
            file.truncate()
            image.save(file, 'WEBP', **LOSSLESS_SETTINGS, **self.settings, method=0, quality=20)

    def close(self) -> None:
        # On a full disk, closing fails as writing did, but the file is closed and gone all the same.
        with contextlib.suppress(OSError):
            self.rows.close()
