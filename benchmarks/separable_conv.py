"""Layer norm, 1x1 and depthwise 3x3 convolution as the channel attention of DLGSANet and ASID uses them."""

from functools import partial

import torch

from attnsr.benchmarks.operations import Case, Tensors
from attnsr.ops.separable_conv import separable_conv


def qkv(name: str, channels: int) -> Case:
    """To the channels of q, k and v."""

    def make(batch: int, height: int, width: int) -> Tensors:
        return {
            'x': torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last),
            'norm_weight': 1 + torch.rand(channels),
            'norm_bias': torch.randn(channels),
            'pointwise': torch.randn(3 * channels, channels, 1, 1) / channels**0.5,
            'depthwise': torch.randn(3 * channels, 1, 3, 3) / 3,
        }

    return Case(name, make, partial(separable_conv, eps=1e-5))


CASES = (qkv('DLGSANet-light, ASID', 48), qkv('DLGSANet', 90))
