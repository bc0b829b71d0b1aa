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


def attend(q: Tensor | None, kept: Tensor | None, v: Tensor, out: Tensor | None) -> Tensor:
    """``softmax(q q^T) v`` of windows (n, tokens, d), from q or from the probabilities where they were kept."""
    if kept is not None:
        return torch.bmm(kept, v, out=out)
    assert q is not None
    assert out is not None
    length = max(1, CHUNK_ELEMENTS // q.shape[1] ** 2)
    for chunk_q, chunk_v, chunk_out in zip(q.split(length), v.split(length), out.split(length), strict=True):
        torch.bmm(probabilities(chunk_q), chunk_v, out=chunk_out)
    return out


def attend_runs(queries: Sequence[Tensor | None], kept: Sequence[Tensor | None], values: Sequence[Tensor]) -> Tensor:
    """:func:`attend` for every run: the rows (runs * B * H * W, d) of the windows, run after run."""
    if _whole(values[0]) or any(a is not None and a.requires_grad for a in kept):
        runs = [attend(*run, out=None) for run in zip(queries, kept, values, strict=True)]
        return torch.cat([run.flatten(0, 1) for run in runs])
    d = values[0].shape[2]
    rows = values[0].new_empty(sum(v.shape[0] * v.shape[1] for v in values), d)
    for q, a, v, out in zip(queries, kept, values, rows.chunk(len(values)), strict=True):
        attend(q, a, v, out.view(v.shape))
    return rows


def to_windows(x: Tensor, window_sizes: Sequence[int], shifted: bool) -> list[Tensor]:
    """Cut every run of (B, C, H, W) into windows: one (B * H/size * W/size, size * size, C / runs) for each size."""
    b, c, h, w = x.shape
    runs = len(window_sizes)
    rows = x.permute(0, 2, 3, 1).reshape(-1, c // runs)
    windows = _Permute.apply(rows, *_permutations(b, h, w, tuple(window_sizes), shifted, x.device)).chunk(runs)
    return [run.view(-1, size * size, c // runs) for run, size in zip(windows, window_sizes, strict=True)]


def from_windows(rows: Tensor, window_sizes: Sequence[int], shifted: bool, extent: torch.Size) -> Tensor:
    """The inverse of :func:`to_windows` from the windows' rows, for a map (B, *, H, W) in channels-last format."""
    b, _, h, w = extent
    there, back = _permutations(b, h, w, tuple(window_sizes), shifted, rows.device)
    return _Permute.apply(rows, back, there).view(b, h, w, -1).permute(0, 3, 1, 2)


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


@lru_cache(maxsize=8)
def _permutations(
    b: int, h: int, w: int, window_sizes: tuple[int, ...], shifted: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which row of the map stands where in the windows, run after run; and the inverse. Both (B * H * W * runs,)."""
    runs = len(window_sizes)
    pieces = []
    with torch.inference_mode(False):  # so that a cached index serves training after inference
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


def _whole(x: Tensor) -> bool:
    """Whether all windows are worked on at once: autograd keeps everything, and a compiler does its own blocking."""
    return x.requires_grad or torch.compiler.is_compiling()
