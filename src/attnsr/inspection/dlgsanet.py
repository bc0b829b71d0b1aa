"""DLGSANet: the kernels that it predicts along an edge, and how sparse its global attention is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from attnsr.archs.arch_util import ChannelAttention
from attnsr.archs.dlgsanet_arch import RHDTG, DLGSANet, GlobalLayer, LocalLayer
from attnsr.compare import ACCENT, GREY, INK, PAPER
from attnsr.inspection.capture import Passed, watched
from attnsr.inspection.figures import MARGIN, NOTE, TICKS, TITLE, Page, diverging, fit, frame, overview, positive, show
from attnsr.inspection.scene import Box, Scene, gradient
from attnsr.ops import dispatch
from attnsr.ops.channel_attention.reference import attention
from attnsr.ops.separable_conv import separable_conv
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'LayerKernels',
    'LayerSparsity',
    'draw_kernels',
    'draw_sparsity',
    'edge_points',
    'examine_kernels',
    'examine_sparsity',
    'layers',
]

# Points along the edge, and how many pixels they are apart.
POINTS, STEP = 7, 5

# How many kernels of a layer are drawn beside those of others, and of a layer alone.
SHOWN, ALONE = 2, 6


@dataclass(frozen=True)
class LayerKernels:
    """The kernels that a layer predicts at some pixels.

    Attributes:
        layer: Number of the pair of a local and a global layer, from 0 through all groups.
        taps: (pixels, kernels, K, K), float32; each kernel serves ``sharing`` channels, one after the other.
        sharing: How many channels share a kernel.
    """

    layer: int
    taps: np.ndarray
    sharing: int

    def variation(self, kernel: int) -> float:
        """How much a kernel varies: the standard deviation of its taps over the pixels over their size, both RMS."""
        taps = self.taps[:, kernel]
        return float(np.sqrt(np.square(taps.std(0)).mean() / np.square(taps).mean()))

    def most_varied(self, count: int) -> list[int]:
        """The kernels that differ most from pixel to pixel, see :meth:`variation`."""
        varied = [self.variation(kernel) for kernel in range(self.taps.shape[1])]
        return sorted(int(kernel) for kernel in np.argsort(varied, kind='stable')[::-1][:count])


@dataclass(frozen=True)
class LayerSparsity:
    """The zeros that the ReLU leaves in a layer's attention between channels.

    Attributes:
        layer: Number of the pair of a local and a global layer, from 0 through all groups.
        by_head: (heads,), float64: the share of zeros in A, over all windows.
        matrices: (heads, c, c), float32: A of the window that the pixel is in, the first of them; ``y = A v``.
    """

    layer: int
    by_head: np.ndarray
    matrices: np.ndarray

    @property
    def share(self) -> float:
        """The share of zeros over all heads."""
        return float(self.by_head.mean())


def layers(net: DLGSANet) -> list[tuple[LocalLayer, GlobalLayer]]:
    """The pairs of layers of all groups."""
    pairs: list[tuple[LocalLayer, GlobalLayer]] = []
    for group in net.deep_feature_extraction:
        if isinstance(group, RHDTG):
            body = list(group.body)[:-1]
            pairs += [(cast(LocalLayer, a), cast(GlobalLayer, b)) for a, b in zip(body[::2], body[1::2], strict=True)]
    return pairs


def edge_points(luma: np.ndarray, place: tuple[int, int], count: int = POINTS, step: int = STEP) -> np.ndarray:
    """Pixels along the edge that runs through a pixel, which is among them.

    From the pixel a path goes both ways at right angles to the gradient, a pixel at a time, and keeps to where across
    it the gradient is largest. It ends at the border, and then goes on further at its other end.

    Args:
        luma: (h, w).
        place: (row, column) of the pixel.
        count: How many pixels at most, odd.
        step: How many pixels apart.

    Returns:
        (n, 2), int64: row and column of each, in order along the edge, which begins further left than it ends.
    """
    down, right = gradient(luma)
    strength = np.hypot(down, right)

    def sample(field: np.ndarray, at: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(field, np.atleast_2d(at).T, order=1, mode='nearest')

    def normal(at: np.ndarray) -> np.ndarray:
        vector = np.array([sample(down, at)[0], sample(right, at)[0]], np.float64)
        length = float(np.hypot(*vector))
        return vector / length if length > 1e-9 else np.array([1.0, 0.0])

    def walk(sign: int) -> list[tuple[int, int]]:
        at = np.array(place, np.float64)
        tangent = sign * normal(at)[::-1] * (1, -1)
        found = []
        for steps in range(1, step * (count - 1) + 1):
            at = at + tangent
            across = normal(at)
            near = at + np.linspace(-1, 1, 9)[:, None] * across
            # Of equals the nearest, so that where there is no edge the path is straight.
            at = near[np.argmax(sample(strength, near) - 1e-6 * np.abs(np.linspace(-1, 1, 9)))]
            if (at < 0).any() or (at > np.array(luma.shape) - 1).any():
                break
            turned = normal(at)[::-1] * (1, -1)
            tangent = turned if turned @ tangent >= 0 else -turned
            if steps % step == 0:
                found.append((round(float(at[0])), round(float(at[1]))))
        return found

    before, after = walk(-1), walk(1)
    # Half of them on either side, or more where the other side has fewer.
    left_over = max(0, count // 2 - len(before)), max(0, count // 2 - len(after))
    points = [*reversed(before[: count // 2 + left_over[1]]), place, *after[: count // 2 + left_over[0]]]
    points = list(dict.fromkeys(points))
    return np.array(points if points[0][1] <= points[-1][1] else points[::-1], np.int64)


def examine_kernels(net: DLGSANet, scene: Scene, numbers: Sequence[int], points: np.ndarray) -> list[LayerKernels]:
    """The kernels that some layers predict at some pixels.

    ``y[c, h, w] = sum_ij k[g(c), i, j, h, w] u[c, h + i - 3, w + j - 3]``; see ``ops/dynamic_conv``.

    Args:
        net: In eval mode.
        scene: What it is shown.
        numbers: Of the layers, see :func:`layers`.
        points: (n, 2), int64: row and column of the pixels.
    """
    pairs = layers(net)
    modules = {number: pairs[number][0].IDynamicDWConv.conv for number in numbers}
    passed = watched(net, scene.tensor(next(net.parameters()).device), modules).passed
    found = []
    for number, module in modules.items():
        u = passed[number].inputs[0]
        with torch.no_grad():
            # All pixels' features, but only the kernels of the points.
            k = module.conv2(module.conv1(u)[:, :, points[:, 0], points[:, 1]][..., None])
        taps = k[0, :, :, 0].T.unflatten(1, (-1, module.kernel_size, module.kernel_size))
        found.append(LayerKernels(number, taps.cpu().numpy(), u.shape[1] // taps.shape[1]))
    return found


def examine_sparsity(net: DLGSANet, scene: Scene) -> list[LayerSparsity]:
    """The zeros in ``A = ReLU(temperature q k^T)`` of every global layer, in the windows of eval mode (TLC)."""
    modules = {number: pair[1].restormer_attn for number, pair in enumerate(layers(net))}
    passed = watched(net, scene.tensor(next(net.parameters()).device), modules).passed
    return [_sparsity(number, modules[number], passed[number], scene.place) for number in modules]


def _sparsity(number: int, module: ChannelAttention, passed: Passed, place: tuple[int, int]) -> LayerSparsity:
    x, norm, _, size = passed.inputs
    with torch.no_grad(), dispatch.backend('reference'):
        qkv = separable_conv(x, norm.weight, norm.bias, norm.eps, module.qkv.weight, module.qkv_dwconv.weight)
        corners = list(product(*(window_starts(side, size) for side in qkv.shape[2:])))
        all_a = [
            channel_matrices(qkv[0, :, top : top + size, left : left + size], module.temperature, module.heads)
            for top, left in corners
        ]
    zeros = torch.stack([(a == 0).double().mean((1, 2)) for a in all_a]).mean(0)
    inside = next(
        number
        for number, corner in enumerate(corners)
        if all(0 <= at - first < size for at, first in zip(place, corner, strict=True))
    )
    return LayerSparsity(number, zeros.cpu().numpy(), all_a[inside].cpu().numpy())


def window_starts(side: int, size: int) -> list[int]:
    """Where windows of ``size`` begin along a side, see ``ops/channel_attention``, layout 'overlapping'."""
    count = math.ceil(side / size)
    step = math.ceil((side - size) / (count - 1)) if count > 1 else 0
    return [min(number * step, side - size) if count > 1 else 0 for number in range(count)]


def channel_matrices(qkv: Tensor, temperature: Tensor, heads: int) -> Tensor:
    """A of a window's (3C, h, w): (heads, c, c), by letting the network's own operation attend to unit vectors."""
    channels = qkv.shape[0] // 3
    c = channels // heads
    tokens = qkv.flatten(1).T
    # Tokens of 0 change neither the norms nor the products of the others.
    tokens = nn.functional.pad(tokens, (0, 0, 0, max(0, c - len(tokens)))).clone()
    tokens[:, 2 * channels :] = torch.eye(len(tokens), c, dtype=tokens.dtype, device=tokens.device).repeat(1, heads)
    y = attention(tokens[None], temperature, 'relu', heads, None)[0, :c]  # [j, head * c + i] is A[head, i, j]
    return y.unflatten(1, (heads, c)).permute(1, 2, 0)


def draw_kernels(scene: Scene, points: np.ndarray, found: Sequence[LayerKernels], title: str) -> 'Figure':
    """The kernels of each layer that vary most, beside the picture: a column for each point, two rows for each kernel.

    The first row has the kernels, the second what they have more or less than their mean over the points.
    """
    size = found[0].taps.shape[-1]
    tile, gap, left_width, label = 0.84, 0.08, 3.5, 2.0
    rows = [(layer, kernel) for layer in found for kernel in layer.most_varied(SHOWN if len(found) > 1 else ALONE)]
    changing = len(points) > 1
    lines = [
        scene.describe(),
        f'Every pixel has {size} x {size} kernels of its own: of each layer those that vary most along the edge, and '
        'their change. Colours are relative to the largest of a row.',
    ]
    left_height = TITLE + NOTE + fit(scene.box, left_width)[1] + TICKS + 0.35
    height = max(
        0.45 + ((1 + changing) * len(rows) + 1) * (tile + gap) + len(rows) * 0.16,
        left_height + TITLE + NOTE + left_width + TICKS,
    )
    width = 2 * MARGIN + 0.25 + left_width + label + 0.35 + POINTS * (tile + gap) + 0.85
    page = Page(width, Page.head(lines) + height + MARGIN / 2, f'{title}: predicted kernels along an edge', lines)
    x, top = MARGIN + 0.25, page.top + TITLE + NOTE
    at = points[:, ::-1] + (scene.box.left, scene.box.top)
    whole = overview(page, scene, x, top, left_width)
    around = _around(at, size, scene.box)
    frame(whole, around, COLOURS[0], 1.4)
    detail = page.axes(
        x, top + left_height, left_width, left_width * around.height / around.width, 'The edge', 'blue frame above'
    )
    show(detail, scene.image, scene.box)
    detail.set_xlim(around.left - 0.5, around.left + around.width - 0.5)
    detail.set_ylim(around.top + around.height - 0.5, around.top - 0.5)
    _points(detail, at, scene)

    first = x + left_width + 0.35 + label
    top = page.top + 0.35
    page.text(first - 0.15, top + tile / 2, f'picture,\n{size} x {size} pixels', ha='right', color=GREY, size=10)
    for number, (column, row) in enumerate(at):
        axes = page.axes(first + number * (tile + gap), top, tile, tile)
        page.text(first + number * (tile + gap) + tile / 2, top - 0.14, f'{number + 1}', ha='center', weight='bold')
        near = Box(int(column) - size // 2, int(row) - size // 2, size, size)
        show(axes, _patch(scene, near), near, ticks=False)
    y = top + tile + gap
    for layer, kernel in rows:
        y += 0.16
        taps = layer.taps[:, kernel]
        changes = taps - taps.mean(0)
        channels = f'channels {kernel * layer.sharing} to {(kernel + 1) * layer.sharing - 1}'
        drawn = [
            (taps, f'layer {layer.layer}, kernel {kernel}', channels),
            (changes, 'less the mean', f'varies by {100 * layer.variation(kernel):.0f} %'),
        ]
        for values, name, note in drawn[: 1 + changing]:
            limit = max(float(np.abs(values).max()), 1e-12)
            kept = values is taps
            page.text(
                first - 0.15,
                y + tile / 2 - 0.2,
                name,
                ha='right',
                weight='bold' if kept else 'normal',
                size=11 - (not kept),
            )
            for line, words in enumerate((note, f'largest {limit:.2g}')):
                page.text(first - 0.15, y + tile / 2 + 0.01 + 0.2 * line, words, ha='right', color=GREY, size=10)
            for number, each in enumerate(values):
                axes = page.axes(first + number * (tile + gap), y, tile, tile)
                axes.set_label(f'layer {layer.layer}, kernel {kernel}, point {number + 1}' + ', change' * (not kept))
                show(axes, each / limit, Box(0, 0, size, size), ticks=False, cmap=diverging(), vmin=-1, vmax=1)
            y += tile + gap
    page.colour_bar(
        first + len(points) * (tile + gap) + 0.12,
        top + tile + gap + 0.16,
        0.16,
        4 * tile + 3 * gap + 0.16,
        diverging(),
        (-1, 1),
        'tap / largest of the row',
    )
    return page.figure


def draw_sparsity(net: DLGSANet, scene: Scene, found: Sequence[LayerSparsity], title: str) -> 'Figure':
    """Bars of the share of zeros by layer, and the matrices of the least and of the most sparse layer."""
    heads, c = found[0].matrices.shape[:2]
    groups = sum(isinstance(group, RHDTG) for group in net.deep_feature_extraction)
    in_group = len(found) // groups
    lines = [
        scene.describe(),
        'Share of zeros in A = ReLU(t q kᵀ), which attends between the channels of a head; windows of '
        f'{layers(net)[0][1].tlc_size} pixels, all of the picture.',
    ]
    width, bars, gap = 12.4, 3.3, 0.24
    x = MARGIN + 0.65
    tile = min((width - x - MARGIN + gap) / heads, 2) - gap
    page = Page(width, Page.head(lines) + 0.35 + bars + 0.95 + 2 * (tile + 0.85) + 0.3, f'{title}: sparsity', lines)
    top = page.top + 0.4
    axes = page.axes(x, top, width - x - MARGIN, bars, 'Zeros by layer', 'bars: all heads; dots: each head')
    numbers = [layer.layer for layer in found]
    colours = [COLOURS[0] if number // in_group % 2 == 0 else COLOURS[5] for number in numbers]
    axes.bar(numbers, [100 * layer.share for layer in found], width=0.72, color=colours, zorder=2)
    for layer in found:
        spread = np.linspace(-0.24, 0.24, heads) if heads > 1 else np.zeros(1)
        axes.plot(
            layer.layer + spread,
            100 * layer.by_head,
            'o',
            markersize=4,
            color=PAPER,
            markeredgecolor=INK,
            markeredgewidth=0.9,
            zorder=3,
        )
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.set_xticks(numbers)
    axes.set_xlabel(f'layer; colours alternate by group of {in_group}', color=GREY, fontsize=10.5)
    axes.set_ylabel('zeros, %', color=GREY, fontsize=10.5)
    axes.grid(axis='y', alpha=0.3, zorder=0)
    axes.spines[['top', 'right']].set_visible(False)

    least, most = min(found, key=lambda layer: layer.share), max(found, key=lambda layer: layer.share)
    top += bars + 1.25
    for layer, which in ((least, 'least sparse'), (most, 'sparsest')):
        page.text(
            x,
            top - 0.42,
            f'Layer {layer.layer}, the {which}: A in the window of the pixel, white is 0',
            weight='bold',
            size=12,
        )
        for head, matrix in enumerate(layer.matrices):
            left = x + head * (tile + gap)
            axes = page.axes(left, top, tile, tile, '', f'head {head}, {100 * (matrix == 0).mean():.0f} % zeros')
            above = np.ma.masked_equal(matrix, 0)
            show(axes, above, Box(0, 0, c, c), ticks=False, cmap=positive(), vmin=0, vmax=max(matrix.max(), 1e-12))
        top += tile + 0.85
    page.text(
        x,
        top - 0.55,
        'Columns are channels of k and v, rows those of q and y; each head by its own largest value.',
        color=GREY,
        size=10,
    )
    return page.figure


def _around(at: np.ndarray, size: int, within: Box) -> Box:
    """A square round points (x, y) and their kernels, within the picture as far as it reaches."""
    low, high = at.min(0) - size // 2 - 1, at.max(0) + size // 2 + 1
    side = int((high - low).max()) + 1
    side = min(side, max(within.width, within.height))
    left, top = (
        int(min(max((a + b + 1 - side) // 2, first), max(first + length - side, first)))
        for a, b, first, length in zip(low, high, (within.left, within.top), (within.width, within.height), strict=True)
    )
    return Box(left, top, side, side)


def _points(axes: 'Axes', at: np.ndarray, scene: Scene) -> None:
    """Numbered points, joined by a line."""
    axes.plot(at[:, 0], at[:, 1], color=PAPER, linewidth=2.6, solid_capstyle='round')
    axes.plot(at[:, 0], at[:, 1], color=ACCENT, linewidth=1.3, solid_capstyle='round')
    for number, (x, y) in enumerate(at):
        axes.plot(x, y, 'o', markersize=13, color=PAPER, markeredgecolor=ACCENT, markeredgewidth=1.4)
        axes.text(x, y, f'{number + 1}', size=8.5, weight='bold', color=INK, ha='center', va='center_baseline')


def _patch(scene: Scene, box: Box) -> np.ndarray:
    """What a box has of the scene; outside it is white."""
    rows = np.arange(box.top, box.top + box.height) - scene.box.top
    columns = np.arange(box.left, box.left + box.width) - scene.box.left
    height, width = scene.image.shape[:2]
    patch = scene.image[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)].copy()
    patch[(rows < 0) | (rows >= height)] = 1
    patch[:, (columns < 0) | (columns >= width)] = 1
    return patch
