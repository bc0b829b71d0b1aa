"""LCoAN: Learnable Collaborative Attention Network (Zhao et al., 2024, arXiv 2404.04922)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import count
from attnsr.errors import UsageError
from attnsr.ops.cluster_attention import (
    SharedClusterAttention,
    assign_clusters,
    cluster_attention,
    shared_cluster_attention,
)

# Of assign, sum and normalise, from which the first centres come.
INITIAL_ITERATIONS = 10


class UninitializedError(UsageError, RuntimeError):
    """Inference of a network whose cluster centres have not met a batch of training."""

    def __init__(self) -> None:
        super().__init__('these cluster centres were never initialised: load a checkpoint or train first')


class SphericalKMeans(nn.Module):
    """The centres of spherical k-means, which follow the tokens that are met in training.

    ``forward`` takes the embedding of a batch, (B, d, H, W), and returns the centres to use for it, (rounds, clusters,
    d). In training they move afterwards, so that the next batch meets others: each becomes ``unit(decay * centre +
    (1 - decay) * m)``, with ``m`` the unit vector along the sum of its cluster's unit tokens; one without tokens
    stays. The first batch of training makes them: random tokens, and ten iterations of assigning all tokens (as they
    are, not their unit vectors), summing and normalising. Both run over the tokens of all processes of the default
    process group, which must all train. In evaluation nothing changes the centres. (They want float32, as autocast
    leaves them: in half precision a step of 0.001 is lost.)

    Args:
        channels: d.
        num_clusters: Centres in a round.
        num_rounds: Rounds, each with its own centres.
        decay: In [0, 1]; 1 leaves the centres as the first batch made them.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, channels: int, num_clusters: int, num_rounds: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer('means', torch.zeros(num_rounds, num_clusters, channels))
        self.register_buffer('initted', torch.tensor(False))
        # What is known of ``initted``, whose value a compiler does not have, and a GPU not at once.
        self._known_as_initialized = False

    def forward(self, e: Tensor) -> Tensor:
        if not self.training:
            if not self._known_as_initialized:
                if torch.compiler.is_exporting():  # which does not see the value of a buffer
                    raise UninitializedError
                self._require_centres()
            return self.means
        with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
            tokens = e.permute(0, 2, 3, 1).reshape(-1, e.shape[1])
            tokens = tokens.to(torch.promote_types(e.dtype, torch.float32))
            if not self._known_as_initialized:
                self._initialize(tokens)
            centres = self.means.clone()
            if self.decay < 1:
                self._move(tokens, centres)
        return centres

    @torch.compiler.disable(reason='cluster centres are looked at eagerly: load or train them before compiling')
    def _require_centres(self) -> None:
        if not self._is_initialized():
            raise UninitializedError

    def _is_initialized(self) -> bool:
        """Whether there are centres to use; taken to be so on the meta device, where nothing has a value."""
        if self.initted.is_meta:
            return True
        if not self._known_as_initialized:
            self._known_as_initialized = bool(self.initted)
        return self._known_as_initialized

    @torch.compiler.disable(reason='cluster centres are initialised eagerly: train on a batch before compiling')
    def _initialize(self, tokens: Tensor) -> None:
        if self._is_initialized():
            return
        centres = self._random_tokens(tokens)
        for _ in range(INITIAL_ITERATIONS):
            sums, sizes = self._sums(tokens, centres)
            centres = torch.where(sizes > 0, F.normalize(sums, dim=-1), centres)
        self.means.copy_(centres)
        self.initted.fill_(True)
        self._known_as_initialized = True

    def _random_tokens(self, tokens: Tensor) -> Tensor:
        """A token of any process for each centre, the same ones on every process: (rounds, clusters, d)."""
        rounds, clusters, _ = self.means.shape
        rank, processes = (dist.get_rank(), dist.get_world_size()) if _is_parallel() else (0, 1)
        counts = torch.zeros(processes, dtype=torch.int64, device=tokens.device)
        counts[rank] = len(tokens)
        counts = _sum_over_processes(counts)
        total = int(counts.sum())
        if total < clusters:
            chosen = torch.randint(total, (rounds, clusters), device=tokens.device)
        else:
            chosen = torch.stack([torch.randperm(total, device=tokens.device)[:clusters] for _ in range(rounds)])
        if _is_parallel():
            dist.broadcast(chosen, 0)
        chosen = chosen - counts[:rank].sum()
        own = (chosen >= 0) & (chosen < len(tokens))
        return _sum_over_processes(tokens[chosen.clamp(0, len(tokens) - 1)] * own[:, :, None])

    def _move(self, tokens: Tensor, centres: Tensor) -> None:
        sums, sizes = self._sums(F.normalize(tokens, dim=-1), centres)
        moved = self.decay * centres.to(sums.dtype) + (1 - self.decay) * F.normalize(sums, dim=-1)
        self.means.copy_(torch.where(sizes > 0, F.normalize(moved, dim=-1), centres))

    @staticmethod
    def _sums(tokens: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens (N, d) of each cluster, all processes': the sum (rounds, clusters, d), the number (..., 1)."""
        # A product, as scattered sums are not deterministic on a GPU; the last column counts.
        clusters = assign_clusters(tokens, centres).t()[:, None]
        members = clusters == torch.arange(centres.shape[1], device=tokens.device)[:, None]
        sums = members.to(tokens.dtype) @ F.pad(tokens, (0, 1), value=1.0)
        sums = _sum_over_processes(sums)
        return sums[..., :-1], sums[..., -1:]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._known_as_initialized = False
        self._is_initialized()


def _is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(x: Tensor) -> Tensor:
    if _is_parallel():
        dist.all_reduce(x)
    return x


class CollaborativeAttention(nn.Module):
    """Attention as the first group computed it, to this group's values, with the residual (CoA).

    Args:
        channels: Of the features.
        scale: On what the attention gives.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv_assembly = nn.Sequential(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, shared: SharedClusterAttention) -> Tensor:
        return torch.add(x, shared_cluster_attention(self.conv_assembly(x), shared), alpha=self.scale)


class LearnableSparsePattern(nn.Module):
    """Attention among the tokens of like clusters, with the residual (LSP).

    ``conv_match`` embeds the features for ``kmeans``, whose centres ``forward`` takes beside them: what moves the
    centres must not be computed again with the rest of the group.

    Args:
        channels: Of the features.
        embedded: Channels of the embedding.
        chunk_size: See ``ops/cluster_attention``.
        scale: On what the attention gives.
        kmeans: Has the centres of the clusters.
    """

    def __init__(self, channels: int, embedded: int, chunk_size: int, scale: float, kmeans: SphericalKMeans) -> None:
        super().__init__()
        self.chunk_size, self.scale, self.kmeans = chunk_size, scale, kmeans
        self.conv_match = nn.Sequential(nn.Conv2d(channels, embedded, 3, padding=1))
        self.conv_assembly = nn.Sequential(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, e: Tensor, centres: Tensor) -> tuple[Tensor, SharedClusterAttention]:
        y, shared = cluster_attention(e, self.conv_assembly(x), centres, self.chunk_size)
        return torch.add(x, y, alpha=self.scale), shared


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU between, and the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(x)


class ResidualGroup(nn.Module):
    """Residual blocks, attention, a convolution, and the residual."""

    def __init__(self, channels: int, num_blocks: int, attention: nn.Module, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.local_body = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))
        self.attention = nn.Sequential(attention)
        self.m_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, shared: SharedClusterAttention) -> Tensor:
        return self._close(x, self.attention[0](self.local_body(x), shared))

    def _close(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, self.m_conv(y), alpha=self.scale)


class FirstGroup(ResidualGroup):
    """The group that computes the attention, from what ``local_body``, ``conv_match`` and ``kmeans`` have given."""

    @property
    def pattern(self) -> LearnableSparsePattern:
        return cast(LearnableSparsePattern, self.attention[0])

    def forward(  # type: ignore[override]
        self, x: Tensor, local: Tensor, e: Tensor, centres: Tensor
    ) -> tuple[Tensor, SharedClusterAttention]:
        y, shared = self.pattern(local, e, centres)
        return self._close(x, y), shared


@ARCH_REGISTRY.register()
class LCoAN(SRNetwork):
    """LCoAN for super-resolution of RGB images.

    Zhao et al., Efficient Learnable Collaborative Attention for Single Image Super-Resolution (2024,
    arXiv 2404.04922). The defaults are the published network.

    ``forward`` takes (B, 3, H, W), RGB in [0, 1], any H, W >= 1, and returns (B, 3, upscale * H, upscale * W) in
    the same range (not clipped). In training it initialises the cluster centres from the first batch, and moves them
    with every batch (in the released code they stay; ``ema_decay=1``).

    Args:
        upscale: Scale factor: 3, or a power of 2.
        num_feat: Channels.
        num_groups: Residual groups, of which the first computes the attention that all others share.
        num_blocks: Residual blocks in a group.
        num_clusters: Clusters that tokens are sorted by.
        chunk_size: Tokens that attend together, to themselves and to the chunks before and after.
        num_rounds: Rounds of clustering, whose results are averaged.
        reduction: ``num_feat`` over the channels of the embedding that is clustered and compared.
        attention_scale: On what attention gives, before the residual.
        res_scale: On what a group gives, before the residual.
        ema_decay: What the cluster centres keep of themselves in a step of training, in [0, 1].
        use_checkpoint: Gradient checkpointing of each group.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
        RuntimeError: in ``forward`` in eval mode, where there were neither a checkpoint nor training.
    """

    unused_names = (
        'a',
        r'(sub|add)_mean\.(weight|bias)',
        r'body\.[1-9]\d*\.attention\.0\.(kmeans\.(means|initted)|conv_match\.0\.(weight|bias))',
    )
    bytes_per_channel = 190
    upsampler = 'tail.0.'
    untold = ('chunk_size', 'attention_scale', 'res_scale')

    def __init__(
        self,
        *,
        upscale: int,
        num_feat: int = 128,
        num_groups: int = 10,
        num_blocks: int = 4,
        num_clusters: int = 128,
        chunk_size: int = 384,
        num_rounds: int = 1,
        reduction: int = 1,
        attention_scale: float = 0.1,
        res_scale: float = 0.1,
        ema_decay: float = 0.999,
        use_checkpoint: bool = False,
    ) -> None:
        at_least_one = {
            'num_feat': num_feat,
            'num_groups': num_groups,
            'num_blocks': num_blocks,
            'num_clusters': num_clusters,
            'chunk_size': chunk_size,
            'num_rounds': num_rounds,
            'reduction': reduction,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if upscale != 3 and (upscale < 1 or upscale & (upscale - 1)):
            raise ValueError(f'upscale must be 3 or a power of 2 (1, 2, 4, 8, ...), got {upscale}')
        if num_feat % reduction:
            raise ValueError(f'reduction must divide num_feat = {num_feat}, got {reduction}')
        if not 0 <= ema_decay <= 1:
            raise ValueError(f'ema_decay must be in [0, 1], got {ema_decay}')
        super().__init__(upscale, use_checkpoint=use_checkpoint)
        embedded = num_feat // reduction
        kmeans = SphericalKMeans(embedded, num_clusters, num_rounds, ema_decay)
        pattern = LearnableSparsePattern(num_feat, embedded, chunk_size, attention_scale, kmeans)
        self.head = nn.Sequential(nn.Conv2d(3, num_feat, 3, padding=1))
        self.body = nn.Sequential(
            FirstGroup(num_feat, num_blocks, pattern, res_scale),
            *(
                ResidualGroup(num_feat, num_blocks, CollaborativeAttention(num_feat, attention_scale), res_scale)
                for _ in range(num_groups - 1)
            ),
        )
        self.m_conv = nn.Sequential(nn.Conv2d(num_feat, num_feat, 3, padding=1))
        factors = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
        shuffles = (
            layer
            for factor in factors
            for layer in (nn.Conv2d(num_feat, num_feat * factor**2, 3, padding=1), nn.PixelShuffle(factor))
        )
        self.tail = nn.Sequential(nn.Sequential(*shuffles), nn.Conv2d(num_feat, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.super_resolve(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        features = self.head(x)
        first = cast(FirstGroup, self.body[0])
        local = self.run(first.local_body, features)
        e = first.pattern.conv_match(local)
        y, shared = self.run(first, features, local, e, first.pattern.kmeans(e))
        for group in self.body[1:]:
            y = self.run(group, y, shared)
        del local, e, shared  # the largest maps are still to come
        return self.tail(self.m_conv(y).add_(features))

    def published_constants(self) -> dict[str, Tensor]:
        constants = self.mean_shift_constants()
        constants['a'] = torch.zeros(1, dtype=next(self.parameters()).dtype)
        state = cast(FirstGroup, self.body[0]).pattern.state_dict()
        for i in range(1, len(self.body)):
            for name in ('kmeans.means', 'kmeans.initted', 'conv_match.0.weight', 'conv_match.0.bias'):
                constants[f'body.{i}.attention.0.{name}'] = torch.zeros_like(state[name], device='cpu')
        return constants

    @classmethod
    def arguments_of(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        num_feat = state_dict['head.0.weight'].shape[0]
        num_rounds, num_clusters, embedded = state_dict['body.0.attention.0.kmeans.means'].shape
        shuffles = count(state_dict, r'tail\.0\.(\d+)\.weight')
        threefold = shuffles == 1 and state_dict['tail.0.0.weight'].shape[0] == 9 * num_feat
        return {
            'upscale': 3 if threefold else 2**shuffles,
            'num_feat': num_feat,
            'num_groups': count(state_dict, r'body\.(\d+)\.m_conv\.0\.weight'),
            'num_blocks': count(state_dict, r'body\.0\.local_body\.(\d+)\.body\.0\.weight'),
            'num_clusters': num_clusters,
            'num_rounds': num_rounds,
            'reduction': num_feat // embedded,
        }
