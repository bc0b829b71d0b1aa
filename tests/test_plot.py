"""Training curves: the values of the logs, at the iterations they belong to, whatever interrupted the training."""

import os
import sys
from pathlib import Path

import pytest
import util
from PIL import Image

from attnsr import plot
from attnsr.cli import main
from attnsr.errors import UsageError

HEAD = """\
2026-11-21 23:04:58,237 INFO: options
  train:[
    total_iter: {total}
  ]
  val:[
    val_freq: {val_freq}
  ]
2026-11-21 23:04:58,270 INFO: Start training from epoch: 0, iter: {start}
"""


def iteration(number: int, loss: float, rate: str = '1.000e-03') -> str:
    return (
        f'2026-11-21 23:04:58,374 INFO: [run..][epoch:  0, iter:{number:8,d}, lr:({rate},)] '
        f'[eta: 1 day, 0:00:00, time (data): 0.104 (0.089)] l_pix: {loss:.4e} l_fft: {2 * loss:.4e} \n'
    )


def validation(data_set: str, psnr: float) -> str:
    return f'2026-11-21 23:04:58,662 INFO: Validation {data_set}\n\t # psnr: {psnr:.4f}\tBest: 40.0000 @ 10 iter\n\n'


def write_log(folder: Path, time: str, start: int, *lines: str, val_freq: int = 100, total: int = 1000) -> None:
    folder.mkdir(exist_ok=True)
    head = HEAD.format(total=total, val_freq=val_freq, start=start)
    (folder / f'train_run_20261121_{time}.log').write_text(head + ''.join(lines))


def test_curves_of_a_real_training(trained: util.Training) -> None:
    curves = plot.read(trained.experiment)
    logged = util.iterations(trained.process.stderr)
    assert curves.name == 'tiny'
    assert {n: f'l_pix: {value:.4e}' for n, value in curves.losses['l_pix'].items()} == {
        n: losses for n, (_, _, losses) in logged.items()
    }
    assert curves.rate == {n: 1e-3 if n <= 20 else 5e-4 if n <= 30 else 2.5e-4 for n in range(1, 41)}
    assert list(curves.metrics) == [('psnr', 'Whole')]
    assert list(curves.metrics['psnr', 'Whole']) == [10, 20, 30, 40]
    figure = plot.draw([curves])
    panels = {axes.get_title(loc='left'): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ['l_pix', 'learning rate', 'PSNR, dB']
    line = panels['PSNR, dB'].lines[0]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == curves.metrics['psnr', 'Whole']


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    lost = [iteration(n, n) for n in (100, 200, 300)]
    write_log(tmp_path / 'run', '100000', 0, *lost[:2], validation('A', 20), lost[2], validation('A', 30))
    write_log(tmp_path / 'run', '110000', 150, iteration(200, 7), validation('A', 25), validation('B', 5))
    curves = plot.read(tmp_path / 'run')
    assert curves.losses == {'l_pix': {100: 100, 200: 7}, 'l_fft': {100: 200, 200: 14}}
    assert curves.metrics == {('psnr', 'A'): {200: 25}, ('psnr', 'B'): {200: 5}}


@pytest.mark.parametrize(
    ('val_freq', 'printed', 'expected'),
    [(100, 100, [100, 200]), (50, 100, [50, 100, 150, 200]), (10, 30, [10, 20, 30]), (30, 20, [30, 60])],
    ids=str,
)
def test_validations_belong_to_the_iterations_between(
    tmp_path: Path, val_freq: int, printed: int, expected: list[int]
) -> None:
    lines = []
    for n in range(1, expected[-1] + 1):
        lines += [iteration(n, 1)] if n % printed == 0 else []
        lines += [validation('A', n)] if n % val_freq == 0 else []
    end = '2026-11-21 23:04:59,608 INFO: End of training. Time consumed: 0:00:01\n'
    write_log(tmp_path / 'run', '100000', 0, *lines, end, validation('A', 7), val_freq=val_freq, total=333)
    found = plot.read(tmp_path / 'run').metrics['psnr', 'A']
    assert found == {**{n: float(n) for n in expected}, 333: 7.0}


def test_values_that_are_no_numbers_and_large_ones(tmp_path: Path) -> None:
    strange = iteration(1000, 1).replace('1.0000e+00', 'nan').replace('2.0000e+00', 'inf')
    write_log(tmp_path / 'run', '100000', 0, strange, iteration(1_234_000, 2))
    curves = plot.read(tmp_path / 'run')
    assert list(curves.rate) == [1000, 1_234_000]
    assert str(curves.losses['l_pix']) == '{1000: nan, 1234000: 2.0}'
    assert plot.draw([curves]).axes


def test_several_runs_in_one_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir('experiments')
    for name in ('first', 'second'):
        lines = [iteration(n, 1 / n) for n in range(1, 200)]
        write_log(Path('experiments', name), '100000', 0, *lines, validation('Set5', 30), validation('Set14', 28))
    assert main(['plot', 'first', 'experiments/second']) == 0
    assert capsys.readouterr().out == 'curves.png\n'
    with Image.open('curves.png') as picture:
        assert picture.width == 1200
    assert main(['plot', 'first', '-o', 'one.svg']) == 0
    assert Path('one.svg').read_text().startswith('<?xml')
    figure = plot.draw([plot.read(Path('experiments', name)) for name in ('first', 'second')])
    legend = next(axes for axes in figure.axes if axes.get_title(loc='left') == 'PSNR, dB').get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *('first, Set5', 'first, Set14', 'second, Set5', 'second, Set14'),
    ]


def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        assert main(['plot', *arguments]) == 2
        return capsys.readouterr().err

    assert said('x') == 'x: there is no such folder, nor an experiment of this name; in ./experiments there is none\n'
    write_log(tmp_path / 'run', '100000', 0, iteration(1, 1))
    (tmp_path / 'experiments' / 'ELAN_x4').mkdir(parents=True)
    assert said('x').endswith('of this name; in ./experiments there is ELAN_x4\n')
    assert said('ELAN_x4').startswith('experiments/ELAN_x4: holds no train_*.log; name the folder of an experiment')
    write_log(tmp_path / 'experiments' / 'ELAN_x4', '100000', 0)
    assert said('ELAN_x4').startswith('experiments/ELAN_x4: its logs hold no iteration yet')
    assert said('run', '-o', 'x.jpg') == 'x.jpg: the name of the figure must end in .png, .pdf or .svg\n'
    assert main(['plot', 'run', '-o', 'missing/x.png']) == 1
    assert capsys.readouterr().err == 'missing/x.png cannot be written: No such file or directory\n'


def test_matplotlib_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / 'run', '100000', 0, iteration(1, 1))
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UsageError, match=r"matplotlib is not installed; pip install 'attnsr\[plot\]'"):
        plot.write([str(tmp_path / 'run')], tmp_path / 'x.png')
