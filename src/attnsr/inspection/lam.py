"""Local attribution maps: which pixels of the picture the texture within a region of the result comes from.

Source: Gu and Dong, Interpreting Super-Resolution Networks with Local Attribution Maps (CVPR 2021, arXiv 2011.11036).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from attnsr.archs.arch_util import SRNetwork
from attnsr.compare import ACCENT, GREY
from attnsr.errors import UsageError
from attnsr.inspection.figures import MARGIN, NOTE, TICKS, TITLE, Page, fit, frame, heat_on_white, show
from attnsr.inspection.scene import Box, Scene
from attnsr.ops import dispatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    'SIDE',
    'SIGMA',
    'STEPS',
    'Attribution',
    'attribute',
    'blurred',
    'default_region',
    'detect',
    'diffusion_index',
    'draw',
    'examine',
    'gini',
]

#: As the authors' code has them: the side of the LR picture that the network is shown, the blur that the path begins
#: with and its steps; and the side of the region of the result.
SIDE, SIGMA, STEPS, REGION = 64, 1.2, 50, 16

# Under the root in the detector, for its derivative where neighbours are equal; SR values are about 1.
EPSILON = 1e-12

# Shares of the attribution that the area of contribution is drawn for, and the blur that makes an area of pixels.
SHARES, AREA_SIGMA = (0.95, 0.8, 0.5), 1.5


@dataclass(frozen=True)
class Attribution:
    """The local attribution map of a region.

    Attributes:
        scene: What the network was shown.
        region: In the coordinates of the whole LR picture.
        result: (s h, s w, 3), float32, RGB clipped to [0, 1]: what the network made of it.
        attribution: (h, w), float64: the attribution of each pixel, its channels added up, with its sign.
        change: What the detector sees in the result more than in that of the blurred picture. The attributions add up
            to it, were there infinitely many steps.
        steps: Of the path.
        sigma: Of the blur that the path begins with, in pixels.
    """

    scene: Scene
    region: Box
    result: np.ndarray
    attribution: np.ndarray
    change: float
    steps: int
    sigma: float

    @property
    def diffusion(self) -> float:
        """The diffusion index, from near 0 (a single pixel contributes) to 100 (all alike)."""
        return diffusion_index(self.attribution)

    @property
    def completeness(self) -> float:
        """The sum of the attributions over ``change``: near 1 where there are enough steps."""
        return float(self.attribution.sum() / self.change)


def default_region(net: SRNetwork, scene: Scene) -> Box:
    """The 16 x 16 pixels of the result round the scene's pixel, or the next larger region of whole LR pixels."""
    side = max(2, -(-REGION // net.upscale))
    left, top = (
        min(max(at - side // 2, first), first + length - side)
        for at, first, length in zip(
            scene.pixel, (scene.box.left, scene.box.top), (scene.box.width, scene.box.height), strict=True
        )
    )
    return Box(left, top, side, side)


def examine(
    net: SRNetwork,
    scene: Scene,
    region: Box,
    *,
    side: int = SIDE,
    steps: int = STEPS,
    sigma: float = SIGMA,
    advance: Callable[[], object] = lambda: None,
) -> Attribution:
    """The local attribution map of a region of the result.

    Args:
        net: In eval mode.
        scene: What it is shown is cut out of it, round the region.
        region: In the coordinates of the whole LR picture, at least 2 LR pixels wide and high, within the scene.
        side: Of what the network is shown, at most; at least that of the region.
        steps: See :func:`attribute`.
        sigma: See :func:`attribute`.
        advance: Called after each step, for a progress bar.

    Raises:
        UsageError: Nothing within the region changes on the path, as in a picture of a single colour.
    """
    cut = scene.cut(side, around=(region.left + region.width / 2, region.top + region.height / 2))
    local = Box(region.left - cut.box.left, region.top - cut.box.top, region.width, region.height)
    s = net.upscale
    target = Box(*(s * value for value in (local.left, local.top, local.width, local.height)))
    with dispatch.backend('reference'):
        attribution, change = attribute(net, cut.image, target, steps=steps, sigma=sigma, advance=advance)
        with torch.no_grad():
            result = net(cut.tensor(next(net.parameters()).device))[0].permute(1, 2, 0).cpu().float().numpy()
    signed = attribution.sum(2)
    if not np.isfinite(signed).all():
        raise UsageError('the network gives values that are no numbers: these weights cannot be looked into')
    if not np.abs(signed).sum():
        raise UsageError(f'region {region}: the picture has no texture there that could be attributed; choose another')
    return Attribution(cut, region, result.clip(0, 1), signed, change, steps, sigma)


def attribute(
    net: nn.Module,
    image: np.ndarray,
    target: Box,
    *,
    steps: int = STEPS,
    sigma: float = SIGMA,
    advance: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Path integrated gradients along progressive blurring.

    With F the network, D the detector and ``g(a) = blur of sigma (1 - a)`` of the picture I, a path from the blurred
    picture to I itself,

    ``LAM_i = integral from 0 to 1 of dD(F(g(a)))/dg(a)_i * dg(a)_i/da da``,

    here the sum over k of the gradient at ``g((k + 1/2) / m)`` times ``g((k + 1) / m) - g(k / m)``. (The authors' code
    takes the gradient at the end of each step; in the middle the error falls with the square of m.)

    Args:
        net: (1, 3, h, w) to (1, 3, s h, s w), in eval mode; its parameters gather no gradients.
        image: (h, w, 3), float32, RGB in [0, 1].
        target: The region of the result that D looks at.
        steps: m, at least 1.
        sigma: Of the first blur, in pixels.
        advance: Called after each step.

    Returns:
        attribution: (h, w, 3), float64.
        change: ``D(F(I)) - D(F(g(0)))``, what the attributions add up to for infinitely many steps.
    """
    parameter = next(net.parameters(), None)
    device = torch.device('cpu') if parameter is None else parameter.device
    wanted = [each.requires_grad for each in net.parameters()]
    net.requires_grad_(False)

    def as_input(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.transpose(2, 0, 1).astype(np.float32))[None].to(device)

    try:
        attribution = np.zeros(image.shape)
        before = blurred(image, sigma)
        with torch.no_grad():
            change = float(detect(net(as_input(image.astype(np.float64))), target)) - float(
                detect(net(as_input(before)), target)
            )
        for step in range(steps):
            x = as_input(blurred(image, sigma * (1 - (step + 0.5) / steps))).requires_grad_()
            (gradient,) = torch.autograd.grad(detect(net(x), target), x)
            after = blurred(image, sigma * (1 - (step + 1) / steps))
            attribution += gradient[0].permute(1, 2, 0).double().cpu().numpy() * (after - before)
            before = after
            advance()
    finally:
        for each, wants in zip(net.parameters(), wanted, strict=True):
            each.requires_grad_(wants)
    return attribution, change


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """The picture (h, w, 3) after a Gaussian of this standard deviation, reflected at the borders; float64."""
    return ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode='mirror')


def detect(result: Tensor, target: Box) -> Tensor:
    """The gradient detector D: how much texture there is in a region of a result.

    The sum over pixels and channels of ``sqrt(dy^2 + dx^2)``, the differences to the pixel below and to the one on the
    right; the last row and column of the result have none.

    Args:
        result: (1, 3, H, W).
        target: At least 1 pixel wide and high.
    """
    down = result[:, :, :-1, :-1] - result[:, :, 1:, :-1]
    right = result[:, :, :-1, :-1] - result[:, :, :-1, 1:]
    strength = (down.square() + right.square() + EPSILON).sqrt()
    within = strength[:, :, target.top : target.top + target.height, target.left : target.left + target.width]
    return within.sum(dtype=torch.float64)


def gini(values: np.ndarray) -> float:
    """The Gini coefficient of values that are not negative: 0 where they are equal, (n - 1) / n where one is not 0.

    ``sum_i sum_j |g_i - g_j| / (2 n^2 mean(g))``, computed as ``sum_i (2 i - n - 1) g_i / (n sum(g))`` from the sorted
    values.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    n = len(ordered)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * ordered.sum()))


def diffusion_index(attribution: np.ndarray) -> float:
    """``(1 - G) * 100`` with G the Gini coefficient of the absolute attributions: larger where more pixels take part.

    It compares networks by the same picture, region, and size of what they are shown.
    """
    return 100 * (1 - gini(np.abs(attribution)))


def draw(found: Attribution, title: str) -> 'Figure':
    """The LR picture, the result, the attribution and the area of contribution, side by side, with the index."""
    side, gap = 3.3, 0.55
    box, s = found.scene.box, found.result.shape[0] // found.scene.image.shape[0]
    wide, tall = fit(box, side)
    lines = [
        found.scene.describe(),
        f'Region {found.region}, {s * found.region.width} x {s * found.region.height} in the result. Path: blur of '
        f'{found.sigma:g} pixels to none in {found.steps} steps; the attributions add up to '
        f'{100 * found.completeness:.1f} % of the change.',
    ]
    width = 2 * MARGIN + 0.25 + 4 * side + 3 * gap + 0.95
    page = Page(
        width,
        Page.head(lines) + TITLE + NOTE + tall + TICKS + MARGIN,
        f'{title}: local attribution map',
        lines,
    )
    page.text(width - MARGIN, MARGIN + 0.26, f'{found.diffusion:.1f}', size=34, weight='bold', color=ACCENT, ha='right')
    page.text(width - MARGIN, MARGIN + 0.72, 'diffusion index', size=11.5, color=GREY, ha='right')
    x, top = MARGIN + 0.25, page.top + TITLE + NOTE
    lefts = [x + number * (side + gap) for number in range(4)]

    axes = page.axes(lefts[0], top, wide, tall, 'LR picture', 'framed: the region')
    show(axes, found.scene.image, box)
    frame(axes, found.region)

    axes = page.axes(lefts[1], top, wide, tall, f'Result, x{s}', 'in LR coordinates')
    show(axes, found.result, box)
    frame(axes, found.region)

    strength = np.abs(found.attribution)
    relative = strength / strength.max()
    ordered = np.sort(strength, axis=None)[::-1].cumsum()
    half = int(np.searchsorted(ordered, ordered[-1] / 2)) + 1
    axes = page.axes(lefts[2], top, wide, tall, 'Attribution', f'half of it lies on {half} of {strength.size} pixels')
    show(axes, np.cbrt(relative), box, cmap=heat_on_white(), vmin=0, vmax=1)
    frame(axes, found.region)

    names = ', '.join(f'{100 * share:.0f}' for share in SHARES[::-1])
    axes = page.axes(lefts[3], top, wide, tall, 'Area of contribution', f'{names} % of it lie within')
    show(axes, 0.35 + 0.65 * found.scene.image, box)
    density = ndimage.gaussian_filter(strength, AREA_SIGMA, mode='constant')
    levels = sorted({_threshold(density, share) for share in SHARES})
    rows, columns = np.arange(box.height) + box.top, np.arange(box.width) + box.left
    shades = heat_on_white()(np.linspace(0.35, 0.85, len(levels)))
    axes.contourf(columns, rows, density, [*levels, 2 * density.max()], colors=shades, alpha=0.62)
    axes.contour(columns, rows, density, levels, colors=shades, linewidths=1.3)
    frame(axes, found.region)

    page.colour_bar(
        lefts[3] + wide + 0.2,
        top,
        0.16,
        tall,
        heat_on_white(),
        (0, 1),
        '|attribution| / largest',
        labels=['0', '0.016', '0.13', '0.42', '1'],
    )
    return page.figure


def _threshold(density: np.ndarray, share: float) -> float:
    """The value that the densest pixels which hold this share of all are above."""
    ordered = np.sort(density, axis=None)[::-1]
    return float(ordered[min(np.searchsorted(ordered.cumsum(), share * ordered.sum()), len(ordered) - 1)])
