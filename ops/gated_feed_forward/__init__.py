"""The gated feed-forward with depthwise convolutions of DLGSANet and ASID, with its layer norm and residual."""

from torch import Tensor

from attnsr.ops import dispatch, separable_conv
from attnsr.ops.autocast import autocast_input
from attnsr.ops.gated_feed_forward import reference
from attnsr.ops.maps import check_map

__all__ = ['gated_feed_forward']


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    """``x + project_out(GELU(a) * b)``, where a and b are the halves of the channels of the separable convolution of x.

    The separable convolution is :func:`attnsr.ops.separable_conv.separable_conv`: layer norm over the channels,
    1x1 and depthwise 3x3 convolution. GELU is the exact one.

    Source: Zamir et al., Restormer (CVPR 2022, arXiv 2111.09881), section 3.2, GDFN; Li et al., DLGSANet (ICCV 2023,
    arXiv 2301.02031), section 3.2; Park et al., ASID (AAAI 2025, arXiv 2501.15774), GFN.

    Args:
        x: (B, C, H, W), any floating dtype; fastest in channels-last memory format. The Triton kernels take no more
            than 128 channels.
        norm_weight: (C,), of the layer norm. All parameters are of the dtype of ``x``, but under autocast.
        norm_bias: (C,).
        eps: Added to the variance, for example 1e-5.
        project_in: (2D, C, 1, 1), D being the hidden channels.
        depthwise: (2D, 1, 3, 3); outside the map is 0.
        project_out: (C, D, 1, 1).

    Returns:
        (B, C, H, W), the dtype of ``x``.

    Raises:
        ValueError: a shape or a dtype does not fit.
        BackendError: the backend ``triton`` was asked for, and cannot be had.
    """
    separable_conv.check(x, norm_weight, norm_bias, project_in, depthwise)
    if project_out.shape != (x.shape[1], len(project_in) // 2, 1, 1) or len(project_in) % 2:
        raise ValueError(
            'project_in must have the shape (2D, C, 1, 1) and project_out (C, D, 1, 1); '
            f'got {tuple(project_in.shape)} and {tuple(project_out.shape)}'
        )
    check_map('x', x, project_out)
    if dispatch.use_triton('gated_feed_forward', x, separable_conv.unsupported(x)):
        from attnsr.ops.gated_feed_forward import triton_kernel

        weights = (autocast_input(weight) for weight in (project_in, depthwise, project_out))
        return triton_kernel.gated_feed_forward(x, norm_weight, norm_bias, eps, *weights)
    return reference.gated_feed_forward(x, norm_weight, norm_bias, eps, project_in, depthwise, project_out)
