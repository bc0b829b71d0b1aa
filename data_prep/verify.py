"""Is an LMDB what it should be: whole, readable, of the sizes it states, unchanged since it was made?"""

import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
from PIL import PngImagePlugin
from tqdm import tqdm

from attnsr.data_prep import images
from attnsr.data_prep.lmdb_dataset import DataSetError, count_entries, lr_lmdbs, read_header, read_record, record_of
from attnsr.data_prep.matlab_resize import imresize
from attnsr.data_prep.parallel import available_cores, in_order

__all__ = ['Report', 'check_folder', 'decode', 'verify']

META_LINE = re.compile(r'(?P<key>[^.]+)\.\w+ \((?P<shape>\d+,\d+(?:,\d+)?)\) (?P<level>\d+)')

#: So many lines say the same of different entries.
FEW = 10

# Reads every key and the head of every value. LMDB trusts its file: damage in it can end the process that reads it.
TRAVERSE = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True, lock=False) as environment, environment.begin(buffers=True) as transaction:
    for key, value in transaction.cursor():
        bytes(value[:8]), bytes(value[-1:])
"""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        path: The LMDB.
        images: Entries that were looked at.
        compared: With what they were compared, in words.
        problems: One line each; none if the LMDB is right.
    """

    path: Path
    images: int
    compared: Sequence[str]
    problems: Sequence[str]


def verify(
    path: str | Path, against: str | Path | None = None, workers: int | None = None, quiet: bool = False
) -> Report:
    """Read all of an LMDB and compare it with everything that is known of it.

    Every entry must decode, have the shape that its line of ``meta_info.txt`` says, and the checksum that the record
    beside the LMDB says, if there is one (``basicsr prepare`` writes it); the LMDBs that the record names as its pair
    must have the same keys and fitting sizes.

    Args:
        path: The LMDB's folder.
        against: Folder of the images that the LMDB was made of; the pixels of every entry must be those of its file,
            cut and reduced as the record says, and without a record those of the file with the entry's key as name.
        workers: Threads; one a core by default.
        quiet: Show no progress bar.

    Raises:
        DataSetError: There is no such folder, or none to compare with.
    """
    path = Path(path)
    check_folder(path)
    if against is not None and not Path(against).is_dir():
        raise DataSetError(f'{against}: there is no such folder to compare with')
    if problem := _unreadable(path):
        return Report(path, 0, [], [f'{path}: {problem}'])

    shapes, problems = _meta_info(path / 'meta_info.txt')
    header = read_header(path)
    record = {line['key']: line for line in read_record(path)}
    compared = ['meta_info.txt']
    workers = available_cores() if workers is None else workers
    with lmdb.open(str(path), readonly=True, lock=False, max_readers=workers + 126) as environment:
        with environment.begin() as transaction:
            keys = [
                bytes(key).decode('ascii', 'backslashreplace') for key in transaction.cursor().iternext(values=False)
            ]
        if not keys:
            problems.append('data.mdb has no entries')
        problems += _other_keys(keys, shapes, 'meta_info.txt')
        if header is None and record_of(path).exists():
            problems.append(f'its record {record_of(path).name} is damaged')
        elif header is None:
            compared.append('no checksums, as there is no record beside it')
        else:
            compared.append('checksums')
            problems += _other_keys(keys, record, 'the record')
            partners, found = _compare_pairs(path, header, shapes)
            compared += partners
            problems += found
        sources = None if against is None else _Sources(Path(against), keys, record)
        compared += [] if against is None else [f'the files of {against}']

        def look(group: list[str]) -> list[str]:
            with environment.begin() as transaction:
                values = {key: transaction.get(key.encode('ascii')) or b'' for key in group}
            return _check_entries(values, shapes, record, sources)

        groups = [list(group) for _, group in groupby(keys, lambda key: record.get(key, {}).get('file', key))]
        with tqdm(total=len(keys), desc=path.name, unit='image', disable=quiet) as bar:
            for group, found in zip(groups, in_order(look, groups, workers), strict=True):
                problems += found
                bar.update(len(group))
    return Report(path, len(keys), compared, [f'{path}: {problem}' for problem in problems])


def check_folder(path: Path) -> None:
    """Refuse a name that cannot be an LMDB's.

    Raises:
        DataSetError: There is no such folder.
    """
    if not path.is_dir():
        raise DataSetError(f'{path}: there is no such folder; name an LMDB folder, for example datasets/HR.lmdb')


def _unreadable(path: Path) -> str:
    """Why LMDB cannot read the folder; '' if it can."""
    if not (path / 'data.mdb').is_file() and any(path.glob('*.lmdb')):
        return f'data.mdb is missing; name the LMDBs in it, {path}/*.lmdb'
    try:
        count_entries(path)
    except DataSetError as error:
        return str(error)
    if not (path / 'meta_info.txt').is_file():
        return 'meta_info.txt is missing'
    run = subprocess.run([sys.executable, '-c', TRAVERSE, str(path)], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f'signal {-run.returncode}'
        return f'data.mdb is damaged: LMDB cannot read it through ({reason})'
    return ''


def _meta_info(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by key, and lines that are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding='utf-8', errors='backslashreplace').splitlines(), start=1):
        match = META_LINE.fullmatch(line.strip())
        if match is None:
            problems.append(
                f"meta_info.txt, line {number}: '{line}' is not of the form 'key.png (height,width,channels) 1'"
            )
        elif match['key'] in shapes:
            problems.append(f"meta_info.txt, line {number}: '{match['key']}' is there twice")
        else:
            shapes[match['key']] = tuple(map(int, match['shape'].split(',')))
    return shapes, problems


def _other_keys(keys: Sequence[str], named: Mapping[str, Any], where: str) -> list[str]:
    missing, unknown = sorted(named.keys() - set(keys)), sorted(set(keys) - named.keys())
    return [
        *_few([f"entry '{key}' is missing, which {where} names" for key in missing]),
        *_few([f"entry '{key}' is not in {where}" for key in unknown]),
    ]


def _few(lines: list[str]) -> list[str]:
    """Lines that say the same of many entries, shortened: such are of two LMDBs that do not belong together."""
    return lines if len(lines) <= FEW else [*lines[:FEW], f'{len(lines) - FEW} more entries: the same']


def _compare_pairs(
    path: Path, header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str]]:
    """Names of the LMDBs that belong to this one, and what does not fit."""
    path = path.resolve()
    partners = {other: Fraction(description['scale']) for other, description in lr_lmdbs(path).items()}
    names, problems = [], []
    if header.get('pair'):
        other = path.with_name(header['pair'])
        if other.is_dir():
            partners[other] = Fraction(1, header['scale'])
        else:
            problems.append(f'its pair {other.name} is not beside it')
    for other, scale in partners.items():
        names.append(other.name)
        if not (other / 'meta_info.txt').is_file():
            problems.append(f'its pair {other.name} has no meta_info.txt')
            continue
        theirs = _meta_info(other / 'meta_info.txt')[0]
        problems += _other_keys(list(shapes), theirs, f'its pair {other.name}')
        misfits = []
        for key in sorted(shapes.keys() & theirs.keys()):
            (height, width), (h, w) = shapes[key][:2], theirs[key][:2]
            if (height, width) != (h * scale, w * scale):
                misfits.append(
                    f"entry '{key}' has {height} x {width} pixels (height x width), and in its pair {other.name} "
                    f'{h} x {w}: at x{max(scale, 1 / scale)} it must have {h * scale} x {w * scale}'
                )
        problems += _few(misfits)
    return names, problems


class _Sources:
    """The images that an LMDB was made of, as its record tells them."""

    def __init__(self, folder: Path, keys: Sequence[str], record: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._record = folder, record
        files = list(dict.fromkeys(line['file'] for line in record.values() if 'file' in line))
        if not files:
            self._by_key = {images.key(file): file for file in images.find(folder)}
            if keys and self._by_key.keys().isdisjoint(keys):
                raise DataSetError(
                    f'{folder}: holds no image named as an entry of the LMDB, such as {keys[0]}; of what images '
                    'sub-images are parts, only the record beside an LMDB can tell'
                )
        elif not any((folder / file).is_file() for file in files):
            # The record names files from the folder that all of them lie in, which may be below the given one.
            below = (parent for path in sorted(folder.rglob(Path(files[0]).name)) for parent in path.parents)
            found = next((parent for parent in below if (parent / files[0]).is_file()), None)
            if found is None:
                raise DataSetError(f'{folder}: does not hold {files[0]}, nor any other image that the LMDB was made of')
            self._folder = found

    def image(self, key: str) -> np.ndarray:
        """The whole image that an entry was cut from; entries of one file come one after the other."""
        line = self._record.get(key, {})
        file = self._folder / line['file'] if 'file' in line else self._by_key.get(key)
        if file is None:
            raise DataSetError(f'{self._folder}: holds no image of that name')
        image = images.read(images.inspect(file))
        if line.get('reduced', 1) > 1:
            height, width = line['area']
            image = imresize(image[:height, :width], Fraction(1, line['reduced']))
        return image

    def cut(self, key: str, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """The part of it that the entry is; without a record, all of it."""
        if 'top' not in (line := self._record.get(key, {})):
            return image
        return image[line['top'] :, line['left'] :][:height, :width]


def _check_entries(
    values: Mapping[str, bytes],
    shapes: Mapping[str, tuple[int, ...]],
    record: Mapping[str, Mapping[str, Any]],
    sources: _Sources | None,
) -> list[str]:
    """Problems of some entries that were made of one file."""
    problems = []
    whole: np.ndarray | None = None
    for key, value in values.items():
        if key in record and hashlib.sha256(value).hexdigest() != record[key]['sha256']:
            problems.append(f"entry '{key}' has changed since it was written: its checksum is another")
        image = decode(value)
        if image is None:
            problems.append(f"entry '{key}' does not decode")
            continue
        shape = np.atleast_3d(image).shape
        stated = shapes.get(key)
        if stated is not None and (*stated, 1)[:3] != shape:
            problems.append(f"entry '{key}' has shape {_text(shape)}, and meta_info.txt says {_text(stated)}")
        if sources is None:
            continue
        try:
            if whole is None or 'file' not in record.get(key, {}):
                whole = sources.image(key)
        except DataSetError as error:
            problems.append(f"entry '{key}' cannot be compared: {error}")
            continue
        expected = sources.cut(key, whole, *shape[:2])
        if image.ndim == 2 and expected.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
        if expected.shape != image.shape:
            problems.append(f"entry '{key}' has shape {_text(shape)}, and its file {_text(expected.shape)}")
        elif not np.array_equal(expected, image):
            differ = np.count_nonzero((expected != image).reshape(*image.shape[:2], -1).any(-1))
            problems.append(
                f"entry '{key}' differs from its file in {differ} of {image.shape[0] * image.shape[1]} pixels"
            )
    return problems


def decode(value: bytes) -> np.ndarray | None:
    """The image; None if it is damaged, of PNG files also where OpenCV would give the part that it can read."""
    if value.startswith(b'\x89PNG'):
        try:
            PngImagePlugin.PngImageFile(io.BytesIO(value)).verify()
        except Exception:  # Pillow has a dozen kinds of errors for damaged files
            return None
    return cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_UNCHANGED) if value else None


def _text(shape: Sequence[int]) -> str:
    return f'({",".join(map(str, shape))})'
