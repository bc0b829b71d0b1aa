"""ELAN: Efficient Long-Range Attention Network (Zhang et al., ECCV 2022, arXiv 2203.06697)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from attnsr.archs import elan_strips
from attnsr.archs.arch_util import RGB_MEAN, Folding, SRNetwork, pixel_shuffle_tail
from attnsr.archs.state_dicts import count
from attnsr.ops.shift_linear import shift_linear
from attnsr.ops.window_attention import SharedAttention, shared_window_attention, window_attention


class Pointwise(nn.Module):
    """The 1x1 convolution of a shift convolution, nested as the published names are."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(in_channels, out_channels, 1)


class ShiftConv(nn.Module):
    """Shift, then a 1x1 convolution (section 3.2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.shift_conv = Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        conv = self.shift_conv.conv1x1
        return shift_linear(x, conv.weight, conv.bias, activation, residual)


class LFE(nn.Module):
    """Local feature extraction: two shift convolutions with a ReLU between, and the residual (section 3.2)."""

    def __init__(self, channels: int, r_expand: int) -> None:
        super().__init__()
        self.conv0 = ShiftConv(channels, channels * r_expand)
        self.conv1 = ShiftConv(channels * r_expand, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(x, activation='relu'), residual=x)


class GMSA(Folding):
    """Group-wise multi-scale self-attention (section 3.3) with its residual; computes attention, or reuses it."""

    def __init__(self, channels: int, window_sizes: Sequence[int], shifted: bool, computes: bool) -> None:
        super().__init__()
        projected = 2 * channels if computes else channels  # (q, v) or v for each window size
        self.window_sizes, self.shifted, self.computes = tuple(window_sizes), shifted, computes
        self.project_inp = nn.Sequential(nn.Conv2d(channels, projected, 1), nn.BatchNorm2d(projected))
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, shared: SharedAttention | None) -> tuple[Tensor, SharedAttention]:
        if shared is None:
            y, shared = window_attention(self._project(x), self.window_sizes, self.shifted)
        else:
            y = shared_window_attention(self._project(x), shared)
        return x + self.project_out(y), shared

    def _project(self, x: Tensor) -> Tensor:
        """1x1 convolution and BatchNorm, in eval mode as one convolution."""
        if self.training:
            return self.project_inp(x)
        weight, bias = self.folded()
        return F.conv2d(x, weight, bias)

    def sources(self) -> tuple[Tensor, ...]:
        conv, norm = cast(nn.Conv2d, self.project_inp[0]), cast(nn.BatchNorm2d, self.project_inp[1])
        assert conv.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var

    def combine(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """Weight and bias of the first convolution with BatchNorm's running statistics folded into them."""
        weight, bias, norm_weight, norm_bias, mean, variance = sources
        factor = norm_weight * torch.rsqrt(variance + cast(nn.BatchNorm2d, self.project_inp[1]).eps)
        return weight * factor[:, None, None, None], (bias - mean) * factor + norm_bias


class ELAB(nn.Module):
    """Efficient long-range attention block: 1 + n_share pairs of LFE and GMSA, one computing the attention."""

    def __init__(self, channels: int, r_expand: int, window_sizes: Sequence[int], n_share: int, shifted: bool) -> None:
        super().__init__()
        self.modules_lfe = nn.ModuleDict({f'lfe_{j}': LFE(channels, r_expand) for j in range(1 + n_share)})
        self.modules_gmsa = nn.ModuleDict(
            {f'gmsa_{j}': GMSA(channels, window_sizes, shifted, computes=j == 0) for j in range(1 + n_share)}
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and elan_strips.serves(self, x):
            return elan_strips.forward(self, x)
        shared: SharedAttention | None = None
        for lfe, gmsa in zip(self.modules_lfe.values(), self.modules_gmsa.values(), strict=True):
            x = lfe(x)
            x, shared = gmsa(x, shared)
        return x


@ARCH_REGISTRY.register()
class ELAN(SRNetwork):
    """ELAN and ELAN-light for super-resolution of RGB images.

    Zhang et al., Efficient Long-Range Attention Network for Image Super-resolution (ECCV 2022, arXiv 2203.06697).
    The defaults are ELAN; ELAN-light is ``m_elan=24, c_elan=60, n_share=1``.

    ``forward`` takes (B, 3, H, W), RGB in [0, 1], any H, W >= 1, and returns (B, 3, upscale * H, upscale * W) in
    the same range (not clipped). Inside, the image is padded by reflection to a multiple of the window sizes.

    Args:
        upscale: Scale factor, at least 1.
        m_elan: Number of LFE and GMSA pairs; a multiple of ``1 + n_share``.
        c_elan: Channels; a multiple of the number of window sizes, at least 5.
        n_share: How many pairs reuse the attention of the pair before them.
        r_expand: Expansion of the channels within LFE.
        window_sizes: Sides of the attention windows in pixels, each working on an equal run of the channels.
        img_range: Factor on the image within the network; released checkpoints expect 255.
        use_checkpoint: Gradient checkpointing of each block.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
    """

    unused_names = (r'(sub|add)_mean\.(weight|bias)', r'.*\.shift_conv\.weight')
    bytes_per_channel = 60
    upsampler = 'tail.'
    untold = ('window_sizes', 'img_range')

    def __init__(
        self,
        *,
        upscale: int,
        m_elan: int = 36,
        c_elan: int = 180,
        n_share: int = 0,
        r_expand: int = 2,
        window_sizes: Sequence[int] = (4, 8, 16),
        img_range: float = 255.0,
        use_checkpoint: bool = False,
    ) -> None:
        for name, value, least in (('n_share', n_share, 0), ('r_expand', r_expand, 1)):
            if value < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')
        if not window_sizes or any(size < 1 for size in window_sizes):
            raise ValueError(f'window_sizes must be sides of at least 1 pixel, got {list(window_sizes)}')
        if m_elan < 1 or m_elan % (1 + n_share):
            raise ValueError(f'm_elan must be a multiple of 1 + n_share = {1 + n_share}, got {m_elan}')
        if c_elan < 5 or c_elan % len(window_sizes):
            raise ValueError(
                f'c_elan must be at least 5 and a multiple of the number of window sizes, {len(window_sizes)}, '
                f'got {c_elan}'
            )
        if not img_range > 0:
            raise ValueError(f'img_range must be greater than 0 (released checkpoints expect 255), got {img_range}')
        super().__init__(upscale, img_range=img_range, multiple=math.lcm(*window_sizes), use_checkpoint=use_checkpoint)
        self.head = nn.Sequential(nn.Conv2d(3, c_elan, 3, padding=1))
        self.body = nn.Sequential(
            *(ELAB(c_elan, r_expand, window_sizes, n_share, shifted=i % 2 == 1) for i in range(m_elan // (1 + n_share)))
        )
        self.tail = pixel_shuffle_tail(c_elan, upscale)

    @classmethod
    def arguments_of(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        expanded, channels = state_dict['body.0.modules_lfe.lfe_0.conv0.shift_conv.conv1x1.weight'].shape[:2]
        pairs = count(state_dict, r'body\.0\.modules_gmsa\.gmsa_(\d+)\.')
        arguments: dict[str, Any] = {
            'upscale': math.isqrt(len(state_dict['tail.0.weight']) // 3),
            'm_elan': count(state_dict, r'body\.(\d+)\.') * pairs,
            'c_elan': channels,
            'n_share': pairs - 1,
            'r_expand': expanded // channels,
        }
        if 'sub_mean.bias' in state_dict:
            bias = state_dict['sub_mean.bias']  # -img_range * mean
            ranges = [-value / mean for value, mean in zip(bias.tolist(), RGB_MEAN, strict=True)]
            tolerance = 2 * max(torch.finfo(dtype).eps for dtype in (bias.dtype, torch.float32))
            # The shortest number that is stored so; none where the constants are not the published ones.
            for img_range in (float(f'{ranges[0]:.{digits}g}') for digits in range(1, 8)):
                if all(abs(each - img_range) <= tolerance * img_range for each in ranges):
                    return arguments | {'img_range': img_range}
        return arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.super_resolve(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        features = x = self.head(x)
        for block in self.body:
            x = self.run(block, x)
        return self.tail(x + features)

    def published_constants(self) -> dict[str, Tensor]:
        constants, dtype = self.mean_shift_constants(), next(self.parameters()).dtype
        for name, module in self.named_modules():
            if isinstance(module, ShiftConv):
                channels = module.shift_conv.conv1x1.in_channels
                constants[f'{name}.shift_conv.weight'] = shift_kernel(channels, dtype)
        return constants


def shift_kernel(channels: int, dtype: torch.dtype) -> Tensor:
    """The shift as the depthwise 3x3 kernel that the published network stores: (channels, 1, 3, 3)."""
    kernel = torch.zeros(channels, 1, 3, 3, dtype=dtype)
    g = channels // 5
    for i, (row, column) in enumerate(((1, 2), (1, 0), (2, 1), (0, 1))):
        kernel[i * g : (i + 1) * g, 0, row, column] = 1
    kernel[4 * g :, 0, 1, 1] = 1
    return kernel
