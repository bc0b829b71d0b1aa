"""What holds for the tests of every mechanism."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils import deterministic

from attnsr.ops import dispatch


@pytest.fixture(
    params=[
        pytest.param('cpu', marks=pytest.mark.interpreter, id='interpreter'),
        pytest.param('cuda', marks=pytest.mark.gpu),
    ]
)
def kernel_device(request, monkeypatch):
    """The device of a test that runs kernels, which it then does for every operation that has one."""
    monkeypatch.setattr(dispatch, '_backend', 'triton')
    if request.param == 'cpu':
        _multiply_bfloat16_as_on_a_gpu(monkeypatch)
        _patch_the_language_once(monkeypatch)
    return request.param


def _patch_the_language_once(monkeypatch):
    """Triton's interpreter goes through its whole language at each call of each function, a third of all its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_unless_patched(function):
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return SimpleNamespace(restore=lambda: None)  # the launch that patched it restores it
        return patch(function)

    monkeypatch.setattr(interpreter, '_patch_lang', patch_unless_patched)


def _multiply_bfloat16_as_on_a_gpu(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and rounds to it towards 0."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        wide = x.dtype.scalar == tl.bfloat16
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if wide else x

    def rounded(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(
        InterpreterBuilder, 'create_dot', lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(InterpreterBuilder, 'cast_impl', rounded)
    monkeypatch.setattr(InterpreterBuilder, 'create_fp_trunc', rounded)


@pytest.fixture(autouse=True)
def _convolutions_are_in_float32():
    """cuDNN's are TF32 as PyTorch comes, where two inputs that hardly differ can be rounded to two that do."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch):
    """An element that is never written fails the test that compares it."""
    monkeypatch.setattr(deterministic, 'fill_uninitialized_memory', True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
