"""Attention across channels, over the whole image, windows, a grid or overlapping windows."""

from torch import Tensor

from attnsr.ops import dispatch
from attnsr.ops.autocast import autocast_input
from attnsr.ops.channel_attention import reference

__all__ = ['ACTIVATIONS', 'LAYOUTS', 'channel_attention']

ACTIVATIONS = ('relu', 'softmax')
LAYOUTS = ('image', 'windows', 'grid', 'overlapping')

# That the kernels take, in each of q, k, v and the result, and in a head: what a program keeps in registers.
MOST_CHANNELS = 128
MOST_HEAD_CHANNELS = 64


def channel_attention(
    qkv: Tensor,
    temperature: Tensor,
    activation: str,
    *,
    heads: int = 1,
    layout: str = 'image',
    window_size: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Transposed self-attention: channels attend to channels, by the likeness of what they hold along the tokens.

    q, k and v are C channels each, in ``heads`` runs of c = C / heads. In each group of T tokens and in each head,
    with every channel of q and k divided by ``max(its norm along the tokens, 1e-12)``,
    ``A = activation(temperature * q k^T)``, a c x c matrix, and ``y = A v``. What a group of tokens is, ``layout``
    says; the images of a batch are always apart:

    - ``'image'``: all pixels.
    - ``'windows'``: the pixels of a window, S x S with S the ``window_size``.
    - ``'grid'``: the pixels at one and the same of the S x S positions within all windows.
    - ``'overlapping'``: the pixels of a window of K x L, K = min(S, H) and L = min(S, W). Windows begin at
      0, step, 2 step, ..., n = ceil(H / K) of them with step = ceil((H - K) / (n - 1)), the last one at H - K; along W
      likewise. Where windows overlap, the mean of their y.

    Sources: Zamir et al., Restormer (CVPR 2022, arXiv 2111.09881), section 3.1 (image, softmax). Li et al., DLGSANet
    (ICCV 2023, arXiv 2301.02031), section 3.3, SparseGSA (image, ReLU). Chu et al., Improving Image Restoration by
    Revisiting Global Information Aggregation (ECCV 2022, arXiv 2112.04491), TLC (overlapping). Park et al., ASID
    (AAAI 2025, arXiv 2501.15774), channel attention (windows and grid, softmax).

    Args:
        qkv: (B, 3C, H, W), any floating dtype; fastest in channels-last memory format. Norms, scores and A are in
            float32 where it is less precise.
        temperature: (heads, 1, 1), or one for all heads.
        activation: ``'relu'``, or ``'softmax'`` over the channels of k.
        heads: Number of heads; divides C.
        layout: One of :data:`LAYOUTS`.
        window_size: Side of the windows in pixels; None for ``'image'``. H and W are multiples of it for
            ``'windows'`` and ``'grid'``.
        weight: (O, C, 1, 1) of a 1x1 convolution of y, or None. It is multiplied into A where that is less work.

    Returns:
        (B, C, H, W), or (B, O, H, W) with a weight; the dtype of ``qkv`` (autocast's under autocast). Of a map without
        pixels, one without pixels.

    Raises:
        ValueError: a shape does not fit, or a name is unknown.
        BackendError: the backend ``triton`` was asked for, and cannot be had. The kernels take C and O up to 128, and c
            up to 64.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation {activation!r} is not known; valid: {", ".join(map(repr, ACTIVATIONS))}')
    if layout not in LAYOUTS:
        raise ValueError(f'layout {layout!r} is not known; valid: {", ".join(map(repr, LAYOUTS))}')
    if heads < 1 or qkv.ndim != 4 or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f'expected qkv of shape (B, 3C, H, W) with C a multiple of heads; got {tuple(qkv.shape)}, heads = {heads}'
        )
    if not qkv.is_floating_point() or not qkv.shape[1]:
        raise ValueError(f'qkv must have channels of a floating dtype; got {qkv.shape[1]} of {qkv.dtype}')
    if temperature.numel() not in (1, heads):
        raise ValueError(
            f'temperature must have the shape ({heads}, 1, 1) or one element; got {tuple(temperature.shape)}'
        )
    if (window_size is None) != (layout == 'image') or (window_size is not None and window_size < 1):
        expected = 'be None' if layout == 'image' else 'be a side of at least 1 pixel'
        raise ValueError(f'window_size must {expected} for the layout {layout!r}; got {window_size}')
    side = window_size if window_size is not None and layout != 'overlapping' else 1
    if qkv.shape[2] % side or qkv.shape[3] % side:
        raise ValueError(
            f'height and width must be multiples of the window size {side} for the layout {layout!r}; '
            f'got {tuple(qkv.shape)}'
        )
    if weight is not None and (weight.ndim != 4 or weight.shape[1:] != (qkv.shape[1] // 3, 1, 1)):
        raise ValueError(f'weight must have the shape (O, {qkv.shape[1] // 3}, 1, 1); got {tuple(weight.shape)}')
    x = autocast_input(qkv)
    unsupported = _unsupported(qkv.shape[1] // 3, heads, weight)
    if 0 not in x.shape and dispatch.use_triton('channel_attention', x, unsupported):
        from attnsr.ops.channel_attention import triton_kernel

        return triton_kernel.channel_attention(x, temperature, activation, heads, layout, window_size, weight)
    return reference.channel_attention(qkv, temperature, activation, heads, layout, window_size, weight)


def _unsupported(channels: int, heads: int, weight: Tensor | None) -> str | None:
    """Why the kernels cannot serve such shapes, or None."""
    if channels // heads > MOST_HEAD_CHANNELS:
        return f'heads of more than {MOST_HEAD_CHANNELS} channels'
    if max(channels, 0 if weight is None else len(weight)) > MOST_CHANNELS:
        return f'more than {MOST_CHANNELS} channels'
    return None
