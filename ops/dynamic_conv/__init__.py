"""Convolution with a kernel of its own at every pixel, predicted from few features."""

from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.autocast import autocast_input
from attnsr.ops.dynamic_conv import reference
from attnsr.ops.maps import check_map

__all__ = ['aggregate', 'dynamic_conv']

#: How many channels may share a kernel, and how many features of z it may be predicted from, in the Triton kernel.
LARGEST_SHARING, LARGEST_PREDICTOR = 48, 63


def dynamic_conv(u: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kernel_size: int = 7) -> Tensor:
    """Filter every pixel of ``u`` with its own kernels, which a 1x1 convolution predicts from ``z``.

    With K the kernel size, P = K // 2 and G kernels a pixel, ``k = weight z + bias`` has ``G * K * K`` channels:
    ``g * K * K + i * K + j`` is tap (i, j) of kernel g. Runs of C / G channels share one, g(c) = c // (C / G):
    ``y[c, h, w] = sum_ij k[g(c), i, j, h, w] * u[c, h + i - P, w + j - P]``; outside the map is 0. The kernels are
    never kept for the whole map, neither for the gradients: they are predicted again.

    Source: Li et al., DLGSANet (ICCV 2023, arXiv 2301.02031), section 3.2, MHDLSA.

    Args:
        u: (B, C, H, W), any floating dtype; fastest in channels-last memory format. Sums are in float32 where it is
            less precise, and so are the kernels; but the Triton kernel rounds them, and the terms and sums of their
            gradients, where they are multiplied: to bfloat16 for bfloat16, to TF32 for float16.
        z: (B, D, H, W), what the kernels are predicted from, the dtype of ``u``; D is at most 63 in the Triton kernel.
        weight: (G * K * K, D, 1, 1); G divides C, and C / G is at most 48 in the Triton kernel.
        bias: (G * K * K,).
        kernel_size: K, odd.

    Returns:
        (B, C, H, W), the dtype of ``u`` (autocast's under autocast).

    Raises:
        ValueError: a shape does not fit, or the kernel size is even.
        BackendError: the backend ``triton`` was asked for, and cannot be had.
    """
    taps = _taps(kernel_size)
    if u.ndim != 4 or z.ndim != 4 or (z.shape[0], *z.shape[2:]) != (u.shape[0], *u.shape[2:]):
        raise ValueError(
            f'expected u of shape (B, C, H, W) and z of shape (B, D, H, W); got {tuple(u.shape)} and {tuple(z.shape)}'
        )
    if weight.ndim != 4 or weight.shape[1:] != (z.shape[1], 1, 1) or weight.shape[0] % taps:
        raise ValueError(f'weight must have the shape (G * {taps}, {z.shape[1]}, 1, 1); got {tuple(weight.shape)}')
    check_map('u', u, z, weight, bias)
    _check_sharing(u.shape[1], len(weight) // taps)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must have the shape ({len(weight)},); got {tuple(bias.shape)}')
    u, z = autocast_input(u), autocast_input(z)
    if dispatch.use_triton('dynamic_conv', u, _unsupported(u.shape[1] // (len(weight) // taps), z.shape[1])):
        from attnsr.ops.dynamic_conv import triton_kernel

        return triton_kernel.dynamic_conv(u, z, weight, bias, kernel_size)
    return reference.dynamic_conv(u, z, weight, bias, kernel_size)


def aggregate(u: Tensor, kernels: Tensor, kernel_size: int = 7) -> Tensor:
    """Filter every pixel of ``u`` with its own kernels, which are given: the second half of :func:`dynamic_conv`.

    ``y[c, h, w] = sum_ij kernels[g(c), i, j, h, w] * u[c, h + i - P, w + j - P]``, as there; outside the map is 0.

    Args:
        u: (B, C, H, W), any floating dtype; fastest in channels-last memory format. Sums are in float32 where it is
            less precise.
        kernels: (B, G * K * K, H, W), the dtype of ``u``; G divides C. Channel ``g * K * K + i * K + j`` is tap (i, j)
            of kernel g. Fastest in channels-last or plain memory format.
        kernel_size: K, odd.

    Returns:
        (B, C, H, W), the dtype of ``u`` (autocast's under autocast).

    Raises:
        ValueError: a shape does not fit, or the kernel size is even.
        BackendError: the backend ``triton`` was asked for, and cannot be had.
    """
    taps = _taps(kernel_size)
    if u.ndim != 4 or kernels.ndim != 4 or (kernels.shape[0], *kernels.shape[2:]) != (u.shape[0], *u.shape[2:]):
        raise ValueError(
            f'expected u of shape (B, C, H, W) and kernels of shape (B, G * {taps}, H, W); '
            f'got {tuple(u.shape)} and {tuple(kernels.shape)}'
        )
    if kernels.shape[1] % taps:
        raise ValueError(f'kernels must have G * {taps} channels; got {kernels.shape[1]}')
    check_map('u', u, kernels)
    _check_sharing(u.shape[1], kernels.shape[1] // taps)
    u, kernels = autocast_input(u), autocast_input(kernels)
    if dispatch.use_triton('aggregate', u):
        from attnsr.ops.dynamic_conv import triton_kernel

        return triton_kernel.aggregate(u, kernels, kernel_size)
    return reference.aggregate(u, kernels, kernel_size)


def _taps(kernel_size: int) -> int:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd, got {kernel_size}')
    return kernel_size**2


def _check_sharing(channels: int, kernels: int) -> None:
    if not kernels or channels % kernels:
        raise ValueError(f'the number of kernels must divide the {channels} channels of u; got {kernels} kernels')


def _unsupported(sharing: int, features: int) -> str | None:
    """Why the Triton kernel does not serve kernels that ``sharing`` channels share, or None."""
    if sharing > LARGEST_SHARING:
        return f'kernels that more than {LARGEST_SHARING} channels share'
    if features > LARGEST_PREDICTOR:
        return f'kernels predicted from more than {LARGEST_PREDICTOR} channels'
    return None
