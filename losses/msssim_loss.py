"""Multi-scale structural similarity as a loss (Wang, Simoncelli and Bovik, Asilomar 2003)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

REDUCTIONS = ('none', 'mean')

# (K1 L)^2 and (K2 L)^2 for K1 = 0.01, K2 = 0.03 and the data range L = 1.
C1, C2 = 0.01**2, 0.03**2

# Below this a factor's power, whose slope grows without bound towards 0, gives way to a straight line. Only images
# with nothing in common get there: black against white, for one, has the luminance C1 / (1 + C1).
FLOOR = 1e-4


@LOSS_REGISTRY.register()
class MSSSIMLoss(nn.Module):
    """``loss_weight`` times 1 - MS-SSIM, of images in [0, 1].

    Wang, Simoncelli and Bovik, Multi-scale Structural Similarity for Image Quality Assessment (Asilomar 2003,
    section 3.1; the weights from 3.2), for each image and channel, with M scales::

        MS-SSIM = x_1^w_1 x_2^w_2 ... x_M^w_M    x_j = mean(c s) at scale j < M,    x_M = mean(l c s) at scale M

    Scale 1 is the image, each next one the mean of 2 x 2 blocks of the one before (an odd last row or column is
    dropped). The luminance l and the contrast and structure c s are those of SSIM with K1 = 0.01, K2 = 0.03 and the
    data range 1, under a Gaussian window; the mean is over all positions where the window lies within the image.

    Where images are negatively correlated a factor x_j is below 0 and its power has no value, and at 0 it has an
    infinite slope. So a factor below ``FLOOR`` = 1e-4 counts as ``FLOOR``, and the loss rises by w_j (``FLOOR`` - x_j)
    instead: values and gradients are finite everywhere, and training can leave such a place.

    Args:
        loss_weight: Factor on the loss, finite and at least 0.
        window_size: Side of the Gaussian window in pixels, odd and at least 3.
        sigma: Its standard deviation in pixels.
        weights: The exponents w, finest scale first, one for each scale; fewer of them make fewer scales. They are
            divided by their sum (the paper's five have the sum 1.0001).
        reduction: 'mean' over images and channels, or 'none'.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
    """

    weights: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        weights: Sequence[float] = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333),
        reduction: str = 'mean',
    ) -> None:
        super().__init__()
        if not 0 <= loss_weight < math.inf:
            raise ValueError(f'loss_weight must be a finite number of at least 0, got {loss_weight}')
        if window_size < 3 or window_size % 2 != 1:
            raise ValueError(f'window_size must be odd and at least 3, got {window_size}')
        if not 0 < sigma < math.inf:
            raise ValueError(f'sigma must be a finite number greater than 0, got {sigma}')
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f'weights must be finite numbers greater than 0, one for each scale, at least one; got {list(weights)}'
            )
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be one of {", ".join(REDUCTIONS)}, got {reduction!r}')
        self.loss_weight, self.reduction = loss_weight, reduction
        offsets = torch.arange(window_size, dtype=torch.float64) - window_size // 2
        window = torch.exp(-(offsets**2) / (2 * sigma**2))
        exponents = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer('window', window / window.sum(), persistent=False)
        self.register_buffer('weights', exponents / exponents.sum(), persistent=False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss, in float32 or, where either image is, in float64.

        Args:
            pred: (N, C, H, W), any floating dtype, in [0, 1]; a network's output may lie a little outside. H and W
                are at least ``window_size * 2 ** (len(weights) - 1)``, 176 by default.
            target: The same shape.

        Returns:
            A scalar; for reduction 'none', (N, C). 0 for equal images, below ``loss_weight`` where MS-SSIM has a
            value, and up to twice that where images in [0, 1] are negatively correlated.

        Raises:
            ValueError: the shapes differ or are not (N, C, H, W), or the images are too small.
        """
        if pred.ndim != 4 or pred.shape != target.shape:
            raise ValueError(
                'MSSSIMLoss needs pred and target of one shape (N, C, H, W), got '
                f'{tuple(pred.shape)} and {tuple(target.shape)}'
            )
        self._check_size(*pred.shape[2:])
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        # Variances are small differences of large numbers: half precision loses them.
        with torch.autocast(pred.device.type, enabled=False):
            factors = self._factors(pred.to(dtype), target.to(dtype))
            weights = self.weights.to(dtype)[:, None, None]
            similarity = factors.clamp(min=FLOOR).pow(weights).prod(0)
            loss = 1 - similarity + (weights * F.relu(FLOOR - factors)).sum(0)
            return self.loss_weight * (loss.mean() if self.reduction == 'mean' else loss)

    def _check_size(self, height: int, width: int) -> None:
        scales, window_size = len(self.weights), len(self.window)
        least = window_size * 2 ** (scales - 1)
        if min(height, width) >= least:
            return
        fitting = (min(height, width) // window_size).bit_length()
        advice = f'at most {fitting} of the weights' if fitting else 'one weight and a smaller window_size'
        raise ValueError(
            f'MSSSIMLoss with {scales} weights (scales) and window_size {window_size} needs images of at least '
            f'{least} x {least} pixels, got {height} x {width}: use larger images, or {advice}'
        )

    def _factors(self, x: Tensor, y: Tensor) -> Tensor:
        """The means that are raised to the weights, finest scale first: (scales, N, C)."""
        factors = []
        for scale in range(len(self.weights)):
            if scale > 0:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            means = self._blur(torch.cat((x, y, x * x, y * y, x * y), 1))
            mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.chunk(5, 1)
            square_x, square_y, product = mean_x**2, mean_y**2, mean_x * mean_y
            similarity = (2 * (mean_xy - product) + C2) / (mean_xx - square_x + mean_yy - square_y + C2)
            if scale == len(self.weights) - 1:
                similarity = similarity * (2 * product + C1) / (square_x + square_y + C1)
            factors.append(similarity.mean((2, 3)))
        return torch.stack(factors)

    def _blur(self, maps: Tensor) -> Tensor:
        """The Gaussian window's mean at every position where it lies within the maps."""
        channels = maps.shape[1]
        window = self.window.to(maps.dtype).expand(channels, 1, 1, -1)
        maps = F.conv2d(maps, window, groups=channels)
        return F.conv2d(maps, window.transpose(2, 3), groups=channels)
