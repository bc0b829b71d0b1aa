"""Window attention in plain PyTorch: the definition that every kernel is tested against.

A map (B, C, H, W) in channels-last memory format is a table of rows: one for each pixel and run, a *run* being the
share of the channels that one window size works on. Cutting windows, of a rolled map and on a grid too, is then a
permutation of rows, and putting them back is the inverse permutation: one pass over memory each.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnsr.ops.autocast import autocast_input, without_autocast

# On a CPU without autograd the probabilities are computed this many at a time, always in the same memory: what stays in
# cache, and what the C library need not fetch anew.
CHUNK_ELEMENTS = 2**20

# What is so much less than another score of its row that exp of the difference, 1e-26, is nothing beside 1 in any
# dtype. Scores are raised to that: exponentials that underflow take several times as long.
NEGLIGIBLE = 60

# On a CPU without autograd, windows of more tokens than this (in half precision, of more than four times as many) do
# not keep their probabilities for later layers: computing them again in cache takes no longer than fetching them from
# memory, and memory is what they would fill.
KEPT_TOKENS = 64


class Layout(NamedTuple):
    """Which windows a map is cut into.

    Windows are numbered row by row, image after image: ``n = B * H/size * W/size``; tokens row by row in a window.

    Attributes:
        window_sizes: Side of the windows of each run of channels, in tokens.
        shifted: Whether the windows are those of the map rolled by ``-(size // 2)`` along both axes.
        grid: Whether a window's tokens lie ``H/size`` and ``W/size`` pixels apart, and not side by side: token (i, j)
            of window (y, x) is the pixel ``(i * H/size + y, j * W/size + x)``.
        extent: (B, H, W) of the map.
    """

    window_sizes: tuple[int, ...]
    shifted: bool
    grid: bool
    extent: tuple[int, int, int]


class Scores(NamedTuple):
    """What the scores ``scale q k^T + bias`` of a run's windows are computed from.

    Attributes:
        q: Queries (n, tokens, d).
        k: Keys (n, tokens, d).
        scale: Factor on the products.
        bias: (tokens, tokens), the same in all windows, or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None

    def part(self, windows: slice) -> 'Scores':
        """Those of some of the windows."""
        return Scores(self.q[windows], self.k[windows], self.scale, self.bias)

    def compact(self) -> 'Scores':
        """The same in memory of their own, where q and k were slices of a larger map."""
        q = self.q.contiguous()
        return Scores(q, q if self.k is self.q else self.k.contiguous(), self.scale, self.bias)


def probabilities(scores: Scores) -> Tensor:
    """``softmax(scale q k^T + bias)``, (n, tokens, tokens).

    Half precision is left in between: float16 does not reach as far as unscaled scores, bfloat16 is too coarse.
    """
    q, k, scale, bias = scores
    if q.dtype in (torch.float16, torch.bfloat16):
        with without_autocast(q):
            return probabilities(Scores(q.float(), k.float(), scale, bias)).to(q.dtype)
    a = _scores(scores)
    return a.softmax(-1) if a.requires_grad else torch.softmax(a, -1, out=a)


def _probabilities_in(memory: Tensor, scores: Scores) -> Tensor:
    """:func:`probabilities` of at least float32 in given memory; not for autograd."""
    a = _scores(scores, out=memory)
    least = a.diagonal(dim1=1, dim2=2).unsqueeze(2) - NEGLIGIBLE  # any score of a row will do for the other
    torch.maximum(a, least, out=a)
    return torch.softmax(a, -1, out=a)


def _scores(scores: Scores, out: Tensor | None = None) -> Tensor:
    q, k, scale, bias = scores
    k = k.transpose(1, 2)
    if bias is None:
        return torch.bmm(q if scale == 1 else q * scale, k, out=out)
    return torch.baddbmm(bias.to(q.dtype), q, k, alpha=scale, out=out)


def attend(scores: Sequence[Scores], values: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | Scores, ...]]:
    """``A v`` for every run, and what later layers compute it from for other values.

    Returns:
        rows: (runs * B * H * W, d) of the windows, run after run.
        attention: For each run A, (n, tokens, tokens), or its scores where computing it again is cheaper.
    """
    attention: tuple[Tensor | Scores, ...]
    if _whole(scores, values):
        attention = tuple(probabilities(run) for run in scores)
        return attend_shared(attention, values), attention
    attention = tuple(
        v.new_empty(v.shape[0], v.shape[1], v.shape[1]) if _keeps(v) else run
        for run, v in zip(scores, values, strict=True)
    )
    rows, parts = _empty_rows(values)
    for run, a, v, out in zip(scores, attention, values, parts, strict=True):
        attend_in_chunks(run, v, out, keep=a if isinstance(a, Tensor) else None)
    return rows, tuple(a if isinstance(a, Tensor) else a.compact() for a in attention)


def attend_shared(attention: Sequence[Tensor | Scores], values: Sequence[Tensor]) -> Tensor:
    """``A v`` for every run, with A kept or else computed again: the rows that :func:`attend` returns."""
    if _whole(attention, values):
        kept = [a if isinstance(a, Tensor) else probabilities(a) for a in attention]
        return torch.cat([torch.bmm(a, v).flatten(0, 1) for a, v in zip(kept, values, strict=True)])
    rows, parts = _empty_rows(values)
    for a, v, out in zip(attention, values, parts, strict=True):
        if isinstance(a, Tensor):
            torch.bmm(a, v, out=out)
        else:
            attend_in_chunks(a, v, out, keep=None)
    return rows


def _keeps(v: Tensor) -> bool:
    """Whether windows with these values keep their probabilities."""
    return v.shape[1] <= KEPT_TOKENS * (4 if v.itemsize < 4 else 1)


def attend_in_chunks(scores: Scores, v: Tensor, out: Tensor, keep: Tensor | None) -> None:
    """``A v`` into ``out``, and A into ``keep``, a few windows at a time; not for autograd."""
    n, tokens = v.shape[:2]
    length = min(n, max(1, CHUNK_ELEMENTS // tokens**2))
    exact = torch.promote_types(v.dtype, torch.float32)
    scores = Scores(scores.q.to(exact), scores.k.to(exact), scores.scale, scores.bias)
    memory = v.new_empty(length, tokens, tokens, dtype=exact)
    with without_autocast(v):
        for start in range(0, n, length):
            chunk = slice(start, min(start + length, n))
            a = _probabilities_in(memory[: chunk.stop - start], scores.part(chunk))
            a = a.to(v.dtype) if keep is None else keep[chunk].copy_(a)
            torch.bmm(a, v[chunk], out=out[chunk])


def _empty_rows(values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Memory for the rows of all runs, and the windows of each run in it."""
    rows = values[0].new_empty(sum(v.shape[0] * v.shape[1] for v in values), values[0].shape[2])
    return rows, [part.view(v.shape) for part, v in zip(rows.chunk(len(values)), values, strict=True)]


def _whole(attention: Sequence[Tensor | Scores], values: Sequence[Tensor]) -> bool:
    """Whether all windows are worked on at once: autograd keeps everything, a compiler does its own blocking.

    Chunks are for a CPU's cache.
    """
    tensors: list[Any] = list(values)
    for a in attention:
        tensors += [a] if isinstance(a, Tensor) else [a.q, a.k, a.bias]
    if torch.compiler.is_compiling() or values[0].device.type != 'cpu':
        return True
    return any(x is not None and x.requires_grad for x in tensors)


def relative_bias(table: Tensor, size: int) -> Tensor:
    """The (tokens, tokens) bias of windows of ``size x size``, out of a table of ``(2 size - 1)^2`` entries.

    The entry of a query and a key is ``(dy + size - 1) * (2 size - 1) + (dx + size - 1)``, (dy, dx) being the
    position of the query less that of the key.
    """
    side = torch.arange(size, device=table.device)
    distance = side[:, None] - side + size - 1
    index = distance[:, None, :, None] * (2 * size - 1) + distance[None, :, None, :]
    return table.flatten().index_select(0, index.flatten()).view(size**2, size**2)


def to_windows(x: Tensor, layout: Layout) -> list[Tensor]:
    """Cut every run of (B, C, H, W) into windows: one (n, size * size, C / runs) for each size."""
    x = autocast_input(x)  # products into prepared memory are out of autocast's reach
    runs = len(layout.window_sizes)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // runs)
    windows = _Permute.apply(rows, *_permutations(layout, x)).unflatten(0, (runs, -1))
    return [run.view(-1, size * size, run.shape[1]) for run, size in zip(windows, layout.window_sizes, strict=True)]


def from_windows(rows: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`to_windows` from the windows' rows: (B, C, H, W) in channels-last format."""
    there, back = _permutations(layout, rows)
    return _Permute.apply(rows, back, there).view(*layout.extent, -1).permute(0, 3, 1, 2)


class _Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is the inverse permutation, where indexing's would be a scattered sum."""

    @staticmethod
    def forward(rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        return rows.index_select(0, there)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Permute.apply(grad.contiguous(), back, there), None, None


def _permutations(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which row of the map stands where in the windows, run after run; and the inverse. Both (B * H * W * runs,)."""
    # An index is kept from one call to the next, but none that is no real tensor: a compiler's, a fake one; nor one
    # that is captured in a CUDA graph, where nothing is computed before that runs.
    keep = type(x) is Tensor and not torch.compiler.is_compiling()
    keep = keep and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    return (_kept_permutations if keep else _make_permutations)(layout, x.device)


def _make_permutations(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    b, h, w = layout.extent
    runs = len(layout.window_sizes)
    index = torch.arange(b * h * w, device=device)
    there = [_pixel(index, size, layout) * runs + run for run, size in enumerate(layout.window_sizes)]
    back = [_token(index, size, layout) + b * h * w * run for run, size in enumerate(layout.window_sizes)]
    return torch.cat(there), torch.stack(back, 1).flatten()


@lru_cache(maxsize=4)
def _kept_permutations(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # so that an index made at inference serves training afterwards
        there, back = _make_permutations(layout, device)
        return (there.int(), back.int()) if len(there) < 2**31 else (there, back)


def _pixel(token: Tensor, size: int, layout: Layout) -> Tensor:
    """Number of the pixel where a token lies; pixels of the map and tokens of the windows are numbered through."""
    _, h, w = layout.extent
    token, j = _divmod(token, size)
    token, i = _divmod(token, size)
    token, left = _divmod(token, w // size)
    image, top = _divmod(token, h // size)
    if layout.grid:
        y, x = i * (h // size) + top, j * (w // size) + left
    else:
        y, x = top * size + i, left * size + j
    if layout.shifted:
        y, x = _divmod(y + size // 2, h)[1], _divmod(x + size // 2, w)[1]
    return (image * h + y) * w + x


def _token(pixel: Tensor, size: int, layout: Layout) -> Tensor:
    """Number of the token that lies on a pixel: the inverse of :func:`_pixel`."""
    _, h, w = layout.extent
    pixel, x = _divmod(pixel, w)
    image, y = _divmod(pixel, h)
    if layout.shifted:
        y, x = _divmod(y + h - size // 2, h)[1], _divmod(x + w - size // 2, w)[1]
    if layout.grid:
        (i, top), (j, left) = _divmod(y, h // size), _divmod(x, w // size)
    else:
        (top, i), (left, j) = _divmod(y, size), _divmod(x, size)
    window = (image * (h // size) + top) * (w // size) + left
    return (window * size + i) * size + j


def _divmod(x: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    quotient = x // divisor
    return quotient, x - quotient * divisor  # ONNX has no remainder of a divisor that is not known yet
