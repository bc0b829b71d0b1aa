"""Attention within windows, at several window sizes at once, computed once and shared by later layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.autocast import autocast_input
from attnsr.ops.maps import check_map
from attnsr.ops.window_attention import reference
from attnsr.ops.window_attention.reference import Layout, Scores

__all__ = ['Layout', 'MapScores', 'Scores', 'SharedAttention', 'shared_window_attention', 'window_attention']

# What the kernel serves at most: the side of a window, and the channels of a query or a value.
KERNEL_SIZE, KERNEL_CHANNELS = 32, 64


@dataclass(frozen=True)
class MapScores:
    """What the kernel computes attention from again: the map as it stands, and the scores' log-sum-exp.

    Attributes:
        x: (B, C, H, W) with the queries and keys.
        tables: Relative biases of all runs one after the other, float32, or None.
        lse: Log-sum-exp of each token's scores, float32, (runs, B * H * W) in the order of the windows.
        symmetric: Whether q is also k.
        scale: Factor on ``q k^T``.
    """

    x: Tensor
    tables: Tensor | None
    lse: Tensor
    symmetric: bool
    scale: float

    def scores(self, layout: Layout) -> list[Scores]:
        """The same for the reference."""
        tables = None
        if self.tables is not None:
            tables = self.tables.split([(2 * size - 1) ** 2 for size in layout.window_sizes])
        return _cut(self.x, layout, self.symmetric, self.scale, tables)[0]


@dataclass(frozen=True)
class SharedAttention:
    """What a layer that computes attention leaves to the layers that reuse it.

    Attributes:
        layout: The windows: their sizes, how they lie, and on what map.
        attention: For each window size ``A = softmax(scale q k^T + bias)``, (n, size^2, size^2), or the scores to
            compute it from again where that is cheaper; or what the kernel computes it from again.
    """

    layout: Layout
    attention: tuple[Tensor | Scores, ...] | MapScores


def window_attention(
    x: Tensor,
    window_sizes: Sequence[int],
    shifted: bool = False,
    *,
    grid: bool = False,
    symmetric: bool = True,
    scale: float = 1.0,
    relative_bias: Sequence[Tensor] | None = None,
) -> tuple[Tensor, SharedAttention]:
    """Self-attention ``y = softmax(scale q k^T + bias) v`` with one head within windows of one or several sizes.

    The channels of ``x`` are one run for each window size. In each run the first half is q, which is also k, and the
    second v; or, where the embedding is not symmetric, the thirds are q, k and v.

    The windows are the squares that tile the map; or those of the map rolled by ``-(size // 2)`` along both axes,
    without a mask (shifted); or on a grid: token (i, j) of window (y, x) is the pixel ``(i * H/size + y, j * W/size +
    x)``. Of half precision, scores and softmax are computed in float32.

    Source: Zhang et al., Efficient Long-Range Attention Network for Image Super-resolution (ECCV 2022,
    arXiv 2203.06697), section 3.3, GMSA and ASA: symmetric, no scale, no bias. Park et al., Efficient Attention-Sharing
    Information Distillation Transformer for Lightweight Single Image Super-Resolution (AAAI 2025, arXiv 2501.15774):
    one run, q, k, v, scale, bias, windows and grid.

    Args:
        x: (B, 2C, H, W), or (B, 3C, H, W) where not symmetric, any floating dtype, H and W multiples of every window
            size; fastest in channels-last.
        window_sizes: One side in tokens for each run; their number divides C.
        shifted: Use shifted windows.
        grid: Use windows on a grid; not with ``shifted``.
        symmetric: Whether q is also k.
        scale: Factor on ``q k^T``.
        relative_bias: None, or for each run a table of ``(2 size - 1)^2`` entries: ``bias`` of a query and a key is
            its entry ``(dy + size - 1) * (2 size - 1) + (dx + size - 1)``, (dy, dx) being the position in the window
            of the query less that of the key.

    Returns:
        y: (B, C, H, W), the outputs of the runs one after the other.
        shared: What :func:`shared_window_attention` needs to attend in the same way to other values.

    Raises:
        ValueError: channels, sides or tables do not fit as said, or the windows are to be both shifted and on a grid.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernels take windows of up to
            32 x 32 tokens, and up to 64 channels in a run's queries.
    """
    parts = 2 if symmetric else 3
    _check(x, window_sizes, parts * len(window_sizes))
    if shifted and grid:
        raise ValueError('windows are either shifted or on a grid, not both')
    if relative_bias is not None:
        needed, entries = [(2 * size - 1) ** 2 for size in window_sizes], [table.numel() for table in relative_bias]
        if entries != needed:
            raise ValueError(
                'relative_bias must have a table of (2 size - 1)^2 entries for each window size: '
                f'{needed} entries, got {entries}'
            )
    layout = Layout(tuple(window_sizes), shifted, grid, _extent(x))
    x = autocast_input(x)
    if dispatch.use_triton('window_attention', x, _unsupported(window_sizes, x.shape[1] // parts)):
        from attnsr.ops.window_attention import triton_kernel

        tables = None if relative_bias is None else torch.cat([table.flatten().float() for table in relative_bias])
        y, lse = triton_kernel.window_attention(x, tables, *_arguments(layout, symmetric, scale))
        return y, SharedAttention(layout, MapScores(x, tables, lse, symmetric, scale))
    scores, values = _cut(x, layout, symmetric, scale, relative_bias)
    del x  # here and below: memory that can serve again while the windows are worked on
    rows, attention = reference.attend(scores, values)
    del scores, values
    return reference.from_windows(rows, layout), SharedAttention(layout, attention)


def shared_window_attention(v: Tensor, shared: SharedAttention) -> Tensor:
    """Attend as :func:`window_attention` did, to other values: accelerated self-attention.

    Args:
        v: (B, C, H, W), a run of channels for each window size of ``shared``; B, H and W as it was computed at.
        shared: From :func:`window_attention`.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: v does not fit the map that the attention was computed for.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernel takes up to 64 channels in a
            run, of the dtype that ``x`` had (or autocast gave it), and only attention that the kernel computed; plain
            PyTorch takes either's.
    """
    layout = shared.layout
    _check(v, layout.window_sizes, len(layout.window_sizes))
    if _extent(v) != layout.extent:
        raise ValueError(
            f'attention was computed for (B, H, W) = {layout.extent}, and v must have it too; got {tuple(v.shape)}'
        )
    v, attention = autocast_input(v), shared.attention
    if not isinstance(attention, MapScores):
        unsupported: str | None = 'the attention was computed in plain PyTorch'
    elif v.dtype != attention.x.dtype:
        unsupported = f'the attention was computed in {attention.x.dtype}, and v is {v.dtype}'
    else:
        unsupported = _unsupported(layout.window_sizes, v.shape[1])
    if dispatch.use_triton('shared_window_attention', v, unsupported):
        from attnsr.ops.window_attention import triton_kernel

        assert isinstance(attention, MapScores)
        return triton_kernel.shared_window_attention(
            v, attention.x, attention.tables, attention.lse, *_arguments(layout, attention.symmetric, attention.scale)
        )
    if isinstance(attention, MapScores):
        attention = tuple(attention.scores(layout))
    windows = reference.to_windows(v, layout)
    del v
    rows = reference.attend_shared(attention, windows)
    del windows
    return reference.from_windows(rows, layout)


def _cut(
    x: Tensor, layout: Layout, symmetric: bool, scale: float, relative_bias: Sequence[Tensor] | None
) -> tuple[list[Scores], list[Tensor]]:
    """What scores are computed from, and values, of the windows of each run."""
    scores, values = [], []
    for i, (run, size) in enumerate(zip(reference.to_windows(x, layout), layout.window_sizes, strict=True)):
        q, *k, v = run.chunk(2 if symmetric else 3, dim=-1)
        bias = None if relative_bias is None else reference.relative_bias(relative_bias[i], size)
        scores.append(Scores(q, k[0] if k else q, scale, bias))
        values.append(v)
    return scores, values


def _unsupported(window_sizes: Sequence[int], channels: int) -> str | None:
    """Why the kernel cannot serve such windows and that many channels of all queries, or of all values; or None."""
    if max(window_sizes) > KERNEL_SIZE:
        return f'it serves windows of up to {KERNEL_SIZE} x {KERNEL_SIZE} tokens, and got {list(window_sizes)}'
    if channels > KERNEL_CHANNELS * len(window_sizes):
        return f'it serves up to {KERNEL_CHANNELS} channels a head, and got {channels // len(window_sizes)}'
    return None


def _arguments(layout: Layout, symmetric: bool, scale: float) -> tuple[Sequence[int], bool, bool, bool, float]:
    return layout.window_sizes, layout.shifted, layout.grid, symmetric, scale


def _extent(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


def _check(x: Tensor, window_sizes: Sequence[int], parts: int) -> None:
    if not window_sizes or min(window_sizes) < 1:
        raise ValueError(f'window sizes must be at least 1 pixel, got {list(window_sizes)}')
    if x.ndim != 4 or x.shape[1] % parts:
        raise ValueError(f'expected (B, C, H, W) with C a multiple of {parts}, got {tuple(x.shape)}')
    check_map('the map', x)
    for size in window_sizes:
        if x.shape[2] % size or x.shape[3] % size:
            raise ValueError(f'height and width must be multiples of the window size {size}, got {tuple(x.shape)}')
