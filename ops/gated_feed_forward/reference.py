"""The gated feed-forward in plain PyTorch: the definition that every kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.ops.separable_conv.reference import in_strips, separable_conv, strips


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    if not in_strips(x, project_in):
        a, b = separable_conv(x, norm_weight, norm_bias, eps, project_in, depthwise).chunk(2, dim=1)
        return (x + F.conv2d(F.gelu(a) * b, project_out)).to(x.dtype)
    y = torch.empty_like(x)
    for top, bottom, strip in strips(x, norm_weight, norm_bias, eps, project_in, depthwise):
        a, b = strip.chunk(2, dim=1)
        y[:, :, top:bottom] = x[:, :, top:bottom] + F.conv2d(F.gelu(a).mul_(b), project_out)
    return y
