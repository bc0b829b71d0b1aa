"""The benchmarks of data: they compare the same work, count rightly, and give no figures for what disagrees."""

import json
import random
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset

from attnsr.benchmarks import data_loading, data_preparation, tables
from attnsr.benchmarks.data_loading import Storage
from attnsr.data_prep.lmdb_dataset import write_lmdb
from attnsr.data_prep.pairs import Job, Pair, prepare
from attnsr.errors import UsageError


@pytest.fixture(scope='module')
def photographs(tmp_path_factory) -> list[Path]:
    """Of sizes that are no multiples of the scale, or of the step between sub-images."""
    folder = tmp_path_factory.mktemp('photographs')
    noise = np.random.default_rng(0)
    paths = []
    for name, (height, width) in {'a': (485, 730), 'b': (723, 480)}.items():
        coarse = noise.integers(0, 256, (30, 40, 3), np.uint8)
        paths.append(folder / f'{name}.png')
        cv2.imwrite(str(paths[-1]), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return paths


def sub_images(lmdb_path: Path) -> dict[str, np.ndarray]:
    entries = data_preparation._entries(lmdb_path)
    return {key: cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR) for key, png in entries.items()}


@pytest.fixture(scope='module')
def prepared(photographs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('ours')
    data_preparation._prepare(photographs, out)
    return out


def test_basicsr_chain_and_ours_cut_alike(photographs, prepared, tmp_path) -> None:
    reduced, found = tmp_path / 'LR', tmp_path / 'sub'
    reduced.mkdir()
    found.mkdir()
    threads = torch.get_num_threads()
    try:
        for path in photographs:
            data_preparation._reduce(path, reduced)
            data_preparation._extract(path, found, 480, 240)
    finally:
        torch.set_num_threads(threads)
    expected = sub_images(prepared / 'HR.lmdb')
    assert list(expected) == [*(f'a_s{number:03d}' for number in range(1, 7)), 'b_s001', 'b_s002']
    assert {path.stem for path in found.iterdir()} == expected.keys()
    for key, image in expected.items():
        assert np.array_equal(cv2.imread(str(found / f'{key}.png')), image)

    found = tmp_path / 'LR_sub'
    found.mkdir()
    for path in reduced.iterdir():
        data_preparation._extract(path, found, 120, 60)
    for key, image in sub_images(prepared / 'LR_x4.lmdb').items():
        difference = cv2.absdiff(cv2.imread(str(found / f'{key}.png')), image)
        assert (difference <= 1).mean() > 0.99


@pytest.mark.parametrize(
    ('name', 'changed', 'told'),
    [
        ('HR', lambda image: image ^ 1, 'HR: the LMDBs have other pixels; no figures'),
        ('LR_x4', lambda image: image ^ 128, 'LR_x4: the LMDBs have other pixels; no figures'),
        ('LR_x4', lambda image: image[:-1], "LR_x4: 'a_s001' is of another size; no figures"),
    ],
)
def test_what_disagrees_has_no_figures(prepared, tmp_path, name, changed, told) -> None:
    for each in ('HR', 'LR_x4'):
        images = sub_images(prepared / f'{each}.lmdb')
        if each == name:
            images['a_s001'] = np.ascontiguousarray(changed(images['a_s001']))
        write_lmdb(tmp_path / f'{each}.lmdb', images)
    with pytest.raises(UsageError) as error:
        data_preparation._agreement(prepared, tmp_path)
    assert str(error.value) == told


def test_agreement_counts_values(prepared, tmp_path) -> None:
    write_lmdb(tmp_path / 'HR.lmdb', sub_images(prepared / 'HR.lmdb'))
    images = sub_images(prepared / 'LR_x4.lmdb')
    values = sum(image.size for image in images.values())
    first = next(iter(images.values()))
    first[0, 0] = first[0, 0].astype(int) + np.where(first[0, 0] < 128, (1, 1, 7), (-1, -1, -7))
    write_lmdb(tmp_path / 'LR_x4.lmdb', images)
    assert data_preparation._agreement(prepared, tmp_path) == {
        'keys': len(images),
        'LR values': values,
        'identical': (values - 3) / values,
        'off by 1': 2 / values,
        'off by more': 1 / values,
        'largest difference': 7,
    }


def test_a_count_of_synthetic_images_is_prepared(tmp_path, capsys) -> None:
    data_preparation._make_images(tmp_path / 'images', 3)
    (tmp_path / 'out').mkdir()
    request = {'what': 2, 'folder': str(tmp_path / 'images'), 'out': str(tmp_path / 'out')}
    data_preparation.answer(json.dumps(request))
    told = json.loads(capsys.readouterr().out)
    assert set(data_preparation._entries(tmp_path / 'out/HR.lmdb')) == {
        f'{number:04d}_s{part:03d}' for number in range(2) for part in range(1, 7)
    }
    assert told['seconds'] > 0
    assert told['resident'] >= told['held'] > 0
    assert told['bytes'] > 10**5


def test_table_and_plot_of_scaling(tmp_path) -> None:
    runs = [
        {
            'images': count,
            'seconds': [count / 100, count / 50, count / 80],
            'held': 8 * 10**8,
            'resident': [9 * 10**8] * 3,
        }
        for count in (500, 1000)
    ]
    content = {'device': 'Chip', 'scaling': {**tables.environment(), 'cores': 2, 'runs': runs}}
    lines = data_preparation._markdown(content)
    assert [line.replace(' ', '') for line in lines if line.startswith(('| 500', '| 1000'))] == [
        '|500|6.2|5.0to10.0|12.50|900|900to900|800|',
        '|1000|12.5|10.0to20.0|12.50|900|900to900|800|',
    ]
    assert data_preparation._plot(content, tmp_path / 'chip.json') == [str(tmp_path / 'chip.png')]
    assert cv2.imread(str(tmp_path / 'chip.png')).shape[:2] == (400, 1000)


def test_small_photographs_and_wrong_arguments_are_told(tmp_path, capsys) -> None:
    cv2.imwrite(str(tmp_path / 'small.png'), np.zeros((482, 479, 3), np.uint8))
    assert data_preparation.main([str(tmp_path), '--output', str(tmp_path)]) == 2
    assert 'small.png: is smaller than 480 pixels' in capsys.readouterr().err
    for arguments in ([], ['--scaling', '0'], [str(tmp_path), '--rounds', '0']):
        with pytest.raises(SystemExit):
            data_preparation.main(arguments)
    assert data_loading.main([str(tmp_path / 'absent')]) == 2
    assert capsys.readouterr().err.endswith('absent: there is no such folder\n')


def test_shares_of_pixels_and_patches(tmp_path) -> None:
    image = np.zeros((64, 100, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    pair = Pair('a', tmp_path / 'a.png')
    whole, cut = Storage('whole'), Storage('cut', 40, 24)
    for storage in (whole, cut):
        prepare([Job(tmp_path / storage.name, (pair,), (4,), crop=storage.crop, step=storage.step)], quiet=True)
    assert data_loading._used(whole, 32, tmp_path) == 32 * 32 / (64 * 100)
    assert data_loading._used(cut, 32, tmp_path) == 32 * 32 / (40 * 40)
    inside = [
        (top, left)
        for top in range(64 - 32 + 1)
        for left in range(100 - 32 + 1)
        if any(y <= top <= y + 8 and x <= left <= x + 8 for y in (0, 24) for x in (0, 24, 48, 60))
    ]
    assert data_loading._positions(cut, 32, tmp_path) == len(inside) / (33 * 69)
    assert data_loading._positions(whole, 32, tmp_path) == 1


def test_both_data_sets_give_the_same_patches(prepared) -> None:
    found = []
    for kind in (PairedImageDataset, data_loading.CutFirst):
        random.seed(1)
        options = {
            'phase': 'train',
            'scale': 4,
            'dataroot_gt': str(prepared / 'HR.lmdb'),
            'dataroot_lq': str(prepared / 'LR_x4.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'gt_size': 192,
            'use_hflip': True,
            'use_rot': True,
        }
        dataset = kind(options)
        found.append([dataset[index] for index in range(4)])
    for one, other in zip(*found, strict=True):
        assert one['gt_path'] == other['gt_path']
        assert torch.equal(one['gt'], other['gt'])
        assert torch.equal(one['lq'], other['lq'])


def test_reading_is_counted(prepared, tmp_path) -> None:
    storage = Storage('', 480, 240)
    (tmp_path / storage.name).symlink_to(prepared)
    begun = time.perf_counter()
    rate = data_loading._rate(storage, tmp_path, patch=192, workers=0, seconds=0)
    assert rate >= 2 * data_loading.BATCH / (time.perf_counter() - begun)
