"""``attnsr.evaluate``: what BasicSR's testing finds, recorded without touching it."""

from attnsr import evaluate  # first, since it makes basicsr importable on current libraries

# isort: split
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basicsr.metrics
import basicsr.models
import basicsr.models.sr_model
import basicsr.test
import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.models.sr_model import SRModel
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.registry import MODEL_REGISTRY
from torch.testing._internal.distributed.fake_pg import FakeStore

SCALE = 2
NETWORK = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_conv': 1, 'upscale': SCALE}
METRICS = {
    'psnr': {'type': 'calculate_psnr', 'crop_border': SCALE, 'test_y_channel': True},
    'ssim': {'type': 'calculate_ssim', 'crop_border': SCALE, 'test_y_channel': True},
}
PHOTOGRAPHS = {
    'Animals': {'chelsea': skimage.data.chelsea()[100:196, 100:220]},
    'Things': {'coffee': skimage.data.coffee()[150:222, 200:300], 'rocket': skimage.data.rocket()[300:364, 0:80]},
}

Run = Callable[..., evaluate.Results]


@MODEL_REGISTRY.register()
class SlowModel(SRModel):
    """Testing takes at least 20 ms more than SRModel's; remembers its instances."""

    made: list['SlowModel'] = []  # noqa: RUF012

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.made.append(self)

    def test(self) -> None:
        time.sleep(0.02)
        super().test()


def to_uint8(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the data sets as PNG pairs and a network's weights."""
    for data_set, images in PHOTOGRAPHS.items():
        for name, rgb in images.items():
            for kind, image in {'HR': rgb, 'LR': to_uint8(imresize(rgb / 255, 1 / SCALE))}.items():
                (tmp_path / data_set / kind).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / data_set / kind / f'{name}.png'), image[..., ::-1])
    torch.manual_seed(0)
    torch.save({'params': SRVGGNetCompact(**NETWORK).state_dict()}, tmp_path / 'net.pth')
    return tmp_path


def options(workplace: Path, **changed: Any) -> dict[str, Any]:
    datasets = {
        f'test_{i}': {
            'name': name,
            'type': 'PairedImageDataset',
            'dataroot_gt': str(workplace / name / 'HR'),
            'dataroot_lq': str(workplace / name / 'LR'),
            'io_backend': {'type': 'disk'},
        }
        for i, name in enumerate(PHOTOGRAPHS)
    }
    opt = {
        'name': 'tiny',
        'model_type': 'SRModel',
        'scale': SCALE,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': datasets,
        'network_g': {'type': 'SRVGGNetCompact', **NETWORK},
        'path': {'pretrain_network_g': str(workplace / 'net.pth'), 'strict_load_g': True},
        'val': {'save_img': True, 'suffix': None, 'metrics': METRICS},
    }
    return {**opt, **changed}


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Test with the given options, as the command line does."""

    def _run(opt: dict[str, Any], compare: bool = False) -> evaluate.Results:
        (workplace / 'opt.yml').write_text(yaml.safe_dump(opt, sort_keys=False))
        monkeypatch.setattr(sys, 'argv', ['basicsr', '-opt', str(workplace / 'opt.yml')])
        return evaluate.run(str(workplace), compare)

    return _run


def read(path: Path) -> np.ndarray:
    """uint8 BGR."""
    image = cv2.imread(str(path))
    assert image is not None, path
    return image


def read_json(results: Path) -> dict[str, Any]:
    """Strictly: Infinity and NaN, which Python writes and reads but JSON does not have, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads((results / 'results.json').read_text(), parse_constant=refuse)


def bicubic(lr: np.ndarray) -> np.ndarray:
    """MATLAB's imresize of a uint8 image, written independently of BasicSR's: Keys' kernel (a = -0.5) as matrices."""

    def matrix(n: int) -> np.ndarray:
        weights = np.zeros((n * SCALE, n))
        for i in range(n * SCALE):
            centre = (i + 0.5) / SCALE - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                d = abs(centre - j)
                value = 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
                weights[i, -1 - j if j < 0 else 2 * n - 1 - j if j >= n else j] += value  # symmetric edges
        return weights

    height, width = lr.shape[:2]
    enlarged = np.einsum('ij,jkc,lk->ilc', matrix(height), lr / 255, matrix(width), optimize=True)
    return to_uint8(enlarged)


def quality(image: np.ndarray, hr: np.ndarray) -> dict[str, float]:
    settings = {'crop_border': SCALE, 'test_y_channel': True}
    return {'psnr': calculate_psnr(image, hr, **settings), 'ssim': calculate_ssim(image, hr, **settings)}


def test_figures_are_those_of_the_saved_images(workplace: Path, run: Run) -> None:
    run(options(workplace))
    root = workplace / 'results' / 'tiny'
    report = read_json(root)
    everything = []
    for data_set in report['datasets']:
        folder = workplace / data_set['name']
        assert [image['name'] for image in data_set['per_image']] == list(PHOTOGRAPHS[data_set['name']])
        for image in data_set['per_image']:
            hr = read(folder / 'HR' / f'{image["name"]}.png')
            lr = read(folder / 'LR' / f'{image["name"]}.png')
            ours = read(root / 'visualization' / data_set['name'] / f'{image["name"]}_tiny.png')
            assert image['metrics'] == pytest.approx(quality(ours, hr), rel=1e-12)
            # BasicSR computes bicubic in float32: a pixel at exactly one half may round the other way.
            assert image['bicubic'] == pytest.approx(quality(bicubic(lr), hr), rel=1e-5)
            assert image['seconds'] > 0
            everything.append(image)
        for kind in ('metrics', 'bicubic'):
            for metric in METRICS:
                mean = np.mean([image[kind][metric] for image in data_set['per_image']])
                assert data_set[kind][metric] == pytest.approx(mean, rel=1e-12)
        for metric in METRICS:
            assert data_set['gain'][metric] == data_set['metrics'][metric] - data_set['bicubic'][metric]
    # Over all three images, not over the two sets.
    assert report['all_images']['images'] == 3
    for metric in METRICS:
        mean = np.mean([image['metrics'][metric] for image in everything])
        assert report['all_images']['metrics'][metric] == pytest.approx(mean, rel=1e-12)
    assert report['network'] == {'type': 'SRVGGNetCompact', **NETWORK}
    assert report['weights'] == str(workplace / 'net.pth')
    assert (report['scale'], report['metrics']) == (SCALE, METRICS)


def test_table_markdown_and_json_agree(workplace: Path, run: Run) -> None:
    results = run(options(workplace))
    root = workplace / 'results' / 'tiny'
    report = read_json(root)
    expected = [
        [
            name,
            str(found['images']),
            f'{found["metrics"]["psnr"]:.2f}',
            f'{found["metrics"]["ssim"]:.4f}',
            f'{found["bicubic"]["psnr"]:.2f}',
            f'{found["bicubic"]["ssim"]:.4f}',
            f'{found["gain"]["psnr"]:+.2f}',
            f'{found["seconds"]["median"]:.3f}',
        ]
        for name, found in [
            *((found['name'], found) for found in report['datasets']),
            ('all images', report['all_images']),
        ]
    ]
    rows = [line for line in (root / 'results.md').read_text().splitlines() if line.startswith('|')]
    header, _, *body = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
    assert header == [
        'data set',
        'images',
        'PSNR',
        'SSIM',
        'bicubic PSNR',
        'bicubic SSIM',
        'gain in dB',
        'seconds an image',
    ]
    assert body == expected
    lines = results.table().splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith('---'))
    assert [re.split(' {2,}', line) for line in lines[rule + 1 : rule + 4]] == expected
    assert len({len(line) for line in lines[rule - 1 : rule + 4]}) == 1, 'columns are not aligned'
    assert len(lines[rule]) <= 100
    assert not list(root.rglob('*.part'))


def test_basicsr_computes_logs_and_saves_the_same(workplace: Path, run: Run) -> None:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    def outcome() -> tuple[list[str], dict[str, bytes]]:
        logged = re.findall(r'# (?:psnr|ssim): [\d.]+', '\n'.join(lines))
        lines.clear()
        pictures = workplace / 'results' / 'tiny' / 'visualization'
        return logged, {path.name: path.read_bytes() for path in pictures.rglob('*.png')}

    lines: list[str] = []
    handler = Lines()
    logger = basicsr.utils.get_root_logger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel('INFO')
    try:
        run(options(workplace), compare=True)
        recorded = outcome()
        report = read_json(workplace / 'results' / 'tiny')
        basicsr.test.test_pipeline(str(workplace))
        alone = outcome()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert alone == recorded
    assert recorded[0] == [
        f'# {name}: {found["metrics"][name]:.4f}' for found in report['datasets'] for name in METRICS
    ]
    assert len(recorded[1]) == 3


def test_a_failing_run_restores_basicsr_and_keeps_finished_data_sets(workplace: Path, run: Run) -> None:
    (workplace / 'Things' / 'LR' / 'rocket.png').write_bytes(b'no image')
    SlowModel.made.clear()
    with pytest.raises(AttributeError):  # what BasicSR makes of it
        run(options(workplace, model_type='SlowModel'))
    assert basicsr.test.build_model is basicsr.models.build_model
    assert basicsr.metrics.calculate_metric is basicsr.models.sr_model.calculate_metric
    assert not hasattr(basicsr.metrics.calculate_metric, '__wrapped__')
    (model,) = SlowModel.made
    assert not {'validation', 'feed_data', 'test', 'get_current_visuals'} & set(vars(model))
    report = read_json(workplace / 'results' / 'tiny')
    assert [found['name'] for found in report['datasets']] == ['Animals']
    assert 'all_images' not in report


def test_another_model_type_is_timed_and_measured(workplace: Path, run: Run) -> None:
    results = run(options(workplace, model_type='SlowModel'))
    images = [image for data_set in results.sets for image in data_set.images]
    assert [set(image.metrics) for image in images] == [set(METRICS)] * 3
    assert all(image.seconds is not None and 0.02 <= image.seconds < 2 for image in images)


def test_without_hr_the_table_has_seconds_and_the_pictures_two_panels(workplace: Path, run: Run) -> None:
    single = {
        'name': 'New',
        'type': 'SingleImageDataset',
        'dataroot_lq': str(workplace / 'Things' / 'LR'),
        'io_backend': {'type': 'disk'},
    }
    opt = options(workplace, datasets={'test': single}, val={'save_img': False, 'suffix': None})
    results = run(opt, compare=True)
    header = '| data set | images | seconds an image |'
    assert header in results.markdown()
    (found,) = results.as_dict()['datasets']
    assert (found['images'], found['metrics']) == (2, {})
    assert f'| New | 2 | {found["seconds"]["median"]:.3f} |' in results.markdown()
    for name in PHOTOGRAPHS['Things']:
        picture = read(workplace / 'results' / 'tiny' / 'comparison' / 'New' / f'{name}.png')
        assert 2 * 240 < picture.shape[1] < 3 * 240


def test_a_metric_without_reference_is_compared_too(workplace: Path, run: Run) -> None:
    """NIQE needs no HR image; lower is better, and it is no gain in decibels."""
    large = workplace / 'Large'
    large.mkdir()
    cv2.imwrite(str(large / 'astronaut.png'), skimage.data.astronaut()[:128, 160:288, ::-1])
    single = {
        'name': 'Large',
        'type': 'SingleImageDataset',
        'dataroot_lq': str(large),
        'io_backend': {'type': 'disk'},
    }
    metrics = {'niqe': {'type': 'calculate_niqe', 'crop_border': 0, 'better': 'lower'}}
    results = run(options(workplace, datasets={'test': single}, val={'save_img': False, 'metrics': metrics}))
    (image,) = results.sets[0].images
    enlarged = bicubic(read(large / 'astronaut.png'))
    assert image.bicubic['niqe'] == pytest.approx(basicsr.metrics.calculate_niqe(enlarged, crop_border=0), rel=1e-3)
    assert image.metrics['niqe'] != pytest.approx(image.bicubic['niqe'], rel=1e-3)
    assert '| data set | images | NIQE | bicubic NIQE | seconds an image |' in results.markdown()


def test_infinite_psnr_is_valid_json(workplace: Path, run: Run) -> None:
    """A network whose convolutions are zero copies each pixel; HR made the same way is met exactly."""
    network = SRVGGNetCompact(**NETWORK)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    torch.save({'params': network.state_dict()}, workplace / 'net.pth')
    for lr in workplace.glob('*/LR/*.png'):
        image = read(lr).repeat(SCALE, 0).repeat(SCALE, 1)
        cv2.imwrite(str(lr.parent.parent / 'HR' / lr.name), image)
    results = run(options(workplace), compare=True)
    report = read_json(workplace / 'results' / 'tiny')
    for found in report['datasets']:
        assert found['metrics']['psnr'] == found['gain']['psnr'] == found['per_image'][0]['metrics']['psnr'] == 'inf'
        assert np.isfinite(found['bicubic']['psnr'])
    assert results.as_dict()['datasets'][0]['metrics']['psnr'] == float('inf')
    assert '| Animals | 1 | inf | 1.0000 |' in results.markdown()


def test_comparison_pictures_lie_beside_the_results(workplace: Path, run: Run) -> None:
    run(options(workplace), compare=True)
    root = workplace / 'results' / 'tiny'
    found = {path.relative_to(root / 'comparison') for path in (root / 'comparison').rglob('*') if path.is_file()}
    assert found == {Path(data_set) / f'{name}.png' for data_set, images in PHOTOGRAPHS.items() for name in images}
    # chelsea's 120 pixels are shown as 240: its three panels, from left to right.
    picture = read(root / 'comparison' / 'Animals' / 'chelsea.png')
    hr = read(workplace / 'Animals' / 'HR' / 'chelsea.png')
    ours = read(root / 'visualization' / 'Animals' / 'chelsea_tiny.png')
    enlarged = bicubic(read(workplace / 'Animals' / 'LR' / 'chelsea.png'))
    places = []
    for image in (enlarged, ours, hr):
        shown = image.repeat(2, 0).repeat(2, 1)
        match = cv2.matchTemplate(picture, shown, cv2.TM_SQDIFF_NORMED)
        _, _, (x, y), _ = cv2.minMaxLoc(match)
        part = picture[y : y + shown.shape[0], x : x + shown.shape[1]]
        assert (part == shown).all(-1).mean() > 0.95, 'more than the frame differs'
        places.append(x)
    assert places == sorted(set(places))


def test_only_rank_zero_records_and_writes(workplace: Path, run: Run) -> None:
    torch.distributed.init_process_group('fake', rank=1, world_size=2, store=FakeStore())
    try:
        results = run(options(workplace, val={'save_img': False, 'metrics': METRICS}), compare=True)
    finally:
        torch.distributed.destroy_process_group()
    assert (results.sets, results.table()) == ([], '')
    assert not (workplace / 'results').exists()
