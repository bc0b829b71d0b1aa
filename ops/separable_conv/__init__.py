"""Layer norm, 1x1 and depthwise 3x3 convolution: how channel attention and the feed-forward take their input."""

from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.autocast import autocast_input
from attnsr.ops.maps import check_map
from attnsr.ops.separable_conv import reference

__all__ = ['separable_conv']

#: Of x, that the Triton kernels take: a program has all those of its pixels.
MOST_CHANNELS = 128


def separable_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, pointwise: Tensor, depthwise: Tensor
) -> Tensor:
    """Normalise over the channels at each pixel, mix them by a 1x1 convolution, then a depthwise 3x3 convolution.

    Source: Zamir et al., Restormer (CVPR 2022, arXiv 2111.09881), section 3.1, as DLGSANet and ASID use it.

    Args:
        x: (B, C, H, W), any floating dtype; fastest in channels-last memory format. The Triton kernels take no more
            than 128 channels.
        norm_weight: (C,), of the layer norm, the variance being the biased one. All parameters are of the dtype of
            ``x``, but under autocast.
        norm_bias: (C,).
        eps: Added to the variance, for example 1e-5.
        pointwise: (O, C, 1, 1).
        depthwise: (O, 1, 3, 3); outside the map is 0.

    Returns:
        (B, O, H, W), the dtype of ``x`` (of a convolution under autocast).

    Raises:
        ValueError: a shape or a dtype does not fit.
        BackendError: the backend ``triton`` was asked for, and cannot be had.
    """
    check(x, norm_weight, norm_bias, pointwise, depthwise)
    if dispatch.use_triton('separable_conv', x, unsupported(x)):
        from attnsr.ops.separable_conv import triton_kernel

        pointwise, depthwise = autocast_input(pointwise), autocast_input(depthwise)
        return triton_kernel.separable_conv(x, norm_weight, norm_bias, eps, pointwise, depthwise)
    return reference.separable_conv(x, norm_weight, norm_bias, eps, pointwise, depthwise)


def check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, pointwise: Tensor, depthwise: Tensor) -> None:
    """Raise ValueError where the shapes of the arguments of :func:`separable_conv` do not fit, or the dtypes."""
    if x.ndim != 4 or pointwise.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            'expected x of shape (B, C, H, W) and a pointwise weight of shape (O, C, 1, 1); '
            f'got {tuple(x.shape)} and {tuple(pointwise.shape)}'
        )
    if depthwise.shape != (pointwise.shape[0], 1, 3, 3):
        raise ValueError(
            f'the depthwise weight must have the shape {(pointwise.shape[0], 1, 3, 3)}; got {tuple(depthwise.shape)}'
        )
    if norm_weight.shape != x.shape[1:2] or norm_bias.shape != x.shape[1:2]:
        raise ValueError(
            f'weight and bias of the norm must have the shape {tuple(x.shape[1:2])}; '
            f'got {tuple(norm_weight.shape)} and {tuple(norm_bias.shape)}'
        )
    check_map('x', x, norm_weight, norm_bias, pointwise, depthwise)


def unsupported(x: Tensor) -> str | None:
    """Why the Triton kernels do not serve such a map, or None."""
    return f'more than {MOST_CHANNELS} channels' if x.shape[1] > MOST_CHANNELS else None
