"""Checkpoints and training states: whole under their name whatever happens, or not there."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import util
from basicsr import train
from basicsr.models.base_model import BaseModel
from torch import nn

from attnsr.checkpoints import CheckpointError, read
from attnsr.compat import saving
from attnsr.files import TEMPORARY

FORK = multiprocessing.get_context('fork')
SIZE = 16_000_000  # bytes of the network below


def make_network(value: float = 0) -> nn.Linear:
    net = nn.Linear(1000, 4000, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(f'*{TEMPORARY}*'))


def is_partial(file: Path) -> bool:
    try:
        return 0 < file.stat().st_size < SIZE
    except FileNotFoundError:
        return False


def save_for_ever(model: BaseModel) -> None:
    """Save networks, each of one value, over one another."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    for value in range(1_000_000):
        model.save_network(make_network(value), 'net_g', 7)


def kill_when(seen: Callable[[], bool], model: BaseModel) -> None:
    """Let another process save, and SIGKILL it once something is seen of it."""
    process = FORK.Process(target=save_for_ever, args=(model,))
    process.start()
    end = time.monotonic() + 60
    try:
        while not seen():
            assert process.is_alive()
            assert time.monotonic() < end
    finally:
        process.kill()
        process.join()


def test_stock_saving_leaves_a_torn_file_when_killed(tmp_path: Path) -> None:
    model = util.make_model(tmp_path, type('Stock', (BaseModel,), {'save_network': util.stock(saving._save_network)}))
    file = tmp_path / 'models' / 'net_g_7.pth'
    for _ in range(100):
        kill_when(lambda: is_partial(file), model)
        try:
            read(file)
        except CheckpointError:
            return
    raise AssertionError('no file was ever torn')


def test_a_process_killed_while_saving_leaves_the_old_file_whole(tmp_path: Path) -> None:
    model = util.make_model(tmp_path)
    models = tmp_path / 'models'
    file = models / 'net_g_7.pth'
    model.save_network(make_network(), 'net_g', 7)
    for _ in range(100):
        known = set(leftovers(models))
        kill_when(lambda known=known: any(map(is_partial, set(leftovers(models)) - known)), model)
        assert len(read(file)['params']['weight'].unique()) == 1
        if sum(map(is_partial, leftovers(models))) == 3:
            break
    else:
        raise AssertionError('no three kills fell into the writing')

    for folder in (tmp_path, models):  # of a process that lives, and not of this program's
        for name in (f'{TEMPORARY}{os.getpid()}', f'{TEMPORARY}notes'):
            (folder / name).touch()
    (tmp_path / f'tiny.yml{TEMPORARY}{dead_process()}').touch()
    opt = {'auto_resume': True, 'path': {**model.opt['path'], 'experiments_root': str(tmp_path)}}
    assert train.load_resume_state(opt) is None
    for folder in (tmp_path, models):
        assert {path.name for path in leftovers(folder)} == {f'{TEMPORARY}{os.getpid()}', f'{TEMPORARY}notes'}
    assert len(read(file)['params']['weight'].unique()) == 1


def dead_process() -> int:
    process = FORK.Process(target=int)
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


def with_files_limited(function: Callable[[], Any], logged: list[str]) -> tuple[str, list[str]]:
    """Call a function in a process that can write files of half of SIZE only; gives its error and its log."""

    def child() -> None:
        torch.set_num_threads(1)
        torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        try:
            function()
            error = ''
        except OSError as raised:
            error = str(raised)
        sending.send((error, logged))

    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child)
    process.start()
    try:
        assert receiving.poll(util.PATIENCE)
        return receiving.recv()
    finally:
        process.kill()
        process.join()


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.time, 'sleep', lambda seconds: None)
    model, net = util.make_model(tmp_path), make_network()
    models = tmp_path / 'models'
    for iteration in (7, -1):
        model.save_network(net, 'net_g', iteration)
    before = {path: path.read_bytes() for path in models.iterdir()}

    error, lines = with_files_limited(lambda: model.save_network(make_network(1), 'net_g', 7), logged)
    assert error == ''
    assert [line.split(':')[0] for line in lines] == ['WARNING'] * saving.TRIES + ['ERROR']
    assert lines[-1] == f'ERROR: {models}/net_g_7.pth is not saved. Training goes on; earlier checkpoints are whole.'

    model.optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)]
    net(torch.ones(1, 1000)).sum().backward()
    model.optimizers[0].step()  # its state is as large as the network
    error, lines = with_files_limited(lambda: model.save_training_state(0, 7), logged)
    assert error == ''
    assert lines[-1].startswith(f'ERROR: {tmp_path}/training_states/7.state is not saved.')

    error, _ = with_files_limited(lambda: model.save_network(make_network(1), 'net_g', -1), logged)
    assert error.startswith(f'{models}/net_g_latest.pth cannot be saved: ')
    assert error.endswith('Earlier checkpoints are whole')

    assert {path: path.read_bytes() for path in models.iterdir()} == before
    assert list((tmp_path / 'training_states').iterdir()) == []


def test_files_have_what_stock_basicsr_saves(tmp_path: Path) -> None:
    mended = util.make_model(tmp_path / 'mended')
    methods = {name: util.stock(getattr(saving, f'_{name}')) for name in ('save_network', 'save_training_state')}
    stock = util.make_model(tmp_path / 'stock', type('Stock', (BaseModel,), methods))
    nets = [nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)]
    optimizer = torch.optim.Adam(nets[0].parameters(), 0.1)
    nets[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for model in (mended, stock):
        model.optimizers, model.schedulers = [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]
        model.save_network(nets, 'net_g', 7, param_key=['params', 'params_ema'])
        model.save_network(nets[0], 'net_d', -1)
        for iteration in (7, -1):
            model.save_training_state(2, iteration)
    files = sorted(path.relative_to(tmp_path / 'stock') for path in (tmp_path / 'stock').rglob('*.*'))
    assert files == sorted(path.relative_to(tmp_path / 'mended') for path in (tmp_path / 'mended').rglob('*.*'))
    for file in files:
        ours, theirs = (torch.load(tmp_path / kind / file, weights_only=True) for kind in ('mended', 'stock'))
        ours.pop('attnsr', None)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
