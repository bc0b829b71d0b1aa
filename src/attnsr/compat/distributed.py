"""Distributed training without a GPU, and as current torchrun starts it."""

import contextlib
import inspect
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import dist_util
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from attnsr.compat.patches import patch, replace
from attnsr.errors import UsageError


def _init_dist(launcher: str, backend: str = 'nccl', **kwargs: Any) -> None:
    """As BasicSR's, with gloo where there is no GPU, and a GPU by local rank; loader workers start as usual."""
    if launcher not in ('pytorch', 'slurm'):
        raise UsageError(f'--launcher {launcher} is not known; valid: none, pytorch, slurm')
    if launcher == 'slurm':
        _environment_from_slurm(kwargs.pop('port', None))
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        raise UsageError(
            f'--launcher pytorch needs torchrun, which sets {", ".join(missing)}: '
            'torchrun --nproc_per_node N -m attnsr train -opt FILE --launcher pytorch'
        )
    if backend == 'nccl' and not torch.cuda.is_available():
        backend = 'gloo'
    if torch.cuda.is_available():
        local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    torch.distributed.init_process_group(backend=backend, **kwargs)


def _environment_from_slurm(port: int | None) -> None:
    missing = [name for name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST') if name not in os.environ]
    if missing:
        raise UsageError(
            f'--launcher slurm needs a Slurm step, which sets {", ".join(missing)}: '
            'srun --ntasks N python -m attnsr train -opt FILE --launcher slurm'
        )
    rank = int(os.environ['SLURM_PROCID'])
    if port is not None:
        os.environ['MASTER_PORT'] = str(port)
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ['MASTER_ADDR'] = _first_host(os.environ['SLURM_NODELIST'])
    os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
    os.environ['RANK'] = str(rank)
    os.environ['LOCAL_RANK'] = os.environ.get('SLURM_LOCALID', str(rank % max(torch.cuda.device_count(), 1)))


def _first_host(node_list: str) -> str:
    command = ['scontrol', 'show', 'hostnames', node_list]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UsageError(
            f'--launcher slurm asks Slurm for the first host, and `{" ".join(command)}` gives none: {error}'
        ) from error


@patch(
    'distributed start',
    mends='--launcher pytorch and slurm divide by the number of GPUs, 0 on a CPU machine',
    needed=lambda: 'rank % num_gpus' in inspect.getsource(dist_util._init_dist_pytorch),
)
def _patch_init_dist() -> None:
    replace(dist_util, 'init_dist', _init_dist)


def _model_to_device(self: BaseModel, net: nn.Module) -> nn.Module:
    net = net.to(self.device)
    if self.opt['dist']:
        return DistributedDataParallel(
            net,
            device_ids=[torch.cuda.current_device()] if self.device.type == 'cuda' else None,
            find_unused_parameters=self.opt.get('find_unused_parameters', False),
        )
    return DataParallel(net) if self.opt['num_gpu'] > 1 else net


@contextlib.contextmanager
def bare_networks(model: BaseModel) -> Iterator[None]:
    """The model's networks without DistributedDataParallel around them.

    Validation runs on rank 0 alone. Through the wrapper it would send its buffers (the statistics of batch norms) to
    ranks that are not there to receive them.
    """
    wrapped = {name: net for name, net in vars(model).items() if isinstance(net, DistributedDataParallel)}
    for name, net in wrapped.items():
        setattr(model, name, net.module)
    try:
        yield
    finally:
        for name, net in wrapped.items():
            setattr(model, name, net)


@patch(
    'distributed model',
    mends='in a distributed run the network is wrapped for a CUDA device, also where there is none',
    needed=lambda: 'device_ids=[torch.cuda.current_device()]' in inspect.getsource(BaseModel.model_to_device),
)
def _patch_model_to_device() -> None:
    replace(BaseModel, 'model_to_device', _model_to_device)
