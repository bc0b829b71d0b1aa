"""Resuming: on any device, from the newest state that is whole, with the data and random numbers that would have come.

Two things make a resumed run see what the uninterrupted one would have seen. Every training sample is drawn and
augmented under a seed of its own, made of the run's seed, the epoch and the sample's place in it, so that a run can
enter an epoch anywhere (and with any number of loader workers). And validation and the loaders leave the process's
random state alone, so that the one saved with a checkpoint is the one the next iteration starts from.
"""

import contextlib
import hashlib
import inspect
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr import train
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models.base_model import BaseModel
from basicsr.utils import check_resume, get_root_logger
from basicsr.utils.dist_util import get_dist_info
from torch.utils.data import DataLoader, Dataset

from attnsr.checkpoints import CheckpointError, read
from attnsr.compat import distributed
from attnsr.compat.patches import patch, replace
from attnsr.errors import UsageError
from attnsr.files import remove_leftovers

#: Where a training state keeps what is ours.
KEY = 'attnsr'

# Before BasicSR has set up its logger; these lines go to the standard error stream.
logger = logging.getLogger('attnsr')


class SeededIndex(int):
    """An index into a data set, with the seed to draw its sample under."""

    seed: int


class SeededDataset(Dataset[Any]):
    """A data set whose samples depend on nothing but their index and its seed."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, SeededIndex):
            return self.dataset[index]
        with random_state_kept():
            random.seed(index.seed)
            np.random.seed(index.seed)
            torch.default_generator.manual_seed(index.seed)
            return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # `dataset` is asked for while unpickling; with `__getitems__` a loader would pass by the seeds.
        if name in ('dataset', '__getitems__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class ResumableSampler(EnlargedSampler):
    """BasicSR's sampler, which gives each index a seed and can enter an epoch after some of its samples."""

    def __iter__(self) -> Iterator[SeededIndex]:
        skipped = progress.samples_to_skip(self.epoch)
        for place, value in enumerate(super().__iter__()):
            if place >= skipped:
                index = SeededIndex(value)
                text = f'{progress.seed} {self.epoch} {place * self.num_replicas + self.rank}'
                index.seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), 'big')
                yield index

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        progress.enter_epoch(epoch)


class Progress:
    """How far the training of this process is, beyond what BasicSR keeps."""

    def __init__(self) -> None:
        # A user's own loop may count batches and save states without the calls below.
        self.seed = self._batch_size = self._samples_of_epoch = 0
        self.epoch = 0
        self.samples = 0  # of this rank, done in the epoch
        self.start(None)

    def start(self, training_state: dict[str, Any] | None) -> None:
        """A training begins: anew, or from a training state, which holds what :meth:`state` gave, or is BasicSR's."""
        state = training_state or {'epoch': 0, 'iter': 0}
        self._resumed: dict[str, Any] | None = state.get(KEY)
        self._epoch, self._iteration = int(state['epoch']), int(state['iter'])

    def set_up(self, seed: int, batch_size: int, samples_of_epoch: int) -> None:
        """Called with the data loaders made; decides whether the state to resume belongs to this data."""
        self._batch_size, self._samples_of_epoch = batch_size, samples_of_epoch
        world_size = get_dist_info()[1]
        seeds = [seed]
        if world_size > 1:  # without manual_seed every process has drawn one of its own
            torch.distributed.broadcast_object_list(seeds)
        self.seed = seeds[0]
        if self._resumed is None:
            return
        self.seed = self._resumed['seed']
        for name, now in (('samples_of_epoch', samples_of_epoch), ('world_size', world_size)):
            if self._resumed[name] != now:
                get_root_logger().warning(
                    f'Resuming with another {name} ({now}, before {self._resumed[name]}): the epoch starts anew, the '
                    'data will not be those of an uninterrupted run.'
                )
                self._resumed['samples'] = 0

    def samples_to_skip(self, epoch: int) -> int:
        return self._resumed['samples'] if self._resumed is not None and self._resumed['epoch'] == epoch else 0

    def enter_epoch(self, epoch: int) -> None:
        self.epoch, self.samples = epoch, self.samples_to_skip(epoch)

    def finish_batch(self) -> None:
        self.samples += self._batch_size

    def last_epoch(self, iterations: int, batches: int) -> int:
        """The epoch in which iteration number ``iterations`` comes, or the one after it, with ``batches`` in each."""
        return self._epoch + math.ceil((iterations - self._iteration) / batches)

    def state(self) -> dict[str, Any]:
        """What a training state keeps, from all ranks; to be called on every one of them."""
        world_size = get_dist_info()[1]
        states = [random_state()] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(states, random_state())
        return {
            'seed': self.seed,
            'epoch': self.epoch,
            'samples': self.samples,
            'samples_of_epoch': self._samples_of_epoch,
            'world_size': world_size,
            'random': states,
        }

    def restore_random_state(self) -> None:
        rank = get_dist_info()[0]
        if self._resumed is None:
            get_root_logger().warning(
                'The training state was saved by BasicSR alone and has no random states: the data after it will not '
                'be those of an uninterrupted run.'
            )
        elif rank < len(self._resumed['random']):
            set_random_state(self._resumed['random'][rank])


progress = Progress()


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy and torch, in types that a checkpoint can hold without code."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy['state']['key'] = torch.from_numpy(numpy['state']['key'].astype(np.int64))
    state = {'python': random.getstate(), 'numpy': numpy, 'torch': torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state['python'])
    numpy = state['numpy']
    key = numpy['state']['key'].numpy().astype(np.uint32)
    np.random.set_state({**numpy, 'state': {**numpy['state'], 'key': key}})
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn within, the process's random states are afterwards as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    rank, world_size = get_dist_info()
    path: Path | None = None
    if rank == 0:
        for folder in ('training_states', 'models', 'experiments_root'):
            remove_leftovers(opt['path'][folder])
        path = _state_to_resume(opt)
    if world_size > 1:  # rank 0 alone writes states, and it decides for all
        chosen = [path]
        torch.distributed.broadcast_object_list(chosen)
        path = chosen[0]
    if path is None:
        progress.start(None)
        return None
    if not path.is_file():
        raise UsageError(
            f'{path} is not to be seen by rank {rank}, and rank 0 resumes from it: all machines must share the folder '
            'of experiments (path.experiments_root)'
        )
    state = _read_state(path, opt)
    opt['path']['resume_state'] = str(path)
    if rank == 0:  # BasicSR makes no folders when it resumes, and the state may be of another experiment
        for folder in ('training_states', 'models', 'visualization'):
            Path(opt['path'][folder]).mkdir(parents=True, exist_ok=True)
    check_resume(opt, state['iter'])
    progress.start(state)
    return state


def _state_to_resume(opt: dict[str, Any]) -> Path | None:
    if not opt['auto_resume']:
        return Path(opt['path']['resume_state']) if opt['path'].get('resume_state') else None
    paths = [path for path in Path(opt['path']['training_states']).glob('*.state') if path.stem.isdigit()]
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        try:
            state = _read_state(path, opt)
            for network in _networks(opt, state):
                read(network)
        except CheckpointError as error:
            logger.warning('%s is passed over: %s', path, error)
            continue
        return path
    return None


def _networks(opt: dict[str, Any], state: dict[str, Any]) -> list[Path]:
    """The files from which BasicSR loads the networks when it resumes from a state."""
    ignored = opt['path'].get('ignore_resume_networks') or ()
    names = [key.removeprefix('network_') for key in opt if key.startswith('network_') and key not in ignored]
    return [Path(opt['path']['models'], f'net_{name}_{state["iter"]}.pth') for name in names]


def _read_state(path: Path, opt: dict[str, Any]) -> dict[str, Any]:
    state = read(path)
    wanted = {'epoch', 'iter', 'optimizers', 'schedulers'}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise CheckpointError(f'{path}: this is no training state, which holds {", ".join(sorted(wanted))}')
    missing = [str(network) for network in _networks(opt, state) if not network.is_file()]
    if missing:
        raise CheckpointError(f'{path}: resuming from it needs {", ".join(missing)}, which is not there')
    return state


@patch(
    'resuming',
    mends='resuming asks for a CUDA device, --auto_resume looks below the current directory whatever '
    'path.experiments_root says and takes a torn state',
    needed=lambda: 'torch.cuda.current_device()' in inspect.getsource(train.load_resume_state),
)
def _patch_load_resume_state() -> None:
    replace(train, 'load_resume_state', _load_resume_state)


_create_train_val_dataloader = train.create_train_val_dataloader
_build_dataset = train.build_dataset
_resume_training = BaseModel.resume_training
_validation = BaseModel.validation
_update_learning_rate = BaseModel.update_learning_rate


def _build_seeded_dataset(dataset_opt: dict[str, Any]) -> Dataset[Any]:
    dataset = _build_dataset(dataset_opt)
    return SeededDataset(dataset) if dataset_opt['phase'] == 'train' else dataset


def _create_resumable_dataloader(opt: dict[str, Any], logger: logging.Logger) -> tuple[Any, ...]:
    train_loader, sampler, val_loaders, _, total_iters = _create_train_val_dataloader(opt, logger)
    if not len(train_loader):
        raise UsageError(
            f'the training set has {len(sampler)} images for each process, fewer than a batch of '
            f'{train_loader.batch_size}: give it more, raise dataset_enlarge_ratio or lower batch_size_per_gpu'
        )
    progress.set_up(opt['manual_seed'], train_loader.batch_size, len(sampler))
    loader: DataLoader[Any]
    for loader in (train_loader, *val_loaders):
        loader.generator = torch.Generator().manual_seed(progress.seed)  # not the process's, which is saved
    # BasicSR counts an incomplete last batch, which its loader drops, and so may stop before total_iter.
    total_epochs = progress.last_epoch(total_iters, len(train_loader))
    return train_loader, sampler, val_loaders, total_epochs, total_iters


def _resume_training_with_random_state(self: BaseModel, resume_state: dict[str, Any]) -> None:
    _resume_training(self, resume_state)
    progress.restore_random_state()


def _validation_aside(self: BaseModel, *args: Any, **kwargs: Any) -> None:
    with random_state_kept(), distributed.bare_networks(self):
        _validation(self, *args, **kwargs)


def _update_learning_rate_and_count(self: BaseModel, *args: Any, **kwargs: Any) -> None:
    _update_learning_rate(self, *args, **kwargs)
    progress.finish_batch()  # BasicSR calls this once for each batch it trains on


@patch(
    'data after resuming',
    mends='a resumed run restarts its epoch and restores no random state, so it sees other data than the run it '
    'continues; loader workers repeat their random numbers every epoch',
    needed=lambda: 'get_rng_state' not in inspect.getsource(_resume_training),
)
def _patch_data() -> None:
    # Only in BasicSR's pipeline: whoever builds a loader of his own keeps BasicSR's parts.
    train.EnlargedSampler = ResumableSampler
    train.build_dataset = _build_seeded_dataset
    replace(train, 'create_train_val_dataloader', _create_resumable_dataloader)
    replace(BaseModel, 'resume_training', _resume_training_with_random_state)
    replace(BaseModel, 'validation', _validation_aside)
    replace(BaseModel, 'update_learning_rate', _update_learning_rate_and_count)
