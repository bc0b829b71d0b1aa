"""A small data set, as LMDBs and as folders, and an option file that trains on it."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import attnsr  # noqa: F401  (makes basicsr importable)

TRAINING = """\
name: small
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 0

datasets:
  train:
    name: Crops
    type: PairedImageDataset
    dataroot_gt: {data}/hr.lmdb
    dataroot_lq: {data}/lr_x2.lmdb
    io_backend:
      type: lmdb
    gt_size: 32
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
  val:
    name: Whole
    type: PairedImageDataset
    dataroot_gt: {data}/hr
    dataroot_lq: {data}/lr_x2
    filename_tmpl: '{{}}x2'
    io_backend:
      type: disk

network_g:
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 4
  num_block: 1
  upscale: 2

train:
  total_iter: 40
  ema_decay: 0.9
  optim_g:
    type: Adam
    lr: 1e-3
    betas: [0.9, 0.99]
  scheduler:
    type: MultiStepLR
    milestones: [20, 30]
    gamma: 0.5
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0

val:
  val_freq: 20
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: true

logger:
  print_freq: 10
"""


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with four HR pictures (48x60) and their LR ones, as hr, hr.lmdb, lr_x2 (NAMEx2.png) and lr_x2.lmdb."""
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    root = tmp_path_factory.mktemp('data')
    for folder, suffix, size in (('hr', '', (60, 48)), ('lr_x2', 'x2', (30, 24))):
        (root / folder).mkdir()
        keys = [f'{number:04d}' for number in range(4)]
        for number, key in enumerate(keys):
            picture = np.full((*size[::-1], 3), 40 * number, np.uint8)
            assert cv2.imwrite(str(root / folder / f'{key}{suffix}.png'), picture)
        files = [f'{key}{suffix}.png' for key in keys]
        make_lmdb_from_imgs(str(root / folder), f'{root / folder}.lmdb', files, keys, map_size=1 << 20)
    return root


@pytest.fixture
def training(data: Path) -> str:
    """Text of an option file that trains, without a fault."""
    return TRAINING.format(data=data)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a text as an option file and returns its path."""

    def write_file(text: str, name: str = 'options.yml') -> str:
        file = tmp_path / name
        file.write_text(text)
        return str(file)

    return write_file
