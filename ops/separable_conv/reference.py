"""Layer norm, 1x1 convolution and depthwise 3x3 convolution in plain PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Without autograd a map is worked on in strips of rows with about this many elements each, which the C library can
# serve from memory that it already has, and most of which stay in cache.
STRIP_ELEMENTS = 2**21


def separable_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor
) -> Tensor:
    if in_strips(x, pointwise):
        y = x.new_empty(0)
        for top, bottom, strip in strips(x, norm_weight, norm_bias, eps, pointwise, depthwise):
            if not top:  # made here, for the dtype that autocast gives a convolution
                y = torch.empty(
                    (x.shape[0], *strip.shape[1:2], *x.shape[2:]),
                    dtype=strip.dtype,
                    device=x.device,
                    memory_format=torch.channels_last,
                )
            y[:, :, top:bottom] = strip
        return y
    x = layer_norm(x, norm_weight, norm_bias, eps)
    return F.conv2d(F.conv2d(x, pointwise), depthwise, padding=1, groups=len(depthwise))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise over the channels at each pixel of (B, C, H, W)."""
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def in_strips(x: Tensor, pointwise: Tensor) -> bool:
    """Whether the map is worked on a strip at a time: autograd keeps everything, and a compiler blocks by itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.shape[0] * len(pointwise) * x.shape[2] * x.shape[3] > STRIP_ELEMENTS


def strips(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """:func:`separable_conv` a few rows at a time: first row, row after the last, and (B, O, rows, W)."""
    b, _, h, w = x.shape
    rows = max(1, STRIP_ELEMENTS // (b * w * len(pointwise)))
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        first = max(top - 1, 0)  # a row more above and below for the 3x3 convolution, where there is one
        strip = layer_norm(x[:, :, first : bottom + 1], norm_weight, norm_bias, eps)
        strip = F.conv2d(F.conv2d(strip, pointwise), depthwise, padding=1, groups=len(depthwise))
        yield top, bottom, strip[:, :, top - first : bottom - first]
