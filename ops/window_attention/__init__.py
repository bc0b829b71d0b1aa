"""Attention within windows, at several window sizes at once, computed once and shared by later layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnsr.ops.window_attention import reference

__all__ = ['SharedAttention', 'shared_window_attention', 'window_attention']


@dataclass(frozen=True)
class SharedAttention:
    """What a layer that computes attention leaves to the layers that reuse it.

    Windows are numbered row by row, image after image: ``n = B * H/size * W/size``.

    Attributes:
        window_sizes: Side of the windows of each run of channels, in pixels.
        shifted: Whether the windows are shifted by half their side, cyclically.
        extent: (B, H, W) of the map.
        probabilities: For each window size ``softmax(q q^T)``, (n, size^2, size^2), or None where computing it again
            is cheaper.
        queries: For each window size None, or q, (n, size^2, d), to compute the probabilities from again.
    """

    window_sizes: tuple[int, ...]
    shifted: bool
    extent: tuple[int, int, int]
    probabilities: tuple[Tensor | None, ...]
    queries: tuple[Tensor | None, ...]


def window_attention(qv: Tensor, window_sizes: Sequence[int], shifted: bool = False) -> tuple[Tensor, SharedAttention]:
    """Group-wise multi-scale self-attention with a symmetric embedding (q is also k), no scale and no bias.

    The channels of ``qv`` are one run for each window size; in each run the first half is q, the second v. In
    windows of ``size x size`` pixels, ``y = softmax(q q^T) v``. Shifted windows are those of the map rolled by
    ``-(size // 2)`` along both axes, without a mask.

    Source: Zhang et al., Efficient Long-Range Attention Network for Image Super-resolution (ECCV 2022,
    arXiv 2203.06697), section 3.3, GMSA and ASA.

    Args:
        qv: (B, 2C, H, W), any floating dtype, H and W multiples of every window size; fastest in channels-last.
        window_sizes: One side in pixels for each run; their number divides C.
        shifted: Use shifted windows.

    Returns:
        y: (B, C, H, W), the outputs of the runs one after the other.
        shared: What :func:`shared_window_attention` needs to attend in the same way to other values.

    Raises:
        ValueError: channels or sides do not divide as said.
    """
    _check(qv, window_sizes, 2 * len(window_sizes))
    extent, windows = _extent(qv), reference.to_windows(qv, window_sizes, shifted)
    del qv  # here and below: memory that can serve again while the windows are worked on
    values, probabilities, queries = [], [], []
    for run in windows:
        q, v = run.chunk(2, dim=-1)
        keep = reference.keeps_probabilities(q)
        values.append(v)
        probabilities.append(reference.probabilities(q) if keep else None)
        queries.append(None if keep else q.contiguous())
    shared = SharedAttention(tuple(window_sizes), shifted, extent, tuple(probabilities), tuple(queries))
    rows = reference.attend_runs(shared.queries, shared.probabilities, values)
    del windows, run, q, v, values
    return reference.from_windows(rows, window_sizes, shifted, extent), shared


def shared_window_attention(v: Tensor, shared: SharedAttention) -> Tensor:
    """Attend as :func:`window_attention` did, to other values: accelerated self-attention.

    Args:
        v: (B, C, H, W), a run of channels for each window size of ``shared``; B, H and W as it was computed at.
        shared: From :func:`window_attention`.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: v does not fit the map that the attention was computed for.
    """
    _check(v, shared.window_sizes, len(shared.window_sizes))
    if _extent(v) != shared.extent:
        raise ValueError(
            f'attention was computed for (B, H, W) = {shared.extent}, and v must have it too; got {tuple(v.shape)}'
        )
    windows = reference.to_windows(v, shared.window_sizes, shared.shifted)
    del v
    rows = reference.attend_runs(shared.queries, shared.probabilities, windows)
    del windows
    return reference.from_windows(rows, shared.window_sizes, shared.shifted, shared.extent)


def _extent(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


def _check(x: Tensor, window_sizes: Sequence[int], parts: int) -> None:
    if not window_sizes or min(window_sizes) < 1:
        raise ValueError(f'window sizes must be at least 1 pixel, got {list(window_sizes)}')
    if x.ndim != 4 or x.shape[1] % parts:
        raise ValueError(f'expected (B, C, H, W) with C a multiple of {parts}, got {tuple(x.shape)}')
    for size in window_sizes:
        if x.shape[2] % size or x.shape[3] % size:
            raise ValueError(f'height and width must be multiples of the window size {size}, got {tuple(x.shape)}')
