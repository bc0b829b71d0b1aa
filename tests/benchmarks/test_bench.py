"""``basicsr bench``: no figures without agreement, results that are kept, tables and plots of them, and errors."""

import contextlib
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import networks as small_networks
import pytest
import torch
import util

from attnsr import archs, ops
from attnsr.benchmarks import command, measuring, networks, operations, results, shift_linear
from attnsr.benchmarks.measuring import SIZES, Limits, Size
from attnsr.benchmarks.operations import BACKWARD, FORWARD, Contestant
from attnsr.benchmarks.results import Figures, Measurement, Results
from attnsr.cli import main

LIMITS = Limits(1e10, {'float32': 1e11, 'bfloat16': 1e11})


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(measuring, 'LEAST_ROUNDS', 1)
    monkeypatch.setattr(command, 'limits', lambda device, dtypes: LIMITS)


def bench(*arguments):
    return main(['bench', *map(str, arguments)])


def results_in(folder):
    (path,) = folder.glob('*.json')
    return results.load(path)


def measurement(size='720p', dtype='float32', computed=FORWARD, what='shift_linear', **figures):
    extent = (SIZES[size].batch, SIZES[size].height, SIZES[size].width)
    figures = figures or {
        'kernel': Figures(0.001, 0.0009, 0.0012, 7, 1e-6, peak=10**6),
        'reference': Figures(0.004, 0.003, 0.005, 7, 1e-6, peak=4 * 10**6),
    }
    limit = None if what == 'networks' else (0.0005, 'bandwidth')
    return Measurement(what, 'ELAN', size, extent, dtype, computed, 'reference', 1e-3, figures, least_seconds=limit)


@pytest.mark.parametrize('name', command.OPERATIONS)
def test_every_contestant_of_every_mechanism_agrees(name, monkeypatch):
    monkeypatch.setattr(measuring, 'LEAST_ROUNDS', 1)
    cases = importlib.import_module(f'attnsr.benchmarks.{name}').CASES
    found = list(
        operations.measurements(
            name, cases, [SIZES['tiny_patches']], 'cpu', ['float32', 'bfloat16'], LIMITS, 0, ['torch.compile']
        )
    )
    assert {m.case for m in found} == {case.name for case in cases}
    assert {m.computed for m in found} == {FORWARD, BACKWARD}
    for m in found:
        rivals = next(case.rivals for case in cases if case.name == m.case)
        assert m.failed == {}
        assert list(m.figures) == ['reference', *(rival.name for rival in rivals if rival.backend == 'reference')]
        assert m.absent['kernel'] == 'the kernels need a CUDA device'
        assert all(of.seconds > 0 and of.peak > 0 for of in m.figures.values())
        assert m.least_seconds[0] > 0


def test_every_mechanism_that_has_a_kernel_is_measured():
    with_kernel = {path.parent.name for path in Path(ops.__path__[0]).glob('*/triton_kernel.py')}
    assert with_kernel <= set(command.OPERATIONS)


def test_a_run_prints_a_table_and_keeps_what_it_did_not_measure(few_rounds, tmp_path, capsys):
    kept = Results(measuring.machine('cpu'))
    kept.add(measurement())
    kept.save(tmp_path / f'{results.slug(kept.device)}.json')
    assert bench('shift_linear', '--device', 'cpu', '--quick', '--dtype', 'float32', '--output', tmp_path) == 0
    out = capsys.readouterr().out
    row = r'\| ELAN-light, expands +\| tiny_patches, 2 x 16 x 16 +\| float32 +\| forward, backward +\| reference '
    assert re.search(row + r'+\|( [\d.]+ +\|){2} \d+% \w+ +\|( [\d.]+ +\|){2} \d\.\de-\d\d \|$', out, re.MULTILINE)
    assert 'kernel is not to be had: the kernels need a CUDA device' in out
    assert 'torch.compile is not to be had: left out by --without' in out

    found = results_in(tmp_path).measurements
    assert found['shift_linear/ELAN/1x180x320/float32/forward'] == measurement()
    of_new = found['shift_linear/ELAN-light, reduces/2x16x16/float32/forward, backward']
    assert of_new.figures['as published'].rounds == 1
    assert of_new.environment['torch'] == torch.__version__
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(written) == {'.json', '.md', '.png'}
    assert [str(path) in out for path in written.values()] == [True] * 3
    assert '| ELAN                      | 720p, 1 x 180 x 320' in written['.md'].read_text()


def test_a_contestant_that_is_wrong_or_breaks_has_no_figures_and_the_status_is_1(
    few_rounds, tmp_path, monkeypatch, capsys
):
    def breaks(**tensors):
        raise ValueError('it broke')

    case = shift_linear.CASES[0]
    wrong = Contestant('wrong', lambda **tensors: case.function(**tensors) * 1.01)
    rivals = (wrong, Contestant('breaks', breaks), *case.rivals)
    monkeypatch.setattr(shift_linear, 'CASES', (replace(case, rivals=rivals),))
    options = ('--device', 'cpu', '--size', 'tiny_patches', '--dtype', 'float32', '--without', 'torch.compile')
    assert bench('shift_linear', *options, '--no-report', '--output', tmp_path) == 1
    out = capsys.readouterr().out
    for computed in (FORWARD, BACKWARD):
        m = results_in(tmp_path).measurements[f'shift_linear/{case.name}/2x16x16/float32/{computed}']
        assert list(m.figures) == ['reference', 'as published']
        assert re.fullmatch(r'its error is 0\.\d+, and the bound is 0\.001', m.failed['wrong'])
        assert m.failed['breaks'] == 'ValueError: it broke'
        assert f'{computed}: no figures for wrong: its error is 0.' in out
    assert len(re.findall(r'\| wrong +\| failed +\|', out)) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == ['.json']


def test_a_gradient_that_is_wrong_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    case = shift_linear.CASES[0]
    rival = Contestant('wrong', lambda x, **more: case.function(x=Wrong.apply(x), **more))
    (forward, backward) = operations.measurements(
        '', [replace(case, rivals=(rival,))], [SIZES['tiny_patches']], 'cpu', ['float32'], LIMITS, 0, ['torch.compile']
    )
    assert 'wrong' in forward.figures
    assert list(backward.failed) == ['wrong']


def test_a_network_is_measured_through_the_command_line(tmp_path, capsys):
    options = ('--device', 'cpu', '--quick', '--dtype', 'float32', '--threads', '1', '--no-report')
    assert bench('networks', 'asid', *options, '--output', tmp_path) == 0
    m = results_in(tmp_path).measurements['networks/ASID/1x32x48/float32/forward']
    assert list(m.figures) == ['SwinIR-light, float32', 'ASID, float32']
    for of in m.figures.values():
        assert of.error < 1e-4
        assert min(of.seconds, of.seconds_kept) > 0
        assert of.held > 10**8
        assert 10**6 < of.peak < 10**9
    assert 'times as fast as SwinIR-light, float32' in capsys.readouterr().out


def test_a_network_that_is_wrong_has_no_figures(tmp_path, monkeypatch, capsys):
    def answer(request, environment=None):
        if request.part == 'in turns':
            return [[1.0, 2.0]] * len(request.contestants)
        return {'held': 10**9, 'peak': 2 * 10**9, 'error': 0.5 if request.contestants[0][0] == 'asid' else 1e-6}

    monkeypatch.setattr(networks, '_in_fresh_process', answer)
    assert bench('networks', 'asid', 'elan_light', '--device', 'cpu', '--no-report', '--output', tmp_path) == 1
    found = results_in(tmp_path).measurements
    assert 'ASID, bfloat16' in found['networks/ASID/1x180x320/bfloat16/forward'].failed
    light = found['networks/ELAN-light/1x180x320/bfloat16/forward']
    assert list(light.figures) == ['SwinIR-light, float32', 'SwinIR-light, bfloat16', 'ELAN-light, bfloat16']
    assert light.remarks[1:] == [
        'ELAN-light, bfloat16 is 1.00 times as fast as SwinIR-light, bfloat16',
        'the input of SwinIR-light, float32 is 184 x 320, in whole windows',
    ]
    assert 'no figures for ASID, float32: its error is 0.5, and the bound is 0.0001' in capsys.readouterr().out


@pytest.mark.parametrize('training', [False, True], ids=['forward', 'training'])
@pytest.mark.parametrize('right', [True, False], ids=['right', 'wrong'])
def test_networks_on_a_gpu(training, right, monkeypatch):
    """With the CPU in its place, and the reference in that of the kernels."""
    asked_for = []

    def backend(name):
        asked_for.append(name)
        return contextlib.nullcontext()

    net = archs.ASID(upscale=4, **small_networks.SMALL['ASID'])
    entry = networks.Entry('tiny', lambda: net)
    monkeypatch.setattr(networks, 'ENTRIES', {'tiny': entry, 'swinir_light': entry})
    for name, value in {
        'DEVICE': 'cpu',
        'backend': backend,
        'captured': lambda call: call,
        'wall_timer': lambda device: measuring.wall_timer('cpu'),
        '_error': lambda found, expected: 1e-6 if right else float('nan'),
    }.items():
        monkeypatch.setattr(networks, name, value)
    monkeypatch.setattr(measuring, 'peak_memory', lambda call, device: 10**6)
    if not right:
        monkeypatch.setattr(torch.Tensor, 'norm', lambda self: torch.tensor(float('nan')))
    (m,) = networks.measurements('tiny', Size('tiny', 2, 16, 16, training), 'cuda', ['bfloat16'], 0)
    names = ['kernel', 'reference']
    if not training:
        names += ['kernel, CUDA graph', 'reference, CUDA graph', 'tiny']
    assert list(m.figures if right else m.failed) == names
    assert not (m.failed if right else m.figures)
    assert {'triton', 'reference'} <= set(asked_for)


def test_results_come_back_from_their_file_as_they_were(tmp_path):
    kept = Results('Some GPU')
    kept.add(measurement())
    kept.add(measurement(dtype='bfloat16'))
    kept.measurements['shift_linear/ELAN/1x180x320/bfloat16/forward'].failed['kernel'] = 'wrong'
    kept.save(tmp_path / 'gpu.json')
    assert results.load(tmp_path / 'gpu.json') == kept
    faster = measurement(reference=Figures(0.1, 0.1, 0.1, 3, 0.0))
    kept.add(faster)
    assert list(kept.measurements.values()) == [
        faster,
        results.load(tmp_path / 'gpu.json').measurements['shift_linear/ELAN/1x180x320/bfloat16/forward'],
    ]


def full_results(path):
    kept = Results('Some GPU')
    for size in ('720p', '1080p', '4K', 'training'):
        for dtype in ('float32', 'bfloat16'):
            for computed in (FORWARD, BACKWARD):
                kept.add(measurement(size, dtype, computed))
        kept.add(measurement(size, what='networks'))
    kept.save(path)


def test_tables_and_plots_are_made_from_a_file(tmp_path, capsys):
    full_results(tmp_path / 'some_gpu.json')
    assert bench('report', tmp_path / 'some_gpu.json') == 0
    *names, nothing = capsys.readouterr().out.split('\n')
    assert nothing == ''
    assert names == [str(tmp_path / f'some_gpu{end}') for end in ('.md', '_shift_linear.png', '_networks.png')]
    for name in names[1:]:
        assert Path(name).read_bytes().startswith(b'\x89PNG')
    text = Path(names[0]).read_text()
    assert re.search(r'\| kernel +\| 1\.00 +\| 4\.00 +\| 50% bandwidth +\| 1\.0 +\| 0\.25 +\| 1\.0e-06 +\|', text)


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    full_results(tmp_path / 'some_gpu.json')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert bench('report', tmp_path / 'some_gpu.json') == 0
    assert "matplotlib is not installed; pip install 'attnsr[bench]'" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.md'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['windows'], r"invalid choice: '?windows'? \(choose from '?all'?, .*'?window_attention'?, .*'?report'?\)"),
        (['networks', 'elan_lite'], r"there is no network 'elan_lite'; valid: elan, elan_light, .*lcoan"),
        (['ops', '--size', '8K'], r"invalid choice: '8K' \(choose from '?720p'?, .*\)"),
        (['ops', '--dtype', 'float8'], r"invalid choice: 'float8' \(choose from '?float32'?, '?bfloat16'?\)"),
        (['ops', '--without', 'kernel'], r"invalid choice: 'kernel' \(choose from '?scaled_dot.*'?torch.compile'?\)"),
        (['ops', '--seconds', '-1'], 'must be a number of at least 0, got -1'),
        (['ops', '--threads', '0'], 'must be a whole number of at least 1, got 0'),
    ],
)
def test_what_is_not_known_is_answered_with_what_is(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(*arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_gpu_that_is_not_there_is_one_line(tmp_path, capsys):
    assert bench('all', '--device', 'cuda', '--output', tmp_path / 'results') == 2
    assert capsys.readouterr().err == '--device: this PyTorch finds no CUDA device; valid here: cpu\n'
    assert not (tmp_path / 'results').exists()


def test_training_steps_are_measured_on_a_gpu(tmp_path, capsys):
    assert bench('networks', '--device', 'cpu', '--size', 'training', '--output', tmp_path) == 2
    assert '--size training: steps of training of networks are measured on a GPU only' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['{"device": "GPU"', '[]', '{}', '{"device": "", "measurements": {"a": {}}}'])
def test_a_file_that_holds_no_results_is_one_line(text, tmp_path, capsys):
    path = tmp_path / 'gpu.json'
    path.write_text(text)
    assert bench('report', path) == 2
    assert capsys.readouterr().err == f'{path}: this is not a file of results of basicsr bench\n'


def test_contestants_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in 'ab'}
    taken = measuring.in_turns(calls, measuring.wall_timer('cpu'), seconds=0)
    assert order == ['a', 'b'] * (1 + measuring.LEAST_ROUNDS)
    assert [len(times) for times in taken.values()] == [measuring.LEAST_ROUNDS] * 2


def test_memory_is_that_of_the_highest_moment():
    def call():
        a = torch.empty(2**20)
        b = a + 1
        del a
        return b.sum()

    assert 8 * 2**20 <= measuring.peak_memory(call, 'cpu') < 8 * 2**20 + 100


def test_the_script_for_a_gpu_says_how_it_is_called():
    script = Path(importlib.import_module('attnsr.benchmarks').__path__[0]) / 'gpu_session.sh'
    if not script.exists():  # the installed package has no scripts
        pytest.skip('attnsr is installed without the script')
    ended = subprocess.run(['bash', script], capture_output=True, text=True, timeout=util.PATIENCE)
    assert (ended.returncode, ended.stderr) == (2, f'usage: bash {script} FOLDER\n')
