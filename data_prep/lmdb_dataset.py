"""Writes LMDBs in BasicSR's form, so that a folder of the final name is always a whole LMDB, and no work is lost.

The form is that of ``basicsr.utils.lmdb_util``: a folder ``NAME.lmdb`` with ``data.mdb`` (PNG files by key),
``lock.mdb`` and ``meta_info.txt`` with one line ``key.png (height,width,channels) compress_level`` per image. Beside it
lies ``NAME.record.jsonl``: what the LMDB was made of, and the SHA-256 of every entry.

Until they are whole, both bear hidden names: ``.NAME.partial.lmdb`` and ``.NAME.partial.record.jsonl``. An LMDB that is
replaced is called ``.NAME.replaced.lmdb`` for the moment between two renames. Whatever of these a killed process left
behind, the next one goes on from it, or removes it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

import attnsr
from attnsr.errors import UsageError
from attnsr.files import flush_to_disk

__all__ = [
    'DataSetError',
    'Entry',
    'LmdbSummary',
    'LmdbWriter',
    'Summary',
    'check_key',
    'count_entries',
    'encode',
    'exclusive',
    'lr_lmdbs',
    'measure',
    'read_header',
    'read_record',
    'record_of',
    'write_errors',
    'write_lmdb',
]

logger = logging.getLogger('attnsr')

#: Said where writing fails.
GOES_ON = 'what was written so far is kept, the same command goes on from there'

#: What of a description names software: other versions may encode the same pixels in other bytes.
VERSIONS = ('attnsr', 'opencv', 'pillow')

#: Entries go to the disk when so many bytes have come together.
COMMIT_BYTES = 16 * 2**20


class DataSetError(UsageError, ValueError):
    """A data set is asked for that cannot be, or would have to take the place of something else."""


@dataclass(frozen=True)
class LmdbSummary:
    """What an LMDB holds: number of images, their pixels (height times width, summed) and the bytes on disk."""

    path: Path
    images: int
    pixels: int
    bytes: int
    kept: bool
    """True if the LMDB was there before and was left as it was."""
    shortest_side: int
    """Of all images, in pixels: no larger patch can be cut from each of them."""
    seconds: float = 0.0
    """Time that the writing took."""


class Summary(list[LmdbSummary]):
    """What was made, one entry per LMDB; ``str()`` gives a table."""

    notes: list[str]
    """What else is to be told, one line each."""
    seconds: float
    """Time that all of it took."""

    def __init__(self) -> None:
        super().__init__()
        self.notes, self.seconds = [], 0.0

    def __str__(self) -> str:
        width = max([len(str(row.path)) for row in self] + [8])
        lines = [f'{"data set":<{width}} {"images":>8} {"pixels":>14} {"MB":>9} {"seconds":>8}']
        for row in self:
            time = 'kept' if row.kept else f'{row.seconds:.1f}'
            lines.append(f'{row.path!s:<{width}} {row.images:>8} {row.pixels:>14,} {row.bytes / 1e6:>9.1f} {time:>8}')
        if len(self) > 1:
            images, pixels, size = (sum(getattr(row, name) for row in self) for name in ('images', 'pixels', 'bytes'))
            lines.append(f'{"all":<{width}} {images:>8} {pixels:>14,} {size / 1e6:>9.1f} {self.seconds:>8.1f}')
        return '\n'.join(lines)


@dataclass(frozen=True)
class Entry:
    """One image of an LMDB.

    Attributes:
        key: ASCII letters, digits, ``_`` and ``-``: BasicSR cuts keys at the first dot.
        png: The PNG file.
        shape: (height, width, channels).
        source: What the image was made of, for the record; JSON values.
    """

    key: str
    png: bytes
    shape: tuple[int, int, int]
    source: Mapping[str, Any]


class LmdbWriter:
    """Writes one LMDB in batches, each on the disk once :meth:`commit` returns; a later writer goes on after the last.

    The same entries committed in the same batches give the same ``data.mdb``, byte for byte, however many writers it
    took: every batch is written by an environment of its own, so that no page holds what an earlier one left in memory.

    Args:
        path: The LMDB's folder; its name ends in ``.lmdb`` and the folder it lies in exists.
        description: What the LMDB is made of and how, as JSON values: a partial LMDB of another description is begun
            anew, and a whole one is not taken for this one.
        compress_level: PNG compression, 0 to 9, as stated in ``meta_info.txt``.

    Raises:
        DataSetError: The name does not end in ``.lmdb``.
        OSError: A file cannot be read or written.
    """

    def __init__(self, path: str | Path, description: Mapping[str, Any], compress_level: int = 1) -> None:
        # A link to an LMDB, on another disk perhaps, stays one.
        self.path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        _check_name(self.path)
        self.compress_level = compress_level
        self.record = record_of(self.path)
        self._partial = self.path.with_name(f'.{self.path.stem}.partial.lmdb')
        self._partial_record = record_of(self._partial)
        self._replaced = self.path.with_name(f'.{self.path.stem}.replaced.lmdb')
        self._header: dict[str, Any] = json.loads(json.dumps({'attnsr': attnsr.__version__, **description}))
        self._batch: list[Entry] = []
        self._batch_bytes = 0
        self.committed = 0
        with write_errors(self.path):
            self._mend()

    def kept(self, overwrite: bool) -> LmdbSummary | None:
        """What is at :attr:`path` if it is what would be written; None if it is to be written.

        Raises:
            DataSetError: Something else is there, and it is no LMDB or ``overwrite`` is not set.
        """
        if not self.path.exists():
            return None
        if not (self.path / 'data.mdb').is_file() or not (self.path / 'meta_info.txt').is_file():
            raise DataSetError(
                f"{self.path} is in the way: it is no LMDB of BasicSR's (data.mdb, meta_info.txt); move it away"
            )
        header = read_header(self.path)
        other = '' if header is None else _difference(header, self._header, VERSIONS)
        if header is not None and not other:
            shapes = _shapes(self.record)
            named = (self.path / 'meta_info.txt').read_bytes().count(b'\n')
            with contextlib.suppress(DataSetError):
                if len(shapes) == named == count_entries(self.path):
                    self._discard()  # what a run that was to replace it may have left
                    return self._summary(shapes, kept=True)
        if overwrite:
            return None
        advice = 'overwrite it (--overwrite), or write elsewhere (--out)'
        if header is not None and not other:
            raise DataSetError(f'{self.path} is damaged, `basicsr prepare verify` says where; {advice}')
        if header is None:
            state = 'damaged' if self.record.exists() else 'not beside it'
            other = f'as far as one can tell, since {self.record.name} is {state}'
        raise DataSetError(f'{self.path} holds other images than would be written now: {other}; {advice}')

    def begin(self) -> int:
        """Go on with what an earlier writer committed, or begin anew.

        Returns:
            :attr:`committed`, the number of entries that are on the disk already.
        """
        with write_errors(self.path):
            self.committed = self._resume()
            if not self.committed:
                self._discard()
                self._partial.mkdir()
                # LMDB makes a sparse file of it and maps it: where the disk is full, that ends the process (SIGBUS).
                (self._partial / 'lock.mdb').write_bytes(bytes(8192))
                self._partial_record.write_text(json.dumps(self._header) + '\n', encoding='utf-8')
        return self.committed

    def put(self, entry: Entry) -> None:
        """Add an entry to the batch.

        Raises:
            DataSetError: The key is not made of ASCII letters, digits, ``_`` and ``-``.
        """
        check_key(self.path, entry.key)
        self._batch.append(entry)
        self._batch_bytes += len(entry.png)

    @property
    def is_full(self) -> bool:
        """Whether the batch is large enough to commit it."""
        return self._batch_bytes >= COMMIT_BYTES

    def commit(self) -> None:
        """Put the batch on the disk.

        Raises:
            OSError: It cannot be written: no permission, no space, ...; what was committed before stays.
        """
        if not self._batch:
            return
        lines = [
            {'key': entry.key, 'shape': entry.shape, 'sha256': hashlib.sha256(entry.png).hexdigest(), **entry.source}
            for entry in self._batch
        ]
        with write_errors(self.path, GOES_ON):
            # The record is on the disk first: lines without entry are cut off, entries without line would be lost.
            with open(self._partial_record, 'a', encoding='utf-8') as file:
                file.writelines(json.dumps(line) + '\n' for line in lines)
                file.flush()
                os.fsync(file.fileno())
            with self._environment(self._batch) as environment, environment.begin(write=True) as transaction:
                for entry in self._batch:
                    transaction.put(entry.key.encode('ascii'), entry.png)
        self.committed += len(self._batch)
        self._batch, self._batch_bytes = [], 0

    def finish(self, seconds: float = 0.0) -> LmdbSummary:
        """Commit the batch and give the LMDB its name, in the place of one that may be there.

        Raises:
            DataSetError: Nothing was put.
            OSError: It cannot be written.
        """
        self.commit()
        if not self.committed:
            raise DataSetError(f'{self.path}: there is no image to write')
        with write_errors(self.path, GOES_ON):
            shapes = _shapes(self._partial_record)
            assert len(shapes) == self.committed
            lines = (f'{key}.png ({h},{w},{c}) {self.compress_level}\n' for key, h, w, c in sorted(shapes))
            (self._partial / 'meta_info.txt').write_text(''.join(lines), encoding='utf-8')
            for file in (*self._partial.iterdir(), self._partial):
                flush_to_disk(file)
            if self.path.exists():
                self.path.rename(self._replaced)
            self._partial.rename(self.path)
            self._mend()
            flush_to_disk(self.path.parent)
        return self._summary(shapes, kept=False, seconds=seconds)

    def partial_bytes(self) -> int:
        """What an interrupted run has put on the disk."""
        data = self._partial / 'data.mdb'
        return data.stat().st_size if data.is_file() else 0

    def _environment(self, batch: list[Entry]) -> lmdb.Environment:
        """The partial LMDB, its map large enough for the batch; how large depends on the entries alone."""
        path = str(self._partial)
        with lmdb.open(path, map_size=2**20) as environment:
            used = (environment.info()['last_pgno'] + 1) * mmap.PAGESIZE
        # A value takes whole memory pages (its last one filled in part, and 16 bytes of header); a page more for each
        # covers the tree above them, and 1 MiB the tables of the database itself.
        needed = used + sum(len(entry.png) // mmap.PAGESIZE + 3 for entry in batch) * mmap.PAGESIZE + 2**20
        return lmdb.open(path, map_size=1 << (needed - 1).bit_length())

    def _resume(self) -> int:
        """The number of entries on the disk, after lines of the record beyond them are cut off; 0 begins anew."""
        header = next(_lines(self._partial_record), None)
        if header is None or not (self._partial / 'data.mdb').is_file():
            return 0
        try:
            entries = count_entries(self._partial)
            other = _difference(header, self._header, ('attnsr',))
        except DataSetError as error:
            other = str(error)
        if other:
            logger.warning('%s: what an interrupted run has written is made anew: %s', self.path, other)
            return 0
        with open(self._partial_record, 'rb+') as file:
            for _ in range(1 + entries):
                file.readline()
            file.truncate()  # lines without entry, and one that was cut off
        return entries if len(_shapes(self._partial_record)) == entries else 0

    def _discard(self) -> None:
        # In this order, as a record without its partial LMDB is one that only waits for its name.
        self._partial_record.unlink(missing_ok=True)
        if self._partial.exists():
            shutil.rmtree(self._partial)

    def _mend(self) -> None:
        """Finish the renames that were begun, or bring an LMDB back whose successor never took its name."""
        if self._partial_record.exists() and not self._partial.exists():
            with contextlib.suppress(DataSetError):
                if len(_shapes(self._partial_record)) == count_entries(self.path):
                    self._partial_record.replace(self.record)
            self._partial_record.unlink(missing_ok=True)  # its LMDB was removed by somebody else
        if self._replaced.exists():
            if self.path.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.path)

    def _summary(self, shapes: list[tuple[str, int, int, int]], kept: bool, seconds: float = 0.0) -> LmdbSummary:
        return LmdbSummary(
            self.path,
            images=len(shapes),
            pixels=sum(height * width for _, height, width, _ in shapes),
            bytes=(self.path / 'data.mdb').stat().st_size,
            kept=kept,
            shortest_side=min(min(height, width) for _, height, width, _ in shapes),
            seconds=seconds,
        )


def write_lmdb(
    path: str | Path, images: Mapping[str, np.ndarray], overwrite: bool = False, compress_level: int = 1
) -> LmdbSummary:
    """Write images as PNG files into an LMDB that BasicSR's data sets read.

    An LMDB that is already there and holds these images is kept; with ``overwrite`` it is replaced once the new one is
    whole. Two processes writing into one folder take turns.

    Args:
        path: Folder to write; its name ends in ``.lmdb`` and the folder it lies in exists.
        images: uint8 arrays of shape (height, width, 3), channels in OpenCV's order BGR, or (height, width), grey, by
            key. A key is made of ASCII letters, digits, ``_`` and ``-``: BasicSR cuts keys at the first dot.
        overwrite: Replace an LMDB that is already there and holds something else.
        compress_level: PNG compression, 0 (none, much the fastest to read) to 9.

    Raises:
        DataSetError: The name does not end in ``.lmdb``, there is no image, a key or an image is not as above, or what
            is at ``path`` already is no LMDB, or one of other images and ``overwrite`` is not set.
        OSError: The LMDB cannot be written: no permission, no space, ...
    """
    begun = time.perf_counter()
    path = Path(path)
    _check_name(path)
    if not images:
        raise DataSetError(f'{path}: there is no image to write')
    digest = hashlib.sha256()
    for key, image in sorted(images.items()):
        check_key(path, key)
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise DataSetError(
                f"{path}: image '{key}' must be uint8 of shape (height, width, 3) or (height, width), "
                f'and is {image.dtype} of shape {image.shape}'
            )
        digest.update(f'{key} {image.shape}'.encode() + np.ascontiguousarray(image).tobytes())
    with exclusive(path.parent):
        description = {'images': digest.hexdigest(), 'compression': compress_level}
        writer = LmdbWriter(path, description, compress_level)
        kept = writer.kept(overwrite)
        if kept:
            return kept
        skipped = writer.begin()
        for key in sorted(images)[skipped:]:
            writer.put(encode(key, images[key], compress_level, {}))
            if writer.is_full:
                writer.commit()
        return writer.finish(time.perf_counter() - begun)


def encode(key: str, image: np.ndarray, compress_level: int, source: Mapping[str, Any]) -> Entry:
    """An image as an entry: uint8 of shape (height, width, 3), BGR, or (height, width), grey."""
    settings = [cv2.IMWRITE_PNG_COMPRESSION, compress_level]
    if compress_level:
        # Only those filters that are undone fast: on photographs, at level 1, encoding takes three quarters of the time
        # that all filters take, decoding too, and the files are no larger.
        settings += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FAST_FILTERS]
    _, png = cv2.imencode('.png', image, settings)
    height, width, channels = np.atleast_3d(image).shape
    return Entry(key, png.tobytes(), (height, width, channels), source)


def count_entries(path: str | Path) -> int:
    """Number of entries of an LMDB.

    Raises:
        DataSetError: ``data.mdb`` is missing, no LMDB, or cut off; reading on would end the process (SIGBUS).
    """
    data = Path(path) / 'data.mdb'
    if not data.is_file():
        raise DataSetError(f'{data.name} is missing')
    if not (size := data.stat().st_size):
        raise DataSetError(f'{data.name} is empty')
    try:
        needed, entries = measure(path)
    except lmdb.Error as error:
        raise DataSetError(f'{data.name} is no LMDB: {error}') from error
    if size < needed:
        raise DataSetError(f'{data.name} is cut off: {size} bytes of {needed}')
    return entries


def measure(path: str | Path) -> tuple[int, int]:
    """How many bytes the ``data.mdb`` of an LMDB must have, and its number of entries, from its first pages alone.

    Raises:
        lmdb.Error: It is no LMDB, or this process has it open already.
    """
    with lmdb.open(str(path), readonly=True, lock=False) as environment:
        stat = environment.stat()
        return (environment.info()['last_pgno'] + 1) * stat['psize'], stat['entries']


def read_header(path: str | Path) -> dict[str, Any] | None:
    """What the record beside an LMDB says of all of it; None if there is none."""
    return next(_lines(record_of(Path(path))), None)


def lr_lmdbs(path: Path) -> dict[Path, dict[str, Any]]:
    """The LMDBs beside an HR one whose records name it as theirs, with what these say of all of an LMDB."""
    found = {}
    for record in sorted(path.parent.glob('[!.]*.record.jsonl')):  # hidden ones are of runs that were interrupted
        lr = record.with_name(record.name.removesuffix('.record.jsonl') + '.lmdb')
        header = read_header(lr) or {}
        if header.get('pair') == path.name and lr.is_dir():
            found[lr] = header
    return found


def read_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """What the record beside an LMDB says of its entries, one by one: key, shape, sha256 and source.

    Ends at the first line that cannot be read.
    """
    lines = _lines(record_of(Path(path)))
    next(lines, None)
    return lines


@contextlib.contextmanager
def write_errors(path: str | Path, advice: str = '') -> Iterator[None]:
    """Turn what fails inside, in LMDB or the file system, into one OSError of one line that names ``path``."""
    try:
        yield
    except (OSError, lmdb.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f'{path} cannot be written: {reason}' + (advice and f'; {advice}')) from error


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a lock on a folder, so that processes writing into it take turns; it goes with the process that holds it."""
    with write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning('%s: another process is writing here; waiting for it to end', folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems lock no folders
            logger.warning('%s cannot be locked: let no second process write into it', folder)
        yield
    finally:
        os.close(descriptor)


def check_key(path: Path, key: str) -> None:
    """Refuse a key that BasicSR could not read back; ``path`` is named in the DataSetError."""
    if not re.fullmatch(r'[A-Za-z0-9_-]+', key):
        raise DataSetError(f"{path}: key '{key}' must be made of ASCII letters, digits, '_' and '-' only")


def _check_name(path: Path) -> None:
    if path.suffix != '.lmdb':
        raise DataSetError(f"{path}: the name of an LMDB folder must end in '.lmdb'")


def record_of(path: Path) -> Path:
    """The record of an LMDB, beside it."""
    path = path.resolve() if path.is_symlink() or not path.stem else path
    return path.with_name(f'{path.stem}.record.jsonl')


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, as far as they are whole."""
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding='utf-8') as file:
        for line in file:
            yield json.loads(line)


def _shapes(record: Path) -> list[tuple[str, int, int, int]]:
    """Key, height, width and channels of each entry."""
    lines = _lines(record)
    next(lines, None)
    return [(line['key'], *line['shape']) for line in lines]


def _difference(there: Mapping[str, Any], now: Mapping[str, Any], apart_from: Sequence[str]) -> str:
    """What differs between two descriptions, in words; '' if nothing does."""
    names = [name for name in now if name not in apart_from and there.get(name) != now[name]]
    short = [name for name in names if len(f'{there.get(name)}{now[name]}') < 60]
    if short:
        return ', '.join(f'{name} {_said(there.get(name))} there and {_said(now[name])} now' for name in short)
    return f'other {" and other ".join(names)}' if names else ''


def _said(value: Any) -> str:
    return 'none' if value is None else str(value)
