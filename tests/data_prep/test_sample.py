"""The demo data set: BasicSR reads it, its pairs are true, it is the same every time, and no run leaves half of it."""

from attnsr.data_prep import sample  # first, since it makes basicsr importable on current libraries
from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.matlab_resize import imresize

# isort: split

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import util
from basicsr.data import build_dataset
from basicsr.data.data_util import paired_paths_from_meta_info_file


def stored(path: Path) -> dict[str, bytes]:
    """The PNG files of an LMDB by key, which are those that its meta_info.txt lists."""
    values = util.lmdb_values(path)
    listed = re.findall(r'^(\w+)\.png \(\d+,\d+,3\) 0$', (path / 'meta_info.txt').read_text(), re.MULTILINE)
    assert listed == sorted(values)
    return values


def pictures(path: Path) -> dict[str, np.ndarray]:
    """The decoded pictures of an LMDB, RGB."""
    return {
        key: np.asarray(cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
        for key, value in stored(path).items()
    }


def contents(out: Path) -> dict[str, object]:
    """Everything in a data set that matters: values and meta information of each LMDB, and the other files."""
    found: dict[str, object] = {file.name: file.read_text() for file in out.glob('[!.]*') if file.is_file()}
    for folder in out.glob('[!.]*.lmdb'):
        found[folder.name] = (stored(folder), (folder / 'meta_info.txt').read_text())
    return found


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole data set. BasicSR keeps open what it reads, so its data sets are given others."""
    out = tmp_path_factory.mktemp('sample')
    sample.build(out)
    return out


def basicsr_pairs(out: Path, phase: str, scale: int, name: str) -> list[dict]:
    """All pairs that BasicSR's data set gives."""
    gt = 'train_HR' if name == 'train' else f'{name}_HR_x{scale}'
    dataset = build_dataset(
        {
            'name': name,
            'type': 'PairedImageDataset',
            'dataroot_gt': str(out / f'{gt}.lmdb'),
            'dataroot_lq': str(out / f'{name}_LR_x{scale}.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'gt_size': 24 * scale,
            'use_hflip': True,
            'use_rot': True,
            'phase': phase,
            'scale': scale,
        }
    )
    return [dataset[index] for index in range(len(dataset))]


def block_mean(image: np.ndarray, scale: int) -> np.ndarray:
    height, width, channels = image.shape
    return image.reshape(height // scale, scale, width // scale, scale, channels).mean((1, 3))


def test_layout(whole: Path) -> None:
    lmdbs = ['train_HR', *(f'train_LR_x{s}' for s in (2, 3, 4))]
    lmdbs += [f'valid_{kind}_x{s}' for kind in ('HR', 'LR') for s in (2, 3, 4)]
    texts = ['meta_info_train.txt', *(f'meta_info_valid_x{s}.txt' for s in (2, 3, 4))]
    records = [f'{name}.record.jsonl' for name in lmdbs]
    assert sorted(os.listdir(whole)) == sorted([f'{name}.lmdb' for name in lmdbs] + records + texts)
    assert not any(key.startswith(('chelsea', 'rocket')) for key in stored(whole / 'train_HR.lmdb'))


def test_basicsr_reads_validation_in_rgb(tmp_path: Path) -> None:
    sample.build(tmp_path, [3])
    pairs = basicsr_pairs(tmp_path, 'val', 3, 'valid')
    assert [pair['gt_path'] for pair in pairs] == ['chelsea', 'rocket']
    for pair, photograph in zip(pairs, (skimage.data.chelsea(), skimage.data.rocket()), strict=True):
        height, width = (side // 3 * 3 for side in photograph.shape[:2])
        photograph = photograph[:height, :width]
        hr, lr = (np.rint(pair[kind].numpy().transpose(1, 2, 0) * 255) for kind in ('gt', 'lq'))
        np.testing.assert_array_equal(hr, photograph)
        np.testing.assert_array_equal(lr, imresize(photograph, 1 / 3))


def test_basicsr_reads_training_in_rgb_and_aligned(tmp_path: Path) -> None:
    sample.build(tmp_path, [2])
    pairs = basicsr_pairs(tmp_path, 'train', 2, 'train')
    assert len(pairs) == len((tmp_path / 'meta_info_train.txt').read_text().splitlines()) > 200
    for pair in pairs:
        hr, lr = (pair[kind].numpy().transpose(1, 2, 0) * 255 for kind in ('gt', 'lq'))
        assert hr.shape == (48, 48, 3)
        assert lr.shape == (24, 24, 3)
        if hr.std() < 2:  # so even that rounding decides
            continue
        # Bicubic reduction stays near the mean of each block, and far from it in other places or channels.
        right = np.abs(block_mean(hr, 2) - lr).mean()
        assert right < np.abs(block_mean(hr[..., ::-1], 2) - lr).mean() or np.ptp(hr, axis=2).max() < 20
        assert right < np.abs(block_mean(np.roll(hr, 2, 0), 2) - lr)[1:].mean()
        assert right < np.abs(block_mean(np.roll(hr, 2, 1), 2) - lr)[:, 1:].mean()


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_crops_are_cut_from_the_photograph_and_the_reduced_one(whole: Path, scale: int) -> None:
    hr, lr = pictures(whole / 'train_HR.lmdb'), pictures(whole / f'train_LR_x{scale}.lmdb')
    assert hr.keys() == lr.keys()
    photograph = skimage.data.coffee()[:396, :600]
    small, size, compared = imresize(photograph, 1 / scale), 120 // scale, 0
    keys = {crop.tobytes(): key for key, crop in hr.items()}
    for top in range(0, 277, 12):
        for left in range(0, 481, 12):
            key = keys.get(photograph[top : top + 120, left : left + 120].tobytes())
            if key:
                expected = small[top // scale :, left // scale :][:size, :size]
                np.testing.assert_array_equal(lr[key], expected, err_msg=key)
                compared += 1
    assert compared == sum(key.startswith('coffee') for key in hr) > 20


def test_crop_corners_cover_all_but_even_areas() -> None:
    image = np.random.default_rng(0).integers(0, 256, (252, 384, 3), dtype=np.uint8)
    covered = set()
    for top, left in sample.crop_corners(image):
        assert top % 12 == left % 12 == 0
        covered |= {(y, x) for y in range(top, top + 73) for x in range(left, left + 73)}
    assert covered == {(y, x) for y in range(252 - 47) for x in range(384 - 47)}, 'some 48 x 48 patches are in no crop'

    image[:, 200:] = 128
    assert max(left for _, left in sample.crop_corners(image)) == 180


def test_meta_information_files(whole: Path) -> None:
    for file, name in [('meta_info_train.txt', 'train_HR'), ('meta_info_valid_x4.txt', 'valid_HR_x4')]:
        paths = paired_paths_from_meta_info_file(['lr', 'hr'], ['lq', 'gt'], str(whole / file), '{}')
        images = pictures(whole / f'{name}.lmdb')
        assert [path['gt_path'] for path in paths] == [f'hr/{key}.png' for key in sorted(images)]
        shapes = [line.split(' ')[1] for line in (whole / file).read_text().splitlines()]
        assert shapes == ['({},{},{})'.format(*images[key].shape) for key in sorted(images)]


def test_same_every_time_and_kept(whole: Path, tmp_path: Path) -> None:
    assert not any(row.kept for row in sample.build(tmp_path, [4]))
    half = contents(tmp_path)
    rows = sample.build(tmp_path, [4, 2, 4])
    assert {row.path.name for row in rows if row.kept} == {name for name in half if name.endswith('.lmdb')}
    rows = sample.build(tmp_path)
    assert contents(tmp_path) == contents(whole)
    table = str(rows).splitlines()
    assert len(table) == 1 + len(rows) + 1 == 12
    assert [line.endswith('kept') for line in table[1:-1]] == [row.kept for row in rows]

    inode = (tmp_path / 'train_HR.lmdb' / 'data.mdb').stat().st_ino
    assert all(row.kept for row in sample.build(tmp_path))
    assert (tmp_path / 'train_HR.lmdb' / 'data.mdb').stat().st_ino == inode
    # Another LMDB in the place of one is not touched unless it is said.
    shutil.rmtree(tmp_path / 'valid_LR_x3.lmdb')
    shutil.copytree(tmp_path / 'valid_LR_x4.lmdb', tmp_path / 'valid_LR_x3.lmdb')
    shutil.copy(tmp_path / 'valid_LR_x4.record.jsonl', tmp_path / 'valid_LR_x3.record.jsonl')
    with pytest.raises(DataSetError, match=r'valid_LR_x3\.lmdb holds other images than would be written now'):
        sample.build(tmp_path)
    rows = sample.build(tmp_path, overwrite=True)
    assert [row.path.name for row in rows if not row.kept] == ['valid_LR_x3.lmdb']
    assert contents(tmp_path) == contents(whole)


def test_killed_in_the_middle(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'sample'
    script = f'import time\nfrom attnsr.data_prep import sample\nsample.build({str(out)!r})\ntime.sleep(60)'
    process = subprocess.Popen([sys.executable, '-c', script])
    try:
        deadline = time.monotonic() + 120
        while not (out / 'train_LR_x2.lmdb').exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL

    expected = contents(whole)
    left = contents(out)
    assert 'train_LR_x2.lmdb' in left
    assert left.items() <= expected.items()
    sample.build(out)
    assert contents(out) == expected
    assert sorted(os.listdir(out)) == sorted(expected)


@pytest.mark.parametrize(('scales', 'named'), [([2, 5], '5'), ([1], '1'), ([], 'none given')])
def test_refuses_scales(tmp_path: Path, scales: list[int], named: str) -> None:
    with pytest.raises(DataSetError, match=f'^scales: {named}; choose from 2, 3 and 4$'):
        sample.build(tmp_path / 'sample', scales)
    assert not (tmp_path / 'sample').exists()


def test_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=rf'^{tmp_path}/file/sample cannot be written: Not a directory$'):
        sample.build(tmp_path / 'file' / 'sample')


def test_names_a_picture_that_the_package_lacks() -> None:
    # Known to scikit-image, but not inside its package: asking scikit-image for it would download it.
    with pytest.raises(FileNotFoundError, match=r'skimage/data/eagle\.png: the installed scikit-image .* lacks'):
        sample.photograph('eagle.png')
