"""Window attention in plain PyTorch: the definition that every kernel is tested against.

Maps are (B, C, H, W), in channels-last memory format inside the networks, so that a pixel's channels lie together
and cutting windows is one copy of whole rows. A *run* is the share of the channels that one window size works on.
"""

import torch
from torch import Tensor

# Without autograd the probabilities are computed this many at a time: what stays in a core's cache.
CHUNK_ELEMENTS = 2**20


def to_windows(x: Tensor, size: int, shift: int) -> Tensor:
    """(B, C, H, W) -> (B * H/size * W/size, size * size, C), tokens in row-major order; the map rolled by -shift."""
    if shift:
        x = x.roll((-shift, -shift), (2, 3))
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h // size, size, w // size, size, c)
    return x.transpose(2, 3).reshape(-1, size * size, c)


def from_windows(windows: Tensor, size: int, shift: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`to_windows`, for a map of ``shape`` (B, H, W)."""
    b, h, w = shape
    x = windows.view(b, h // size, w // size, size, size, -1).transpose(2, 3).reshape(b, h, w, -1).permute(0, 3, 1, 2)
    return x.roll((shift, shift), (2, 3)) if shift else x


def attend(qv: Tensor, size: int, shift: int, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``softmax(q q^T) v`` in every window of one run, q and v being the halves of its channels.

    Returns the map, and the probabilities (n, size^2, size^2) in chunks of windows if ``keep``.
    """
    windows = to_windows(qv, size, shift)
    outputs, kept = [], []
    for chunk in windows.split(_chunk_length(windows)):
        q, v = chunk.chunk(2, dim=-1)
        scores = torch.bmm(q, q.transpose(1, 2))
        probabilities = scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)
        outputs.append(torch.bmm(probabilities, v))
        if keep:
            kept.append(probabilities)
    return from_windows(torch.cat(outputs), size, shift, _extent(qv)), tuple(kept)


def apply_shared(v: Tensor, probabilities: tuple[Tensor, ...], size: int, shift: int) -> Tensor:
    """``A v`` in every window of one run, with the probabilities that :func:`attend` kept."""
    windows = to_windows(v, size, shift).split([len(chunk) for chunk in probabilities])
    y = torch.cat([torch.bmm(a, chunk) for a, chunk in zip(probabilities, windows, strict=True)])
    return from_windows(y, size, shift, _extent(v))


def _chunk_length(windows: Tensor) -> int:
    if windows.requires_grad or torch.compiler.is_compiling():
        return len(windows)  # autograd keeps everything anyway, and a compiler does its own blocking
    return max(1, CHUNK_ELEMENTS // windows.shape[1] ** 2)


def _extent(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]
