"""Layer norm and 1x1 convolution as one matrix product, and depthwise 3x3 convolution; gated_feed_forward uses both."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.maps import new_map, rows

# That a gradient of parameters is spread over at most: a few for each multiprocessor of a large device. Each part of
# the pixels has partial sums of its own, which are written and read once more.
PARAMETER_PROGRAMS = 512

# One compilation serves them all.
SIZES = ('pixels', 'height', 'width', 'tiles', 'share')


@triton.jit
def _statistics(x, p, pixels, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean over the channels, and one over the standard deviation, of pixels p."""
    c = tl.arange(0, BLOCK_C)
    exists = (p < pixels)[:, None] & (c < C)[None, :]
    tile = tl.load(x + p.to(tl.int64)[:, None] * C + c[None, :], exists, 0.0).to(tl.float32)
    mean = tl.sum(tile, 1) / C
    centred = tl.where(exists, tile - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)


@triton.jit
def _normalised(x, mean, scale, p, c, pixels, C: tl.constexpr):
    """x at pixels p, channels c, with mean 0 and variance 1; 0 where there is none."""
    exists = (p < pixels)[:, None] & (c < C)[None, :]
    tile = tl.load(x + p.to(tl.int64)[:, None] * C + c[None, :], exists, 0.0).to(tl.float32)
    return tl.where(exists, (tile - mean[:, None]) * scale[:, None], 0.0)


@triton.jit
def _normed(x, norm_weight, norm_bias, mean, scale, p, c, pixels, C: tl.constexpr):
    """The layer norm of x at pixels p, channels c."""
    weight = tl.load(norm_weight + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(norm_bias + c, c < C, 0.0).to(tl.float32)
    return _normalised(x, mean, scale, p, c, pixels, C) * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=SIZES)
def _normed_product(
    x,
    norm_weight,
    norm_bias,
    weight,
    y,
    pixels,
    eps,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(OUT, BLOCK_OUT)
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mean, scale = _statistics(x, p, pixels, eps, C, BLOCK_C)
    z = tl.zeros((BLOCK_P, BLOCK_OUT), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        tile = _normed(x, norm_weight, norm_bias, mean, scale, p, c, pixels, C).to(weight.dtype.element_ty)
        factor = tl.load(weight + o[None, :] * C + c[:, None], (c < C)[:, None] & (o < OUT)[None, :], 0.0)
        z = tl.dot(tile, factor, z, input_precision=PRECISION)
    at = y + p.to(tl.int64)[:, None] * OUT + o[None, :]
    tl.store(at, z.to(y.dtype.element_ty), (p < pixels)[:, None] & (o < OUT)[None, :])


@triton.jit
def tile_pixels(tile, height, width, SIDE: tl.constexpr):
    """Of the SIDE x SIDE pixels of a tile, some of them beyond the map: index in the whole batch, row, column."""
    across, down = tl.cdiv(width, SIDE), tl.cdiv(height, SIDE)
    i = tl.arange(0, SIDE * SIDE)
    row, column = tile // across % down * SIDE + i // SIDE, tile % across * SIDE + i % SIDE
    first = (tile // across // down).to(tl.int64) * height * width
    return first + row * width + column, row, column


@triton.jit
def read_at_tap(x, p, row, column, c, down, right, height, width, C: tl.constexpr):
    """The map at pixels p, moved down and right, channels c, in float32; 0 outside."""
    row, column = row + down, column + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = x + (p + down * width + right)[:, None] * C + c[None, :]
    return tl.load(at, inside[:, None] & (c < C)[None, :], 0.0).to(tl.float32)


@triton.jit
def load_tap(taps, c, down, right, C: tl.constexpr):
    """What a depthwise 3x3 kernel, as (9, C), has for channels c of the pixel down and right of its middle."""
    return tl.load(taps + (3 * down + right + 4) * C + c, c < C, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _depthwise(
    x,
    taps,
    y,
    height,
    width,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p, row, column = tile_pixels(tl.program_id(0) // blocks, height, width, SIDE)
    z = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            z += read_at_tap(x, p, row, column, c, down, right, height, width, C) * load_tap(taps, c, down, right, C)
    exists = ((row < height) & (column < width))[:, None] & (c < C)[None, :]
    tl.store(y + p[:, None] * C + c[None, :], z.to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def _depthwise_gradients(
    gradient,
    x,
    taps,
    grad_x,
    grad_taps,
    height,
    width,
    tiles,
    share,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    of_taps = (zero,) * 9
    for tile in range(part * share, tl.minimum((part + 1) * share, tiles)):
        p, row, column = tile_pixels(tile, height, width, SIDE)
        exists = ((row < height) & (column < width))[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        middle = zero if x is None else tl.load(x + at, exists, 0.0).to(tl.float32)
        of_x, sums = zero, ()
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                # What read this pixel at a tap is on the opposite side.
                reader = read_at_tap(gradient, p, row, column, c, -down, -right, height, width, C)
                if grad_x is not None:
                    of_x += reader * load_tap(taps, c, down, right, C)
                sums = sums + (of_taps[3 * down + right + 4] + reader * middle,)  # type: ignore[assignment]
        of_taps = sums  # type: ignore[assignment]
        if grad_x is not None:
            tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), exists)
    if grad_taps is not None:
        for tap in tl.static_range(9):
            tl.store(grad_taps + (part * C + c) * 9 + tap, tl.sum(of_taps[tap], 0), c < C)


@triton.jit(do_not_specialize=SIZES)
def _input_gradients(
    gradient,
    x,
    norm_weight,
    weight,
    residual,
    grad_x,
    grad_norm,
    pixels,
    share,
    eps,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    factor_of_norm = tl.load(norm_weight + c, c < C, 0.0).to(tl.float32)
    of_weight, of_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(part * share, (part + 1) * share, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        of_normed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for k in range(0, OUT, BLOCK_K):
            o = k + tl.arange(0, BLOCK_K)
            exists = (p < pixels)[:, None] & (o < OUT)[None, :]
            tile = tl.load(gradient + p.to(tl.int64)[:, None] * OUT + o[None, :], exists, 0.0)
            factor = tl.load(weight + o[:, None] * C + c[None, :], (o < OUT)[:, None] & (c < C)[None, :], 0.0)
            of_normed = tl.dot(tile, factor, of_normed, input_precision=PRECISION)
        mean, scale = _statistics(x, p, pixels, eps, C, BLOCK_C)
        normalised = _normalised(x, mean, scale, p, c, pixels, C)
        if grad_norm is not None:
            of_weight += tl.sum(of_normed * normalised, 0)
            of_bias += tl.sum(of_normed, 0)
        if grad_x is not None:
            of_normed *= factor_of_norm[None, :]
            along = tl.sum(of_normed * normalised, 1) / C
            z = (of_normed - (tl.sum(of_normed, 1) / C)[:, None] - normalised * along[:, None]) * scale[:, None]
            at = p.to(tl.int64)[:, None] * C + c[None, :]
            exists = (p < pixels)[:, None] & (c < C)[None, :]
            if residual is not None:
                z += tl.load(residual + at, exists, 0.0).to(tl.float32)
            tl.store(grad_x + at, z.to(grad_x.dtype.element_ty), exists)
    if grad_norm is not None:
        tl.store(grad_norm + part * 2 * C + c, of_weight, c < C)
        tl.store(grad_norm + part * 2 * C + C + c, of_bias, c < C)


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient(
    gradient,
    x,
    norm_weight,
    norm_bias,
    grad_weight,
    pixels,
    share,
    eps,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(1)
    o, c = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_OUT, BLOCK_C), tl.float32)
    for start in range(part * share, (part + 1) * share, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        exists = (p < pixels)[:, None] & (o < OUT)[None, :]
        tile = tl.load(gradient + p.to(tl.int64)[:, None] * OUT + o[None, :], exists, 0.0)
        mean, scale = _statistics(x, p, pixels, eps, C, BLOCK_C)
        normed = _normed(x, norm_weight, norm_bias, mean, scale, p, c, pixels, C).to(gradient.dtype.element_ty)
        z = tl.dot(tl.trans(tile), normed, z, input_precision=PRECISION)
    at = grad_weight + (part * OUT + o)[:, None] * C + c[None, :]
    tl.store(at, z, (o < OUT)[:, None] & (c < C)[None, :])


def separable_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor
) -> Tensor:
    """:func:`attnsr.ops.separable_conv.separable_conv`; the result is in the dtype of the convolutions' weights."""
    return _separable_conv_operator(x, norm_weight, norm_bias, eps, pointwise.flatten(1), depthwise.flatten(1))


@torch.library.custom_op('attnsr::separable_conv', mutates_args=())
def _separable_conv_operator(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor
) -> Tensor:
    u = run_normed_product(x, norm_weight, norm_bias, eps, pointwise)
    b, c, h, w = u.shape
    y = new_map(u, c, u.dtype)
    side, block_c = 8, block_of_channels(c)
    launching.launch(
        _depthwise,
        (b * tiles_of(h, w, side) * triton.cdiv(c, block_c),),
        u,
        depthwise.t().contiguous(),
        y,
        h,
        w,
        C=c,
        SIDE=side,
        BLOCK_C=block_c,
    )
    return y


def run_normed_product(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The 1x1 convolution of the layer norm, in the dtype of the weight (O, C)."""
    (b, c, h, w), o = x.shape, len(weight)
    y = new_map(x, o, weight.dtype)
    exact = launching.is_exact(weight)
    block_p, block_o, block_c = 64, 64, launching.padded(c)
    launching.launch(
        _normed_product,
        (triton.cdiv(b * h * w, block_p) * triton.cdiv(o, block_o),),
        rows(x),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        weight.contiguous(),
        y,
        b * h * w,
        eps,
        C=c,
        OUT=o,
        PRECISION=launching.input_precision(weight),
        BLOCK_P=block_p,
        BLOCK_OUT=block_o,
        BLOCK_C=block_c,
        BLOCK_K=16 if exact else block_c,
    )
    return y


@torch.library.custom_op('attnsr::normed_product', mutates_args=())
def normed_product(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """:func:`run_normed_product` for backward passes, without gradients of its own."""
    return run_normed_product(x, norm_weight, norm_bias, eps, weight)


@torch.library.custom_op('attnsr::normed_product_input_gradients', mutates_args=())
def _input_gradients_operator(
    gradient: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    residual: Tensor | None,
    needs_x: bool,
    needs_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, plus ``residual``, and of weight and bias of the norm; without elements where they are not needed."""
    (b, c, h, w), o = x.shape, len(weight)
    exact = launching.is_exact(weight)
    block_p, block_c = 32, launching.padded(c)
    share, parts = shares(b * h * w, block_p, 1)
    grad_x = new_map(x, c if needs_x else 0)
    of_norm = torch.empty((parts, 2, c if needs_norm else 0), dtype=torch.float32, device=x.device)
    launching.launch(
        _input_gradients,
        (parts,),
        rows(gradient),
        rows(x),
        norm_weight.contiguous(),
        weight.contiguous(),
        None if residual is None else rows(residual),
        grad_x if needs_x else None,
        of_norm if needs_norm else None,
        b * h * w,
        share,
        eps,
        C=c,
        OUT=o,
        PRECISION=launching.input_precision(weight),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        BLOCK_K=16 if exact else 32,
    )
    of_weight, of_bias = (of_norm[:, i].sum(0).to(norm_weight.dtype) for i in range(2))
    return grad_x, of_weight, of_bias


@torch.library.custom_op('attnsr::normed_product_weight_gradient', mutates_args=())
def _weight_gradient_operator(
    gradient: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    (b, c, h, w), o = x.shape, gradient.shape[1]
    block_p, block_o, block_c = 16 if launching.is_exact(gradient) else 32, 64, launching.padded(c)
    blocks = triton.cdiv(o, block_o)
    share, parts = shares(b * h * w, block_p, blocks)
    of_weight = torch.empty((parts, o, c), dtype=torch.float32, device=x.device)
    launching.launch(
        _weight_gradient,
        (blocks, parts),
        rows(gradient),
        rows(x),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        of_weight,
        b * h * w,
        share,
        eps,
        C=c,
        OUT=o,
        PRECISION=launching.input_precision(gradient),
        BLOCK_P=block_p,
        BLOCK_OUT=block_o,
        BLOCK_C=block_c,
        num_warps=4 if block_c <= 64 else 8,
    )
    return of_weight.sum(0).to(gradient.dtype)


@torch.library.custom_op('attnsr::depthwise_gradients', mutates_args=())
def depthwise_gradients(gradient: Tensor, x: Tensor | None, weight: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    """Of the map x and the weight (C, 9) of a depthwise 3x3 convolution; without elements where they are not needed.

    That of the weight is, where there is x.
    """
    b, c, h, w = gradient.shape
    side, block_c = 4, block_of_channels(c)
    blocks, tiles = triton.cdiv(c, block_c), b * tiles_of(h, w, side)
    share, parts = shares(tiles, 1, blocks)
    grad_x = new_map(gradient, c if needs_x else 0)
    of_weight = torch.empty((parts, 0 if x is None else c, 9), dtype=torch.float32, device=gradient.device)
    launching.launch(
        _depthwise_gradients,
        (blocks, parts),
        rows(gradient),
        None if x is None else rows(x),
        weight.t().contiguous(),
        grad_x if needs_x else None,
        None if x is None else of_weight,
        h,
        w,
        tiles,
        share,
        C=c,
        SIDE=side,
        BLOCK_C=block_c,
    )
    return grad_x, of_weight.sum(0).to(weight.dtype)


def normed_product_gradients(
    gradient: Tensor, tensors: Sequence[Tensor], eps: float, needs: Sequence[bool], residual: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias of the norm, and the product's weight, which ``tensors`` are and ``needs`` says of each.

    ``residual`` is added to that of x.
    """
    x, norm_weight, norm_bias, weight = tensors
    found: list[Tensor | None] = [None] * 4
    if any(needs[:3]):
        found[:3] = _input_gradients_operator(
            gradient, x, norm_weight, eps, weight, residual, needs[0], needs[1] or needs[2]
        )
    if needs[3]:
        found[3] = _weight_gradient_operator(gradient, x, norm_weight, norm_bias, eps)
    return tuple(of if needed else None for of, needed in zip(found, needs, strict=True))


@_separable_conv_operator.register_fake
def _(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor) -> Tensor:
    return new_map(x, len(pointwise), pointwise.dtype)


@normed_product.register_fake
def _(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    return new_map(x, len(weight), weight.dtype)


@_input_gradients_operator.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    residual: Tensor | None,
    needs_x: bool,
    needs_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    of_weight, of_bias = (norm_weight.new_empty(c if needs_norm else 0) for _ in range(2))
    return new_map(x, c if needs_x else 0), of_weight, of_bias


@_weight_gradient_operator.register_fake
def _(gradient: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    return gradient.new_empty(gradient.shape[1], x.shape[1])


@depthwise_gradients.register_fake
def _(gradient: Tensor, x: Tensor | None, weight: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    c = len(weight)
    return new_map(gradient, c if needs_x else 0), weight.new_empty(0 if x is None else c, 9)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm_weight, norm_bias, ctx.eps, pointwise, depthwise = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, pointwise, depthwise)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, pointwise, depthwise = ctx.saved_tensors
    x = rows(x)  # once for all
    *needs, _, needs_pointwise, needs_depthwise = ctx.needs_input_grad
    needs.append(needs_pointwise)
    u = normed_product(x, norm_weight, norm_bias, ctx.eps, pointwise) if needs_depthwise else None
    of_u, of_depthwise = depthwise_gradients(gradient, u, depthwise, any(needs))
    *of_inputs, of_pointwise = normed_product_gradients(of_u, (x, norm_weight, norm_bias, pointwise), ctx.eps, needs)
    return *of_inputs, None, of_pointwise, of_depthwise if needs_depthwise else None


_separable_conv_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.attnsr.separable_conv)
def _separable_conv_flops(x_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    b, o, h, w = out_shape
    return 2 * b * h * w * o * (x_shape[1] + 9)


@register_flop_formula(torch.ops.attnsr.normed_product)
def _product_flops(x_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    b, o, h, w = out_shape
    return 2 * b * h * w * o * x_shape[1]


@register_flop_formula(
    [torch.ops.attnsr.normed_product_input_gradients, torch.ops.attnsr.normed_product_weight_gradient]
)
def _product_gradient_flops(gradient_shape: Any, x_shape: Any, *_: Any, **__: Any) -> int:
    b, o, h, w = gradient_shape
    return 2 * b * h * w * o * x_shape[1]


@register_flop_formula(torch.ops.attnsr.depthwise_gradients)
def _depthwise_gradients_flops(gradient_shape: Any, x_shape: Any, weight_shape: Any, needs_x: bool, **_: Any) -> int:
    b, c, h, w = gradient_shape
    return 2 * (needs_x + (x_shape is not None)) * b * h * w * c * 9


def block_of_channels(channels: int) -> int:
    """With few idle lanes first, then wide."""
    return min((64, 32), key=lambda width: triton.cdiv(channels, width) * width)


def tiles_of(height: int, width: int, side: int) -> int:
    """Square tiles of an image."""
    return triton.cdiv(height, side) * triton.cdiv(width, side)


def shares(count: int, unit: int, blocks: int) -> tuple[int, int]:
    """How many of ``count``, taken ``unit`` at a time by ``blocks`` programs each, are a part, and how many parts."""
    units = triton.cdiv(count, unit)
    share = max(1, triton.cdiv(units, max(1, PARAMETER_PROGRAMS // blocks)))
    return share * unit, triton.cdiv(units, share)
