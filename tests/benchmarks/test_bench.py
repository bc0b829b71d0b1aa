"""``basicsr bench``: no figures without agreement, results that are kept, tables and plots of them, and errors."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import networks as small_networks
import pytest
import torch
import util

from attnsr import archs, ops
from attnsr.benchmarks import command, measuring, networks, operations, report, results, shift_linear
from attnsr.benchmarks.measuring import SIZES, Limits, Size
from attnsr.benchmarks.operations import BACKWARD, FORWARD, Contestant
from attnsr.benchmarks.results import Figures, Measurement, Results
from attnsr.cli import main
from attnsr.ops.dispatch import BackendError

LIMITS = Limits(1e10, {'float32': 1e11, 'bfloat16': 1e11})
UNCOMPILED = {'torch.compile': 'takes its time'}


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(measuring, 'LEAST_ROUNDS', 1)
    monkeypatch.setattr(command, 'limits', lambda device, dtypes: LIMITS)


def bench(*arguments):
    return main(['bench', *map(str, arguments)])


def threads():
    """The end of the keys of what is measured here."""
    return f'threads {torch.get_num_threads()}'


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
            name, cases, [SIZES['tiny_patches']], 'cpu', ['float32', 'bfloat16'], LIMITS, 0, UNCOMPILED
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


@pytest.mark.parametrize('name', ['separable_conv', 'gated_feed_forward'])
def test_the_gradients_of_convolutions_take_twice_the_operations(name):
    for case in importlib.import_module(f'attnsr.benchmarks.{name}').CASES:
        tensors = case.make(2, 16, 24)
        _, (_, forward) = operations._work(case, tensors, FORWARD)
        _, (_, both) = operations._work(case, tensors, BACKWARD)
        pixels = 2 * 16 * 24
        weights = sum(x.numel() for x in tensors.values() if x.dim() == 4 and x is not tensors['x'])
        assert (forward, both) == (2 * pixels * weights, 6 * pixels * weights)


def test_what_matters_most_is_measured_first():
    cases = [replace(case, rivals=()) for case in shift_linear.CASES[:2]]
    sizes = [SIZES['tiny_patches'], Size('less', 1, 16, 16)]
    found = list(operations.measurements('', cases, sizes, 'cpu', list(measuring.DTYPES), LIMITS, 0, UNCOMPILED))
    assert list(dict.fromkeys((m.size, m.dtype) for m in found)) == [
        (size, dtype) for size in ('tiny_patches', 'less') for dtype in ('bfloat16', 'float32')
    ]
    assert [m.case for m in found[:4]] == [case.name for case in cases for _ in range(2)]


@pytest.mark.parametrize('reason', [BackendError('not this wide'), torch.OutOfMemoryError('not so much')])
def test_a_kernel_that_cannot_be_had_is_a_failure_where_the_reference_has_figures(reason):
    def lacking():
        raise reason

    def right():
        return print, 1e-6

    for reference, kernel_fails in ((right, True), (lacking, False)):
        result = measurement()
        contestants = {'kernel': lacking, 'reference': reference, 'rival': lacking}
        measuring.agreeing(result, contestants, kernels=['kernel'])
        assert result.failed == ({'kernel': str(reason)} if kernel_fails else {})
        assert result.absent['rival'] == str(reason)


def test_a_gpu_is_kept_busy_until_all_is_launched(monkeypatch):
    """A GPU that works on what it is given when it slept for as long as the host takes to launch it."""
    slept, taken = [], []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def query(self):
            return slept[-1] < taken[-1]

        def elapsed_time(self, other):
            return 2.0

    empty = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *size, device, **more: empty(1))
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, '_sleep', slept.append)
    timer = measuring.operation_timer.__wrapped__('cuda')
    slow, never, quick = (partial(taken.append, cycles) for cycles in (3 * 10**6, 10**12, 10**5))
    for call, expected in (
        (slow, [10**6, 2 * 10**6, 4 * 10**6]),
        (slow, [4 * 10**6]),
        (quick, [10**6]),
        (never, [10**6 * 2**i for i in range(6)] + [4 * 10**7]),
    ):
        slept.clear()
        assert timer(call) == 0.002
        assert slept == expected


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
    assert 'without kernel: the kernels need a CUDA device' in out
    assert 'without torch.compile: left out by --quick' in out

    found = results_in(tmp_path).measurements
    assert found['shift_linear/ELAN/1x180x320/float32/forward'] == measurement()
    of_new = found[f'shift_linear/ELAN-light, reduces/2x16x16/float32/forward, backward/{threads()}']
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
        m = results_in(tmp_path).measurements[f'shift_linear/{case.name}/2x16x16/float32/{computed}/{threads()}']
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
        '', [replace(case, rivals=(rival,))], [SIZES['tiny_patches']], 'cpu', ['float32'], LIMITS, 0, UNCOMPILED
    )
    assert 'wrong' in forward.figures
    assert list(backward.failed) == ['wrong']


def test_a_network_is_measured_through_the_command_line(tmp_path, capsys):
    options = ('--device', 'cpu', '--quick', '--dtype', 'float32', '--threads', '1', '--no-report')
    assert bench('networks', 'asid', *options, '--output', tmp_path) == 0
    m = results_in(tmp_path).measurements['networks/ASID/1x32x48/float32/forward/threads 1']
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
    assert 'ASID, bfloat16' in found[f'networks/ASID/1x180x320/bfloat16/forward/{threads()}'].failed
    light = found[f'networks/ELAN-light/1x180x320/bfloat16/forward/{threads()}']
    assert list(light.figures) == ['SwinIR-light, float32', 'SwinIR-light, bfloat16', 'ELAN-light, bfloat16']
    assert light.remarks[1:] == [
        'ELAN-light, bfloat16 is 1.00 times as fast as SwinIR-light, bfloat16',
        'the input of SwinIR-light, float32 is 184 x 320, in whole windows',
    ]
    assert 'no figures for ASID, float32: its error is 0.5, and the bound is 0.0001' in capsys.readouterr().out


def test_a_network_whose_process_dies_has_no_figures(tmp_path, monkeypatch, capsys):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "A traceback\nit broke" >&2\nexit 3\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    folder = tmp_path / 'results'
    options = ('--device', 'cpu', '--quick', '--with', 'torch.compile', '--no-report', '--output', folder)
    assert bench('networks', 'asid', 'lcoan', *options) == 1
    found = results_in(folder).measurements
    assert len(found) == 4
    for m in found.values():
        assert not m.figures
        own = f'{m.case}, {m.dtype}'
        assert m.failed[own] == m.absent[f'{own}, torch.compile'] == 'its process ended with status 3: it broke'
    told, err = capsys.readouterr()
    assert 'no figures for LCoAN, float32: its process ended with status 3: it broke' in told
    assert not err


def test_networks_whose_timing_dies_have_no_figures(monkeypatch):
    def answer(request, environment=None):
        if request.part == 'in turns':
            raise subprocess.CalledProcessError(-9, 'python', stderr='')
        return {'held': 10**9, 'peak': 10**9, 'error': 1e-6}

    monkeypatch.setattr(networks, '_in_fresh_process', answer)
    (m,) = networks.measurements('asid', SIZES['tiny'], 'cpu', ['float32'], 0)
    assert not m.figures
    assert m.failed == dict.fromkeys(['SwinIR-light, float32', 'ASID, float32'], 'its process ended with status -9')


def test_a_network_is_compiled_where_that_is_asked_for(monkeypatch):
    """With fresh processes and the compiler left out."""
    compiled = []

    def compile_(net, dynamic):
        compiled.append(net)
        return net

    monkeypatch.setattr(torch, 'compile', compile_)
    monkeypatch.setattr(measuring, 'LEAST_ROUNDS', 1)
    monkeypatch.setattr(networks, '_in_fresh_process', lambda request, environment=None: networks._answer(request))
    net = archs.ASID(upscale=4, **small_networks.SMALL['ASID'])
    monkeypatch.setattr(
        networks,
        'ENTRIES',
        {'tiny': networks.Entry('Tiny', lambda: net), 'swinir_light': networks.Entry('S', lambda: net)},
    )
    for asked_for in (False, True):
        (m,) = networks.measurements('tiny', SIZES['tiny'], 'cpu', ['float32'], 0, asked_for)
        assert m.failed == {}
        names = ['S, float32', 'Tiny, float32', *(['Tiny, float32, torch.compile'] if asked_for else [])]
        assert list(m.figures) == names
        assert bool(compiled) == asked_for
        assert m.absent == ({} if asked_for else {'torch.compile': 'not asked for by --with'})
    assert m.figures[names[-1]].peak is None
    assert (
        f'is {m.figures[names[-1]].seconds / m.figures[names[1]].seconds:.2f} times as fast as {names[-1]}'
        in m.remarks[1]
    )


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
    monkeypatch.setattr(torch, 'compile', lambda net, dynamic: net)
    (m,) = networks.measurements('tiny', Size('tiny', 2, 16, 16, training), 'cuda', ['bfloat16'], 0, compiled=True)
    names = ['kernel', 'reference']
    if not training:
        names += ['kernel, CUDA graph', 'reference, CUDA graph', 'torch.compile', 'tiny']
    assert list(m.figures if right else m.failed) == names
    assert not m.absent
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


def test_what_was_measured_on_other_threads_stays_and_is_told_apart(tmp_path):
    from matplotlib.figure import Figure

    path = tmp_path / 'cpu.json'
    kept = Results('Some CPU')
    for what in ('shift_linear', 'networks'):
        for number in (1, 2, 2):
            m = measurement(what=what)
            m.environment = {'threads': number}
            m.remarks = ['a remark']
            kept.add(m)
    kept.save(path)
    assert [m.threads for m in results.load(path).measurements.values()] == [1, 2, 1, 2]
    assert bench('report', path) == 0
    text = path.with_suffix('.md').read_text()
    assert re.findall(r'^\| ELAN +\| [^|]+ +\| float32 +\| (\d) +\|', text, re.MULTILINE) == ['1', '2'] * 2
    for number in (1, 2):
        assert f'- ELAN, threads: {number}, 720p, float32, forward: a remark' in text

    figure = Figure()
    report._draw_operation(figure, kept.of('shift_linear'))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f'ELAN, threads: {number}: forward' for number in (1, 1, 2, 2)]
    figure = Figure()
    report._draw_networks(figure, kept.of('networks'))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f'ELAN, threads: {number}, 720p: forward' for number in (1, 1, 2, 2)]


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
        (['ops', '--dtype', 'float8'], r"invalid choice: 'float8' \(choose from '?bfloat16'?, '?float32'?\)"),
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


def test_a_contestant_both_asked_for_and_left_out_is_one_line(tmp_path, capsys):
    options = ('--with', 'torch.compile', '--without', 'scaled_dot_product_attention', 'torch.compile')
    assert bench('all', '--device', 'cpu', *options, '--output', tmp_path / 'results') == 2
    assert capsys.readouterr().err == '--with and --without: both name torch.compile\n'
    assert not (tmp_path / 'results').exists()


def test_quick_figures_are_not_kept_unless_it_is_said_where(few_rounds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shift_linear, 'CASES', shift_linear.CASES[:1])
    assert bench('shift_linear', '--device', 'cpu', '--quick', '--dtype', 'float32') == 0
    assert (
        'nothing was written: what --quick measures is kept only where --output DIR says so' in capsys.readouterr().out
    )
    assert not list(tmp_path.iterdir())


def test_training_steps_are_measured_on_a_gpu(tmp_path, capsys):
    assert bench('networks', '--device', 'cpu', '--size', 'training', '--output', tmp_path) == 2
    assert '--size training: steps of training of networks are measured on a GPU only' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['{"device": "GPU"', '[]', '{}', '{"device": "", "measurements": {"a": {}}}'])
def test_a_file_that_holds_no_results_is_one_line(text, tmp_path, capsys):
    path = tmp_path / 'gpu.json'
    path.write_text(text)
    assert bench('report', path) == 2
    assert capsys.readouterr().err == f'{path}: this is not a file of results of basicsr bench\n'


@pytest.mark.parametrize(
    ('change', 'wrong'),
    [
        ({'dtype': 'float8'}, "dtype is 'float8'; valid: bfloat16, float32"),
        ({'case': 7}, 'a name or a remark in it is none'),
        ({'what': '../ops'}, 'a name or a remark in it is none'),
        ({'extent': [1, 0, 3]}, 'extent is 0'),
        ({'least_seconds': ['1', 'bandwidth']}, "least_seconds is '1', and must be a number"),
        ({'seconds': 0}, 'seconds of kernel is 0'),
        ({'seconds': '0.1'}, "seconds of kernel is '0.1', and must be a number"),
        ({'least': None}, 'least of kernel is None, and must be a number'),
        ({'most': float('nan')}, 'most of kernel is nan, and must be a number'),
        ({'seconds_kept': -1.0}, 'seconds_kept of kernel is -1.0, and must be a number'),
        ({'environment': {'threads': 'all'}}, "threads is 'all', and must be a number"),
    ],
)
def test_an_entry_that_cannot_be_is_one_line(change, wrong, tmp_path, capsys):
    path = tmp_path / 'gpu.json'
    full_results(path)
    content = json.loads(path.read_text())
    key, entry = next(iter(content['measurements'].items()))
    for name, value in change.items():
        (entry if name in entry else entry['figures']['kernel'])[name] = value
    path.write_text(json.dumps(content))
    assert bench('report', path) == 2
    assert capsys.readouterr().err == f'{path}: {key}: {wrong}\n'


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


@pytest.fixture
def gpu_session(tmp_path):
    """The script run with a Python that notes what it is to run, and fails where ``failing`` is a part of that."""
    script = Path(importlib.import_module('attnsr.benchmarks').__path__[0]) / 'gpu_session.sh'
    if not script.exists():  # the installed package has no scripts
        pytest.skip('attnsr is installed without the script')

    def run(*arguments, failing='nothing'):
        python = tmp_path / 'python'
        python.write_text(
            f'#!/bin/sh\necho "$PYTHONPATH $*" >>{tmp_path}/ran\n'
            f'case "$*" in *"{failing}"*) echo it broke >&2; exit 7;; esac\n'
        )
        python.chmod(0o755)
        environment = os.environ | {'PYTHON': str(python), 'PYTHONPATH': '/theirs'}
        command = ['bash', script, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=util.PATIENCE, env=environment)
        return script, ended, (tmp_path / 'ran').read_text().splitlines() if arguments else []

    return run


def test_the_script_for_a_gpu_says_how_it_is_called(gpu_session):
    script, ended, _ = gpu_session()
    assert (ended.returncode, ended.stderr) == (2, f'usage: bash {script} FOLDER\n')


def test_the_script_for_a_gpu_runs_everything(gpu_session, tmp_path, capsys):
    folder = tmp_path / 'results'
    _, ended, ran = gpu_session(folder)
    assert ended.returncode == 0
    assert all(re.match(r'\S+/lib:/theirs ', line) for line in ran)
    measured = [line.partition(' bench ')[2] for line in ran if ' bench ' in line]
    assert {line.split()[0] for line in measured} == {'networks', *command.OPERATIONS}
    for line in measured:  # as the command line takes them
        with pytest.raises(SystemExit):
            bench(*line.split(), '--no-such-option')
        assert capsys.readouterr().err.endswith('unrecognized arguments: --no-such-option\n')
    titles = [line.partition(':')[0] for line in (folder / 'summary.txt').read_text().splitlines()]
    assert len(titles) == 4 + len(measured) + 1
    assert titles[4:8] == list(networks.DEFAULT)


def test_the_script_for_a_gpu_ends_where_attnsr_cannot_be_built(gpu_session, tmp_path):
    _, ended, ran = gpu_session(tmp_path / 'results', failing='setup.py')
    assert ended.returncode == 1
    assert ended.stdout.endswith('attnsr cannot be built: see tests.log; it takes setuptools of at least 77\n')
    assert len(ran) == 1


def test_the_script_for_a_gpu_ends_soon_without_one(gpu_session, tmp_path):
    _, ended, ran = gpu_session(tmp_path / 'results', failing='torch.cuda')
    assert ended.returncode == 1
    assert 'dlgsanet_light: not begun, there is no CUDA device\n' in ended.stdout
    assert not [line for line in ran if ' bench ' in line]
