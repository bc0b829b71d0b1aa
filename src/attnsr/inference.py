"""Networks prepared for inference: on their device, in their dtype, with everything folded that can be."""

from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attnsr.archs.arch_util import SRNetwork
from attnsr.errors import UsageError

__all__ = ['DTYPES', 'Dtype', 'PreparedNetwork', 'choose_device']

#: What a network may compute in; images enter and leave in float32.
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

#: Side in pixels of the image that a GPU's memory is measured with.
PROBE = 128

Dtype: TypeAlias = Literal['auto', 'float32', 'bfloat16', 'float16']


def choose_device(device: str | torch.device = 'auto') -> torch.device:
    """``'auto'`` is the current CUDA device where there is one, and the CPU elsewhere.

    Raises:
        UsageError: there is no such device here; the message names those that there are.
    """
    cuda = torch.cuda.is_available()
    if device == 'auto':
        return torch.device('cuda' if cuda else 'cpu')
    valid = ['auto', 'cpu', *(['cuda', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))] if cuda else [])]
    if str(device) not in valid:
        reason = '' if cuda or not str(device).startswith('cuda') else ': this PyTorch finds no CUDA device'
        raise UsageError(f'device {device}{reason}; valid here: {", ".join(valid)}')
    return torch.device(device)


class PreparedNetwork:
    """A network in eval mode on its device, called with whole images.

    Args:
        net: The network; it is moved and converted in place, and belongs to this object from now on.
        device: See :func:`choose_device`.
        dtype: What it computes in; ``'auto'`` is float32.

    Attributes:
        net: The network.
        scale: Its scale factor.
        device: Where it computes.
        dtype: What it computes in.
    """

    def __init__(self, net: SRNetwork, device: str | torch.device = 'auto', dtype: Dtype = 'auto') -> None:
        if dtype not in ('auto', *DTYPES):
            raise UsageError(f'dtype must be one of auto, {", ".join(DTYPES)}, got {dtype}')
        self.device = choose_device(device)
        self.dtype = DTYPES['float32' if dtype == 'auto' else dtype]
        # Folded before it is converted: products are rounded once.
        folded = net.eval().requires_grad_(False).fold_for_inference()
        self.net = folded.to(self.device, self.dtype, memory_format=torch.channels_last)
        self.scale = net.upscale

    @cached_property
    def bytes_per_pixel(self) -> float:
        """Memory that the forward of one image takes at most beyond the parameters, by LR pixel.

        On a GPU it is measured, on a small image; CPUs do not count, and there it is what each class of networks says.
        """
        if self.device.type == 'cuda':
            return self._measured(PROBE)
        channels = len(next(self.net.parameters()))  # of the first convolution
        return self.net.bytes_per_channel * channels * self.dtype.itemsize / 4

    def _measured(self, side: int) -> float:
        """Of a GPU's allocator, for a square image."""
        x = torch.rand(1, 3, side, side, device=self.device)
        self(x)  # kernels may try configurations at first
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self(x)
        return (torch.cuda.max_memory_allocated(self.device) - before) / side**2

    def __call__(self, x: Tensor) -> Tensor:
        """Upscale whole images.

        Args:
            x: (B, 3, H, W), float32, RGB in [0, 1], on any device.

        Returns:
            (B, 3, scale * H, scale * W), float32, not clipped, on :attr:`device`.
        """
        with torch.inference_mode():
            return self.net(x.to(self.device, torch.float32)).float()
