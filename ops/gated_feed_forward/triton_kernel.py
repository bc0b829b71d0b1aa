"""The gated feed-forward: after layer norm and 1x1 convolution, all the rest in one kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.maps import new_map, rows
from attnsr.ops.separable_conv.triton_kernel import (
    SIZES,
    depthwise_gradients,
    load_tap,
    normed_product,
    normed_product_gradients,
    read_at_tap,
    run_normed_product,
    shares,
    tile_pixels,
    tiles_of,
)


@triton.jit
def _convolved(u, taps, p, row, column, k, height, width, HIDDEN: tl.constexpr):
    """The depthwise convolution of both halves of u at pixels p, channels k of each."""
    a = tl.zeros((p.shape[0], k.shape[0]), tl.float32)
    b = a
    for down in range(-1, 2):  # not unrolled, which would take long to compile
        for right in tl.static_range(-1, 2):
            at_a = read_at_tap(u, p, row, column, k, down, right, height, width, 2 * HIDDEN)
            at_b = read_at_tap(u, p, row, column, k + HIDDEN, down, right, height, width, 2 * HIDDEN)
            a += at_a * load_tap(taps, k, down, right, 2 * HIDDEN)
            b += at_b * load_tap(taps, k + HIDDEN, down, right, 2 * HIDDEN)
    return a, b


@triton.jit
def _normal_distribution(a):
    """The probability of a number below a: GELU is a times this."""
    return 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)


@triton.jit(do_not_specialize=SIZES)
def _gated_product(
    u,
    taps,
    weight,
    x,
    y,
    height,
    width,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    p, row, column = tile_pixels(tl.program_id(0), height, width, SIDE)
    c = tl.arange(0, BLOCK_C)
    z = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a, b = _convolved(u, taps, p, row, column, k, height, width, HIDDEN)
        gated = tl.where((k < HIDDEN)[None, :], a * _normal_distribution(a) * b, 0.0).to(weight.dtype.element_ty)
        factor = tl.load(weight + c[None, :] * HIDDEN + k[:, None], (k < HIDDEN)[:, None] & (c < C)[None, :], 0.0)
        z = tl.dot(gated, factor, z, input_precision=PRECISION)
    at = p[:, None] * C + c[None, :]
    exists = ((row < height) & (column < width))[:, None] & (c < C)[None, :]
    z += tl.load(x + at, exists, 0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def _gated_product_gradients(
    gradient,
    u,
    taps,
    weight,
    grad_convolved,
    grad_weight,
    height,
    width,
    tiles,
    share,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    k = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    of_weight = tl.zeros((BLOCK_C, BLOCK_HIDDEN), tl.float32)
    for tile in range(part * share, tl.minimum((part + 1) * share, tiles)):
        p, row, column = tile_pixels(tile, height, width, SIDE)
        exists = (row < height) & (column < width)
        of_gated = tl.zeros((SIDE * SIDE, BLOCK_HIDDEN), tl.float32)
        if grad_convolved is not None:
            for start in range(0, C, BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                rows_ = tl.load(gradient + p[:, None] * C + i[None, :], exists[:, None] & (i < C)[None, :], 0.0)
                has_factor = (i < C)[:, None] & (k < HIDDEN)[None, :]
                factor = tl.load(weight + i[:, None] * HIDDEN + k[None, :], has_factor, 0.0)
                of_gated = tl.dot(rows_.to(weight.dtype.element_ty), factor, of_gated, input_precision=PRECISION)
        a, b = _convolved(u, taps, p, row, column, k, height, width, HIDDEN)
        below = _normal_distribution(a)
        within = exists[:, None] & (k < HIDDEN)[None, :]
        if grad_convolved is not None:
            of_a = of_gated * b * (below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a))
            of_b = of_gated * a * below
            at = grad_convolved + p[:, None] * (2 * HIDDEN) + k[None, :]
            tl.store(at, of_a.to(grad_convolved.dtype.element_ty), within)
            tl.store(at + HIDDEN, of_b.to(grad_convolved.dtype.element_ty), within)
        if grad_weight is not None:
            gated = tl.where(within, a * below * b, 0.0).to(weight.dtype.element_ty)
            columns = tl.load(gradient + p[:, None] * C + c[None, :], exists[:, None] & (c < C)[None, :], 0.0)
            columns = tl.trans(columns.to(weight.dtype.element_ty))
            of_weight = tl.dot(columns, gated, of_weight, input_precision=PRECISION)
    if grad_weight is not None:
        at = grad_weight + (part * C + c)[:, None] * HIDDEN + k[None, :]
        tl.store(at, of_weight, (c < C)[:, None] & (k < HIDDEN)[None, :])


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    """:func:`attnsr.ops.gated_feed_forward.gated_feed_forward`; products are of the dtype of the weights."""
    weights = project_in.flatten(1), depthwise.flatten(1), project_out.flatten(1)
    return _gated_feed_forward_operator(x, norm_weight, norm_bias, eps, *weights)


@torch.library.custom_op('attnsr::gated_feed_forward', mutates_args=())
def _gated_feed_forward_operator(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    b, c, h, w = x.shape
    x, y, side = rows(x), new_map(x, c), 8
    launching.launch(
        _gated_product,
        (b * tiles_of(h, w, side),),
        run_normed_product(x, norm_weight, norm_bias, eps, project_in),
        depthwise.t().contiguous(),
        project_out.contiguous(),
        x,
        y,
        h,
        w,
        C=c,
        HIDDEN=project_out.shape[1],
        PRECISION=launching.input_precision(project_out),
        SIDE=side,
        BLOCK_C=launching.padded(c),
        BLOCK_K=16,
        num_stages=1,
    )
    return y


@torch.library.custom_op('attnsr::gated_product_gradients', mutates_args=())
def _gated_product_gradients_operator(
    gradient: Tensor, u: Tensor, depthwise: Tensor, project_out: Tensor, needs_convolved: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Of the depthwise convolution of u, and of project_out; without elements where they are not needed."""
    (b, c, h, w), hidden = gradient.shape, project_out.shape[1]
    exact = launching.is_exact(project_out)
    side, block_hidden, block_c = 4 if exact else 8, 32, launching.padded(c)
    blocks, tiles = triton.cdiv(hidden, block_hidden), b * tiles_of(h, w, side)
    share, parts = shares(tiles, 1, blocks)
    grad_convolved = new_map(u, 2 * hidden if needs_convolved else 0)
    of_weight = torch.empty((parts, c if needs_weight else 0, hidden), dtype=torch.float32, device=u.device)
    launching.launch(
        _gated_product_gradients,
        (blocks, parts),
        rows(gradient),
        rows(u),
        depthwise.t().contiguous(),
        project_out.contiguous(),
        grad_convolved if needs_convolved else None,
        of_weight if needs_weight else None,
        h,
        w,
        tiles,
        share,
        C=c,
        HIDDEN=hidden,
        PRECISION=launching.input_precision(project_out),
        SIDE=side,
        BLOCK_HIDDEN=block_hidden,
        BLOCK_C=block_c,
        BLOCK_K=16 if exact else block_c,
        num_stages=1,
    )
    return grad_convolved, of_weight.sum(0).to(project_out.dtype)


@_gated_feed_forward_operator.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    return new_map(x, x.shape[1])


@_gated_product_gradients_operator.register_fake
def _(
    gradient: Tensor, u: Tensor, depthwise: Tensor, project_out: Tensor, needs_convolved: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    c, hidden = project_out.shape
    of_weight = project_out.new_empty(c if needs_weight else 0, hidden)
    return new_map(u, 2 * hidden if needs_convolved else 0), of_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm_weight, norm_bias, ctx.eps, project_in, depthwise, project_out = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, project_in, depthwise, project_out)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, project_in, depthwise, project_out = ctx.saved_tensors
    x, gradient = rows(x), rows(gradient)  # once for all
    *needs, _, needs_project_in, needs_depthwise, needs_project_out = ctx.needs_input_grad
    needs.append(needs_project_in)
    u = normed_product(x, norm_weight, norm_bias, ctx.eps, project_in)
    of_convolved, of_project_out = _gated_product_gradients_operator(
        gradient, u, depthwise, project_out, any(needs) or needs_depthwise, needs_project_out
    )
    of_depthwise: Tensor | None = None
    of_inputs: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs) or needs_depthwise:
        of_u, of_depthwise = depthwise_gradients(of_convolved, u if needs_depthwise else None, depthwise, any(needs))
        tensors = x, norm_weight, norm_bias, project_in
        of_inputs = normed_product_gradients(of_u, tensors, ctx.eps, needs, residual=gradient)
    return (
        *of_inputs[:3],
        None,
        of_inputs[3],
        of_depthwise if needs_depthwise else None,
        of_project_out if needs_project_out else None,
    )


_gated_feed_forward_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.attnsr.gated_feed_forward)
def _gated_feed_forward_flops(x_shape: Any, *shapes: Any, **_: Any) -> int:
    (b, c, h, w), hidden = x_shape, shapes[-1][1]
    return 2 * b * h * w * hidden * (2 * c + 2 * 9 + c)


@register_flop_formula(torch.ops.attnsr.gated_product_gradients)
def _gated_product_gradients_flops(
    gradient_shape: Any, u: Any, depthwise: Any, weight: Any, needs_convolved: bool, needs_weight: bool, **_: Any
) -> int:
    b, c, h, w = gradient_shape
    return 2 * b * h * w * weight[1] * (2 * 9 + (needs_convolved + needs_weight) * c)
