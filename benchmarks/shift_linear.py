"""Shift and 1x1 convolution as ELAN's local feature extraction uses them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.archs.elan_arch import shift_kernel
from attnsr.benchmarks.operations import Case, Contestant, Tensors
from attnsr.ops.shift_linear import shift_linear


def expands(name: str, channels: int) -> Case:
    """The first of the two: to twice the channels, with a ReLU."""

    def make(batch: int, height: int, width: int) -> Tensors:
        tensors = _tensors(batch, channels, 2 * channels, height, width)
        # Half the channels pass the ReLU and half do not, wherever they are: where a sum is hardly above or below 0,
        # rounding decides whether there is a gradient.
        tensors['bias'][::2] += 10
        tensors['bias'][1::2] -= 10
        return tensors

    def shift_and_mix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return shift_linear(x, weight, bias, 'relu')

    def published(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _published(x, weight, bias).relu()

    return Case(name, make, shift_and_mix, rivals=(Contestant('as published', published),))


def reduces(name: str, channels: int) -> Case:
    """The second: back, with the residual."""

    def make(batch: int, height: int, width: int) -> Tensors:
        residual = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
        return {**_tensors(batch, 2 * channels, channels, height, width), 'residual': residual}

    def shift_and_mix(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return shift_linear(x, weight, bias, residual=residual)

    def published(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return _published(x, weight, bias) + residual

    return Case(name, make, shift_and_mix, rivals=(Contestant('as published', published),))


def _tensors(batch: int, channels: int, out_channels: int, height: int, width: int) -> Tensors:
    return {
        'x': torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last),
        'weight': torch.randn(out_channels, channels, 1, 1) / channels**0.5,
        'bias': torch.randn(out_channels),
    }


def _published(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The shift as the depthwise 3x3 convolution that the published network has it in."""
    kernel = shift_kernel(x.shape[1], x.dtype).to(x.device)
    return F.conv2d(F.conv2d(x, kernel, padding=1, groups=x.shape[1]), weight, bias)


CASES = (
    expands('ELAN-light, expands', 60),
    reduces('ELAN-light, reduces', 60),
    expands('ELAN, expands', 180),
)
