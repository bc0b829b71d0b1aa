"""Which file is paired with which: the usual folder and file names of super-resolution data sets.

Only names are looked at; no image is opened. Folder names are compared without regard to case, as archives of the same
data set differ in it.
"""

import glob
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath
from types import NoneType
from typing import Any, NamedTuple

import yaml

from attnsr.data_prep import images, preview
from attnsr.data_prep.lmdb_dataset import DataSetError, LmdbSummary
from attnsr.data_prep.pairs import Job, Pair, same_keys
from attnsr.options import Loader

__all__ = [
    'BENCHMARKS',
    'LAYOUTS',
    'PRESETS',
    'Preset',
    'benchmark',
    'datasets_block',
    'df2k',
    'div2k',
    'flickr2k',
    'jobs_from_folders',
    'known_name',
    'pair_up',
    'test_sets',
]

Jobs = tuple[list[Job], list[str]]
"""Jobs, and notes on them for the user."""


# Names of files ------------------------------------------------------------------------------------------------------

# What stands for 'high resolution' and 'low resolution' at the end of names. BI, BD and DN are RCAN's degradations.
_HR = '(?:HR|GT|HQ)'
_LR = '(?:LR[_-]?bicubic|LRbic|LRBI|LRBD|LRDN|LR|LQ|bicubic)'


def _hr_base(stem: str, scale: int | None = None) -> str:
    """'baby' of baby_HR, baby_HR_x4, baby_x4_HR, baby_GT, baby_SRF_4_HR; of any scale where none is given.

    A scale alone (babyx4) is left: in the name of an HR file it belongs to the photograph as far as anyone can tell.
    """
    number = r'\d+' if scale is None else scale
    suffix = rf'[_-]SRF[_-]{number}[_-]HR|[_-]?x{number}[_-]{_HR}|[_-]{_HR}(?:[_-]?x{number})?'
    return re.sub(rf'(?<=.)(?:{suffix})$', '', stem, flags=re.IGNORECASE)


def _lr_base(stem: str, scale: int) -> str:
    """'baby' of babyx4, baby_X4, baby_LR, baby_LR4, baby_LRBI_x4, babyx4_bicubic, baby_SRF_4_LR at scale 4.

    The letters m and d behind the scale are those of the mild and difficult tracks of NTIRE 2018 (0001x4m).
    """
    suffix = rf'[_-]SRF[_-]{scale}[_-]LR|[_-]?x{scale}[md]?(?:[_-]{_LR})?|[_-]{_LR}(?:[_-]?x?{scale})?'
    return re.sub(rf'(?<=.)(?:{suffix})$', '', stem, flags=re.IGNORECASE)


def _key(hr: Path) -> str:
    return images.key(hr.with_name(_hr_base(hr.stem) + hr.suffix))


def pair_up(hr: Sequence[Path], lr: Mapping[int, Sequence[Path]]) -> tuple[list[Pair], list[str]]:
    """Pair HR and LR files by their names; folders and extensions play no part.

    To the HR file ``baby.png`` or ``baby_HR.png`` belongs, at scale 4, the LR file ``baby``, ``babyx4``, ``baby_x4``,
    ``babyX4``, ``baby_LR``, ``baby_LRBI_x4`` or the like, and to ``img_001_SRF_4_HR`` belongs ``img_001_SRF_4_LR``. An
    equal name comes before all of these.

    Args:
        hr: HR files.
        lr: LR files by scale.

    Returns:
        One pair for each HR file, with the LR files that belong to it, in the order of ``hr``. The key is the name of
        the HR file without what says that it is one (``baby``, ``0001``, ``img_001``), as ``images.key`` has it. And
        the problems, one line each: HR files without LR file, LR files without HR file, and two files for one key.
    """
    problems = same_keys(Pair(_key(path), path) for path in hr)
    partners: dict[Path, dict[int, Path]] = {path: {} for path in hr}
    for scale, files in lr.items():
        for path, partner in _partners(hr, files, scale, problems):
            partners[path][scale] = partner
    return [Pair(_key(path), path, found) for path, found in partners.items()], problems


def _partners(hr: Sequence[Path], lr: Sequence[Path], scale: int, problems: list[str]) -> list[tuple[Path, Path]]:
    """HR and LR files of one scale that belong together. HR files of one name are left to the caller to report."""
    pairs = []
    free_hr, free_lr = list(hr), list(lr)
    for hr_name in (_stem, lambda path: _hr_base(path.stem, scale)):
        for lr_name in (_stem, lambda path: _lr_base(path.stem, scale)):
            hr_files, lr_files = _grouped(free_hr, hr_name), _grouped(free_lr, lr_name)
            for name, files in hr_files.items():
                found = lr_files.get(name, [])
                if len(found) > 1:
                    problems.append(f'{_listed(found)}: are all named as the LR image of {files[0]} at x{scale}')
                elif found and len(files) == 1:
                    pairs.append((files[0], found[0]))
            free_hr = [path for name, files in hr_files.items() if name not in lr_files for path in files]
            free_lr = [path for name, files in lr_files.items() if name not in hr_files for path in files]
    for path in free_hr:
        name = _hr_base(path.stem, scale)
        problems.append(
            f'{path}: has no LR image of x{scale}, which would be named {name}, {name}x{scale} or {name}_LR'
        )
    for path in free_lr:
        name = _lr_base(path.stem, scale)
        problems.append(f'{path}: has no HR image, which would be named {name} or {name}_HR')
    return pairs


def _stem(path: Path) -> str:
    return path.stem


def _grouped(paths: Iterable[Path], name: Callable[[Path], str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(name(path), []).append(path)
    return groups


# Folders -------------------------------------------------------------------------------------------------------------


def _folders(place: Path, pattern: str) -> list[Path]:
    """Folders below ``place`` by a path that may hold ``*``, without regard to case; those of equal case first."""
    found = [place] if place.is_dir() else []
    for part in PurePath(pattern).parts:
        found = [
            child
            for folder in found
            for child in sorted(_children(folder), key=lambda child: child.name != part)
            if fnmatchcase(child.name.casefold(), part.casefold()) and child.is_dir()
        ]
    return found


def _images_in(folder: Path) -> list[Path]:
    """The image files in a folder itself, not those in folders below; sorted."""
    return [
        path
        for path in _children(folder)
        if path.suffix.lower() in images.EXTENSIONS and not path.name.startswith('.') and not _is_drawn(path)
    ]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataSetError(f'{folder}: cannot be read: {error.strerror}; make the folder readable') from error


def _is_drawn(path: Path) -> bool:
    """Whether ``basicsr prepare`` has drawn it; its folder may be below that of the images."""
    return path.name.endswith(preview.SUFFIX)


def _with_images(places: Iterable[Path], patterns: Iterable[str]) -> list[Path]:
    """All folders by one of ``patterns`` below one of ``places`` that have images in them, in this order."""
    patterns = list(patterns)
    found = (folder for place in places for pattern in patterns for folder in _folders(place, pattern))
    return [folder for folder in dict.fromkeys(found) if _images_in(folder)]


def _listed(items: Iterable[Any], word: str = 'and') -> str:
    *first, last = map(str, items)
    return f'{", ".join(first)} {word} {last}' if first else last


def _raise(problems: Sequence[str], jobs: Iterable[Job] = ()) -> None:
    """Raise what leaves nothing to do, together with what is wrong with the names of files."""
    if problems:
        raise DataSetError('\n'.join([*problems, *(problem for job in jobs for problem in job.problems)]))


# Any two folders -----------------------------------------------------------------------------------------------------


def jobs_from_folders(
    hr: Path, lr: str | None, scales: Sequence[int], out: Path, crop: int | None, step: int | None
) -> Jobs:
    """The job of a folder of HR images, with or without folders of LR images.

    Args:
        hr: Folder of HR images; they may lie in folders below it.
        lr: Folder of LR images, with ``{scale}`` in it for several scales (``LR_bicubic/X{scale}``). Without it, its
            sub-folders X2, x3, ... are taken where they are there for all scales, and otherwise the folder itself
            for a single scale. None: LR images are made from the HR ones.
        scales: Scales.
        out: Folder for the LMDBs.
        crop: Side of the HR sub-images; None leaves images whole.
        step: From one HR sub-image to the next.

    Returns:
        One job, ``HR.lmdb`` and ``LR_x{scale}.lmdb``, and notes. What does not pair is in the job's ``problems``.

    Raises:
        DataSetError: A folder is missing or has no images; one line for each.
    """
    notes: list[str] = []
    problems: list[str] = []
    folders = {} if lr is None else _lr_folders(lr, scales, notes, problems)

    def find(folder: Path) -> list[Path]:
        try:
            return [path for path in images.find(folder) if not _is_drawn(path)]
        except DataSetError as error:
            problems.append(str(error))
            return []

    hr_files = find(hr)
    lr_files = {scale: find(folder) for scale, folder in folders.items()}
    _raise(problems)
    # The LR folders may lie in that of the HR images.
    given = {path.resolve() for files in lr_files.values() for path in files}
    hr_files = [path for path in hr_files if path.resolve() not in given]
    if not hr_files:
        problems.append(f'{hr}: holds no HR image, only {"LR images" if given else "previews of pairs"}')
    _raise(problems)
    pairs, problems = pair_up(hr_files, lr_files)
    return [Job(out, tuple(pairs), tuple(scales), crop=crop, step=step, problems=tuple(problems))], notes


def _lr_folders(lr: str, scales: Sequence[int], notes: list[str], problems: list[str]) -> dict[int, Path]:
    """The folder of LR images for each scale; it need not be there."""
    if '{scale}' in lr:
        return {scale: Path(lr.replace('{scale}', str(scale))) for scale in scales}
    below = {scale: found[0] for scale in scales if (found := _folders(Path(lr), f'X{scale}'))}
    if len(below) == len(scales):
        notes += [f'LR images of x{scale} are taken from {folder}' for scale, folder in below.items()]
        return below
    if len(scales) == 1:
        return {scales[0]: Path(lr)}
    absent = [f'X{scale}' for scale in scales if scale not in below]
    problems.append(
        f'{lr}: there is no folder {_listed(absent, "or")} in it; for several scales write the folder of LR images '
        f"with '{{scale}}' in its name, such as '{PurePath(lr, 'X{scale}')}', or give one scale"
    )
    return {}


# DIV2K and Flickr2K --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """HR images and their LR images by scale, as the archives of a data set hold them."""

    data_set: str
    hr: tuple[str, ...]
    """Folders that the HR images may be in, the usual one first."""
    lr: tuple[str, ...]
    """The same for LR images; ``{scale}`` stands for the scale."""
    images: int
    content: str
    archive: str
    left_out: range = range(0)
    """Numbers of images that some archives have in the same folder, and that are not of this set."""

    def images_in(self, folder: Path, base: Callable[[str], str]) -> list[Path]:
        """Its files in a folder; ``base`` gives the name of the photograph by the name of a file."""
        numbers = {path: base(path.stem) for path in _images_in(folder)}
        return [path for path, number in numbers.items() if not number.isdecimal() or int(number) not in self.left_out]

    @property
    def places(self) -> list[str]:
        """Folders that archives may have been unpacked into; '' is the given one itself."""
        return [
            '/'.join(filter(None, (folder, *levels)))
            for folder in ('', 'data', 'datasets')
            for levels in ((), (self.data_set,), (self.data_set, self.data_set))
        ]


def _nestings(folder: str) -> tuple[str, ...]:
    """Where an archive's folder of LR images may be: archives hold one scale each, and tools unpack into a folder more.

    As in ``F/X2``, ``F_X2/F/X2`` (of ``F_X2.zip``), ``F_X2/X2`` and ``F_X2``.
    """
    single = folder + '_X{scale}'
    tails = (folder + '/X{scale}', f'{single}/{folder}/X{{scale}}', single + '/X{scale}', single)
    return (*tails, f'{folder}/{tails[0]}', f'{single}/{single}')


# By this name of the HR LMDB, DIV2K's validation images are told from images to train on.
VALIDATION_HR = 'DIV2K_valid_HR'

_DIV2K = 'DIV2K (NTIRE 2017, Agustsson and Timofte)'
DIV2K_TRAIN = ImageSet(
    data_set='DIV2K',
    hr=('DIV2K_train_HR', 'DIV2K_train_HR/DIV2K_train_HR', 'train/HR'),
    lr=(*_nestings('DIV2K_train_LR_bicubic'), 'train/LR_bicubic/X{scale}'),
    images=800,
    content='training images (0001.png to 0800.png)',
    archive=f'DIV2K_train_HR.zip of {_DIV2K}',
    left_out=range(801, 901),  # EDSR's DIV2K.tar has the validation images in the same folder
)
DIV2K_VALID = ImageSet(
    data_set='DIV2K',
    hr=('DIV2K_valid_HR', 'DIV2K_valid_HR/DIV2K_valid_HR', 'valid/HR'),
    lr=(*_nestings('DIV2K_valid_LR_bicubic'), 'valid/LR_bicubic/X{scale}'),
    images=100,
    content='validation images (0801.png to 0900.png)',
    archive=f'DIV2K_valid_HR.zip of {_DIV2K}',
)
FLICKR2K = ImageSet(
    data_set='Flickr2K',
    hr=('Flickr2K_HR', 'Flickr2K_HR/Flickr2K_HR'),
    lr=_nestings('Flickr2K_LR_bicubic'),
    images=2650,
    content='images (000001.png to 002650.png)',
    archive='Flickr2K.tar of Flickr2K (Lim et al., EDSR)',
)


def div2k(root: Path, out: Path, scales: Sequence[int], crop: int | None = 480, step: int | None = 240) -> Jobs:
    """Jobs of DIV2K: of its training images, and of its validation images, whole, where they are there.

    Args:
        root: Folder that the archives were unpacked into.
        out: Folder for the LMDBs, which go into its sub-folder ``DIV2K``.
        scales: Scales. Where there are no LR images of a scale, they are made from the HR ones.
        crop: Side of the HR sub-images; None leaves images whole.
        step: From one HR sub-image to the next.

    Returns:
        Jobs and notes. The LMDBs are ``DIV2K_train_HR_sub`` and ``DIV2K_train_LR_bicubic_X{scale}_sub``, without
        ``_sub`` where images are left whole, and ``DIV2K_valid_HR`` and ``DIV2K_valid_LR_bicubic_X{scale}``.

    Raises:
        DataSetError: The training images are not found.
    """
    return _training_jobs(root, out / 'DIV2K', 'DIV2K_train_', (DIV2K_TRAIN,), scales, crop, step, DIV2K_VALID)


def flickr2k(root: Path, out: Path, scales: Sequence[int], crop: int | None = 480, step: int | None = 240) -> Jobs:
    """The job of Flickr2K, as :func:`div2k`; ``Flickr2K_HR_sub`` and ``Flickr2K_LR_bicubic_X{scale}_sub`` in
    ``out/Flickr2K``.
    """
    return _training_jobs(root, out / 'Flickr2K', 'Flickr2K_', (FLICKR2K,), scales, crop, step)


def df2k(root: Path, out: Path, scales: Sequence[int], crop: int | None = 480, step: int | None = 240) -> Jobs:
    """The job of DIV2K's training images and Flickr2K together, as :func:`div2k`; ``DF2K_train_HR_sub`` and
    ``DF2K_train_LR_bicubic_X{scale}_sub`` in ``out/DF2K``. Each of the two has its LR images given or made by itself.
    """
    return _training_jobs(root, out / 'DF2K', 'DF2K_train_', (DIV2K_TRAIN, FLICKR2K), scales, crop, step)


def _training_jobs(
    root: Path,
    out: Path,
    prefix: str,
    training: Sequence[ImageSet],
    scales: Sequence[int],
    crop: int | None,
    step: int | None,
    validation: ImageSet | None = None,
) -> Jobs:
    """One job of all training sets, and one of the validation set if it is there."""
    images.check_folder(root)
    notes: list[str] = []
    missing: list[str] = []
    end = '' if crop is None else '_sub'
    found = [_image_set(root, each, scales, notes, missing) for each in training]
    jobs = [
        Job(
            out,
            tuple(pair for pairs, _ in found for pair in pairs),
            tuple(scales),
            f'{prefix}HR{end}',
            f'{prefix}LR_bicubic_X{{scale}}{end}',
            crop,
            None if crop is None else step,
            tuple(problem for _, problems in found for problem in problems),
        )
    ]
    if validation and _found(root, validation, validation.hr):
        pairs, problems = _image_set(root, validation, scales, notes, missing)
        lr_name = 'DIV2K_valid_LR_bicubic_X{scale}'
        jobs.append(Job(out, tuple(pairs), tuple(scales), VALIDATION_HR, lr_name, problems=tuple(problems)))
    elif validation:
        notes.append(f'not found: {validation.hr[0]}, the {validation.images} {validation.content}')
    _raise(missing, jobs)
    return jobs, notes


def _image_set(
    root: Path, image_set: ImageSet, scales: Sequence[int], notes: list[str], missing: list[str]
) -> tuple[list[Pair], list[str]]:
    """:func:`pair_up` of a set's images; what else there is to say is added to ``notes`` and ``missing``."""
    name = image_set.data_set

    def first(folders: Sequence[Path]) -> Path:
        if len(folders) > 1:
            notes.append(f'{name}: taken from {folders[0]}; also there and not used: {_listed(folders[1:])}')
        return folders[0]

    folders = _found(root, image_set, image_set.hr)
    hr = image_set.images_in(folders[0], _hr_base) if folders else []
    if not hr:
        missing.append(
            f'{root}: there is no folder {_listed(image_set.hr, "or")} with the {image_set.images} {image_set.content} '
            f'in it, nor in {_listed(image_set.places[1:], "or")} below it; it comes in {image_set.archive}'
        )
        return [], []
    folder = first(folders)
    others = len(_images_in(folder)) - len(hr)
    if others:
        notes.append(f'{name}: {others} validation images in {folder} are left out')
    if len(hr) != image_set.images:
        notes.append(f'{name}: {len(hr)} of {image_set.images} {image_set.content.partition(" (")[0]}')
    lr = {}
    for scale in scales:
        wanted = [pattern.replace('{scale}', str(scale)) for pattern in image_set.lr]
        folders = _found(root, image_set, wanted)
        if folders:
            lr[scale] = image_set.images_in(first(folders), partial(_lr_base, scale=scale))
        else:
            notes.append(f'LR images of x{scale} are made from the HR ones: no {wanted[0]}')
    return pair_up(hr, lr)


def _found(root: Path, image_set: ImageSet, patterns: Iterable[str]) -> list[Path]:
    places = [folder for place in image_set.places for folder in _folders(root, place)]
    return _with_images(places, patterns)


# Benchmarks ----------------------------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    """A set of test images."""

    images: int
    source: str
    also: tuple[str, ...] = ()
    """Further names of its folder."""


BENCHMARKS = {
    'Set5': Benchmark(5, 'Set5 (Bevilacqua et al. 2012)'),
    'Set14': Benchmark(14, 'Set14 (Zeyde et al. 2010)'),
    'B100': Benchmark(100, 'B100, also called BSD100 or BSDS100 (Martin et al. 2001)', ('BSD100', 'BSDS100')),
    'Urban100': Benchmark(100, 'Urban100 (Huang et al. 2015)'),
    'Manga109': Benchmark(109, 'Manga109 (Matsui et al. 2017)'),
}


class Layout(NamedTuple):
    """Folders and files of one benchmark set; ``{set}`` and ``{scale}`` stand for its name and the scale."""

    hr: str
    lr: str = ''
    """Empty where there are HR images only."""
    hr_files: str = '*'
    lr_files: str = '*'
    """Which files in the folders they are, by their names without extension."""


# In this order: first those whose HR images are cut to a multiple of the one scale, as papers measure on them.
LAYOUTS = (
    Layout('{set}/HR_x{scale}', '{set}/LR_bicubic_x{scale}'),
    Layout('{set}/HR', '{set}/LR_bicubic/X{scale}'),  # EDSR's benchmark.tar
    Layout('HR/{set}/x{scale}', 'LR/LRBI/{set}/x{scale}'),  # RCAN's
    # SelfExSR's, with the results of other methods in the same folder.
    Layout('{set}/image_SRF_{scale}', '{set}/image_SRF_{scale}', '*_SRF_{scale}_HR', '*_SRF_{scale}_LR'),
    Layout('{set}/GTmod*', '{set}/LRbicx{scale}'),  # BasicSR's
    Layout('{set}/original'),  # of these, LRbicx2 and so on are no LR images: they are those of GTmod12
    Layout('{set}'),
)
_BENCHMARK_PLACES = ('', 'benchmark', 'benchmarks', 'data', 'dataset', 'datasets', 'test', 'testset', 'testsets')


@dataclass(frozen=True)
class _Source:
    """HR files of a benchmark set, and their LR files where there are any."""

    folder: Path
    hr: list[Path]
    lr: list[Path]


def benchmark(root: Path, out: Path, scales: Sequence[int]) -> Jobs:
    """Jobs of the benchmark sets that are found out of :data:`BENCHMARKS`, in any of :data:`LAYOUTS`.

    The first layout that has both HR and LR images is taken; where none has, the first one that has HR images, from
    which the LR images are made.

    Args:
        root: Folder that the sets are in, or one above it, or the folder of one set.
        out: Folder for the LMDBs, which go into sub-folders ``Set5``, ``Set14``, ``B100``, ...
        scales: Scales.

    Returns:
        One job for each set and scale, ``HR_x4`` and ``LR_bicubic_x4``, and notes.

    Raises:
        DataSetError: No set is found, or a set has no images in a known layout; one line for each.
    """
    images.check_folder(root)
    jobs: list[Job] = []
    problems: list[str] = []
    remarks: dict[tuple[str, str], list[int]] = {}  # scales that the same is to be said of, by set and text
    absent = []
    sets, places = _benchmark_places(root)
    for name, names in sets.items():
        folders = _folders_of(names, places)
        if not folders:
            absent.append(name)
            continue
        for scale in scales:
            job, texts = _benchmark_job(name, names, places, out, scale)
            if job:
                jobs.append(job)
            else:
                problems.append(_without_hr(name, folders, scale))
            for text in texts:
                remarks.setdefault((name, text), []).append(scale)
    if len(absent) == len(sets):
        below = _listed(_BENCHMARK_PLACES[1:], 'or')
        problems += [
            f'{root}: there is no folder {_listed(names, "or")} in it, nor in {below} below it; '
            f'it comes as {BENCHMARKS[name].source}, and in benchmark.tar of EDSR'
            for name, names in sets.items()
        ]
    _raise(problems, jobs)
    notes = [f'{name} {", ".join(f"x{scale}" for scale in which)}: {text}' for (name, text), which in remarks.items()]
    return jobs, notes + [f'not found: {BENCHMARKS[name].source}' for name in absent]


class TestSet(NamedTuple):
    """A set to measure on: the job of its images, whose ``out`` is but its name, or the HR LMDB of it."""

    name: str
    job: Job | None
    lmdb: Path | None
    notes: list[str]


def test_sets(root: Path, scale: int) -> list[TestSet]:
    """What can be measured on below a folder: benchmark sets, or else the folder itself as a set of its own name.

    Sets are found as :func:`benchmark` finds them; those that are not there as images, as the LMDBs that it makes.

    Args:
        root: Folder that the sets are in, or one above it, or the folder of one set, whatever its name.
        scale: The scale.

    Raises:
        DataSetError: No set is found, or a set has no images in a known layout; one line for each.
    """
    images.check_folder(root)
    sets, places = _benchmark_places(root)
    sets = {name: names for name, names in sets.items() if _folders_of(names, places)}
    if not sets:
        here = root.resolve()
        sets, places = {here.name: (glob.escape(here.name),)}, [here.parent, here]
    found: list[TestSet] = []
    problems: list[str] = []
    for name, names in sets.items():
        job, notes = _benchmark_job(name, names, places, Path(), scale)
        lmdbs = [path for each in names for place in places for path in _folders(place, f'{each}/HR_x{scale}.lmdb')]
        if job or lmdbs:
            found.append(TestSet(name, job, None if job else lmdbs[0], notes))
            continue
        problem = _without_hr(name, _folders_of(names, places), scale)
        if name not in BENCHMARKS:
            problem += f', nor is there a folder {_listed(BENCHMARKS, "or")} in it'
            if others := _folders(root, '*HR*.lmdb'):
                problem += f'; to measure on an LMDB, name it: {_listed(others, "or")}'
        problems.append(problem)
    _raise(problems, [each.job for each in found if each.job])
    return found


def known_name(name: str) -> str:
    """Of a set by the name of its folder: ``'B100'`` of ``'BSDS100'``; any other as it is."""
    for known, each in BENCHMARKS.items():
        if name.casefold() in (other.casefold() for other in (known, *each.also)):
            return known
    return name


def _folders_of(names: Iterable[str], places: Iterable[Path]) -> list[Path]:
    """The folders of one set."""
    patterns = [pattern for name in names for pattern in (name, f'HR/{name}')]
    return [folder for pattern in patterns for place in places for folder in _folders(place, pattern)]


def _benchmark_job(
    name: str, names: Sequence[str], places: Sequence[Path], out: Path, scale: int
) -> tuple[Job | None, list[str]]:
    """The job of one set at one scale, and what there is to say of it; None where there are no HR images."""
    sources = _sources(places, names, scale)
    if not sources:
        return None, []
    source = next((source for source in sources if source.lr), sources[0])
    pairs, unpaired = pair_up(source.hr, {scale: source.lr} if source.lr else {})
    names_of_lmdbs = f'HR_x{scale}', 'LR_bicubic_x{scale}'
    job = Job(out / name, tuple(pairs), (scale,), *names_of_lmdbs, problems=tuple(unpaired))
    usual = BENCHMARKS[name].images if name in BENCHMARKS else len(source.hr)
    return job, list(_remarks(source, sources, usual))


def _without_hr(name: str, folders: Iterable[Path], scale: int) -> str:
    known = [layout.hr.format(set=name, scale=scale) for layout in LAYOUTS]
    return f'{_listed(folders)}: there are no HR images of {name} for x{scale}; they would be in {_listed(known, "or")}'


def _benchmark_places(root: Path) -> tuple[dict[str, tuple[str, ...]], list[Path]]:
    """The sets to look for with the names of their folders, and the folders to look for these in."""
    sets = {name: (name, *each.also) for name, each in BENCHMARKS.items()}
    here = root if root.name not in ('', '..') else root.resolve()
    if (name := known_name(here.name)) in sets:
        return {name: (here.name,)}, [here.parent, here]
    places = [folder for place in _BENCHMARK_PLACES for folder in _folders(root, place)]
    # Unpacking may have put a folder Set5 into a folder Set5.
    nested = [each for place in places for names in sets.values() for name in names for each in _folders(place, name)]
    return sets, places + nested


def _remarks(source: _Source, sources: Iterable[_Source], usual: int) -> Iterator[str]:
    others = dict.fromkeys(other.folder for other in sources if other.folder != source.folder)
    if others:
        yield f'taken from {source.folder}; also there and not used: {_listed(others)}'
    if not source.lr:
        yield f'LR images are made from the HR ones in {source.folder}'
    if len(source.hr) != usual:
        yield f'{len(source.hr)} of {usual} images'


def _sources(places: Iterable[Path], names: Iterable[str], scale: int) -> list[_Source]:
    """All that has HR images of a set, by layout, then by place."""
    sources: dict[tuple[Layout, Path], _Source] = {}
    for layout, place, name in itertools.product(LAYOUTS, places, names):
        hr, lr, hr_files, lr_files = (text.format(set=name, scale=scale) for text in layout)
        lr_folders = _with_images([place], [lr]) if lr else []
        for folder in _with_images([place], [hr]):
            source = _Source(
                folder,
                [path for path in _images_in(folder) if fnmatchcase(path.stem, hr_files)],
                [path for each in lr_folders[:1] for path in _images_in(each) if fnmatchcase(path.stem, lr_files)],
            )
            if source.hr:
                sources.setdefault((layout, folder), source)
    return list(sources.values())


# For the command line ------------------------------------------------------------------------------------------------


class Preset(NamedTuple):
    """A data set that is known by name."""

    jobs: Callable[..., Jobs]
    """Takes ``root``, ``out`` and ``scales``; for training sets ``crop`` and ``step`` too."""
    description: str
    training: bool


PRESETS = {
    'div2k': Preset(div2k, 'DIV2K: the 800 training images as sub-images, and the validation images.', True),
    'df2k': Preset(df2k, 'DF2K: the training images of DIV2K and those of Flickr2K together, as sub-images.', True),
    'flickr2k': Preset(flickr2k, 'Flickr2K: the 2650 images as sub-images.', True),
    'benchmark': Preset(benchmark, f'The test sets {_listed(BENCHMARKS)}, or those of them that are there.', False),
}

_BATCH = 16


class _Dumper(yaml.SafeDumper):
    """Writes ~ for None, as the option files have it, and quotes what attnsr's reader would not take for text."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


_Dumper.add_representer(NoneType, lambda dumper, _: dumper.represent_scalar('tag:yaml.org,2002:null', '~'))


def datasets_block(jobs: Sequence[Job], scale: int, summary: Iterable[LmdbSummary] = ()) -> str:
    """The ``datasets:`` block of an option file for one scale, in YAML.

    Args:
        jobs: Jobs; those without the scale are left out.
        scale: Scale.
        summary: What :func:`~.pairs.prepare` made of them: patches are made to fit into the smallest image.

    Returns:
        ``datasets:`` with ``train`` for the images to train on, and ``val`` (or ``val_1``, ``val_2``, ... where there
        are several) for the presets' sets to validate on.

    Raises:
        ValueError: There are several jobs to train on; BasicSR takes one.
    """
    jobs = [job for job in jobs if scale in job.scales]
    validation = [job for job in jobs if _is_validation(job)]
    if len(jobs) - len(validation) > 1:
        raise ValueError('only one of the jobs can be for training')
    shortest = {row.path: row.shortest_side for row in summary}
    block: dict[str, Any] = {}
    for job in jobs:
        if job in validation:
            number = f'_{validation.index(job) + 1}' if len(validation) > 1 else ''
            block[f'val{number}'] = _entry(job, scale)
        else:
            block['train'] = {**_entry(job, scale), **_training_options(job, scale, shortest.get(_hr_lmdb(job)))}
    return yaml.dump({'datasets': block}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _is_validation(job: Job) -> bool:
    """Whether it is one of the presets' to validate on; all others are to train on."""
    return job.hr_name == VALIDATION_HR or re.fullmatch(r'HR_x\d+', job.hr_name) is not None


def _entry(job: Job, scale: int) -> dict[str, Any]:
    return {
        'name': 'DIV2K_valid' if job.hr_name == VALIDATION_HR else job.out.resolve().name,
        'type': 'PairedImageDataset',
        'dataroot_gt': str(_hr_lmdb(job)),
        'dataroot_lq': str(job.out / f'{job.lr_name.format(scale=scale)}.lmdb'),
        'io_backend': {'type': 'lmdb'},
    }


def _hr_lmdb(job: Job) -> Path:
    return job.out / f'{job.hr_name}.lmdb'


def _training_options(job: Job, scale: int, shortest_side: int | None) -> dict[str, Any]:
    sides = [side // scale for side in (job.crop, shortest_side) if side]
    return {
        'gt_size': min([48, *sides]) * scale,
        'use_hflip': True,
        'use_rot': True,
        'num_worker_per_gpu': 6,
        'batch_size_per_gpu': _BATCH,
        # At least a hundred batches in an epoch, as BasicSR begins an epoch slowly, and 10 as in the option files.
        'dataset_enlarge_ratio': max(10, math.ceil(100 * _BATCH / len(job.pairs))),
        'prefetch_mode': None,
    }
