"""Cluster attention in plain PyTorch: the definition that every kernel is tested against.

A map (B, C, H, W) in channels-last memory format is a table of rows, one a token. An index brings the rows into sorted
order, with the filling and the two chunks that close the circle; what a chunk attends to is then three chunks in a row,
and the windows of all chunks are overlapping views of that one table.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.ops.autocast import without_autocast
from attnsr.ops.symbolic import larger, smaller

# Keys are divided by their norm, or by this where it is less.
KEY_EPS = 5e-5


def assign_clusters(tokens: Tensor, centres: Tensor) -> Tensor:
    """Tokens (N, d) and centres (rounds, clusters, d): the cluster of each token, (N, rounds)."""
    tokens = _at_least_float32(tokens.detach())
    centres = centres.detach().to(tokens.dtype)
    with without_autocast(tokens):
        products = tokens @ centres.flatten(0, 1).t()
    return products.view(-1, *centres.shape[:2]).argmax(-1)


def sequences(e: Tensor, centres: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """``places`` and ``restore`` of a map (B, d, H, W), as :class:`Probabilities` has them."""
    batch, count = e.shape[0], e.shape[2] * e.shape[3]
    position = torch.arange(count, device=e.device)
    clusters = assign_clusters(_rows(e), centres).view(batch, count, -1).transpose(1, 2).flatten(0, 1)
    # No two tokens have the same key, so that every sort is a stable one.
    order = (clusters * count + position).sort(-1).indices

    chunks = (count + chunk_size - 1) // chunk_size
    missing = chunks * chunk_size - count
    # Tensors, as ONNX has no remainder by a number that is known at run time only.
    length = torch.full((1,), chunks * chunk_size, device=e.device)
    repeated = torch.full((1,), larger(smaller(missing, count), 1), device=e.device)
    if torch.compiler.is_compiling():
        # Once more around the circle: the same attention, and no graph that holds for a single chunk only.
        chunks = larger(chunks, 2)
    place = (torch.arange((chunks + 2) * chunk_size, device=e.device) - chunk_size) % length
    place = torch.where(place < count, place, count - repeated + (place - count) % repeated)

    image = torch.arange(order.shape[0], device=e.device)[:, None] // centres.shape[0]
    return order.index_select(1, place) + image * count, restore(order, chunks * chunk_size)


def restore(order: Tensor, length: int) -> Tensor:
    """Of the order of the tokens of an image, (sequences, N), in sequences that are filled up to ``length``."""
    sequence, position = (torch.arange(count, device=order.device) for count in order.shape)
    return torch.empty_like(order).scatter_(1, order, position.expand_as(order)) + sequence[:, None] * length


def probabilities(e: Tensor, places: Tensor, restore: Tensor, chunk_size: int) -> tuple[Tensor, Tensor | None]:
    """``probabilities``, in float32 at least, and ``weights`` of :class:`Probabilities`."""
    queries = _at_least_float32(_in_sequence(e, places))
    keys = _windows(F.normalize(queries, dim=-1, eps=KEY_EPS), chunk_size)
    queries = queries[:, chunk_size:-chunk_size].reshape(-1, chunk_size, e.shape[1])
    with without_autocast(e):
        scores = torch.bmm(queries, keys.transpose(1, 2))
    weights = None
    rounds = restore.shape[0] // e.shape[0]
    if rounds > 1:
        log_sum_exp = scores.logsumexp(-1).flatten()[restore]
        weights = log_sum_exp.view(e.shape[0], rounds, -1, 1).softmax(1)
    if scores.requires_grad or torch.compiler.is_compiling():
        return scores.softmax(-1), weights
    return torch.softmax(scores, -1, out=scores), weights


def attend(
    v: Tensor, probabilities: Tensor, weights: Tensor | None, places: Tensor, restore: Tensor, chunk_size: int
) -> Tensor:
    """``A v`` of a map (B, C, H, W), its rounds averaged."""
    batch, channels, height, width = v.shape
    with without_autocast(v):
        y = torch.bmm(probabilities.to(v.dtype), _windows(_in_sequence(v, places), chunk_size))
    y = y.view(-1, channels).index_select(0, restore.flatten())
    if weights is not None:
        y = (y.view(batch, -1, height * width, channels) * weights).sum(1).to(v.dtype)
    return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as a table of its tokens: (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _in_sequence(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of (B, C, H, W) in the order of the sequences: (sequences, (chunks + 2) * chunk_size, C)."""
    return _rows(x).index_select(0, places.flatten()).view(*places.shape, x.shape[1])


def _windows(x: Tensor, chunk_size: int) -> Tensor:
    """What each chunk attends to: (sequences * chunks, 3 * chunk_size, C). No copy where there is one sequence."""
    return x.unfold(1, 3 * chunk_size, chunk_size).transpose(2, 3).flatten(0, 1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
