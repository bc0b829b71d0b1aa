"""Dynamic convolution in plain PyTorch: the definition that every kernel is tested against.

Shapes: G kernels of K x K taps a pixel, each for a run of C / G channels; K is ``size``.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnsr.ops.autocast import autocast_input, without_autocast

# Kernels are predicted for strips of rows, about this many numbers at a time, which stay in cache.
STRIP_ELEMENTS = 3 * 2**19

Index: TypeAlias = tuple[int, slice, slice]  # of rows in a map (B, C, H, W)


def dynamic_conv(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    u, z = autocast_input(u), autocast_input(z)
    exact = torch.promote_types(u.dtype, torch.float32)
    weight, bias = weight.flatten(1).to(exact), bias.to(exact)
    # Autocast would take the products in half precision.
    with without_autocast(u):
        if u.is_meta:  # nothing is computed but the operations counted
            return defined(u, z, weight, bias, size)
        if torch.compiler.is_compiling():
            return _row_by_row(u, z, weight, bias, size)
        return _DynamicConv.apply(u, z, weight, bias, size)


def defined(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """The definition, with the kernels and the surroundings of all pixels at once."""
    k = _kernels(z, weight, bias, size).flatten(3)
    near = F.unfold(u.to(k.dtype), size, padding=size // 2).unflatten(1, (k.shape[1], -1, size**2))
    return torch.einsum('bgtn,bgrtn->bgrn', k, near).reshape(u.shape).to(u.dtype)


def _row_by_row(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """A row of taps at a time: short for a compiler, which makes one pass of it."""
    height = u.shape[2]
    k = _kernels(z, weight, bias, size).unflatten(2, (size, size))
    padded = F.pad(u.to(k.dtype), (size // 2,) * 4).unflatten(1, (k.shape[1], -1))
    y = torch.zeros_like(u, dtype=k.dtype).unflatten(1, padded.shape[1:3])
    for i in range(size):
        near = padded[:, :, :, i : i + height].unfold(4, size, 1)  # (B, G, C / G, H, W, K)
        y = y + (k[:, :, None, i] * near.permute(0, 1, 2, 5, 3, 4)).sum(3)
    return y.flatten(1, 2).to(u.dtype)


def _kernels(z: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """The kernels of all pixels: (B, G, K * K, H, W)."""
    return F.conv2d(z.to(weight.dtype), weight[:, :, None, None], bias).unflatten(1, (-1, size**2))


class _DynamicConv(torch.autograd.Function):
    """Strip by strip. For the gradients the kernels are predicted again: kept, they would be most of the memory."""

    @staticmethod
    def forward(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
        y = torch.empty_like(u, memory_format=torch.channels_last)
        strips = _Strips(u, z, weight, bias, size)
        total = torch.empty_like(strips.near(0))
        for at in strips:
            torch.mul(strips.near(0), strips.kernels[:, :1], out=total)
            for tap in range(1, size**2):
                total.addcmul_(strips.near(tap), strips.kernels[:, tap : tap + 1])
            y[at] = strips.pixels(total, at)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        *tensors, ctx.size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        u, z, weight, bias = ctx.saved_tensors
        grad_u, grad_z, grad_weight, grad_bias = (torch.zeros_like(x, dtype=weight.dtype) for x in (u, z, weight, bias))
        with torch.autocast(u.device.type, enabled=False):
            strips = _Strips(u, z, weight, bias, ctx.size)
            grad_kernels, grad_near = torch.empty_like(strips.kernels), torch.empty_like(strips.padded_u)
            grad_y, products = torch.empty_like(strips.near(0)), torch.empty_like(strips.near(0))
            for at in strips:
                grad_y.zero_()  # the margins, and what a last, shorter strip does not fill
                strips.pixels(grad_y, at).copy_(grad[at])
                grad_near.zero_()
                for tap in range(ctx.size**2):
                    torch.mul(grad_y, strips.near(tap), out=products)
                    torch.sum(products, 1, out=grad_kernels[:, tap])
                    strips.near(tap, grad_near).addcmul_(grad_y, strips.kernels[:, tap : tap + 1])
                rows = grad_kernels.flatten(0, 1)
                grad_u[strips.around(at)] += strips.surroundings(grad_near, at)
                grad_z[at] = strips.pixels(weight.T @ rows, at)
                grad_weight.addmm_(rows, strips.padded_z)
                grad_bias += rows.sum(1)
        return grad_u.to(u.dtype), grad_z.to(z.dtype), grad_weight, grad_bias, None


class _Strips:
    """Strips of rows of the maps, each in the same memory, with margins of zeros.

    Padded rows lie one after the other, those of u with ``size // 2`` more above and below. So what all pixels of a
    strip have at one tap is a run of that memory, and the taps differ in where it begins.

    Attributes:
        kernels: The kernels of the strip: (G, K * K, pixels).
        padded_u: (C, pixels with the rows above and below and the rest of the last tap's run).
        padded_z: (pixels, D).
    """

    def __init__(self, u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, size: int) -> None:
        self.u, self.z, self.weight, self.bias, self.size = u, z, weight, bias, size
        channels, height, self.width = u.shape[1:]
        self.pad = size // 2
        self.stride = self.width + 2 * self.pad
        self.rows = min(height, max(1, STRIP_ELEMENTS // (len(weight) * self.stride)))
        self.length = self.rows * self.stride
        self.kernels = weight.new_empty(len(weight) // size**2, size**2, self.length)
        self.padded_u = weight.new_zeros(channels, self.length + 2 * self.pad * (self.stride + 1))
        self.padded_z = weight.new_zeros(self.length, z.shape[1])

    def __iter__(self) -> Iterator[Index]:
        """Fill the memory with one strip after the other; where in the maps it is."""
        batch, height = self.u.shape[0], self.u.shape[2]
        for image, top in product(range(batch), range(0, height, self.rows)):
            at = image, slice(None), slice(top, min(top + self.rows, height))
            self.pixels(self.padded_z.T, at).copy_(self.z[at])
            torch.addmm(self.bias[:, None], self.weight, self.padded_z.T, out=self.kernels.flatten(0, 1))
            self.padded_u.zero_()
            self.surroundings(self.padded_u, at).copy_(self.u[self.around(at)])
            yield at

    def around(self, at: Index) -> Index:
        """The strip's rows and those that its taps reach, within the map."""
        image, channels, rows = at
        return image, channels, slice(max(rows.start - self.pad, 0), min(rows.stop + self.pad, self.u.shape[2]))

    def near(self, tap: int, padded_u: Tensor | None = None) -> Tensor:
        """What each pixel of the strip has at a tap: (G, C / G, pixels)."""
        i, j = divmod(tap, self.size)
        start = i * self.stride + j
        padded_u = self.padded_u if padded_u is None else padded_u
        return padded_u[:, start : start + self.length].unflatten(0, (len(self.kernels), -1))

    def pixels(self, x: Tensor, at: Index) -> Tensor:
        """The strip's map, without margins, in x (..., pixels): (channels, rows, W)."""
        rows = at[2].stop - at[2].start
        return x.reshape(-1, self.rows, self.stride)[:, :rows, : self.width]

    def surroundings(self, padded_u: Tensor, at: Index) -> Tensor:
        """The strip's map with the rows :meth:`around` in memory as that of ``padded_u``: (C, rows, W)."""
        first, around = max(self.pad - at[2].start, 0), self.around(at)[2]
        rows = padded_u[:, : (self.rows + 2 * self.pad) * self.stride].unflatten(1, (-1, self.stride))
        return rows[:, first : first + around.stop - around.start, self.pad : self.pad + self.width]


def aggregate(u: Tensor, kernels: Tensor, size: int) -> Tensor:
    """The definition with kernels (B, G * K * K, H, W) that are given."""
    u, kernels = autocast_input(u), autocast_input(kernels)
    exact = torch.promote_types(u.dtype, torch.float32)
    k = kernels.to(exact).unflatten(1, (-1, size**2)).flatten(3)
    with without_autocast(u):
        near = F.unfold(u.to(exact), size, padding=size // 2).unflatten(1, (k.shape[1], -1, size**2))
        return torch.einsum('bgtn,bgrtn->bgrn', k, near).reshape(u.shape).to(u.dtype)
