"""Dynamic convolution as DLGSANet uses it."""

import torch
from torch import Tensor

from attnsr.benchmarks.operations import Case, Contestant, Tensors
from attnsr.ops.dynamic_conv import aggregate, dynamic_conv, reference

KERNEL_SIZE = 7
#: Channels that share a kernel.
SHARING = 6


def predicted(name: str, channels: int) -> Case:
    """With the 1x1 convolution that predicts the kernels."""
    predicting, outputs = channels // 4, channels // SHARING * KERNEL_SIZE**2

    def make(batch: int, height: int, width: int) -> Tensors:
        return {
            'u': _map(batch, channels, height, width),
            'z': _map(batch, predicting, height, width),
            'weight': torch.randn(outputs, predicting, 1, 1) / predicting**0.5,
            'bias': torch.randn(outputs),
        }

    def unfolded(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.defined(u, z, weight.flatten(1), bias, KERNEL_SIZE)

    return Case(name, make, dynamic_conv, rivals=(Contestant('unfold', unfolded),))


def given(name: str, channels: int) -> Case:
    """With the kernels of all pixels in memory."""

    def make(batch: int, height: int, width: int) -> Tensors:
        kernels = _map(batch, channels // SHARING * KERNEL_SIZE**2, height, width)
        return {'u': _map(batch, channels, height, width), 'kernels': kernels}

    return Case(name, make, aggregate)


def _map(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


CASES = (
    predicted('DLGSANet-light', 48),
    predicted('DLGSANet', 90),
    given('DLGSANet-light, kernels given', 48),
)
