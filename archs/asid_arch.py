"""ASID: Attention-Sharing Information Distillation (Park et al., AAAI 2025, arXiv 2501.15774)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from attnsr.archs.arch_util import (
    ChannelAttention,
    Folding,
    GatedFeedForward,
    LayerNorm2d,
    SRNetwork,
    pixel_shuffle_tail,
)
from attnsr.archs.state_dicts import count
from attnsr.ops.symbolic import larger
from attnsr.ops.window_attention import SharedAttention, shared_window_attention, window_attention


@dataclass(frozen=True)
class GroupAttention:
    """The attention maps that the first group computes and all later groups reuse.

    Attributes:
        local: Of SLA1, SLA2 and SLA3, over windows.
        grid: Of SGA1, SGA2 and SGA3, over the grid.
    """

    local: tuple[SharedAttention, ...]
    grid: tuple[SharedAttention, ...]


class SqueezeExcitation(nn.Module):
    """Channels weighted by a function of their means; (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # has no parameters, as the published layer of this place
            nn.Linear(channels, channels // 4, bias=False),
            nn.SiLU(),
            nn.Linear(channels // 4, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, *layers = self.gate
        y = mean(x).flatten(1)
        for layer in layers:
            y = layer(y)
        return x * y[:, :, None, None]


class Residual(nn.Module):
    """``x + fn(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class LocalBlock(nn.Module):
    """LB: local features by a 1x1 and a depthwise 3x3 convolution, squeeze-excitation, and the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = Residual(
            nn.Conv2d(channels, channels, 1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            SqueezeExcitation(channels),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ComputingAttention(nn.Module):
    """Window attention of the first group: with q, k, v and a relative position bias."""

    def __init__(self, channels: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels, bias=False))
        self.rel_pos_bias = nn.Embedding((2 * window_size - 1) ** 2, 1)

    def forward(self, x: Tensor, grid: bool) -> tuple[Tensor, SharedAttention]:
        y, shared = window_attention(
            pointwise(x, self.to_qkv.weight),
            (self.window_size,),
            grid=grid,
            symmetric=False,
            scale=x.shape[1] ** -0.5,
            relative_bias=(self.rel_pos_bias.weight,),
        )
        return pointwise(y, cast(nn.Linear, self.to_out[0]).weight), shared


class ReusingAttention(Folding):
    """Window attention of later groups: only v, attended as the first group did."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor, shared: SharedAttention) -> Tensor:
        # out(A v(x)) = (out v)(A x): attention mixes tokens, the projections mix channels.
        return pointwise(shared_window_attention(x, shared), *self.folded())

    def sources(self) -> tuple[Tensor, ...]:
        return cast(nn.Linear, self.to_out[0]).weight, self.to_v.weight

    def combine(self, *sources: Tensor) -> tuple[Tensor, ...]:
        out, v = sources
        return (out @ v,)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer's weight as 1x1 convolution."""
    return F.conv2d(x, weight[:, :, None, None])


class SelfAttention(nn.Module):
    """SLA or SGA: attention over windows or the grid, then the feed-forward, each with layer norm and residual."""

    def __init__(self, channels: int, window_size: int, grid: bool, computes: bool) -> None:
        super().__init__()
        self.grid = grid
        self.norm = LayerNorm2d(channels, eps=1e-5)
        self.attn = ComputingAttention(channels, window_size) if computes else ReusingAttention(channels)
        self.cnorm = LayerNorm2d(channels, eps=1e-6)
        self.gfn = GatedFeedForward(channels, expansion=1)

    def forward(self, x: Tensor, shared: SharedAttention | None) -> tuple[Tensor, SharedAttention]:
        if isinstance(self.attn, ComputingAttention):
            y, shared = self.attn(self.norm(x), self.grid)
        else:
            assert shared is not None
            y = self.attn(self.norm(x), shared)
        return self.gfn(x + y, self.cnorm), shared


class ChannelBlock(nn.Module):
    """Channel attention and feed-forward, over windows and then over the grid."""

    def __init__(self, channels: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.canorm1, self.canorm2 = LayerNorm2d(channels, eps=1e-6), LayerNorm2d(channels, eps=1e-6)
        self.cttn1, self.cttn2 = (ChannelAttention(channels, heads=1, activation='softmax') for _ in range(2))
        self.cnorm1, self.cnorm2 = LayerNorm2d(channels, eps=1e-6), LayerNorm2d(channels, eps=1e-6)
        self.gfn1, self.gfn2 = (GatedFeedForward(channels, expansion=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gfn1(self.cttn1(x, self.canorm1, 'windows', self.window_size), self.cnorm1)
        return self.gfn2(self.cttn2(x, self.canorm2, 'grid', self.window_size), self.cnorm2)


class IDSA(nn.Module):
    """Information distillation: three steps of local and attended features, each leaving a quarter of the channels."""

    def __init__(self, channels: int, window_size: int, computes: bool) -> None:
        super().__init__()
        self.distilled = channels // 4
        widths = [channels, channels - self.distilled, channels - 2 * self.distilled]
        for i, width in enumerate(widths, 1):
            attended = width - self.distilled
            self.add_module(f'LB{i}', LocalBlock(width))
            self.add_module(f'SLA{i}', SelfAttention(attended, window_size, grid=False, computes=computes))
            self.add_module(f'SGA{i}', SelfAttention(attended, window_size, grid=True, computes=computes))
        self.BlockC = ChannelBlock(channels, window_size)
        self.pw1 = nn.Conv2d(channels, channels, 1)
        self.pw2 = nn.Conv2d(widths[1], widths[1], 1)
        self.pw3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, shared: GroupAttention | None) -> tuple[Tensor, GroupAttention]:
        c = self.distilled
        distilled: list[Tensor] = []
        local, grid = [], []
        for i in range(1, 4):
            x = self.get_submodule(f'LB{i}')(x)
            t, of_windows = self.get_submodule(f'SLA{i}')(x[:, c:], shared and shared.local[i - 1])
            t, of_grid = self.get_submodule(f'SGA{i}')(t, shared and shared.grid[i - 1])
            local.append(of_windows)
            grid.append(of_grid)
            x = self.get_submodule(f'pw{i}')(torch.cat((*(distilled if i == 3 else ()), t, x[:, :c]), 1))
            if i < 3:
                distilled.append(x[:, :c])
                x = x[:, c:]
        return self.BlockC(x), GroupAttention(tuple(local), tuple(grid))


class ESA(nn.Module):
    """Enhanced spatial attention: the map times a mask that sees far, by pooling."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv_f = nn.Conv2d(hidden, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv4 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv1(x)
        # Of a map of a single window the pooling window is as large as the strided convolution leaves it.
        strided = self.conv2(narrow)
        if torch.compiler.is_compiling():
            far = self._pooled_of_any_size(strided, x.shape[2:])
        else:
            pooled = F.max_pool2d(strided, [min(7, side) for side in strided.shape[2:]], stride=3)
            far = F.interpolate(self.conv3(pooled), x.shape[2:], mode='bilinear', align_corners=False)
        return x * torch.sigmoid(self.conv4(far + self.conv_f(narrow)))

    def _pooled_of_any_size(self, strided: Tensor, size: Sequence[int]) -> Tensor:
        """Pooling, convolution and resizing for sizes that are not known yet.

        A compiler takes a side of one pixel for a constant. So the map is made so large here that pooling leaves more
        than that, and what is too much is 0 for the convolution, and has no weight in the interpolation.
        """
        ample = [side // 4 + 2 for side in size]
        padding = [7 + 3 * (side - 1) - before for side, before in zip(ample, strided.shape[2:], strict=True)]
        pooled = F.max_pool2d(F.pad(strided, (0, padding[1], 0, padding[0]), value=float('-inf')), 7, stride=3)
        exact = torch.float64 if strided.dtype == torch.float64 else torch.float32
        inside, weights = [], []
        for before, side, target in zip(strided.shape[2:], ample, size, strict=True):
            last = larger(before - 7, 0) // 3
            position = torch.arange(side, device=strided.device)
            inside.append(position <= last)
            pixel = torch.arange(target, device=strided.device, dtype=exact)
            source = (2 * pixel + 1) * (last + 1) / (2 * target) - 0.5
            weights.append((1 - (source.clamp(0, last)[:, None] - position).abs()).clamp(min=0).to(strided.dtype))
        pooled = self.conv3(torch.where(inside[0][:, None] & inside[1], pooled, 0))
        return weights[0] @ pooled @ weights[1].T


class Group(nn.Module):
    """IDSA, a 1x1 convolution, the residual, and ESA."""

    def __init__(self, channels: int, window_size: int, esa_channels: int, computes: bool) -> None:
        super().__init__()
        idsa = IDSA(channels, window_size, computes)
        self.residual_layer: nn.Module = nn.ModuleList([idsa]) if computes else idsa  # as the published names are
        self.res_end = nn.Conv2d(channels, channels, 1)
        self.esa = ESA(channels, esa_channels)

    def forward(self, x: Tensor, shared: GroupAttention | None) -> tuple[Tensor, GroupAttention]:
        idsa = self.residual_layer[0] if isinstance(self.residual_layer, nn.ModuleList) else self.residual_layer
        y, shared = idsa(x, shared)
        return self.esa(self.res_end(y) + x), shared


@ARCH_REGISTRY.register()
class ASID(SRNetwork):
    """ASID for super-resolution of RGB images.

    Park et al., Efficient Attention-Sharing Information Distillation Transformer for Lightweight Single Image
    Super-Resolution (AAAI 2025, arXiv 2501.15774). The defaults are ASID; ASID-D8 is ``num_groups=8``.

    ``forward`` takes (B, 3, H, W), RGB in [0, 1], any H, W >= 1, and returns (B, 3, upscale * H, upscale * W) in
    the same range (not clipped). Inside, the image is padded with zeros to a multiple of the window size.

    Args:
        upscale: Scale factor, at least 1.
        num_feat: Channels; a multiple of 4, at least 8.
        num_groups: Groups, of which the first computes the attention maps and the others reuse them.
        window_size: Side of the attention windows in pixels, at least 3.
        esa_channels: Channels of the spatial attention at the end of a group.
        use_checkpoint: Gradient checkpointing of each group.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
    """

    bytes_per_channel = 110
    upsampler = 'up.'

    def __init__(
        self,
        *,
        upscale: int,
        num_feat: int = 48,
        num_groups: int = 3,
        window_size: int = 8,
        esa_channels: int = 16,
        use_checkpoint: bool = False,
    ) -> None:
        for name, value, least in (
            ('num_groups', num_groups, 1),
            ('window_size', window_size, 3),
            ('esa_channels', esa_channels, 1),
        ):
            if value < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')
        if num_feat < 8 or num_feat % 4:
            raise ValueError(f'num_feat must be a multiple of 4 and at least 8, got {num_feat}')
        super().__init__(upscale, mean=None, multiple=window_size, padding='zeros', use_checkpoint=use_checkpoint)
        self.input = nn.Conv2d(3, num_feat, 3, padding=1)
        self.num_groups = num_groups
        for i in range(num_groups):
            self.add_module(f'block{i}', Group(num_feat, window_size, esa_channels, computes=i == 0))
        self.output = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.up = pixel_shuffle_tail(num_feat, upscale)

    @classmethod
    def arguments_of(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        table = state_dict['block0.residual_layer.0.SLA1.attn.rel_pos_bias.weight']  # (2 window_size - 1)^2 entries
        return {
            'upscale': math.isqrt(len(state_dict['up.0.weight']) // 3),
            'num_feat': len(state_dict['input.weight']),
            'num_groups': count(state_dict, r'block(\d+)\.'),
            'window_size': (math.isqrt(len(table)) + 1) // 2,
            'esa_channels': len(state_dict['block0.esa.conv1.weight']),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.super_resolve(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        features = x = self.input(x)
        shared: GroupAttention | None = None
        for i in range(self.num_groups):
            x, shared = self.run(self.get_submodule(f'block{i}'), x, shared)
        return self.up(self.output(x) + features)
