"""Attention among the tokens of like clusters, wherever in the image they are, computed once and shared later."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsr.ops.cluster_attention import reference

__all__ = ['SharedClusterAttention', 'assign_clusters', 'cluster_attention', 'shared_cluster_attention']


@dataclass(frozen=True)
class SharedClusterAttention:
    """What the layer that computes attention leaves to the layers that reuse it.

    Sorted by cluster, the tokens of an image are a cyclic sequence of ``chunks`` chunks, and each round of clustering
    has its own: ``B * rounds`` sequences, image after image.

    Attributes:
        extent: (B, H, W) of the map; N = H * W tokens an image, in row-major order.
        chunk_size: Tokens in a chunk.
        places: (B * rounds, (chunks + 2) * chunk_size), int64: which of the B * N tokens stands where in a sequence,
            from the last chunk, which comes before the first, to the first, which comes after the last.
        restore: (B * rounds, N), int64: where in all sequences, one after the other, the result of a token is.
        probabilities: (B * rounds * chunks, chunk_size, 3 * chunk_size): softmax over the keys of the chunk before,
            the chunk itself and the chunk after, in the dtype of the values.
        weights: (B, rounds, N, 1): softmax over rounds of each token's log-sum-exp over its keys; None for one round.
    """

    extent: tuple[int, int, int]
    chunk_size: int
    places: Tensor
    restore: Tensor
    probabilities: Tensor
    weights: Tensor | None


def assign_clusters(tokens: Tensor, centres: Tensor) -> Tensor:
    """The cluster of each token: the centre with the largest inner product, the first of equals.

    Args:
        tokens: (N, d), any floating dtype, of any length (which changes nothing).
        centres: (rounds, clusters, d).

    Returns:
        (N, rounds), int64.
    """
    return reference.assign_clusters(tokens, centres)


def cluster_attention(e: Tensor, v: Tensor, centres: Tensor, chunk_size: int) -> tuple[Tensor, SharedClusterAttention]:
    """Sparse attention by spherical clustering: LCoAN's learnable sparse pattern.

    A token belongs to the cluster whose centre has the largest inner product with it, the first of equals. The tokens
    of each image are sorted by cluster, stably, and cut into chunks; the last chunk is filled up by repeating as many
    tokens from the end of the sequence as it lacks, or, where the sequence has fewer, by repeating all of it. Queries
    are ``e``, keys ``e / max(|e|, 5e-5)``. A chunk attends to itself, the chunk before and the chunk after,
    cyclically (of two chunks the other one counts twice, a single chunk counts three times):
    ``y = softmax(q k^T) v``, without a scale. Several rounds, each with its own centres, are averaged for each token
    with the softmax over rounds of its log-sum-exp.

    Gradients flow to ``e`` and ``v``; which cluster a token belongs to has none. Norms, products and softmax of
    float16 and bfloat16 are computed in float32.

    Source: Zhao et al., Efficient Learnable Collaborative Attention for Single Image Super-Resolution (2024,
    arXiv 2404.04922), learnable sparse pattern (LSP) and, for the sharing, collaborative attention (CoA).

    Args:
        e: Embedding that is query and key, (B, d, H, W), any floating dtype; fastest in channels-last.
        v: Values, (B, C, H, W).
        centres: (rounds, clusters, d).
        chunk_size: Tokens in a chunk, at least 1.

    Returns:
        y: (B, C, H, W), the dtype of ``v``.
        shared: What :func:`shared_cluster_attention` needs to attend in the same way to other values.

    Raises:
        ValueError: a shape does not fit, or ``chunk_size`` is less than 1.
    """
    if e.ndim != 4 or v.ndim != 4 or _extent(e) != _extent(v):
        raise ValueError(
            f'expected e (B, d, H, W) and v (B, C, H, W) of one extent, got {tuple(e.shape)} and {tuple(v.shape)}'
        )
    if centres.ndim != 3 or centres.shape[2] != e.shape[1] or not centres.shape[0] or not centres.shape[1]:
        raise ValueError(f'centres must be (rounds, clusters, {e.shape[1]}), got {tuple(centres.shape)}')
    if chunk_size < 1:
        raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
    extent = _extent(e)
    with torch.no_grad():
        places, restore = reference.sequences(e, centres, chunk_size)
    probabilities, weights = reference.probabilities(e, places, restore, chunk_size)
    probabilities = probabilities.to(v.dtype)
    shared = SharedClusterAttention(extent, chunk_size, places, restore, probabilities, weights)
    return shared_cluster_attention(v, shared), shared


def shared_cluster_attention(v: Tensor, shared: SharedClusterAttention) -> Tensor:
    """Attend as :func:`cluster_attention` did, to other values: LCoAN's collaborative attention.

    Args:
        v: (B, C, H, W), with B, H and W as the attention was computed at.
        shared: From :func:`cluster_attention`.

    Returns:
        (B, C, H, W), the dtype of ``v``.

    Raises:
        ValueError: v does not fit the map that the attention was computed for.
    """
    if v.ndim != 4 or _extent(v) != shared.extent:
        raise ValueError(
            f'attention was computed for (B, H, W) = {shared.extent}, and v must have it too; got {tuple(v.shape)}'
        )
    return reference.attend(v, shared.probabilities, shared.weights, shared.places, shared.restore, shared.chunk_size)


def _extent(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]
