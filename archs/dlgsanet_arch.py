"""DLGSANet: Lightweight Dynamic Local and Global Self-Attention Network (Li et al., ICCV 2023, arXiv 2301.02031)."""

import math
from collections.abc import Mapping
from typing import Any, cast

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from attnsr.archs.arch_util import ChannelAttention, GatedFeedForward, LayerNorm2d, SRNetwork, pixel_shuffle_tail
from attnsr.archs.state_dicts import count
from attnsr.ops.dynamic_conv import dynamic_conv

#: Side of the windows that eval mode attends in, by scale factor: twice the LR patches of x2, the LR patches of x4.
TLC_SIZES = {2: 96, 3: 72, 4: 48}


class Norm(nn.Module):
    """A layer norm over the channels, nested as the published names are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = LayerNorm2d(dim)


class PatchEmbed(nn.Module):
    """The first convolution, nested as the published names are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DynamicDWConv(nn.Module):
    """Depthwise convolution with kernels predicted at each pixel; a kernel serves ``num_heads`` channels (3.2)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size, reduced = kernel_size, dim // 4
        depthwise = nn.Conv2d(reduced, reduced, kernel_size, padding=kernel_size // 2, groups=reduced)
        self.conv1 = nn.Sequential(nn.Conv2d(dim, reduced, 1), depthwise)
        self.conv2 = nn.Sequential(nn.Conv2d(reduced, kernel_size**2 * (dim // num_heads), 1))

    def forward(self, u: Tensor) -> Tensor:
        predict = cast(nn.Conv2d, self.conv2[0])
        assert predict.bias is not None
        return dynamic_conv(u, self.conv1(u), predict.weight, predict.bias, self.kernel_size)


class MHDLSA(nn.Module):
    """Multi-head dynamic local self-attention (section 3.2)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 1, bias=False)
        self.conv1 = nn.Conv2d(dim, dim, 1, bias=False)
        self.conv = DynamicDWConv(dim, num_heads, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv(self.conv0(x)))


class LocalLayer(nn.Module):
    """MHDLSA and the feed-forward, each with layer norm and residual."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, ffn_expansion: int) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.IDynamicDWConv = MHDLSA(dim, num_heads, kernel_size)
        self.norm2 = Norm(dim)
        self.IDynamic_ffn = GatedFeedForward(dim, ffn_expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.IDynamicDWConv(self.norm1.body(x))
        return self.IDynamic_ffn(x, self.norm2.body)


class GlobalLayer(nn.Module):
    """Sparse global self-attention (section 3.3) and the feed-forward, each with layer norm and residual.

    In eval mode attention is within overlapping windows of the size that training saw (TLC, arXiv 2112.04491).
    """

    def __init__(self, dim: int, num_heads: int, ffn_expansion: int, tlc_size: int) -> None:
        super().__init__()
        self.tlc_size = tlc_size
        self.norm3 = Norm(dim)
        self.restormer_attn = ChannelAttention(dim, num_heads, 'relu')
        self.norm4 = Norm(dim)
        self.restormer_ffn = GatedFeedForward(dim, ffn_expansion)

    def forward(self, x: Tensor) -> Tensor:
        layout = ('image', None) if self.training else ('overlapping', self.tlc_size)
        x = self.restormer_attn(x, self.norm3.body, *layout)
        return self.restormer_ffn(x, self.norm4.body)


class RHDTG(nn.Module):
    """Residual hybrid dynamic-transformer group: pairs of a local and a global layer, a convolution, the residual."""

    def __init__(
        self, dim: int, num_blocks: int, num_heads: int, kernel_size: int, ffn_expansion: int, tlc_size: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_blocks):
            layers.append(LocalLayer(dim, num_heads, kernel_size, ffn_expansion))
            layers.append(GlobalLayer(dim, num_heads, ffn_expansion, tlc_size))
        self.body = nn.Sequential(*layers, nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@ARCH_REGISTRY.register()
class DLGSANet(SRNetwork):
    """DLGSANet, DLGSANet-light and DLGSANet-tiny for super-resolution of RGB images.

    Li et al., DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution (ICCV
    2023, arXiv 2301.02031). The defaults are DLGSANet; DLGSANet-light is ``dim=48, num_groups=4, num_blocks=3``,
    DLGSANet-tiny ``dim=48, num_groups=3, num_blocks=3``.

    ``forward`` takes (B, 3, H, W), RGB in [0, 1], any H, W >= 1, and returns (B, 3, upscale * H, upscale * W) in the
    same range (not clipped). Global attention is over the whole image in train mode, and in eval mode over windows of
    ``tlc_size``, every image of a batch on its own.

    Args:
        upscale: Scale factor, at least 1.
        dim: Channels; a multiple of ``num_heads``, at least 4.
        num_groups: Number of residual groups.
        num_blocks: Number of pairs of a local and a global layer in each group.
        num_heads: Heads of global attention, and how many channels share a dynamic kernel.
        kernel_size: Side of the dynamic kernels and of the kernel that predicts them, odd.
        ffn_expansion: Hidden channels of the feed-forward over ``dim``.
        tlc_size: Side in pixels of the windows in eval mode; None for the published 96 for x2, 72 for x3, 48 for x4.
        use_checkpoint: Gradient checkpointing of each group.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
    """

    bytes_per_channel = 60
    upsampler = 'upsample.'
    untold = ('tlc_size',)

    def __init__(
        self,
        *,
        upscale: int,
        dim: int = 90,
        num_groups: int = 6,
        num_blocks: int = 4,
        num_heads: int = 6,
        kernel_size: int = 7,
        ffn_expansion: int = 2,
        tlc_size: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(upscale, use_checkpoint=use_checkpoint)
        counts = {'num_groups': num_groups, 'num_blocks': num_blocks, 'num_heads': num_heads}
        for name, value in {**counts, 'ffn_expansion': ffn_expansion}.items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if dim < 4 or dim % num_heads:
            raise ValueError(f'dim must be at least 4 and a multiple of num_heads = {num_heads}, got {dim}')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and at least 1, got {kernel_size}')
        if tlc_size is None and upscale not in TLC_SIZES:
            raise ValueError(
                f'upscale {upscale} has no published tlc_size (only {", ".join(map(str, TLC_SIZES))} have); '
                'give one: the side in pixels of the LR patches that training sees, or about twice that'
            )
        if tlc_size is not None and tlc_size < 1:
            raise ValueError(f'tlc_size must be at least 1, got {tlc_size}')
        tlc_size = TLC_SIZES[upscale] if tlc_size is None else tlc_size
        self.overlap_embed = nn.Sequential(PatchEmbed(dim))
        self.deep_feature_extraction = nn.Sequential(
            *(RHDTG(dim, num_blocks, num_heads, kernel_size, ffn_expansion, tlc_size) for _ in range(num_groups)),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.upsample = pixel_shuffle_tail(dim, upscale)

    @classmethod
    def arguments_of(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        group = 'deep_feature_extraction.0.body'
        dim = len(state_dict['overlap_embed.0.proj.weight'])
        return {
            'upscale': math.isqrt(len(state_dict['upsample.0.weight']) // 3),
            'dim': dim,
            'num_groups': count(state_dict, r'deep_feature_extraction\.(\d+)\.body\.'),
            'num_blocks': count(state_dict, r'deep_feature_extraction\.0\.body\.(\d+)\.restormer_attn\.'),
            'num_heads': len(state_dict[f'{group}.1.restormer_attn.temperature']),
            'kernel_size': state_dict[f'{group}.0.IDynamicDWConv.conv.conv1.1.weight'].shape[-1],
            'ffn_expansion': state_dict[f'{group}.0.IDynamic_ffn.project_out.weight'].shape[1] // dim,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.super_resolve(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        features = x = self.overlap_embed(x)
        for block in self.deep_feature_extraction:
            x = self.run(block, x)
        return self.upsample(x + features)
