"""Attention within windows, at several window sizes at once, computed once and shared by later layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsr.ops.window_attention import reference

__all__ = ['SharedAttention', 'shared_window_attention', 'window_attention']


@dataclass(frozen=True)
class SharedAttention:
    """What a layer that computes attention leaves to the layers that reuse it.

    Attributes:
        window_sizes: Side of the windows of each run of channels, in pixels.
        shifted: Whether the windows are shifted by half their side, cyclically.
        probabilities: For each window size the softmax rows, (n, size^2, size^2) a chunk, the chunks following one
            another over the B * H/size * W/size windows in row-major order.
    """

    window_sizes: tuple[int, ...]
    shifted: bool
    probabilities: tuple[tuple[Tensor, ...], ...]


def window_attention(
    qv: Tensor, window_sizes: Sequence[int], shifted: bool = False, share: bool = False
) -> tuple[Tensor, SharedAttention | None]:
    """Group-wise multi-scale self-attention with a symmetric embedding (q is also k), no scale and no bias.

    The channels of ``qv`` are one run for each window size; in each run the first half is q, the second v. In
    windows of ``size x size`` pixels, ``y = softmax(q q^T) v``. Shifted windows are those of the map rolled by
    ``-size // 2`` along both axes, without a mask.

    Source: Zhang et al., Efficient Long-Range Attention Network for Image Super-resolution (ECCV 2022,
    arXiv 2203.06697), section 3.3, GMSA and ASA.

    Args:
        qv: (B, 2C, H, W), any floating dtype, H and W multiples of every window size; fastest in channels-last.
        window_sizes: One side in pixels for each run; their number divides C.
        shifted: Use shifted windows.
        share: Also return what :func:`shared_window_attention` needs.

    Returns:
        y: (B, C, H, W), the outputs of the runs one after the other.
        shared: A :class:`SharedAttention`, or None unless ``share``.

    Raises:
        ValueError: channels or sides do not divide as said.
    """
    _check(qv, window_sizes, 2 * len(window_sizes))
    outputs, kept = [], []
    for run, size in zip(qv.chunk(len(window_sizes), dim=1), window_sizes, strict=True):
        y, probabilities = reference.attend(run, size, size // 2 if shifted else 0, keep=share)
        outputs.append(y)
        kept.append(probabilities)
    shared = SharedAttention(tuple(window_sizes), shifted, tuple(kept)) if share else None
    return torch.cat(outputs, dim=1), shared


def shared_window_attention(v: Tensor, shared: SharedAttention) -> Tensor:
    """Apply the attention that :func:`window_attention` computed to other values: accelerated self-attention.

    Args:
        v: (B, C, H, W), one run of channels for each window size of ``shared``, the size it was computed at.
        shared: From ``window_attention(..., share=True)``.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: channels or sides do not divide as said for :func:`window_attention`.
    """
    _check(v, shared.window_sizes, len(shared.window_sizes))
    outputs = [
        reference.apply_shared(run, probabilities, size, size // 2 if shared.shifted else 0)
        for run, probabilities, size in zip(
            v.chunk(len(shared.window_sizes), dim=1), shared.probabilities, shared.window_sizes, strict=True
        )
    ]
    return torch.cat(outputs, dim=1)


def _check(x: Tensor, window_sizes: Sequence[int], parts: int) -> None:
    if x.ndim != 4 or x.shape[1] % parts:
        raise ValueError(f'expected (B, C, H, W) with C a multiple of {parts}, got {tuple(x.shape)}')
    for size in window_sizes:
        if x.shape[2] % size or x.shape[3] % size:
            raise ValueError(f'height and width must be multiples of the window size {size}, got {tuple(x.shape)}')
