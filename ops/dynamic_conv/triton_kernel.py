"""Dynamic convolution in Triton: kernels are predicted tap by tap, in registers, where they are used.

A kernel's weights and its bias are a row of the *predictor*, (G * K * K, D + 1): z has one more feature, which is 1. So
what all channels of a pixel have at a tap is a row of a matrix product.

Tiles of 16 x 16 or 8 x 16 pixels and 16 channels of the maps are multiplied in registers by results of products, or
become a factor of one. Tensor cores want a thread to have two neighbouring columns in every eight; memory wants it to
have VECTOR neighbouring channels. So in products the pixels and channels of a tile stand in an order of their own, in
which loaded elements are where they are needed, and no shared memory is passed through.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.maps import new_map, rows

# That the gradient of the predictor is spread over at most, each with a sum of its own: a few for each multiprocessor
# of a large device.
PREDICTOR_PROGRAMS = 512


@triton.jit
def _origin(tile, height, width, P: tl.constexpr):
    """First row and column of a tile of P pixels, 16 to a row, and the place of its first pixel in all images."""
    columns, rows = tl.cdiv(width, 16), tl.cdiv(height, P // 16)
    image, top, left = tile // (columns * rows), tile // columns % rows * (P // 16), tile % columns * 16
    return top, left, (image * height + top).to(tl.int64) * width + left


@triton.jit
def _rows_of_product(P: tl.constexpr):
    """Row and column, within the tile, of the pixel in each row of a product."""
    p = tl.arange(0, P)
    return p // 16, p % 16


@triton.jit
def _rows_of_load(P: tl.constexpr):
    """As :func:`_rows_of_product`, for loads: the first half of four rows, then the second."""
    p = tl.arange(0, P)
    return p // 64 * 4 + p // 8 % 4, p // 32 % 2 * 8 + p % 8


@triton.jit
def _channels_of_load(VECTOR: tl.constexpr):
    """Of a run of 16 channels: (4 / VECTOR, 1, 4, VECTOR), to which loads have pixels along the second axis."""
    part = tl.arange(0, 4 // VECTOR)[:, None, None, None]
    return part * (4 * VECTOR) + tl.arange(0, 4)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _channels_of_product(VECTOR: tl.constexpr):
    """Which of a run of 16 channels stands in each column."""
    column = tl.arange(0, 16)
    within = column // 2 % 4 * VECTOR + column // 8 % (VECTOR // 2) * 2 + column % 2
    return column // (4 * VECTOR) * (4 * VECTOR) + within


@triton.jit
def _as_factor(tile, P: tl.constexpr, VECTOR: tl.constexpr):
    """A tile (4 / VECTOR, P, 4, VECTOR) in the order of loads as (P, 16) in the order of products."""
    tile = tile.reshape(4 // VECTOR, P // 64, 2, 4, 8, 4, VECTOR // 2, 2)
    return tile.permute(1, 3, 2, 4, 0, 6, 5, 7).reshape(P, 16)


@triton.jit
def _load_z(z, pixel, d, exists, D: tl.constexpr):
    """Features d of z, which are 1 after the last, at the pixels."""
    last = tl.where(d == D, 1.0, 0.0).to(z.dtype.element_ty)
    return tl.load(z + pixel * D + d, exists & (d < D), last)


@triton.jit(do_not_specialize=['height', 'width'])
def _filter(
    x,
    z,
    predictor,
    y,
    height,
    width,
    C: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The dynamic convolution of x or, transposed, that with the kernels of the pixels that it reads: its gradient."""
    sharing: tl.constexpr = C // G
    runs: tl.constexpr = (BLOCK_G * sharing + 15) // 16
    runs_d: tl.constexpr = D // 16 + 1
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    sign: tl.constexpr = -1 if TRANSPOSED else 1
    # Of factors: kernels may be out of the range of float16.
    dtype: tl.constexpr = tl.float32 if x.dtype.element_ty == tl.float16 else x.dtype.element_ty
    start = tl.program_id(0) % blocks * BLOCK_G
    count = min(BLOCK_G, G - start)
    channels = count * sharing
    tile = tl.program_id(0) // blocks
    top, left, origin = _origin(tile, height, width, P)
    row, column = _rows_of_load(P)
    pixel = (row * width + column)[None, :, None, None]
    row, column = top + row, left + column
    exists = ((row < height) & (column < width))[None, :, None, None]
    c, d, g = _channels_of_load(VECTOR), _channels_of_load(VECTOR_D), tl.arange(0, 16)
    at_x = pixel * C + c
    x += origin * C + start * sharing
    z += origin * D
    at_weight = predictor + ((start + g) * (K * K * (D + 1)))[None, :]
    features = ()
    for run in tl.static_range(runs_d):
        features = features + (_load_z(z, pixel, run * 16 + d, exists, D),)  # type: ignore[assignment]
    totals = ()
    for _ in tl.static_range(runs):
        totals = totals + (tl.zeros((P, 16), tl.float32),)  # type: ignore[assignment]
    for i in range(K):
        down = (i - K // 2) * sign
        # How far columns reach: nowhere in rows outside the map.
        reach = tl.where((row + down >= 0) & (row + down < height), width, 0)
        for j in range(K):
            right = (j - K // 2) * sign
            inside = ((column + right >= 0) & (column + right < reach))[None, :, None, None]
            x_there = x + (down * width + right) * C + at_x
            k = tl.zeros((P, 16), tl.float32)
            for run in tl.static_range(runs_d):
                if TRANSPOSED:
                    feature = _load_z(z + (down * width + right) * D, pixel, run * 16 + d, inside, D)
                else:
                    feature = features[run]
                row_d = run * 16 + _channels_of_product(VECTOR_D)
                has_weight = (row_d <= D)[:, None] & (g < count)[None, :]
                weight = tl.load(at_weight + (row_d[:, None] + (i * K + j) * (D + 1)), has_weight, 0.0).to(dtype)
                k = tl.dot(_as_factor(feature, P, VECTOR_D).to(dtype), weight, k, input_precision=PRECISION)
            kernels = k.to(dtype)
            sums = ()
            for run in tl.static_range(runs):
                mask = inside & (run * 16 + c < channels)
                near = tl.load(x_there + run * 16, mask, 0.0)
                shares = g[:, None] == (run * 16 + _channels_of_product(VECTOR))[None, :] // sharing
                shares = tl.where(shares, 1.0, 0.0).to(dtype)
                k = tl.dot(kernels, shares, input_precision=PRECISION)
                sums = sums + (totals[run] + k * _as_factor(near, P, VECTOR).to(tl.float32),)  # type: ignore[assignment]
            totals = sums
    row, column = _rows_of_product(P)
    exists = (top + row < height) & (left + column < width)
    y += origin * C + start * sharing
    for run in tl.static_range(runs):
        c = run * 16 + _channels_of_product(VECTOR)
        at_y = ((row * width + column) * C)[:, None] + c[None, :]
        tl.store(y + at_y, totals[run].to(y.dtype.element_ty), exists[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=['height', 'width', 'tiles'])
def _predictor_gradients(
    gradient,
    u,
    z,
    predictor,
    grad_z,
    grad_predictor,
    height,
    width,
    tiles,
    C: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    NEEDS_PREDICTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The gradients of z and, of a program's tiles, of the predictor; BLOCK_G kernels at a time, at most 16."""
    sharing: tl.constexpr = C // G
    runs: tl.constexpr = (BLOCK_G * sharing + 15) // 16
    # Of factors: products, and sums of them, may be out of the range of float16.
    dtype: tl.constexpr = tl.float32 if u.dtype.element_ty == tl.float16 else u.dtype.element_ty
    program = tl.program_id(0)
    grad_predictor += program.to(tl.int64) * (G * K * K * (D + 1))
    for tile in range(program, tiles, tl.num_programs(0)):
        summed = tl.where(tile < tl.num_programs(0), 0, D + 1)  # features of which there is a sum already
        top, left, origin = _origin(tile, height, width, P)
        row, column = _rows_of_product(P)
        d, g = tl.arange(0, BLOCK_D), tl.arange(0, 16)
        exists = ((top + row < height) & (left + column < width))[:, None]
        pixel = (row * width + column)[:, None]
        features = _load_z(z + origin * D, pixel, d[None, :], exists, D).to(dtype)
        at_z = pixel * D + d[None, :]
        of_z = tl.zeros((P, BLOCK_D), tl.float32)
        row, column = _rows_of_load(P)
        pixel = (row * width + column)[None, :, None, None]
        row, column = top + row, left + column
        loaded_exists = ((row < height) & (column < width))[None, :, None, None]
        for start in range(0, G, BLOCK_G):
            count = min(BLOCK_G, G - start)
            channels = count * sharing
            c = _channels_of_load(VECTOR)
            at = pixel * C + c
            first = origin * C + start * sharing
            of_y = ()
            for run in tl.static_range(runs):
                mask = loaded_exists & (run * 16 + c < channels)
                of_y = of_y + (tl.load(gradient + (first + run * 16) + at, mask, 0.0),)  # type: ignore[assignment]
            at_weight = ((start + g) * (K * K * (D + 1)))[:, None] + d[None, :]
            at_grad_weight = ((start + g) * (K * K * (D + 1)))[None, :] + d[:, None]
            for i in range(K):
                down = i - K // 2
                reach = tl.where((row + down >= 0) & (row + down < height), width, 0)
                for j in range(K):
                    right = j - K // 2
                    inside = ((column + right >= 0) & (column + right < reach))[None, :, None, None]
                    u_there = u + (first + (down * width + right) * C) + at
                    of_k = tl.zeros((P, 16), tl.float32)
                    for run in tl.static_range(runs):
                        mask = inside & (run * 16 + c < channels)
                        near = tl.load(u_there + run * 16, mask, 0.0)
                        products = (of_y[run].to(tl.float32) * near.to(tl.float32)).to(dtype)
                        shares = (run * 16 + _channels_of_product(VECTOR))[:, None] // sharing == g[None, :]
                        shares = tl.where(shares, 1.0, 0.0).to(dtype)
                        of_k = tl.dot(_as_factor(products, P, VECTOR), shares, of_k, input_precision=PRECISION)
                    of_kernels = of_k.to(dtype)
                    tap = (i * K + j) * (D + 1)
                    if NEEDS_Z:
                        has_weight = (g < count)[:, None] & (d < D)[None, :]
                        weight = tl.load(predictor + at_weight + tap, has_weight, 0.0).to(dtype)
                        of_z = tl.dot(of_kernels, weight, of_z, input_precision=PRECISION)
                    if NEEDS_PREDICTOR:
                        of_weight = tl.dot(tl.trans(features), of_kernels, input_precision=PRECISION)
                        has_weight = (g < count)[None, :] & (d <= D)[:, None]
                        at_tap = grad_predictor + at_grad_weight + tap
                        # A plain sum would begin with what is loaded, and take registers from then on.
                        before = tl.load(at_tap, (g < count)[None, :] & (d < summed)[:, None], 0.0)
                        tl.store(at_tap, tl.fma(of_weight, 1.0, before), has_weight)
        if NEEDS_Z:
            tl.store(grad_z + origin * D + at_z, of_z.to(grad_z.dtype.element_ty), exists & (d < D)[None, :])
        if NEEDS_PREDICTOR:
            tl.debug_barrier()  # each thread has written what any may read at the next tile


@triton.jit
def _axes(
    height,
    width,
    G: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program's image and, each along its own axis: rows and columns of pixels; kernels; taps; their channels."""
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    columns, rows = tl.cdiv(width, TILE_W), tl.cdiv(height, TILE_H)
    tile = tl.program_id(0) // blocks
    p = tl.arange(0, TILE_H * TILE_W)[:, None, None, None]
    row, column = tile // columns % rows * TILE_H + p // TILE_W, tile % columns * TILE_W + p % TILE_W
    g = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)[:, None, None]
    return tile // (columns * rows), row, column, g, tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_R)


@triton.jit(do_not_specialize=['height', 'width'])
def _aggregate(
    x,
    kernels,
    y,
    height,
    width,
    pixel_stride,
    channel_stride,
    C: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """x filtered by given kernels; transposed as :func:`_filter`. Taps lie along an axis, a row of them at a time."""
    image, row, column, g, j, r = _axes(height, width, G, TILE_H, TILE_W, BLOCK_G, BLOCK_K, BLOCK_R)
    sign: tl.constexpr = -1 if TRANSPOSED else 1
    c = g * (C // G) + r
    exists = (row < height) & (column < width) & (g < G)
    start = image.to(tl.int64) * height * width
    pixel = row.to(tl.int64) * width + column
    right = (j - K // 2) * sign
    total = tl.zeros((TILE_H * TILE_W, BLOCK_G, BLOCK_K, BLOCK_R), tl.float32)
    for i in range(K):
        down = (i - K // 2) * sign
        near = pixel + (down * width + right)
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        inside &= exists & (j < K)
        at_tap = (g * (K * K) + i * K + j).to(tl.int64) * channel_stride
        at_kernel = (near if TRANSPOSED else pixel) * pixel_stride + at_tap
        k = tl.load(kernels + start * (G * K * K) + at_kernel, inside, 0.0)
        total += k.to(tl.float32) * tl.load(x + (start + near) * C + c, inside & (r < C // G), 0.0).to(tl.float32)
    of_y = tl.sum(total, 2, keep_dims=True).to(y.dtype.element_ty)
    tl.store(y + (start + pixel) * C + c, of_y, exists & (r < C // G))


@triton.jit(do_not_specialize=['height', 'width'])
def _kernel_gradients(
    gradient,
    u,
    grad_kernels,
    height,
    width,
    pixel_stride,
    channel_stride,
    C: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients of given kernels."""
    image, row, column, g, j, r = _axes(height, width, G, TILE_H, TILE_W, BLOCK_G, BLOCK_K, BLOCK_R)
    c = g * (C // G) + r
    exists = (row < height) & (column < width) & (g < G)
    start = image.to(tl.int64) * height * width
    pixel = row.to(tl.int64) * width + column
    right = j - K // 2
    of_y = tl.load(gradient + (start + pixel) * C + c, exists & (r < C // G), 0.0).to(tl.float32)
    for i in range(K):
        down = i - K // 2
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        near = tl.load(u + (start + pixel + (down * width + right)) * C + c, exists & inside & (r < C // G), 0.0)
        of_k = tl.sum(of_y * near.to(tl.float32), 3, keep_dims=True).to(grad_kernels.dtype.element_ty)
        at_tap = (g * (K * K) + i * K + j).to(tl.int64) * channel_stride
        at_kernel = pixel * pixel_stride + at_tap
        tl.store(grad_kernels + start * (G * K * K) + at_kernel, of_k, exists & (j < K))


def dynamic_conv(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kernel_size: int) -> Tensor:
    """:func:`attnsr.ops.dynamic_conv.dynamic_conv` in the dtype of ``u``, one that the kernels compute on.

    Parameters are rounded to it where they are multiplied; their gradients are not.
    """
    predictor = torch.cat([weight.flatten(1), bias[:, None]], 1).float()
    return _dynamic_conv_operator(u, z.to(u.dtype), predictor, kernel_size)


@torch.library.custom_op('attnsr::dynamic_conv', mutates_args=())
def _dynamic_conv_operator(u: Tensor, z: Tensor, predictor: Tensor, size: int) -> Tensor:
    return _filtered(u, z, predictor, size, transposed=False)


@torch.library.custom_op('attnsr::dynamic_conv_input_gradient', mutates_args=())
def _input_gradient_operator(gradient: Tensor, z: Tensor, predictor: Tensor, size: int) -> Tensor:
    return _filtered(gradient, z, predictor, size, transposed=True)


@torch.library.custom_op('attnsr::dynamic_conv_predictor_gradients', mutates_args=())
def _predictor_gradients_operator(
    gradient: Tensor, u: Tensor, z: Tensor, predictor: Tensor, size: int, needs_z: bool, needs_predictor: bool
) -> tuple[Tensor, Tensor]:
    """Of z and predictor; without elements where they are not needed."""
    (b, c, h, w), d, g = u.shape, z.shape[1], len(predictor) // size**2
    pixels = 128
    # Channels at a time, which stay in registers.
    warps, channels = {torch.float32: (8, 48), torch.float16: (8, 64), torch.bfloat16: (4, 96)}[u.dtype]
    tiles = b * triton.cdiv(h, pixels // 16) * triton.cdiv(w, 16)
    grad_z = new_map(z, d if needs_z else 0)
    programs = min(tiles, PREDICTOR_PROGRAMS)
    of_programs = predictor.new_empty(programs if needs_predictor else 0, *predictor.shape)
    launching.launch(
        _predictor_gradients,
        (programs,),
        rows(gradient),
        rows(u),
        rows(z),
        predictor.contiguous(),
        grad_z,
        of_programs,
        h,
        w,
        tiles,
        C=c,
        G=g,
        D=d,
        K=size,
        NEEDS_Z=needs_z,
        NEEDS_PREDICTOR=needs_predictor,
        PRECISION=launching.wide_precision(u),
        P=pixels,
        VECTOR=_vector(c),
        BLOCK_D=launching.padded(d + 1),
        BLOCK_G=_kernels_within(channels, c, g),
        num_warps=warps,
        num_stages=1,
    )
    return grad_z, of_programs.sum(0) if needs_predictor else of_programs


@torch.library.custom_op('attnsr::dynamic_conv_aggregate', mutates_args=())
def aggregate(u: Tensor, kernels: Tensor, kernel_size: int) -> Tensor:
    """:func:`attnsr.ops.dynamic_conv.aggregate` of tensors of one dtype, one that the kernels compute on."""
    return _aggregated(u, kernels, kernel_size, transposed=False)


@torch.library.custom_op('attnsr::dynamic_conv_aggregate_input_gradient', mutates_args=())
def _aggregate_input_gradient_operator(gradient: Tensor, kernels: Tensor, size: int) -> Tensor:
    return _aggregated(gradient, kernels, size, transposed=True)


@torch.library.custom_op('attnsr::dynamic_conv_kernel_gradients', mutates_args=())
def _kernel_gradients_operator(gradient: Tensor, u: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Of kernels, in their memory format."""
    grad_kernels = _new_kernels(kernels)
    (_, c, h, w), g = u.shape, kernels.shape[1] // size**2
    blocks = _aggregate_blocks(c, g, size)
    launching.launch(
        _kernel_gradients,
        _aggregate_grid(u, g, blocks),
        rows(gradient),
        rows(u),
        grad_kernels,
        h,
        w,
        *_kernel_strides(grad_kernels),
        C=c,
        G=g,
        K=size,
        **blocks,
    )
    return grad_kernels


@_dynamic_conv_operator.register_fake
@_input_gradient_operator.register_fake
def _(x: Tensor, z: Tensor, predictor: Tensor, size: int) -> Tensor:
    return new_map(x, x.shape[1])


@_predictor_gradients_operator.register_fake
def _(
    gradient: Tensor, u: Tensor, z: Tensor, predictor: Tensor, size: int, needs_z: bool, needs_predictor: bool
) -> tuple[Tensor, Tensor]:
    shape = predictor.shape if needs_predictor else (0, *predictor.shape)
    return new_map(z, z.shape[1] if needs_z else 0), predictor.new_empty(shape)


@aggregate.register_fake
@_aggregate_input_gradient_operator.register_fake
def _(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    return new_map(x, x.shape[1])


@_kernel_gradients_operator.register_fake
def _(gradient: Tensor, u: Tensor, kernels: Tensor, size: int) -> Tensor:
    return _new_kernels(kernels)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _dynamic_conv_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    u, z, predictor = ctx.saved_tensors
    needs_u, needs_z, needs_predictor, _ = ctx.needs_input_grad
    grad_u = _input_gradient_operator(gradient, z, predictor, ctx.size) if needs_u else None
    grad_z = grad_predictor = None
    if needs_z or needs_predictor:
        grad_z, grad_predictor = _predictor_gradients_operator(
            gradient, u, z, predictor, ctx.size, needs_z, needs_predictor
        )
    return grad_u, grad_z if needs_z else None, grad_predictor if needs_predictor else None, None


def _aggregate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    u, kernels = ctx.saved_tensors
    needs_u, needs_kernels, _ = ctx.needs_input_grad
    grad_u = _aggregate_input_gradient_operator(gradient, kernels, ctx.size) if needs_u else None
    return grad_u, _kernel_gradients_operator(gradient, u, kernels, ctx.size) if needs_kernels else None, None


_dynamic_conv_operator.register_autograd(_dynamic_conv_backward, setup_context=_setup_context)
aggregate.register_autograd(_aggregate_backward, setup_context=_setup_context)


# Counted is what the definition asks for, and not that gradients predict the kernels again.


@register_flop_formula(torch.ops.attnsr.dynamic_conv)
def _dynamic_conv_flops(u: Any, z: Any, predictor: Any, size: int, out_shape: Any = None, **_: Any) -> int:
    return _aggregate_flops(u, None, size) + _prediction_flops(z, predictor)


@register_flop_formula(torch.ops.attnsr.dynamic_conv_predictor_gradients)
def _predictor_gradients_flops(
    gradient: Any, u: Any, z: Any, predictor: Any, size: int, needs_z: bool, needs_predictor: bool, **_: Any
) -> int:
    return _aggregate_flops(u, None, size) + (needs_z + needs_predictor) * _prediction_flops(z, predictor)


@register_flop_formula(torch.ops.attnsr.dynamic_conv_input_gradient)
def _input_gradient_flops(gradient: Any, z: Any, predictor: Any, size: int, **_: Any) -> int:
    return _aggregate_flops(gradient, None, size)


@register_flop_formula(torch.ops.attnsr.dynamic_conv_kernel_gradients)
def _kernel_gradients_flops(gradient: Any, u: Any, kernels: Any, size: int, **_: Any) -> int:
    return _aggregate_flops(gradient, kernels, size)


@register_flop_formula(
    [torch.ops.attnsr.dynamic_conv_aggregate, torch.ops.attnsr.dynamic_conv_aggregate_input_gradient]
)
def _aggregate_flops(x: Any, kernels: Any, size: int, **_: Any) -> int:
    return 2 * math.prod(x) * size**2


def _prediction_flops(z: Any, predictor: Any) -> int:
    return 2 * math.prod(z) * predictor[0]


def _filtered(x: Tensor, z: Tensor, predictor: Tensor, size: int, transposed: bool) -> Tensor:
    y = new_map(x, x.shape[1])
    (b, c, h, w), d, g = x.shape, z.shape[1], len(predictor) // size**2
    few = d < 16  # features, which stay in registers
    if x.dtype == torch.bfloat16:
        pixels, warps, channels = 128 if few else 64, 4, 48
    elif launching.wide_precision(x) == 'tf32':
        pixels, warps, channels = 64, 4, 48 if few else 32
    else:
        pixels, warps, channels = 128, 8, 48 if few else 32
    block_g = _kernels_within(channels, c, g)
    launching.launch(
        _filter,
        (b * triton.cdiv(h, pixels // 16) * triton.cdiv(w, 16) * triton.cdiv(g, block_g),),
        rows(x),
        rows(z),
        predictor.contiguous(),
        y,
        h,
        w,
        C=c,
        G=g,
        D=d,
        K=size,
        TRANSPOSED=transposed,
        PRECISION=launching.wide_precision(x),
        P=pixels,
        VECTOR=_vector(c),
        VECTOR_D=_vector(d),
        BLOCK_G=block_g,
        num_warps=warps,
        num_stages=1,
    )
    return y


def _aggregated(x: Tensor, kernels: Tensor, size: int, transposed: bool) -> Tensor:
    y = new_map(x, x.shape[1])
    (_, c, h, w), g = x.shape, kernels.shape[1] // size**2
    if not kernels.is_contiguous():
        kernels = rows(kernels)
    blocks = _aggregate_blocks(c, g, size)
    launching.launch(
        _aggregate,
        _aggregate_grid(x, g, blocks),
        rows(x),
        kernels,
        y,
        h,
        w,
        *_kernel_strides(kernels),
        C=c,
        G=g,
        K=size,
        TRANSPOSED=transposed,
        **blocks,
    )
    return y


def _aggregate_blocks(channels: int, kernels: int, size: int) -> dict[str, int]:
    """Of a program, about 4096 taps of all its channels, which are 32 to a thread."""
    block_r, block_k = triton.next_power_of_2(channels // kernels), triton.next_power_of_2(size)
    block_g = min(2, kernels)
    pixels = min(64, max(1, 4096 // (block_g * block_k * block_r)))
    tile_w = min(8, pixels)
    return {'TILE_H': pixels // tile_w, 'TILE_W': tile_w, 'BLOCK_G': block_g, 'BLOCK_K': block_k, 'BLOCK_R': block_r}


def _aggregate_grid(x: Tensor, kernels: int, blocks: dict[str, int]) -> tuple[int]:
    b, _, h, w = x.shape
    tiles = b * triton.cdiv(h, blocks['TILE_H']) * triton.cdiv(w, blocks['TILE_W'])
    return (tiles * triton.cdiv(kernels, blocks['BLOCK_G']),)


def _kernel_strides(kernels: Tensor) -> tuple[int, int]:
    """From a pixel to the next, and from a channel to the next, of what :func:`_new_kernels` gives."""
    _, channels, h, w = kernels.shape
    return (1, h * w) if kernels.is_contiguous() else (channels, 1)


def _new_kernels(like: Tensor) -> Tensor:
    """Kernels are used as they lie in memory, channels first or last."""
    return like.new_empty(like.shape) if like.is_contiguous() else new_map(like, like.shape[1])


def _vector(channels: int) -> int:
    """Neighbouring channels that loads take together."""
    return 4 if channels % 4 == 0 else 2


def _kernels_within(limit: int, channels: int, kernels: int) -> int:
    """How many kernels a program takes at a time: the channels of all of them are at most ``limit``."""
    return max(1, min(kernels, 16, limit // (channels // kernels)))
