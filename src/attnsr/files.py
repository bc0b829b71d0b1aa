"""Files that are whole under their name, or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: Part of the name of files that are being written; what bears it and has no living writer is a leftover.
TEMPORARY = '.writing-'


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` only once it is written, flushed to disk and closed.

    Raises:
        OSError: the file cannot be written; what was under ``path`` before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}{TEMPORARY}{os.getpid()}')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed left in ``folder``."""
    for leftover in Path(folder).glob(f'*{TEMPORARY}*'):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The renaming itself must survive a power cut too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
