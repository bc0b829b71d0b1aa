"""Distributed training where there is no GPU. What two processes do together is in test_training.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import util
from basicsr.utils import dist_util
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attnsr.compat import distributed
from attnsr.errors import UsageError

VARIABLES = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK')
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='stock BasicSR works on a GPU')


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher around the process, and no process group left after it."""
    for name in (*VARIABLES, 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'):
        monkeypatch.setenv(name, '')  # so that it is put back even if the test sets it
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun sets for the only process of a run."""
    for name, value in zip(VARIABLES, ('0', '1', '127.0.0.1', util.free_port(), '0'), strict=True):
        monkeypatch.setenv(name, value)


@no_gpu
@pytest.mark.usefixtures('torchrun')
def test_a_process_group_starts_without_a_gpu() -> None:
    util.stock(distributed._init_dist)
    with pytest.raises(ZeroDivisionError):
        dist_util._init_dist_pytorch('nccl')
    dist_util.init_dist('pytorch')
    assert torch.distributed.get_backend() == 'gloo'
    assert dist_util.get_dist_info() == (0, 1)


@no_gpu
@pytest.mark.usefixtures('torchrun')
def test_a_network_is_wrapped_without_a_gpu(tmp_path: Path) -> None:
    model = util.make_model(tmp_path, dist=True, find_unused_parameters=True)
    dist_util.init_dist('pytorch')
    with pytest.raises((RuntimeError, AssertionError)):
        util.stock(distributed._model_to_device)(model, nn.Linear(2, 2))
    net = model.model_to_device(nn.Linear(2, 2))
    assert isinstance(net, DistributedDataParallel)
    assert net.find_unused_parameters
    net(torch.ones(1, 2)).sum().backward()
    assert net.module.weight.grad is not None


@pytest.mark.parametrize(
    ('launcher', 'message'),
    [
        ('pytorch', r'--launcher pytorch needs torchrun, which sets RANK, .*: torchrun --nproc_per_node N -m attnsr'),
        ('slurm', r'--launcher slurm needs a Slurm step, which sets SLURM_PROCID, .*: srun --ntasks N python -m'),
        ('mpi', r'--launcher mpi is not known; valid: none, pytorch, slurm'),
    ],
)
def test_without_its_launcher_the_error_names_it(launcher: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dist_util.init_dist(launcher)


@pytest.mark.parametrize('script', [None, 'exit 1', 'exit 0'], ids=['no scontrol', 'fails', 'names none'])
def test_slurm_that_names_no_host_is_an_error(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / 'scontrol').write_text(f'#!/bin/sh\n{script}\n')
        (tmp_path / 'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    for name, value in (('PROCID', '0'), ('NTASKS', '1'), ('NODELIST', 'node[1-2]')):
        monkeypatch.setenv(f'SLURM_{name}', value)
    with pytest.raises(UsageError, match=r'`scontrol show hostnames node\[1-2\]` gives none'):
        dist_util.init_dist('slurm')
