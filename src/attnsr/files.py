"""Files that are whole under their name, or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: What follows the name of a file that is being written, before the number of the process that writes it.
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename in (None, str(temporary)):
            error.filename = str(path)  # of a full disk the system tells no name
        raise
    flush_to_disk(path.parent)  # the renaming itself must survive a power cut too


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers of this machine that were killed left in ``folder``, if there is such a folder."""
    for leftover in Path(folder).glob(f'*{TEMPORARY}*'):
        process = leftover.name.rpartition(TEMPORARY)[2]
        if process.isdigit() and not _lives(int(process)):
            leftover.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Have the system write a file, or the names in a folder, to disk.

    Raises:
        OSError: a file cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(path):  # some network file systems know no such thing for a folder
            raise
    finally:
        os.close(descriptor)
