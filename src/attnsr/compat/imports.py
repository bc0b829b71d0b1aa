"""``import basicsr`` beside a current torchvision."""

import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

FUNCTIONAL_TENSOR = 'torchvision.transforms.functional_tensor'


def offer_functional_tensor() -> None:
    """BasicSR imports ``rgb_to_grayscale`` from a module that torchvision dropped in 0.17: offer one of that name.

    This must come before the first import of BasicSR, so it is no :class:`~attnsr.compat.patches.Patch`.
    """
    if FUNCTIONAL_TENSOR in sys.modules or importlib.util.find_spec(FUNCTIONAL_TENSOR) is not None:
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = ModuleType(FUNCTIONAL_TENSOR)
    module.__dict__['rgb_to_grayscale'] = rgb_to_grayscale
    sys.modules[FUNCTIONAL_TENSOR] = module


@contextmanager
def without_collections() -> Iterator[None]:
    """Importing makes a million objects and hardly any garbage: looking for it takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
