"""What tests of whole runs share: a tiny data set, an option file that trains on it, and the command line's process."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.models.base_model import BaseModel

from attnsr.compat import patches
from attnsr.data_prep.lmdb_dataset import write_lmdb

SCALE = 2

# Nine pictures in batches of two are four iterations an epoch, one picture dropped: the 40 iterations are ten epochs,
# and checkpoints fall at their ends and within them. Training and validation read the same LMDBs.
OPTIONS = """\
name: tiny
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 0

datasets:
  train:
    name: Crops
    type: PairedImageDataset
    dataroot_gt: {data}/hr.lmdb
    dataroot_lq: {data}/lr.lmdb
    io_backend:
      type: lmdb
    gt_size: 16
    num_worker_per_gpu: 1
    batch_size_per_gpu: 2
  val:
    name: Whole
    type: PairedImageDataset
    dataroot_gt: {data}/hr.lmdb
    dataroot_lq: {data}/lr.lmdb
    io_backend:
      type: lmdb

network_g:
  type: ELAN
  upscale: 2
  m_elan: 2
  c_elan: 12
  window_sizes: [2, 4, 8]

path: {{}}

train:
  total_iter: 40
  ema_decay: 0.9
  optim_g:
    type: Adam
    lr: 1e-3
  scheduler:
    type: MultiStepLR
    milestones: [20, 30]
    gamma: 0.5
  pixel_opt:
    type: L1Loss

val:
  val_freq: 10
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: true

logger:
  print_freq: 1
  save_checkpoint_freq: 3
"""

ITERATION = re.compile(r'\[epoch: *(\d+), iter: *([\d,]+), lr:\(([^)]*)\)\].*?((?:l_\w+: \S+ ?)+)')

# Generous: the machine may be busy with other things.
PATIENCE = 300


@dataclass(frozen=True)
class Training:
    """A training that has ended: where it was started, and its process's result."""

    folder: Path
    process: subprocess.CompletedProcess

    @property
    def experiment(self) -> Path:
        return self.folder / 'experiments' / 'tiny'


def pictures() -> dict[str, np.ndarray]:
    """HR pictures by key: uint8 (48, 48, 3), smooth and all different."""
    random = np.random.default_rng(0)
    return {
        f'{number:04d}': cv2.resize(
            random.integers(0, 256, (12, 12, 3), np.uint8), (48, 48), interpolation=cv2.INTER_CUBIC
        )
        for number in range(9)
    }


def lmdb_values(path: Path) -> dict[str, bytes]:
    """All that an LMDB holds, by key."""
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {key.decode(): bytes(value) for key, value in transaction.cursor()}


def build_tiny(folder: Path) -> Path:
    """Write ``hr.lmdb``, ``lr.lmdb`` and the option file ``tiny.yml`` into ``folder``; returns the option file."""
    hr = pictures()
    write_lmdb(folder / 'hr.lmdb', hr)
    write_lmdb(folder / 'lr.lmdb', {key: picture[::SCALE, ::SCALE] for key, picture in hr.items()})
    (folder / 'tiny.yml').write_text(OPTIONS.format(data=folder))
    return folder / 'tiny.yml'


def paired(folder: Path, phase: str, **changed: Any) -> dict[str, Any]:
    """Options of a PairedImageDataset on the LMDBs of :func:`build_tiny`, as BasicSR has them after reading."""
    return {
        'name': phase,
        'phase': phase,
        'type': 'PairedImageDataset',
        'dataroot_gt': f'{folder}/hr.lmdb',
        'dataroot_lq': f'{folder}/lr.lmdb',
        'io_backend': {'type': 'lmdb'},
        'scale': SCALE,
        'gt_size': 16,
        'use_hflip': True,
        'use_rot': True,
        'num_worker_per_gpu': 0,
        'batch_size_per_gpu': 2,
        **changed,
    }


def environment(**variables: str) -> dict[str, str]:
    """Of a process of its own: one thread, and nothing of a distributed run around it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(('SLURM_', 'TORCHELASTIC_'))}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        inherited.pop(name, None)
    return {**inherited, 'OMP_NUM_THREADS': '1', **variables}


def start(
    *arguments: str | Path, cwd: Path, variables: Mapping[str, str] | None = None, **more: Any
) -> subprocess.Popen:
    """Start Python with these arguments, as leader of a process group; its output and errors are pipes of text."""
    settings: dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, **more}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**(variables or {})),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        **settings,
    )


def finish(process: subprocess.Popen, status: int = 0) -> subprocess.CompletedProcess:
    """Wait for a process of :func:`start` and see that it ends with this status; one that hangs is killed."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f'{process.args} did not end within {PATIENCE} s:\n{out}\n{err}')
    assert process.returncode == status, f'{process.args} ended with {process.returncode}:\n{out}\n{err}'
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*arguments: str | Path, cwd: Path, status: int = 0, **more: Any) -> subprocess.CompletedProcess:
    """:func:`start` and :func:`finish`."""
    return finish(start(*arguments, cwd=cwd, **more), status)


# Runs the command line for each line of its input, in a fork of itself: the imports are paid once.
COMMAND_LINES = """
import json, os, signal, sys
from attnsr.cli import main

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CommandLine:
    """The command line in ``folder``, a process for each command; use it as a context manager.

    Attributes:
        folder: The current directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / 'log'
        with self._log.open('w') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-c', COMMAND_LINES],
                cwd=folder,
                env=environment(),
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> 'CommandLine':
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def start(self, *arguments: str | Path) -> int:
        """Begin a command; returns the number of its process."""
        assert self._process.stdin is not None
        self._before = self._log.stat().st_size
        print(json.dumps([str(argument) for argument in arguments]), file=self._process.stdin, flush=True)
        return int(self._line())

    def finish(self) -> tuple[int, str]:
        """Wait for the command that was begun; returns its exit status, negative for a signal, and what it said."""
        status = int(self._line())
        return status, self._said()

    def run(self, *arguments: str | Path, status: int = 0) -> str:
        """Run a command, which must end with this status; returns what it said."""
        self.start(*arguments)
        found, said = self.finish()
        assert found == status, f'status {found}:\n{said}'
        return said

    def _line(self) -> str:
        assert self._process.stdout is not None
        ended = select.select([self._process.stdout], [], [], PATIENCE)[0]
        assert ended, f'the command hangs:\n{self._said()}'
        line = self._process.stdout.readline()
        assert line, f'the command line has ended:\n{self._said()}'
        return line

    def _said(self) -> str:
        return self._log.read_bytes()[self._before :].decode()


def iterations(log: str) -> dict[int, tuple[str, ...]]:
    """What a log says of each iteration, as printed: epoch, learning rates, losses."""
    return {
        int(number.replace(',', '')): (epoch, rates, losses.strip())
        for epoch, number, rates, losses in ITERATION.findall(log)
    }


def stock(replacement: Any) -> Any:
    """What BasicSR has in the place of one of attnsr's replacements; skips where the installed BasicSR needs none."""
    for old, new in patches._replaced:
        if new is replacement:
            return old
    pytest.skip('the installed BasicSR has this mended')


def make_model(folder: Path, model: type[BaseModel] = BaseModel, **options: Any) -> BaseModel:
    """A bare model of BasicSR's that trains on the CPU and writes into ``models`` and ``training_states``."""
    paths = {name: str(folder / name) for name in ('models', 'training_states')}
    for path in paths.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    return model({'num_gpu': 0, 'is_train': True, 'dist': False, 'rank': 0, 'path': paths, **options})


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])
