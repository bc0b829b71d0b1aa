"""From HR photographs to HR and LR LMDBs: all files are checked first, and an interrupted run is gone on with.

Every photograph is decoded once and gives its sub-images of all LMDBs: the HR ones, and for each scale those of the LR
file that belongs to it or, where there is none, of the photograph reduced by :func:`~.matlab_resize.imresize`. The
whole photograph is reduced before it is cut, so that no sub-image shows the reduction's treatment of borders.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from tqdm import tqdm

from attnsr.data_prep import images, preview
from attnsr.data_prep.images import ImageFile
from attnsr.data_prep.lmdb_dataset import (
    DataSetError,
    Entry,
    LmdbSummary,
    LmdbWriter,
    Summary,
    check_key,
    encode,
    exclusive,
    lr_lmdbs,
    write_errors,
)
from attnsr.data_prep.matlab_resize import imresize
from attnsr.data_prep.parallel import available_cores, in_order
from attnsr.files import remove_leftovers, write_atomically

__all__ = ['Job', 'Pair', 'Plan', 'check', 'prepare', 'same_keys', 'windows']

#: Side of the LR patches that networks are mostly trained on.
USUAL_PATCH = 48

#: Bytes that an entry takes beside its pixels, at most: headers of PNG, pages of LMDB and the record.
OVERHEAD = 8192

#: Images whose entries are lost at most when a run is killed; each commit waits for the disk.
COMMIT_IMAGES = 16


@dataclass(frozen=True)
class Pair:
    """One photograph: its key in the LMDBs, the HR file, and LR files by scale where there are any."""

    key: str
    hr: Path
    lr: Mapping[int, Path] = field(default_factory=dict)
    """Where a scale has no file, the LR image is made from the HR one."""


@dataclass(frozen=True)
class Job:
    """LMDBs that are made together: one of HR images, and one of LR images for each scale."""

    out: Path
    """Folder that the LMDBs lie in."""
    pairs: tuple[Pair, ...]
    scales: tuple[int, ...]
    hr_name: str = 'HR'
    """Name of the HR LMDB, without '.lmdb'."""
    lr_name: str = 'LR_x{scale}'
    """Name of the LR LMDBs, without '.lmdb'."""
    crop: int | None = None
    """Side of the HR sub-images; None leaves images whole."""
    step: int | None = None
    """From one HR sub-image to the next; the side of the sub-images if None."""
    problems: tuple[str, ...] = ()
    """What is wrong with the files' names, one line each: told together with what is wrong in the files."""


def prepare(
    jobs: Sequence[Job],
    compress_level: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write the LMDBs of some jobs, their meta-info files, and for each job a picture of some of its pairs.

    HR images are cut at the right and below to a multiple of all scales of their job, so that one HR LMDB serves all
    of them, and then, with ``crop``, into sub-images as BasicSR's ``extract_subimages`` does: every ``step`` pixels,
    and at the right and lower edge. LR images are cut alike. PNG files that need no change are stored byte for byte.

    All files are looked at before anything is written. An LMDB that is already there and was made of the same files in
    the same way is kept. A run that was interrupted, by whatever, is gone on with by the same call; the result is the
    same, byte for byte, whatever the interruptions and the number of workers.

    Args:
        jobs: What to make; files may belong to several jobs.
        compress_level: PNG compression of what is encoded anew, 0 (none, much the fastest to read) to 9.
        workers: Threads that decode, reduce and encode; one a core by default.
        overwrite: Replace LMDBs that are already there and hold something else.
        quiet: Show no progress bars.

    Returns:
        One entry per LMDB, in the order written; prints as a table.

    Raises:
        DataSetError: An option is out of range, a job has no images, files cannot be used (all of them are listed,
            each with its reason), or what lies at the place of an LMDB is not what would be written and ``overwrite``
            is not set.
        OSError: A folder cannot be written: no permission, too little space (told before anything is written), ...
    """
    begun = time.perf_counter()
    workers = available_cores() if workers is None else workers
    _check_options(jobs, compress_level, workers)
    plans = check(jobs, workers, quiet, 'nothing was written')

    summary = Summary()
    with ExitStack() as locks:
        # One folder may have several names, and is locked once.
        for _, folder in sorted({job.out.resolve(): job.out for job in jobs}.items()):
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(exclusive(folder))
            remove_leftovers(folder)
        works = [_Work(job, planned, compress_level) for job, planned in zip(jobs, plans, strict=True)]
        for work in works:
            work.look(overwrite)
        _check_space(works)
        for work in works:
            summary.extend(work.run(workers, quiet))
    summary.notes.extend(note for work in works for note in work.notes())
    files = {file.path: file for planned in plans for plan in planned for file in (plan.hr, *plan.lr.values())}
    summary.notes.extend(_treatments(file for _, file in sorted(files.items())))
    summary.seconds = time.perf_counter() - begun
    return summary


def check(jobs: Sequence[Job], workers: int, quiet: bool = False, outcome: str = '') -> list[list['Plan']]:
    """Look at all files of some jobs: what is made of each pair, in the order of keys; one list a job.

    Args:
        jobs: The jobs.
        workers: Threads.
        quiet: Show no progress bar.
        outcome: Told with the number of problems, in a last line.

    Raises:
        DataSetError: Files cannot be used, or sizes contradict each other; one line for each problem of all jobs.
    """
    files, problems = _inspect(jobs, workers, quiet)
    plans = []
    for job in jobs:
        planned, misfits = _plan(job, files)
        plans.append(planned)
        problems += [*job.problems, *misfits]
    if problems := list(dict.fromkeys(problems)):
        end = [f'{_count(len(problems), "problem")}; {outcome}'] if outcome else []
        raise DataSetError('\n'.join([*problems, *end]))
    return plans


def windows(height: int, width: int, crop: int, step: int) -> list[tuple[int, int, int, int]]:
    """Where sub-images are cut: (top, left, height, width) of each, row by row.

    As BasicSR's ``extract_subimages`` with a threshold of 0: every ``step`` pixels as long as a whole sub-image is
    left, and one more at the edge if there is a rest. A side shorter than ``crop`` is taken whole; BasicSR fails there.
    """

    def starts(side: int) -> list[int]:
        return sorted({*range(0, side - crop + 1, step), max(0, side - crop)})

    size = min(height, crop), min(width, crop)
    return [(top, left, *size) for top in starts(height) for left in starts(width)]


def same_keys(pairs: Iterable[Pair]) -> list[str]:
    """One line for each key that several pairs have."""
    files: dict[str, list[str]] = {}
    for pair in pairs:
        files.setdefault(pair.key, []).append(str(pair.hr))
    return [
        f"{', '.join(paths[:-1])} and {paths[-1]}: have the same key '{key}'; rename all but one"
        for key, paths in files.items()
        if len(paths) > 1
    ]


@dataclass(frozen=True)
class Plan:
    """What is made of one pair."""

    key: str
    hr: ImageFile
    lr: Mapping[int, ImageFile]
    area: tuple[int, int]
    """Height and width of the HR image that are used."""
    windows: tuple[tuple[int, int, int, int], ...]
    """In the HR image; for a whole image, all of its area."""
    cropped: bool

    @property
    def entries(self) -> list[str]:
        """Keys of what is made of it, in the order of the windows."""
        if not self.cropped:
            return [self.key]
        return [f'{self.key}_s{number:03d}' for number in range(1, len(self.windows) + 1)]

    def read(self, scale: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair at one scale, cut to :attr:`area`; the LR image is made of the HR one where there is no file.

        Returns:
            uint8, (height, width, 3) BGR or (height, width) grey.

        Raises:
            ImageProblem: A file has changed since it was checked, or cannot be read any more.
        """
        height, width = self.area
        hr = images.read(self.hr)[:height, :width]
        lr = images.read(self.lr[scale]) if scale in self.lr else imresize(hr, Fraction(1, scale))
        return hr, lr[: height // scale, : width // scale]


@dataclass
class _Output:
    """One LMDB of a job; ``scale`` 1 is the HR one."""

    scale: int
    writer: LmdbWriter
    done: int = 0
    """Images that are in the LMDB already."""


class _Work:
    """A job that is being done."""

    def __init__(self, job: Job, plans: Sequence[Plan], compress_level: int) -> None:
        self._job, self._plans, self._level = job, plans, compress_level
        self.out = job.out
        folders = {1: [plan.hr.path.parent for plan in plans]}
        folders |= {scale: [plan.lr[scale].path.parent for plan in plans if scale in plan.lr] for scale in job.scales}
        self._roots = {
            scale: Path(os.path.commonpath([path.absolute() for path in paths]))
            for scale, paths in folders.items()
            if paths
        }
        self._outputs = [
            _Output(scale, LmdbWriter(job.out / f'{name}.lmdb', self._description(scale), compress_level))
            for scale, name in ((1, job.hr_name), *((s, job.lr_name.format(scale=s)) for s in job.scales))
        ]
        self._kept: dict[int, LmdbSummary | None] = {}
        self._meta_info = job.out / f'meta_info_{job.hr_name}.txt'
        self._preview = job.out / f'{job.hr_name}{preview.SUFFIX}'

    def look(self, overwrite: bool) -> None:
        """See what is there already; refuse to touch what would be something else."""
        self._kept = {output.scale: output.writer.kept(overwrite) for output in self._outputs}

    def notes(self) -> Iterator[str]:
        """What is to be known of what was written."""
        sides = ((min(window[2:]), plan) for plan in self._plans for window in plan.windows)
        side, plan = min(sides, key=itemgetter(0))
        if side < USUAL_PATCH * max(self._job.scales):
            lmdb, file = self._outputs[0].writer.path, plan.hr.path.name
            yield (
                f'{lmdb}: the smallest image has a side of {side} pixels ({file}); no larger patches (gt_size) can be '
                'cut from it'
            )
        if not self._kept[1]:
            hr, *made = (output.writer.path for output in self._outputs)
            for lr in lr_lmdbs(hr):
                if lr not in made:
                    yield f'{lr}: was made for an {hr.name} that is replaced now; make it anew or remove it'

    def needed_bytes(self) -> int:
        """The disk that is needed, estimated from above."""
        total = 0
        for output in self._todo():
            for plan in self._plans:
                file, factor = self._source(plan, output.scale)
                if self._is_stored_as_it_is(plan, output.scale):
                    total += file.bytes + OVERHEAD
                    continue
                pixels = sum(height * width for _, _, height, width in plan.windows) // output.scale**2
                needed = pixels * file.channels * 1.01
                # Fast compression gives somewhat larger files than what PNG files come with. Reduced images have more
                # detail in a pixel than any.
                if file.as_is and factor == 1 and self._level:
                    needed = min(needed, 1.4 * pixels * file.bytes / (file.height * file.width))
                total += math.ceil(needed) + OVERHEAD * len(plan.windows)
            total -= output.writer.partial_bytes()
        return max(0, total)

    def run(self, workers: int, quiet: bool) -> list[LmdbSummary]:
        begun = time.perf_counter()
        todo = self._todo()
        ends = [0, *accumulate(len(plan.windows) for plan in self._plans)]
        for output in todo:
            output.done = ends.index(output.writer.begin())
        first = min((output.done for output in todo), default=len(self._plans))
        items = (
            (plan, [output.scale for output in todo if output.done <= number])
            for number, plan in enumerate(self._plans[first:], start=first)
        )
        bar = tqdm(
            total=len(self._plans), initial=first, desc=self._job.hr_name, unit='image', disable=quiet or not todo
        )
        with bar:
            for number, entries in enumerate(in_order(self._make, items, workers), start=first):
                for output in todo:
                    if output.done > number:
                        continue
                    for entry in entries[output.scale]:
                        output.writer.put(entry)
                    # Decided by the entries alone, so that every run has the same batches.
                    if output.writer.is_full or (number + 1) % COMMIT_IMAGES == 0:
                        output.writer.commit()
                bar.update()
        if todo:  # they tell of what is replaced now
            self._meta_info.unlink(missing_ok=True)
            self._preview.unlink(missing_ok=True)
        rows = []
        for output in self._outputs:
            seconds = time.perf_counter() - begun
            rows.append(self._kept[output.scale] or output.writer.finish(seconds))
        # An earlier run may have ended between the last LMDB and these.
        if not (self._meta_info.exists() and self._preview.exists()):
            self._write_meta_info()
            self._write_preview()
        return rows

    def _todo(self) -> list[_Output]:
        return [output for output in self._outputs if not self._kept[output.scale]]

    def _source(self, plan: Plan, scale: int) -> tuple[ImageFile, int]:
        """The file that an LMDB's images come from, and the factor it is reduced by."""
        if scale == 1:
            return plan.hr, 1
        return (plan.lr[scale], 1) if scale in plan.lr else (plan.hr, scale)

    def _is_stored_as_it_is(self, plan: Plan, scale: int) -> bool:
        """Whether one image of the LMDB of this scale is all of a file, and nothing has to be done to it."""
        file, factor = self._source(plan, scale)
        whole = (file.height * scale, file.width * scale) == plan.area and plan.windows == ((0, 0, *plan.area),)
        return whole and factor == 1 and file.as_is

    def _description(self, scale: int) -> dict[str, Any]:
        """What decides on every byte of an LMDB."""
        sources, cuts = [], []
        for plan in self._plans:
            file, factor = self._source(plan, scale)
            sources.append([plan.key, self._name(plan, scale), file.sha256, factor])
            cuts.append([plan.area, plan.windows])
        return {
            'scale': scale,
            'pair': None if scale == 1 else f'{self._job.hr_name}.lmdb',
            'crop': self._job.crop,
            'step': self._job.step,
            'compression': self._level,
            'source files': hashlib.sha256(json.dumps(sources).encode()).hexdigest(),
            'cuts': hashlib.sha256(json.dumps(cuts).encode()).hexdigest(),
            'opencv': cv2.__version__,
            'pillow': PIL.__version__,
        }

    def _name(self, plan: Plan, scale: int) -> str:
        file, factor = self._source(plan, scale)
        return file.path.absolute().relative_to(self._roots[1 if factor > 1 else scale]).as_posix()

    def _make(self, item: tuple[Plan, Sequence[int]]) -> dict[int, list[Entry]]:
        """The entries of one pair, by scale."""
        plan, scales = item
        hr: np.ndarray | None = None
        made = {}
        for scale in scales:
            file, factor = self._source(plan, scale)
            height, width = (side // scale for side in plan.area)
            cuts = [tuple(value // scale for value in window) for window in plan.windows]
            source = {'file': self._name(plan, scale), 'reduced': factor, 'area': plan.area}
            if self._is_stored_as_it_is(plan, scale):
                shape = height, width, file.channels
                made[scale] = [Entry(plan.entries[0], images.read_bytes(file), shape, {**source, 'top': 0, 'left': 0})]
                continue
            if file is plan.hr:
                if hr is None:
                    hr = images.read(file)[: plan.area[0], : plan.area[1]]
                image = hr if factor == 1 else imresize(hr, Fraction(1, factor))
            else:
                image = images.read(file)
            made[scale] = [
                encode(key, image[top : top + h, left : left + w], self._level, {**source, 'top': top, 'left': left})
                for key, (top, left, h, w) in zip(plan.entries, cuts, strict=True)
            ]
        return made

    def _write_meta_info(self) -> None:
        """Lines ``name.png (height,width,channels)``, as BasicSR's ``meta_info_file`` option reads them."""
        lines = sorted(
            f'{key}.png ({height},{width},{plan.hr.channels})\n'
            for plan in self._plans
            for key, (_, _, height, width) in zip(plan.entries, plan.windows, strict=True)
        )
        with write_errors(self._meta_info), write_atomically(self._meta_info) as file:
            file.write(''.join(lines).encode())

    def _write_preview(self) -> None:
        hr, *lr = self._outputs
        keys = [key for plan in self._plans for key in plan.entries]
        picture = preview.draw(hr.writer.path, {output.scale: output.writer.path for output in lr}, keys)
        with write_errors(self._preview), write_atomically(self._preview) as file:
            picture.save(file, 'png')


def _check_options(jobs: Sequence[Job], compress_level: int, workers: int) -> None:
    if not 0 <= compress_level <= 9:
        raise DataSetError(f'compression: is {compress_level}; PNG has 0 to 9')
    if workers < 1:
        raise DataSetError(f'workers: is {workers}; at least 1 is needed')
    for job in jobs:
        if wrong := [scale for scale in job.scales if scale < 2]:
            raise DataSetError(f'scale: is {", ".join(map(str, wrong))}; choose from 2, 3, 4 and more')
        if not job.scales:
            raise DataSetError('scale: none given; for example 2 3 4')
        multiple = math.lcm(*job.scales)
        for name, value in (('crop', job.crop), ('step', job.step)):
            if value is not None and (value < 1 or value % multiple):
                right = max(1, round(value / multiple)) * multiple
                raise DataSetError(
                    f'{name}: is {value}, and must be a multiple of {multiple} for LR sub-images to lie where the HR '
                    f'ones do (scales {", ".join(map(str, job.scales))}); {right} would be'
                )
        if job.step is not None and job.crop is None:
            raise DataSetError('step: has no meaning without crop')
        if not job.pairs:
            raise DataSetError(f'{job.out}: there is no image to make {job.hr_name}.lmdb of')
        for pair in job.pairs:
            check_key(pair.hr, pair.key)
    written = Counter(
        job.out.resolve() / f'{name}.lmdb'
        for job in jobs
        for name in (job.hr_name, *(job.lr_name.format(scale=s) for s in job.scales))
    )
    if twice := [str(path) for path, number in written.items() if number > 1]:
        raise DataSetError(f'{", ".join(twice)}: would be written twice; give each job a folder or names of its own')


def _inspect(jobs: Sequence[Job], workers: int, quiet: bool) -> tuple[dict[Path, ImageFile], list[str]]:
    """All files of the jobs, checked, and what is wrong with the others."""
    paths = sorted({path for job in jobs for pair in job.pairs for path in (pair.hr, *pair.lr.values())})
    with tqdm(total=len(paths), desc='checking', unit='file', disable=quiet) as bar:
        files, problems = images.inspect_all(paths, workers, bar.update)
    return {file.path: file for file in files}, problems


def _plan(job: Job, files: Mapping[Path, ImageFile]) -> tuple[list[Plan], list[str]]:
    multiple = math.lcm(*job.scales)
    plans, problems = [], []
    problems += same_keys(job.pairs)
    for pair in job.pairs:
        if any(path not in files for path in (pair.hr, *pair.lr.values())):
            continue  # which is told already
        hr = files[pair.hr]
        lr = {scale: files[pair.lr[scale]] for scale in job.scales if scale in pair.lr}
        height, width = area = hr.height // multiple * multiple, hr.width // multiple * multiple
        if not height or not width:
            problems.append(
                f'{hr.path}: has {_size(hr)} pixels (height x width); for '
                f'{"scales" if len(job.scales) > 1 else "scale"} {", ".join(map(str, job.scales))} an image needs '
                f'{multiple} x {multiple} at least'
            )
            continue
        for scale, file in lr.items():
            sizes = [
                tuple(-(-side // scale) if up else side // scale for side in (hr.height, hr.width)) for up in (0, 1)
            ]
            if not all(low <= side <= high for side, low, high in zip((file.height, file.width), *sizes, strict=True)):
                problems.append(
                    f'{file.path}: has {_size(file)} pixels (height x width), and as the x{scale} image of {hr.path} '
                    f'({_size(hr)}) it must have {sizes[0][0]} x {sizes[0][1]}'
                )
            if file.channels < hr.channels:  # a grey HR image may have an LR image with three equal channels
                problems.append(f'{file.path}: is grey, and {hr.path} is in colour; it must be in colour too')
        cuts = [(0, 0, height, width)] if job.crop is None else windows(height, width, job.crop, job.step or job.crop)
        plans.append(Plan(pair.key, hr, lr, area, tuple(cuts), job.crop is not None))
    # In the order of keys, as LMDB has them.
    return sorted(plans, key=lambda plan: plan.entries[0]), problems


def _check_space(works: Sequence[_Work]) -> None:
    """Refuse to begin what would not fit on a disk."""
    needed: Counter[int] = Counter()
    folder = {}
    for work in works:
        device = os.stat(work.out).st_dev
        needed[device] += work.needed_bytes()
        folder[device] = work.out
    for device, value in needed.items():
        free = shutil.disk_usage(folder[device]).free
        if value > free:
            raise OSError(
                f'{folder[device]}: up to {value / 1e9:.1f} GB ({value} bytes) are needed, and {free / 1e9:.1f} GB '
                f'({free} bytes) are free; nothing was written'
            )


def _treatments(files: Iterable[ImageFile]) -> list[str]:
    """One line for each way in which files were changed before use."""
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.treatment:
            found.setdefault(file.treatment, []).append(file.path)
    return [
        f'{_count(len(paths), "file")}: {words} ({paths[0].name}{", ..." * (len(paths) > 1)})'
        for words, paths in found.items()
    ]


def _count(number: int, what: str) -> str:
    return f'{number} {what}{"s" * (number != 1)}'


def _size(file: ImageFile) -> str:
    return f'{file.height} x {file.width}'
