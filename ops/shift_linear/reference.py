"""Shift and 1x1 convolution in plain PyTorch: the definition that every kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Without autograd the map is worked on in strips of rows with about this many elements, which stay in cache.
STRIP_ELEMENTS = 2**20


def shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = F.conv2d(shift(x), weight, bias)
        y = y.relu() if activation == 'relu' else y
        return y if residual is None else y + residual
    b, _, h, w = x.shape
    rows = max(1, STRIP_ELEMENTS // (b * w * max(weight.shape[:2])))
    y = None
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        strip = F.conv2d(_move(x, +1, top, bottom), weight, bias)
        if y is None:  # made here, for the dtype that autocast gives a convolution
            y = torch.empty(
                (b, len(weight), h, w), dtype=strip.dtype, device=x.device, memory_format=torch.channels_last
            )
        strip = strip.relu_() if activation == 'relu' else strip
        strip = strip if residual is None else strip.add_(residual[:, :, top:bottom])
        y[:, :, top:bottom] = strip
    return y


def shift(x: Tensor) -> Tensor:
    """The first four fifths of the channels moved by a pixel left, right, up and down, 0 entering; (B, C, H, W)."""
    if not torch.compiler.is_compiling():
        return _Shift.apply(x, +1)
    g = x.shape[1] // 5
    left, right, up, down, rest = F.pad(x, (1, 1, 1, 1)).split([g, g, g, g, x.shape[1] - 4 * g], dim=1)
    parts = (left[..., 1:-1, 2:], right[..., 1:-1, :-2], up[..., 2:, 1:-1], down[..., :-2, 1:-1], rest[..., 1:-1, 1:-1])
    return torch.cat(parts, dim=1)


class _Shift(torch.autograd.Function):
    """The gradient of a shift is the opposite shift, one pass where that of padding and slicing would be many."""

    @staticmethod
    def forward(x: Tensor, direction: int) -> Tensor:
        return _move(x, direction, 0, x.shape[2])

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.direction = inputs[1]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _Shift.apply(grad, -ctx.direction), None


def _move(x: Tensor, direction: int, top: int, bottom: int) -> Tensor:
    """Rows [top, bottom) of the shifted map (B, C, H, W); direction -1 moves the other way."""
    b, c, h, w = x.shape
    g = c // 5
    y = torch.empty_like(x[:, :, top:bottom])
    for i, step in enumerate((direction, -direction)):
        source, target = x[:, i * g : (i + 1) * g, top:bottom], y[:, i * g : (i + 1) * g]
        if step > 0:
            target[..., :-1], target[..., -1] = source[..., 1:], 0
        else:
            target[..., 1:], target[..., 0] = source[..., :-1], 0
    for i, step in enumerate((direction, -direction), start=2):
        target = y[:, i * g : (i + 1) * g]
        first, last = max(top + step, 0), min(bottom + step, h)  # the rows of x that there are to read
        target[:, :, first - step - top : last - step - top] = x[:, i * g : (i + 1) * g, first:last]
        if first > top + step:
            target[:, :, 0] = 0
        if last < bottom + step:
            target[:, :, -1] = 0
    y[:, 4 * g :] = x[:, 4 * g :, top:bottom]
    return y
