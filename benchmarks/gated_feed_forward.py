"""The gated feed-forward as DLGSANet and ASID use it."""

from functools import partial

import torch

from attnsr.benchmarks.operations import Case, Tensors
from attnsr.ops.gated_feed_forward import gated_feed_forward


def case(name: str, channels: int, hidden: int) -> Case:
    """With its layer norm and residual."""

    def make(batch: int, height: int, width: int) -> Tensors:
        return {
            'x': torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last),
            'norm_weight': 1 + torch.rand(channels),
            'norm_bias': torch.randn(channels),
            'project_in': torch.randn(2 * hidden, channels, 1, 1) / channels**0.5,
            'depthwise': torch.randn(2 * hidden, 1, 3, 3) / 3,
            'project_out': torch.randn(channels, hidden, 1, 1) / hidden**0.5,
        }

    return Case(name, make, partial(gated_feed_forward, eps=1e-5))


CASES = (case('DLGSANet-light', 48, 96), case('ASID', 48, 48))
