"""Writing picture files from rows that come one after the other, in memory for a few of them."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from attnsr.data_prep.parallel import available_cores
from attnsr.files import write_atomically
from attnsr.pictures.bmp import BmpEncoder
from attnsr.pictures.encoding import Encoder, Layout
from attnsr.pictures.formats import FORMATS, check_fits, format_named, format_of, stored_channels
from attnsr.pictures.jpeg import MAX_EXIF, JpegEncoder
from attnsr.pictures.metadata import Metadata
from attnsr.pictures.opening import PictureError
from attnsr.pictures.png import PngEncoder, keeps_profile
from attnsr.pictures.reading import Picture
from attnsr.pictures.tiff import TiffEncoder
from attnsr.pictures.webp import LOSSLESS, WebpEncoder

__all__ = ['QUALITIES', 'PictureWriter', 'notes_on', 'write']

#: Of the formats that have one: 0 to 100. WebP's 100 is lossless.
QUALITIES = {'jpg': 95, 'webp': 95}

# What writes the formats without losses.
LOSSLESS_ENCODERS: dict[str, Callable[[BinaryIO, Layout, Metadata], Encoder]] = {
    'png': PngEncoder,
    'tif': TiffEncoder,
    'bmp': BmpEncoder,
}

# What to do about errors of the file system.
REMEDIES = {
    errno.ENOSPC: 'the disk is full: free some space, or write to another one',
    errno.EDQUOT: 'your quota of the disk is used up: free some space, or write to another one',
    errno.EFBIG: 'such large files are not allowed here: write to another disk, or a format that compresses',
    errno.ENOENT: 'make the folder first',
    errno.ENOTDIR: 'give another folder',
    errno.EACCES: 'make the folder writable, or write to another one',
    errno.EPERM: 'make the folder writable, or write to another one',
    errno.EROFS: 'the disk is read-only: write to another one',
    errno.ENAMETOOLONG: 'give a shorter name',
}

# Threads that filter and compress, at most: more would wait for the one that has the rows.
MAX_WORKERS = 8


class PictureWriter:
    """A picture file that appears under its name when all rows are written; use it as a context manager.

    Rows are compressed in threads while the next ones are made. Of PNG, TIFF, BMP and JPEG, memory holds some blocks of
    about 1 MiB each. libwebp compresses a whole picture only: until then, a temporary file beside the output holds it.

    Args:
        path: The file.
        format: Key in ``FORMATS``; None for that which the ending of the name says.
        height: Of the picture.
        width: Of the picture.
        channels: Of the picture: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        dtype: Of the rows: uint8 or uint16. What the format cannot hold is reduced: 16 bits to 8, alpha by putting the
            picture onto white.
        metadata: What is kept of the original; None for nothing.
        quality: Of JPEG and WebP, 0 to 100; None for :data:`QUALITIES`.
        workers: Number of threads; None for one a core.

    Raises:
        PictureError: The picture is too large for its format, or the file cannot be written: here, by :meth:`write` or
            when the context ends. What was under ``path`` before is still there then, and nothing else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None,
        height: int,
        width: int,
        channels: int,
        dtype: np.dtype | type,
        metadata: Metadata | None = None,
        quality: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.format = format_of(self.path) if format is None else format_named(format)
        self.height, self.width, self.channels, self.dtype = height, width, channels, np.dtype(dtype)
        if min(height, width) < 1 or channels not in (1, 2, 3, 4) or self.dtype not in (np.uint8, np.uint16):
            raise ValueError(f'no picture: {height} x {width} x {channels}, {self.dtype}')
        check_fits(self.path, self.format, height, width, channels)
        self.metadata = Metadata() if metadata is None else metadata
        self.quality = _checked_quality(self.format, quality)
        self.workers = min(MAX_WORKERS, available_cores()) if workers is None else workers
        self._rows = 0
        self._failed = False

    def __enter__(self) -> 'PictureWriter':
        self._stack = contextlib.ExitStack()
        with self._errors():
            if self.path.is_dir():
                raise PictureError(f'{self.path}: is a folder; give the name of a file')
            try:
                file = self._stack.enter_context(write_atomically(self.path))
                self._encoder = self._make_encoder(file)
                self._stack.callback(self._encoder.close)
                self._pool = ThreadPoolExecutor(self.workers, 'writing')
                self._stack.callback(self._pool.shutdown, cancel_futures=True)
            except BaseException as error:
                self._stack.__exit__(type(error), error, error.__traceback__)
                raise
        self._pending: deque[Future[Any]] = deque()
        self._block: np.ndarray | None = None
        self._filled = 0
        self._above: np.ndarray | None = None
        return self

    def write(self, rows: np.ndarray) -> None:
        """Write the next rows, from top to bottom.

        Args:
            rows: (any number, width, channels) of :attr:`dtype`. They are copied.

        Raises:
            PictureError: The file cannot be written.
            ValueError: The rows are others, or too many.
        """
        if rows.shape[1:] != (self.width, self.channels) or rows.dtype != self.dtype:
            expected = f'(rows, {self.width}, {self.channels}) of {self.dtype}'
            raise ValueError(f'{self.path}: rows must be {expected}, and these are {rows.shape} of {rows.dtype}')
        if self._rows + len(rows) > self.height:
            raise ValueError(f'{self.path}: has {self.height} rows, and more are written')
        with self._errors():
            self._failed = True  # unless all goes well
            while len(rows):
                if self._block is None:
                    size = min(self._encoder.block_rows, self.height - self._rows)
                    self._block, self._filled = np.empty((size, self.width, self.channels), self.dtype), 0
                taken = min(len(rows), len(self._block) - self._filled)
                self._block[self._filled : self._filled + taken] = rows[:taken]
                self._filled += taken
                self._rows += taken
                rows = rows[taken:]
                if self._filled == len(self._block):
                    self._submit(self._block)
                    self._block = None
            self._failed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # on a full disk, closing fails as writing did
                self._stack.__exit__(kind, error, trace)
            return
        with self._errors(), self._stack:
            if self._failed or self._rows < self.height:
                raise ValueError(f'{self.path}: not all of its {self.height} rows were written')
            while self._pending:
                self._encoder.append(self._pending.popleft().result())
            self._encoder.finish()

    def _submit(self, block: np.ndarray) -> None:
        """Have a block encoded, and write those that are; waits where too many are not."""
        self._pending.append(self._pool.submit(self._encode, block, self._above))
        self._above = block[-1].copy()
        while self._pending and (len(self._pending) > self.workers or self._pending[0].done()):
            self._encoder.append(self._pending.popleft().result())

    def _encode(self, block: np.ndarray, above: np.ndarray | None) -> Any:
        return self._encoder.encode(self._stored(block), None if above is None else self._stored(above[None])[0])

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Rows as the format can hold them."""
        if rows.shape[2] % 2 == 0 and not FORMATS[self.format].alpha:
            rows = _on_white(rows)
        if rows.dtype == np.uint16 and 16 not in FORMATS[self.format].depths:
            rows = ((rows.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if stored_channels(self.format, self.channels) > rows.shape[2]:
            rows = rows[..., [0, 0, 0, 1][: rows.shape[2] + 2]]
        return np.ascontiguousarray(rows)

    def _make_encoder(self, file: BinaryIO) -> Encoder:
        channels = stored_channels(self.format, self.channels)
        dtype = self.dtype if 16 in FORMATS[self.format].depths else np.dtype(np.uint8)
        layout = Layout(self.height, self.width, channels, dtype)
        if self.format == 'jpg':
            return JpegEncoder(file, layout, self.metadata, self.quality)
        if self.format == 'webp':
            return WebpEncoder(file, layout, self.metadata, self.quality, self.path)
        return LOSSLESS_ENCODERS[self.format](file, layout, self.metadata)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say of errors of the file system which file they befell, and what to do."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = REMEDIES.get(error.errno or 0, 'write to another folder')
            raise PictureError(f'{self.path}: cannot be written: {reason}; {remedy}') from error


def write(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    metadata: Metadata | None = None,
    format: str | None = None,
    quality: int | None = None,
) -> None:
    """Write a whole picture, see :class:`PictureWriter`.

    Args:
        path: The file.
        pixels: uint8 or uint16 (height, width, channels), as in :class:`Picture`.
        metadata: What is kept of the original.
        format: Key in ``FORMATS``; None for that which the ending of the name says.
        quality: Of JPEG and WebP.

    Raises:
        PictureError: As :class:`PictureWriter`.
    """
    height, width, channels = pixels.shape
    with PictureWriter(path, format, height, width, channels, pixels.dtype, metadata, quality) as writer:
        writer.write(pixels)


def notes_on(format: str, picture: Picture) -> list[str]:
    """What of a picture is not as it was in a file of a format: a few words each, none where all is kept."""
    key, metadata, channels = format_named(format), picture.metadata, picture.pixels.shape[2]
    form = FORMATS[key]
    profile_kept = form.icc and (key != 'png' or keeps_profile(metadata, stored_channels(key, channels)))
    exif_kept = form.exif and (key != 'jpg' or metadata.exif is None or len(metadata.exif) <= MAX_EXIF)
    unlike_srgb = any(kind != b'sRGB' for kind, _ in metadata.png_colour)
    notes = {
        '16 bits a channel reduced to 8': picture.pixels.dtype == np.uint16 and 16 not in form.depths,
        'alpha flattened onto white': channels % 2 == 0 and not form.alpha,
        'grey stored as RGB': stored_channels(key, channels) - (channels % 2 == 0) > channels,
        'colour profile left out': metadata.icc is not None and not profile_kept,
        'gamma and primaries left out': unlike_srgb and metadata.icc is None and key != 'png',
        'EXIF data left out': metadata.exif is not None and not exif_kept,
    }
    return [note for note, applies in notes.items() if applies]


def _checked_quality(key: str, quality: int | None) -> int:
    if quality is None:
        return QUALITIES.get(key, 0)
    if key not in QUALITIES:
        valid = ', '.join(FORMATS[other].name for other in QUALITIES)
        raise PictureError(f'{FORMATS[key].name} files have no quality; those that have one: {valid}')
    if not 0 <= quality <= 100:
        raise PictureError(f'quality {quality}: must be 0 to 100, where WebP is lossless with {LOSSLESS}')
    return quality


def _on_white(rows: np.ndarray) -> np.ndarray:
    """Rows with alpha, put onto white: one channel less."""
    most = np.iinfo(rows.dtype).max
    colours, alpha = rows[..., :-1].astype(np.uint32), rows[..., -1:].astype(np.uint32)
    return ((colours * alpha + most * (most - alpha) + most // 2) // most).astype(rows.dtype)
