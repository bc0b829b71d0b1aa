"""The gated feed-forward in plain PyTorch: the definition that every kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.ops.separable_conv.reference import convolve, in_strips, layer_norm, normed_strips


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    # Halved here, not after the convolutions: GELU takes several times longer on a slice of the channels.
    halves = tuple(zip(project_in.chunk(2), depthwise.chunk(2), strict=True))
    if not in_strips(x, project_in):
        normed = layer_norm(x, norm_weight, norm_bias, eps)
        a, b = (convolve(normed, *half) for half in halves)
        return (x + F.conv2d(F.gelu(a) * b, project_out)).to(x.dtype)
    y = torch.empty_like(x)
    for rows, inner, strip in normed_strips(x, norm_weight, norm_bias, eps, len(project_in)):
        a, b = (convolve(strip, *half)[:, :, inner] for half in halves)
        y[:, :, rows] = x[:, :, rows] + F.conv2d(F.gelu(a).mul_(b), project_out)
    return y
