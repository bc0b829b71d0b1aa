"""Channel attention over any set of groups of tokens at once, in one pass over the tokens for each sum over them.

A *group* is the tokens that attend together: rows x columns of them, and groups begin evenly spaced along each axis,
but for the last, which ends at the border. A *cell* is the tokens that lie in the same groups: a group itself, or,
where groups overlap, what one has alone or has in common with the next. A *run* is the channels of as many heads as
one program takes. M = weight diag(A of each head), (O, C), is what the values of a group are multiplied by: y = M v.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.channel_attention.reference import EPSILON
from attnsr.ops.maps import new_map, rows_in_place

# Channels that a program multiplies with each other at most: a head has no more, and a run as many heads as fit.
RUN = 64

# Groups of no more tokens, where there is one run, are attended to by one program each.
FUSED_TOKENS = 256

# In the backward pass: of which dtypes (float32, which float16 needs the range of, takes too many registers), and
# programs that share the groups, each with its own sums of the parameters' gradients.
FUSED_BACKWARD = (torch.bfloat16,)
FUSED_PROGRAMS = 256

# Of other groups: tokens that are worth a program, and of which its share is a multiple; programs that tokens are
# spread over at most (or one a group, if there are more), and parts that a group's sums may have.
LEAST_SHARE = 256
SHARES = 64
PROGRAMS = 512
PARTS = 128

LEAST_SQUARE = tl.constexpr(EPSILON**2)

# Arguments that differ from map to map, which kernels are not to be compiled for.
_VARYING = (
    *('height', 'tops', 'top_step', 'rows', 'width', 'lefts', 'left_step', 'columns', 'stride'),
    *('share', 'splits', 'groups'),
)


@triton.jit
def _run(run, C: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a run, and which of them exist."""
    c = run * RUN + tl.arange(0, BLOCK_C)
    return c, (tl.arange(0, BLOCK_C) < RUN) & (c < C)


@triton.jit
def _own(c, exists, D: tl.constexpr):
    """Which pairs of channels are of one head."""
    return (c[:, None] // D == c[None, :] // D) & exists[:, None] & exists[None, :]


@triton.jit
def _in_heads(c, D: tl.constexpr):
    """Where a pair of channels of one head is kept, in (C, D) numbers."""
    return c[:, None] * D + c[None, :] % D


@triton.jit
def _begin(i, axis):
    """Where group i begins along an axis."""
    side, _count, step, length = axis
    return tl.minimum(i * step, side - length)


@triton.jit
def _cover(at, i, axis):
    """How many of the groups along an axis, which overlap, have a position of group i."""
    _side, count, step, length = axis
    before = (i > 0) & (at < (i - 1) * step + length)
    after = (i + 1 < count) & (at >= _begin(i + 1, axis))
    return 1 + before.to(tl.int32) + after.to(tl.int32)


@triton.jit
def _cells(axis, OVERLAPPING: tl.constexpr):
    """How many cells there are along an axis."""
    _side, count, _step, _length = axis
    if OVERLAPPING:
        return 2 * count - 1
    else:
        return count


@triton.jit
def _cell(i, axis, OVERLAPPING: tl.constexpr):
    """A cell along an axis: its begin and length, the first group that it lies in, and how many more.

    No position is in more than two groups, so cells are in turns what is in one alone, and in it and in the next.
    """
    side, count, step, length = axis
    if OVERLAPPING:
        group, more = i // 2, i % 2
        following = tl.where(group + 1 < count, _begin(group + 1, axis), side)
        begin = tl.where(more == 1, following, tl.where(group > 0, (group - 1) * step + length, 0))
        end = tl.where(more == 1, _begin(group, axis) + length, following)
        return begin, end - begin, group, more
    else:
        return i * step, length, i, i * 0


@triton.jit
def _group(group, down, across, stride):
    """Where a group is: its place for :func:`_pixels`, and its number along each axis."""
    i, j = group // across[1] % down[1], group % across[1]
    row = group // across[1] // down[1] * down[0] + _begin(i, down)
    return (row, _begin(j, across), across[3], stride, across[0]), i, j


@triton.jit
def _pixels(t, place):
    """Pixels of channels-last maps at tokens t: from a row and a column, so many in a row, so far apart."""
    row, column, columns, stride, width = place
    return (row + t // columns * stride).to(tl.int64) * width + column + t % columns * stride


@triton.jit
def _load(x, pixels, inside, size, c, exists):
    """Channels c of a map with ``size`` numbers from pixel to pixel, 0 where there is none: (pixels, channels)."""
    return tl.load(x + pixels[:, None] * size + c[None, :], inside[:, None] & exists[None, :], 0.0)


@triton.jit
def _store(x, pixels, inside, size, c, exists, values):
    at = x + pixels[:, None] * size + c[None, :]
    tl.store(at, values.to(x.dtype.element_ty), inside[:, None] & exists[None, :])


@triton.jit
def _load_weight(weight, o, c, exists, C: tl.constexpr, OUT: tl.constexpr):
    """The weight in float32; without one, the unit matrix."""
    exists = (o < OUT)[:, None] & exists[None, :]
    if weight is None:
        return tl.where(exists & (o[:, None] == c[None, :]), 1.0, 0.0)
    else:
        return tl.load(weight + o[:, None] * C + c[None, :], exists, 0.0).to(tl.float32)


@triton.jit
def _attention(gram, q_squares, k_squares, temperature, own, SOFTMAX: tl.constexpr):
    """A, the cosines that it is made of, and the inverse norms."""
    q_inverse = tl.rsqrt(tl.maximum(q_squares, LEAST_SQUARE))
    k_inverse = tl.rsqrt(tl.maximum(k_squares, LEAST_SQUARE))
    cosines = tl.where(own, gram * q_inverse[:, None] * k_inverse[None, :], 0.0)
    scores = cosines * temperature[:, None]
    if SOFTMAX:
        highest = tl.max(tl.where(own, scores, float('-inf')), 1)
        highest = tl.where(highest > float('-inf'), highest, 0.0)  # channels that do not exist
        a = tl.where(own, tl.exp(scores - highest[:, None]), 0.0)
        total = tl.sum(a, 1)
        a /= tl.where(total > 0, total, 1.0)[:, None]
    else:
        a = tl.maximum(scores, 0.0)
    return a, cosines, q_inverse, k_inverse


@triton.jit
def _attention_gradients(
    grad_a, a, cosines, q_inverse, k_inverse, q_squares, k_squares, temperature, SOFTMAX: tl.constexpr
):
    """Gradients of the Gram matrix, of q and k through their norms as factors of q and k, and of the temperature."""
    grad_scores = a * (grad_a - tl.sum(a * grad_a, 1)[:, None]) if SOFTMAX else tl.where(a > 0, grad_a, 0.0)
    grad_cosines = grad_scores * temperature[:, None]
    grad_gram = grad_cosines * q_inverse[:, None] * k_inverse[None, :]
    q_factor = -tl.sum(grad_cosines * cosines, 1) * q_inverse * q_inverse
    k_factor = -tl.sum(grad_cosines * cosines, 0) * k_inverse * k_inverse
    q_factor = tl.where(q_squares >= LEAST_SQUARE, q_factor, 0.0)
    k_factor = tl.where(k_squares >= LEAST_SQUARE, k_factor, 0.0)
    return grad_gram, q_factor, k_factor, tl.sum(grad_scores * cosines, 1)


@triton.jit
def _sum_gram(
    x,
    size,
    first,
    last,
    place,
    c,
    exists,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Over tokens from first to last: q k^T, and squares of q and of k."""
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    q_squares, k_squares = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        pixels, inside = _pixels(t, place), t < last
        q = _load(x, pixels, inside, size, c, exists)
        k = _load(x, pixels, inside, size, c + C, exists)
        gram = tl.dot(tl.trans(q), k, gram, input_precision=PRECISION)
        q_squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), 0)
        k_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), 0)
    return gram, q_squares, k_squares


@triton.jit
def _multiply(
    x,
    x_size,
    i,
    has_i,
    matrix,
    y,
    y_size,
    o,
    has_o,
    first,
    last,
    place,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Channels o of y at tokens from first to last: channels i of x times an (i, o) matrix."""
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        pixels, inside = _pixels(t, place), t < last
        values = tl.dot(_load(x, pixels, inside, x_size, i, has_i), matrix, input_precision=PRECISION)
        _store(y, pixels, inside, y_size, o, has_o, values)


@triton.jit
def _input_gradients(
    x,
    size,
    grad_gram,
    q_factor,
    k_factor,
    grad_x,
    first,
    last,
    place,
    c,
    exists,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of q and k at tokens from first to last."""
    # The inverse norms of channels that hold nothing put the Gram matrix's gradient beyond the range of float16.
    wide: tl.constexpr = tl.float32 if x.dtype.element_ty == tl.float16 else x.dtype.element_ty
    matrix = grad_gram.to(wide)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        pixels, inside = _pixels(t, place), t < last
        q = _load(x, pixels, inside, size, c, exists).to(wide)
        k = _load(x, pixels, inside, size, c + C, exists).to(wide)
        grad_q = tl.dot(k, tl.trans(matrix), input_precision=PRECISION) + q.to(tl.float32) * q_factor[None, :]
        _store(grad_x, pixels, inside, 3 * C, c, exists, grad_q)
        grad_k = tl.dot(q, matrix, input_precision=PRECISION) + k.to(tl.float32) * k_factor[None, :]
        _store(grad_x, pixels, inside, 3 * C, c + C, exists, grad_k)


@triton.jit(do_not_specialize=_VARYING)
def _products(
    x,
    grad_y,
    gram,
    squares,
    grad_m,
    x_size,
    grad_y_size,
    height,
    tops,
    top_step,
    rows,
    width,
    lefts,
    left_step,
    columns,
    stride,
    share,
    C: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    RUN: tl.constexpr,
    OVERLAPPING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums over a part of a group's tokens: by one program q k^T and squares, by others M's gradient, dy v^T."""
    down, across = (height, tops, top_step, rows), (width, lefts, left_step, columns)
    if grad_y is None:
        programs: tl.constexpr = 1
    else:
        programs: tl.constexpr = 1 + tl.cdiv(OUT, BLOCK_O)  # type: ignore[no-redef]
    runs: tl.constexpr = tl.cdiv(C, RUN)
    splits = tl.cdiv(rows * columns, share)
    which, run = tl.program_id(0) % programs, tl.program_id(0) // programs % runs
    part = tl.program_id(0) // programs // runs
    first = part % splits * share
    last = tl.minimum(first + share, rows * columns)
    place, i, j = _group(part // splits, down, across, stride)
    part = part.to(tl.int64)
    c, exists = _run(run, C, RUN, BLOCK_C)
    if which == 0:
        qk, qq, kk = _sum_gram(x, x_size, first, last, place, c, exists, C, PRECISION, BLOCK_T, BLOCK_C)
        tl.store(gram + part * C * D + _in_heads(c, D), qk, _own(c, exists, D))
        tl.store(squares + part * 2 * C + c, qq, exists)
        tl.store(squares + part * 2 * C + C + c, kk, exists)
    elif grad_y is not None:
        o = (which - 1) * BLOCK_O + tl.arange(0, BLOCK_O)
        by_m = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        for start in range(first, last, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            pixels, inside = _pixels(t, place), t < last
            v = _load(x, pixels, inside, x_size, c + 2 * C, exists)
            gradient = _load(grad_y, pixels, inside, grad_y_size, o, o < OUT)
            if OVERLAPPING:  # y is the mean over 1, 2 or 4 groups
                top, left = _begin(i, down) + t // columns, _begin(j, across) + t % columns
                cover = (_cover(top, i, down) * _cover(left, j, across)).to(tl.float32)
                gradient = (gradient / cover[:, None]).to(v.dtype)
            by_m = tl.dot(tl.trans(gradient), v, by_m, input_precision=PRECISION)
        at = grad_m + part * OUT * C + o[:, None] * C + c[None, :]
        tl.store(at, by_m, (o < OUT)[:, None] & exists[None, :])


@triton.jit
def _total(parts, first, count, size: tl.constexpr, at, exists):
    """The sum of ``count`` parts of ``size`` numbers each."""
    total = tl.load(parts + first.to(tl.int64) * size + at, exists, 0.0)
    for i in tl.range(1, count, loop_unroll_factor=4):
        total += tl.load(parts + (first + i).to(tl.int64) * size + at, exists, 0.0)
    return total


@triton.jit(do_not_specialize=_VARYING)
def _matrices(
    gram,
    squares,
    temperature,
    weight,
    m,
    grad_m,
    grad_gram,
    factors,
    grad_temperature,
    grad_weight,
    splits,
    C: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    RUN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """M of a group; with M's gradient, the gradients of all that M is made of."""
    runs: tl.constexpr = tl.cdiv(C, RUN)
    c, exists = _run(tl.program_id(0) % runs, C, RUN, BLOCK_C)
    own, in_heads = _own(c, exists, D), _in_heads(c, D)
    first = tl.program_id(0) // runs * splits
    group = (tl.program_id(0) // runs).to(tl.int64)
    qk = _total(gram, first, splits, C * D, in_heads, own)
    qq = _total(squares, first, splits, 2 * C, c, exists)
    kk = _total(squares, first, splits, 2 * C, c + C, exists)
    of_head = tl.load(temperature + c // D, exists, 0.0)
    a, cosines, q_inverse, k_inverse = _attention(qk, qq, kk, of_head, own, SOFTMAX)
    by_a = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for start in range(0, OUT, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        of_m, in_m = (o < OUT)[:, None] & exists[None, :], o[:, None] * C + c[None, :]
        w = _load_weight(weight, o, c, exists, C, OUT)
        tl.store(m + group * OUT * C + in_m, tl.dot(w, a, input_precision=PRECISION), of_m)
        if grad_m is not None:
            by_m = _total(grad_m, first, splits, OUT * C, in_m, of_m)
            by_a = tl.dot(tl.trans(w), by_m, by_a, input_precision=PRECISION)
            if grad_weight is not None:
                by_weight = tl.dot(by_m, tl.trans(a), input_precision=PRECISION)
                tl.store(grad_weight + group * OUT * C + in_m, by_weight, of_m)
    if grad_m is not None:
        by_gram, q_factor, k_factor, by_temperature = _attention_gradients(
            by_a, a, cosines, q_inverse, k_inverse, qq, kk, of_head, SOFTMAX
        )
        tl.store(grad_gram + group * C * D + in_heads, by_gram, own)
        tl.store(factors + group * 2 * C + c, q_factor, exists)
        tl.store(factors + group * 2 * C + C + c, k_factor, exists)
        tl.store(grad_temperature + group * C + c, by_temperature, exists)


@triton.jit
def _part_of_cell(part, share, down, across, stride, OVERLAPPING: tl.constexpr):
    """Tokens of a part of a cell, from first to last; their place; the groups: the first, and how many more."""
    splits = tl.cdiv(down[3] * across[3], share)
    cell, first = part // splits, part % splits * share
    cells_down, cells_across = _cells(down, OVERLAPPING), _cells(across, OVERLAPPING)
    image = cell // cells_across // cells_down
    top, lines, i, more_i = _cell(cell // cells_across % cells_down, down, OVERLAPPING)
    left, length, j, more_j = _cell(cell % cells_across, across, OVERLAPPING)
    place = image * down[0] + top, left, length, stride, across[0]
    groups = (image * down[1] + i) * across[1] + j, more_i, more_j
    return first, tl.minimum(first + share, lines * length), place, groups


@triton.jit
def _total_of_groups(numbers, groups, across, size: tl.constexpr, at, exists):
    """The sum of the groups' ``size`` numbers each, and how many groups there are."""
    group, more_i, more_j = groups
    total = tl.load(numbers + group.to(tl.int64) * size + at, exists, 0.0)
    count = (1 + more_i) * (1 + more_j)
    for other in range(1, count):
        number = group + other // (1 + more_j) * across[1] + other % (1 + more_j)
        total += tl.load(numbers + number.to(tl.int64) * size + at, exists, 0.0)
    return total, count


@triton.jit(do_not_specialize=_VARYING)
def _values(
    x,
    m,
    y,
    x_size,
    height,
    tops,
    top_step,
    rows,
    width,
    lefts,
    left_step,
    columns,
    stride,
    share,
    C: tl.constexpr,
    OUT: tl.constexpr,
    OVERLAPPING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Channels of y for a part of a cell's tokens, by the mean of its groups' M."""
    down, across = (height, tops, top_step, rows), (width, lefts, left_step, columns)
    blocks: tl.constexpr = tl.cdiv(OUT, BLOCK_O)
    first, last, place, groups = _part_of_cell(tl.program_id(0) // blocks, share, down, across, stride, OVERLAPPING)
    if first < last:
        c, o = tl.arange(0, BLOCK_C), tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        in_m, of_m = o[:, None] * C + c[None, :], (o < OUT)[:, None] & (c < C)[None, :]
        total, count = _total_of_groups(m, groups, across, OUT * C, in_m, of_m)
        mean = tl.trans((total / count).to(x.dtype.element_ty))
        _multiply(x, x_size, c + 2 * C, c < C, mean, y, OUT, o, o < OUT, first, last, place, PRECISION, BLOCK_T)


@triton.jit(do_not_specialize=_VARYING)
def _token_gradients(
    x,
    grad_y,
    m,
    grad_gram,
    factors,
    grad_x,
    x_size,
    grad_y_size,
    height,
    tops,
    top_step,
    rows,
    width,
    lefts,
    left_step,
    columns,
    stride,
    share,
    C: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    RUN: tl.constexpr,
    OVERLAPPING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradients for a part of a cell's tokens: by one program those of q and k, by another those of v."""
    down, across = (height, tops, top_step, rows), (width, lefts, left_step, columns)
    runs: tl.constexpr = tl.cdiv(C, RUN)
    part = tl.program_id(0) // 2 // runs
    first, last, place, groups = _part_of_cell(part, share, down, across, stride, OVERLAPPING)
    c, exists = _run(tl.program_id(0) // 2 % runs, C, RUN, BLOCK_C)
    if first < last:
        if tl.program_id(0) % 2 == 0:
            by_gram, _ = _total_of_groups(grad_gram, groups, across, C * D, _in_heads(c, D), _own(c, exists, D))
            q_factor, _ = _total_of_groups(factors, groups, across, 2 * C, c, exists)
            k_factor, _ = _total_of_groups(factors, groups, across, 2 * C, c + C, exists)
            _input_gradients(
                x, x_size, by_gram, q_factor, k_factor, grad_x, first, last, place, c, exists, C, PRECISION, BLOCK_T
            )
        else:
            o = tl.arange(0, BLOCK_O)
            in_m, of_m = o[:, None] * C + c[None, :], (o < OUT)[:, None] & exists[None, :]
            total, count = _total_of_groups(m, groups, across, OUT * C, in_m, of_m)
            mean = (total / count).to(x.dtype.element_ty)
            _multiply(
                grad_y,
                grad_y_size,
                o,
                o < OUT,
                mean,
                grad_x,
                3 * C,
                c + 2 * C,
                exists,
                first,
                last,
                place,
                PRECISION,
                BLOCK_T,
            )


@triton.jit(do_not_specialize=_VARYING)
def _fused(
    x,
    temperature,
    weight,
    y,
    x_size,
    height,
    tops,
    top_step,
    rows,
    width,
    lefts,
    left_step,
    columns,
    stride,
    C: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """All of a small group."""
    down, across = (height, tops, top_step, rows), (width, lefts, left_step, columns)
    place, _, _ = _group(tl.program_id(0), down, across, stride)
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    exists, tokens = c < C, rows * columns
    qk, qq, kk = _sum_gram(x, x_size, 0, tokens, place, c, exists, C, PRECISION, BLOCK_T, BLOCK_C)
    of_head = tl.load(temperature + c // D, exists, 0.0)
    a, _, _, _ = _attention(qk, qq, kk, of_head, _own(c, exists, D), SOFTMAX)
    w = _load_weight(weight, o, c, exists, C, OUT).to(x.dtype.element_ty)
    m = tl.dot(w, a.to(w.dtype), input_precision=PRECISION).to(w.dtype)
    _multiply(x, x_size, c + 2 * C, exists, tl.trans(m), y, OUT, o, o < OUT, 0, tokens, place, PRECISION, BLOCK_T)


@triton.jit(do_not_specialize=_VARYING)
def _fused_backward(
    x,
    grad_y,
    temperature,
    weight,
    grad_x,
    grad_temperature,
    grad_weight,
    x_size,
    grad_y_size,
    height,
    tops,
    top_step,
    rows,
    width,
    lefts,
    left_step,
    columns,
    stride,
    groups,
    C: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """All gradients of small groups, those of the parameters summed over this program's groups."""
    down, across = (height, tops, top_step, rows), (width, lefts, left_step, columns)
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    exists, tokens = c < C, rows * columns
    own = _own(c, exists, D)
    of_head = tl.load(temperature + c // D, exists, 0.0)
    w = _load_weight(weight, o, c, exists, C, OUT).to(x.dtype.element_ty)
    by_temperature = tl.zeros((BLOCK_C,), tl.float32)
    # What does not differ from group to group is computed again, rather than kept in registers.
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0), disable_licm=True):
        place, _, _ = _group(group, down, across, stride)
        by_m = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            pixels, inside = _pixels(t, place), t < tokens
            v = _load(x, pixels, inside, x_size, c + 2 * C, exists)
            gradient = _load(grad_y, pixels, inside, grad_y_size, o, o < OUT)
            by_m = tl.dot(tl.trans(gradient), v, by_m, input_precision=PRECISION)
        by_m = by_m.to(w.dtype)
        qk, qq, kk = _sum_gram(x, x_size, 0, tokens, place, c, exists, C, PRECISION, BLOCK_T, BLOCK_C)
        a, cosines, q_inverse, k_inverse = _attention(qk, qq, kk, of_head, own, SOFTMAX)
        if grad_weight is not None:  # summed in memory, where registers do not suffice
            at = grad_weight + tl.program_id(0) * OUT * C + o[:, None] * C + c[None, :]
            of_m = (o < OUT)[:, None] & exists[None, :]
            by_weight = tl.dot(by_m, tl.trans(a.to(w.dtype)), input_precision=PRECISION)
            by_weight += tl.where(tl.program_id(0) < group, tl.load(at, of_m, 0.0), 0.0)  # not before the first one
            tl.store(at, by_weight, of_m)
            # The next group's load may spread the elements over the program's threads in another way than this store.
            tl.debug_barrier()
        if grad_x is not None:
            m = tl.dot(w, a.to(w.dtype), input_precision=PRECISION).to(w.dtype)
            _multiply(
                grad_y,
                grad_y_size,
                o,
                o < OUT,
                m,
                grad_x,
                3 * C,
                c + 2 * C,
                exists,
                0,
                tokens,
                place,
                PRECISION,
                BLOCK_T,
            )
        by_a = tl.dot(tl.trans(w), by_m, input_precision=PRECISION)
        by_gram, q_factor, k_factor, grad_scale = _attention_gradients(
            by_a, a, cosines, q_inverse, k_inverse, qq, kk, of_head, SOFTMAX
        )
        by_temperature += grad_scale
        if grad_x is not None:
            _input_gradients(
                x, x_size, by_gram, q_factor, k_factor, grad_x, 0, tokens, place, c, exists, C, PRECISION, BLOCK_T
            )
    tl.store(grad_temperature + tl.program_id(0) * C + c, by_temperature, exists)


def channel_attention(
    x: Tensor,
    temperature: Tensor,
    activation: str,
    heads: int,
    layout: str,
    window_size: int | None,
    weight: Tensor | None,
) -> Tensor:
    """As the reference, on a map of a dtype that the kernels compute on."""
    temperature = temperature.to(torch.float32).reshape(-1).expand(heads)
    weight = None if weight is None else weight.flatten(1).to(x.dtype)
    return _operator(x, temperature, weight, activation, layout, window_size)


@torch.library.custom_op('attnsr::channel_attention', mutates_args=())
def _operator(
    x: Tensor, temperature: Tensor, weight: Tensor | None, activation: str, layout: str, window_size: int | None
) -> Tensor:
    """(B, O, H, W) of a (B, 3C, H, W) map, (heads,) temperatures in float32 and an (O, C) weight or none."""
    return _Call(x, temperature, weight, activation, layout, window_size).forward()


@_operator.register_fake
def _(
    x: Tensor, temperature: Tensor, weight: Tensor | None, activation: str, layout: str, window_size: int | None
) -> Tensor:
    return new_map(x, x.shape[1] // 3 if weight is None else len(weight))


@torch.library.custom_op('attnsr::channel_attention_backward', mutates_args=())
def _backward_operator(
    gradient: Tensor,
    x: Tensor,
    temperature: Tensor,
    weight: Tensor | None,
    activation: str,
    layout: str,
    window_size: int | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, of the temperatures and of the weight; without elements where one is not needed."""
    return _Call(x, temperature, weight, activation, layout, window_size).backward(gradient, needs_x, needs_weight)


@_backward_operator.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    temperature: Tensor,
    weight: Tensor | None,
    activation: str,
    layout: str,
    window_size: int | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        new_map(x, x.shape[1]) if needs_x else x.new_empty(0),
        torch.empty_like(temperature, memory_format=torch.contiguous_format),
        x.new_empty(weight.shape if needs_weight and weight is not None else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.names = inputs[3:]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = _backward_operator(gradient, *ctx.saved_tensors, *ctx.names, needs[0], needs[2])
    return *(each if needed else None for each, needed in zip(gradients, needs, strict=True)), None, None, None


_operator.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.attnsr.channel_attention)
def _flops(
    x: Any, temperature: Any, weight: Any, activation: Any, layout: Any, window_size: Any, *_: Any, **__: Any
) -> int:
    """Of the definition: products of q and k, of A and v, and of the weight and y."""
    images, channels, height, width = x[0], x[1] // 3, x[2], x[3]
    groups = _groups(height, width, layout, window_size)
    a_token = 2 * channels * (channels // temperature[0]) + (0 if weight is None else weight[0] * weight[1])
    return 2 * images * groups.number * groups.tokens * a_token


@register_flop_formula(torch.ops.attnsr.channel_attention_backward)
def _backward_flops(gradient, x, temperature, weight, activation, layout, window_size, *_, **__) -> int:
    return 2 * _flops(x, temperature, weight, activation, layout, window_size)


class _Axis(NamedTuple):
    """Groups along an axis: the map's side, how many there are, from one's begin to the next one's, their length."""

    side: int
    number: int
    step: int
    length: int


class _Groups(NamedTuple):
    """Groups of tokens of a map, with ``stride`` pixels from one token to the next along both axes."""

    down: _Axis
    across: _Axis
    stride: int
    overlapping: bool

    @property
    def number(self) -> int:
        return self.down.number * self.across.number

    @property
    def cells(self) -> int:
        return (2 * self.down.number - 1) * (2 * self.across.number - 1) if self.overlapping else self.number

    @property
    def tokens(self) -> int:
        return self.down.length * self.across.length


def _groups(height: int, width: int, layout: str, window_size: int | None) -> _Groups:
    def axis(side: int) -> _Axis:
        if layout == 'grid':
            return _Axis(side, size, 1, side // size)
        length = side if layout == 'image' else min(size, side)
        number = triton.cdiv(side, length)
        return _Axis(side, number, triton.cdiv(side - length, max(1, number - 1)), length)

    size = window_size or 1
    return _Groups(axis(height), axis(width), size if layout == 'grid' else 1, layout == 'overlapping')


class _Call:
    """What an operator was given, as kernels take it."""

    def __init__(
        self,
        x: Tensor,
        temperature: Tensor,
        weight: Tensor | None,
        activation: str,
        layout: str,
        window_size: int | None,
    ) -> None:
        self.x, self.x_size = rows_in_place(x)
        self.temperature = temperature.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.softmax = activation == 'softmax'
        self.groups = _groups(x.shape[2], x.shape[3], layout, window_size)
        self.geometry = *self.groups.down, *self.groups.across, self.groups.stride
        self.count = len(x) * self.groups.number
        self.c = x.shape[1] // 3
        self.o = self.c if weight is None else len(weight)
        self.d = self.c // len(temperature)
        # As many runs as it takes, of equally many heads.
        self.runs = triton.cdiv(len(temperature), RUN // self.d)
        self.run = triton.cdiv(len(temperature), self.runs) * self.d

        self.half = x.dtype != torch.float32
        small = max(self.c, self.o) <= RUN
        self.is_fused = small and not self.groups.overlapping and self.groups.tokens <= FUSED_TOKENS
        # Where registers suffice without spilling on every GPU.
        self.options = {'BLOCK_T': 64, 'num_warps': 4} if self.half and small else {'BLOCK_T': 32, 'num_warps': 8}
        self.gradient_options = self.options if self.half or small else {'BLOCK_T': 16, 'num_warps': 8}
        self.sizes = {'C': self.c, 'OUT': self.o, 'D': self.d}
        self.run_sizes = {**self.sizes, 'RUN': self.run, 'BLOCK_C': launching.padded(self.run)}
        self.precision = launching.input_precision(x)
        self.wide_precision = launching.wide_precision(x)

    def forward(self) -> Tensor:
        y = new_map(self.x, self.o)
        if self.is_fused:
            launching.launch(
                _fused,
                (self.count,),
                *(self.x, self.temperature, self.weight, y, self.x_size, *self.geometry),
                **self.sizes,
                SOFTMAX=self.softmax,
                PRECISION=self.precision,
                BLOCK_C=launching.padded(self.c),
                BLOCK_O=launching.padded(self.o),
                **self.options,
            )
            return y
        m = self._new(self.count, self.o, self.c)
        self._find_matrices(*self._sum_products(None, 0), m)
        share, block = self._share(1), min(launching.padded(self.o), RUN)
        launching.launch(
            _values,
            (len(y) * self.groups.cells * triton.cdiv(self.groups.tokens, share) * triton.cdiv(self.o, block),),
            *(self.x, m, y, self.x_size, *self.geometry, share),
            C=self.c,
            OUT=self.o,
            OVERLAPPING=self.groups.overlapping,
            PRECISION=self.precision,
            BLOCK_C=launching.padded(self.c),
            BLOCK_O=block,
            **self.options,
        )
        return y

    def backward(self, gradient: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
        grad_y, grad_y_size = rows_in_place(gradient)
        grad_x = new_map(self.x, 3 * self.c) if needs_x else None
        fused = self.is_fused and self.x.dtype in FUSED_BACKWARD
        # The parameters' gradients, by programs or groups.
        parts = min(self.count, FUSED_PROGRAMS) if fused else self.count
        grad_temperature = self._new(parts, self.c)
        grad_weight = self._new(parts, self.o, self.c) if needs_weight and self.weight is not None else None
        if fused:
            launching.launch(
                _fused_backward,
                (parts,),
                *(self.x, grad_y, self.temperature, self.weight, grad_x, grad_temperature, grad_weight),
                *(self.x_size, grad_y_size, *self.geometry, self.count),
                **self.sizes,
                SOFTMAX=self.softmax,
                PRECISION=self.precision,
                BLOCK_T=32,
                BLOCK_C=launching.padded(self.c),
                BLOCK_O=launching.padded(self.o),
                num_stages=1,
            )
        else:
            m, grad_gram = self._new(self.count, self.o, self.c), self._new(self.count, self.c, self.d)
            factors = self._new(self.count, 2, self.c)
            sums = self._sum_products(grad_y, grad_y_size)
            self._find_matrices(*sums, m, grad_gram, factors, grad_temperature, grad_weight)
            if grad_x is not None:
                share = self._share(2 * self.runs)
                splits = triton.cdiv(self.groups.tokens, share)
                launching.launch(
                    _token_gradients,
                    (len(grad_x) * self.groups.cells * splits * self.runs * 2,),
                    *(self.x, grad_y, m, grad_gram, factors, grad_x),
                    *(self.x_size, grad_y_size, *self.geometry, share),
                    **self.run_sizes,
                    OVERLAPPING=self.groups.overlapping,
                    PRECISION=self.wide_precision,
                    BLOCK_O=launching.padded(self.o),
                    **self.gradient_options,
                )
        return (
            self.x.new_empty(0) if grad_x is None else grad_x,
            grad_temperature.sum(0).view(-1, self.d).sum(1),
            self.x.new_empty(0) if grad_weight is None else grad_weight.sum(0).to(self.x.dtype),
        )

    def _sum_products(self, grad_y: Tensor | None, grad_y_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over parts of each group's tokens: (groups, parts, ...)."""
        block = min(launching.padded(self.o), RUN)
        programs = self.runs * (1 if grad_y is None else 1 + triton.cdiv(self.o, block))
        share = self._share(programs)
        parts = triton.cdiv(self.groups.tokens, share)
        gram = self._new(self.count, parts, self.c, self.d)
        squares = self._new(self.count, parts, 2, self.c)
        grad_m = None if grad_y is None else self._new(self.count, parts, self.o, self.c)
        launching.launch(
            _products,
            (self.count * parts * programs,),
            *(self.x, grad_y, gram, squares, grad_m, self.x_size, grad_y_size, *self.geometry, share),
            **self.run_sizes,
            OVERLAPPING=self.groups.overlapping,
            PRECISION=self.precision,
            BLOCK_O=block,
            **self.options,
        )
        return gram, squares, grad_m

    def _find_matrices(
        self,
        gram: Tensor,
        squares: Tensor,
        grad_m: Tensor | None,
        m: Tensor,
        grad_gram: Tensor | None = None,
        factors: Tensor | None = None,
        grad_temperature: Tensor | None = None,
        grad_weight: Tensor | None = None,
    ) -> None:
        """Each group's, from the sums of products."""
        launching.launch(
            _matrices,
            (self.count * self.runs,),
            *(gram, squares, self.temperature, self.weight, m),
            *(grad_m, grad_gram, factors, grad_temperature, grad_weight, gram.shape[1]),
            **self.run_sizes,
            SOFTMAX=self.softmax,
            PRECISION=launching.exact_precision(),
            BLOCK_O=16,
            num_warps=8,
        )

    def _share(self, programs: int) -> int:
        """Tokens of a program, where there are as many for each token."""
        tokens = self.groups.tokens
        parts = min(triton.cdiv(tokens, LEAST_SHARE), PARTS, triton.cdiv(PROGRAMS, max(1, self.count * programs)))
        return triton.cdiv(tokens, parts * SHARES) * SHARES

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)
