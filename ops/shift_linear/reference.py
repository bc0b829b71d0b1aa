"""Shift and 1x1 convolution in plain PyTorch: the definition that every kernel is tested against."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU without autograd the map is worked on in strips of rows with about this many elements, which stay in cache.
STRIP_ELEMENTS = 2**21


def shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != 'cpu':
        whole = F.conv2d(shift(x), weight, bias)
        whole = whole.relu() if activation == 'relu' else whole
        return whole if residual is None else whole + residual.to(whole.dtype)
    b, c, h, w = x.shape
    length = min(h, max(1, STRIP_ELEMENTS // max(1, b * w * max(weight.shape[:2]))))
    y, memory = x.new_empty(0), strip_memory(x, c, length)
    for top in range(0, h, length):
        rows = slice(top, min(top + length, h))
        strip = F.conv2d(shifted_rows(memory, x, rows, h), weight, bias)
        strip = strip.relu_() if activation == 'relu' else strip
        strip = strip if residual is None else strip.add_(residual[:, :, rows])
        if length == h:
            return strip
        if not top:  # made here, for the dtype that autocast gives a convolution
            y = torch.empty(
                (b, len(weight), h, w), dtype=strip.dtype, device=x.device, memory_format=torch.channels_last
            )
        y[:, :, rows] = strip
    return y


def strip_memory(x: Tensor, channels: int, rows: int) -> Tensor:
    """For :func:`shifted_rows` of at most so many rows of a map as wide as x."""
    y = torch.empty((x.shape[0], rows, x.shape[3], channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    g = channels // 5
    y[:, :g, :, -1:] = 0  # stays
    y[:, g : 2 * g, :, :1] = 0
    return y


def shifted_rows(memory: Tensor, x: Tensor, rows: slice, height: int, first: int = 0, relu: bool = False) -> Tensor:
    """Some rows of the shifted map, in :func:`strip_memory`; not for autograd.

    Args:
        memory: Written to, and what is returned is its beginning.
        x: The map's rows from ``first`` on, one more than asked for above and below where the map has one.
        rows: Of the shifted map.
        height: Of the map.
        first: See x.
        relu: Whether x is first to be set to 0 where it is less.
    """
    top, bottom, count = rows.start - first, rows.stop - first, rows.stop - rows.start
    g = x.shape[1] // 5
    left, right, up, down, rest = (slice(i * g, (i + 1) * g if i < 4 else None) for i in range(5))
    above, below = int(not rows.start), int(rows.stop == height)  # rows outside the map
    y = memory[:, :, :count]
    for to, of in (
        (y[:, left, :, :-1], x[:, left, top:bottom, 1:]),
        (y[:, right, :, 1:], x[:, right, top:bottom, :-1]),
        (y[:, up, : count - below], x[:, up, top + 1 : bottom + 1 - below]),
        (y[:, down, above:], x[:, down, top - 1 + above : bottom - 1]),
        (y[:, rest], x[:, rest, top:bottom]),
    ):
        if relu:
            torch.clamp_min(of, 0, out=to)
        else:
            to.copy_(of)
    y[:, up, count - below :] = 0
    y[:, down, :above] = 0
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
