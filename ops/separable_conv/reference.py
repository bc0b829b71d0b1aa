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
    if not in_strips(x, pointwise):
        return convolve(layer_norm(x, norm_weight, norm_bias, eps), pointwise, depthwise)
    y = x.new_empty(0)
    for rows, inner, strip in normed_strips(x, norm_weight, norm_bias, eps, len(pointwise)):
        strip = convolve(strip, pointwise, depthwise)[:, :, inner]
        if not rows.start:  # made here, for the dtype that autocast gives a convolution
            y = torch.empty(
                (*strip.shape[:2], *x.shape[2:]),
                dtype=strip.dtype,
                device=x.device,
                memory_format=torch.channels_last,
            )
        y[:, :, rows] = strip
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise over the channels at each pixel of (B, C, H, W)."""
    dtype = x.dtype
    if torch.is_grad_enabled() and x.device.type == 'cpu' and dtype in (torch.bfloat16, torch.float16):
        # PyTorch would sum the gradients of weight and bias over the pixels in half precision there.
        x, weight, bias = x.float(), weight.float(), bias.float()
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).to(dtype).permute(0, 3, 1, 2)


def convolve(x: Tensor, pointwise: Tensor, depthwise: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, pointwise), depthwise, padding=1, groups=len(depthwise))


def in_strips(x: Tensor, pointwise: Tensor) -> bool:
    """Whether the map is worked on a strip at a time, for a CPU's cache.

    Autograd keeps everything, and a compiler blocks by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != 'cpu':
        return False
    return x.shape[0] * len(pointwise) * x.shape[2] * x.shape[3] > STRIP_ELEMENTS


def normed_strips(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, channels: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The normalised map a few rows at a time, for a 3x3 convolution of ``channels`` channels.

    Yields:
        The rows, those rows within the strip, and the strip: with a row more above and below where there is one.
    """
    b, _, h, w = x.shape
    length = max(1, STRIP_ELEMENTS // (b * w * channels))
    for top in range(0, h, length):
        bottom, first = min(top + length, h), max(top - 1, 0)
        strip = layer_norm(x[:, :, first : bottom + 1], norm_weight, norm_bias, eps)
        yield slice(top, bottom), slice(top - first, bottom - first), strip
