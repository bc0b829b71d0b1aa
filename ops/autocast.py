"""Autocast of operations that prepare their own memory or precision, which it does not reach by itself."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype of autocast where that is enabled; float64 is left alone, as autocast does."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) and x.dtype != torch.float64 else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In which products have the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # the meta device has none
