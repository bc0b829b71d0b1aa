"""Channel attention as DLGSANet and ASID use it, with the projection of its output."""

from functools import partial

import torch

from attnsr.benchmarks.operations import Case, Tensors
from attnsr.ops.channel_attention import channel_attention


def case(
    name: str,
    layout: str,
    *,
    channels: int = 48,
    heads: int,
    activation: str,
    window_size: int | None = None,
    multiple: int = 1,
) -> Case:
    """Attention over one layout of tokens."""

    def make(batch: int, height: int, width: int) -> Tensors:
        return {
            'qkv': torch.randn(batch, 3 * channels, height, width).contiguous(memory_format=torch.channels_last),
            'temperature': 1 + torch.rand(heads, 1, 1),
            'weight': torch.randn(channels, channels, 1, 1) / channels**0.5,
        }

    attend = partial(channel_attention, activation=activation, heads=heads, layout=layout, window_size=window_size)
    # The gradient of a single temperature is one number, the sum of terms that cancel: beside it rounding may be large.
    return Case(name, make, attend, multiple, fixed=('temperature',) if heads == 1 else ())


CASES = (
    case('DLGSANet-light, training', 'image', heads=6, activation='relu'),
    case('DLGSANet-light', 'overlapping', heads=6, activation='relu', window_size=48),
    case('ASID windows', 'windows', heads=1, activation='softmax', window_size=8, multiple=8),
    case('ASID grid', 'grid', heads=1, activation='softmax', window_size=8, multiple=8),
)
