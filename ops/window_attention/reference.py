"""Window attention in plain PyTorch: the definition that every kernel is tested against.

A map (B, C, H, W) in channels-last memory format is a table of rows: one for each pixel and run, a *run* being the
share of the channels that one window size works on. Cutting windows, of a rolled map too, is then a permutation of
rows, and putting them back is the inverse permutation: one pass over memory each.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Without autograd the probabilities are computed this many at a time: what stays in a processor's cache.
CHUNK_ELEMENTS = 2**20

# Without autograd, windows of more tokens than this do not keep their probabilities for later layers: computing
# them again in cache takes no longer on a CPU than fetching them from memory, and memory is what they would fill.
KEPT_TOKENS = 64


def probabilities(q: Tensor) -> Tensor:
    """``softmax(q q^T)`` of windows (n, tokens, d): (n, tokens, tokens)."""
    scores = torch.bmm(q, q.transpose(1, 2))
    return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)


def keeps_probabilities(q: Tensor) -> bool:
    """Whether later layers are left the probabilities of these windows, or else q to compute them from again."""
    return _whole(q) or q.shape[1] <= KEPT_TOKENS


def attend(q: Tensor, v: Tensor, out: Tensor) -> None:
    """``softmax(q q^T) v`` of windows (n, tokens, d) into ``out``, a few windows at a time; not for autograd."""
    length = max(1, CHUNK_ELEMENTS // q.shape[1] ** 2)
    for chunk_q, chunk_v, chunk_out in zip(q.split(length), v.split(length), out.split(length), strict=True):
        torch.bmm(probabilities(chunk_q), chunk_v, out=chunk_out)


def attend_runs(queries: Sequence[Tensor | None], kept: Sequence[Tensor | None], values: Sequence[Tensor]) -> Tensor:
    """``A v`` for every run, with A kept or from q: the rows (runs * B * H * W, d) of the windows, run after run."""
    if any(_whole(x) for x in (*queries, *kept, *values) if x is not None):
        kept = [probabilities(q) if a is None and q is not None else a for q, a in zip(queries, kept, strict=True)]
        return torch.cat([torch.bmm(a, v).flatten(0, 1) for a, v in zip(kept, values, strict=True) if a is not None])
    rows = values[0].new_empty(sum(v.shape[0] * v.shape[1] for v in values), values[0].shape[2])
    for q, a, v, part in zip(queries, kept, values, rows.chunk(len(values)), strict=True):
        if a is not None:
            torch.bmm(a, v, out=part.view(v.shape))
        elif q is not None:
            attend(q, v, part.view(v.shape))
    return rows


def to_windows(x: Tensor, window_sizes: Sequence[int], shifted: bool) -> list[Tensor]:
    """Cut every run of (B, C, H, W) into windows: one (B * H/size * W/size, size * size, C / runs) for each size."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))  # products into prepared memory are out of autocast's reach
    b, c, h, w = x.shape
    runs = len(window_sizes)
    rows = x.permute(0, 2, 3, 1).reshape(-1, c // runs)
    windows = _Permute.apply(rows, *_permutations((b, h, w), tuple(window_sizes), shifted, x.device)).chunk(runs)
    return [run.view(-1, size * size, c // runs) for run, size in zip(windows, window_sizes, strict=True)]


def from_windows(rows: Tensor, window_sizes: Sequence[int], shifted: bool, extent: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`to_windows` from the windows' rows, for a map of (B, H, W) in channels-last format."""
    there, back = _permutations(extent, tuple(window_sizes), shifted, rows.device)
    return _Permute.apply(rows, back, there).view(*extent, -1).permute(0, 3, 1, 2)


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


def _permutations(
    extent: tuple[int, int, int], window_sizes: tuple[int, ...], shifted: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which row of the map stands where in the windows, run after run; and the inverse. Both (B * H * W * runs,)."""
    if torch.compiler.is_compiling():  # what a compiler passes through here are no real tensors to keep
        return _make_permutations(extent, window_sizes, shifted, device)
    return _cached_permutations(extent, window_sizes, shifted, device)


def _make_permutations(
    extent: tuple[int, int, int], window_sizes: tuple[int, ...], shifted: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    b, h, w = extent
    runs = len(window_sizes)
    pieces = []
    for run, size in enumerate(window_sizes):
        pixel = torch.arange(b * h * w, device=device).view(b, h, w)
        if shifted:
            pixel = pixel.roll((-(size // 2), -(size // 2)), (1, 2))
        pixel = pixel.view(b, h // size, size, w // size, size).transpose(2, 3)
        pieces.append(pixel.flatten() * runs + run)
    there = torch.cat(pieces)
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there), device=device)
    return there, back


@lru_cache(maxsize=4)
def _cached_permutations(*key: Any) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # so that an index made at inference serves training afterwards
        return _make_permutations(*key)


def _whole(x: Tensor) -> bool:
    """Whether all windows are worked on at once: autograd keeps everything, and a compiler does its own blocking."""
    return x.requires_grad or torch.compiler.is_compiling()
