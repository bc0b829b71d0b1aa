"""``basicsr test`` on benchmark sets: what is measured, what is written, and how it fails.

MATLAB's pairs are not part of the project. With ``ATTNSR_MATLAB_PAIRS`` naming a folder that holds ``Set5/HR_x4``,
``Set5/LR_bicubic_x4``, ``Set14/HR_x4``, ... (x2, x3 and x4), bicubic is compared with its known figures on them too.
"""

from attnsr import quality  # first, since it makes basicsr importable on current libraries

# isort: split
import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.error import URLError

import cv2
import networks
import numpy as np
import pytest
import skimage.data
import torch
import util
import yaml
from basicsr.metrics import calculate_psnr, calculate_ssim

from attnsr import evaluate, iqa, published, sets
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.cli import main
from attnsr.data_prep import layouts
from attnsr.data_prep.lmdb_dataset import DataSetError, write_lmdb
from attnsr.data_prep.matlab_resize import imresize
from attnsr.data_prep.pairs import prepare
from attnsr.upscaler import Upscaler

PAIRS = os.environ.get('ATTNSR_MATLAB_PAIRS')

SCALE = 2

#: Images, PSNR and SSIM on Y of the small network (whose parameters are random) and of bicubic, as the table has them.
STORED = {
    'Set5': '5 13.94 0.1435 37.38 0.9428',
    'Set14': '14 13.62 0.1299 37.14 0.9410',
}


def crops(count: int) -> dict[str, np.ndarray]:
    """HR pictures by name, uint8 BGR: of different sizes, the third one grey."""
    sources = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.astronaut()]
    found = {}
    for number in range(count):
        height, width = 48 + 2 * (number % 5), 64 - 6 * (number % 4)
        top, left = 100 + 7 * number, 120 + 11 * number
        crop = sources[number % 4][top : top + height, left : left + width, ::-1]
        found[f'img_{number + 1:03d}'] = crop[..., 1] if number == 2 else crop
    return found


def write_set(folder: Path, hr: dict[str, np.ndarray], layout: str = '{set}/HR_x2 {set}/LR_bicubic_x2') -> None:
    """Pairs as PNG files; the layout is two folders, or one for HR images alone."""
    hr_folder, *lr_folder = (part.format(set=folder.name) for part in layout.split())
    for name, image in hr.items():
        pictures = {hr_folder: image}
        pictures |= {each: imresize(image, Fraction(1, SCALE)) for each in lr_folder}
        for place, picture in pictures.items():
            (folder.parent / place).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder.parent / place / f'{name}.png'), picture)


@pytest.fixture(scope='module')
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set5 and Set14 (small, of photographs of scikit-image), a small network's weights and its option file."""
    folder = tmp_path_factory.mktemp('quality')
    write_set(folder / 'data' / 'Set5', crops(5))
    write_set(folder / 'data' / 'Set14', crops(14))
    net = networks.build('ELAN', upscale=SCALE)
    torch.save({'params': net.state_dict()}, folder / 'net.pth')
    described = {'type': 'ELAN', 'upscale': SCALE, **networks.SMALL['ELAN']}
    described['window_sizes'] = list(described['window_sizes'])
    (folder / 'net.yml').write_text(yaml.safe_dump({'network_g': described}))
    return folder


def check(workplace: Path, *arguments: str | Path, status: int = 0) -> None:
    """Run ``basicsr test`` on the small network; it must end with this status."""
    command = ['test', '--network', workplace / 'net.yml', '-w', workplace / 'net.pth', '--device', 'cpu', *arguments]
    assert main([str(each) for each in command]) == status


@pytest.fixture(scope='module')
def measured(workplace: Path) -> Path:
    """The results of the small network on both sets."""
    check(workplace, '--data', workplace / 'data', '-o', workplace / 'results', '--rgb', '--save-images')
    return workplace / 'results'


def read_json(folder: Path) -> dict[str, Any]:
    """Strictly: Infinity and NaN, which Python writes and reads but JSON does not have, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads((folder / 'results.json').read_text(), parse_constant=refuse)


def bgr(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None, path
    return image


def test_the_table_has_the_stored_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(workplace, '--data', workplace / 'data', '-o', workplace / 'digits')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'ELAN x2, whole images, float32, on CPU'
    assert lines[2].split() == ['bicubic', 'bicubic']
    assert lines[3].split() == ['data', 'set', 'images', *(['PSNR', 'SSIM'] * 2)]
    assert {name: ' '.join(rest) for name, *rest in map(str.split, lines[5:7])} == STORED
    files = ('results.json', 'results.md', 'results.csv', 'Set5.png', 'Set14.png')
    assert lines[-5:] == [str(workplace / 'digits' / file) for file in files]
    assert sorted(path.name for path in (workplace / 'digits').iterdir()) == sorted(files)


def test_a_network_that_gives_no_numbers_has_no_figures(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(workplace / 'net.pth', weights_only=True)
    tensors = state.get('params', state)
    next(iter(tensors.values())).fill_(float('nan'))
    torch.save(state, workplace / 'nan.pth')
    check(workplace, '-w', workplace / 'nan.pth', '--data', workplace / 'data', '-o', workplace / 'nan', status=2)
    problem = f'{workplace}/nan.pth: in float32 the network gives values that are no numbers; look at the weights\n'
    assert capsys.readouterr() == ('', problem)
    assert not list((workplace / 'nan').iterdir())


@pytest.mark.parametrize('threads', [1, 2, 4])
def test_any_number_of_threads_gives_the_same_files(threads: int, workplace: Path, measured: Path) -> None:
    again, before = workplace / f'threads_{threads}', torch.get_num_threads()
    data = ('--data', workplace / 'data')
    check(workplace, *data, '-o', again, '--rgb', '--save-images', '--threads', str(threads))
    assert torch.get_num_threads() == before
    for name in ('results.md', 'results.csv', 'Set5.png', 'Set14.png'):
        assert (again / name).read_bytes() == (measured / name).read_bytes(), name
    images = sorted(path.relative_to(again) for path in again.glob('images/*/*.png'))
    assert len(images) == 19
    for image in images:
        assert (again / image).read_bytes() == (measured / image).read_bytes(), image
    reports = [read_json(folder) for folder in (again, measured)]
    assert all(report.pop('date') for report in reports)
    assert reports[0] == reports[1]


def test_a_process_of_other_settings_gives_the_same_figures(workplace: Path) -> None:
    variables = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '3')
    command = ['--data', workplace / 'data' / 'Set5', '--network', workplace / 'net.yml', '-w', workplace / 'net.pth']
    util.run('-m', 'attnsr', 'test', *command, '-o', workplace / 'process', cwd=workplace, variables=variables)
    check(workplace, '--data', workplace / 'data' / 'Set5', '-o', workplace / 'here')
    files = [(workplace / name / 'results.csv').read_bytes() for name in ('process', 'here')]
    assert files[0] == files[1]
    assert files[0].count(b'\n') == 6


def precision_of_products() -> tuple[str | None, str, str]:
    """By PyTorch's older name, None where it says that it is refused, and by the newer ones."""
    newer = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        return torch.get_float32_matmul_precision(), *newer
    except RuntimeError:
        return None, *newer


@pytest.mark.parametrize(
    'program',
    [
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_a_program_of_other_settings_gets_the_same_figures_and_keeps_them(workplace: Path, program: str) -> None:
    check(workplace, '--data', workplace / 'data' / 'Set5', '-o', workplace / 'plain')
    try:
        exec(program)
        torch.backends.cudnn.benchmark = True
        chosen = precision_of_products()
        check(workplace, '--data', workplace / 'data' / 'Set5', '-o', workplace / 'other')
        assert precision_of_products() == chosen
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision('highest')
    files = [(workplace / name / 'results.csv').read_bytes() for name in ('plain', 'other')]
    assert files[0] == files[1]


def test_figures_are_those_of_the_saved_images(workplace: Path, measured: Path) -> None:
    report = read_json(measured)
    assert [each['name'] for each in report['datasets']] == ['Set5', 'Set14']
    rows = list(csv.DictReader(io.StringIO((measured / 'results.csv').read_text())))
    for each in report['datasets']:
        folder = workplace / 'data' / each['name']
        assert (each['source'], each['notes']) == (str(folder / 'HR_x2'), [])
        for image in each['per_image']:
            file = f'{image["name"]}.png'
            ours, hr = bgr(measured / 'images' / each['name'] / file), bgr(folder / 'HR_x2' / file)
            lr = quality.to_tensor(bgr(folder / 'LR_bicubic_x2' / file))
            for kind, picture in (('metrics', ours), ('bicubic', evaluate.enlarge(lr, SCALE))):
                assert image[kind] == {
                    f'{name}{suffix}': function(picture, hr, crop_border=SCALE, test_y_channel=on_y)
                    for suffix, on_y in (('', True), ('_rgb', False))
                    for name, function in (('psnr', calculate_psnr), ('ssim', calculate_ssim))
                }
            row = next(row for row in rows if (row['data_set'], row['image']) == (each['name'], image['name']))
            assert {name: float(row[name]) for name in image['metrics']} == image['metrics']
            assert {name: float(row[f'bicubic_{name}']) for name in image['bicubic']} == image['bicubic']
        for kind in ('metrics', 'bicubic'):
            for name, mean in each[kind].items():
                assert mean == pytest.approx(np.mean([image[kind][name] for image in each['per_image']]), rel=1e-14)
    assert len(rows) == 19
    assert report['settings'] == {'device': 'CPU', 'dtype': 'float32', 'tile': None, 'overlap': None, 'ensemble': None}
    markdown = (measured / 'results.md').read_text()
    first = report['datasets'][0]
    assert f'| Set5 | 5 | {first["metrics"]["psnr"]:.2f} | {first["metrics"]["ssim"]:.4f} |' in markdown
    assert f'| img_003 | {first["per_image"][2]["metrics"]["psnr"]:.2f} |' in markdown


def test_figures_are_those_of_a_test_by_an_option_file(
    workplace: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = {'crop_border': SCALE, 'test_y_channel': True}
    data = workplace / 'data' / 'Set5'
    opt = {
        'name': 'by_option_file',
        'model_type': 'SRModel',
        'scale': SCALE,
        'num_gpu': 0,
        'datasets': {
            'test_1': {
                'name': 'Set5',
                'type': 'PairedImageDataset',
                'dataroot_gt': str(data / 'HR_x2'),
                'dataroot_lq': str(data / 'LR_bicubic_x2'),
                'io_backend': {'type': 'disk'},
            }
        },
        'network_g': yaml.safe_load((workplace / 'net.yml').read_text())['network_g'],
        'path': {'pretrain_network_g': str(workplace / 'net.pth')},
        'val': {'save_img': False, 'metrics': {n: {'type': f'calculate_{n}', **metric} for n in ('psnr', 'ssim')}},
    }
    (workplace / 'opt.yml').write_text(yaml.safe_dump(opt))
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, 'argv', ['basicsr'])  # which main() changes
    assert main(['test', '-opt', 'opt.yml']) == 0
    theirs = read_json(workplace / 'results' / 'by_option_file')['datasets'][0]['per_image']
    theirs.sort(key=itemgetter('name'))  # BasicSR takes files in the folder's order
    for image, their in zip(read_json(measured)['datasets'][0]['per_image'], theirs, strict=True):
        assert image['name'] == their['name']
        for kind in ('metrics', 'bicubic'):
            assert {name: image[kind][name] for name in ('psnr', 'ssim')} == pytest.approx(their[kind], rel=1e-12)


def test_tiles_differ_from_whole_images_within_rounding(workplace: Path, measured: Path) -> None:
    """The images are smaller than a tile, so that nothing may differ at all."""
    check(
        workplace, '--data', workplace / 'data' / 'Set5', '-o', workplace / 'tiled', '--tile', '64', '--overlap', '16'
    )
    report, whole = read_json(workplace / 'tiled'), read_json(measured)
    assert (report['settings']['tile'], report['settings']['overlap']) == (64, 16)
    for name in ('psnr', 'ssim'):
        assert report['datasets'][0]['metrics'][name] == pytest.approx(whole['datasets'][0]['metrics'][name], abs=0.01)


def test_the_ensemble_is_the_mean_of_eight(workplace: Path) -> None:
    def upscale(x: torch.Tensor) -> torch.Tensor:
        """Depends on where up and left are."""
        large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return large + 0.1 * large.cumsum(2) - 0.03 * large.cumsum(3)

    x = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for image in (x.numpy(), x.numpy()[..., ::-1]):
        for turns in range(4):
            turned = upscale(torch.from_numpy(np.rot90(image, turns, (2, 3)).copy())).numpy()
            back = np.rot90(turned, -turns, (2, 3))
            expected.append(back if len(expected) < 4 else back[..., ::-1])
    assert len({each.tobytes() for each in expected}) == 8
    np.testing.assert_allclose(quality.ensemble_x8(upscale, x).numpy(), np.mean(expected, 0), rtol=1e-12)

    single = quality.load(str(workplace / 'net.yml'), workplace / 'net.pth', device='cpu')
    eight = quality.load(str(workplace / 'net.yml'), workplace / 'net.pth', device='cpu', ensemble=True)
    lr = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1))
    assert single.upscaler is not None
    outputs = quality.ensemble_x8(single.upscaler.tensor, lr[None])
    assert outputs.dtype == torch.float32
    np.testing.assert_array_equal(eight(lr), (outputs[0].clamp(0, 1).numpy()[::-1] * 255).round().transpose(1, 2, 0))
    assert (eight(lr) != single(lr)).any()


# What papers publish -------------------------------------------------------------------------------------------------


def test_the_published_figures_are_complete_and_of_known_networks_and_sets() -> None:
    rows = json.loads((Path(published.__file__).parents[2] / 'docs' / 'results.json').read_text())['results']
    keys = {(row['network'], row['scale'], row['data_set']) for row in rows}
    assert len(keys) == len(rows) == 39
    for network, scale, data_set in keys:
        assert network in VARIANTS
        assert scale in SCALES
        assert data_set in layouts.BENCHMARKS
        found = published.find(network, scale, data_set)
        assert found is not None
        assert 26 < found.psnr < 40
        assert 0.7 < found.ssim < 1
        assert VARIANTS[network].paper == found.source
    for key, right in {
        ('dlgsanet_light', 4, 'Manga109'): (31.13, 0.9161),
        ('elan', 3, 'Urban100'): (29.32, 0.8745),
    }.items():
        found = published.find(*key)
        assert found is not None
        assert (found.psnr, found.ssim) == right
    assert published.find('elan', 3, 'Set5') is None
    assert published.find(None, 4, 'Set14') is None


def test_the_papers_row_stands_beside_where_it_is_known_and_the_set_is_whole(workplace: Path, tmp_path: Path) -> None:
    upscaler = Upscaler(networks.build('ELAN', upscale=SCALE), device='cpu')
    settings = {'device': 'CPU', 'dtype': 'float32', 'tile': None}
    model = quality.Model('net', 'Net', SCALE, 'dlgsanet_tiny', upscaler, torch.device('cpu'), settings=settings)
    write_set(tmp_path / 'Set14', crops(4))
    data = [workplace / 'data' / 'Set5', tmp_path / 'Set14']
    results = quality.run(model, data, tmp_path / 'out', quality.metrics(SCALE), threads=1)
    whole, partial = read_json(tmp_path / 'out')['datasets']
    assert (whole['paper']['psnr'], whole['paper']['ssim']) == (38.16, 0.9611)
    assert whole['paper']['source'] == VARIANTS['dlgsanet_tiny'].paper
    assert whole['difference'] == {name: whole['metrics'][name] - whole['paper'][name] for name in ('psnr', 'ssim')}
    assert partial['paper'] is partial['difference'] is None
    assert partial['notes'] == ['4 of 14 images']
    lines = results.table().splitlines()
    assert lines[2].split() == ['bicubic', 'bicubic', 'paper', 'paper', 'difference', 'difference']
    assert lines[5].split()[-4:] == ['38.16', '0.9611', *(f'{whole["difference"]["psnr"]:+.2f}',), lines[5].split()[-1]]
    assert lines[6].split()[-4:] == ['-'] * 4
    assert any(line.startswith(f'Paper: {VARIANTS["dlgsanet_tiny"].paper}.') for line in lines)


# Sets ----------------------------------------------------------------------------------------------------------------

LAYOUTS = [
    '{set}/HR_x2 {set}/LR_bicubic_x2',
    '{set}/HR {set}/LR_bicubic/X2',
    'HR/{set}/x2 LR/LRBI/{set}/x2',
    '{set}/GTmod12 {set}/LRbicx2',
    '{set}/original',
    '{set}',
]


def assert_same(found: sets.PhotographSet, hr: dict[str, np.ndarray]) -> None:
    assert [photograph.name for photograph in found.photographs] == list(hr)
    for photograph in found.photographs:
        image = hr[photograph.name]
        image = image[: image.shape[0] // SCALE * SCALE, : image.shape[1] // SCALE * SCALE]
        reduced = imresize(image, Fraction(1, SCALE))
        assert (photograph.height, photograph.width) == image.shape[:2]
        for given, right in zip(photograph.read(), (image, reduced), strict=True):
            right = right if right.ndim == 3 else np.stack([right] * 3, 2)
            np.testing.assert_array_equal(given, right)


@pytest.mark.parametrize('below', ['', 'benchmark'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_the_same_pixels(layout: str, below: str, tmp_path: Path) -> None:
    hr = crops(5)
    write_set(tmp_path / below / 'B100', hr, layout)
    (found,) = sets.find([tmp_path], SCALE, 2)
    assert found.name == 'B100'
    assert_same(found, hr)
    made = [note for note in found.notes if note.startswith('LR images are made from the HR ones')]
    assert len(made) == (' ' not in layout)


def test_a_folder_of_any_name_is_a_set_of_that_name(tmp_path: Path) -> None:
    hr = crops(3)
    write_set(tmp_path / 'my [photos]', hr)
    write_set(tmp_path / 'others', hr, '{set}')
    first, second = sets.find([tmp_path / 'my [photos]', tmp_path / 'others'], SCALE, 1)
    assert (first.name, first.notes) == ('my [photos]', ())
    assert (second.name, second.notes) == ('others', (f'LR images are made from the HR ones in {tmp_path}/others',))
    assert_same(first, hr)
    assert_same(second, hr)


def test_images_are_cut_to_a_multiple_of_the_scale(tmp_path: Path) -> None:
    hr = {name: image[:-1, :-3] for name, image in crops(2).items()}
    write_set(tmp_path / 'BSDS100', hr, '{set}')
    (found,) = sets.find([tmp_path], SCALE, 1)
    assert found.name == 'B100'
    assert_same(found, hr)


def test_prepared_lmdbs_are_sets_too(workplace: Path, tmp_path: Path) -> None:
    jobs, _ = layouts.benchmark(workplace / 'data', tmp_path / 'datasets', [SCALE])
    prepare(jobs, quiet=True, workers=1)
    datasets = tmp_path / 'datasets'
    named = sets.find([datasets / 'Set5' / 'HR_x2.lmdb', datasets / 'Set14' / 'HR_x2.lmdb'], SCALE, 2)
    for found in (named, sets.find([datasets], SCALE, 2)):
        assert [(each.name, each.notes) for each in found] == [('Set5', ()), ('Set14', ())]
        assert_same(found[0], crops(5))
        assert_same(found[1], crops(14))
    with pytest.raises(DataSetError, match=r'HR_x2\.lmdb: holds the HR images for x2, and x3 is measured'):
        sets.find([datasets / 'Set5' / 'HR_x2.lmdb'], 3, 1)
    shutil.rmtree(datasets / 'Set5' / 'LR_bicubic_x2.lmdb')
    (alone,) = sets.find([datasets / 'Set5'], SCALE, 1)
    assert alone.notes == (f'LR images are made from the HR ones in {datasets}/Set5/HR_x2.lmdb',)
    assert_same(alone, crops(5))


def test_lmdbs_of_other_tools_are_paired_by_their_names(tmp_path: Path) -> None:
    hr = {name: image if image.ndim == 3 else np.stack([image] * 3, 2) for name, image in crops(3).items()}
    for kind, factor in (('valid_HR', 1), ('valid_LR_bicubic_X2', SCALE)):
        write_lmdb(tmp_path / f'{kind}.lmdb', {n: imresize(i, Fraction(1, factor)) for n, i in hr.items()})
    for record in tmp_path.glob('*.record.jsonl'):
        record.unlink()
    (found,) = sets.find([tmp_path / 'valid_HR.lmdb'], SCALE, 1)
    assert (found.name, found.notes) == ('valid_HR', ())
    assert_same(found, hr)


def break_png(folder: Path) -> str:
    file = folder / 'Set5' / 'HR_x2' / 'img_002.png'
    file.write_bytes(file.read_bytes()[:200])
    return f'{file}: is truncated or damaged'


def break_lr(folder: Path) -> str:
    file = folder / 'Set5' / 'LR_bicubic_x2' / 'img_002.png'
    cv2.imwrite(str(file), bgr(file)[:-2])
    return f'{file}: has 23 x 29 pixels .*, and as the x2 image of .* it must have 25 x 29'


def break_pair(folder: Path) -> str:
    file = folder / 'Set5' / 'LR_bicubic_x2' / 'img_002.png'
    file.unlink()
    return f'{folder}/Set5/HR_x2/img_002.png: has no LR image of x2, which would be named img_002'


def break_size(folder: Path) -> str:
    file = folder / 'Set5' / 'HR_x2' / 'img_002.png'
    cv2.imwrite(str(file), bgr(file)[:14])
    (folder / 'Set5' / 'LR_bicubic_x2').rename(folder / 'elsewhere')
    return f'{file.parent}: img_002 has 14 x 58 pixels .*: 15 x 15 at least'


def break_folder(folder: Path) -> str:
    shutil.rmtree(folder / 'Set5' / 'HR_x2')
    return rf'{folder}/Set5: there are no HR images of Set5 for x2; they would be in Set5/HR_x2, Set5/HR, .* or Set5$'


@pytest.mark.parametrize('damage', [break_png, break_lr, break_pair, break_size, break_folder])
def test_what_is_wrong_with_a_set_is_one_line(
    damage: Any, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workplace / 'data' / 'Set5', tmp_path / 'Set5')
    said = damage(tmp_path)
    check(workplace, '--data', tmp_path, '-o', tmp_path / 'out', status=2)
    out, err = capsys.readouterr()
    assert out == ''
    (line,) = err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / 'out').exists()


def test_damaged_lmdbs_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r'none\.lmdb: there is no such folder; name an LMDB folder'):
        sets.find([tmp_path / 'none.lmdb'], SCALE, 1)
    write_lmdb(tmp_path / 'HR.lmdb', crops(3))
    write_lmdb(tmp_path / 'LR_x2.lmdb', crops(2))
    with pytest.raises(DataSetError, match=r"entry 'img_003' is in one of them only"):
        sets.find([tmp_path / 'HR.lmdb'], SCALE, 1)
    write_lmdb(tmp_path / 'other_HR.lmdb', crops(2))
    write_lmdb(tmp_path / 'other_LR_x2.lmdb', crops(2))
    with pytest.raises(DataSetError, match=r"other_LR_x2\.lmdb: entry 'img_001' has 48 x 64 pixels .* have 24 x 32"):
        sets.find([tmp_path / 'other_HR.lmdb'], SCALE, 1)
    os.truncate(tmp_path / 'HR.lmdb' / 'data.mdb', 8192)
    with pytest.raises(DataSetError, match=r'HR\.lmdb: data\.mdb is (cut off|no LMDB)'):
        sets.find([tmp_path / 'HR.lmdb'], SCALE, 1)


def test_sets_of_one_name_are_told(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / 'data' / 'Set5', tmp_path / 'Set5')
    both = [workplace / 'data' / 'Set5', tmp_path / 'Set5']
    with pytest.raises(DataSetError, match=r'Set5/HR_x2 and .*Set5/HR_x2: are both sets of the name Set5'):
        sets.find(both, SCALE, 1)


# The command line ----------------------------------------------------------------------------------------------------

WRONG = [
    ('', 'a test needs an option file, -opt FILE, or weights and data sets, -w FILE --data PATH'),
    ('-w {net}', '--data PATH ... is missing: -w FILE --data PATH'),
    ('--data {data}', '--data needs the weights: -w FILE'),
    ('--network asid_x4 --data {data}', '--network asid_x4 needs the weights: -w FILE'),
    ('-opt demo_x2 --rgb', '-opt and --rgb exclude each other'),
    ('-opt demo_x2 --tile 0', '-opt and --tile exclude each other'),
    ('-w {net} --data {data} --compare', '--compare is for tests by an option file, -opt FILE'),
    ('-w {net} --data {data} --launcher pytorch', '--launcher is for tests by an option file'),
    ('-w {folder}/none.pth --data {data}', '{folder}/none.pth: there is no such file'),
    ('-w {folder}/net.yml --data {data}', '{folder}/net.yml: there is no training of this name in ./experiments'),
    ('{net_is} --data {folder}/none', '{folder}/none: there is no such folder'),
    ('{net_is} --data {data} --scale 3', '{net}: this is a checkpoint of ELAN x2, and --scale'),
    ('{net_is} --data {data} --overlap 8', '--overlap has no meaning without --tile'),
    ('{net_is} --data {data} --tile 8', 'tile must be'),
    ('{net_is} --data {data} --threads 0', '--threads: is 0; at least 1 is needed'),
    ('{net_is} --data {data} --device cuda:99', 'device cuda:99'),
    ('--network elan_lite -w {net} --data {data}', '--network elan_lite: is no network and no option file'),
    ('--network bicubic_x4 --data {data}', '--network bicubic_x4: write --network bicubic --scale 4'),
    ('{net_is} --data {net}', '{net}: is a file; give the folder that holds the images'),
    ('--network bicubic --data {data}', '--network bicubic needs the scale: --scale 2, 3 or 4'),
    ('--network bicubic --scale 2 -w {net} --data {data}', '--network bicubic has no weights: leave out -w {net}'),
]


@pytest.mark.parametrize(('command', 'said'), WRONG, ids=[command or 'nothing' for command, _ in WRONG])
def test_a_wrong_command_is_one_line(
    command: str, said: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    net = workplace / 'net.pth'
    names: dict[str, object] = {'folder': workplace, 'net': net, 'data': workplace / 'data' / 'Set5'}
    names['net_is'] = f'--network {workplace}/net.yml -w {net}'
    assert main(['test', *command.format(**names).split()]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    (line,) = err.splitlines()
    assert line.startswith(said.format(**names))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network_are_told(workplace: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(VARIANTS['asid'].build(2).state_dict(), tmp_path / 'asid.pth')
    data = ['--data', str(workplace / 'data' / 'Set5')]
    for network, asked in (('elan_light', 'ELAN-light'), ('asid_x4', 'ASID x4')):
        assert main(['test', '--network', network, '-w', str(tmp_path / 'asid.pth'), *data]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f'{tmp_path}/asid.pth: this is a checkpoint of ASID x2, not of {asked} (--network {network})'
    model = quality.load('asid', tmp_path / 'asid.pth', device='cpu')
    assert (model.name, model.title, model.variant, model.scale) == ('asid_x2_asid', 'ASID x2', 'asid', 2)


def test_a_folder_that_cannot_be_written_is_one_line(workplace: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / 'file').touch()
    check(workplace, '--data', workplace / 'data', '-o', tmp_path / 'file' / 'out', status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f'{tmp_path}/file/out cannot be written: Not a directory; name another folder by -o DIR'


def test_results_go_where_the_weights_say(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(workplace / 'data' / 'Set5')
    assert main(['test', '--network', 'bicubic', '--scale', '2', '--data', data]) == 0
    check(workplace, '--data', data)
    assert sorted(path.name for path in (tmp_path / 'results').iterdir()) == ['bicubic_x2', 'elan_x2_net']
    found = read_json(tmp_path / 'results' / 'bicubic_x2')['datasets'][0]
    ours = read_json(tmp_path / 'results' / 'elan_x2_net')['datasets'][0]
    assert found['metrics'] == ours['bicubic']
    assert (tmp_path / 'results' / 'bicubic_x2' / 'results.csv').read_text().startswith('data_set,image,psnr,ssim\n')


@pytest.fixture
def two_sets(workplace: Path) -> list[sets.PhotographSet]:
    return sets.find([workplace / 'data'], SCALE, 1)


def test_a_set_that_fails_loses_none_before_it(
    two_sets: list[sets.PhotographSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise DataSetError('img_005.png: has changed since it was checked; run the command again')

    photographs = [*two_sets[1].photographs[:4], sets.Photograph('img_005', 48, 48, fail)]
    failing = sets.PhotographSet('Set14', two_sets[1].source, tuple(photographs), ())
    monkeypatch.setattr(sets, 'find', lambda *_: [two_sets[0], failing])
    model = quality.load('bicubic', None, SCALE)
    with pytest.raises(DataSetError, match='has changed since it was checked'):
        quality.run(model, [], tmp_path, quality.metrics(SCALE), threads=2)
    assert [each['name'] for each in read_json(tmp_path)['datasets']] == ['Set5']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['Set5.png', 'results.csv', 'results.json', 'results.md']


def test_too_little_memory_is_one_line(
    two_sets: list[sets.PhotographSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError('CUDA out of memory')

    upscaler = Upscaler(networks.build('ELAN', upscale=SCALE), device='cpu', tile=None)
    monkeypatch.setattr(upscaler.net, 'reconstruct', exhausted)
    monkeypatch.setattr(sets, 'find', lambda *_: two_sets)
    model = quality.Model('net', 'Net', SCALE, None, upscaler, torch.device('cpu'))
    with pytest.raises(OSError, match=r'Set5: img_001 \(32 x 24 LR pixels\) does not fit into memory; .*--tile 128'):
        quality.run(model, [], tmp_path, quality.metrics(SCALE), threads=1)


def test_an_interrupted_test_keeps_what_it_finished(workplace: Path, tmp_path: Path) -> None:
    photograph = skimage.data.astronaut()[100:320, 100:320, ::-1]
    write_set(tmp_path / 'data' / 'Set14', {f'img_{n:03d}': np.roll(photograph, 9 * n, 1) for n in range(14)}, '{set}')
    shutil.copytree(workplace / 'data' / 'Set5', tmp_path / 'data' / 'Set5')
    command = ('--network', workplace / 'net.yml', '-w', workplace / 'net.pth', '--data', 'data', '-o', 'out')
    with util.CommandLine(tmp_path) as line:
        process = line.start('test', *command, '--device', 'cpu', '--ensemble', 'x8')
        deadline = time.monotonic() + util.PATIENCE
        while not (tmp_path / 'out' / 'Set5.png').exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process, signal.SIGINT)
        status, said = line.finish()
    assert status == 130, said
    assert said.splitlines()[-1] == 'interrupted; sets that were finished are in out'
    assert 'Traceback' not in said
    assert [each['name'] for each in read_json(tmp_path / 'out')['datasets']] == ['Set5']


# LPIPS, DISTS and NIQE -----------------------------------------------------------------------------------------------


def test_metrics_that_are_not_installed_name_their_extra(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def missing(name: str) -> str:
        raise iqa.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(iqa.importlib.metadata, 'version', missing)
    check(workplace, '--data', workplace / 'data' / 'Set5', '--metrics', 'lpips', status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("come from pyiqa, which is not installed; pip install 'attnsr[iqa]'")


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in of which ``create_metric`` is to be set."""
    module = types.ModuleType('pyiqa')
    monkeypatch.setitem(sys.modules, 'pyiqa', module)
    monkeypatch.setattr(iqa.importlib.metadata, 'version', lambda name: '0.1')
    return module


def test_a_download_that_fails_names_the_file_and_its_place(
    pyiqa: types.ModuleType, workplace: Path, capsys: Any
) -> None:
    def create(name: str, device: object) -> None:
        print('Downloading: "https://example.org/NIQE.mat" to /cache/pyiqa/NIQE.mat\n')
        raise URLError(OSError('Name or service not known'))

    pyiqa.create_metric = create  # type: ignore[attr-defined]
    check(workplace, '--data', workplace / 'data' / 'Set5', '--metrics', 'niqe', status=1)
    out, err = capsys.readouterr()
    assert (out, err) == (
        '',
        '--metrics niqe: pyiqa cannot download https://example.org/NIQE.mat (Name or service not known); put that file '
        'at /cache/pyiqa/NIQE.mat and run it again\n',
    )


def test_perceptual_metrics_are_given_rgb_without_the_border(pyiqa: types.ModuleType) -> None:
    given: list[tuple[torch.Tensor, ...]] = []

    def metric(*images: torch.Tensor) -> torch.Tensor:
        given.append(images)
        return images[0].mean()

    pyiqa.create_metric = lambda name, device: metric  # type: ignore[attr-defined]
    image, hr = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    for found in quality.metrics(SCALE, perceptual=['lpips', 'niqe'], device='cpu')[2:]:
        assert found.options == {'type': f'pyiqa {found.name}', 'crop_border': SCALE}
        assert found.calculate(image, hr) == pytest.approx(image[2:-2, 2:-2].mean() / 255, rel=1e-5)
    assert [len(images) for images in given] == [2, 1]
    for tensor, picture in zip((*given[0], *given[1]), (image, hr, image), strict=True):
        assert tensor.shape == (1, 3, 16, 26)
        np.testing.assert_allclose(tensor[0].numpy(), picture[2:-2, 2:-2, ::-1].transpose(2, 0, 1) / 255, rtol=1e-6)


def test_an_image_that_pyiqa_refuses_is_one_line(pyiqa: types.ModuleType, workplace: Path, capsys: Any) -> None:
    def refuse(*images: torch.Tensor) -> None:
        raise RuntimeError('The size of the image\nmust be at least 96')

    pyiqa.create_metric = lambda name, device: refuse  # type: ignore[attr-defined]
    check(workplace, '--data', workplace / 'data' / 'Set5', '-o', workplace / 'iqa', '--metrics', 'niqe', status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        '--metrics niqe: pyiqa refuses an image of 64 x 48 pixels (The size of the image must be at least 96); '
        'leave niqe out'
    )


# MATLAB's pairs ------------------------------------------------------------------------------------------------------

#: PSNR and SSIM of bicubic on Y, by set and scale.
KNOWN = {
    ('Set5', 2): (33.68, 0.9304),
    ('Set5', 3): (30.41, 0.8690),
    ('Set5', 4): (28.43, 0.8113),
    ('Set14', 2): (30.33, 0.8700),
    ('Set14', 3): (27.64, 0.7760),
    ('Set14', 4): (26.09, 0.7049),
}


@pytest.mark.skipif(PAIRS is None, reason="ATTNSR_MATLAB_PAIRS does not name a folder of MATLAB's pairs")
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_bicubic_on_matlab_pairs(scale: int, tmp_path: Path) -> None:
    model = quality.load('bicubic', None, scale)
    quality.run(model, [Path(str(PAIRS))], tmp_path, quality.metrics(scale))
    found = read_json(tmp_path)['datasets']
    assert [each['name'] for each in found] == ['Set5', 'Set14']
    for each in found:
        psnr, ssim = KNOWN[each['name'], scale]
        assert each['metrics']['psnr'] == pytest.approx(psnr, abs=0.01)
        assert each['metrics']['ssim'] == pytest.approx(ssim, abs=0.0001)
