"""LCoAN in plain eager PyTorch, step by step as published: what ``archs/lcoan_arch.py`` is measured against.

The same mathematics and parameters, with what makes it slower: feature maps in channels-first memory, the match
convolutions of the groups that reuse the attention, computed and not used, and tokens that are sorted, filled up,
concatenated with their neighbours and put back by copies.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsr.archs.lcoan_arch import FirstGroup, LCoAN


class PublishedLCoAN(LCoAN):
    """LCoAN without any care for speed, of at least half a chunk of tokens.

    Args:
        **arguments: As of :class:`attnsr.archs.lcoan_arch.LCoAN`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        pattern = cast(FirstGroup, self.body[0]).pattern
        self.chunk_size = pattern.chunk_size
        self.unused_match = nn.ModuleList(copy.deepcopy(pattern.conv_match) for _ in self.body[1:])

    def reconstruct(self, x: Tensor) -> Tensor:
        x = features = self.head(x.contiguous())
        groups: Any = self.body
        for i, group in enumerate(groups):
            y = x
            for block in group.local_body:
                conv, _, last = block.body
                y = y + last(F.relu(conv(y)))
            attention = group.attention[0]
            if i == 0:
                e = attention.conv_match(y)
                order, probabilities, weights = self._pattern(e, attention.kmeans(e))
            else:
                self.unused_match[i - 1](y)
            v = self._neighbourhoods(self._chunks(attention.conv_assembly(y), order))
            attended = torch.einsum('brnij,brnjc->brnic', probabilities, v).flatten(2, 3)[:, :, : order.shape[2]]
            back = torch.zeros_like(attended).scatter(2, order[..., None].expand_as(attended), attended)
            y = (back * weights).sum(1).transpose(1, 2).reshape_as(y) * attention.scale + y
            x = group.m_conv(y) * group.scale + x
        return self.tail(self.m_conv(x) + features)

    def _pattern(self, e: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The order of the tokens (B, rounds, N), the attention (B, rounds, chunks, i, j), the rounds' weights."""
        tokens = F.normalize(e.flatten(2).transpose(1, 2), dim=-1)
        order = torch.einsum('bnd,rkd->brnk', tokens, centres).argmax(-1).argsort(dim=-1, stable=True)
        queries = self._chunks(e, order)
        keys = self._neighbourhoods(F.normalize(queries, dim=-1, eps=5e-5))
        scores = torch.einsum('brnid,brnjd->brnij', queries, keys)
        log_sum_exp = scores.logsumexp(-1, keepdim=True)
        probabilities = (scores - log_sum_exp).exp()
        sorted_lse = log_sum_exp.flatten(2, 3)[:, :, : order.shape[2]]
        weights = torch.zeros_like(sorted_lse).scatter(2, order[..., None], sorted_lse).softmax(1)
        return order, probabilities, weights

    def _chunks(self, x: Tensor, order: Tensor) -> Tensor:
        """(B, C, H, W) sorted, filled up and cut: (B, rounds, chunks, chunk_size, C)."""
        tokens = x.flatten(2).transpose(1, 2)[:, None].expand(-1, order.shape[1], -1, -1)
        tokens = tokens.gather(2, order[..., None].expand(-1, -1, -1, x.shape[1]))
        missing = -order.shape[2] % self.chunk_size
        if missing:
            tokens = torch.cat((tokens, tokens[:, :, -missing:]), 2)
        return tokens.unflatten(2, (-1, self.chunk_size))

    @staticmethod
    def _neighbourhoods(chunks: Tensor) -> Tensor:
        """Each chunk with the one before and the one after: (B, rounds, chunks, 3 * chunk_size, C)."""
        return torch.cat((chunks, chunks.roll(1, 2), chunks.roll(-1, 2)), 3)
