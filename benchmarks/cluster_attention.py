"""Cluster attention as LCoAN uses it: one layer, and all ten groups of the network with sharing and without."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.benchmarks.operations import KERNEL, REFERENCE, Case, Contestant, Tensors
from attnsr.ops.cluster_attention import cluster_attention, reference, shared_cluster_attention

CHANNELS, CLUSTERS, CHUNK_SIZE, GROUPS = 128, 128, 384, 10
WITHOUT_SHARING = ', not shared'

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_layer() -> Case:
    """The layer that computes attention."""

    def make(batch: int, height: int, width: int) -> Tensors:
        e, centres = _embedded(batch, height, width)
        return {'e': e, 'v': _map(batch, height, width), 'centres': centres}

    return Case(
        'LCoAN',
        make,
        _attend,
        fixed=('centres',),
        rivals=(Contestant('scaled_dot_product_attention', _by_sdpa),),
    )


def all_groups() -> Case:
    """The attention of all groups: shared, a single one embeds, sorts and compares the tokens."""

    def make(batch: int, height: int, width: int) -> Tensors:
        x, centres = _embedded(batch, height, width)
        # A convolution that gives its input, so that rounding cannot move a token to another cluster.
        match = torch.zeros(CHANNELS, CHANNELS, 3, 3)
        match[:, :, 1, 1] = torch.eye(CHANNELS)
        values = {f'v{i}': _map(batch, height, width) for i in range(GROUPS)}
        return {'x': x, 'match': match, 'centres': centres, **values}

    def shared_by_all(x: Tensor, match: Tensor, centres: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        first, *others = values.values()
        y, shared = cluster_attention(F.conv2d(x, match, padding=1), first, centres, CHUNK_SIZE)
        return y, *(shared_cluster_attention(v, shared) for v in others)

    def shared_by_none(x: Tensor, match: Tensor, centres: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_attend(F.conv2d(x, match, padding=1), v, centres) for v in values.values())

    def saved(seconds: Mapping[str, float]) -> list[str]:
        return [
            f'{name}: shared, the attention of all {GROUPS} groups takes '
            f'{1 - seconds[name] / seconds[name + WITHOUT_SHARING]:.0%} less time than not shared'
            for name in (KERNEL, REFERENCE)
            if name in seconds and name + WITHOUT_SHARING in seconds
        ]

    return Case(
        f'LCoAN, all {GROUPS} groups',
        make,
        shared_by_all,
        rivals=(
            Contestant(KERNEL + WITHOUT_SHARING, shared_by_none, 'triton'),
            Contestant(REFERENCE + WITHOUT_SHARING, shared_by_none),
        ),
        backward=False,
        remarks=saved,
    )


def _map(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, CHANNELS, height, width).contiguous(memory_format=torch.channels_last)


def _embedded(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, C, H, W) near centres (1, clusters, C), so that no rounding decides where one belongs."""
    centres = F.normalize(torch.randn(1, CLUSTERS, CHANNELS), dim=-1)
    nearest = torch.randint(CLUSTERS, (batch * height * width,))
    tokens = centres[0, nearest] + 0.05 * torch.randn(len(nearest), CHANNELS)
    return tokens.view(batch, height, width, CHANNELS).permute(0, 3, 1, 2), centres


def _attend(e: Tensor, v: Tensor, centres: Tensor) -> Tensor:
    return cluster_attention(e, v, centres, CHUNK_SIZE)[0]


def _by_sdpa(e: Tensor, v: Tensor, centres: Tensor) -> Tensor:
    """Sorted, filled up and gathered by the reference; of one round."""
    batch, channels, height, width = v.shape
    with torch.no_grad():
        places, restore = reference.sequences(e, centres, CHUNK_SIZE)

    def sorted_tokens(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        return rows.index_select(0, places.flatten()).view(*places.shape, -1)

    def surroundings(x: Tensor) -> Tensor:
        return x.unfold(1, 3 * CHUNK_SIZE, CHUNK_SIZE).transpose(2, 3).flatten(0, 1)[:, None]

    queries = sorted_tokens(e)
    keys = F.normalize(queries, dim=-1, eps=reference.KEY_EPS)
    queries = queries[:, CHUNK_SIZE:-CHUNK_SIZE].reshape(-1, 1, CHUNK_SIZE, e.shape[1])
    y = F.scaled_dot_product_attention(queries, surroundings(keys), surroundings(sorted_tokens(v)), scale=1.0)
    y = y.reshape(-1, channels).index_select(0, restore.flatten())
    return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


CASES = (one_layer(), all_groups())
