"""Cluster attention: tokens sorted by counting, attended to where they stand in the map, through the sorted order.

A map is a table of rows, one a token, images after one another. A *sequence* is one image in one round of clustering;
its *places* are a circle of whole chunks: the sorted tokens, and behind them the filling, which repeats the last ones.
A table says which row stands where (and inverts its bits where it only fills); the rows themselves are never moved.

The average of the rounds, weighted by the softmax of their log-sum-exp, is one softmax over the keys of all rounds. So
with Z, the log-sum-exp over all of them, a probability is exp(score - Z), and what each round gives is added up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnsr.ops import launching
from attnsr.ops.cluster_attention import reference

# Rows of a program, rows of a step, warps and stages: half precision, float32 as TF32, exact float32. As large as
# registers and shared memory allow from Ampere to Blackwell.
_BLOCKS = {
    'log_sum_exp': ((128, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
    'attend': ((128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    'attend and keep': ((128, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
    'attend again': ((128, 64, 8, 3), (64, 32, 4, 2), (64, 32, 8, 2)),
    'value gradient': ((128, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    'embedding gradient': ((64, 32, 4, 2), (32, 32, 4, 1), (32, 16, 4, 2)),
}

# Tokens that one program assigns, counts and places.
SORTED_TOKENS = 64

_KEY_EPS = tl.constexpr(reference.KEY_EPS)
_LOG2_E = tl.constexpr(1.4426950408889634)

# Channels at a time in exact products of float32.
_SLICE = tl.constexpr(16)


@triton.jit
def _load_rows(x, rows, exist, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr = 0):
    """The rows of a table, (rows, BLOCK): 0 for those that do not exist and beyond the channels."""
    channel = FIRST + tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return tl.load(x + at, exist[:, None] & (channel < CHANNELS)[None, :], 0.0)


@triton.jit
def _store_rows(x, values, rows, exist, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(x + at, values.to(x.dtype.element_ty), exist[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _share(blocks):
    """Of a program: its block of a sequence, and the sequence. All are along axis 0: others end at 65535 programs."""
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def _share_of_chunk(count, chunk_size, BLOCK: tl.constexpr):
    """Of a program: its sequence, how many chunks that has, which of them is its own, and its first token there."""
    chunks, blocks = tl.cdiv(count, chunk_size), tl.cdiv(chunk_size, BLOCK)
    block, sequence = _share(chunks * blocks)
    return sequence, chunks, block // blocks, block % blocks * BLOCK


@triton.jit
def _load_keys(places, chunk, chunk_size, start, BLOCK: tl.constexpr):
    """Of the three chunks around one: rows from number ``start`` on, which of them exist, and which are no filling."""
    k = start + tl.arange(0, BLOCK)
    entries = tl.load(places + chunk * chunk_size + k, k < 3 * chunk_size, -1)
    return tl.where(entries < 0, ~entries, entries), k < 3 * chunk_size, entries >= 0


@triton.jit
def _load_queries(places, chunk, chunk_size, start, BLOCK: tl.constexpr):
    """Of one chunk: rows from number ``start`` on, and which of them exist and are no filling."""
    q = start + tl.arange(0, BLOCK)
    entries = tl.load(places + (chunk + 1) * chunk_size + q, q < chunk_size, -1)
    return tl.maximum(entries, 0), entries >= 0


@triton.jit
def _products(
    a,
    a_rows,
    a_exist,
    a_tile,
    b,
    b_rows,
    b_exist,
    b_tile,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b^T of rows; the tiles are all of their channels.

    Exact products of float32 are made in registers, where whole rows have no room: they are fetched again, a few
    channels at a time, and the tiles, which then serve nothing, are not.
    """
    if PRECISION == 'ieee' and a_tile.dtype == tl.float32:
        products = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
        for first in tl.static_range(0, CHANNELS, _SLICE):
            of_a = _load_rows(a, a_rows, a_exist, CHANNELS, _SLICE, first).to(tl.float32)
            of_b = _load_rows(b, b_rows, b_exist, CHANNELS, _SLICE, first)
            products = tl.dot(of_a, tl.trans(of_b), products, input_precision=PRECISION)
    else:
        products = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
    return products


@triton.jit
def _exact_products(tokens, centres):
    """tokens @ centres^T of bfloat16 and float32: in three pieces of bfloat16, a float32 is complete."""
    high = centres.to(tl.bfloat16)
    rest = centres - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    products = tl.dot(tokens, tl.trans(low))
    products = tl.dot(tokens, tl.trans(middle), products)
    return tl.dot(tokens, tl.trans(high), products)


@triton.jit(do_not_specialize=['count'])
def _assign(
    tokens,
    centres,
    clusters_of,
    counts,
    norms,
    count,
    clusters,
    rounds,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Clusters of a block of an image's tokens in one round; how many are in each; what divides them as keys."""
    blocks = tl.cdiv(count, BLOCK_T)
    block, sequence = _share(blocks)
    image, turn = sequence // rounds, sequence % rounds
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    exist = t < count
    rows = image * count + t
    tile = _load_rows(tokens, rows, exist, D, BLOCK_D)
    if norms is not None and turn == 0:
        squares = tile.to(tl.float32) * tile.to(tl.float32)
        tl.store(norms + rows, tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), _KEY_EPS), exist)

    largest = tl.full((BLOCK_T,), float('-inf'), tl.float32)
    cluster = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, clusters, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        centre = _load_rows(centres + turn * clusters * D, c, c < clusters, D, BLOCK_D)
        if tokens.dtype.element_ty == tl.bfloat16:
            products = _exact_products(tile, centre)
        else:
            here = centres + turn * clusters * D
            products = _products(tokens, rows, exist, tile.to(tl.float32), here, c, c < clusters, centre, D, PRECISION)
        products = tl.where((c < clusters)[None, :], products, float('-inf'))
        value, index = tl.max(products, 1, return_indices=True, return_indices_tie_break_left=True)
        cluster = tl.where(value > largest, start + index, cluster)
        largest = tl.maximum(value, largest)
    cluster = tl.minimum(cluster, clusters - 1)  # what is no number must not lead out of a table
    tl.store(clusters_of + rows * rounds + turn, cluster, exist)
    if counts is not None:
        cluster = tl.where(exist, cluster, -1)
        for start in range(0, clusters, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            members = tl.sum((cluster[:, None] == c[None, :]).to(tl.int32), 0)
            tl.store(counts + (sequence * clusters + c) * blocks + block, members, c < clusters)


@triton.jit(do_not_specialize=['count'])
def _sort(clusters_of, ends, order, count, clusters, rounds, BLOCK_T: tl.constexpr):
    """Put each token of a block where the counts say: ``ends`` is where the block's part of a cluster ends."""
    blocks = tl.cdiv(count, BLOCK_T)
    block, sequence = _share(blocks)
    image, turn = sequence // rounds, sequence % rounds
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = image * count + t
    cluster = tl.load(clusters_of + rows * rounds + turn, t < count, -1).to(tl.int32)
    is_later = (cluster[:, None] == cluster[None, :]) & (t[:, None] <= t[None, :])
    end = tl.load(ends + (sequence * clusters + cluster) * blocks + block, t < count, 0)
    tl.store(order + end - tl.sum(is_later.to(tl.int32), 1), rows, t < count)


@triton.jit(do_not_specialize=['count', 'chunks'])
def _lay_out(order, places, count, chunk_size, chunks, BLOCK_T: tl.constexpr):
    """Close the circle of chunks: what stands at each place, from the last chunk to the first one again."""
    length = chunks * chunk_size
    block, sequence = _share(tl.cdiv(length + 2 * chunk_size, BLOCK_T))
    n = block * BLOCK_T + tl.arange(0, BLOCK_T)
    place = (n + length - chunk_size) % length
    repeated = _repeated(count, length)
    position = tl.where(place < count, place, count - repeated + (place - count) % repeated)
    exist = n < length + 2 * chunk_size
    row = tl.load(order + sequence * count + position, exist, 0)
    row = tl.where(place < count, row, ~row)
    tl.store(places + sequence * (length + 2 * chunk_size) + n, row, exist)


@triton.jit
def _repeated(count, length):
    """How many tokens at the end of a sequence of ``count`` are repeated to fill it up to ``length``."""
    return tl.maximum(tl.minimum(length - count, count), 1)


@triton.jit(do_not_specialize=['count', 'rows_in_all'])
def _log_sum_exp(
    e,
    places,
    norms,
    lse,
    chunk_size,
    count,
    rounds,
    rows_in_all,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The logarithm of the sum of exp(score) over the keys of each query."""
    sequence, chunks, chunk, first = _share_of_chunk(count, chunk_size, BLOCK_I)
    places += sequence * (chunks + 2) * chunk_size
    rows, is_query = _load_queries(places, chunk, chunk_size, first, BLOCK_I)
    queries = _load_rows(e, rows, is_query, D, BLOCK_D)

    largest = tl.full((BLOCK_I,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, 0, BLOCK_J)
    for start in range(0, 3 * chunk_size, BLOCK_J):
        key_rows, exist = next_rows, next_exist
        keys = _load_rows(e, key_rows, exist, D, BLOCK_D)
        scale = 1 / tl.load(norms + key_rows) * _LOG2_E
        # One step ahead: where the rows are must be known before they are fetched.
        next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, start + BLOCK_J, BLOCK_J)
        scores = _products(e, rows, is_query, queries, e, key_rows, exist, keys, D, PRECISION) * scale[None, :]
        scores = tl.where(exist[None, :], scores, float('-inf'))
        larger = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(scores - larger[:, None]), 1)
        largest = larger
    result = (largest + tl.log2(total)) / _LOG2_E
    tl.store(lse + (sequence % rounds).to(tl.int64) * rows_in_all + rows, result, is_query)


@triton.jit(do_not_specialize=['count', 'rows_in_all'])
def _attend(
    e,
    v,
    places,
    norms,
    lse,
    y,
    probabilities,
    chunk_size,
    count,
    rounds,
    rows_in_all,
    D: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = exp(scores - lse) v, each row at its own token; also the probabilities where there is memory for them."""
    sequence, chunks, chunk, first = _share_of_chunk(count, chunk_size, BLOCK_I)
    places += sequence * (chunks + 2) * chunk_size
    rows, is_query = _load_queries(places, chunk, chunk_size, first, BLOCK_I)
    queries = _load_rows(e, rows, is_query, D, BLOCK_D)
    z = tl.load(lse + rows) * _LOG2_E

    result = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, 0, BLOCK_J)
    for start in range(0, 3 * chunk_size, BLOCK_J):
        key_rows, exist = next_rows, next_exist
        keys = _load_rows(e, key_rows, exist, D, BLOCK_D)
        values = _load_rows(v, key_rows, exist, C, BLOCK_C)
        scale = 1 / tl.load(norms + key_rows) * _LOG2_E
        next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, start + BLOCK_J, BLOCK_J)
        scores = _products(e, rows, is_query, queries, e, key_rows, exist, keys, D, PRECISION) * scale[None, :]
        p = tl.exp2(scores - z[:, None]).to(values.dtype)
        if probabilities is not None:
            _store_probabilities(probabilities, p, sequence * chunks + chunk, first, start, chunk_size)
        result = tl.dot(p, values, result, input_precision=PRECISION)
    y += (sequence % rounds).to(tl.int64) * rows_in_all * C
    _store_rows(y, result, rows, is_query, C, BLOCK_C)


@triton.jit(do_not_specialize=['count', 'rows_in_all'])
def _attend_again(
    v,
    places,
    probabilities,
    y,
    chunk_size,
    count,
    rounds,
    rows_in_all,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = probabilities v, each row at its own token."""
    sequence, chunks, chunk, first = _share_of_chunk(count, chunk_size, BLOCK_I)
    places += sequence * (chunks + 2) * chunk_size
    rows, is_query = _load_queries(places, chunk, chunk_size, first, BLOCK_I)

    result = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, 0, BLOCK_J)
    for start in range(0, 3 * chunk_size, BLOCK_J):
        key_rows, exist = next_rows, next_exist
        values = _load_rows(v, key_rows, exist, C, BLOCK_C)
        next_rows, next_exist, _ = _load_keys(places, chunk, chunk_size, start + BLOCK_J, BLOCK_J)
        at, inside = _probabilities_at(sequence * chunks + chunk, first, start, chunk_size, BLOCK_I, BLOCK_J)
        p = tl.load(probabilities + at, inside, 0.0).to(values.dtype)
        result = tl.dot(p, values, result, input_precision=PRECISION)
    y += (sequence % rounds).to(tl.int64) * rows_in_all * C
    _store_rows(y, result, rows, is_query, C, BLOCK_C)


@triton.jit
def _store_probabilities(probabilities, p, chunk, first, start, chunk_size):
    at, inside = _probabilities_at(chunk, first, start, chunk_size, p.shape[0], p.shape[1])
    tl.store(probabilities + at, p, inside)


@triton.jit
def _probabilities_at(chunk, first, start, chunk_size, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    q, k = first + tl.arange(0, BLOCK_I), start + tl.arange(0, BLOCK_J)
    at = (chunk * chunk_size + q).to(tl.int64)[:, None] * (3 * chunk_size) + k[None, :]
    return at, (q < chunk_size)[:, None] & (k < 3 * chunk_size)[None, :]


@triton.jit(do_not_specialize=['rows_in_all'])
def _row_products(x, y, z, rows_in_all, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inner product of each row of two tables."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exist = rows < rows_in_all
    a = _load_rows(x, rows, exist, C, BLOCK_C).to(tl.float32)
    b = _load_rows(y, rows, exist, C, BLOCK_C).to(tl.float32)
    tl.store(z + rows, tl.sum(a * b, 1), exist)


@triton.jit
def _log_repetitions(chunk, first, chunks, count, chunk_size, BLOCK: tl.constexpr):
    """Of a block of tokens: the binary logarithm of how many times the filling repeats each."""
    length = chunks * chunk_size
    repeated = _repeated(count, length)
    nth = chunk * chunk_size + first + tl.arange(0, BLOCK) - (count - repeated)
    times = tl.where((nth >= 0) & (nth < repeated), (length - count - nth + repeated - 1) // repeated, 0)
    return tl.log2(times.to(tl.float32))


@triton.jit(do_not_specialize=['count', 'rows_in_all'])
def _value_gradient(
    e,
    gradient,
    places,
    norms,
    lse,
    grad_v,
    chunk_size,
    count,
    rounds,
    rows_in_all,
    D: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For keys i, the sum over the queries j in the chunks around, and around the filling where that repeats a key."""
    sequence, chunks, chunk, first = _share_of_chunk(count, chunk_size, BLOCK_I)
    places += sequence * (chunks + 2) * chunk_size
    rows_i, exist_i = _load_queries(places, chunk, chunk_size, first, BLOCK_I)
    e_i = _load_rows(e, rows_i, exist_i, D, BLOCK_D)
    scale_i = 1 / tl.load(norms + rows_i) * _LOG2_E

    log_repetitions = _log_repetitions(chunk, first, chunks, count, chunk_size, BLOCK_I)
    steps = tl.cdiv(3 * chunk_size, BLOCK_J)
    every_step = tl.where(tl.max(log_repetitions, 0) >= 0, 2 * steps, steps)
    result = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    next_rows, next_exist, next_is_query = _load_keys(places, chunk, chunk_size, 0, BLOCK_J)
    for step in range(0, every_step):
        rows_j, exist_j, is_query_j = next_rows, next_exist, next_is_query
        e_j = _load_rows(e, rows_j, exist_j, D, BLOCK_D)
        gradient_j = _load_rows(gradient, rows_j, is_query_j, C, BLOCK_C)
        z_j = tl.load(lse + rows_j, is_query_j, float('inf')) * _LOG2_E
        centre = tl.where(step + 1 < steps, chunk, chunks - 1)
        following = (step + 1) % steps * BLOCK_J
        next_rows, next_exist, next_is_query = _load_keys(places, centre, chunk_size, following, BLOCK_J)
        products = _products(e, rows_i, exist_i, e_i, e, rows_j, exist_j, e_j, D, PRECISION)
        times = tl.where(step < steps, 0.0, log_repetitions)
        p = tl.exp2(products * scale_i[:, None] + times[:, None] - z_j[None, :])
        result = tl.dot(p.to(gradient_j.dtype), gradient_j, result, input_precision=PRECISION)
    grad_v += (sequence % rounds).to(tl.int64) * rows_in_all * C
    _store_rows(grad_v, result, rows_i, exist_i, C, BLOCK_C)


@triton.jit(do_not_specialize=['count', 'rows_in_all'])
def _embedding_gradient(
    e,
    v,
    gradient,
    places,
    norms,
    lse,
    delta,
    grad_e,
    chunk_size,
    count,
    rounds,
    rows_in_all,
    D: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For tokens i, as queries and as keys: the others, j, stand in the same chunks either way, with the same e_i e_j.

    As in ``_value_gradient``, the queries around the filling come after those around the tokens themselves.
    """
    sequence, chunks, chunk, first = _share_of_chunk(count, chunk_size, BLOCK_I)
    places += sequence * (chunks + 2) * chunk_size
    rows_i, exist_i = _load_queries(places, chunk, chunk_size, first, BLOCK_I)
    e_i = _load_rows(e, rows_i, exist_i, D, BLOCK_D)
    v_i = _load_rows(v, rows_i, exist_i, C, BLOCK_C)
    gradient_i = _load_rows(gradient, rows_i, exist_i, C, BLOCK_C)
    norm_i = tl.load(norms + rows_i)
    scale_i, ratio_i = 1 / norm_i * _LOG2_E, norm_i / _LOG2_E
    z_i = tl.load(lse + rows_i) * _LOG2_E
    delta_i = tl.load(delta + rows_i) * ratio_i

    # Quotients of norms are beyond float16.
    wide: tl.constexpr = tl.float32 if e.dtype.element_ty == tl.float16 else e.dtype.element_ty
    log_repetitions = _log_repetitions(chunk, first, chunks, count, chunk_size, BLOCK_I)
    steps = tl.cdiv(3 * chunk_size, BLOCK_J)
    every_step = tl.where(tl.max(log_repetitions, 0) >= 0, 2 * steps, steps)
    result = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_I,), tl.float32)
    next_rows, next_exist, next_is_query = _load_keys(places, chunk, chunk_size, 0, BLOCK_J)
    for step in range(0, every_step):
        rows_j, exist_j, is_query_j = next_rows, next_exist, next_is_query
        e_j = _load_rows(e, rows_j, exist_j, D, BLOCK_D)
        v_j = _load_rows(v, rows_j, exist_j, C, BLOCK_C)
        gradient_j = _load_rows(gradient, rows_j, is_query_j, C, BLOCK_C)
        scale_j = 1 / tl.load(norms + rows_j) * _LOG2_E
        z_j = tl.load(lse + rows_j, is_query_j, float('inf')) * _LOG2_E
        delta_j = tl.load(delta + rows_j, is_query_j, 0.0)
        centre = tl.where(step + 1 < steps, chunk, chunks - 1)
        following = (step + 1) % steps * BLOCK_J
        next_rows, next_exist, next_is_query = _load_keys(places, centre, chunk_size, following, BLOCK_J)
        products = _products(e, rows_i, exist_i, e_i, e, rows_j, exist_j, e_j, D, PRECISION)

        times = tl.where(step < steps, 0.0, log_repetitions)
        of_key = tl.exp2(products * scale_i[:, None] + times[:, None] - z_j[None, :])
        by_key = _products(v, rows_i, exist_i, v_i, gradient, rows_j, is_query_j, gradient_j, C, PRECISION)
        of_key *= by_key - delta_j[None, :]
        along += tl.sum(of_key * products, 1)
        z = tl.where(step < steps, z_i, float('inf'))
        p = tl.exp2(products * scale_j[None, :] - z[:, None]) * scale_j[None, :]
        of_query = _products(gradient, rows_i, exist_i, gradient_i, v, rows_j, exist_j, v_j, C, PRECISION)
        of_query = of_query * ratio_i[:, None] - delta_i[:, None]
        factors = of_query * p + of_key
        result = tl.dot(factors.to(wide), e_j.to(wide), result, input_precision=PRECISION)

    # Loaded again, as registers were full meanwhile; without the barrier the compiler would keep them.
    tl.debug_barrier()
    rows_i, exist_i = _load_queries(places, chunk, chunk_size, first, BLOCK_I)
    norm_i = tl.load(norms + rows_i)
    # A key shorter than the least norm is divided by a constant.
    along = tl.where(norm_i > _KEY_EPS, along / (norm_i * norm_i), 0.0)
    e_i = _load_rows(e, rows_i, exist_i, D, BLOCK_D).to(tl.float32)
    grad_e += (sequence % rounds).to(tl.int64) * rows_in_all * D
    _store_rows(grad_e, (result - along[:, None] * e_i) / norm_i[:, None], rows_i, exist_i, D, BLOCK_D)


def cluster_attention(
    e: Tensor, v: Tensor, centres: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As the reference: y, and what ``SortedTokens`` has."""
    rows, batch = _rows(e), e.shape[0]
    places, norms, lse = _sequences(rows.detach(), centres.detach(), batch, chunk_size)
    keep = not _is_differentiated(e, v)
    y, probabilities = _attention(rows, _rows(v), places, norms, lse, batch, chunk_size, keep)
    return _map(y, v), rows, places, norms, lse, probabilities if keep else None


def attend(
    v: Tensor, e: Tensor, places: Tensor, norms: Tensor, lse: Tensor, probabilities: Tensor | None, chunk_size: int
) -> Tensor:
    """Attend to a map of values as was done to others."""
    if probabilities is None or _is_differentiated(v):
        y, _ = _attention(e, _rows(v), places, norms, lse, v.shape[0], chunk_size, False)
    else:
        y = _attention_again(_rows(v), places, probabilities, v.shape[0], chunk_size)
    return _map(y, v)


def _is_differentiated(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _rows(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as a table of its tokens, (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


@torch.library.custom_op('attnsr::assign_clusters', mutates_args=())
def assign_clusters(tokens: Tensor, centres: Tensor) -> Tensor:
    """As the reference."""
    clusters_of = _new_clusters(tokens, centres)
    _launch_assign(tokens, centres, 1, clusters_of, None, None)
    return clusters_of


@assign_clusters.register_fake
def _new_clusters(tokens: Tensor, centres: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], centres.shape[0], dtype=torch.int64)


def _launch_assign(
    tokens: Tensor, centres: Tensor, batch: int, clusters_of: Tensor, counts: Tensor | None, norms: Tensor | None
) -> None:
    rounds, clusters, d = centres.shape
    count = tokens.shape[0] // batch
    launching.launch(
        _assign,
        (triton.cdiv(count, SORTED_TOKENS) * batch * rounds,),
        tokens.contiguous(),
        centres.float().contiguous(),
        clusters_of,
        counts,
        norms,
        count,
        clusters,
        rounds,
        D=d,
        PRECISION='ieee',  # two centres may be as near as rounding, which is not to decide
        BLOCK_T=SORTED_TOKENS,
        BLOCK_C=16,
        BLOCK_D=launching.padded(d),
    )


@torch.library.custom_op('attnsr::cluster_sequences', mutates_args=())
def _sequences(e: Tensor, centres: Tensor, batch: int, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``places``, ``norms`` and ``log_sum_exp``."""
    e = e.contiguous()
    places, norms, lse = _new_sequences(e, centres, batch, chunk_size)
    (rounds, clusters, _), count = centres.shape, e.shape[0] // batch
    blocks, sequences = triton.cdiv(count, SORTED_TOKENS), batch * rounds
    clusters_of = _new_clusters(e, centres)
    counts = e.new_empty(sequences, clusters, blocks, dtype=torch.int32)
    _launch_assign(e, centres, batch, clusters_of, counts, norms)
    # As each sequence has all tokens of its image, one sum over all counts says where its part of ``order`` begins.
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    order = e.new_empty(sequences, count, dtype=torch.int32)
    launching.launch(
        _sort, (blocks * sequences,), clusters_of, ends, order, count, clusters, rounds, BLOCK_T=SORTED_TOKENS
    )
    launching.launch(
        _lay_out,
        (triton.cdiv(places.shape[1], 256) * sequences,),
        order,
        places,
        count,
        chunk_size,
        triton.cdiv(count, chunk_size),
        BLOCK_T=256,
    )
    each = lse if rounds == 1 else e.new_empty(rounds, e.shape[0], dtype=torch.float32)
    _launch(_log_sum_exp, 'log_sum_exp', (e, places, norms, each), batch, chunk_size, D=e)
    return places, norms, lse if rounds == 1 else each.logsumexp(0)


@_sequences.register_fake
def _new_sequences(e: Tensor, centres: Tensor, batch: int, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (e.shape[0] // batch + chunk_size - 1) // chunk_size
    places = e.new_empty(batch * centres.shape[0], (chunks + 2) * chunk_size, dtype=torch.int32)
    return places, e.new_empty(e.shape[0], dtype=torch.float32), e.new_empty(e.shape[0], dtype=torch.float32)


@torch.library.custom_op('attnsr::cluster_attention', mutates_args=())
def _attention(
    e: Tensor, v: Tensor, places: Tensor, norms: Tensor, lse: Tensor, batch: int, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """y, and with ``keep`` the probabilities."""
    e, v = e.contiguous(), v.contiguous()
    y, probabilities = _new_parts(v, places.shape[0] // batch), _new_probabilities(v, places, chunk_size, keep)
    tensors = (e, v, places, norms, lse, y, probabilities if keep else None)
    _launch(_attend, 'attend and keep' if keep else 'attend', tensors, batch, chunk_size, D=e, C=v)
    return _sum(y, v.dtype), probabilities


@_attention.register_fake
def _(
    e: Tensor, v: Tensor, places: Tensor, norms: Tensor, lse: Tensor, batch: int, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _new_probabilities(v, places, chunk_size, keep)


@torch.library.custom_op('attnsr::cluster_attention_again', mutates_args=())
def _attention_again(v: Tensor, places: Tensor, probabilities: Tensor, batch: int, chunk_size: int) -> Tensor:
    v = v.contiguous()
    y = _new_parts(v, places.shape[0] // batch)
    _launch(_attend_again, 'attend again', (v, places, probabilities, y), batch, chunk_size, C=v)
    return _sum(y, v.dtype)


@_attention_again.register_fake
def _(v: Tensor, places: Tensor, probabilities: Tensor, batch: int, chunk_size: int) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op('attnsr::cluster_attention_gradients', mutates_args=())
def _attention_gradients(
    gradient: Tensor,
    y: Tensor,
    e: Tensor,
    v: Tensor,
    places: Tensor,
    norms: Tensor,
    lse: Tensor,
    batch: int,
    chunk_size: int,
    of_e: bool,
    of_v: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of e and v; one that is not wanted is empty."""
    e, v, gradient, rounds = e.contiguous(), v.contiguous(), gradient.contiguous(), places.shape[0] // batch
    grad_e, grad_v = _new_parts(e, rounds, of_e), _new_parts(v, rounds, of_v)
    if of_v:
        of_values = (e, gradient, places, norms, lse, grad_v)
        _launch(_value_gradient, 'value gradient', of_values, batch, chunk_size, D=e, C=v)
    if of_e:
        delta = torch.empty_like(lse)
        (rows, c), block = v.shape, 32
        launching.launch(
            _row_products,
            (triton.cdiv(rows, block),),
            gradient,
            y.contiguous(),
            delta,
            rows,
            C=c,
            BLOCK_T=block,
            BLOCK_C=launching.padded(c),
        )
        of_embedding = (e, v, gradient, places, norms, lse, delta, grad_e)
        _launch(_embedding_gradient, 'embedding gradient', of_embedding, batch, chunk_size, D=e, C=v)
    return _sum(grad_e, e.dtype), _sum(grad_v, v.dtype)


@_attention_gradients.register_fake
def _(
    gradient: Tensor,
    y: Tensor,
    e: Tensor,
    v: Tensor,
    places: Tensor,
    norms: Tensor,
    lse: Tensor,
    batch: int,
    chunk_size: int,
    of_e: bool,
    of_v: bool,
) -> tuple[Tensor, Tensor]:
    return e.new_empty(e.shape if of_e else (0,)), v.new_empty(v.shape if of_v else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.batch, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_e, of_v = ctx.needs_input_grad[:2]
    grad_e, grad_v = _attention_gradients(gradient, *ctx.saved_tensors, ctx.batch, ctx.chunk_size, of_e, of_v)
    return grad_e if of_e else None, grad_v if of_v else None, None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _new_parts(like: Tensor, rounds: int, wanted: bool = True) -> Tensor:
    """A table for what each round gives, to be added up in float32; empty where it is not wanted."""
    if not wanted:
        return like.new_empty(1, 0)
    return like.new_empty(rounds, *like.shape, dtype=like.dtype if rounds == 1 else torch.float32)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)


def _new_probabilities(v: Tensor, places: Tensor, chunk_size: int, keep: bool) -> Tensor:
    if not keep:
        return v.new_empty(0)
    chunks = places.shape[1] // chunk_size - 2
    return v.new_empty(places.shape[0] * chunks, chunk_size, 3 * chunk_size)


def _launch(
    kernel: Any, name: str, tensors: tuple[Tensor | None, ...], batch: int, chunk_size: int, **tables: Tensor
) -> None:
    """Run a kernel of queries and keys.

    Args:
        kernel: Its function.
        name: Its row of ``_BLOCKS``.
        tensors: Its arguments before the numbers.
        batch: Images.
        chunk_size: Tokens in a chunk.
        tables: The embedding and the values as D and C, as far as it works on them.
    """
    narrow = [] if kernel is _embedding_gradient else [torch.float16]  # whose products are not in float32
    wide = [x for x in tables.values() if x.dtype not in (torch.bfloat16, *narrow)]
    precision = launching.wide_precision(wide[0]) if wide else 'ieee'
    if precision != 'tf32':
        # Not three products of TF32: of 128 channels, their factors take more shared memory than Ada has.
        precision = 'ieee'
    kind = 0 if not wide else 1 if precision == 'tf32' else 2
    block_i, block_j, num_warps, num_stages = _BLOCKS[name][kind]
    rows = next(iter(tables.values())).shape[0]
    places = next(x for x in tensors if x is not None and x.dtype == torch.int32)
    count = rows // batch
    chunks = triton.cdiv(count, chunk_size)
    channels = {name: x.shape[1] for name, x in tables.items()}
    launching.launch(
        kernel,
        (chunks * triton.cdiv(chunk_size, block_i) * places.shape[0],),
        *tensors,
        chunk_size,
        count,
        places.shape[0] // batch,
        rows,
        num_warps=num_warps,
        num_stages=num_stages,
        PRECISION=precision,
        BLOCK_I=block_i,
        BLOCK_J=block_j,
        **channels,
        **{f'BLOCK_{name}': launching.padded(number) for name, number in channels.items()},
    )


# Counted as in the reference: filling included, and what is computed again left out. The gradient of e is counted in
# every layer, as it is computed there; in the reference those of all layers meet at the probabilities.
@register_flop_formula(torch.ops.attnsr.assign_clusters)
def _(tokens: Any, centres: Any, *_: Any, **__: Any) -> int:
    (count, d), (rounds, clusters, _) = tokens, centres
    return 2 * count * d * rounds * clusters


@register_flop_formula(torch.ops.attnsr.cluster_sequences)
def _(e: Any, centres: Any, batch: int, chunk_size: int, **_: Any) -> int:
    (rows, d), (rounds, clusters, _) = e, centres
    places = batch * rounds, (triton.cdiv(rows // batch, chunk_size) + 2) * chunk_size
    return 2 * rows * d * rounds * clusters + _product_flops(places, chunk_size, d)


@register_flop_formula(torch.ops.attnsr.cluster_attention)
def _(e: Any, v: Any, places: Any, norms: Any, lse: Any, batch: int, chunk_size: int, *_: Any, **__: Any) -> int:
    return _product_flops(places, chunk_size, v[1])


@register_flop_formula(torch.ops.attnsr.cluster_attention_again)
def _(v: Any, places: Any, probabilities: Any, batch: int, chunk_size: int, **_: Any) -> int:
    return _product_flops(places, chunk_size, v[1])


@register_flop_formula(torch.ops.attnsr.cluster_attention_gradients)
def _(
    gradient: Any,
    y: Any,
    e: Any,
    v: Any,
    places: Any,
    norms: Any,
    lse: Any,
    batch: int,
    chunk_size: int,
    of_e: bool,
    of_v: bool,
    **_: Any,
) -> int:
    return _product_flops(places, chunk_size, of_e * (v[1] + 2 * e[1]) + of_v * v[1])


def _product_flops(places: Any, chunk_size: int, channels: int) -> int:
    """Of one product of all queries and their keys."""
    sequences, length = places
    return 2 * sequences * (length - 2 * chunk_size) * 3 * chunk_size * channels
