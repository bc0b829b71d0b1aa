"""Which backend is taken, and what is said where it is not the kernel. Any operation will do: shift_linear does."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import attnsr
from attnsr.ops import dispatch
from attnsr.ops.dispatch import BackendError, use_triton

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
    monkeypatch.setattr(dispatch, '_backend', None)
    monkeypatch.setattr(dispatch, '_logged', set())
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    caplog.set_level(logging.INFO, logger='basicsr')
    return caplog


def in_new_process(code, **environment):
    """Standard output and error of Python code."""
    environment = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'ATTNSR_BACKEND')} | environment
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_backend_is_auto_unless_the_environment_or_the_caller_says_otherwise(monkeypatch):
    assert attnsr.get_backend() == 'auto'
    monkeypatch.setattr(dispatch, '_backend', None)
    monkeypatch.setenv('ATTNSR_BACKEND', 'reference')
    assert attnsr.get_backend() == 'reference'
    attnsr.set_backend('triton')
    assert attnsr.get_backend() == 'triton'


def test_unknown_backends_are_refused_with_the_valid_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"the backend must be one of auto, reference, triton; got 'cuda'"):
        attnsr.set_backend('cuda')
    monkeypatch.setenv('ATTNSR_BACKEND', 'tirton')
    with pytest.raises(attnsr.errors.UsageError, match=r"ATTNSR_BACKEND must be one of .*; got 'tirton'"):
        use_triton('an operation', torch.zeros(1))


def test_auto_takes_the_reference_where_that_is_faster_and_says_so(monkeypatch, logged):
    monkeypatch.setattr(dispatch, '_refusal', lambda *_: None)
    x = torch.zeros(1)
    assert use_triton('an operation', x)
    assert not use_triton('an operation', x, slower='plain PyTorch is faster')
    (record,) = logged.records
    assert record.getMessage() == (
        'every operation runs in plain PyTorch; the kernel is not used: plain PyTorch is faster'
    )
    attnsr.set_backend('triton')
    assert use_triton('an operation', x, slower='plain PyTorch is faster')


def test_auto_takes_the_reference_on_the_cpu_and_says_so_once(logged):
    for operation in ('one', 'another', 'one'):
        assert not use_triton(operation, torch.zeros(1))
    assert [(r.levelname, r.getMessage()) for r in logged.records] == [
        ('INFO', 'every operation runs in plain PyTorch; the kernel is not used: the tensors are on the CPU')
    ]


def test_reference_and_the_meta_device_say_nothing(logged):
    attnsr.set_backend('triton')
    assert not use_triton('one', torch.zeros(1, device='meta'))
    attnsr.set_backend('reference')
    assert not use_triton('one', torch.zeros(1))
    assert logged.records == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ('x', 'unsupported', 'reason'),
    [
        (torch.zeros(1), 'windows of 99', 'windows of 99'),
        (
            torch.zeros(1).double(),
            None,
            'the tensors are float64, and the kernels compute on float32, bfloat16, float16',
        ),
    ],
)
def test_what_cannot_be_had_is_an_error_where_it_is_asked_for(x, unsupported, reason):
    attnsr.set_backend('triton')
    assert use_triton('one', torch.zeros(1))
    with pytest.raises(BackendError, match=f"one: the backend 'triton' was asked for, and cannot be had: {reason}"):
        use_triton('one', x, unsupported)


@pytest.mark.parametrize(
    ('device', 'dtype', 'capability', 'reason'),
    [
        (CUDA, torch.float32, (8, 0), None),
        (CUDA, torch.bfloat16, (10, 0), None),
        (CUDA, torch.float16, (7, 5), 'T4 has the compute capability 7.5, and the kernels need 8.0'),
        (CUDA, torch.float64, (9, 0), 'the tensors are float64, and the kernels compute on float32, bfloat16, float16'),
        (torch.device('mps'), torch.float32, None, 'the tensors are on mps, and the kernels run on CUDA'),
        (CPU, torch.float32, None, 'the tensors are on the CPU'),
    ],
)
def test_reasons(device, dtype, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'T4')
    assert dispatch._refusal(device, dtype, asked_for=False, to_onnx=False) == reason


def test_onnx_gets_the_reference_and_the_log_says_why():
    assert dispatch._refusal(CUDA, torch.float32, asked_for=False, to_onnx=True) == 'ONNX has no such operators'


def test_reasons_are_logged_once_when_compiled_too(logged):
    @torch.compile(fullgraph=True, backend='eager')
    def compiled(x):
        return x * 2 if use_triton('one', x) else x * 3

    for size in (2, 3, 4):
        assert compiled(torch.ones(size)).tolist() == [3] * size
    assert len(logged.records) == 1


@pytest.mark.interpreter
def test_a_compiled_function_follows_the_backend():
    @torch.compile(fullgraph=True, backend='eager')
    def compiled(x):
        return x * 2 if use_triton('one', x) else x * 3

    for backend, factor in (('auto', 3), ('triton', 2), ('reference', 3)):
        attnsr.set_backend(backend)
        assert compiled(torch.ones(1)).item() == factor


# An operation in a process of its own, in which nothing has chosen the interpreter.
USE = """
import sys, torch, attnsr
from attnsr.ops.shift_linear import shift_linear
def use():
    try:
        shift_linear(torch.rand(1, 5, 4, 4), torch.rand(5, 5, 1, 1))
    except RuntimeError as error:
        print(error)
use()
"""


def test_no_kernel_is_imported_before_it_is_needed():
    out, _ = in_new_process(USE + "print([name for name in sys.modules if name.startswith('attnsr.ops')])")
    assert 'attnsr.ops.shift_linear.reference' in out
    assert 'triton_kernel' not in out
    assert 'launching' not in out


def test_machines_without_triton_lose_nothing_else():
    hide = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == 'triton' else found(name, *package)
sys.modules['triton'] = None  # importing it fails
"""
    out, _ = in_new_process(hide + USE + "attnsr.set_backend('triton')\nuse()")
    assert out == "shift_linear: the backend 'triton' was asked for, and cannot be had: Triton is not installed\n"


def test_the_kernels_need_a_gpu_or_the_interpreter():
    out, _ = in_new_process(USE, ATTNSR_BACKEND='triton', CUDA_VISIBLE_DEVICES='')
    reason = (
        "the tensors are on the CPU, where Triton's kernels run in its interpreter only "
        '(TRITON_INTERPRET=1 before Python starts)'
    )
    assert out == f"shift_linear: the backend 'triton' was asked for, and cannot be had: {reason}\n"
