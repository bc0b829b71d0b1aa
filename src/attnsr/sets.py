"""Sets of images to measure on: found in any layout that ``basicsr prepare benchmark`` knows, or in its LMDBs.

All files are looked at when a set is found, and none is kept: a photograph is read when it is measured.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from attnsr.data_prep import layouts, pairs, verify
from attnsr.data_prep.lmdb_dataset import DataSetError, count_entries, lr_lmdbs
from attnsr.data_prep.matlab_resize import imresize
from attnsr.data_prep.parallel import in_order

__all__ = ['Photograph', 'PhotographSet', 'find']

#: The window of SSIM, which must fit into what is left of an image within its border.
SSIM_WINDOW = 11


@dataclass(frozen=True)
class Photograph:
    """One HR image and its LR image.

    Attributes:
        name: Its key: the name of the HR file without what says that it is one.
        height: Of the HR image, a multiple of the scale.
        width: Of the HR image, a multiple of the scale.
        read: Gives HR and LR, uint8, (height, width, 3) and (height / scale, width / scale, 3), BGR. A grey image has
            three equal channels, as BasicSR reads it.
    """

    name: str
    height: int
    width: int
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PhotographSet:
    """A set of images to measure on.

    Attributes:
        name: For example ``'Set5'``.
        source: Folder of the HR images, or their LMDB.
        photographs: In the order of their names.
        notes: What is to be known of it, one line each, for example that LR images are made.
    """

    name: str
    source: Path
    photographs: tuple[Photograph, ...]
    notes: tuple[str, ...]


def find(paths: Sequence[Path], scale: int, workers: int) -> list[PhotographSet]:
    """The sets in some folders and LMDBs, all of their files checked.

    Args:
        paths: Folders as :func:`attnsr.data_prep.layouts.test_sets` takes them, and HR LMDBs.
        scale: The scale. HR images are cut at the right and below to a multiple of it. Where there are no LR images of
            this scale, they are made from the HR ones as MATLAB makes them, and a note says so.
        workers: Threads.

    Raises:
        DataSetError: A folder or its sets are not there, files cannot be used or contradict each other, an image is
            too small, or two sets have the same name; one line for each.
    """
    found: list[PhotographSet] = []
    for path in paths:
        if path.suffix == '.lmdb' or (path / 'data.mdb').exists():
            found.append(_of_lmdb(path, _name_of(path), scale, workers))
            continue
        test_sets = layouts.test_sets(path, scale)
        checked = iter(pairs.check([each.job for each in test_sets if each.job], workers, quiet=True))
        for each in test_sets:
            if each.lmdb:
                found.append(_of_lmdb(each.lmdb, each.name, scale, workers))
                continue
            plans = next(checked)
            photographs = tuple(_of_plan(plan, scale) for plan in plans)
            found.append(PhotographSet(each.name, plans[0].hr.path.parent, photographs, tuple(each.notes)))
    _check(found, scale)
    return found


def _check(found: Sequence[PhotographSet], scale: int) -> None:
    problems = []
    sources: dict[str, Path] = {}
    for each in found:
        first = sources.setdefault(each.name, each.source)
        if first is not each.source:
            problems.append(f'{first} and {each.source}: are both sets of the name {each.name}; give one of them')
        least = 2 * scale + SSIM_WINDOW
        problems += [
            f'{each.source}: {photograph.name} has {photograph.height} x {photograph.width} pixels (height x width); '
            f'without a border of {scale}, SSIM needs {SSIM_WINDOW} x {SSIM_WINDOW}: {least} x {least} at least'
            for photograph in each.photographs
            if min(photograph.height, photograph.width) < least
        ]
    if problems:
        raise DataSetError('\n'.join(problems))


def _of_plan(plan: pairs.Plan, scale: int) -> Photograph:
    def read() -> tuple[np.ndarray, np.ndarray]:
        hr, lr = plan.read(scale)
        return _in_colour(hr), _in_colour(lr)

    return Photograph(plan.key, *plan.area, read)


def _in_colour(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image


# LMDBs ---------------------------------------------------------------------------------------------------------------


def _name_of(path: Path) -> str:
    """Of ``Set5/HR_x4.lmdb`` that is Set5, otherwise the LMDB's own."""
    path = path.resolve()
    return layouts.known_name(path.parent.name) if re.fullmatch(r'HR(_x\d+)?', path.stem) else path.stem


def _of_lmdb(path: Path, name: str, scale: int, workers: int) -> PhotographSet:
    made_for = re.search(r'HR_x(\d+)$', path.stem)
    if made_for and int(made_for[1]) != scale:
        raise DataSetError(
            f'{path}: holds the HR images for x{made_for[1]}, and x{scale} is measured; give those of it'
        )
    hr = _entries(path)
    beside = _lr_of(path, scale)
    lr = None if beside is None else _entries(beside)
    if beside is not None and lr is not None and (alone := hr.keys ^ lr.keys):
        raise DataSetError(f"{path} and {beside}: entry '{min(alone)}' is in one of them only; make both anew")

    def photograph(key: str) -> Photograph | str:
        image = hr.read(key)
        if image is None:
            return f"{path}: entry '{key}' is damaged, `basicsr prepare verify` says more; make it anew"
        height, width = (side // scale * scale for side in image.shape[:2])
        if lr is None:
            return Photograph(key, height, width, lambda: _reduced(hr, key, scale))
        reduced = lr.read(key)
        if reduced is None:
            return f"{beside}: entry '{key}' is damaged, `basicsr prepare verify` says more; make it anew"
        if reduced.shape[:2] != (height // scale, width // scale):
            return (
                f"{beside}: entry '{key}' has {_size(reduced)} pixels (height x width), and as the x{scale} image of "
                f'{_size(image)} it must have {height // scale} x {width // scale}'
            )
        return Photograph(key, height, width, lambda: _pair(hr, lr, key, height, width))

    checked = list(in_order(photograph, sorted(hr.keys), workers))
    if problems := [each for each in checked if isinstance(each, str)]:
        raise DataSetError('\n'.join(problems))
    note = () if lr else (f'LR images are made from the HR ones in {path}',)
    return PhotographSet(name, path, tuple(each for each in checked if isinstance(each, Photograph)), note)


class _Entries:
    """The images of an LMDB; reads of several threads go side by side."""

    def __init__(self, path: Path) -> None:
        self._environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_spare_txns=64)
        with self._environment.begin() as transaction:
            self.keys = {bytes(key).decode(errors='replace') for key in transaction.cursor().iternext(values=False)}

    def read(self, key: str) -> np.ndarray | None:
        """uint8 (height, width, 3) BGR; None if the entry is damaged or no 8-bit image of one or three channels."""
        with self._environment.begin() as transaction:
            value = transaction.get(key.encode())
        image = None if value is None else verify.decode(value)
        if image is None or image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
            return None
        return _in_colour(image)


#: Those that are in use: LMDB opens a folder once in a process.
_opened: WeakValueDictionary[Path, _Entries] = WeakValueDictionary()


def _entries(path: Path) -> _Entries:
    verify.check_folder(path)
    if (entries := _opened.get(path.resolve())) is not None:
        return entries
    try:
        count = count_entries(path)
        entries = _opened[path.resolve()] = _Entries(path)
    except (DataSetError, lmdb.Error) as error:
        raise DataSetError(f'{path}: {error}; `basicsr prepare benchmark DIR` makes such an LMDB') from None
    if not count:
        raise DataSetError(f'{path}: is an LMDB without entries')
    return entries


def _lr_of(path: Path, scale: int) -> Path | None:
    """The LMDB of the LR images that belong to an HR one: by the records, or by the name where there are none."""
    for lr, header in lr_lmdbs(path).items():
        if header.get('scale') == scale:
            return lr
    names = [
        path.stem.replace('HR', f'LR_bicubic_X{scale}'),  # DIV2K_valid_HR
        re.sub(r'HR(_x\d+)?', f'LR_bicubic_x{scale}', path.stem),  # HR_x4
        re.sub(r'HR(_x\d+)?', f'LR_x{scale}', path.stem),
    ]
    beside = (path.with_name(f'{name}.lmdb') for name in names if name != path.stem)
    return next((lr for lr in beside if lr.is_dir()), None)


def _reduced(hr: _Entries, key: str, scale: int) -> tuple[np.ndarray, np.ndarray]:
    image = _read(hr, key)
    image = image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]
    return image, imresize(image, Fraction(1, scale))


def _pair(hr: _Entries, lr: _Entries, key: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return _read(hr, key)[:height, :width], _read(lr, key)


def _read(entries: _Entries, key: str) -> np.ndarray:
    image = entries.read(key)
    if image is None:
        raise DataSetError(f"entry '{key}' of an LMDB has changed since it was checked; run the command again")
    return image


def _size(image: np.ndarray) -> str:
    return f'{image.shape[0]} x {image.shape[1]}'
