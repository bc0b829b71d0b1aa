"""Checkpoints and training states that are whole under their name, or not there."""

import inspect
import time
from pathlib import Path
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import nn

from attnsr.compat import resuming
from attnsr.compat.patches import patch, replace
from attnsr.files import write_atomically

# A file system that is away for a moment is worth waiting for.
TRIES = 3


@master_only
def _save_network(
    self: BaseModel,
    net: nn.Module | list[nn.Module],
    net_label: str,
    current_iter: int,
    param_key: str | list[str] = 'params',
) -> None:
    nets = net if isinstance(net, list) else [net]
    keys = param_key if isinstance(param_key, list) else [param_key]
    state = {
        key: {
            name.removeprefix('module.'): tensor.cpu()
            for name, tensor in self.get_bare_model(each).state_dict().items()
        }
        for key, each in zip(keys, nets, strict=True)
    }
    name = f'{net_label}_{"latest" if current_iter == -1 else current_iter}.pth'
    _save(state, Path(self.opt['path']['models'], name), must=current_iter == -1)


def _save_training_state(self: BaseModel, epoch: int, current_iter: int) -> None:
    if current_iter == -1:
        return
    state = {
        'epoch': epoch,
        'iter': current_iter,
        'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
        # On every rank: the random states of all are gathered.
        resuming.KEY: resuming.progress.state(),
    }
    if self.opt['rank'] == 0:
        _save(state, Path(self.opt['path']['training_states'], f'{current_iter}.state'), must=False)


def _save(state: dict[str, Any], path: Path, must: bool) -> None:
    """Save, or log why not and go on: a training must not end for a checkpoint, unless it is the last one."""
    logger = get_root_logger()
    for left in reversed(range(TRIES)):
        try:
            with write_atomically(path) as file:
                torch.save(state, file)
            return
        except (OSError, RuntimeError) as error:
            logger.warning(f'{path} cannot be saved: {error}; tries left: {left}')
            if not left and must:
                raise OSError(f'{path} cannot be saved: {error}. Earlier checkpoints are whole') from error
            time.sleep(1 if left else 0)
    logger.error(f'{path} is not saved. Training goes on; earlier checkpoints are whole.')


@patch(
    'saving',
    mends='checkpoints and states are written in place: a process killed meanwhile leaves a torn file under the '
    'final name',
    needed=lambda: 'os.replace' not in inspect.getsource(BaseModel.save_training_state),
)
def _patch_saving() -> None:
    replace(BaseModel, 'save_network', _save_network)
    replace(BaseModel, 'save_training_state', _save_training_state)
