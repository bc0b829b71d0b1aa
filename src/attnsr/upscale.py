"""``basicsr upscale``: picture files in, larger picture files out.

One thread reads the next file while the network works, another compresses and writes what it has finished, band by
band. A file that fails is told and does not keep the others from being done.
"""

import contextlib
import errno
import glob
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from attnsr import pictures
from attnsr.data_prep import images
from attnsr.errors import UsageError
from attnsr.files import remove_leftovers
from attnsr.memory import free_memory, is_out_of_memory
from attnsr.pictures import FORMATS, QUALITIES, Picture, PictureError, PictureWriter
from attnsr.upscaler import USED_MEMORY, Upscaler

__all__ = ['Report', 'Task', 'check_quality', 'plan', 'run']

#: Seconds after which a thread that waits for another looks whether the run has ended.
POLLED = 0.1

#: What makes a text a pattern for :mod:`glob`.
MAGIC = '*?['

#: {ending of a name: key in FORMATS}.
FORMATS_BY_ENDING = {ending: key for key, each in FORMATS.items() for ending in each.suffixes}


@dataclass(frozen=True)
class Task:
    """One picture.

    Attributes:
        source: The file.
        target: Where its enlargement goes.
        format: Key in :data:`attnsr.pictures.FORMATS`.
    """

    source: Path
    target: Path
    format: str


@dataclass
class Report:
    """What became of all pictures.

    Attributes:
        done: Files that were written.
        skipped: Files that were there already.
        failed: One line for each that could not be done.
        left: How many were not begun.
        pixels: Of the results.
        seconds: For all.
    """

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: int = 0
    pixels: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f', {self.pixels / self.seconds / 1e6:.2f} megapixels a second' if self.pixels else ''
        counts = {'skipped, as they were there': len(self.skipped), 'failed': len(self.failed), 'not begun': self.left}
        others = ''.join(f', {count} {what}' for what, count in counts.items() if count)
        count = f'{len(self.done)} picture{"" if len(self.done) == 1 else "s"}'
        return f'{count} in {self.seconds:.1f} s{rate}{others}'


def plan(
    inputs: Sequence[str], out: Path, *, format: str | None = None, suffix: str = '', recursive: bool = False
) -> list[Task]:
    """What is to be upscaled, and where to.

    Args:
        inputs: Files, folders and patterns with ``*``, ``?``, ``[...]`` and, for folders of any depth, ``**``.
        out: A folder; or, of one input file, the file to write, which ends as one of the formats.
        format: Key in :data:`attnsr.pictures.FORMATS`; None for that of each input, or that which ``out`` ends as.
        suffix: Behind the name of each file.
        recursive: Look into the folders below folders too. What is found lies in the same folders below ``out``.

    Raises:
        UsageError: An input is not there or holds no pictures, two would be written to one file, or one over itself.
    """
    found: list[tuple[Path, Path]] = []  # with the folder and name below the output's folder
    problems: list[str] = []
    if Path(suffix).name != suffix.rstrip('.') and suffix:
        problems.append(f'--suffix {suffix}: goes behind the names of files, and cannot hold a folder')
    for text in inputs:
        try:
            found += _found(text, recursive, out)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError('\n'.join(problems))
    # What is named twice is done once.
    found = list({(os.path.realpath(source), place): (source, place) for source, place in found}.values())
    single = len(found) == 1 and len(inputs) == 1 and not Path(inputs[0]).is_dir()
    tasks = []
    if out.suffix.lower() in FORMATS_BY_ENDING and not out.is_dir():
        if found and not single:
            problems.append(f'{out}: is the name of one file, and there are {len(found)} pictures; name a folder')
        elif format and format != pictures.format_of(out):
            problems.append(f'{out}: does not end as a {FORMATS[format].name} file, as --format says; leave out one')
        elif suffix:
            problems.append(f'--suffix {suffix}: is for folders; the name of the file is {out} already')
        else:
            tasks = [Task(source, out, pictures.format_of(out)) for source, _ in found]
    else:
        if single and not out.exists() and out.suffix.lower() in Image.registered_extensions():
            pictures.format_of(out)  # which says what can be written
        if out.exists() and not out.is_dir():
            problems.append(f'{out}: is a file, not a folder, and does not end as a picture that can be written')
        for source, place in found:
            kept = source.suffix if source.suffix.lower() in FORMATS_BY_ENDING else '.png'
            ending = kept if format is None else FORMATS[format].suffixes[0]
            target = out / place.with_name(f'{place.stem}{suffix}{ending}')
            tasks.append(Task(source, target, format or FORMATS_BY_ENDING[ending.lower()]))
    problems += _collisions(tasks)
    problems += _unwritable({task.target.parent for task in tasks} if not problems else ())
    if problems:
        raise UsageError('\n'.join(problems))
    return tasks


def _found(text: str, recursive: bool, out: Path) -> list[tuple[Path, Path]]:
    """The files that one input means, each with its place below the folder of the output."""
    if not text:
        raise UsageError("an input is '', which names nothing; name a file, a folder or a pattern")
    path = Path(text).expanduser()
    if path.is_dir():
        files = [file for file in images.search(path, recursive)[0] if file.suffix.lower() in FORMATS_BY_ENDING]
        if path.resolve() in out.resolve().parents:  # of an earlier run
            files = [file for file in files if out.resolve() not in file.resolve().parents]
        if not files:
            has_folders = any(each.is_dir() for each in path.iterdir())
            deeper = '; --recursive looks into the folders below it too' if has_folders and not recursive else ''
            raise UsageError(f'{text}: holds no pictures that can be upscaled ({", ".join(FORMATS_BY_ENDING)}){deeper}')
        return [(file, file.relative_to(path)) for file in files]
    if path.exists() or not any(character in text for character in MAGIC):
        if not path.exists():
            raise UsageError(f'{text}: there is no such file or folder')
        return [(path, Path(path.name))]
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        what = f'only folders, such as {matches[0]}; name them without a pattern' if matches else 'no file'
        raise UsageError(f'{text}: matches {what}')
    return [(file, Path(file.name)) for file in files]


def _unwritable(folders: Iterable[Path]) -> list[str]:
    """A line for each folder that cannot be written to, or made."""
    problems = []
    for folder in sorted(folders):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            problems.append(f'{there}: is a file, not a folder; name another folder')
        elif not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            problems.append(f'{there}: cannot be written to; make it writable, or name another folder')
    return problems


def _collisions(tasks: Sequence[Task]) -> list[str]:
    problems = []
    sources = {os.path.realpath(task.source): task.source for task in tasks}
    targets: dict[str, Path] = {}
    for task in tasks:
        place = os.path.realpath(task.target)
        if place in sources:
            problems.append(f'{task.source}: would be written over {sources[place]}; name another folder, or --suffix')
        elif place in targets:
            problems.append(
                f'{task.source} and {targets[place]} would both be written to {task.target}; name the folder above '
                'them with --recursive, or upscale them by themselves'
            )
        targets.setdefault(place, task.source)
    return problems


def check_quality(tasks: Sequence[Task], quality: int | None) -> None:
    """See that a quality is one, and that there is something to be written with it.

    Raises:
        UsageError: it is not.
    """
    if quality is None:
        return
    if not 0 <= quality <= 100:
        raise UsageError(f'--quality {quality}: must be from 0 to 100')
    if not any(task.format in QUALITIES for task in tasks):
        valid = ' and '.join(FORMATS[key].name for key in QUALITIES)
        raise UsageError(f'--quality {quality}: only {valid} files have one, and none is to be written')


def run(
    tasks: Sequence[Task],
    upscaler: Upscaler,
    *,
    quality: int | None = None,
    skip_existing: bool = False,
    tell: Callable[[str], object] = print,
    fail: Callable[[str], object] = print,
) -> Report:
    """Upscale pictures.

    Args:
        tasks: See :func:`plan`.
        upscaler: What with.
        quality: Of JPEG and WebP, see :class:`attnsr.pictures.PictureWriter`.
        skip_existing: Leave out what is there already.
        tell: Is given a line for each picture that is done.
        fail: Is given a line for each that failed.

    Raises:
        KeyboardInterrupt: Nothing half-written is left.
    """
    began = time.perf_counter()
    report = Report()
    if skip_existing:
        report.skipped = [task.target for task in tasks if task.target.exists()]
        tasks = [task for task in tasks if not task.target.exists()]
    for folder in {task.target.parent for task in tasks}:
        remove_leftovers(folder)
    with tqdm(unit='px', unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        if not bar.disable:
            threading.Thread(target=_count, args=(bar, tasks, upscaler), name='counting', daemon=True).start()
        job = _Job(upscaler, quality, report, bar, tell, fail)
        try:
            with contextlib.closing(_read_ahead(tasks)) as readings:
                for number, task in enumerate(tasks, start=1):
                    bar.set_description(f'{task.source.name}, {number} of {len(tasks)}')
                    job.upscale(task, next(readings))  # no name keeps the picture when the next one is read
                    if job.full:
                        report.left = len(tasks) - number
                        break
            job.settle()
        finally:
            job.abort()
    report.seconds = time.perf_counter() - began
    return report


def _count(bar: Any, tasks: Iterable[Task], upscaler: Upscaler) -> None:
    """Tell the bar how many pixels the results of all files have that can be understood."""
    total = 0
    for task in tasks:
        try:
            height, width, _ = pictures.header(task.source)
        except (PictureError, OSError):
            continue  # which is told when its turn comes
        rows, columns = upscaler.size(height, width)
        total += rows * columns
    bar.total = total


def _read_ahead(tasks: Sequence[Task]) -> Generator[Future[Picture], None, None]:
    """The picture of each task, which was begun to be read while the one before was worked on.

    What would take the memory that the one before needs is read when its turn comes.
    """
    with ThreadPoolExecutor(1, 'reading') as pool:
        try:
            following = None
            for number, task in enumerate(tasks):
                reading = following or pool.submit(pictures.read, task.source)
                reading.exception()  # one at a time: waits until it is there
                following = None
                if number + 1 < len(tasks) and _may_be_read_ahead(tasks[number + 1].source):
                    following = pool.submit(pictures.read, tasks[number + 1].source)
                yield reading
                del reading  # and the picture with it
        finally:
            pool.shutdown(cancel_futures=True)


def _may_be_read_ahead(path: Path) -> bool:
    """Whether reading takes at most half of what the network leaves free, see :data:`attnsr.upscaler.USED_MEMORY`."""
    try:
        return pictures.memory_needed(path) <= (1 - USED_MEMORY) / 2 * free_memory(torch.device('cpu'))
    except (PictureError, OSError):
        return False  # which is told when its turn comes


class _Job:
    """The pictures of one run: the one that the network works on, and the one before, which is still being written."""

    def __init__(
        self,
        upscaler: Upscaler,
        quality: int | None,
        report: Report,
        bar: Any,
        tell: Callable[[str], object],
        fail: Callable[[str], object],
    ) -> None:
        self.upscaler, self.quality, self.report, self.bar = upscaler, quality, report, bar
        self.full = False
        self._tell, self._fail = tell, fail
        self._writing: list[_Writing] = []

    def upscale(self, task: Task, reading: Future[Picture]) -> None:
        try:
            picture = reading.result()
            writing = self._begin(task, picture)
            for band in self.upscaler.bands(picture.pixels, self.bar.update):
                writing.put(band)
                if writing.failed:
                    break
            writing.put(None)
        except Exception as error:
            if not _is_of_picture(error):
                raise
            if self._writing and self._writing[-1].task is task:
                self._writing.pop().abort()
            self._failed(task, error)
        self.settle(but=1)

    def settle(self, but: int = 0) -> None:
        """Wait until all pictures are written, except for the last ``but`` ones."""
        while len(self._writing) > but:
            writing = self._writing.pop(0)
            error = writing.wait()
            if error is None:
                self.report.done.append(writing.task.target)
                self.report.pixels += writing.height * writing.width
                told = ''.join(f', {note}' for note in writing.notes)
                seconds = f'{time.perf_counter() - writing.began:.1f} s'
                self._tell(f'{writing.task.target}: {writing.width} x {writing.height}, {seconds}{told}')
            elif _is_of_picture(error):
                self._failed(writing.task, error)
            else:
                raise error

    def abort(self) -> None:
        """Leave nothing half-written."""
        for writing in self._writing:
            writing.abort()
        self._writing.clear()

    def _begin(self, task: Task, picture: Picture) -> '_Writing':
        height, width = self.upscaler.size(*picture.pixels.shape[:2])
        key = task.format
        pictures.check_fits(task.target, key, height, width, picture.pixels.shape[2])
        try:
            task.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PictureError(
                f'{task.target.parent}: cannot be made: {error.strerror}; name another folder'
            ) from error
        quality = self.quality if key in QUALITIES else None
        channels, dtype = picture.pixels.shape[2], picture.pixels.dtype
        writer = PictureWriter(task.target, key, height, width, channels, dtype, picture.metadata, quality)
        self._writing.append(_Writing(task, writer, height, width, pictures.notes_on(key, picture)))
        self._writing[-1].start()
        return self._writing[-1]

    def _failed(self, task: Task, error: BaseException) -> None:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            self.full = True
        told = str(error)
        if is_out_of_memory(error) and not isinstance(error, UsageError):
            told = (
                'is too large for the memory that is free; choose smaller tiles (--tile 256), or close other programs'
            )
        named = any(str(place) in told for place in (task.source, task.target, task.target.parent))
        line = told if named else f'{task.source}: {told}'
        self.report.failed.append(line)
        self._fail(line)


def _is_of_picture(error: BaseException) -> bool:
    """Whether an error is one picture's, and the others can still be done."""
    return isinstance(error, UsageError | OSError) or is_out_of_memory(error)


class _Writing:
    """A picture that is written in a thread of its own."""

    def __init__(self, task: Task, writer: PictureWriter, height: int, width: int, notes: Sequence[str]) -> None:
        self.task, self.height, self.width, self.notes = task, height, width, notes
        self.began = time.perf_counter()
        self.failed = False
        self._error: BaseException | None = None
        # Of two bands, so that memory is bounded: one is written, one waits, and the next one is computed. None ends.
        self._bands: queue.Queue[np.ndarray | None] = queue.Queue(1)
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._write, args=(writer,), name=f'writing {task.target.name}')

    def start(self) -> None:
        self._thread.start()

    def put(self, band: np.ndarray | None) -> None:
        while not self.failed:
            with contextlib.suppress(queue.Full):
                self._bands.put(band, timeout=POLLED)
                return

    def wait(self) -> BaseException | None:
        self._thread.join()
        return self._error

    def abort(self) -> None:
        self._aborted.set()  # first: the thread then ends by itself, whatever becomes of this one
        if self._thread.ident is not None:
            self._thread.join()

    def _write(self, writer: PictureWriter) -> None:
        try:
            with writer:
                while (band := self._next()) is not None:
                    writer.write(band)
        except _Aborted:
            pass
        except BaseException as error:
            self._error, self.failed = error, True

    def _next(self) -> np.ndarray | None:
        while not self._aborted.is_set():
            with contextlib.suppress(queue.Empty):
                return self._bands.get(timeout=POLLED)
        raise _Aborted


class _Aborted(Exception):
    """The picture is not wanted any more."""
