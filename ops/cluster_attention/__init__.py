"""Attention among the tokens of like clusters, wherever in the image they are, computed once and shared later."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.cluster_attention import reference
from attnsr.ops.maps import check_map

__all__ = [
    'Probabilities',
    'SharedClusterAttention',
    'SortedTokens',
    'assign_clusters',
    'cluster_attention',
    'shared_cluster_attention',
]

#: Channels of the embedding, and of the values, that the kernels take at most.
MOST_CHANNELS = 128


@dataclass(frozen=True)
class Probabilities:
    """Attention as plain PyTorch computes it.

    Attributes:
        places: (B * rounds, (chunks + 2) * chunk_size), int64: which of the B * N tokens stands where in a sequence,
            from the last chunk, which comes before the first, to the first, which comes after the last.
        restore: (B * rounds, N), int64: where in all sequences, one after the other, the result of a token is.
        probabilities: (B * rounds * chunks, chunk_size, 3 * chunk_size): softmax over the keys of the chunk before,
            the chunk itself and the chunk after, in the dtype of the values.
        weights: (B, rounds, N, 1): softmax over rounds of each token's log-sum-exp over its keys; None for one round.
    """

    places: Tensor
    restore: Tensor
    probabilities: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class SortedTokens:
    """Attention as the Triton kernels compute it: what each probability can be computed from again.

    Attributes:
        e: (B * N, d): the embedding, through which the layers that share have gradients too.
        places: (B * rounds, (chunks + 2) * chunk_size), int32: as above, the bits of those that only fill inverted.
        norms: (B * N,), float32: what divides a token as a key.
        log_sum_exp: (B * N,), float32: of a token's scores with its keys of all rounds.
        probabilities: (B * rounds * chunks, chunk_size, 3 * chunk_size), in the dtype of the values:
            exp(score - log_sum_exp), undefined for the queries that only fill; or None, where gradients are wanted, and
            all is computed again.
    """

    e: Tensor
    places: Tensor
    norms: Tensor
    log_sum_exp: Tensor
    probabilities: Tensor | None

    def for_reference(self, extent: tuple[int, int, int], chunk_size: int, dtype: torch.dtype) -> Probabilities:
        """The same as plain PyTorch computes it, for values of a dtype."""
        batch, height, width = extent
        count, rounds = height * width, self.places.shape[0] // batch
        places = torch.where(self.places < 0, ~self.places, self.places).long()
        image = torch.arange(self.places.shape[0], device=places.device)[:, None] // rounds
        order = places[:, chunk_size : chunk_size + count] - image * count
        restore = reference.restore(order, places.shape[1] - 2 * chunk_size)
        e = self.e.view(batch, height, width, -1).permute(0, 3, 1, 2)
        probabilities, weights = reference.probabilities(e, places, restore, chunk_size)
        return Probabilities(places, restore, probabilities.to(dtype), weights)


@dataclass(frozen=True)
class SharedClusterAttention:
    """What the layer that computes attention leaves to the layers that reuse it.

    Sorted by cluster, the tokens of an image are a cyclic sequence of ``chunks`` chunks, and each round of clustering
    has its own: ``B * rounds`` sequences, image after image.

    Attributes:
        extent: (B, H, W) of the map; N = H * W tokens an image, in row-major order.
        chunk_size: Tokens in a chunk.
        attention: As the backend that computed it left it.
    """

    extent: tuple[int, int, int]
    chunk_size: int
    attention: Probabilities | SortedTokens


def assign_clusters(tokens: Tensor, centres: Tensor) -> Tensor:
    """The cluster of each token: the centre with the largest inner product, the first of equals.

    Args:
        tokens: (N, d), any floating dtype, of any length (which changes nothing).
        centres: (rounds, clusters, d).

    Returns:
        (N, rounds), int64.

    Raises:
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernel takes d up to 128.
    """
    if dispatch.use_triton('assign_clusters', tokens, _unsupported(tokens)):
        from attnsr.ops.cluster_attention import triton_kernel

        return triton_kernel.assign_clusters(tokens.detach(), centres.detach())
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
        ValueError: a shape does not fit, there is no token, or ``chunk_size`` is less than 1.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernels take d and C up to 128.
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
    if 0 in extent:
        raise ValueError(f'there must be a token to attend to, got {tuple(e.shape)}')
    check_map('e', e)
    check_map('v', v)
    if dispatch.use_triton('cluster_attention', e, _unsupported(e, v), _slower(e.dtype)):
        from attnsr.ops.cluster_attention import triton_kernel

        y, rows, places, norms, lse, kept = triton_kernel.cluster_attention(e, v, centres, chunk_size)
        return y, SharedClusterAttention(extent, chunk_size, SortedTokens(rows, places, norms, lse, kept))
    with torch.no_grad():
        places, restore = reference.sequences(e, centres, chunk_size)
    probabilities, weights = reference.probabilities(e, places, restore, chunk_size)
    attention = Probabilities(places, restore, probabilities.to(v.dtype), weights)
    return _attend(v, attention, chunk_size), SharedClusterAttention(extent, chunk_size, attention)


def shared_cluster_attention(v: Tensor, shared: SharedClusterAttention) -> Tensor:
    """Attend as :func:`cluster_attention` did, to other values: LCoAN's collaborative attention.

    Args:
        v: (B, C, H, W), with B, H and W as the attention was computed at.
        shared: From :func:`cluster_attention`.

    Returns:
        (B, C, H, W), the dtype of ``v``.

    Raises:
        ValueError: v does not fit the map that the attention was computed for.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernels take C up to 128, and only
            what they computed themselves; plain PyTorch takes either.
    """
    if v.ndim != 4 or _extent(v) != shared.extent:
        raise ValueError(
            f'attention was computed for (B, H, W) = {shared.extent}, and v must have it too; got {tuple(v.shape)}'
        )
    attention, chunk_size = shared.attention, shared.chunk_size
    unsupported: str | None = 'the attention was computed in plain PyTorch'
    if isinstance(attention, SortedTokens):
        unsupported = _unsupported(v)
    if dispatch.use_triton('shared_cluster_attention', v, unsupported):
        from attnsr.ops.cluster_attention import triton_kernel

        assert isinstance(attention, SortedTokens)
        kept = attention.places, attention.norms, attention.log_sum_exp, attention.probabilities
        return triton_kernel.attend(v, attention.e, *kept, chunk_size)
    if isinstance(attention, SortedTokens):
        attention = attention.for_reference(shared.extent, chunk_size, v.dtype)
    return _attend(v, attention, chunk_size)


def _attend(v: Tensor, attention: Probabilities, chunk_size: int) -> Tensor:
    return reference.attend(
        v, attention.probabilities, attention.weights, attention.places, attention.restore, chunk_size
    )


def _unsupported(*inputs: Tensor) -> str | None:
    """Why the kernels cannot serve the inputs, or None."""
    if any(x.shape[1] > MOST_CHANNELS for x in inputs):
        return f'more than {MOST_CHANNELS} channels'
    if any(x.dtype not in dispatch.DTYPES for x in inputs):
        return 'values of another precision than the kernels compute on'
    return None


@torch.compiler.assume_constant_result
def _slower(dtype: torch.dtype) -> str | None:
    """Why plain PyTorch serves better on a GPU, or None."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != 'tf32'
    return 'plain PyTorch is faster in exact float32' if exact else None


def _extent(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]
