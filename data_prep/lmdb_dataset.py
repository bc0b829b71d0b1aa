"""Writes one LMDB in BasicSR's form, so that a folder of the final name is always a whole LMDB.

The form is that of ``basicsr.utils.lmdb_util``: a folder ``NAME.lmdb`` with ``data.mdb`` (PNG files by key),
``lock.mdb`` and ``meta_info.txt`` with one line ``key.png (height,width,channels) compress_level`` per image.
"""

import contextlib
import fcntl
import glob
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import lmdb
import numpy as np
from basicsr.utils.lmdb_util import LmdbMaker

from attnsr.errors import UsageError
from attnsr.files import flush_to_disk

__all__ = ['DataSetError', 'LmdbSummary', 'write_errors', 'write_lmdb']


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


def write_lmdb(
    path: str | Path, images: Mapping[str, np.ndarray], overwrite: bool = False, compress_level: int = 1
) -> LmdbSummary:
    """Write images as PNG files into an LMDB that BasicSR's data sets read.

    The LMDB is written under a hidden name beside ``path`` and takes its final name when it is whole and on the disk;
    a run killed before that leaves only the hidden folder, which the next run removes. An LMDB that is already there
    is kept, or with ``overwrite`` replaced once the new one is whole. Two processes writing into one folder take turns.

    Args:
        path: Folder to write; its name ends in ``.lmdb`` and the folder it lies in exists.
        images: uint8 arrays of shape (height, width, 3), channels in OpenCV's order BGR, by key. A key is made of
            ASCII letters, digits, ``_`` and ``-``: BasicSR cuts keys at the first dot.
        overwrite: Replace an LMDB that is already there.
        compress_level: PNG compression, 0 (none, much the fastest to read) to 9.

    Raises:
        DataSetError: The name does not end in ``.lmdb``, there is no image, a key or an image is not as above, or what
            is at ``path`` already is no LMDB, or one of other images and ``overwrite`` is not set.
        OSError: The LMDB cannot be written: no permission, no space, ...
    """
    path = Path(path)
    if path.suffix != '.lmdb':
        raise DataSetError(f"{path}: the name of an LMDB folder must end in '.lmdb'")
    meta_info = _meta_info(path, images, compress_level)

    with write_errors(path), _taking_turns(path.parent):
        replaced = path.with_name(f'.{path.stem}.replaced.lmdb')
        _mend_interrupted(path, replaced)
        kept = path.exists() and _can_keep(path, meta_info, overwrite)
        if not kept:
            partial = path.with_name(f'.{path.stem}.partial-{os.getpid()}.lmdb')
            try:
                _fill(partial, images, compress_level)
                if path.exists():
                    path.rename(replaced)
                partial.rename(path)
                flush_to_disk(path.parent)
            finally:
                _mend_interrupted(path, replaced)
        size = (path / 'data.mdb').stat().st_size
    pixels = sum(image.shape[0] * image.shape[1] for image in images.values())
    return LmdbSummary(path, len(images), pixels, size, kept)


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what fails inside, in LMDB or the file system, into one OSError of one line that names ``path``."""
    try:
        yield
    except (OSError, lmdb.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f'{path} cannot be written: {reason}') from error


def _meta_info(path: Path, images: Mapping[str, np.ndarray], compress_level: int) -> str:
    """The text of ``meta_info.txt`` as LmdbMaker will write it; refuses what BasicSR could not read back."""
    if not images:
        raise DataSetError(f'{path}: there is no image to write')
    lines = []
    for key, image in sorted(images.items()):
        if not re.fullmatch(r'[A-Za-z0-9_-]+', key):
            raise DataSetError(f"{path}: key '{key}' must be made of ASCII letters, digits, '_' and '-' only")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataSetError(
                f"{path}: image '{key}' must be uint8 of shape (height, width, 3), "
                f'and is {image.dtype} of shape {image.shape}'
            )
        height, width, channels = image.shape
        lines.append(f'{key}.png ({height},{width},{channels}) {compress_level}\n')
    return ''.join(lines)


def _can_keep(path: Path, meta_info: str, overwrite: bool) -> bool:
    """Whether what is at ``path`` stays; refuses to keep an LMDB of other images and to delete what is no LMDB."""
    if not (path / 'data.mdb').is_file() or not (path / 'meta_info.txt').is_file():
        raise DataSetError(f"{path} is in the way: it is no LMDB of BasicSR's (data.mdb, meta_info.txt); move it away")
    if overwrite:
        return False
    if (path / 'meta_info.txt').read_text(encoding='utf-8') != meta_info:
        raise DataSetError(f'{path} holds other images than would be written now; overwrite it, or write elsewhere')
    return True


def _fill(folder: Path, images: Mapping[str, np.ndarray], compress_level: int) -> None:
    """Write all images and put everything on the disk, not only into the operating system's cache."""
    values = {}
    for key, image in sorted(images.items()):
        _, png = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, compress_level])
        values[key] = png.tobytes()
    # A value takes whole memory pages (its last one filled in part, and 16 bytes of header); a page more for each
    # covers the tree above them, and 1 MiB the tables of the database itself.
    pages = sum(len(value) // mmap.PAGESIZE + 3 for value in values.values())
    maker = LmdbMaker(str(folder), map_size=pages * mmap.PAGESIZE + 2**20, compress_level=compress_level)
    try:
        for key, value in values.items():
            maker.put(value, key, images[key].shape)
        maker.close()
    finally:
        maker.env.close()
        maker.txt_file.close()
    for file in (*folder.iterdir(), folder):
        flush_to_disk(file)


def _mend_interrupted(path: Path, replaced: Path) -> None:
    """Remove what was not finished of ``path``, and bring the old LMDB back if the new one never took its name."""
    for partial in path.parent.glob(f'.{glob.escape(path.stem)}.partial-*.lmdb'):
        shutil.rmtree(partial)
    if replaced.exists():
        if path.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(path)


@contextlib.contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` that goes with the process, so that a killed one blocks nobody."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock a folder; there, two runs at once are the user's to avoid.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
