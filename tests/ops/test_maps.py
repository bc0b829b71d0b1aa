"""What operations refuse of the maps that they are given, whatever the backend."""

import pytest
import torch

from attnsr.ops.channel_attention import channel_attention
from attnsr.ops.cluster_attention import cluster_attention
from attnsr.ops.dynamic_conv import aggregate, dynamic_conv
from attnsr.ops.gated_feed_forward import gated_feed_forward
from attnsr.ops.separable_conv import separable_conv
from attnsr.ops.shift_linear import shift_linear
from attnsr.ops.window_attention import window_attention


def other(x):
    """Another map of the same extent."""
    return torch.rand(len(x), 4, *x.shape[2:])


def norm(x):
    """Weight and bias over the channels."""
    return x.new_ones(2, x.shape[1])


OPERATIONS = {
    'window_attention': lambda x: window_attention(x, (4,)),
    'shift_linear': lambda x: shift_linear(x, x.new_ones(5, x.shape[1], 1, 1), None),
    'dynamic_conv': lambda x: dynamic_conv(x, x, x.new_ones(9 * 4, x.shape[1], 1, 1), x.new_ones(9 * 4), 3),
    'aggregate': lambda x: aggregate(x, x.new_ones(len(x), 9 * 4, *x.shape[2:]), 3),
    'separable_conv': lambda x: separable_conv(
        x, *norm(x), 1e-5, x.new_ones(6, x.shape[1], 1, 1), x.new_ones(6, 1, 3, 3)
    ),
    'gated_feed_forward': lambda x: gated_feed_forward(
        x, *norm(x), 1e-5, x.new_ones(6, x.shape[1], 1, 1), x.new_ones(6, 1, 3, 3), x.new_ones(x.shape[1], 3, 1, 1)
    ),
    'cluster_attention, e': lambda x: cluster_attention(x, other(x), torch.ones(1, 2, x.shape[1]), 4),
    'cluster_attention, v': lambda x: cluster_attention(other(x), x, torch.ones(1, 2, 4), 4),
    'channel_attention': lambda x: channel_attention(x, torch.ones(1), 'relu'),
}


@pytest.mark.parametrize('name', OPERATIONS)
def test_no_integers(name):
    with pytest.raises(ValueError, match=r'floating dtype; got.* torch\.int64'):
        OPERATIONS[name](torch.ones(2, 12, 8, 4, dtype=torch.int64))


@pytest.mark.parametrize('shape', [(0, 12, 8, 4), (2, 0, 8, 4), (2, 12, 0, 4), (2, 12, 8, 0)], ids=str)
@pytest.mark.parametrize('name', OPERATIONS)
def test_nothing_at_all(name, shape):
    if name == 'channel_attention' and shape[1]:
        assert OPERATIONS[name](torch.empty(shape)).shape == (shape[0], 4, *shape[2:])
        return
    with pytest.raises(ValueError, match=r'must have (elements|channels)|must be a token'):
        OPERATIONS[name](torch.empty(shape))


def test_one_dtype():
    x = torch.rand(1, 5, 4, 4)
    weight = torch.rand(5, 5, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'one dtype; got torch\.float32 and \[torch\.float64\]'):
        shift_linear(x, weight, None)
    with torch.autocast('cpu', torch.bfloat16):
        assert shift_linear(x, weight.float(), None).dtype == torch.bfloat16
