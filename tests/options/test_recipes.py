"""The option files of the published recipes: nothing in them drifts, they build the published networks, and they train.

Every key of every file has its value from the tables here: one for all files, by the scale, or of the paper's recipe.
"""

import inspect
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import util
from basicsr.utils.registry import ARCH_REGISTRY
from published_figures import PARAMETERS

from attnsr import options
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.data_prep import sample
from attnsr.data_prep.lmdb_dataset import write_lmdb
from attnsr.data_prep.matlab_resize import imresize

FILES = [(variant, scale) for variant in PARAMETERS for scale in SCALES]


@dataclass(frozen=True)
class Recipe:
    """A published training: what of a file depends on the paper.

    Attributes:
        patch: Side of the LR patches.
        batch: Patches in an iteration, in all.
        epochs: How many there are, and after which the learning rate is halved.
        patches: In an epoch.
        ema: Decay of the averaged network.
        optimizer: Where it differs from ``Adam`` with ``betas: [0.9, 0.999]``.
        path: Where it differs from a start with new weights.
    """

    patch: int
    batch: int
    epochs: int
    halved: Sequence[int]
    patches: int
    lr: float
    ema: float = 0
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    path: Mapping[str, Any] = field(default_factory=dict)

    def options(self, scale: int) -> dict[str, Any]:
        iterations = self.patches // self.batch
        optimizer = {'type': 'Adam', 'lr': self.lr, 'weight_decay': 0, 'betas': [0.9, 0.999], **self.optimizer}
        return {
            'datasets.train.gt_size': self.patch * scale,
            'datasets.train.batch_size_per_gpu': self.batch,
            'train.ema_decay': self.ema,
            **{f'train.optim_g.{key}': value for key, value in optimizer.items()},
            'train.scheduler.milestones': [epoch * iterations for epoch in self.halved],
            'train.total_iter': self.epochs * iterations,
            **{'path.pretrain_network_g': None, 'path.strict_load_g': True, **self.path},
        }


ELAN = Recipe(48, 32, 1000, (250, 400, 450, 475, 500), 64_000, 2e-4)
ELAN_LIGHT = Recipe(64, 64, 1000, (250, 400, 450, 475, 500), 64_000, 2e-4)
# Published in iterations: epochs of a thousand here.
DLGSANET = Recipe(48, 16, 500, (250, 400, 450, 475), 16_000, 5e-4, 0.999, {'betas': [0.9, 0.99]})
ASID = Recipe(64, 16, 1000, (250, 500, 750), 51_200, 5e-4, 0, {'type': 'AdamW', 'weight_decay': 1e-4})
ASID_D8 = Recipe(64, 16, 1000, (250, 500, 750), 51_200, 4e-4, 0, {'type': 'AdamW', 'weight_decay': 1e-4})
LCOAN_X2 = Recipe(48, 16, 1500, (300, 600, 900, 1200), 16_000, 1e-4)
# Starts from the x2 network, of which only the upsampler does not fit.
FROM_X2 = {'path.pretrain_network_g': 'experiments/LCoAN_x2/models/net_g_latest.pth', 'path.strict_load_g': False}
LCOAN = Recipe(48, 16, 500, (100, 200, 300, 400), 16_000, 1e-4, path=FROM_X2)

RECIPES = {
    'elan': ELAN,
    'elan_light': ELAN_LIGHT,
    'dlgsanet': DLGSANET,
    'dlgsanet_light': DLGSANET,
    'dlgsanet_tiny': DLGSANET,
    'asid': ASID,
    'asid_d8': ASID_D8,
}

# The same in all files.
COMMON = {
    'model_type': 'SRModel',
    'num_gpu': 'auto',
    'manual_seed': 0,
    'datasets.train.name': 'DIV2K',
    'datasets.train.type': 'PairedImageDataset',
    'datasets.train.dataroot_gt': 'datasets/DIV2K/DIV2K_train_HR_sub.lmdb',
    'datasets.train.io_backend.type': 'lmdb',
    'datasets.train.use_hflip': True,
    'datasets.train.use_rot': True,
    'datasets.train.num_worker_per_gpu': 6,
    'datasets.train.dataset_enlarge_ratio': 10,
    'datasets.train.prefetch_mode': None,
    'datasets.val_1.name': 'Set5',
    'datasets.val_1.type': 'PairedImageDataset',
    'datasets.val_1.io_backend.type': 'lmdb',
    'datasets.val_2.name': 'Set14',
    'datasets.val_2.type': 'PairedImageDataset',
    'datasets.val_2.io_backend.type': 'lmdb',
    'path.resume_state': None,
    'train.scheduler.type': 'MultiStepLR',
    'train.scheduler.gamma': 0.5,
    'train.warmup_iter': -1,
    'train.pixel_opt.type': 'L1Loss',
    'train.pixel_opt.loss_weight': 1.0,
    'train.pixel_opt.reduction': 'mean',
    'val.val_freq': 5000,
    'val.save_img': False,
    'val.metrics.psnr.type': 'calculate_psnr',
    'val.metrics.psnr.test_y_channel': True,
    'val.metrics.psnr.better': 'higher',
    'val.metrics.ssim.type': 'calculate_ssim',
    'val.metrics.ssim.test_y_channel': True,
    'val.metrics.ssim.better': 'higher',
    'logger.print_freq': 100,
    'logger.save_checkpoint_freq': 5000,
    'logger.use_tb_logger': True,
    'logger.wandb.project': None,
    'logger.wandb.resume_id': None,
    'dist_params.backend': 'nccl',
    'dist_params.port': 29500,
}


def by_scale(scale: int) -> dict[str, Any]:
    return {
        'scale': scale,
        'datasets.train.dataroot_lq': f'datasets/DIV2K/DIV2K_train_LR_bicubic_X{scale}_sub.lmdb',
        'datasets.val_1.dataroot_gt': f'datasets/Set5/HR_x{scale}.lmdb',
        'datasets.val_1.dataroot_lq': f'datasets/Set5/LR_bicubic_x{scale}.lmdb',
        'datasets.val_2.dataroot_gt': f'datasets/Set14/HR_x{scale}.lmdb',
        'datasets.val_2.dataroot_lq': f'datasets/Set14/LR_bicubic_x{scale}.lmdb',
        'val.metrics.psnr.crop_border': scale,
        'val.metrics.ssim.crop_border': scale,
    }


def arguments(variant: str, scale: int) -> dict[str, Any]:
    """All arguments of a network's constructor, with their defaults where the variant has no other."""
    found = {
        name: parameter.default for name, parameter in inspect.signature(VARIANTS[variant].network).parameters.items()
    }
    if 'tlc_size' in found:
        found['tlc_size'] = {2: 96, 3: 72, 4: 48}[scale]  # what the default stands for
    found |= {'upscale': scale, **VARIANTS[variant].arguments}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def recipe(variant: str, scale: int) -> Recipe:
    return RECIPES.get(variant) or (LCOAN_X2 if scale == 2 else LCOAN)


def experiment_name(variant: str, scale: int) -> str:
    return f'{VARIANTS[variant].title.replace("-", "_")}_x{scale}'


def flat(section: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{key.key.key: value}."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return found


def test_every_variant_has_its_files() -> None:
    assert set(options.shipped()) - {'demo_x2'} == {f'{variant}_x{scale}' for variant, scale in FILES}
    assert set(VARIANTS) == set(PARAMETERS)


@pytest.mark.parametrize(('variant', 'scale'), FILES)
def test_every_value_is_that_of_the_tables(variant: str, scale: int) -> None:
    file = options.find(f'{variant}_x{scale}')
    network = {'type': VARIANTS[variant].network.__name__, **arguments(variant, scale)}
    expected = {
        'name': experiment_name(variant, scale),
        **COMMON,
        **by_scale(scale),
        **recipe(variant, scale).options(scale),
        **{f'network_g.{name}': value for name, value in network.items()},
    }
    found = flat(options.load(file))
    differences = [
        f'{key}: is {found.get(key, "missing")}, and the tables have {expected.get(key, "no such key")}'
        for key in sorted(found.keys() | expected.keys())
        if key not in found or key not in expected or found[key] != expected[key]
    ]
    assert not differences, '\n'.join(differences)
    title, paper = VARIANTS[variant].title, VARIANTS[variant].paper
    assert Path(file).read_text().startswith(f'# {title} x{scale}: the published recipe ({paper}), on DIV2K.\n')


@pytest.mark.parametrize(('variant', 'scale'), FILES)
def test_the_network_is_the_published_one(variant: str, scale: int) -> None:
    network = options.load(options.find(f'{variant}_x{scale}'))['network_g']
    with torch.device('meta'):
        net = ARCH_REGISTRY.get(network.pop('type'))(**network)
        published = VARIANTS[variant].build(scale)
    assert type(net) is type(published)
    assert {name: p.shape for name, p in net.state_dict().items()} == {
        name: p.shape for name, p in published.state_dict().items()
    }
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert trained == PARAMETERS[variant][SCALES.index(scale)]


# Two iterations of each, by the command line -----------------------------------------------------------------------

LR_PATCH = 12


@pytest.fixture(scope='module')
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[util.CommandLine]:
    """In a folder with the sample data set, and a corner of one of its photographs as a validation set."""
    folder = tmp_path_factory.mktemp('recipes')
    sample.build(folder / 'sample')
    corner = sample.photograph(sample.VALIDATION[0])[:24, :24]
    write_lmdb(folder / 'corner_HR.lmdb', {'corner': corner})
    for scale in SCALES:
        write_lmdb(folder / f'corner_LR_x{scale}.lmdb', {'corner': imresize(corner, Fraction(1, scale))})
    with util.CommandLine(folder) as command_line:
        yield command_line
    shutil.rmtree(folder)


def train(command_line: util.CommandLine, variant: str, scale: int) -> str:
    """Two iterations of a recipe with batches of one small patch, from the folder where the data lies."""
    overrides = {
        'num_gpu': 0,
        'datasets:train:dataroot_gt': 'sample/train_HR.lmdb',
        'datasets:train:dataroot_lq': f'sample/train_LR_x{scale}.lmdb',
        'datasets:train:gt_size': LR_PATCH * scale,
        'datasets:train:batch_size_per_gpu': 1,
        'datasets:train:num_worker_per_gpu': 0,
        'train:total_iter': 2,
        'logger:print_freq': 1,
        'logger:use_tb_logger': False,
    }
    for phase in ('val_1', 'val_2'):
        overrides |= {
            f'datasets:{phase}:dataroot_gt': 'corner_HR.lmdb',
            f'datasets:{phase}:dataroot_lq': f'corner_LR_x{scale}.lmdb',
        }
    forced = [f'{key}={value}' for key, value in overrides.items()]
    return command_line.run('train', '-opt', f'{variant}_x{scale}', '--force_yml', *forced)


# Each takes seconds: those of x2 and x3 wait for -m exhaustive.
@pytest.mark.parametrize(
    ('variant', 'scale'),
    [file if file[1] == 4 else pytest.param(*file, marks=pytest.mark.exhaustive) for file in FILES],
)
def test_two_iterations(variant: str, scale: int, command_line: util.CommandLine) -> None:
    pretrained = recipe(variant, scale).path.get('path.pretrain_network_g')
    if pretrained and not (command_line.folder / pretrained).exists():
        train(command_line, variant, 2)
    log = train(command_line, variant, scale)

    iterations = util.iterations(log)
    assert list(iterations) == [1, 2]
    for _, rates, losses in iterations.values():
        assert float(rates.strip('(),')) == recipe(variant, scale).lr
        assert math.isfinite(float(losses.removeprefix('l_pix: ')))
    metrics = re.findall(r'# (psnr|ssim): (\S+)', log)
    assert [name for name, _ in metrics] == ['psnr', 'ssim'] * 2
    assert all(math.isfinite(float(value)) for _, value in metrics)
    taken_over = re.findall(r'(\S+) is a checkpoint of .*: all but the upsampler \(\S+\) is loaded', log)
    assert taken_over == ([pretrained] if pretrained else [])

    experiment = command_line.folder / 'experiments' / experiment_name(variant, scale)
    trained = torch.load(experiment / 'models' / 'net_g_latest.pth', weights_only=True)
    assert set(trained) == ({'params', 'params_ema'} if recipe(variant, scale).ema else {'params'})
    net = VARIANTS[variant].build(scale)
    for weights in trained.values():
        net.load_state_dict(weights, strict=True)
    if (variant, scale) != ('lcoan', 2):  # from which x3 and x4 start
        shutil.rmtree(experiment)
