"""The command line: what it prints, where it writes, how it fails."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import util
from networks import build

from attnsr.cli import main
from attnsr.options import shipped


def basicsr(*arguments: str | Path, cwd: Path) -> subprocess.Popen:
    """Start the installed command."""
    return util.start(Path(sys.executable).with_name('basicsr'), *arguments, cwd=cwd)


def test_the_installed_command_explains_itself_and_what_is_wrong(tmp_path: Path) -> None:
    explains = basicsr('--help', cwd=tmp_path)
    fails = basicsr('train', '-opt', 'options/elan_x5.yml', cwd=tmp_path)
    assert 'basicsr train -opt options/demo_x2.yml' in util.finish(explains).stdout
    failed = util.finish(fails, status=2)
    assert failed.stdout == ''
    assert failed.stderr.splitlines()[-1].startswith('options/elan_x5.yml: there is no such file; did you mean elan_x')
    assert 'Traceback' not in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('command', 'example'),
    [
        ('', 'basicsr prepare sample'),
        ('train', 'torchrun --nproc_per_node 2 -m attnsr train -opt options/elan_x4.yml --launcher pytorch'),
        ('test', 'basicsr test -opt options/elan_x4.yml -w net.pth'),
        ('prepare', 'basicsr prepare div2k ~/downloads'),
        ('plot', 'basicsr plot ELAN_light_x4 ASID_x4 -o both.pdf'),
        ('upscale', 'basicsr upscale photo.jpg -o large.png -w ELAN_light_x4.pth'),
        ('inspect', 'basicsr inspect -w elan_light_x4.pth picture.png'),
        ('export', 'basicsr export -w elan_light_x4.pth -o elan_light_x4.onnx'),
        ('list', 'basicsr list --json'),
        ('bench', 'basicsr bench all --quick'),
        ('bench networks', 'basicsr bench networks elan_light asid --dtype float32'),
        ('prepare pairs', "basicsr prepare pairs HR --lr 'LR_bicubic/X{scale}' --scale 2 3 4 --out datasets/mine"),
    ],
)
def test_every_command_has_help_with_examples(command: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), '--help'])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert 'examples:\n' in out
    assert example in out
    if command in ('train', 'test'):
        assert all(name in out for name in shipped())


def test_the_examples_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Each names an option file that ships and arguments that there are."""
    with pytest.raises(SystemExit):
        main(['--help'])
    for command in ('train', 'test', 'upscale', 'inspect', 'export', 'prepare', 'plot', 'list', 'bench'):
        with pytest.raises(SystemExit):
            main([command, '--help'])
    examples = re.findall(r'^  (?:basicsr|torchrun.*attnsr) (.*?)(?:  .*)?$', capsys.readouterr().out, re.MULTILINE)
    assert len(examples) > 10
    for example in examples:
        words = example.split()
        with pytest.raises(SystemExit) as ended:
            main([*words, '--help'])
        assert ended.value.code == 0
        if '-opt' in words and not words[words.index('-opt') + 1].startswith('my_'):
            assert Path(words[words.index('-opt') + 1]).stem in shipped()


def test_an_unknown_command_is_answered_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(['trian'])
    assert ended.value.code == 2
    choices = r"'?train'?, '?test'?, '?upscale'?, '?inspect'?, '?export'?, '?prepare'?, '?plot'?, '?list'?, '?bench'?"
    assert re.search(rf"invalid choice: '?trian'? \(choose from {choices}\)", capsys.readouterr().err)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['basicsr'])  # which main() changes
    return tmp_path


def test_a_shipped_option_file_is_found_from_anywhere(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', '-opt', 'elan_light_x4', '--force_yml', 'num_gpu=0']) == 2
    err = capsys.readouterr().err
    for key in ('train.dataroot_gt', 'train.dataroot_lq'):
        assert re.search(
            rf'options/elan_light_x4\.yml: datasets\.{key}: datasets/DIV2K/\S+\.lmdb does not exist; .*; '
            '`basicsr prepare div2k DIR` makes it\n',
            err,
        )
    assert list(elsewhere.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(
    elsewhere: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / 'file').touch()
    assert main(['train', '-opt', str(tiny), '--force_yml', f'path:experiments_root={elsewhere}/file/in']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{elsewhere}/file/in')
    assert line.endswith(': Not a directory')


def test_kernels_that_cannot_be_had_are_told_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    variables = {'ATTNSR_BACKEND': 'triton', 'CUDA_VISIBLE_DEVICES': '', 'TRITON_INTERPRET': '0'}
    command = ('-m', 'attnsr', 'train', '-opt', tiny, '--force_yml', 'num_gpu=1')
    told = util.run(*command, cwd=tmp_path, variables=variables, status=2).stderr
    assert f'{tiny}: num_gpu: is 1, and PyTorch sees none' in told
    assert f"{tiny}: network_g: ELAN: the backend 'triton' was asked for, and cannot be had: the tensors are" in told
    assert 'Traceback' not in told
    assert list(tmp_path.iterdir()) == []


def test_a_test_of_a_training_takes_its_newest_checkpoint(tiny: Path, trained: util.Training, tmp_path: Path) -> None:
    """The newest by time: that of iteration 30, at which the training has validated too."""
    shutil.copytree(trained.experiment, tmp_path / 'experiments' / 'tiny')
    newest = tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_30.pth'
    os.utime(newest)
    ended = util.run('-m', 'attnsr', 'test', '-opt', tiny, cwd=tmp_path)
    results = tmp_path / 'results' / 'tiny'
    report = json.loads((results / 'results.json').read_text())
    assert report['weights'] == str(newest)
    validated = re.findall(r'# psnr: ([\d.]+)', trained.process.stderr)[2]
    (found,) = report['datasets']
    assert (found['name'], found['images']) == ('Whole', 9)
    assert f'{found["metrics"]["psnr"]:.4f}' == validated

    table = ended.stdout
    assert re.search(rf'^Whole +9 +{float(validated):.2f} ', table, re.MULTILINE)
    assert table.splitlines()[-2:] == [str(results / 'results.json'), str(results / 'results.md')]
    assert f'| Whole | 9 | {float(validated):.2f} |' in (results / 'results.md').read_text()


def test_weights_in_a_torn_file_are_one_line(tiny: Path, trained: util.Training, tmp_path: Path) -> None:
    torn = tmp_path / 'torn.pth'
    torn.write_bytes((trained.experiment / 'models' / 'net_g_latest.pth').read_bytes()[:-100])
    ended = util.run('-m', 'attnsr', 'test', '-opt', tiny, '-w', torn, cwd=tmp_path, status=2)
    (line,) = ended.stderr.splitlines()
    assert f'{torn}: this file is torn' in line
    assert not (tmp_path / 'results').exists()


def on_a_terminal(*arguments: str | Path, cwd: Path) -> str:
    """What a command shows on a terminal of 200 columns, its standard output and errors together."""
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack('HHHH', 50, 200, 0, 0))
    process = util.start('-m', 'attnsr', *arguments, cwd=cwd, stdout=process_side, stderr=process_side)
    os.close(process_side)
    shown = b''
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux tells that nobody is left on the other side
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    text = shown.decode()
    assert process.wait(util.PATIENCE) == 0, text
    return text


def test_a_terminal_has_a_bar_and_the_files_lie_where_the_option_file_says(tiny: Path, tmp_path: Path) -> None:
    root, current = tmp_path / 'root', tmp_path / 'current'
    current.mkdir()
    force = ('train:total_iter=5', 'logger:use_tb_logger=true', f'path:experiments_root={root}')
    shown = on_a_terminal('train', '-opt', tiny, '--force_yml', *force, cwd=current)
    bars = re.findall(r'\r[^\r\n]*?\| (\d)/5 \[[^\r\n]*?(?:it/s|s/it), l_pix [^\r\n]*\]', shown)
    assert bars
    assert bars[-1] == '5'
    assert list(util.iterations(shown)) == [1, 2, 3, 4, 5]

    assert list(current.iterdir()) == []
    assert {path.name for path in root.iterdir()} == {'tiny', 'tb_logger'}
    assert (root / 'tiny' / 'models' / 'net_g_latest.pth').is_file()
    assert list((root / 'tb_logger' / 'tiny').glob('events.out.tfevents.*'))
    (log,) = (root / 'tiny').glob('train_tiny_*.log')
    assert list(util.iterations(log.read_text())) == [1, 2, 3, 4, 5]
    assert '\r' not in log.read_text()


def test_a_pipe_has_plain_lines_only(trained: util.Training) -> None:
    shown = trained.process.stdout + trained.process.stderr
    assert not re.search(r'\r|\x1b|it/s|s/it', shown)


@pytest.mark.parametrize('seconds', [0.1, 0.7])
def test_ctrl_c_while_libraries_are_imported_is_one_line(seconds: float, tmp_path: Path) -> None:
    script = 'import sys; from basicsr_command import main; print(flush=True); sys.exit(main())'
    process = util.start('-c', script, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert util.finish(process, 130).stderr == 'interrupted\n'


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    torch.save(build('ASID', upscale=2).state_dict(), tmp_path / 'net.pth')
    limited = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); from attnsr.cli import main; '
    script = limited + 'raise SystemExit(main(["export", "-w", "net.pth", "-o", "net.safetensors"]))'
    assert util.run('-c', script, cwd=tmp_path, status=1).stderr == 'net.safetensors: File too large\n'
    assert [path.name for path in tmp_path.iterdir()] == ['net.pth']
