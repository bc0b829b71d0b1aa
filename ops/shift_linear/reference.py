"""Shift and 1x1 convolution in plain PyTorch: the definition that every kernel is tested against."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Without autograd the map is worked on in strips of rows with about this many elements, which stay in cache.
STRIP_ELEMENTS = 2**19


def shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        whole = F.conv2d(shift(x), weight, bias)
        whole = whole.relu() if activation == 'relu' else whole
        return whole if residual is None else whole + residual
    b, _, h, w = x.shape
    rows = max(1, STRIP_ELEMENTS // (b * w * max(weight.shape[:2])))
    y: Tensor | None = None
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        # With the row above and below the strip, as far as there are any.
        above, below = min(top, 1), min(h - bottom, 1)
        strip = F.conv2d(_moved(x[:, :, top - above : bottom + below], 1 - above, 1 - below), weight, bias)
        if y is None:  # made here, for the dtype that autocast gives a convolution
            y = torch.empty(
                (b, len(weight), h, w), dtype=strip.dtype, device=x.device, memory_format=torch.channels_last
            )
        strip = strip.relu_() if activation == 'relu' else strip
        strip = strip if residual is None else strip.add_(residual[:, :, top:bottom])
        y[:, :, top:bottom] = strip
    assert y is not None
    return y


def shift(x: Tensor) -> Tensor:
    """The first four fifths of the channels moved by a pixel left, right, up and down, 0 entering; (B, C, H, W)."""
    return _moved(x) if torch.compiler.is_compiling() else _Shift.apply(x, +1)


class _Shift(torch.autograd.Function):
    """The gradient of a shift is the opposite shift, one pass where that of padding and slicing would be many."""

    @staticmethod
    def forward(x: Tensor, direction: int) -> Tensor:
        return _moved(x, direction=direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.direction = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Shift.apply(grad, -ctx.direction), None


def _moved(x: Tensor, above: int = 1, below: int = 1, direction: int = 1) -> Tensor:
    """The map (B, C, H + above + below - 2, W) shifted, ``above`` and ``below`` being the rows of 0 around ``x``."""
    g = x.shape[1] // 5
    left, right, up, down, rest = F.pad(x, (1, 1, above, below)).split([g, g, g, g, x.shape[1] - 4 * g], dim=1)
    here, after, before = slice(1, -1), slice(2, None), slice(0, -2)
    if direction < 0:
        after, before = before, after
    return torch.cat(
        (
            left[:, :, here, after],
            right[:, :, here, before],
            up[:, :, after, here],
            down[:, :, before, here],
            rest[:, :, here, here],
        ),
        dim=1,
    )
