"""Efficient-attention super-resolution networks, losses and tools for BasicSR.

``import attnsr`` mends BasicSR for the installed libraries (:mod:`attnsr.compat`) and registers the networks and
losses in BasicSR's registries, so that option files and Python code can name them.
"""

from attnsr import compat

compat.apply()

from attnsr import archs, losses  # noqa: E402  (registration needs a BasicSR that imports)
from attnsr.ops.dispatch import get_backend, set_backend  # noqa: E402
from attnsr.upscaler import Upscaler, load  # noqa: E402

__all__ = ['Upscaler', 'archs', 'compat', 'get_backend', 'load', 'losses', 'set_backend']
__version__ = '0.1.0'
