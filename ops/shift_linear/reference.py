"""Shift and 1x1 convolution in plain PyTorch: the definition that every kernel is tested against."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Without autograd the map is worked on in strips of rows with about this many elements, which stay in cache.
STRIP_ELEMENTS = 2**19


def shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    b, _, h, w = x.shape
    rows = max(1, STRIP_ELEMENTS // max(1, b * w * max(weight.shape[:2])))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or rows >= h:
        whole = F.conv2d(shift(x), weight, bias)
        whole = whole.relu() if activation == 'relu' else whole
        return whole if residual is None else whole + residual.to(whole.dtype)
    top, y = 0, x.new_empty(0)
    for shifted in _strips(x, rows):
        strip = F.conv2d(shifted, weight, bias)
        if not top:  # made here, for the dtype that autocast gives a convolution
            y = torch.empty(
                (b, len(weight), h, w), dtype=strip.dtype, device=x.device, memory_format=torch.channels_last
            )
        bottom = top + strip.shape[2]
        strip = strip.relu_() if activation == 'relu' else strip
        strip = strip if residual is None else strip.add_(residual[:, :, top:bottom])
        y[:, :, top:bottom] = strip
        top = bottom
    return y


def _strips(x: Tensor, rows: int) -> Iterator[Tensor]:
    """The shifted map, ``rows`` rows at a time, each in the same memory."""
    b, c, h, w = x.shape
    g = c // 5
    left, right, up, down, rest = (slice(i * g, (i + 1) * g if i < 4 else c) for i in range(5))
    # The zeros at the left and right are written once and stay.
    y = torch.zeros((b, rows, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        y = y[:, :, : bottom - top]
        y[:, left, :, :-1] = x[:, left, top:bottom, 1:]
        y[:, right, :, 1:] = x[:, right, top:bottom, :-1]
        y[:, up, : min(bottom + 1, h) - top - 1] = x[:, up, top + 1 : bottom + 1]
        y[:, down, int(not top) :] = x[:, down, max(top - 1, 0) : bottom - 1]
        y[:, rest] = x[:, rest, top:bottom]
        if bottom == h:
            y[:, up, -1] = 0
        yield y


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


def _moved(x: Tensor, direction: int = 1) -> Tensor:
    """:func:`shift` by padding and concatenating; -1 moves the other way."""
    g = x.shape[1] // 5
    left, right, up, down, rest = F.pad(x, (1, 1, 1, 1)).split([g, g, g, g, x.shape[1] - 4 * g], dim=1)
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
