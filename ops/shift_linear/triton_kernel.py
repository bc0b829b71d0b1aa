"""Shift and 1x1 convolution as one matrix product whose loads are displaced; in the gradient of x, its stores."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.maps import new_map, rows

# That the gradient of the parameters is spread over at most: two for each multiprocessor of a large device. Each part
# of the pixels has partial sums of its own, which are written and read once more.
PARAMETER_PROGRAMS = 256

# One compilation serves them all.
SIZES = ('pixels', 'height', 'width', 'share')


@triton.jit
def _displacement(c, IN: tl.constexpr):
    """Where channel c reads, relative to its own pixel: rows, columns."""
    g: tl.constexpr = IN // 5
    rows = tl.where((c >= 2 * g) & (c < 3 * g), 1, tl.where((c >= 3 * g) & (c < 4 * g), -1, 0))
    columns = tl.where(c < g, 1, tl.where(c < 2 * g, -1, 0))
    return rows, columns


@triton.jit
def _is_inside(row, column, rows, columns, height, width):
    """Whether the pixels at (row, column), displaced by (rows, columns), are on the map: (pixels, channels)."""
    row, column = row[:, None] + rows[None, :], column[:, None] + columns[None, :]
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _load_shifted(x, p, c, pixels, height, width, IN: tl.constexpr):
    """The shifted map at pixels p, channels c: (pixels, channels)."""
    rows, columns = _displacement(c, IN)
    inside = _is_inside(p // width % height, p % width, rows, columns, height, width)
    inside &= (p < pixels)[:, None] & (c < IN)[None, :]
    return tl.load(x + p.to(tl.int64)[:, None] * IN + ((rows * width + columns) * IN + c)[None, :], inside, 0.0)


@triton.jit
def _load_gradient(gradient, y, p, o, pixels, OUT: tl.constexpr):
    """The gradient before the activation at pixels p, channels o; y is the result of ReLU, or None."""
    at = p.to(tl.int64)[:, None] * OUT + o[None, :]
    exists = (p < pixels)[:, None] & (o < OUT)[None, :]
    tile = tl.load(gradient + at, exists, 0.0)
    if y is not None:
        tile = tl.where(tl.load(y + at, exists, 0.0) <= 0, 0.0, tile)
    return tile


@triton.jit(do_not_specialize=SIZES)
def _shift_linear(
    x,
    weight,
    bias,
    residual,
    y,
    pixels,
    height,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(OUT, BLOCK_OUT)
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    z = tl.zeros((BLOCK_P, BLOCK_OUT), tl.float32)
    for start in range(0, IN, BLOCK_IN):
        c = start + tl.arange(0, BLOCK_IN)
        tile = _load_shifted(x, p, c, pixels, height, width, IN)
        factor = tl.load(weight + o[None, :] * IN + c[:, None], (c < IN)[:, None] & (o < OUT)[None, :], 0.0)
        z = tl.dot(tile, factor, z, input_precision=PRECISION)
    if bias is not None:
        z += tl.load(bias + o, o < OUT, 0.0).to(tl.float32)[None, :]
    if RELU:
        z = tl.where(z < 0, 0.0, z)
    at = p.to(tl.int64)[:, None] * OUT + o[None, :]
    exists = (p < pixels)[:, None] & (o < OUT)[None, :]
    if residual is not None:
        z += tl.load(residual + at, exists, 0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def _input_gradient(
    gradient,
    y,
    weight,
    grad_x,
    pixels,
    height,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(IN, BLOCK_IN)
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    shifted = tl.zeros((BLOCK_P, BLOCK_IN), tl.float32)
    for start in range(0, OUT, BLOCK_OUT):
        o = start + tl.arange(0, BLOCK_OUT)
        tile = _load_gradient(gradient, y, p, o, pixels, OUT)
        factor = tl.load(weight + o[:, None] * IN + c[None, :], (o < OUT)[:, None] & (c < IN)[None, :], 0.0)
        shifted = tl.dot(tile, factor, shifted, input_precision=PRECISION)
    # What pixel p read there is stored there.
    rows, columns = _displacement(c, IN)
    row, column = p // width % height, p % width
    exists = (p < pixels)[:, None] & (c < IN)[None, :]
    at = grad_x + p.to(tl.int64)[:, None] * IN
    inside = exists & _is_inside(row, column, rows, columns, height, width)
    tl.store(at + ((rows * width + columns) * IN + c)[None, :], shifted.to(grad_x.dtype.element_ty), inside)
    # Nobody read this element of pixel p: its reader would be outside.
    unread = exists & (_is_inside(row, column, -rows, -columns, height, width) == 0)
    tl.store(at + c[None, :], tl.zeros((BLOCK_P, BLOCK_IN), grad_x.dtype.element_ty), unread)


@triton.jit(do_not_specialize=SIZES)
def _parameter_gradients(
    gradient,
    y,
    x,
    grad_weight,
    grad_bias,
    pixels,
    height,
    width,
    share,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(IN, BLOCK_IN)
    part = tl.program_id(1)
    o = tl.program_id(0) // blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = tl.program_id(0) % blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    of_weight, of_bias = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32), tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(part * share, (part + 1) * share, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        tile = _load_gradient(gradient, y, p, o, pixels, OUT)
        of_bias += tl.sum(tile.to(tl.float32), 0)
        shifted = _load_shifted(x, p, c, pixels, height, width, IN)
        of_weight = tl.dot(tl.trans(tile), shifted, of_weight, input_precision=PRECISION)
    exists = (o < OUT)[:, None] & (c < IN)[None, :]
    tl.store(grad_weight + (part * OUT + o)[:, None] * IN + c[None, :], of_weight, exists)
    if tl.program_id(0) % blocks == 0:
        tl.store(grad_bias + part * OUT + o, of_bias, o < OUT)


def shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """:func:`attnsr.ops.shift_linear.shift_linear` in the dtype of ``x``, one that the kernels compute on."""
    weight = weight.flatten(1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    residual = None if residual is None else residual.to(x.dtype)
    if activation == 'relu' and residual is not None:
        # Added outside, as the gradient reads in the operator's result what passed ReLU.
        return _shift_linear_operator(x, weight, bias, None, True) + residual
    return _shift_linear_operator(x, weight, bias, residual, activation == 'relu')


@torch.library.custom_op('attnsr::shift_linear', mutates_args=())
def _shift_linear_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    (b, c, h, w), o = x.shape, len(weight)
    y = new_map(x, o)
    block_p, block_o, block_c = _blocks(x, o)
    launching.launch(
        _shift_linear,
        (triton.cdiv(b * h * w, block_p) * triton.cdiv(o, block_o),),
        rows(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else rows(residual),
        y,
        b * h * w,
        h,
        w,
        IN=c,
        OUT=o,
        RELU=relu,
        PRECISION=launching.input_precision(x),
        BLOCK_P=block_p,
        BLOCK_OUT=block_o,
        BLOCK_IN=block_c,
        num_stages=3,
    )
    return y


@torch.library.custom_op('attnsr::shift_linear_input_gradient', mutates_args=())
def _input_gradient_operator(gradient: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
    """Of x; y is the result if that is of ReLU."""
    (b, o, h, w), c = gradient.shape, weight.shape[1]
    grad_x = new_map(gradient, c)
    block_p, block_c, block_o = _blocks(gradient, c)
    launching.launch(
        _input_gradient,
        (triton.cdiv(b * h * w, block_p) * triton.cdiv(c, block_c),),
        rows(gradient),
        None if y is None else rows(y),
        weight.contiguous(),
        grad_x,
        b * h * w,
        h,
        w,
        IN=c,
        OUT=o,
        PRECISION=launching.input_precision(gradient),
        BLOCK_P=block_p,
        BLOCK_OUT=block_o,
        BLOCK_IN=block_c,
        num_stages=3,
    )
    return grad_x


@torch.library.custom_op('attnsr::shift_linear_parameter_gradients', mutates_args=())
def _parameter_gradients_operator(gradient: Tensor, y: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight, as (O, C), and bias; y is the result if that is of ReLU."""
    (b, c, h, w), o = x.shape, gradient.shape[1]
    block_o, block_c, block_p = _blocks(x, 64)
    blocks = triton.cdiv(o, block_o) * triton.cdiv(c, block_c)
    tiles = triton.cdiv(b * h * w, block_p)
    share = triton.cdiv(tiles, max(1, PARAMETER_PROGRAMS // blocks))  # of a part, in tiles
    parts = triton.cdiv(tiles, share) if share else 0
    of_weight = torch.empty((parts, o, c), dtype=torch.float32, device=x.device)
    of_bias = torch.empty((parts, o), dtype=torch.float32, device=x.device)
    launching.launch(
        _parameter_gradients,
        (blocks, parts),
        rows(gradient),
        None if y is None else rows(y),
        rows(x),
        of_weight,
        of_bias,
        b * h * w,
        h,
        w,
        share * block_p,
        IN=c,
        OUT=o,
        PRECISION=launching.input_precision(x),
        BLOCK_P=block_p,
        BLOCK_OUT=block_o,
        BLOCK_IN=block_c,
        num_stages=3,
    )
    return of_weight.sum(0).to(x.dtype), of_bias.sum(0).to(x.dtype)


@_shift_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    return new_map(x, len(weight))


@_input_gradient_operator.register_fake
def _(gradient: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
    return new_map(gradient, weight.shape[1])


@_parameter_gradients_operator.register_fake
def _(gradient: Tensor, y: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(gradient.shape[1], x.shape[1]), x.new_empty(gradient.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, relu = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
    grad_x = _input_gradient_operator(gradient, y, weight) if needs_x else None
    grad_weight = grad_bias = None
    if needs_weight or needs_bias:
        grad_weight, grad_bias = _parameter_gradients_operator(gradient, y, x)
    return grad_x, grad_weight, grad_bias if needs_bias else None, gradient if needs_residual else None, None


_shift_linear_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.attnsr.shift_linear, torch.ops.attnsr.shift_linear_input_gradient])
def _product_flops(map_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    b, channels, h, w = map_shape
    return 2 * b * h * w * channels * out_shape[1]


@register_flop_formula(torch.ops.attnsr.shift_linear_parameter_gradients)
def _parameter_gradients_flops(gradient_shape: Any, y_shape: Any, x_shape: Any, **_: Any) -> int:
    b, channels, h, w = gradient_shape
    return 2 * b * h * w * channels * x_shape[1]


def _blocks(x: Tensor, columns: int) -> tuple[int, int, int]:
    """Rows and columns of a block of a product's result, and how many terms are summed at a time.

    Sized so that the sums stay in registers, and three programs or more are resident on a multiprocessor, whose loads
    cover each other's latency.
    """
    if launching.is_exact(x):
        return 64, 64, 16
    # With few idle lanes first, then wide: the other factor is read again for every block of columns.
    return 64, min((128, 64), key=lambda width: triton.cdiv(columns, width) * width), 32
