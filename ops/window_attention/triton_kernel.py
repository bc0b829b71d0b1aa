"""Window attention in one kernel: windows are read where they stand on the map, and scores never reach memory.

A *tile* is what a program works on: some windows side by side, one window, or a block of a larger one. Its *slots* are
its tokens, with what fills it up; each of its windows has as many of them as the *span* of the window size says. Pairs
of tokens of the same window are (slots, span): a row for each slot, whatever its window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.maps import new_map, rows_in_place

# Programs that the gradient of the tables is spread over at most: a few for each multiprocessor of the largest devices.
TABLE_PROGRAMS = 512


def _span(size: int, slots: int) -> int:
    return min(max(triton.next_power_of_2(size**2), 16), slots)


class Run(NamedTuple):
    """What a kernel is compiled for: a window size, and where its run of channels is.

    Attributes:
        size: Side of the windows.
        slots: Of a tile.
        columns: Tokens that a block of a window meets at a time in the gradient.
        q: First channel of the queries in x; likewise k.
        v: First channel of the values in their map, which is x or another one.
        y: First channel of the output.
        table: First entry of the table.
        d: Channels of a query.
        dv: Channels of a value.
        x_stride: From a pixel to the next in x, and so on.
        shared: Whether the log-sum-exp is known, and the values are in a map of their own.
        precision: Of products.
    """

    size: int
    slots: int
    columns: int
    q: int
    k: int
    v: int
    y: int
    table: int
    d: int
    dv: int
    x_stride: int
    v_stride: int
    y_stride: int
    dy_stride: int
    dx_stride: int
    dv_stride: int
    shared: bool
    precision: str

    @property
    def span(self) -> int:
        """Slots of a window: the fewest that a product can have, or the whole tile."""
        return _span(self.size, self.slots)

    @property
    def blocks(self) -> int:
        """Tiles that a window is."""
        return triton.cdiv(self.size**2, self.slots)


@triton.constexpr_function
def _run(sizes, number, slots, d, dv, x_stride, v_stride, symmetric, shared, precision, columns=None, dy_stride=None):
    runs, parts = len(sizes), 2 if symmetric else 3
    q, y = number * parts * d, number * dv
    k = q if symmetric else q + d
    return Run(
        size=sizes[number],
        slots=slots,
        columns=columns,
        q=q,
        k=k,
        v=y if shared else k + d,
        y=y,
        table=sum((2 * size - 1) ** 2 for size in sizes[:number]),
        d=d,
        dv=dv,
        x_stride=x_stride,
        v_stride=v_stride,
        y_stride=runs * dv,
        dy_stride=dy_stride,
        dx_stride=runs * parts * d,
        dv_stride=runs * dv if shared else runs * parts * d,
        shared=shared,
        precision=precision,
    )


@triton.constexpr_function
def _padded(channels):
    """What products have instead of that many channels."""
    return max(triton.next_power_of_2(channels), 16)


@triton.constexpr_function
def _remainder(dividend, divisor):
    return dividend % divisor


@triton.jit
def _tiles(geometry, RUN: tl.constexpr):
    """Tiles of all windows."""
    batch, height, width, _, _ = geometry
    return batch * (height // RUN.size) * tl.cdiv(width // RUN.size, RUN.slots // RUN.span) * RUN.blocks


@triton.jit
def _tile(number, geometry, RUN: tl.constexpr):
    """What a tile is: image, row and first column of its windows; and the first token where they are larger."""
    _, height, width, _, _ = geometry
    down, right = height // RUN.size, width // RUN.size
    windows: tl.constexpr = RUN.slots // RUN.span
    groups = tl.cdiv(right, windows)
    block, group = number % RUN.blocks, number // RUN.blocks
    row = group // groups
    return row // down, row % down, group % groups * windows, block * RUN.slots


@triton.jit
def _places(tile, first, geometry, RUN: tl.constexpr, SLOTS: tl.constexpr):
    """Of each slot: its pixel, its number among the tokens of all windows, and whether it is a token at all."""
    image, top, left, _ = tile
    _, height, width, shifted, grid = geometry
    down, right = height // RUN.size, width // RUN.size
    slot = tl.arange(0, SLOTS)
    token = first + slot % RUN.span
    left += slot // RUN.span
    i, j = token // RUN.size, token % RUN.size
    y = tl.where(grid != 0, i * down + top, top * RUN.size + i) + shifted * (RUN.size // 2)
    x = tl.where(grid != 0, j * right + left, left * RUN.size + j) + shifted * (RUN.size // 2)
    y, x = tl.where(y < height, y, y - height), tl.where(x < width, x, x - width)
    pixel = (image * height + y).to(tl.int64) * width + x
    number = ((image * down + top).to(tl.int64) * right + left) * (RUN.size * RUN.size) + token
    exists = token < RUN.size * RUN.size
    if RUN.span < RUN.slots:
        exists &= left < right
    return pixel, number, exists


@triton.jit
def _load(x, pixel, exists, STRIDE: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr):
    """Channels of some pixels, 0 where there is none: (slots, channels)."""
    c = tl.arange(0, _padded(D))
    return tl.load(x + pixel[:, None] * STRIDE + (FIRST + c)[None, :], exists[:, None] & (c < D)[None, :], 0.0)


@triton.jit
def _store(x, tile, pixel, exists, STRIDE: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr):
    c = tl.arange(0, _padded(D))
    at = x + pixel[:, None] * STRIDE + (FIRST + c)[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), exists[:, None] & (c < D)[None, :])


@triton.jit
def _outer(a, b, RUN: tl.constexpr):
    """Inner products of the tokens of each window: (slots, d) and (slots, d) to (slots, span)."""
    d: tl.constexpr = a.shape[1]
    if RUN.span == RUN.slots:
        return tl.dot(a, tl.trans(b), input_precision=RUN.precision)
    else:
        a = tl.reshape(a, (RUN.slots // RUN.span, RUN.span, d))
        b = tl.permute(tl.reshape(b, (RUN.slots // RUN.span, RUN.span, d)), (0, 2, 1))
        return tl.reshape(tl.dot(a, b, input_precision=RUN.precision), (RUN.slots, RUN.span))


@triton.jit
def _mix(pairs, tokens, RUN: tl.constexpr):
    """Sums over the tokens of each window: weights (slots, span) and (slots, d) to (slots, d)."""
    d: tl.constexpr = tokens.shape[1]
    pairs = pairs.to(tokens.dtype)
    if RUN.span == RUN.slots:
        return tl.dot(pairs, tokens, input_precision=RUN.precision)
    else:
        pairs = tl.reshape(pairs, (RUN.slots // RUN.span, RUN.span, RUN.span))
        tokens = tl.reshape(tokens, (RUN.slots // RUN.span, RUN.span, d))
        return tl.reshape(tl.dot(pairs, tokens, input_precision=RUN.precision), (RUN.slots, d))


@triton.jit
def _exchange(pairs, RUN: tl.constexpr):
    """Rows and columns exchanged in each window: (slots, span)."""
    if RUN.span == RUN.slots:
        return tl.trans(pairs)
    else:
        pairs = tl.permute(tl.reshape(pairs, (RUN.slots // RUN.span, RUN.span, RUN.span)), (0, 2, 1))
        return tl.reshape(pairs, (RUN.slots, RUN.span))


@triton.jit
def _scores(products, table, scale, row, column, RUN: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr = False):
    """``scale q k^T + bias`` of the tokens from ``row`` and ``column`` on; -inf in columns that are no token."""
    s = products * scale
    column += tl.arange(0, s.shape[1])
    if table is not None:
        row += tl.arange(0, s.shape[0]) % RUN.span
        # Down and to the right, in one number.
        row_at = row // RUN.size * (2 * RUN.size - 1) + row % RUN.size
        column_at = column // RUN.size * (2 * RUN.size - 1) + column % RUN.size
        distance = row_at[:, None] - column_at[None, :]
        distance = -distance if ROWS_ARE_KEYS else distance
        are_tokens = (row < RUN.size * RUN.size)[:, None] & (column < RUN.size * RUN.size)[None, :]
        s += tl.load(table + RUN.table + 2 * RUN.size * (RUN.size - 1) + distance, are_tokens, 0.0)
    if _remainder(RUN.size * RUN.size, s.shape[1]):
        s = tl.where((column < RUN.size * RUN.size)[None, :], s, float('-inf'))
    return s


@triton.jit
def _attend(maps, tile, geometry, scale, RUN: tl.constexpr):
    """The output of a tile, and the log-sum-exp of its scores unless that is known."""
    x, v, table, lse, y = maps
    first = tile[3]
    pixel, number, exists = _places(tile, first, geometry, RUN, RUN.slots)
    q = _load(x, pixel, exists, RUN.x_stride, RUN.q, RUN.d)
    if RUN.shared:
        known = tl.load(lse + number, exists, 0.0)
    if RUN.blocks == 1:
        k = q if RUN.k == RUN.q else _load(x, pixel, exists, RUN.x_stride, RUN.k, RUN.d)
        values = _load(v, pixel, exists, RUN.v_stride, RUN.v, RUN.dv)
        s = _scores(_outer(q, k, RUN), table, scale, 0, 0, RUN)
        if RUN.shared:
            out = _mix(tl.exp(s - known[:, None]), values, RUN)
        else:
            most = tl.max(s, 1)
            p = tl.exp(s - most[:, None])
            total = tl.sum(p, 1)
            out = _mix(p, values, RUN)
    else:
        most, total = tl.full((RUN.slots,), float('-inf'), tl.float32), tl.full((RUN.slots,), 0, tl.float32)
        out = tl.full((RUN.slots, _padded(RUN.dv)), 0, tl.float32)
        for other in range(0, RUN.size * RUN.size, RUN.slots):
            pixels, _, exist = _places(tile, other, geometry, RUN, RUN.slots)
            k = _load(x, pixels, exist, RUN.x_stride, RUN.k, RUN.d)
            values = _load(v, pixels, exist, RUN.v_stride, RUN.v, RUN.dv)
            s = _scores(_outer(q, k, RUN), table, scale, first, other, RUN)
            if RUN.shared:
                p = tl.exp(s - known[:, None])
            else:
                before, most = most, tl.maximum(most, tl.max(s, 1))
                p = tl.exp(s - most[:, None])
                total = total * tl.exp(before - most) + tl.sum(p, 1)
                out *= tl.exp(before - most)[:, None]
            out += _mix(p, values, RUN)
    if not RUN.shared:
        out *= (1 / total)[:, None]
        tl.store(lse + number, most + tl.log(total), exists)
    _store(y, out, pixel, exists, RUN.y_stride, RUN.y, RUN.dv)


@triton.jit
def _attend_run(maps, geometry, scale, RUN: tl.constexpr):
    if tl.program_id(0) < _tiles(geometry, RUN):
        _attend(maps, _tile(tl.program_id(0), geometry, RUN), geometry, scale, RUN)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'shifted', 'grid'])
def _window_attention(
    x,
    v,
    table,
    lse,
    y,
    batch,
    height,
    width,
    shifted,
    grid,
    scale,
    SIZES: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    X_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Axis 0: tiles; axis 1: runs, the last, which has the largest windows as a rule, before the others."""
    geometry = batch, height, width, shifted, grid
    tokens = (batch * height).to(tl.int64) * width
    runs: tl.constexpr = len(SIZES)
    for i in tl.static_range(runs):
        if tl.program_id(1) == runs - 1 - i:
            _attend_run(
                (x, v, table, lse + i * tokens, y),
                geometry,
                scale,
                _run(SIZES, i, SLOTS, D, DV, X_STRIDE, V_STRIDE, SYMMETRIC, SHARED, PRECISION),
            )


@triton.jit
def _gradient_of_windows(
    maps, tile, geometry, scale, of_scores, OF_X: tl.constexpr, OF_V: tl.constexpr, RUN: tl.constexpr
):
    """The gradients of a tile of whole windows; returns the sum with that of the scores where there is one."""
    x, v, table, lse, _, dy, dx, dv = maps
    pixel, number, exists = _places(tile, 0, geometry, RUN, RUN.slots)
    q = _load(x, pixel, exists, RUN.x_stride, RUN.q, RUN.d)
    k = q if RUN.k == RUN.q else _load(x, pixel, exists, RUN.x_stride, RUN.k, RUN.d)
    of_y = _load(dy, pixel, exists, RUN.dy_stride, RUN.y, RUN.dv)
    known = tl.load(lse + number, exists, float('inf'))  # no weights where there is no query
    p = tl.exp(_scores(_outer(q, k, RUN), table, scale, 0, 0, RUN) - known[:, None])
    if OF_V:
        of_v = _mix(_exchange(p.to(of_y.dtype), RUN), of_y, RUN)
        _store(dv, of_v, pixel, exists, RUN.dv_stride, RUN.v, RUN.dv)
    if OF_X or of_scores is not None:
        of_p = _outer(of_y, _load(v, pixel, exists, RUN.v_stride, RUN.v, RUN.dv), RUN)
        of_s = p * (of_p - tl.sum(p * of_p, 1)[:, None])
        if of_scores is not None:
            of_scores += of_s
    if OF_X:
        if RUN.k == RUN.q:
            of_q = _mix(of_s + _exchange(of_s, RUN), q, RUN)
        else:
            of_k = _mix(_exchange(of_s.to(q.dtype), RUN), q, RUN)
            _store(dx, of_k * scale, pixel, exists, RUN.dx_stride, RUN.k, RUN.d)
            of_q = _mix(of_s, k, RUN)
        _store(dx, of_q * scale, pixel, exists, RUN.dx_stride, RUN.q, RUN.d)
        if RUN.shared:  # it had other values, which did nothing here
            _store(dx, tl.zeros_like(of_q), pixel, exists, RUN.dx_stride, RUN.k + RUN.d, RUN.d)
    if of_scores is not None:  # Triton 3.6 has no way to return None
        return of_scores


@triton.jit
def _means(y, of_y, pixel, exists, RUN: tl.constexpr):
    """The mean of the gradients of each query's weights, weighted by themselves: that is y times its gradient."""
    return tl.sum(_load(y, pixel, exists, RUN.y_stride, RUN.y, RUN.dv).to(tl.float32) * of_y.to(tl.float32), 1)


@triton.jit
def _gradient_of_block(maps, tile, geometry, scale, OF_X: tl.constexpr, OF_V: tl.constexpr, RUN: tl.constexpr):
    """The gradients of a block of a window: of its tokens as keys, for all queries, and as queries, of all keys."""
    x, v, table, lse, y, dy, dx, dv = maps
    first = tile[3]
    pixel, number, exists = _places(tile, first, geometry, RUN, RUN.slots)
    k = _load(x, pixel, exists, RUN.x_stride, RUN.k, RUN.d)
    of_v = tl.full((RUN.slots, _padded(RUN.dv)), 0, tl.float32)
    of_q, of_k = (
        tl.full((RUN.slots, _padded(RUN.d)), 0, tl.float32),
        tl.full((RUN.slots, _padded(RUN.d)), 0, tl.float32),
    )
    if OF_X:
        q = k if RUN.k == RUN.q else _load(x, pixel, exists, RUN.x_stride, RUN.q, RUN.d)
        values = _load(v, pixel, exists, RUN.v_stride, RUN.v, RUN.dv)
        of_y = _load(dy, pixel, exists, RUN.dy_stride, RUN.y, RUN.dv)
        known = tl.load(lse + number, exists, 0.0)
        mean = _means(y, of_y, pixel, exists, RUN)
    for other in range(0, RUN.size * RUN.size, RUN.columns):
        pixels, numbers, exist = _places(tile, other, geometry, RUN, RUN.columns)
        # Keys of this block, in rows, and queries of the other one, in columns.
        q_other = _load(x, pixels, exist, RUN.x_stride, RUN.q, RUN.d)
        of_y_other = _load(dy, pixels, exist, RUN.dy_stride, RUN.y, RUN.dv)
        known_other = tl.load(lse + numbers, exist, 0.0)
        products = _outer(k, q_other, RUN)
        s = _scores(products, table, scale, first, other, RUN, ROWS_ARE_KEYS=True)
        p = tl.exp(s - known_other[None, :])
        if OF_V:
            of_v += _mix(p, of_y_other, RUN)
        if OF_X:
            of_s = p * (_outer(values, of_y_other, RUN) - _means(y, of_y_other, pixels, exist, RUN)[None, :])
            if RUN.k == RUN.q:
                k_other = q_other
            else:
                of_k += _mix(of_s, q_other, RUN)
                k_other = _load(x, pixels, exist, RUN.x_stride, RUN.k, RUN.d)
                products = _outer(q, k_other, RUN)
            # Queries of this block, in rows, and keys of the other one, in columns.
            p = tl.exp(_scores(products, table, scale, first, other, RUN) - known[:, None])
            v_other = _load(v, pixels, exist, RUN.v_stride, RUN.v, RUN.dv)
            of_t = p * (_outer(of_y, v_other, RUN) - mean[:, None])
            of_q += _mix(of_s + of_t if RUN.k == RUN.q else of_t, k_other, RUN)
    if OF_V:
        _store(dv, of_v, pixel, exists, RUN.dv_stride, RUN.v, RUN.dv)
    if OF_X:
        _store(dx, of_q * scale, pixel, exists, RUN.dx_stride, RUN.q, RUN.d)
        if RUN.k != RUN.q:
            _store(dx, of_k * scale, pixel, exists, RUN.dx_stride, RUN.k, RUN.d)
        if RUN.shared:
            _store(dx, tl.zeros_like(of_q), pixel, exists, RUN.dx_stride, RUN.k + RUN.d, RUN.d)


@triton.jit
def _gradient_of_run(maps, pairs, geometry, scale, OF_X: tl.constexpr, OF_V: tl.constexpr, RUN: tl.constexpr):
    number, tiles = tl.program_id(0), _tiles(geometry, RUN)
    if pairs is None:
        if number < tiles:
            if RUN.blocks > 1:
                _gradient_of_block(maps, _tile(number, geometry, RUN), geometry, scale, OF_X, OF_V, RUN)
            else:
                _gradient_of_windows(maps, _tile(number, geometry, RUN), geometry, scale, None, OF_X, OF_V, RUN)
    else:
        total = tl.full((RUN.slots, RUN.span), 0, tl.float32)
        for each in range(number, tiles, tl.num_programs(0)):
            tile = _tile(each, geometry, RUN)
            if RUN.blocks > 1:
                _gradient_of_block(maps, tile, geometry, scale, OF_X, OF_V, RUN)
            else:
                total = _gradient_of_windows(maps, tile, geometry, scale, total, OF_X, OF_V, RUN)
        row, column = tl.arange(0, RUN.slots), tl.arange(0, RUN.span)
        pairs += number * RUN.slots * RUN.slots
        tl.store(pairs + row[:, None] * RUN.span + column[None, :], total)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'shifted', 'grid'])
def _window_attention_gradient(
    x,
    v,
    table,
    lse,
    y,
    dy,
    dx,
    dv,
    pairs,
    batch,
    height,
    width,
    shifted,
    grid,
    scale,
    SIZES: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    X_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHARED: tl.constexpr,
    OF_X: tl.constexpr,
    OF_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Axes as forward, or fewer tiles than there are, each program taking several of them.

    Where ``pairs`` is given, each program leaves the sum of its scores' gradients there, (runs, programs, slots, slots)
    and filled from the front; of windows that are several tiles, :func:`_pair_gradients` does.
    """
    geometry = batch, height, width, shifted, grid
    tokens = (batch * height).to(tl.int64) * width
    runs: tl.constexpr = len(SIZES)
    for i in tl.static_range(runs):
        if tl.program_id(1) == runs - 1 - i:
            _gradient_of_run(
                (x, v, table, lse + i * tokens, y, dy, dx, dv),
                None if pairs is None else pairs + i * tl.num_programs(0) * SLOTS * SLOTS,
                geometry,
                scale,
                OF_X,
                OF_V,
                _run(SIZES, i, SLOTS, D, DV, X_STRIDE, V_STRIDE, SYMMETRIC, SHARED, PRECISION, COLUMNS, DY_STRIDE),
            )


@triton.jit
def _sum_pair_gradients(maps, pairs, geometry, scale, RUN: tl.constexpr):
    x, v, table, lse, y, dy = maps
    side: tl.constexpr = RUN.blocks * RUN.slots
    first, other = tl.program_id(0) // RUN.blocks * RUN.slots, tl.program_id(0) % RUN.blocks * RUN.slots
    total = tl.full((RUN.slots, RUN.slots), 0, tl.float32)
    for window in range(tl.program_id(1), _tiles(geometry, RUN) // RUN.blocks, tl.num_programs(1)):
        tile = _tile(window * RUN.blocks, geometry, RUN)
        pixel, number, exists = _places(tile, first, geometry, RUN, RUN.slots)
        pixels, _, exist = _places(tile, other, geometry, RUN, RUN.slots)
        q = _load(x, pixel, exists, RUN.x_stride, RUN.q, RUN.d)
        k = _load(x, pixels, exist, RUN.x_stride, RUN.k, RUN.d)
        known = tl.load(lse + number, exists, float('inf'))
        p = tl.exp(_scores(_outer(q, k, RUN), table, scale, first, other, RUN) - known[:, None])
        of_y = _load(dy, pixel, exists, RUN.dy_stride, RUN.y, RUN.dv)
        values = _load(v, pixels, exist, RUN.v_stride, RUN.v, RUN.dv)
        total += p * (_outer(of_y, values, RUN) - _means(y, of_y, pixel, exists, RUN)[:, None])
    row, column = first + tl.arange(0, RUN.slots), other + tl.arange(0, RUN.slots)
    tl.store(pairs + (tl.program_id(1) * side + row)[:, None] * side + column[None, :], total)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'shifted', 'grid'])
def _pair_gradients(
    x,
    v,
    table,
    lse,
    y,
    dy,
    pairs,
    batch,
    height,
    width,
    shifted,
    grid,
    scale,
    SIZES: tl.constexpr,
    NUMBER: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    X_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over windows of the gradient of the scores of one run. Axis 0: pairs of blocks; axis 1: shares of windows.

    ``pairs`` is (shares, blocks * slots, blocks * slots).
    """
    _sum_pair_gradients(
        (x, v, table, lse + NUMBER * (batch * height).to(tl.int64) * width, y, dy),
        pairs,
        (batch, height, width, shifted, grid),
        scale,
        _run(SIZES, NUMBER, SLOTS, D, DV, X_STRIDE, V_STRIDE, SYMMETRIC, SHARED, PRECISION, None, DY_STRIDE),
    )


@triton.jit
def _table_gradient(pairs, of_table, SIZE: tl.constexpr, SIDE: tl.constexpr):
    """Sums over the pairs of query and key that have the same entry; ``pairs`` is (side, side).

    A program for each distance down, with all distances to the right.
    """
    entries: tl.constexpr = 2 * SIZE - 1
    down = tl.program_id(0) - (SIZE - 1)
    right = tl.arange(0, triton.next_power_of_2(entries))[:, None] - (SIZE - 1)
    j = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    exists = (j < SIZE) & (j >= right) & (j - right < SIZE)
    total = tl.zeros((triton.next_power_of_2(entries),), tl.float32)
    for i in range(max(down, 0), min(SIZE + down, SIZE)):
        at = (i * SIZE + j) * SIDE + (i - down) * SIZE + j - right
        total += tl.sum(tl.load(pairs + at, exists, 0.0), 1)
    entry = tl.arange(0, triton.next_power_of_2(entries))
    tl.store(of_table + tl.program_id(0) * entries + entry, total, entry < entries)


class Windows(NamedTuple):
    """Which windows, and which scores in them, as the public function is told."""

    sizes: Sequence[int]
    shifted: bool
    grid: bool
    symmetric: bool
    scale: float

    def channels(self, x: Tensor) -> int:
        """Of a query, in the map that has them."""
        return x.shape[1] // (len(self.sizes) * (2 if self.symmetric else 3))


@torch.library.custom_op('attnsr::window_attention', mutates_args=())
def window_attention(
    x: Tensor, table: Tensor | None, sizes: Sequence[int], shifted: bool, grid: bool, symmetric: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As the public function, of a map in a dtype that the kernels compute on.

    Args:
        x: (B, C, H, W).
        table: The tables of all runs one after the other, float32, or None.
        sizes: Of the windows; this and the others as in the public function.

    Returns:
        y: The output.
        lse: Log-sum-exp of each token's scores, float32, (runs, B * H * W) in the order of the windows.
    """
    windows = Windows(sizes, shifted, grid, symmetric, scale)
    y, lse = _new_outputs(x, windows)
    _launch_attention(x, None, table, lse, y, windows)
    return y, lse


@window_attention.register_fake
def _(
    x: Tensor, table: Tensor | None, sizes: Sequence[int], shifted: bool, grid: bool, symmetric: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _new_outputs(x, Windows(sizes, shifted, grid, symmetric, scale))


@torch.library.custom_op('attnsr::shared_window_attention', mutates_args=())
def shared_window_attention(
    v: Tensor,
    x: Tensor,
    table: Tensor | None,
    lse: Tensor,
    sizes: Sequence[int],
    shifted: bool,
    grid: bool,
    symmetric: bool,
    scale: float,
) -> Tensor:
    """The attention of :func:`window_attention`, from its arguments and its lse, to other values of x's dtype."""
    y = new_map(v, v.shape[1])
    _launch_attention(x, v, table, lse, y, Windows(sizes, shifted, grid, symmetric, scale))
    return y


@shared_window_attention.register_fake
def _(
    v: Tensor,
    x: Tensor,
    table: Tensor | None,
    lse: Tensor,
    sizes: Sequence[int],
    shifted: bool,
    grid: bool,
    symmetric: bool,
    scale: float,
) -> Tensor:
    return new_map(v, v.shape[1])


def _launch_attention(
    x: Tensor, v: Tensor | None, table: Tensor | None, lse: Tensor, y: Tensor, windows: Windows
) -> None:
    slots, warps = _forward_blocking(x)
    b, _, h, w = x.shape
    x, x_stride = rows_in_place(x)
    v, v_stride, shared = (x, x_stride, False) if v is None else (*rows_in_place(v), True)
    runs = len(windows.sizes)
    launching.launch(
        _window_attention,
        (max(_count_tiles(size, slots, b, h, w) for size in windows.sizes), runs),
        x,
        v,
        table,
        lse,
        y,
        b,
        h,
        w,
        int(windows.shifted),
        int(windows.grid),
        windows.scale,
        SIZES=tuple(windows.sizes),
        SLOTS=slots,
        D=windows.channels(x),
        DV=y.shape[1] // runs,
        X_STRIDE=x_stride,
        V_STRIDE=v_stride,
        SYMMETRIC=windows.symmetric,
        SHARED=shared,
        PRECISION=launching.input_precision(x),
        num_warps=warps,
    )


@torch.library.custom_op('attnsr::window_attention_gradient', mutates_args=())
def window_attention_gradient(
    dy: Tensor,
    v: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    lse: Tensor,
    y: Tensor | None,
    sizes: Sequence[int],
    shifted: bool,
    grid: bool,
    symmetric: bool,
    scale: float,
    of_x: bool,
    of_v: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of v (where None, x has the values) and of the table; empty where they are not wanted.

    y is the output, or None in windows that are whole tiles.
    """
    windows = Windows(sizes, shifted, grid, symmetric, scale)
    dx, dv, dtable = _new_gradients(v, x, table, of_x, of_v, of_table)
    b, _, h, w = x.shape
    d, channels = windows.channels(x), dy.shape[1] // len(sizes)
    slots, columns, warps, stages = _blocking(x, max(d, channels), of_table)
    x, x_stride = rows_in_place(x)
    dy, dy_stride = rows_in_place(dy)
    values, v_stride = (x, x_stride) if v is None else rows_in_place(v)
    geometry = b, h, w, int(shifted), int(grid), scale
    constants = {
        'SIZES': tuple(sizes),
        'SLOTS': slots,
        'D': d,
        'DV': channels,
        'X_STRIDE': x_stride,
        'V_STRIDE': v_stride,
        'DY_STRIDE': dy_stride,
        'SYMMETRIC': symmetric,
        'SHARED': v is not None,
        'PRECISION': launching.input_precision(x),
    }
    programs, pairs = max(_count_tiles(size, slots, b, h, w) for size in sizes), None
    if of_table and min(sizes) ** 2 <= slots:
        programs = min(programs, TABLE_PROGRAMS)
        pairs = x.new_empty(len(sizes), programs, slots * slots, dtype=torch.float32)
    if of_x or of_v or pairs is not None:
        launching.launch(
            _window_attention_gradient,
            (programs, len(sizes)),
            x,
            values,
            table,
            lse,
            y,
            dy,
            dx if of_x else None,
            (dx if v is None else dv) if of_v else None,
            pairs,
            *geometry,
            **constants,
            COLUMNS=columns,
            OF_X=of_x,
            OF_V=of_v,
            num_warps=warps,
            num_stages=stages,
        )
    if not of_table:
        return dx, dv, dtable
    parts = dtable.split([(2 * size - 1) ** 2 for size in sizes])
    for number, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        if size**2 <= slots:
            assert pairs is not None
            side = _span(size, slots)
            sums = pairs[number, :, : slots * side].unflatten(1, (-1, side, side)).sum((0, 1))
        else:
            blocks = triton.cdiv(size**2, slots)
            side = blocks * slots
            shares = min(b * (h // size) * (w // size), triton.cdiv(TABLE_PROGRAMS, blocks**2))
            sums = x.new_empty(shares, side, side, dtype=torch.float32)
            launching.launch(
                _pair_gradients,
                (blocks**2, shares),
                x,
                values,
                table,
                lse,
                y,
                dy,
                sums,
                *geometry,
                NUMBER=number,
                **constants,
                num_warps=8 if launching.is_exact(x) and d > 32 else warps,
                num_stages=stages,
            )
            sums = sums.sum(0)
        launching.launch(_table_gradient, (2 * size - 1,), sums, part, SIZE=size, SIDE=side)
    return dx, dv, dtable


@window_attention_gradient.register_fake
def _(
    dy: Tensor,
    v: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    lse: Tensor,
    y: Tensor | None,
    sizes: Sequence[int],
    shifted: bool,
    grid: bool,
    symmetric: bool,
    scale: float,
    of_x: bool,
    of_v: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(v, x, table, of_x, of_v, of_table)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, table, *ctx.windows = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, table, lse, y if _needs_output(x, ctx.windows[0]) else None)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, table, lse, y = ctx.saved_tensors
    of_x, of_table = ctx.needs_input_grad[:2]
    dx, _, dtable = window_attention_gradient(dy, None, x, table, lse, y, *ctx.windows, of_x, of_x, of_table)
    return dx if of_x else None, dtable if of_table else None, *[None] * 5


def _setup_shared_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, x, table, lse, *ctx.windows = inputs
    ctx.save_for_backward(v, x, table, lse, output if _needs_output(x, ctx.windows[0]) else None)


def _shared_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    v, x, table, lse, y = ctx.saved_tensors
    of_v, of_x, of_table = ctx.needs_input_grad[:3]
    dx, dv, dtable = window_attention_gradient(dy, v, x, table, lse, y, *ctx.windows, of_x, of_v, of_table)
    return dv if of_v else None, dx if of_x else None, dtable if of_table else None, *[None] * 6


window_attention.register_autograd(_backward, setup_context=_setup_context)
shared_window_attention.register_autograd(_shared_backward, setup_context=_setup_shared_context)


@register_flop_formula(torch.ops.attnsr.window_attention)
def _flops(x_shape: Any, table_shape: Any, sizes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Both products. What is computed again, here and below, is no part of the definition, and not counted."""
    return 2 * _product_flops(sizes, out_shape[0])


@register_flop_formula(torch.ops.attnsr.shared_window_attention)
def _shared_flops(
    v_shape: Any, x_shape: Any, table_shape: Any, lse_shape: Any, sizes: Any, *args: Any, **kwargs: Any
) -> int:
    return _product_flops(sizes, v_shape)


@register_flop_formula(torch.ops.attnsr.window_attention_gradient)
def _gradient_flops(
    dy_shape: Any,
    v_shape: Any,
    x_shape: Any,
    table_shape: Any,
    lse_shape: Any,
    y_shape: Any,
    sizes: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two products for each of forward: the gradient of the scores' own is counted where the scores are."""
    return (4 if v_shape is None else 2) * _product_flops(sizes, dy_shape)


def _product_flops(sizes: Sequence[int], shape: Sequence[int]) -> int:
    """Of scores, or of attention and values, of all windows; with as many channels as the values have."""
    b, c, h, w = shape
    return sum(2 * b * h * w * size**2 * (c // len(sizes)) for size in sizes)


def _forward_blocking(x: Tensor) -> tuple[int, int]:
    """Slots and warps."""
    return (32 if launching.is_exact(x) else 64), 4


def _blocking(x: Tensor, channels: int, of_table: bool) -> tuple[int, int, int, int]:
    """Slots, columns, warps and stages of the gradient: as much as registers hold."""
    if launching.is_exact(x):
        return 32, 16, 4, 1
    if x.dtype == torch.float32:
        return (32, 16, 4, 1) if channels > 32 or of_table else (64, 32, 4, 1)
    return 64, 16 if channels > 32 and of_table else 32, 4, 1 if of_table else 2


def _needs_output(x: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the gradient does: where windows may be larger than tiles."""
    return max(sizes) ** 2 > (32 if x.dtype == torch.float32 else 64)


def _count_tiles(size: int, slots: int, b: int, h: int, w: int) -> int:
    return b * (h // size) * triton.cdiv(w // size, slots // _span(size, slots)) * triton.cdiv(size**2, slots)


def _new_outputs(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    b, _, h, w = x.shape
    runs = len(windows.sizes)
    return new_map(x, windows.channels(x) * runs), x.new_empty(runs, b * h * w, dtype=torch.float32)


def _new_gradients(
    v: Tensor | None, x: Tensor, table: Tensor | None, of_x: bool, of_v: bool, of_table: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        new_map(x, x.shape[1]) if of_x else x.new_empty(0),
        x.new_empty(0) if v is None or not of_v else new_map(v, v.shape[1]),
        x.new_empty(0) if table is None or not of_table else torch.empty_like(table),
    )
