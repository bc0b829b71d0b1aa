"""Every misspelt key and impossible value is one line, and what BasicSR can use passes."""

import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.models import lr_scheduler
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY

from attnsr import options
from attnsr.data_prep.lmdb_dataset import write_lmdb
from attnsr.options import schema, signatures


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)


def parse(text: str) -> OrderedDict[str, Any]:
    with tempfile.NamedTemporaryFile('w', suffix='.yml') as file:
        file.write(text)
        file.flush()
        return options.load(file.name)


def check(text: str, launcher: str = 'none') -> list[str]:
    """Problems of training with a text as the file F."""
    return options.check(parse(text), 'F', is_train=True, launcher=launcher)


def test_a_good_file_has_no_problems(training: str) -> None:
    assert check(training) == []


# fmt: off
BAD = {
    'misspelt network key': ('num_feat: 4', 'num_feet: 4', [
        'F: network_g.num_feet: is not an option of EDSR; did you mean num_feat?']),
    'network key like no other': ('num_feat: 4', 'zzz: 4', [
        'F: network_g.zzz: is not an option of EDSR; valid are: num_in_ch, num_out_ch, num_feat, num_block, upscale, '
        'res_scale, img_range, rgb_mean']),
    'missing network key': ('  num_in_ch: 3\n', '', [
        'F: network_g.num_in_ch: is missing, and EDSR has no default for it']),
    'wrong type in the network': ('num_feat: 4', 'num_feat: four', [
        "F: network_g.num_feat: is the text 'four'; it must be of the kind of its default, 64"]),
    'number for a list': ('num_feat: 4', 'rgb_mean: 0.5', [
        'F: network_g.rgb_mean: is 0.5; it must be of the kind of its default, [0.4488, 0.4371, 0.404]']),
    'network of another scale': ('upscale: 2', 'upscale: 3', [
        'F: network_g.upscale: is 3, and scale is 2; both must be the same']),
    "network's default of another scale": ('  upscale: 2\n', '', [
        'F: network_g.upscale: is 4, the default of EDSR, and scale is 2; both must be the same']),
    'misspelt top-level key': ('manual_seed', 'manual_sead', [
        'F: manual_sead: is not an option; did you mean manual_seed?']),
    'misspelt required key': ('model_type', 'modeltype', [
        'F: modeltype: is not an option; did you mean model_type?']),
    'key of the command line': ('manual_seed: 0', 'auto_resume: true', [
        'F: auto_resume: is not an option; it is given on the command line: --auto_resume']),
    'misspelt train key': ('total_iter', 'totl_iter', [
        'F: train.totl_iter: is not an option; did you mean total_iter?']),
    'misspelt loss key': ('loss_weight', 'loss_wait', [
        'F: train.pixel_opt.loss_wait: is not an option of L1Loss; did you mean loss_weight?']),
    'misspelt section': ('train:\n  total', 'trian:\n  total', [
        'F: trian: is not an option; did you mean train?']),
    'misspelt val key': ('val_freq: 20', 'val_frequency: 20', [
        'F: val.val_frequency: is not an option; did you mean val_freq?']),
    'misspelt metric key': ('test_y_channel', 'test_y_chanel', [
        'F: val.metrics.psnr.test_y_chanel: is not an option of calculate_psnr; did you mean test_y_channel?']),
    'unknown metric': ('calculate_psnr', 'calculate_pnsr', [
        'F: val.metrics.psnr.type: no metric is registered as calculate_pnsr; did you mean calculate_psnr or '
        'calculate_psnr_pt or calculate_ssim?']),
    'metric of tensors': ('calculate_psnr', 'calculate_psnr_pt', [
        'F: val.metrics.psnr.type: calculate_psnr_pt works on tensors, and the model gives arrays; '
        'name calculate_psnr']),
    'missing metric key': ('      crop_border: 2\n', '', [
        'F: val.metrics.psnr.crop_border: is missing, and calculate_psnr has no default for it']),
    'wrong better': ('crop_border: 2', 'crop_border: 2\n      better: more', [
        "F: val.metrics.psnr.better: is the text 'more'; it must be higher or lower"]),
    'misspelt data set key': ('gt_size: 32', 'gtsize: 32', [
        'F: datasets.train.gtsize: is not an option; did you mean gt_size?']),
    'unknown data set': ('type: PairedImageDataset', 'type: PairedDataset', [
        'F: datasets.train.type: no data set is registered as PairedDataset; did you mean PairedImageDataset or '
        'REDSDataset or RealESRGANPairedDataset?']),
    'misspelt phase': ('  val:\n    name', '  valid:\n    name', [
        'F: datasets.valid: is not a data set for training; valid are: train, val and val_*']),
    'test set in training': ('  val:\n    name', '  test_1:\n    name', [
        'F: datasets.test_1: is not a data set for training; valid are: train, val and val_*']),
    'misspelt back end': ('type: lmdb', 'type: lmbd', [
        "F: datasets.train.io_backend.type: is the text 'lmbd'; did you mean lmdb?"]),
    'misspelt back end key': ('type: lmdb', 'type: lmdb\n      readahed: true', [
        'F: datasets.train.io_backend.readahed: is not an option; did you mean readahead?']),
    'wrong number': ('total_iter: 40', 'total_iter: 40.5', [
        'F: train.total_iter: is 40.5; it must be a whole number of at least 1']),
    'number as text': ('batch_size_per_gpu: 2', "batch_size_per_gpu: '2'", [
        "F: datasets.train.batch_size_per_gpu: is the text '2'; it must be a whole number of at least 1"]),
    'bool as number': ('scale: 2', 'scale: true', [
        'F: scale: is true; it must be a whole number of at least 1']),
    'section that is none': ('val:\n  val_freq: 20\n', 'val: 20\nlogger_:\n', [
        'F: logger_: is not an option; did you mean logger?',
        'F: val: is 20; it must be a section (lines of key: value below it), or ~ for none']),
    'decay of 1': ('ema_decay: 0.9', 'ema_decay: 1', [
        'F: train.ema_decay: is 1; it must be a number from 0 to below 1']),
    'name of two folders': ('name: small', 'name: a/b', [
        "F: name: is the text 'a/b'; it must be text that can name a folder (no /)"]),
    'wrong seed': ('manual_seed: 0', 'manual_seed: -1', [
        'F: manual_seed: is -1; it must be a whole number from 0 to 4294967295, or ~ for none']),
    'unknown model': ('SRModel', 'SRModle', [
        'F: model_type: no model is registered as SRModle; did you mean SRModel or SRGANModel or SwinIRModel?']),
    'SwinIRModel without its window': ('SRModel', 'SwinIRModel', [
        'F: network_g.window_size: is missing; SwinIRModel pads pictures to a multiple of it']),
    'GPU that is not there': ('num_gpu: 0', 'num_gpu: 2', [
        'F: num_gpu: is 2, and PyTorch sees none on this machine; write 0 or auto']),
    'cuda without a GPU': ('gt_size: 32', 'gt_size: 32\n    prefetch_mode: cuda', [
        'F: datasets.train.pin_memory: must be true with prefetch_mode: cuda',
        'F: datasets.train.prefetch_mode: is cuda, and no GPU is used; write cpu or ~']),
    'workers that persist and are none': ('gt_size: 32', 'gt_size: 32\n    persistent_workers: true', [
        'F: datasets.train.persistent_workers: is true, and it has num_worker_per_gpu: 0; leave it out']),
    'mean without std': ('gt_size: 32', 'gt_size: 32\n    mean: [0.5, 0.5, 0.5]', [
        'F: datasets.train: has only one of mean and std; give both or none']),
    'patch that the scale does not divide': ('gt_size: 32', 'gt_size: 33', [
        'F: datasets.train.gt_size: is 33, not a multiple of scale 2; 32 would be']),
    'patch larger than a picture': ('gt_size: 32', 'gt_size: 50', [
        'F: datasets.train.gt_size: is 50, a patch of 25 LR pixels, and picture 0000 has a side of 24; '
        'at most 48, or leave small pictures out']),
    'epoch shorter than a batch': ('batch_size_per_gpu: 2', 'batch_size_per_gpu: 9', [
        'F: datasets.train.dataset_enlarge_ratio: is 1, and an epoch of 4 pictures x 1 is shorter than a batch of 9, '
        'so nothing would be trained; at least 3, or a smaller batch']),
    'missing LMDB': ('hr.lmdb', 'hr_train.lmdb', [
        'F: datasets.train.dataroot_gt: {data}/hr_train.lmdb does not exist; of its path, {data} does: '
        'did you mean hr.lmdb or lr_x2.lmdb there?']),
    'missing folders': ('{data}/lr_x2\n', '{data}/none/of/it\n', [
        'F: datasets.val.dataroot_lq: {data}/none/of/it does not exist; of its path, {data} does: '
        'there is no none in it']),
    'folder read as LMDB': ('lr_x2.lmdb', 'lr_x2', [
        'F: datasets.train.dataroot_lq: {data}/lr_x2 does not end in .lmdb, as LMDBs do; write io_backend.type: disk '
        'for a folder of pictures']),
    'LMDB read as folder': ('{data}/lr_x2\n', '{data}/lr_x2.lmdb\n', [
        'F: datasets.val.dataroot_lq: {data}/lr_x2.lmdb is an LMDB; write io_backend.type: lmdb']),
    'wrong template': ("'{}x2'", "'{}x4'", [
        "F: datasets.val.dataroot_lq: {data}/lr_x2 lacks 4 of 4 pictures by dataroot_gt and filename_tmpl '{}x4', "
        "as '0000x4.png'"]),
    'template without a name': ("'{}x2'", 'x2', [
        "F: datasets.val.filename_tmpl: is the text 'x2'; it must be text with one {} for the name of the HR picture, "
        "as '{}x4'"]),
    'unknown loss': ('L1Loss', 'L1Los', [
        'F: train.pixel_opt.type: no loss is registered as L1Los; did you mean L1Loss?']),
    'loss with a wrong value': ('loss_weight: 1.0', 'reduction: avg', [
        "F: train.pixel_opt: Unsupported reduction mode: avg. Supported ones are: ['none', 'mean', 'sum']"]),
    'loss that is not one number': ('loss_weight: 1.0', 'reduction: none', [
        'F: train.pixel_opt.reduction: is none, and training needs one number; write mean or sum']),
    'perceptual loss for pixels': ('L1Loss\n    loss_weight: 1.0', 'PerceptualLoss\n    layer_weights: {conv5_4: 1}', [
        'F: train.pixel_opt: PerceptualLoss gives two values, of content and of style; write it below perceptual_opt']),
    'no such layer': (
        'pixel_opt:\n    type: L1Loss\n    loss_weight: 1.0',
        'perceptual_opt:\n    type: PerceptualLoss\n    layer_weights: {conv5_9: 1}', [
        'F: train.perceptual_opt.layer_weights.conv5_9: is not a layer of vgg19; '
        'did you mean conv5_4 or conv5_3 or conv5_2?']),
    'unknown optimizer': ('Adam\n', 'Adaam\n', [
        'F: train.optim_g.type: torch.optim has no Adaam; did you mean Adam or RAdam or NAdam?']),
    'optimizer that cannot work': ('Adam\n', 'SparseAdam\n', [
        'F: train.optim_g.type: SparseAdam needs sparse gradients; valid are: ']),
    'misspelt optimizer key': ('betas', 'beta', [
        'F: train.optim_g.beta: is not an option of Adam; did you mean betas?']),
    'number of betas': ('[0.9, 0.99]', '[0.9]', [
        'F: train.optim_g.betas: is [0.9]; it must be a list of 2: a number, a number']),
    'value that the optimizer refuses': ('[0.9, 0.99]', '[0.9, 1.5]', [
        'F: train.optim_g: Invalid beta parameter at index 1: 1.5']),
    'no learning rate': ('    lr: 1e-3\n', '', [
        'F: train.optim_g.lr: is missing; it must be a number above 0 (learning rate)']),
    'learning rate as text': ('1e-3', "'1e-3'", [
        "F: train.optim_g.lr: is the text '1e-3'; it must be a number above 0"]),
    'unknown schedule': ('MultiStepLR', 'StepLR', [
        'F: train.scheduler.type: there is no schedule StepLR; did you mean MultiStepLR?']),
    'misspelt schedule key': ('gamma', 'gama', [
        'F: train.scheduler.gama: is not an option; did you mean gamma?']),
    'milestones out of order': ('[20, 30]', '[30, 20]', [
        'F: train.scheduler.milestones: is [30, 20]; it must be a list of whole numbers of at least 1, '
        'in ascending order']),
    'restarts without weights': ('gamma: 0.5', 'restarts: [0, 10]', [
        'F: train.scheduler.restart_weights: has 1 and restarts has 2 values; each of restarts needs a weight '
        '(1 if left out)']),
    'schedule that ends early': ('type: MultiStepLR\n    milestones: [20, 30]\n    gamma: 0.5',
        'type: CosineAnnealingRestartLR\n    periods: [30, 8]\n    restart_weights: [1, 1]', [
        'F: train.scheduler.periods: end after 38 iterations, before total_iter 40; add to them']),
    'no loss': ('  pixel_opt:\n    type: L1Loss\n    loss_weight: 1.0\n', '', [
        'F: train.pixel_opt: is missing, and so is perceptual_opt; valid are: ']),
    'missing weights': ('logger:', 'path:\n  pretrain_network_g: {data}/net_g.pth\nlogger:', [
        'F: path.pretrain_network_g: {data}/net_g.pth does not exist; of its path, {data} does: '
        'there is no net_g.pth in it']),
    'folder that BasicSR sets': ('logger:', 'path:\n  experiment_root: out\nlogger:', [
        'F: path.experiment_root: is not an option; did you mean experiments_root?']),
    'network that is not there': ('logger:', 'path:\n  ignore_resume_networks: [network_d]\nlogger:', [
        'F: path.ignore_resume_networks: there is no section network_d; did you mean network_g?']),
}
# fmt: on


@pytest.mark.parametrize(('old', 'new', 'lines'), list(BAD.values()), ids=list(BAD))
def test_bad_files(old: str, new: str, lines: list[str], training: str, data: Path) -> None:
    def fill(text: str) -> str:
        return text.replace('{data}', str(data))

    assert fill(old) in training
    found = check(training.replace(fill(old), fill(new), 1))
    # A line that ends in a list of names ("valid are: ") is compared up to there: the list grows with attnsr.
    expected = [fill(line) for line in lines]
    assert len(found) == len(expected)
    for line, want in zip(found, expected, strict=True):
        if want.endswith('valid are: '):
            assert line.startswith(want)
        else:
            assert line.split(' (of attnsr')[0] == want


def test_unknown_network_names_near_ones_and_attnsrs(training: str) -> None:
    (line,) = check(training.replace('type: EDSR', 'type: EDRS'))
    assert line.startswith('F: network_g.type: no network is registered as EDRS; did you mean ')
    assert 'EDSR' in line.split('(of attnsr: ')[0]
    assert 'ELAN' in line.split('(of attnsr: ')[1]


def test_all_problems_are_reported_at_once(training: str) -> None:
    text = training.replace('num_feat', 'num_feet').replace('L1Loss', 'L9Loss').replace('gt_size: 32', 'gt_size: 33')
    keys = [line.split(': ')[1] for line in check(text)]
    assert keys == ['datasets.train.gt_size', 'network_g.num_feet', 'train.pixel_opt.type']


def test_training_on_a_test_file(training: str) -> None:
    opt = parse(training)
    del opt['train']
    assert options.check(opt, 'F', is_train=True) == [
        'F: train: is missing, so this file is for testing: `basicsr test -opt FILE`; or add the section'
    ]


def test_an_empty_file_lists_what_is_required() -> None:
    lines = options.check({'model_type': 'SRModel'}, 'F', is_train=True)
    assert [line.split(': ')[1] for line in lines] == [
        'name', 'scale', 'datasets', 'network_g', 'train', 'datasets.train'
    ]  # fmt: skip


def paths(section: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


@pytest.mark.parametrize(
    'value', [None, [], [None], {}, {'type': []}, '', 'x', -1, 0, 1.5, float('nan'), True], ids=repr
)
def test_no_value_crashes_the_check(value: object, data: Path) -> None:
    text = BASICSR_SWINIR.format(data=data)
    for path in paths(parse(text)):
        opt = parse(text)
        section: Any = opt
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        for is_train in (True, False):
            for line in options.check(opt, 'F', is_train):
                assert re.match(r'F: [\w.]+: .', line)


# Pictures ------------------------------------------------------------------------------------------------------------


def test_data_set_of_another_scale(training: str, data: Path) -> None:
    text = training.replace('scale: 2', 'scale: 4').replace('upscale: 2', 'upscale: 4')
    assert check(text) == [
        'F: datasets.train: the data set is x2, the option file says scale 4 '
        '(picture 0000: HR 60x48, LR 30x24); one must change',
        'F: datasets.val: the data set is x2, the option file says scale 4 '
        '(picture 0000.png: HR 60x48, LR 30x24); one must change',
    ]


def pictures(folder: Path, size: tuple[int, int], names: tuple[str, ...] = ('a',), extension: str = 'png') -> None:
    folder.mkdir()
    for name in names:
        assert cv2.imwrite(str(folder / f'{name}.{extension}'), np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize(
    ('hr', 'lr', 'words'),
    [
        ((41, 31), (20, 15), ''),  # BasicSR cuts the last row and column of HR
        ((39, 30), (20, 15), 'HR is not 2 times LR (picture a.png: HR 30x39, LR 15x20); cut HR to a multiple of 2'),
        ((60, 45), (20, 15), 'the data set is x3, the option file says scale 2 (picture a.png: HR 45x60, LR 15x20)'),
    ],
    ids=['cut', 'too small', 'x3'],
)
def test_sizes_in_validation(
    hr: tuple[int, int], lr: tuple[int, int], words: str, training: str, tmp_path: Path
) -> None:
    pictures(tmp_path / 'hr', hr)
    pictures(tmp_path / 'lr', lr)
    opt = parse(training)
    opt['datasets']['val'] = {
        'name': 'a',
        'type': 'PairedImageDataset',
        'dataroot_gt': str(tmp_path / 'hr'),
        'dataroot_lq': str(tmp_path / 'lr'),
    }
    lines = options.check(opt, 'F', is_train=True)
    assert [line[: len(words) + 17] for line in lines] == ([f'F: datasets.val: {words}'] if words else [])


def test_training_pictures_must_match_exactly(training: str, tmp_path: Path) -> None:
    pictures(tmp_path / 'hr', (81, 61), ('a', 'b', 'c', 'd'))
    pictures(tmp_path / 'lr', (40, 30), ('a', 'b', 'c', 'd'))
    opt = parse(training)
    opt['datasets']['train'].update(
        dataroot_gt=str(tmp_path / 'hr'), dataroot_lq=str(tmp_path / 'lr'), io_backend={'type': 'disk'}
    )
    assert options.check(opt, 'F', is_train=True) == [
        'F: datasets.train: HR is not 2 times LR (picture a.png: HR 61x81, LR 30x40, and 3 more); '
        'cut HR to a multiple of 2, then make LR of it'
    ]
    (tmp_path / 'lr' / 'd.png').rename(tmp_path / 'lr' / 'e.png')
    (line,) = options.check(opt, 'F', is_train=True)
    assert line.startswith(f'F: datasets.train.dataroot_lq: {tmp_path}/lr lacks 1 of 4 pictures by dataroot_gt')
    (tmp_path / 'lr' / 'e.png').unlink()
    assert options.check(opt, 'F', is_train=True) == [
        'F: datasets.train: dataroot_gt has 4 files and dataroot_lq has 3; each needs its partner'
    ]
    (tmp_path / 'list.txt').write_text('a.png (81,61,3)\nb.png (81,61,3)\nx.png (81,61,3)\n')
    opt['datasets']['train']['meta_info_file'] = str(tmp_path / 'list.txt')
    (line,) = options.check(opt, 'F', is_train=True)
    assert line.startswith(f'F: datasets.train.dataroot_gt: {tmp_path}/hr lacks 1 of 3 pictures by meta_info_file')
    for folder in ('hr', 'lr'):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
    del opt['datasets']['train']['meta_info_file']
    assert options.check(opt, 'F', is_train=True) == [
        f'F: datasets.train: has no pictures; {tmp_path}/hr and {tmp_path}/lr must hold some'
    ]


def test_photographs_are_turned_upright_as_opencv_does(training: str, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / 'hr').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 40)).save(tmp_path / 'hr' / 'a.jpg', exif=exif)
    read = cv2.imread(str(tmp_path / 'hr' / 'a.jpg'))
    assert read is not None
    assert read.shape == (60, 40, 3)
    pictures(tmp_path / 'lr', (30, 20), extension='jpg')
    opt = parse(training)
    opt['datasets']['val'].update(
        dataroot_gt=str(tmp_path / 'hr'), dataroot_lq=str(tmp_path / 'lr'), filename_tmpl='{}'
    )
    assert options.check(opt, 'F', is_train=True) == []


def test_broken_lmdbs(training: str, data: Path, tmp_path: Path) -> None:
    other = tmp_path / 'lr.lmdb'
    other.mkdir()
    text = training.replace(f'{data}/lr_x2.lmdb', str(other))
    assert check(text) == [
        f'F: datasets.train.dataroot_lq: {other} has no data.mdb and no meta_info.txt; '
        'it is not a whole LMDB, make it again'
    ]
    again = 'it is not a whole LMDB, make it again'
    other.rmdir()
    write_lmdb(other, {key: np.zeros((24, 30, 3), np.uint8) for key in ('0000', '0007')})
    assert check(text) == [
        'F: datasets.train: its LMDBs have different keys: 3 are only in dataroot_gt and 1 only in dataroot_lq '
        '(as 0001); make both from the same pictures'
    ]
    (other / 'meta_info.txt').write_text('0000.png (24,30,3) 1\n')
    assert check(text) == [
        f'F: datasets.train.dataroot_lq: {other} has 2 entries, and its meta_info.txt names 1; {again}'
    ]
    size = (other / 'data.mdb').stat().st_size
    os.truncate(other / 'data.mdb', size - 4096)
    assert check(text) == [
        f'F: datasets.train.dataroot_lq: {other}/data.mdb has {size - 4096} bytes of {size}; {again}'
    ]
    os.truncate(other / 'data.mdb', 0)
    (line,) = check(text)
    assert line.startswith(f'F: datasets.train.dataroot_lq: {other}/data.mdb cannot be opened (')
    assert line.endswith(f'; {again}')


def test_torn_weights_are_told_before_anything_is_made(training: str, tmp_path: Path) -> None:
    weights = tmp_path / 'net_g.pth'
    torch.save({'params': {'a': torch.zeros(1000)}}, weights)
    text = f'{training}path:\n  pretrain_network_g: {weights}\n'
    assert check(text) == []
    os.truncate(weights, 3000)
    (line,) = check(text)
    assert line.startswith(f'F: path.pretrain_network_g: {weights}: this file is torn')


def test_processes_share_the_pictures(training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert check(training) == []
    assert check(training, launcher='pytorch') == [
        'F: datasets.train.dataset_enlarge_ratio: is 1, and an epoch of 4 pictures x 1 is shorter than a batch of 2 '
        'in each of 4 processes, so nothing would be trained; at least 2, or a smaller batch'
    ]


# What passes ---------------------------------------------------------------------------------------------------------

BASICSR_SWINIR = """\
name: train_SwinIR_SRx2
model_type: SwinIRModel
scale: 2
num_gpu: auto
manual_seed: 0
find_unused_parameters: false
datasets:
  train:
    name: DIV2K
    type: PairedImageDataset
    dataroot_gt: {data}/hr.lmdb
    dataroot_lq: {data}/lr_x2.lmdb
    meta_info_file: basicsr/data/meta_info/meta_info_DIV2K800sub_GT.txt
    filename_tmpl: '{{}}'
    io_backend:
      type: lmdb
    gt_size: 48
    use_hflip: true
    use_rot: true
    use_shuffle: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: 4
    dataset_enlarge_ratio: 1
    prefetch_mode: ~
  val_1:
    name: Set5
    type: PairedImageDataset
    dataroot_gt: {data}/hr.lmdb
    dataroot_lq: {data}/lr_x2.lmdb
    io_backend:
      type: lmdb
network_g:
  type: SwinIR
  upscale: 2
  in_chans: 3
  img_size: 24
  window_size: 8
  img_range: 1.
  depths: [6, 6]
  embed_dim: 24
  num_heads: [6, 6]
  mlp_ratio: 2
  upsampler: 'pixelshuffle'
  resi_connection: '1conv'
path:
  pretrain_network_g: ~
  param_key_g: params_ema
  strict_load_g: true
  resume_state: ~
train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float 2e-4
    weight_decay: 0
    betas: [0.9, 0.99]
  scheduler:
    type: CosineAnnealingRestartLR
    periods: [250000, 250000]
    restart_weights: [1, 1]
    eta_min: !!float 1e-7
  total_iter: !!float 5e5
  warmup_iter: -1
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
val:
  val_freq: !!float 5e3
  save_img: false
  pbar: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: false
      better: higher
    niqe:
      type: calculate_niqe
      crop_border: 2
      better: lower
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~
dist_params:
  backend: nccl
  port: 29500
"""


def test_files_as_basicsr_has_them_pass(data: Path) -> None:
    text = BASICSR_SWINIR.format(data=data)
    assert check(text) == []
    gan = (
        text.replace('SwinIRModel', 'ESRGANModel')
        .replace(
            'train:\n  ema', 'network_d:\n  type: UNetDiscriminatorSN\n  num_in_ch: 3\ntrain:\n  net_d_iters: 1\n  ema'
        )
        .replace(
            '  pixel_opt',
            '  gan_opt:\n    type: GANLoss\n    gan_type: vanilla\n    loss_weight: !!float 5e-3\n  pixel_opt',
        )
    )
    assert check(gan) == []
    assert check(gan.replace('vanilla', 'plain')) == ['F: train.gan_opt: GAN type plain is not implemented.']
    assert check(gan.replace('UNetDiscriminatorSN', 'UNetDiscriminator'))[0].startswith(
        'F: network_d.type: no network is registered as UNetDiscriminator; did you mean UNetDiscriminatorSN'
    )


def test_swinir_swallows_unknown_names_and_we_do_not(data: Path) -> None:
    text = BASICSR_SWINIR.format(data=data).replace('window_size: 8', 'window_size: 8\n  windo_size: 8')
    (line,) = check(text)
    assert line.startswith('F: network_g.windo_size: is not an option of SwinIR; did you mean ')


def test_test_files(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / 'net_g.pth'
    torch.save({}, weights)
    opt = parse(
        f"""
name: test
model_type: SRModel
scale: 2
num_gpu: 0
datasets:
  test_1: {{name: A, type: PairedImageDataset, dataroot_gt: {data}/hr.lmdb, dataroot_lq: {data}/lr_x2.lmdb}}
  test_2: {{name: B, type: SingleImageDataset, dataroot_lq: {data}/lr_x2, io_backend: {{type: disk}}}}
  val: {{name: C, type: SingleImageDataset, dataroot_lq: {data}/lr_x2.lmdb}}
network_g: {{type: EDSR, num_in_ch: 3, num_out_ch: 3, upscale: 2}}
path: {{pretrain_network_g: {weights}, strict_load_g: true}}
val: {{save_img: true, suffix: ~}}
"""
    )
    assert options.check(opt, 'F', is_train=False) == []
    opt['val']['metrics'] = {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}
    opt['datasets']['train'] = dict(opt['datasets']['test_1'], gt_size=32, batch_size_per_gpu=1, num_worker_per_gpu=0)
    assert options.check(opt, 'F', is_train=False) == [
        'F: datasets.train: is not a data set for testing; valid are: val, val_*, test and test_*',
        'F: val.metrics.psnr: calculate_psnr compares with HR pictures, and datasets.test_2 has none; leave one out',
        'F: val.metrics.psnr: calculate_psnr compares with HR pictures, and datasets.val has none; leave one out',
    ]


def test_models_and_losses_of_users_may_have_keys_of_their_own(training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class MyModel(SRModel):
        def setup_schedulers(self) -> None:
            """Reads a schedule of its own."""

    class MyLoss(torch.nn.L1Loss):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)  # type: ignore[arg-type]

    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'MyModel', MyModel)
    monkeypatch.setitem(LOSS_REGISTRY._obj_map, 'MyLoss', MyLoss)
    text = (
        training.replace('SRModel', 'MyModel')
        .replace(
            'train:\n  total', 'mine: 1\ntrain:\n  other: 2\n  fft_opt: {type: MyLoss, size_average: true}\n  total'
        )
        .replace('MultiStepLR', 'OneCycle')
        .replace('type: L1Loss\n    loss_weight: 1.0', 'type: MyLoss')
    )
    assert check(text) == []
    assert check(text.replace('total_iter: 40', 'total_iter: many')) == [
        "F: train.total_iter: is the text 'many'; it must be a whole number of at least 1"
    ]


def test_constructors_of_attnsr_are_asked(training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(torch.nn.Module):
        def __init__(
            self,
            *,
            upscale: int,
            sizes: list[int] | tuple[int, int] = (4, 8),
            rate: float | None = None,
            bias: bool = True,
        ) -> None:
            super().__init__()
            if sizes[0] % 4:
                raise ValueError(f'sizes must be multiples of 4, not {sizes}')
            self.weight = torch.nn.Parameter(torch.empty(1 << 50))  # too large but on the meta device

    Net.__module__ = 'attnsr.archs.net_arch'
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Net', Net)
    opt = parse(training)

    def lines(**network: object) -> list[str]:
        opt['network_g'] = {'type': 'Net', **network}
        return options.check(opt, 'F', is_train=True)

    assert lines(upscale=2, sizes=[8, 8], rate=1, bias=False) == []
    assert lines(upscale=2, sizes=[6, 8]) == ['F: network_g: sizes must be multiples of 4, not [6, 8]']
    assert lines(upscale='2', sizes=8, rate='x', bias=1) == [
        "F: network_g.upscale: is the text '2'; it must be a whole number",
        'F: network_g.sizes: is 8; it must be a list, each a whole number or a list of 2: '
        'a whole number, a whole number',
        "F: network_g.rate: is the text 'x'; it must be a number or ~",
        'F: network_g.bias: is 1; it must be true or false',
    ]
    assert lines() == ['F: network_g.upscale: is missing, and Net has no default for it; it must be a whole number']


def test_every_optimizer_that_is_not_refused_works() -> None:
    for name, each in vars(torch.optim).items():
        if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer:
            weight = torch.nn.Parameter(torch.ones(2, 2, 3, 3))

            def step(each: type = each, weight: torch.nn.Parameter = weight) -> None:
                optimizer = each([weight], lr=1e-3)
                weight.sum().backward()
                optimizer.step()

            if name in schema.UNUSABLE_OPTIMIZERS:
                with pytest.raises((RuntimeError, TypeError, ValueError)):
                    step()
            else:
                step()


def test_tables_agree_with_basicsr() -> None:
    for name in ('MultiStepRestartLR', 'CosineAnnealingRestartLR'):
        known = set(signatures.parameters(getattr(lr_scheduler, name))) - {'optimizer', 'last_epoch'}
        assert set(schema.SCHEDULERS[name]) == known
