"""Shift followed by a 1x1 convolution: a 3x3 neighbourhood at the price of one pixel."""

from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.autocast import autocast_input
from attnsr.ops.maps import check_map
from attnsr.ops.shift_linear import reference

__all__ = ['ACTIVATIONS', 'shift_linear']

ACTIVATIONS = (None, 'relu')


def shift_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Shift the channels of ``x`` and mix them by a 1x1 convolution, ELAN's local feature extraction.

    With ``g = C // 5``: channels ``[0, g)`` read ``x[h, w + 1]``, ``[g, 2g)`` read ``x[h, w - 1]``, ``[2g, 3g)``
    read ``x[h + 1, w]``, ``[3g, 4g)`` read ``x[h - 1, w]``, the others stay; outside the map is 0. Then
    ``y[o] = sum_c weight[o, c] * shifted[c] + bias[o]``, then the activation, then ``+ residual``. Where the Triton
    kernel is used, the shifted map never exists: see ``triton_kernel.py``, and :mod:`attnsr.ops.dispatch` for when.

    Source: Zhang et al., Efficient Long-Range Attention Network for Image Super-resolution (ECCV 2022,
    arXiv 2203.06697), section 3.2, shift-conv.

    Args:
        x: Feature map (B, C, H, W), any floating dtype; fastest in channels-last memory format.
        weight: (O, C, 1, 1), the dtype of ``x``.
        bias: (O,) or None.
        activation: None or ``'relu'``.
        residual: (B, O, H, W) or None.

    Returns:
        (B, O, H, W), the dtype of ``x`` (of the convolution under autocast).

    Raises:
        ValueError: a shape or dtype does not fit, there are no elements, or the activation is unknown.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernels take any sizes.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            'shift_linear takes x of shape (B, C, H, W) and weight of shape (O, C, 1, 1); '
            f'got {tuple(x.shape)} and {tuple(weight.shape)}'
        )
    check_map('x', x, weight, bias)
    if not len(weight):
        raise ValueError(f'weight must have an output channel; got {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must have the shape {tuple(weight.shape[:1])}; got {tuple(bias.shape)}')
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation {activation!r} is not known; valid: {", ".join(map(repr, ACTIVATIONS))}')
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0], *x.shape[2:]):
        raise ValueError(
            f'residual must have the shape of the output, {(x.shape[0], weight.shape[0], *x.shape[2:])}; '
            f'got {tuple(residual.shape)}'
        )
    x = autocast_input(x)
    if dispatch.use_triton('shift_linear', x):
        from attnsr.ops.shift_linear import triton_kernel

        return triton_kernel.shift_linear(x, weight, bias, activation, residual)
    return reference.shift_linear(x, weight, bias, activation, residual)
