"""L1 in the Fourier domain (Cho et al., ICCV 2021, arXiv 2108.05054, section 3.3)."""

import math

import torch
from basicsr.losses.loss_util import reduce_loss
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

REDUCTIONS = ('none', 'mean', 'sum')


@LOSS_REGISTRY.register()
class FFTLoss(nn.Module):
    """L1 between the two-dimensional discrete Fourier transforms of two images, real and imaginary parts apart.

    The multi-scale frequency reconstruction loss of MIMO-UNet, at one scale: Cho et al., Rethinking Coarse-to-Fine
    Approach in Single Image Deblurring (ICCV 2021, arXiv 2108.05054, section 3.3). For each image and channel, with
    the full spectrum (all H W frequencies, ``torch.fft.fft2``), not normalised::

        F(x)[u, v] = sum over h, w of x[h, w] exp(-2 pi i (u h / H + v w / W)),    D = F(pred) - F(target)

    and the loss is ``loss_weight`` times the mean of |Re D| and |Im D|, over all 2 N C H W of them. As the transform
    is not normalised, the loss of a noise-like difference grows with the root of H W; the paper weighs it with 0.1
    beside a pixel-wise L1 of weight 1.

    Args:
        loss_weight: Factor on the loss, finite and at least 0.
        reduction: 'mean' over all real and imaginary parts, 'sum' of them, or 'none' of both.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
    """

    def __init__(self, *, loss_weight: float = 1.0, reduction: str = 'mean') -> None:
        super().__init__()
        if not 0 <= loss_weight < math.inf:
            raise ValueError(f'loss_weight must be a finite number of at least 0, got {loss_weight}')
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be one of {", ".join(REDUCTIONS)}, got {reduction!r}')
        self.loss_weight, self.reduction = loss_weight, reduction

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss, in float32 or, where either image is, in float64.

        Args:
            pred: (N, C, H, W), any floating dtype, any H, W >= 1.
            target: The same shape.
            weight: Must be None. Only here because BasicSR's pixel losses take one.

        Returns:
            A scalar; for reduction 'none', (N, C, H, W, 2) with the real and the imaginary part last.

        Raises:
            ValueError: the shapes differ or are not (N, C, H, W), or there is a weight.
        """
        if weight is not None:
            raise ValueError(
                'FFTLoss takes no element-wise weight: each frequency depends on every pixel. Leave weight out, or '
                'multiply pred and target by it first'
            )
        if pred.ndim != 4 or pred.shape != target.shape:
            raise ValueError(
                'FFTLoss needs pred and target of one shape (N, C, H, W), got '
                f'{tuple(pred.shape)} and {tuple(target.shape)}'
            )
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        # The transform is linear, so that of the difference does; it also loses no digits to the large F(0, 0).
        spectrum = torch.fft.fft2(pred.to(dtype) - target.to(dtype))
        return self.loss_weight * reduce_loss(torch.view_as_real(spectrum).abs(), self.reduction)
