"""`basicsr inspect`: the files it writes, and what it says of what is wrong."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from inspection import scenes
from PIL import Image

from attnsr.cli import main
from attnsr.inspection import command, lam

OWN = {
    'ELAN': ['windows'],
    'DLGSANet': ['kernels', 'sparsity'],
    'ASID': ['maps', 'distillation'],
    'LCoAN': ['clusters', 'tokens'],
}


@pytest.fixture(scope='module')
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('picture') / 'edge.png'
    Image.fromarray((255 * scenes.make().image).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in an empty folder; its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(['inspect', *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has any weights be those of a small network."""

    def use(name: str) -> None:
        monkeypatch.setattr(command, 'load_network', lambda *_: networks.build(name, upscale=2).eval())

    return use


@pytest.mark.parametrize('name', OWN)
def test_every_figure_is_a_file(name: str, net: Callable, picture: Path, said: Callable) -> None:
    net(name)
    status, out, err = said('-w', 'x', picture, '--steps', 2, '--lam-size', 16, '-o', 'figures/here')
    assert status == 0
    files = [f'figures/here/edge_{name.lower()}_x2_{what}.png' for what in [*OWN[name], 'lam']]
    assert out.splitlines() == files
    assert sorted(os.listdir('figures/here')) == sorted(Path(file).name for file in files)
    assert err.startswith('pixel ')
    for file in files:
        with Image.open(file) as image:
            assert min(image.size) > 500
            assert np.asarray(image.convert('L')).std() > 10


def test_weights_are_recognised_and_figures_chosen(picture: Path, said: Callable) -> None:
    torch.save(networks.build('ASID', upscale=3).state_dict(), 'weights.pth')
    status, out, err = said('-w', 'weights.pth', picture, '--what', 'maps', '--pixel', '5,6', '--size', 32)
    assert (status, out) == (0, 'inspection/edge_asid_x3_maps.png\n')
    assert err == f'{picture} has 48 x 40 pixels: the attention is that within 32 x 32 at (0, 0) (--size)\n'
    assert said('-w', 'weights.pth', picture, '--what', 'distillation', '--block', 0)[0] == 0


def test_a_region_takes_the_pixel_with_it(net: Callable, picture: Path, said: Callable) -> None:
    net('ASID')
    status, out, err = said('-w', 'x', picture, '--what', 'lam', '--region', '30,20,4,6', '--steps', 1)
    assert (status, out) == (0, 'inspection/edge_asid_x2_lam.png\n')
    assert err == 'pixel 32,23: in the middle of the region; choose another by --pixel X,Y\n'


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('ELAN', ['--what', 'maps'], '--what maps: ELAN has windows, attention, lam, all'),
        ('DLGSANet', ['--what', 'x'], '--what x: DLGSANet has kernels, sparsity, attention, lam, all'),
        ('ELAN', ['--block', '2'], '--block 2: the blocks are numbered from 0 to 1'),
        ('DLGSANet', ['--block', '-1'], '--block -1: the layers are numbered from 0 to 1'),
        ('ASID', ['--block', '2'], '--block 2: the groups are numbered from 0 to 1'),
        ('LCoAN', ['--block', '0'], '--block: all groups of LCoAN attend as the first one does; leave it out'),
        ('ASID', ['--pixel', '48,0'], '--pixel 48,0 is outside {}: X is from 0 to 47, Y from 0 to 39'),
        ('ASID', ['--region', '40,0,9,4'], '--region 40,0,9,4 is not within the picture, which has 48 x 40 pixels'),
        ('ASID', ['--region', '900,1,4,4'], '--region 900,1,4,4 is not within the picture, which has 48 x 40 pixels'),
        ('ASID', ['--region', '0,0,1,4'], '--region 0,0,1,4: must be at least 2 pixels wide and high'),
        (
            'ASID',
            ['--region', '0,0,30,4', '--lam-size', '16'],
            '--region 0,0,30,4: must be at most --lam-size = 16 pixels wide and high',
        ),
        ('ASID', ['--size', '4'], '--size must be at least 16, got 4'),
        ('ASID', ['--lam-size', '4'], '--lam-size must be at least 16, got 4'),
        ('ASID', ['--steps', '0'], '--steps must be at least 1, got 0'),
        ('ASID', ['--device', 'abacus'], 'device abacus; valid here: auto, cpu'),
    ],
)
def test_what_is_wrong_is_one_line(
    name: str, arguments: list[str], message: str, net: Callable, picture: Path, said: Callable
) -> None:
    net(name)
    status, out, err = said('-w', 'x', picture, *arguments)
    assert (status, out) == (2, '')
    assert err.startswith(message.format(picture))
    assert err.count('\n') == 1
    assert os.listdir() == []


def test_weights_and_pictures_that_do_not_do(picture: Path, said: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said('-w', 'nowhere.pth', picture)
    assert (status, err.count('\n')) == (2, 1)
    assert err.startswith('nowhere.pth: there is no such file')
    untrained = networks.archs.LCoAN(upscale=2)
    torch.save(untrained.state_dict(), 'untrained.pth')
    status, _, err = said('-w', 'untrained.pth', picture, '--pixel', '1,1')
    assert status == 2
    assert err == 'untrained.pth: these cluster centres were never initialised: load a checkpoint or train first\n'
    broken = networks.build('ASID', upscale=2)
    with torch.no_grad():
        broken.input.weight[:] = float('nan')
    torch.save(broken.state_dict(), 'broken.pth')
    for what in ('maps', 'lam'):
        steps = ['--steps', 1] if what == 'lam' else []
        status, _, err = said('-w', 'broken.pth', picture, '--pixel', '1,1', '--what', what, *steps)
        assert (status, err.count('\n')) == (2, 1)
        assert 'the network gives values that are no numbers' in err
    for wrong in ('1', '1,2,3', 'a,b', '1.5,2'):
        with pytest.raises(SystemExit) as ended:
            said('-w', 'x', picture, '--pixel', wrong)
        assert ended.value.code == 2
        assert 'is not 2 integers with commas between, such as 120,64' in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_and_an_interruption(
    net: Callable, picture: Path, said: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    net('ASID')
    Path('file').touch()
    status, _, err = said('-w', 'x', picture, '-o', 'file/in', '--pixel', '1,1')
    assert (status, err) == (1, 'file/in cannot be written: Not a directory\n')

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lam, 'attribute', interrupted)
    status, _, err = said('-w', 'x', picture, '--what', 'lam', '--pixel', '9,9')
    assert (status, err) == (130, 'interrupted\n')
    assert os.listdir('inspection') == []


def test_matplotlib_is_asked_for(picture: Path, said: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    status, _, err = said('-w', 'x', picture)
    assert (status, err) == (2, "matplotlib is not installed; pip install 'attnsr[plot]'\n")
