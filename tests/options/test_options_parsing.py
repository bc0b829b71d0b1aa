"""``parse_options``: BasicSR's results from a checked file, and nothing on disk before the check."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.utils import dist_util, make_exp_dirs
from basicsr.utils.misc import check_resume

from attnsr import options
from attnsr.options import OptionError

Parse = Callable[..., tuple[dict[str, Any], Any]]


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[str], str]) -> Parse:
    """Parses a command line for a text as the option file, in an empty folder ``work`` as root."""
    work = tmp_path / 'here'
    work.mkdir()
    monkeypatch.chdir(work)

    def parse_text(text: str, *arguments: str, is_train: bool = True) -> tuple[dict[str, Any], Any]:
        monkeypatch.setattr('sys.argv', ['basicsr', '-opt', write(text), *arguments])
        return options.parse_options(str(work), is_train=is_train)

    return parse_text


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(OptionError) as error:
        call()
    return error.value.problems


def folders(root: Path) -> list[str]:
    return sorted(str(Path(folder, name).relative_to(root)) for folder, names, _ in os.walk(root) for name in names)


def test_training(parse: Parse, training: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opt, args = parse(training)
    root = str(tmp_path / 'here' / 'experiments' / 'small')
    assert opt['path'] == {
        'experiments_root': root,
        'models': f'{root}/models',
        'training_states': f'{root}/training_states',
        'log': root,
        'visualization': f'{root}/visualization',
    }
    assert (opt['is_train'], opt['dist'], opt['rank'], opt['world_size'], opt['num_gpu']) == (True, False, 0, 1, 0)
    assert opt['logger'] == {'print_freq': 10, 'save_checkpoint_freq': 5000, 'use_tb_logger': False}
    assert (opt['val']['save_img'], opt['val']['suffix'], opt['auto_resume']) == (False, None, False)
    train, val = opt['datasets']['train'], opt['datasets']['val']
    assert (train['phase'], train['scale'], train['use_hflip'], train['use_rot']) == ('train', 2, True, True)
    assert (val['phase'], val['scale'], 'use_rot' in val) == ('val', 2, False)
    assert args.opt == str(tmp_path / 'options.yml')
    assert options.source_text(args.opt) == training
    assert capfd.readouterr().out == ''
    assert os.listdir() == []

    make_exp_dirs(opt)
    assert folders(tmp_path / 'here') == [
        'experiments',
        'experiments/small',
        'experiments/small/models',
        'experiments/small/training_states',
        'experiments/small/visualization',
    ]


def test_defaults_let_basicsr_read_the_data(parse: Parse, training: str) -> None:
    from basicsr.data import build_dataset

    text = training.replace('    io_backend:\n      type: lmdb\n', '').replace(
        '    io_backend:\n      type: disk\n', ''
    )
    opt, _ = parse(text.replace('num_gpu: 0\n', '').replace('logger:\n  print_freq: 10\n', ''))
    assert opt['num_gpu'] == torch.cuda.device_count()
    assert opt['datasets']['train']['io_backend'] == {'type': 'lmdb'}
    assert opt['logger']['print_freq'] == 100
    pair = build_dataset(opt['datasets']['val'])[3]
    assert pair['gt'].shape == (3, 48, 60)
    assert pair['lq'].shape == (3, 24, 30)


def test_bad_file_leaves_no_folder_and_starts_nothing(
    parse: Parse, training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(dist_util, 'init_dist', lambda *args, **kwargs: started.append(args))
    file = str(tmp_path / 'options.yml')
    assert problems(lambda: parse(training.replace('gamma', 'gama'), '--launcher', 'pytorch')) == [
        f'{file}: train.scheduler.gama: is not an option; did you mean gamma?'
    ]
    assert problems(lambda: parse(training, '--force_yml', 'train:total_iter=none', 'scale=2')) == [
        f'{file}: train.total_iter: is ~; it must be a whole number of at least 1'
    ]
    (line,) = problems(lambda: parse(training, '--force_yml', 'train:optim_g:learning_rate=1'))
    assert line.startswith(f'{file}: train.optim_g.learning_rate: is not an option of Adam; valid are: lr, betas, ')
    assert started == []
    assert folders(tmp_path) == ['here']


def test_code_in_overrides_does_not_run(parse: Parse, training: str, tmp_path: Path) -> None:
    mark = tmp_path / 'ran'
    code = f"__import__('os').system('touch {mark}')"
    (line,) = problems(lambda: parse(training, '--force_yml', f'name=!!python/object/apply:os.system [touch {mark}]'))
    assert ':1:1: the tag !!python/object/apply:os.system is refused and nothing was run' in line
    assert (
        'it must be text that can name a folder' in problems(lambda: parse(training, '--force_yml', f'name={code}'))[0]
    )
    assert 'is not an option' in problems(lambda: parse(training, '--force_yml', f'{code}=1'))[0]
    assert not mark.exists()


def test_overrides(parse: Parse, training: str) -> None:
    opt, _ = parse(training, '--force_yml', 'train:optim_g:lr=1e-4', 'manual_seed=5', 'val:metrics=~', 'name=other')
    assert opt['train']['optim_g']['lr'] == 1e-4
    assert (opt['manual_seed'], opt['val']['metrics'], opt['name']) == (5, None, 'other')
    assert opt['path']['log'].endswith('/experiments/other')


def test_seeds(parse: Parse, training: str) -> None:
    parse(training, '--force_yml', 'manual_seed=7')
    first = random.random(), torch.rand(1).item()
    parse(training, '--force_yml', 'manual_seed=7')
    assert (random.random(), torch.rand(1).item()) == first
    drawn = {parse(training.replace('manual_seed: 0\n', ''))[0]['manual_seed'] for _ in range(5)}
    assert drawn <= set(range(1, 10001))
    random.seed(3)
    expected = random.randint(1, 10000)
    random.seed(3)
    assert parse(training.replace('manual_seed: 0\n', ''))[0]['manual_seed'] == expected


def test_debug(parse: Parse, training: str) -> None:
    opt, _ = parse(training, '--debug')
    assert opt['name'] == 'debug_small'
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)
    assert opt['path']['models'].endswith('/experiments/debug_small/models')


def test_roots_and_home(
    parse: Parse, training: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    os.symlink(data, tmp_path / 'data')
    torch.save({}, tmp_path / 'first.pth')
    paths = (
        'path:\n  experiments_root: ~/runs\n  results_root: ~/tests\n  pretrain_network_g: ~/first.pth\n'
        '  strict_load_g: false\n  param_key_g: ~\n  resume_state: ~\n  ignore_resume_networks: [network_g]\n'
    )
    opt, _ = parse(training.replace(f'{data}/hr.lmdb', '~/data/hr.lmdb') + paths)
    root = f'{tmp_path}/runs/small'
    assert opt['datasets']['train']['dataroot_gt'] == f'{tmp_path}/data/hr.lmdb'
    assert opt['path'] == {
        'pretrain_network_g': f'{tmp_path}/first.pth',
        'strict_load_g': False,
        'param_key_g': None,
        'resume_state': None,
        'ignore_resume_networks': ['network_g'],
        'experiments_root': root,
        'models': f'{root}/models',
        'training_states': f'{root}/training_states',
        'log': root,
        'visualization': f'{root}/visualization',
    }
    make_exp_dirs(opt)
    assert folders(tmp_path / 'here') == []
    assert folders(tmp_path / 'runs') == ['small', 'small/models', 'small/training_states', 'small/visualization']
    opt['path']['resume_state'] = 'some.state'
    check_resume(opt, 20)
    assert opt['path']['pretrain_network_g'] == f'{tmp_path}/first.pth'


@pytest.mark.parametrize(('gpus', 'backend'), [(0, 'gloo'), (1, 'nccl')])
def test_process_group(gpus: int, backend: str, parse: Parse, training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(dist_util, 'init_dist', lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(dist_util, 'get_dist_info', lambda: (1, 2))
    text = training.replace('num_gpu: 0', 'num_gpu: auto') + 'dist_params:\n  backend: nccl\n  port: 29501\n'
    opt, _ = parse(text, '--launcher', 'pytorch')
    assert (opt['dist'], opt['rank'], opt['world_size']) == (True, 1, 2)
    parse(text, '--launcher', 'slurm')
    assert calls == [(('pytorch',), {'backend': backend}), (('slurm',), {'backend': backend, 'port': 29501})]


# Tests ---------------------------------------------------------------------------------------------------------------


def test_testing_a_test_file(parse: Parse, training: str, data: Path, tmp_path: Path) -> None:
    head, rest = training.split('datasets:\n')
    text = (
        f'{head}datasets:\n  test_1: {{name: A, type: PairedImageDataset, dataroot_gt: {data}/hr.lmdb, '
        f'dataroot_lq: {data}/lr_x2.lmdb}}\n  test_2: {{name: B, type: SingleImageDataset, meta_info_file: ~, '
        f'dataroot_lq: {data}/lr_x2}}\nnetwork_g:{rest.split("network_g:")[1].split("train:")[0]}'
    )
    file, weights = str(tmp_path / 'options.yml'), tmp_path / 'net.pth'
    missing = f'{file}: path.pretrain_network_g: is missing, and a test needs weights; name a file there or by -w FILE'
    assert problems(lambda: parse(text, is_train=False)) == [missing]
    (line,) = problems(lambda: parse(text, '-w', str(weights), is_train=False))
    assert line.startswith(f'{file}: path.pretrain_network_g: {weights} does not exist')
    torch.save({}, weights)
    torch.save({}, tmp_path / 'other.pth')
    paths = f'path:\n  pretrain_network_g: {weights}\n  results_root: {tmp_path}/out\n  experiments_root: elsewhere\n'
    opt, _ = parse(text + paths, '--weights', str(tmp_path / 'other.pth'), is_train=False)
    root = f'{tmp_path}/out/small'
    assert opt['path'] == {
        'pretrain_network_g': str(tmp_path / 'other.pth'),
        'results_root': root,
        'log': root,
        'visualization': f'{root}/visualization',
    }
    assert opt['val'] == {'save_img': False, 'suffix': None, 'metrics': None}
    assert [each['phase'] for each in opt['datasets'].values()] == ['test', 'test']
    assert 'meta_info_file' not in opt['datasets']['test_2']
    make_exp_dirs(opt)
    assert folders(tmp_path / 'here') == []
    assert folders(tmp_path / 'out') == ['small', 'small/visualization']
    keys = [line.split(': ')[1] for line in problems(lambda: parse(text))]
    assert keys == ['train', 'datasets.test_1', 'datasets.test_2', 'datasets.train']


def test_testing_a_training_file(parse: Parse, training: str, tmp_path: Path) -> None:
    file, models = str(tmp_path / 'options.yml'), tmp_path / 'here' / 'experiments' / 'small' / 'models'
    text = training.replace('hr.lmdb', 'moved.lmdb') + 'path:\n  pretrain_network_g: gone.pth\n  strict_load_g: false\n'
    assert problems(lambda: parse(text, is_train=False)) == [
        f'{file}: path.pretrain_network_g: is missing, and a test needs weights; {models} has no checkpoint '
        f'(net_g_*.pth) of it; name one by -w FILE, or make one: `basicsr train -opt {file}`'
    ]
    models.mkdir(parents=True)
    for age, name in enumerate(
        ('net_g_40.pth', 'net_g_latest.pth', 'net_g_20.pth', 'net_d_60.pth', 'net_g_60.pth.tmp')
    ):
        torch.save({}, models / name)
        os.utime(models / name, (1000, 2000 - age if name != 'net_d_60.pth' else 3000))
    opt, _ = parse(text, is_train=False)
    results = f'{tmp_path}/here/results/small'
    assert opt['path'] == {
        'param_key_g': 'params_ema',
        'pretrain_network_g': str(models / 'net_g_40.pth'),
        'results_root': results,
        'log': results,
        'visualization': f'{results}/visualization',
    }
    assert list(opt['datasets']) == ['val']
    assert not {'train', 'logger'} & set(opt)
    assert opt['is_train'] is False

    mine = tmp_path / 'mine.pth'
    torch.save({}, mine)
    opt, _ = parse(text.replace('  ema_decay: 0.9\n', ''), '-w', str(mine), is_train=False)
    assert opt['path']['pretrain_network_g'] == str(mine)
    assert 'param_key_g' not in opt['path']
    no_val = text.split('  val:\n')[0] + 'network_g:' + text.split('\nnetwork_g:')[1]
    assert problems(lambda: parse(no_val, '-w', str(mine), is_train=False)) == [
        f'{file}: datasets: has none to test on; valid are: val, val_*, test and test_* '
        '(of a training file, its val sets)'
    ]


@pytest.mark.parametrize('value', ['~', '[1]', '{}', '5', 'true'])
def test_odd_values_are_problems_in_tests_too(value: str, parse: Parse, training: str) -> None:
    text = training + 'path:\n  experiments_root: out\n'
    for key in ('name', 'path', 'path:experiments_root', 'datasets', 'datasets:val', 'train', 'val', 'model_type'):
        with pytest.raises(OptionError):
            parse(text, '--force_yml', f'{key}={value}', is_train=False)


def test_checkpoints_of_other_roots_and_debug_runs(parse: Parse, training: str, tmp_path: Path) -> None:
    models = tmp_path / 'runs' / 'debug_small' / 'models'
    models.mkdir(parents=True)
    torch.save({}, models / 'net_g_8.pth')
    opt, _ = parse(training + f'path:\n  experiments_root: {tmp_path}/runs\n', '--debug', is_train=False)
    assert opt['path']['pretrain_network_g'] == str(models / 'net_g_8.pth')
    assert opt['path']['results_root'] == f'{tmp_path}/here/results/debug_small'


def test_help_names_the_shipped_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for is_train in (True, False):
        monkeypatch.setattr('sys.argv', ['basicsr', '--help'])
        with pytest.raises(SystemExit):
            options.parse_options('.', is_train=is_train)
        text = capsys.readouterr().out
        assert all(name in text for name in options.shipped())
        assert ('--weights' in text) is not is_train
