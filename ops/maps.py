"""Feature maps as kernels see them: logical NCHW in channels-last memory, a table of rows of channels, one a pixel."""

import torch
from torch import Tensor


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
