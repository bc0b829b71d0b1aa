"""What holds for the tests of every mechanism."""

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
    return request.param


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch):
    """An element that is never written fails the test that compares it."""
    monkeypatch.setattr(deterministic, 'fill_uninitialized_memory', True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
