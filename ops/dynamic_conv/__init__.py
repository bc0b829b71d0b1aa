"""Convolution with a kernel of its own at every pixel, predicted from few features."""

from torch import Tensor

from attnsr.ops.dynamic_conv import reference

__all__ = ['dynamic_conv']


def dynamic_conv(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kernel_size: int = 7) -> Tensor:
    """Filter every pixel of ``u`` with its own kernels, which a 1x1 convolution predicts from ``z``.

    With K the kernel size, P = K // 2 and G kernels a pixel, ``k = weight z + bias`` has ``G * K * K`` channels:
    ``g * K * K + i * K + j`` is tap (i, j) of kernel g. Runs of C / G channels share one, g(c) = c // (C / G):
    ``y[c, h, w] = sum_ij k[g(c), i, j, h, w] * u[c, h + i - P, w + j - P]``; outside the map is 0. The kernels are
    never kept for the whole map, neither for the gradients: they are predicted again.

    Source: Li et al., DLGSANet (ICCV 2023, arXiv 2301.02031), section 3.2, MHDLSA.

    Args:
        u: (B, C, H, W), any floating dtype; fastest in channels-last memory format. Kernels and sums are in float32
            where it is less precise.
        z: (B, D, H, W), what the kernels are predicted from, the dtype of ``u``.
        weight: (G * K * K, D, 1, 1); G divides C.
        bias: (G * K * K,).
        kernel_size: K, odd.

    Returns:
        (B, C, H, W), the dtype of ``u`` (autocast's under autocast).

    Raises:
        ValueError: a shape does not fit, or the kernel size is even.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd, got {kernel_size}')
    if u.ndim != 4 or z.ndim != 4 or (z.shape[0], *z.shape[2:]) != (u.shape[0], *u.shape[2:]):
        raise ValueError(
            f'expected u of shape (B, C, H, W) and z of shape (B, D, H, W); got {tuple(u.shape)} and {tuple(z.shape)}'
        )
    taps = kernel_size**2
    if weight.ndim != 4 or weight.shape[1:] != (z.shape[1], 1, 1) or weight.shape[0] % taps:
        raise ValueError(f'weight must have the shape (G * {taps}, {z.shape[1]}, 1, 1); got {tuple(weight.shape)}')
    if not len(weight) or u.shape[1] % (len(weight) // taps):
        raise ValueError(
            f'the number of kernels must divide the {u.shape[1]} channels of u; got {len(weight) // taps} kernels'
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must have the shape ({len(weight)},); got {tuple(bias.shape)}')
    return reference.dynamic_conv(u, z, weight, bias, kernel_size)
