"""Networks within BasicSR's models: loading, averaging, optimizing."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from torch import nn

from attnsr.archs.arch_util import WRAPPERS, SRNetwork, unwrap_state_dict, wrapper_of
from attnsr.checkpoints import CheckpointError, read
from attnsr.compat.patches import fails, patch, replace


def _load_network(
    self: BaseModel, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
) -> None:
    net = self.get_bare_model(net)
    logger = get_root_logger()
    checkpoint = read(load_path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{load_path}: this is no checkpoint, but a {type(checkpoint).__name__}')
    wrapper = wrapper_of(checkpoint, param_key)
    if wrapper != param_key and param_key is not None:
        if param_key not in WRAPPERS:
            keys = ', '.join(map(repr, list(checkpoint)[:8]))
            raise CheckpointError(f'{load_path}: has no {param_key!r}, which param_key names; it has {keys}')
        logger.info(f'{load_path} has no {param_key}: its parameters are {f"under {wrapper}" if wrapper else "bare"}.')
    try:
        state_dict = unwrap_state_dict(checkpoint, param_key)
    except ValueError as error:
        raise CheckpointError(f'{load_path}: {error}') from None
    if isinstance(net, SRNetwork):
        state_dict = {name: tensor for name, tensor in state_dict.items() if not net.is_unused(name)}
    logger.info(f'Loading {type(net).__name__} from {load_path}, param key: [{wrapper}].')
    self._print_different_keys_loading(net, state_dict, strict)
    try:
        net.load_state_dict(state_dict, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f'{load_path}: does not fit the network of the option file: {error}') from None


@patch(
    'loading networks',
    mends='a bare state dict, or one under model_state_dict, is a KeyError; files are read as pickles',
    needed=lambda: 'weights_only' not in inspect.getsource(BaseModel.load_network),
)
def _patch_load_network() -> None:
    replace(BaseModel, 'load_network', _load_network)


_model_ema = BaseModel.model_ema


def _model_ema_with_buffers(self: BaseModel, decay: float = 0.999) -> None:
    _model_ema(self, decay)
    averaged = dict(self.net_g_ema.named_buffers())
    for name, buffer in self.get_bare_model(self.net_g).named_buffers():
        averaged[name].copy_(buffer)


def _ema_leaves_buffers() -> bool:
    model = SimpleNamespace(net_g=nn.BatchNorm1d(1), net_g_ema=nn.BatchNorm1d(1), get_bare_model=lambda net: net)
    model.net_g.running_mean.fill_(1.0)
    _model_ema(model, 0)
    return model.net_g_ema.running_mean.item() != 1.0


@patch(
    'EMA of buffers',
    mends="the averaged network keeps the batch norms' initial statistics, so a network with batch norm (ELAN) is "
    'validated and saved as noise when ema_decay is set',
    needed=_ema_leaves_buffers,
)
def _patch_model_ema() -> None:
    replace(BaseModel, 'model_ema', _model_ema_with_buffers)


def _get_optimizer(
    self: BaseModel, optim_type: str, params: list[Any], lr: float, **kwargs: Any
) -> torch.optim.Optimizer:
    return getattr(torch.optim, optim_type)(params, lr, **kwargs)


def _get_adamw() -> None:
    BaseModel.get_optimizer(None, 'AdamW', [torch.zeros(1)], 1e-3)


@patch(
    'optimizers',
    mends='only Adam can be named in train.optim_g, where torch.optim has the others of the papers',
    needed=lambda: fails(_get_adamw, NotImplementedError),
)
def _patch_get_optimizer() -> None:
    replace(BaseModel, 'get_optimizer', _get_optimizer)
