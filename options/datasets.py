"""Checks that the pictures which an option file names are there and fit together, without decoding them."""

import math
import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeAlias

import lmdb
from basicsr.utils import scandir
from PIL import Image

from attnsr.data_prep.lmdb_dataset import measure
from attnsr.options.reading import nearest

Size: TypeAlias = tuple[int, int]  # height, width in pixels
Sizes: TypeAlias = Iterable[tuple[str, Size | None, Size | None]]  # name, HR and LR of a picture; None if not known
Add: TypeAlias = Callable[[str, str], None]  # reports a problem: key, text

# Picture files are opened one by one for their sizes: a few tell whether the scale is right.
FILES_LOOKED_AT = 8

EXIF_ORIENTATION = 0x0112

#: The command that makes the LMDBs in a folder of this name, as the option files that ship have it.
PREPARED_BY = {
    'sample': 'basicsr prepare sample',
    **{name: f'basicsr prepare {name.lower()} DIR' for name in ('DIV2K', 'DF2K', 'Flickr2K')},
    **dict.fromkeys(('Set5', 'Set14', 'B100', 'Urban100', 'Manga109'), 'basicsr prepare benchmark DIR'),
}


def missing(path: str, what: str) -> str:
    """Why there is no file (or folder, as ``what`` says) at ``path``, and which parent is there; '' if it is there."""
    full = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(full) if what == 'a folder' else os.path.isfile(full):
        return ''
    if os.path.exists(full):
        return f'{path} is not {what}'
    parent, child = os.path.split(full)
    while not os.path.isdir(parent):
        parent, child = os.path.split(parent)
    near = nearest(child, _listing(parent))
    hint = f'did you mean {" or ".join(near)} there?' if near else f'there is no {child} in it'
    return f'{path} does not exist; of its path, {parent} does: {hint}'


def check_pictures(
    add: Add,
    where: str,
    options: dict[str, Any],
    scale: int | None,
    is_train: bool,
    processes: int,
    devices: int,
) -> None:
    """Checks the pictures of a PairedImageDataset or SingleImageDataset, whose options are otherwise right.

    Args:
        add (Callable): Takes the key and the text of a problem.
        where (str): Key of the data set, such as ``datasets.train``.
        options (dict): The data set's options.
        scale (int | None): HR size over LR size; None leaves sizes unchecked.
        is_train (bool): Whether it is the training set.
        processes (int): How many processes share an epoch, each with batches of its own.
        devices (int): GPUs of one process, each of which enlarges its batches.
    """
    roots: dict[str, str] = {
        key: os.path.expanduser(options[key]) for key in ('dataroot_gt', 'dataroot_lq') if key in options
    }
    backend = io_backend(options)['type']
    readable = [_check_root(add, f'{where}.{key}', root, backend) for key, root in roots.items()]
    if not all(readable):
        return
    try:
        found = _lmdbs(add, where, roots) if backend == 'lmdb' else _files(add, where, roots, options)
        if found is None:
            return
        pictures, sizes = found
        if pictures == 0:
            add(where, f'has no pictures; {" and ".join(roots.values())} must hold some')
            return
        if scale:
            _check_sizes(add, where, sizes, scale, is_train, options.get('gt_size'))
    except (OSError, UnicodeDecodeError) as error:
        add(where, f'cannot be read: {error}')
        return
    if is_train:
        _check_batches(add, where, pictures, options, processes, devices)


def io_backend(options: dict[str, Any]) -> dict[str, Any]:
    """The data set's ``io_backend``; if it is missing, the one that the name of its folder tells."""
    is_lmdb = str(options.get('dataroot_lq')).endswith('.lmdb')
    return options.get('io_backend') or {'type': 'lmdb' if is_lmdb else 'disk'}


def _check_root(add: Add, key: str, root: str, backend: str) -> bool:
    """Whether a root can be read by the back end."""
    wrong = missing(root, 'a folder')
    command = PREPARED_BY.get(os.path.basename(os.path.dirname(root)))
    if wrong and command and not os.path.exists(root):
        wrong += f'; `{command}` makes it'
    if not wrong and backend == 'lmdb':
        if not root.endswith('.lmdb'):
            wrong = f'{root} does not end in .lmdb, as LMDBs do; write io_backend.type: disk for a folder of pictures'
        else:
            files = [name for name in ('data.mdb', 'meta_info.txt') if not os.path.isfile(f'{root}/{name}')]
            wrong = (
                f'{root} has no {" and no ".join(files)}; it is not a whole LMDB, make it again'
                if files
                else _torn(root)
            )
    elif not wrong and root.rstrip('/').endswith('.lmdb'):
        wrong = f'{root} is an LMDB; write io_backend.type: lmdb'
    if wrong:
        add(key, wrong)
    return not wrong


def _torn(root: str) -> str:
    """What is wrong with the data of an LMDB. Reading pages that a torn file lacks would end the process (SIGBUS)."""
    again = 'it is not a whole LMDB, make it again'
    size = os.path.getsize(f'{root}/data.mdb')
    try:
        needs, entries = measure(root)
    except lmdb.Error as error:
        # An environment that this process has open was whole when it was opened.
        return '' if 'already open' in str(error) else f'{root}/data.mdb cannot be opened ({error}); {again}'
    if size < needs:
        return f'{root}/data.mdb has {size} bytes of {needs}; {again}'
    named = len(_meta_info(root))
    return '' if entries == named else f'{root} has {entries} entries, and its meta_info.txt names {named}; {again}'


def _lmdbs(add: Add, where: str, roots: dict[str, str]) -> tuple[int, Sizes] | None:
    """How many pictures LMDBs have, and the sizes of all, by their meta_info.txt; None if a problem was reported."""
    lq = _meta_info(roots['dataroot_lq'])
    if 'dataroot_gt' not in roots:
        return len(lq), ()
    gt = _meta_info(roots['dataroot_gt'])
    only_gt, only_lq = sorted(gt.keys() - lq.keys()), sorted(lq.keys() - gt.keys())
    if only_gt or only_lq:
        add(
            where,
            f'its LMDBs have different keys: {len(only_gt)} are only in dataroot_gt and {len(only_lq)} only in '
            f'dataroot_lq (as {(only_gt + only_lq)[0]}); make both from the same pictures',
        )
        return None
    return len(lq), ((key, gt[key], lq[key]) for key in lq)


def _meta_info(root: str) -> dict[str, Size | None]:
    """Keys and sizes of an LMDB; its lines read ``key.png (height,width,channels) compression``."""
    sizes: dict[str, Size | None] = {}
    with open(f'{root}/meta_info.txt') as file:
        for line in file:
            size = re.search(r'\((\d+), *(\d+)', line)
            sizes[line.split('.')[0]] = (int(size[1]), int(size[2])) if size else None
    return sizes


def _files(add: Add, where: str, roots: dict[str, str], options: dict[str, Any]) -> tuple[int, Sizes] | None:
    """How many pictures folders have, and the sizes of the first ones; None if a problem was reported."""
    lq_root, gt_root = roots['dataroot_lq'], roots.get('dataroot_gt')
    meta_info = options.get('meta_info_file')
    if meta_info:
        wrong = missing(meta_info, 'a file')
        if wrong:
            add(f'{where}.meta_info_file', wrong)
            return None
        with open(os.path.expanduser(meta_info)) as file:
            names = [line.strip().split(' ')[0] for line in file]
    else:
        names = sorted(scandir(gt_root or lq_root))
        partners = len(list(scandir(lq_root)))
        if partners != len(names):
            add(where, f'dataroot_gt has {len(names)} files and dataroot_lq has {partners}; each needs its partner')
            return None
    template = options.get('filename_tmpl', '{}')
    pairs = [(name, _partner(name, template) if gt_root else name) for name in names]
    for key, root in roots.items():
        absent = _absent(root, names if key == 'dataroot_gt' else [partner for _, partner in pairs])
        if absent:
            by = f'meta_info_file {meta_info}' if meta_info else 'dataroot_gt'
            by += f' and filename_tmpl {template!r}' if gt_root and key == 'dataroot_lq' else ''
            add(f'{where}.{key}', f'{root} lacks {len(absent)} of {len(names)} pictures by {by}, as {absent[0]!r}')
            return None
    if gt_root is None:
        return len(pairs), ()
    sizes = ((gt, picture_size(f'{gt_root}/{gt}'), picture_size(f'{lq_root}/{lq}')) for gt, lq in pairs)
    return len(pairs), islice(sizes, FILES_LOOKED_AT)


def _partner(name: str, template: str) -> str:
    """File name of the LR picture for an HR picture, as BasicSR makes it."""
    stem, extension = os.path.splitext(os.path.basename(name))
    return f'{template.format(stem)}{extension}'


def _absent(root: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are not in ``root``; each folder is listed once, as asking for every file is slow."""
    listings: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, file = os.path.split(name)
        if folder not in listings:
            listings[folder] = set(_listing(os.path.join(root, folder)))
        if file not in listings[folder]:
            absent.append(name)
    return absent


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def picture_size(path: str) -> Size | None:
    """Height and width of a picture file as OpenCV decodes it, read from its header; None if Pillow cannot tell."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            # OpenCV turns photographs upright. Other formats would be decoded for this entry.
            turned = picture.format == 'JPEG' and picture.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return (width, height) if turned else (height, width)


def _check_sizes(add: Add, where: str, sizes: Sizes, scale: int, is_train: bool, gt_size: int | None) -> None:
    wrong = []
    smallest: tuple[int, str] | None = None
    for name, gt, lq in sizes:
        if not gt or not lq:
            continue
        # Outside training BasicSR cuts HR to scale times LR, which may take less than one LR pixel off.
        allowed = range(1 if is_train else scale)
        if not all(g - scale * q in allowed for g, q in zip(gt, lq, strict=True)):
            wrong.append((name, gt, lq))
        if smallest is None or min(lq) < smallest[0]:
            smallest = min(lq), name
    if wrong:
        name, gt, lq = wrong[0]
        example = f'picture {name}: HR {gt[1]}x{gt[0]}, LR {lq[1]}x{lq[0]}'
        found = {g // q for g, q in zip(gt, lq, strict=True) if q}
        if len(found) == 1 and found != {scale} and 0 not in found:
            add(
                where,
                f'the data set is x{found.pop()}, the option file says scale {scale} ({example}); one must change',
            )
        else:
            more = f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''
            add(
                where,
                f'HR is not {scale} times LR ({example}{more}); cut HR to a multiple of {scale}, then make LR of it',
            )
    elif is_train and gt_size and smallest and gt_size // scale > smallest[0]:
        side, name = smallest
        add(
            f'{where}.gt_size',
            f'is {gt_size}, a patch of {gt_size // scale} LR pixels, and picture {name} has a side of {side}; '
            f'at most {side * scale}, or leave small pictures out',
        )


def _check_batches(add: Add, where: str, pictures: int, options: dict[str, Any], processes: int, devices: int) -> None:
    """BasicSR drops the last, incomplete batch: an epoch that is shorter than one batch trains nothing."""
    ratio, batch = options.get('dataset_enlarge_ratio', 1), options['batch_size_per_gpu'] * devices
    if math.ceil(pictures * ratio / processes) < batch:
        among = f' in each of {processes} processes' if processes > 1 else ''
        add(
            f'{where}.dataset_enlarge_ratio',
            f'is {ratio}, and an epoch of {pictures} pictures x {ratio} is shorter than a batch of {batch}{among}, '
            f'so nothing would be trained; at least {math.ceil(batch * processes / pictures)}, or a smaller batch',
        )
