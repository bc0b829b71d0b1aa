"""Resuming: which state is taken, and that data and random numbers are those that would have come."""

import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import util
from basicsr import train
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models.base_model import BaseModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from attnsr.checkpoints import CheckpointError
from attnsr.compat import resuming, saving
from attnsr.errors import UsageError

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def progress(monkeypatch: pytest.MonkeyPatch) -> resuming.Progress:
    """That of a process that has just started."""
    monkeypatch.setattr(resuming, 'progress', resuming.Progress())
    return resuming.progress


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    with resuming.random_state_kept():
        yield


def draw() -> list[float]:
    """A random number of each kind."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


# Which state ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def opt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Options of an experiment that has whole states of iterations 3, 6 and 12, away from the current directory."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / 'elsewhere' / 'tiny'
    paths = {name: str(root / name) for name in ('models', 'training_states', 'visualization')}
    opt = {'name': 'tiny', 'network_g': {}, 'auto_resume': True, 'path': {'experiments_root': str(root), **paths}}
    for name in ('models', 'training_states'):
        (root / name).mkdir(parents=True)
    for iteration in (3, 6, 12):
        torch.save({'params': {'weight': torch.ones(3)}}, root / 'models' / f'net_g_{iteration}.pth')
        state = {'epoch': 1, 'iter': iteration, 'optimizers': [], 'schedulers': [], 'attnsr': resuming.progress.state()}
        torch.save(state, root / 'training_states' / f'{iteration}.state')
    return opt


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def state_file(opt: Options, iteration: int) -> Path:
    return Path(opt['path']['training_states'], f'{iteration}.state')


def network_file(opt: Options, iteration: int) -> Path:
    return Path(opt['path']['models'], f'net_g_{iteration}.pth')


def resumed(opt: Options) -> int:
    """The iteration to resume from, by the state, its path and the networks' paths alike."""
    state = train.load_resume_state(opt)
    assert state is not None
    assert opt['path']['resume_state'] == str(state_file(opt, state['iter']))
    assert opt['path']['pretrain_network_g'] == str(network_file(opt, state['iter']))
    return state['iter']


def test_auto_resume_finds_the_newest_state_of_its_experiment(opt: Options) -> None:
    """Stock BasicSR looks below the current directory, and, where it finds a state, asks for a GPU."""
    stock = util.stock(resuming._load_resume_state)
    assert stock(opt) is None
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            stock({**opt, 'auto_resume': False, 'path': {**opt['path'], 'resume_state': str(state_file(opt, 12))}})

    assert resumed(opt) == 12  # and not 6, which comes last by name


def test_without_a_state_a_training_starts_anew(opt: Options) -> None:
    for iteration in (3, 6, 12):
        state_file(opt, iteration).unlink()
    assert train.load_resume_state(opt) is None
    assert train.load_resume_state({**opt, 'auto_resume': False}) is None
    opt['path']['training_states'] = str(Path(opt['path']['training_states'], 'none'))
    assert train.load_resume_state(opt) is None


@pytest.mark.parametrize('damage', ['torn state', 'torn network', 'missing network', 'empty state', 'other file'])
def test_a_state_that_is_not_whole_is_passed_over(damage: str, opt: Options, caplog: pytest.LogCaptureFixture) -> None:
    file = network_file(opt, 12) if 'network' in damage else state_file(opt, 12)
    if damage.startswith('torn'):
        tear(file)
    elif damage == 'missing network':
        file.unlink()
    elif damage == 'empty state':
        file.write_bytes(b'')
    else:
        torch.save({'params': {}}, file)
    with caplog.at_level(logging.WARNING, 'attnsr'):
        assert resumed(opt) == 6
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    message = record.getMessage()
    assert message.startswith(f'{state_file(opt, 12)} is passed over: ')
    assert str(file) in message


def test_a_state_named_by_the_option_file_must_be_one(opt: Options) -> None:
    opt['auto_resume'] = False
    opt['path']['resume_state'] = str(state_file(opt, 6))
    assert resumed(opt) == 6
    opt['path']['resume_state'] = str(network_file(opt, 6))
    with pytest.raises(CheckpointError, match=r'net_g_6\.pth: this is no training state, which holds epoch, iter, '):
        train.load_resume_state(opt)
    opt['path']['resume_state'] = str(state_file(opt, 12))
    network_file(opt, 12).unlink()
    with pytest.raises(CheckpointError, match=r'12\.state: resuming from it needs .*net_g_12\.pth, which is not there'):
        train.load_resume_state(opt)
    tear(state_file(opt, 12))
    with pytest.raises(CheckpointError, match=r'12\.state: this file is torn'):
        train.load_resume_state(opt)


def test_a_state_of_basicsrs_own_is_resumed_with_a_warning(opt: Options, tmp_path: Path, logged: list[str]) -> None:
    model = util.make_model(tmp_path)
    model.optimizers = [torch.optim.Adam([nn.Parameter(torch.ones(2))], 0.1)]
    model.schedulers = [torch.optim.lr_scheduler.StepLR(model.optimizers[0], 3)]
    util.stock(saving._save_training_state)(model, 1, 6)
    (tmp_path / 'training_states' / '6.state').rename(state_file(opt, 6))
    assert torch.load(state_file(opt, 6)).keys() == {'epoch', 'iter', 'optimizers', 'schedulers'}
    state_file(opt, 12).unlink()
    model.resume_training(train.load_resume_state(opt))
    (line,) = logged
    assert line.startswith('WARNING: The training state was saved by BasicSR alone and has no random states')


# The data ------------------------------------------------------------------------------------------------------------


class Places(Dataset[torch.Tensor]):
    """Each sample is its index, a number of each kind of random numbers, and the worker that drew them."""

    opt: Options = {}  # noqa: RUF012

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *draw()], dtype=torch.float64)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]

    def __len__(self) -> int:
        return 7


def make_loader(dataset: Dataset[Any], sampler: EnlargedSampler, workers: int, **more: Any) -> DataLoader[Any]:
    options = {'phase': 'train', 'batch_size_per_gpu': 2, 'num_worker_per_gpu': workers, **more}
    return build_dataloader(dataset, options, num_gpu=0, sampler=sampler, seed=5)


def epoch(
    number: int, workers: int, skipped: int = 0, seed: int = 5, rank: int = 0, ranks: int = 1, **more: Any
) -> torch.Tensor:
    """The samples of an epoch, entered after some of them."""
    progress = resuming.progress = resuming.Progress()
    state = {'seed': seed, 'epoch': number, 'samples': skipped, 'samples_of_epoch': 14, 'world_size': 1}
    progress.start({'epoch': number, 'iter': 1, resuming.KEY: state} if skipped else None)
    progress.set_up(seed, 2, 14)
    sampler = resuming.ResumableSampler(Places(), ranks, rank, 2)
    sampler.set_epoch(number)
    batches = list(make_loader(resuming.SeededDataset(Places()), sampler, workers, **more))
    return torch.cat([torch.empty(0, 8, dtype=torch.float64), *batches])


def test_stock_workers_repeat_their_random_numbers_in_every_epoch() -> None:
    sampler = EnlargedSampler(Places(), 1, 0, 2)
    loader = make_loader(Places(), sampler, 1)
    epochs = []
    for number in (0, 1):
        sampler.set_epoch(number)
        epochs.append(torch.cat(list(loader)))
    assert torch.equal(epochs[0][:, 1], epochs[1][:, 1])
    assert not torch.equal(epoch(0, 1)[:, 1:5], epoch(1, 1)[:, 1:5])


def test_samples_are_the_same_for_any_number_of_workers() -> None:
    expected = epoch(3, 0)
    assert expected.shape == (14, 8)
    assert torch.equal(expected, epoch(3, 1))
    assert torch.equal(expected, epoch(3, 2))
    assert torch.equal(expected, epoch(3, 1, prefetch_mode='cpu', num_prefetch_queue=2))


@pytest.mark.parametrize('skipped', [2, 8, 14])
def test_an_epoch_entered_in_the_middle_goes_on_as_it_would_have(skipped: int) -> None:
    whole = epoch(3, 0)
    assert torch.equal(epoch(3, 0, skipped), whole[skipped:])
    assert torch.equal(epoch(3, 1, skipped), whole[skipped:])


def test_no_two_samples_have_the_same_random_numbers() -> None:
    drawn = [epoch(0, 0), epoch(1, 0), epoch(0, 0, seed=6)]
    for kind in range(1, 8):
        values = torch.cat([samples[:, kind] for samples in drawn])
        assert len(values.unique()) == len(values)
    assert not torch.equal(drawn[0][:, 0], drawn[1][:, 0])
    assert torch.equal(drawn[0][:, 0], drawn[2][:, 0])  # their order is BasicSR's, which depends on the epoch alone


def test_processes_share_out_the_samples_of_one() -> None:
    """The first six of seven of each, in batches of two."""
    alone, first, second = epoch(0, 0), epoch(0, 0, rank=0, ranks=2), epoch(0, 0, rank=1, ranks=2)
    assert torch.equal(torch.stack([first, second], 1).flatten(0, 1), alone[:12])


def options(tiny: Path, **changed: Any) -> Options:
    """What BasicSR's pipeline makes its loaders of."""
    return {
        'datasets': {
            'train': util.paired(tiny.parent, 'train', **changed),
            'val': util.paired(tiny.parent, 'val'),
        },
        'world_size': 1,
        'rank': 0,
        'dist': False,
        'num_gpu': 0,
        'manual_seed': 5,
        'train': {'total_iter': 40},
    }


def crops(loader: DataLoader[Any], sampler: EnlargedSampler, number: int) -> dict[str, torch.Tensor]:
    """The HR patches of an epoch by the names of their pictures."""
    sampler.set_epoch(number)
    found: dict[str, torch.Tensor] = {}
    for batch in loader:
        found |= dict(zip(batch['gt_path'], batch['gt'], strict=True))
    return found


def test_the_pipelines_crops_are_other_ones_in_every_epoch(tiny: Path) -> None:
    opt = options(tiny, num_worker_per_gpu=1)
    loader, sampler, (validation,), _, _ = train.create_train_val_dataloader(opt, logging.getLogger('basicsr'))
    first, second, again = (crops(loader, sampler, number) for number in (0, 1, 0))
    assert len(first) == len(second) == 8
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())
    assert loader.dataset.opt is loader.dataset.dataset.opt
    assert not isinstance(validation.dataset, resuming.SeededDataset)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_loaders_leave_the_random_state_alone(workers: int, tiny: Path) -> None:
    opt = options(tiny, num_worker_per_gpu=workers)
    loader, _, (validation,), _, _ = train.create_train_val_dataloader(opt, logging.getLogger('basicsr'))
    state = resuming.random_state()
    expected = draw()
    resuming.set_random_state(state)
    assert len(list(loader)) + len(list(validation)) == 4 + 9
    assert draw() == expected


def test_whoever_builds_a_loader_of_his_own_keeps_basicsrs_parts(tiny: Path, tmp_path: Path) -> None:
    dataset = build_dataset(util.paired(tiny.parent, 'train'))
    assert type(dataset).__name__ == 'PairedImageDataset'
    sampler = EnlargedSampler(dataset, 1, 0)
    assert type(sampler) is EnlargedSampler
    model = util.make_model(tmp_path)
    model.update_learning_rate(1)
    model.save_training_state(0, 1)
    assert (tmp_path / 'training_states' / '1.state').is_file()


def test_the_last_batch_that_is_dropped_does_not_end_the_training_early(tiny: Path) -> None:
    def iterations_of(pipeline: Any) -> int:
        loader, _, _, total_epochs, total_iter = pipeline(options(tiny), logging.getLogger('basicsr'))
        assert total_iter == 40
        return len(loader) * (total_epochs + 1)  # train_pipeline goes through range(total_epochs + 1)

    assert iterations_of(util.stock(resuming._create_resumable_dataloader)) == 36
    assert 40 <= iterations_of(train.create_train_val_dataloader) <= 44


def test_a_training_resumed_with_other_batches_ends_at_its_last_iteration(
    tiny: Path, progress: resuming.Progress
) -> None:
    """Iteration 20 in epoch 20, by batches of 9, and then batches of 2: four iterations an epoch."""
    state = {'seed': 5, 'epoch': 20, 'samples': 0, 'samples_of_epoch': 9, 'world_size': 1}
    progress.start({'epoch': 20, 'iter': 20, resuming.KEY: state})
    _, _, _, total_epochs, _ = train.create_train_val_dataloader(options(tiny), logging.getLogger('basicsr'))
    assert total_epochs == 20 + math.ceil((40 - 20) / 4)


def test_fewer_pictures_than_a_batch_are_an_error(tiny: Path) -> None:
    opt = options(tiny, batch_size_per_gpu=10)
    loader, *_ = util.stock(resuming._create_resumable_dataloader)(opt, logging.getLogger('basicsr'))
    assert len(loader) == 0  # which trains nothing, in silence
    with pytest.raises(UsageError, match='training set has 9 images for each process, fewer than a batch of 10: give'):
        train.create_train_val_dataloader(opt, logging.getLogger('basicsr'))


@pytest.mark.parametrize(('samples_of_epoch', 'skipped'), [(14, 8), (16, 0)])
def test_an_epoch_of_other_pictures_starts_anew(
    samples_of_epoch: int, skipped: int, progress: resuming.Progress, logged: list[str]
) -> None:
    state = {'seed': 5, 'epoch': 3, 'samples': 8, 'samples_of_epoch': 14, 'world_size': 1}
    progress.start({'epoch': 3, 'iter': 25, resuming.KEY: state})
    progress.set_up(6, 2, samples_of_epoch)
    progress.enter_epoch(3)
    assert (progress.seed, progress.samples) == (5, skipped)
    assert len(logged) == (skipped == 0)
    progress.enter_epoch(4)
    assert progress.samples == 0


# The random states ---------------------------------------------------------------------------------------------------


class Drawing(BaseModel):
    """Draws random numbers when it validates."""

    def nondist_validation(self, *_: Any) -> None:
        self.drawn = draw()


def test_validation_leaves_the_random_state_alone(tmp_path: Path) -> None:
    model = util.make_model(tmp_path, Drawing)
    state = resuming.random_state()
    expected = draw()
    for validation, kept in ((util.stock(resuming._validation_aside), False), (BaseModel.validation, True)):
        resuming.set_random_state(state)
        validation(model, None, 1, None)
        assert model.drawn == expected
        assert (draw() == expected) == kept


def test_a_state_brings_the_random_numbers_back(tmp_path: Path, progress: resuming.Progress) -> None:
    model = util.make_model(tmp_path)
    random.gauss(0, 1)
    np.random.randn()  # each draws two at a time and keeps one, which belongs to its state
    model.save_training_state(2, 12)
    expected = draw()
    state = torch.load(tmp_path / 'training_states' / '12.state', weights_only=True)
    util.stock(resuming._resume_training_with_random_state)(model, state)
    assert draw() != expected

    progress.start(state)
    model.resume_training(state)
    assert draw() == expected
