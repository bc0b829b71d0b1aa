"""Trainings as a user runs them, in processes of their own: killed, interrupted, distributed, from a script."""

import fcntl
import mmap
import os
import random
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import util

TOTAL = 40


class Paced:
    """A training by the command line whose log goes into a pipe that holds one message and no more.

    It waits at each message until the one before is read, and so is where its log says, however slowly this process
    reads.
    """

    def __init__(self, *arguments: str | Path, cwd: Path) -> None:
        self._pipe, writing = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, mmap.PAGESIZE)
        self.process = util.start('-m', 'attnsr', *arguments, cwd=cwd, stdout=writing, stderr=writing)
        os.close(writing)
        self.log = ''

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read on until a message matches."""
        while message := self._read():
            if match := re.search(pattern, message):
                return match
        raise AssertionError(f'the training ended without {pattern}:\n{self.log}')

    def read_until_iteration(self, number: int) -> None:
        """Read on until the log has this iteration, or a later one."""
        while int(self.read_until(r'iter: *([\d,]+),')[1]) < number:
            pass

    def end(self, how: signal.Signals) -> int:
        """Send a signal to the training and its loader's workers, and wait; returns the status."""
        os.killpg(self.process.pid, how)
        while self._read():
            pass
        os.close(self._pipe)
        return self.process.wait(util.PATIENCE)

    def _read(self) -> str:
        assert select.select([self._pipe], [], [], util.PATIENCE)[0], f'the training hangs:\n{self.log}'
        message = os.read(self._pipe, mmap.PAGESIZE).decode()
        self.log += message
        return message


def weights(file: Path) -> dict[str, torch.Tensor]:
    return {
        f'{key}.{name}': tensor
        for key, state in torch.load(file, weights_only=True).items()
        for name, tensor in state.items()
    }


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_all_iterations_are_trained_though_each_epoch_drops_a_picture(trained: util.Training) -> None:
    """Stock BasicSR counts five iterations an epoch where there are four, and ends after the 36th."""
    log = util.iterations(trained.process.stderr)
    assert list(log) == list(range(1, TOTAL + 1))
    assert [int(epoch) for epoch, *_ in log.values()] == [number // 4 for number in range(TOTAL)]
    assert 'Traceback' not in trained.process.stderr


# A few kills take half a minute, all of them a whole one.
@pytest.mark.parametrize('kills', [4, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_again_and_again_it_goes_on_by_itself_to_the_same_weights(
    tiny: Path, trained: util.Training, tmp_path: Path, kills: int
) -> None:
    """SIGKILLs and a Ctrl-C, at random moments of start-up, training and saving."""
    expected = util.iterations(trained.process.stderr)
    command = ('train', '-opt', tiny, '--auto_resume')
    draw = random.Random(1)
    logs = []

    def interrupt(
        seconds: float = 0, iteration: int = 0, saving: bool = False, how: signal.Signals = signal.SIGKILL
    ) -> int:
        """Some seconds after the start, or after the log has an iteration and then a saving; gives the status."""
        training = Paced(*command, cwd=tmp_path)
        if iteration:
            training.read_until_iteration(iteration)
        if saving:
            training.read_until('Saving models')
        time.sleep(seconds)
        status = training.end(how)
        logs.append(training.log)
        return status

    def start_up() -> dict[str, Any]:
        return {'seconds': draw.uniform(0.1, 5)}

    def after(first: int, last: int, saving: bool = False) -> dict[str, Any]:
        """A moment as long as two iterations, or as the saving of a checkpoint."""
        return {'seconds': draw.uniform(0, 0.04), 'iteration': draw.randint(first, last), 'saving': saving}

    moments = [
        start_up(),
        after(1, 1),  # before the first checkpoint: the log is at most two lines ahead
        after(1, 3, saving=True),
        after(6, 8),
        start_up(),
        start_up(),
        after(10, 12, saving=True),
        after(14, 16),
        after(19, 21, saving=True),
        after(24, 26),
    ]
    assert [interrupt(**moment) for moment in moments[:kills]] == [-signal.SIGKILL] * kills
    assert interrupt(iteration=31, how=signal.SIGINT) == 130
    assert logs[-1].splitlines()[-1] == 'interrupted; --auto_resume goes on from its last state'
    assert 'Traceback' not in logs[-1]

    logs.append(util.run('-m', 'attnsr', *command, cwd=tmp_path).stderr)
    resumed = re.search(r'Resuming training from epoch: (\d+), iter: (\d+)', logs[-1])
    assert resumed is not None
    assert 30 <= int(resumed[2]) < TOTAL
    seen: dict[int, tuple[str, ...]] = {}
    for log in logs:
        printed = util.iterations(log)
        assert printed == {number: expected[number] for number in printed}
        seen |= printed
    assert seen.keys() == expected.keys()
    experiment = tmp_path / 'experiments' / 'tiny'
    latest = Path('models', 'net_g_latest.pth')
    assert_same_weights(weights(experiment / latest), weights(trained.experiment / latest))
    assert list(experiment.rglob('*.writing-*')) == []


# A user's script: his own model type, which also writes the parameters that each process has.
SCRIPT = """
import os
import attnsr
import torch
from basicsr.models.sr_model import SRModel
from basicsr.train import train_pipeline
from basicsr.utils.registry import MODEL_REGISTRY

@MODEL_REGISTRY.register()
class Telling(SRModel):
    def save(self, epoch, current_iter):
        super().save(epoch, current_iter)
        torch.save(self.get_bare_model(self.net_g).state_dict(), f'{os.environ["RANK"]}_{current_iter}.pth')

train_pipeline(os.getcwd())
"""


def test_two_processes_have_equal_weights_and_resume(tiny: Path, tmp_path: Path) -> None:
    def torchrun(*command: str, **more: Any) -> str:
        launcher = ('-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', util.free_port())
        # Without a seed in the file each process draws its own, and they must agree all the same.
        options = ('--launcher', 'pytorch', '--auto_resume', '--force_yml', 'manual_seed=~', 'train:total_iter=8')
        return util.run(*launcher, *command, '-opt', tiny, *options, *more.get('force', ()), cwd=tmp_path).stderr

    (tmp_path / 'script.py').write_text(SCRIPT)
    whole = util.iterations(torchrun('script.py', force=['model_type=Telling']))
    assert list(whole) == list(range(1, 9))
    experiment = tmp_path / 'experiments' / 'tiny'
    assert len(list(experiment.glob('train_tiny_*.log'))) == 1
    for moment in (3, 6, -1):
        first, second = (torch.load(tmp_path / f'{rank}_{moment}.pth') for rank in (0, 1))
        learned = [name for name in first if 'running' not in name]  # statistics are each process's own
        assert_same_weights({name: first[name] for name in learned}, {name: second[name] for name in learned})
    ended = weights(experiment / 'models' / 'net_g_latest.pth')

    (experiment / 'training_states' / '6.state').unlink()
    resumed = util.iterations(torchrun('-m', 'attnsr', 'train'))
    assert resumed == {number: whole[number] for number in range(4, 9)}
    assert_same_weights(weights(experiment / 'models' / 'net_g_latest.pth'), ended)


def test_slurm_starts_two_processes(tiny: Path, tmp_path: Path) -> None:
    scontrol = tmp_path / 'bin' / 'scontrol'
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    step = {
        'PATH': f'{scontrol.parent}:{os.environ["PATH"]}',
        'SLURM_NODELIST': 'node[1-2]',
        'SLURM_NTASKS': '2',
        'MASTER_PORT': util.free_port(),
    }
    # Without an averaged network rank 0 validates the one that is trained, alone.
    force = ('train:total_iter=3', 'train:ema_decay=0', 'val:val_freq=2')
    command = ('-m', 'attnsr', 'train', '-opt', tiny, '--launcher', 'slurm', '--force_yml', *force)
    processes = [util.start(*command, cwd=tmp_path, variables={**step, 'SLURM_PROCID': rank}) for rank in '01']
    # The second one first: where it fails, the first waits for it in vain.
    second, first = (util.finish(process).stderr for process in reversed(processes))
    assert list(util.iterations(first)) == [1, 2, 3]
    assert 'World size (gpu number): 2' in first
    assert first.count('# psnr: ') == 2
    assert util.iterations(second) == {}
    assert (tmp_path / 'experiments' / 'tiny' / 'training_states' / '3.state').is_file()


def test_a_script_of_the_users_own_runs_basicsrs_pipeline(tiny: Path, trained: util.Training, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / 'root', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    script = tmp_path / 'script.py'
    script.write_text(f'import attnsr\nfrom basicsr.train import train_pipeline\n\ntrain_pipeline({str(root)!r})\n')
    log = util.run(script, '-opt', tiny, '--force_yml', 'train:total_iter=4', cwd=elsewhere).stderr
    expected = util.iterations(trained.process.stderr)
    assert util.iterations(log) == {number: expected[number] for number in range(1, 5)}
    experiment = root / 'experiments' / 'tiny'
    assert {path.name for path in (experiment / 'models').iterdir()} == {'net_g_3.pth', 'net_g_latest.pth'}
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in root.iterdir()] == ['experiments']


def test_cluster_centres_resume_as_if_there_had_been_no_stop(tmp_path: Path) -> None:
    """LCoAN's k-means, whose centres move in every iteration, stopped half-way: the same weights and averages."""
    options = util.build_tiny(tmp_path)
    network = 'type: LCoAN\n  upscale: 2\n  num_feat: 8\n  num_groups: 2\n  num_blocks: 1\n  num_clusters: 4\n'
    network += '  ema_decay: 0.9\n'
    text = re.sub(r'(?<=network_g:\n  )(.*\n)*?(?=\npath)', network, options.read_text())
    options.write_text(text.replace('val_freq: 10', 'val_freq: 6'))

    def train(name: str, iterations: int, *more: str) -> None:
        changes = ('--force_yml', f'name={name}', f'train:total_iter={iterations}')
        util.run('-m', 'attnsr', 'train', '-opt', options, *more, *changes, cwd=tmp_path)

    train('whole', 6)
    train('parts', 3)
    train('parts', 6, '--auto_resume')
    whole, parts = (weights(tmp_path / 'experiments' / name / 'models' / 'net_g_6.pth') for name in ('whole', 'parts'))
    assert_same_weights(whole, parts)
    centres = 'body.0.attention.0.kmeans.means'
    assert torch.equal(whole[f'params.{centres}'], whole[f'params_ema.{centres}'])
    before = weights(tmp_path / 'experiments' / 'whole' / 'models' / 'net_g_3.pth')
    assert not torch.equal(before[f'params.{centres}'], whole[f'params.{centres}'])
