"""Networks within BasicSR's models: loading, averaging, optimizing."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import WRAPPERS, at_other_scale, compare, explain, wrapper_of
from attnsr.checkpoints import CheckpointError, read, state_dict_of
from attnsr.compat.patches import fails, patch, replace


def _load_network(
    self: BaseModel, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
) -> None:
    net = self.get_bare_model(net)
    logger = get_root_logger()
    options = [f'path.{key}: ' for key, value in self.opt['path'].items() if 'pretrain' in key and value == load_path]
    where = f'{"".join(options[:1])}{load_path}'
    checkpoint = read(load_path)
    state_dict = state_dict_of(checkpoint, where, param_key)
    wrapper = wrapper_of(checkpoint, param_key)
    if wrapper != param_key and param_key is not None:
        if param_key not in WRAPPERS:
            keys = ', '.join(map(repr, list(checkpoint)[:8]))
            raise CheckpointError(f'{where}: has no {param_key!r}, which param_key names; it has {keys}')
        logger.info(f'{load_path} has no {param_key}: its parameters are {f"under {wrapper}" if wrapper else "bare"}.')
    logger.info(f'Loading {type(net).__name__} from {load_path}, param key: [{wrapper}].')
    try:
        if isinstance(net, SRNetwork):
            # What a run resumes from is its own: there is nothing to leave out.
            path = self.opt['path']
            strict = strict or bool(path.get('resume_state') and Path(load_path).parent == Path(path.get('models', '')))
            _load_sr_network(self, net, net.without_unused(state_dict), load_path, strict)
        else:
            self._print_different_keys_loading(net, state_dict, strict)
            net.load_state_dict(state_dict, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f'{where}: does not fit the network of the option file: {error}') from None


def _load_sr_network(
    self: BaseModel, net: SRNetwork, state_dict: dict[str, Tensor], load_path: str, strict: bool
) -> None:
    mismatch = compare(net, state_dict)
    if not mismatch:
        net.load_state_dict(state_dict)
        return
    why = explain(net, state_dict, mismatch)
    other = at_other_scale(net, state_dict, mismatch)
    upsampler = f'the upsampler ({net.upsampler}*)'
    if strict:
        raise RuntimeError(f'{why}; `strict_load_g: false` would load all but {upsampler}' if other else why)

    left_out = {name for name in state_dict if name.startswith(net.upsampler)} if other else mismatch.names
    part = {name: tensor for name, tensor in state_dict.items() if name not in left_out}
    # It takes a weight between channels: vectors and single numbers have the same shapes in many networks.
    if not any(sum(side > 1 for side in tensor.shape) > 1 for tensor in part.values()):
        raise RuntimeError(f'nothing of it fits: {why}')
    if net is getattr(self, 'net_g_ema', None):
        # The moving average starts where the network does, whose loading has been logged, in all that is left out.
        part = {**self.get_bare_model(self.net_g).state_dict(), **part}
    elif other:
        get_root_logger().info(f'{load_path} is a checkpoint of {other}: all but {upsampler} is loaded.')
    else:
        get_root_logger().warning(f'{load_path}: only what fits is loaded: {why}.')
    net.load_state_dict(part, strict=False)


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
