"""What holds for the tests of every mechanism."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch):
    """An element that is never written fails the test that compares it."""
    monkeypatch.setattr(deterministic, 'fill_uninitialized_memory', True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
