"""Feature maps as kernels see them: logical NCHW in channels-last memory, a table of rows of channels, one a pixel."""

import torch
from torch import Tensor

from attnsr.ops.autocast import autocasts


def check_map(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError where a map has no elements, where its dtype is not floating, and where others have another one.

    Autocast makes them one.
    """
    if not x.is_floating_point():
        raise ValueError(f'{name} must be of a floating dtype; got {x.dtype}')
    if 0 in x.shape:
        raise ValueError(f'{name} must have elements; got the shape {tuple(x.shape)}')
    dtypes = [other.dtype for other in others if other is not None]
    if not autocasts(x) and any(dtype != x.dtype for dtype in dtypes):
        raise ValueError(f'{name} and what it is computed with must be of one dtype; got {x.dtype} and {dtypes}')


def new_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of a map's batch and extent, its elements in the order of (B, H, W, C)."""
    b, _, h, w = like.shape
    return like.new_empty((b, h, w, channels), dtype=dtype or like.dtype).permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """The map with its elements in the order of (B, H, W, C)."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_in_place(x: Tensor) -> tuple[Tensor, int]:
    """The map with its rows one after the other, and the elements from one to the next.

    As it stands if it can be, which slices of a larger map's channels can.
    """
    b, c, h, w = x.shape
    stride = next((step for step, count in ((x.stride(3), w), (x.stride(2), h), (x.stride(0), b)) if count > 1), c)
    expected = (h * w * stride, 1, w * stride, stride)
    if stride >= c and all(n == 1 or s == e for n, s, e in zip(x.shape, x.stride(), expected, strict=True)):
        return x, stride
    return rows(x), c
