"""The demo data set: HR and LR LMDBs from the colour photographs that come inside the scikit-image package.

Nothing is downloaded. Training pairs are crops of some photographs; validation pairs are other photographs, whole.
"""

import importlib.metadata
import importlib.resources
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from attnsr.data_prep.lmdb_dataset import DataSetError, Summary, write_errors, write_lmdb
from attnsr.data_prep.matlab_resize import imresize
from attnsr.files import remove_leftovers, write_atomically

__all__ = ['SCALES', 'TRAINING', 'VALIDATION', 'build', 'crop_corners', 'photograph']

SCALES = (2, 3, 4)
# Everyday scenes only. scikit-image's other colour pictures, of a retina, of stained tissue and of the sky, have none
# of the edges and textures of the validation pictures: a small network that trained on them too scored lower there.
TRAINING = ('astronaut.png', 'coffee.png', 'motorcycle_left.png', 'motorcycle_right.png')
VALIDATION = ('chelsea.png', 'rocket.jpg')

# Divisible by 12, so that one set of HR crops has LR crops at every scale. With this stride every patch of 60 pixels
# or less lies whole in some crop, and small crops are read fast: a loader decodes a whole crop for every patch.
CROP_SIZE = 120
CROP_STRIDE = 60
# Grey levels between neighbouring pixels, on average. A crop below this is even or out of focus and teaches little: a
# small network scored no lower on the validation pictures without this fifth of all crops.
LEAST_DETAIL = 5.0
# Stored uncompressed, a crop is read in a quarter of the time and takes half as much again.
PNG_COMPRESSION = 0


def build(out: str | Path = 'datasets/sample', scales: Sequence[int] = SCALES, overwrite: bool = False) -> Summary:
    """Write the demo data set into the folder ``out``, which is made if need be.

    ``train_HR.lmdb`` holds HR crops of 120 x 120 pixels and ``train_LR_x2.lmdb`` (``x3``, ``x4``) the same crops of
    the reduced photographs; ``valid_HR_x2.lmdb`` and ``valid_LR_x2.lmdb`` (``x3``, ``x4``) hold the validation
    photographs whole, cut to a multiple of the scale. Beside them lie BasicSR's meta information files of the HR
    pictures, ``meta_info_train.txt`` and ``meta_info_valid_x2.txt`` (``x3``, ``x4``). The same call gives the same
    pictures, byte for byte. An LMDB that is already there is kept.

    Args:
        out: Folder for the data set.
        scales: The scales to make LR pictures for, out of 2, 3 and 4.
        overwrite: Replace LMDBs that are already there and hold something else.

    Returns:
        One entry per LMDB, in the order written; prints as a table.

    Raises:
        DataSetError: A scale is not 2, 3 or 4, or what lies in ``out`` already is not this data set.
        FileNotFoundError: The installed scikit-image lacks a photograph.
        OSError: ``out`` cannot be written: no permission, no space, ...
    """
    wrong = [scale for scale in scales if scale not in SCALES]
    if wrong or not scales:
        raise DataSetError(f'scales: {", ".join(map(str, wrong)) or "none given"}; choose from 2, 3 and 4')
    scales = sorted(set(scales))
    begun = time.perf_counter()
    out = Path(out)
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    summary = Summary()

    def write(name: str, images: Mapping[str, np.ndarray]) -> None:
        summary.append(write_lmdb(out / f'{name}.lmdb', images, overwrite, PNG_COMPRESSION))

    photographs = _photographs(TRAINING, multiple=12)
    corners = {
        f'{name}_s{number:03d}': (name, top, left)
        for name, image in photographs.items()
        for number, (top, left) in enumerate(crop_corners(image), start=1)
    }

    def crops(images: Mapping[str, np.ndarray], scale: int) -> dict[str, np.ndarray]:
        size = CROP_SIZE // scale
        return {
            key: images[name][top // scale :, left // scale :][:size, :size]
            for key, (name, top, left) in corners.items()
        }

    hr = crops(photographs, scale=1)
    write('train_HR', hr)
    for scale in scales:
        # The photograph is reduced before it is cut, so that no crop shows the reduction's treatment of borders.
        reduced = {name: imresize(image, Fraction(1, scale)) for name, image in photographs.items()}
        write(f'train_LR_x{scale}', crops(reduced, scale))
    _write_meta_info(out / 'meta_info_train.txt', hr)

    for scale in scales:
        hr = _photographs(VALIDATION, multiple=scale)
        write(f'valid_HR_x{scale}', hr)
        write(f'valid_LR_x{scale}', {name: imresize(image, Fraction(1, scale)) for name, image in hr.items()})
        _write_meta_info(out / f'meta_info_valid_x{scale}.txt', hr)
    summary.seconds = time.perf_counter() - begun
    return summary


def photograph(file: str) -> np.ndarray:
    """Read a picture from the installed scikit-image package, never from the network.

    Returns:
        uint8 array of shape (height, width, 3), channels in OpenCV's order BGR.

    Raises:
        FileNotFoundError: The package does not hold the picture.
    """
    path = Path(str(importlib.resources.files('skimage'))) / 'data' / file
    image = cv2.imread(str(path)) if path.is_file() else None
    if image is None:
        version = importlib.metadata.version('scikit-image')
        raise FileNotFoundError(f'{path}: the installed scikit-image {version} lacks this picture; reinstall its wheel')
    return image


def crop_corners(image: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where to cut crops of 120 x 120 pixels, every 60 pixels and at the right and lower edge, leaving out even areas.

    Args:
        image: uint8 array of shape (height, width, 3); both sides are 120 at least.

    Yields:
        (top, left) of each crop, row by row.
    """
    rows, columns = (sorted({*range(0, side - CROP_SIZE, CROP_STRIDE), side - CROP_SIZE}) for side in image.shape[:2])
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)
    for top in rows:
        for left in columns:
            crop = grey[top : top + CROP_SIZE, left : left + CROP_SIZE]
            steps = (np.abs(np.diff(crop, axis=axis)).mean() for axis in (0, 1))
            if max(steps) >= LEAST_DETAIL:
                yield top, left


def _photographs(files: Sequence[str], multiple: int) -> dict[str, np.ndarray]:
    """The pictures by name, cut at the right and below so that both sides are multiples of ``multiple``."""
    images = {}
    for file in files:
        image = photograph(file)
        height, width = (side // multiple * multiple for side in image.shape[:2])
        images[Path(file).stem] = image[:height, :width]
    return images


def _write_meta_info(path: Path, images: Mapping[str, np.ndarray]) -> None:
    """Lines ``name.png (height,width,channels)``, as BasicSR's ``meta_info_file`` option reads them."""
    lines = ('{}.png ({},{},{})\n'.format(name, *image.shape) for name, image in images.items())
    with write_errors(path), write_atomically(path) as file:
        file.write(''.join(lines).encode())
