"""Shift and 1x1 convolution in plain PyTorch: the definition that every kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.conv2d(shift(x), weight, bias)
    return F.relu_(y) if activation == 'relu' else y


def shift(x: Tensor) -> Tensor:
    """Move the first four fifths of the channels one pixel left, right, up and down; see :func:`shift_linear`."""
    if torch.compiler.is_compiling():
        # A compiler sees through the padded form; slice assignments below would be opaque to it.
        g = x.shape[1] // 5
        p = F.pad(x, (1, 1, 1, 1))
        left, right, up, down, rest = p.split([g, g, g, g, x.shape[1] - 4 * g], dim=1)
        return torch.cat(
            (
                left[:, :, 1:-1, 2:],
                right[:, :, 1:-1, :-2],
                up[:, :, 2:, 1:-1],
                down[:, :, :-2, 1:-1],
                rest[:, :, 1:-1, 1:-1],
            ),
            dim=1,
        )
    return _Shift.apply(x)


class _Shift(torch.autograd.Function):
    """One pass over the map, where padding and concatenating would take two; its gradient is the opposite shift."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _move(x, +1)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _Unshift.apply(grad)


class _Unshift(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _move(x, -1)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _Shift.apply(grad)


def _move(x: Tensor, direction: int) -> Tensor:
    """Read at +direction along W, -direction along W, then the same along H; 0 outside, the last channels as is."""
    g = x.shape[1] // 5
    y = torch.empty_like(x)
    for i, (dim, step) in enumerate(((3, direction), (3, -direction), (2, direction), (2, -direction))):
        source, target = x[:, i * g : (i + 1) * g], y[:, i * g : (i + 1) * g]
        size = x.shape[dim]
        if step > 0:
            target.narrow(dim, 0, size - 1).copy_(source.narrow(dim, 1, size - 1))
            target.narrow(dim, size - 1, 1).zero_()
        else:
            target.narrow(dim, 1, size - 1).copy_(source.narrow(dim, 0, size - 1))
            target.narrow(dim, 0, 1).zero_()
    y[:, 4 * g :].copy_(x[:, 4 * g :])
    return y
