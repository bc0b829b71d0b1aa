"""Upscaling pictures in Python: arrays, PIL images and tensors in, the same kind out."""

from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from attnsr import checkpoints
from attnsr.archs.arch_util import SRNetwork
from attnsr.inference import Dtype, PreparedNetwork

__all__ = ['Upscaler', 'load']


class Upscaler:
    """Upscales pictures of any size with a network.

    Args:
        net: The network; it is moved and converted in place, and belongs to this object from now on.
        device: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``.
        dtype: What the network computes in.
        tile: Side in LR pixels of what the network sees at once; None for the whole picture; ``'auto'`` for the whole
            picture where memory suffices, and else as large a tile as it does for.

    Attributes:
        net: The network.
        scale: Its scale factor.
    """

    def __init__(
        self,
        net: SRNetwork,
        *,
        device: str | torch.device = 'auto',
        dtype: Dtype = 'auto',
        tile: int | Literal['auto'] | None = 'auto',
    ) -> None:
        self.prepared = PreparedNetwork(net, device, dtype)
        self.net, self.scale = self.prepared.net, self.prepared.scale
        self.tile = tile

    def tensor(self, x: Tensor) -> Tensor:
        """Upscale (B, 3, H, W), float32 RGB in [0, 1], to (B, 3, scale * H, scale * W), float32, not clipped."""
        return self.prepared(x)


def load(path: str | PathLike[str], **options: Any) -> Upscaler:
    """The upscaler of a checkpoint file, see :class:`Upscaler` for the options."""
    return Upscaler(checkpoints.load(path), **options)
