"""LCoAN: the clusters of an image's tokens, their chunks, and the tokens that a pixel attends to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from attnsr.archs.lcoan_arch import FirstGroup, LCoAN
from attnsr.compare import ACCENT, GREY, PAPER
from attnsr.inspection.capture import watched
from attnsr.inspection.figures import MARGIN, NOTE, TICKS, TITLE, Page, fit, heat, mark, overview, pale, show
from attnsr.inspection.scene import Scene
from attnsr.ops import dispatch
from attnsr.ops.cluster_attention import Probabilities, SharedClusterAttention, assign_clusters
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Clustering', 'cluster_colours', 'draw_clusters', 'draw_tokens', 'examine']


@dataclass(frozen=True)
class Clustering:
    """How the tokens of a picture are clustered, sorted and attended to; N = h * w of them.

    Attributes:
        clusters: (rounds, h, w), int64: the cluster of each token.
        count: Clusters in a round.
        chunk_size: Tokens in a chunk.
        order: (N,), int64: the tokens, numbered row by row, as the first round sorts them.
        position: Where the pixel is in that order.
        weights: (h, w), float64: how much the pixel attends to each token, over all rounds and however often a chunk
            repeats a token; sums to 1.
        chunk: The pixel's chunk in the first round.
        seen: (h, w), int64: 0 for tokens that the pixel does not see in the first round, 1, 2 and 3 for those of the
            chunk before, of its own and of the chunk after; its own goes before the others, the one before goes before
            the one after.
    """

    clusters: np.ndarray
    count: int
    chunk_size: int
    order: np.ndarray
    position: int
    weights: np.ndarray
    chunk: int
    seen: np.ndarray

    @property
    def chunks(self) -> int:
        """Chunks of the picture."""
        return -(-len(self.order) // self.chunk_size)


def examine(net: LCoAN, scene: Scene) -> Clustering:
    """The clusters, chunks and attention that the first group finds and all groups use.

    Raises:
        UninitializedError: The network has no cluster centres.
    """
    height, width = scene.image.shape[:2]
    first = cast(FirstGroup, net.body[0])
    passed = watched(net, scene.tensor(next(net.parameters()).device), {0: first}).passed[0]
    _, _, e, centres = passed.inputs
    shared = cast(SharedClusterAttention, passed.output[1])
    attention = cast(Probabilities, shared.attention)
    with dispatch.backend('reference'), torch.no_grad():
        clusters = assign_clusters(e.permute(0, 2, 3, 1).reshape(-1, e.shape[1]), centres)
    rounds, size = centres.shape[0], shared.chunk_size
    token = scene.place[0] * width + scene.place[1]
    weights = torch.zeros(height * width, dtype=torch.float64)
    seen = torch.zeros(height * width, dtype=torch.int64)
    position = 0
    for number in range(rounds):
        # Sequences of all rounds, one after the other, in which the chunks of the circle are numbered through.
        sequence = attention.places.shape[1] - 2 * size
        at = int(attention.restore[number, token]) - number * sequence
        row = attention.probabilities[(number * sequence + at) // size, at % size].double().cpu()
        share = 1.0 if attention.weights is None else float(attention.weights[0, number, token, 0])
        start = at // size * size
        keys = attention.places[number, start : start + 3 * size].cpu()
        weights.index_add_(0, keys, share * row)
        if number == 0:
            position = at
            for part in (2, 0, 1):  # what is in several chunks counts for the last of these
                seen[keys[part * size : (part + 1) * size]] = part + 1
    order = attention.places[0, size : size + height * width].cpu()
    return Clustering(
        clusters.T.reshape(rounds, height, width).cpu().numpy(),
        centres.shape[1],
        size,
        order.numpy(),
        position,
        weights.view(height, width).numpy(),
        position // size,
        seen.view(height, width).numpy(),
    )


def cluster_colours(count: int) -> np.ndarray:
    """Colours for so many clusters, (count, 3) in [0, 1]: neighbours in number are far apart in hue."""
    number = np.arange(count)
    hue = 2 * np.pi * (number * (5**0.5 - 1) / 2 % 1)  # by the golden section
    lightness, chroma = np.array([0.56, 0.69, 0.82])[number % 3], np.array([0.13, 0.09])[number // 3 % 2]
    return oklab_to_rgb(np.stack((lightness, chroma * np.cos(hue), chroma * np.sin(hue)), 1))


def oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Oklab (Ottosson, A perceptual color space for image processing, 2020) to sRGB in [0, 1]: (..., 3) both."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_lms.T) ** 3 @ to_linear.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def draw_clusters(scene: Scene, found: Clustering, title: str) -> 'Figure':
    """The picture, its clusters in colours, and how large they are."""
    side, gap, bars = 4.6, 0.6, 1.9
    wide, tall = fit(scene.box, side)
    clusters = found.clusters[0]
    sizes = np.bincount(clusters.ravel(), minlength=found.count)
    used = int((sizes > 0).sum())
    rounds = f'; the first of {len(found.clusters)} rounds' if len(found.clusters) > 1 else ''
    lines = [
        scene.describe(),
        f'Each pixel is a token of the cluster whose centre its embedding is nearest to: {used} of {found.count} '
        f'clusters have tokens here{rounds}.',
    ]
    width = 2 * MARGIN + 0.45 + 2 * side + gap
    height = TITLE + NOTE + tall + TICKS + 0.3 + TITLE + bars + 0.75
    page = Page(width, Page.head(lines) + height, f'{title}: clusters', lines)
    x, top = MARGIN + 0.35, page.top + TITLE + NOTE
    overview(page, scene, x, top, side)
    colours = cluster_colours(found.count)
    own = clusters[scene.place]
    axes = page.axes(
        x + side + gap,
        top,
        wide,
        tall,
        'Clusters',
        f'a colour each, shaded by the picture; the pixel is in {own}',
    )
    # Light and dark of the picture on the colours, so that both are seen.
    shade = 0.5 + 0.6 * scene.grey[..., None]
    show(axes, (colours[clusters] * shade).clip(0, 1), scene.box)
    mark(axes, *scene.pixel)
    below = top + tall + TICKS + 0.3 + TITLE
    axes = page.axes(x + 0.3, below, 2 * side + gap - 0.3, bars, 'Tokens by cluster')
    by_size = np.argsort(-sizes, kind='stable')
    axes.bar(np.arange(used), sizes[by_size[:used]], width=0.85, color=colours[by_size[:used]])
    place = int(np.flatnonzero(by_size == own)[0])
    highest = max(sizes.max(), found.chunk_size) * 6
    axes.plot((place, place), (sizes[own] * 1.15, highest / 2.4), color=ACCENT, linewidth=1.2)
    axes.text(
        place, highest / 2, f'that of the pixel: {own}', ha='center' if place > 1 else 'left', fontsize=10, color=ACCENT
    )
    axes.axhline(found.chunk_size, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(
        used - 0.5, found.chunk_size, f'a chunk: {found.chunk_size} ', ha='right', va='bottom', fontsize=10, color=GREY
    )
    axes.set_yscale('log')
    axes.set_ylim(0.8, highest)
    axes.set_xlim(-0.8, used - 0.2)
    axes.set_xlabel('clusters that have tokens, from the largest to the smallest', color=GREY, fontsize=10.5)
    axes.set_ylabel('tokens', color=GREY, fontsize=10.5)
    axes.spines[['top', 'right']].set_visible(False)
    return page.figure


def draw_tokens(scene: Scene, found: Clustering, title: str) -> 'Figure':
    """What the pixel attends to, the chunks that it sees, and where these are in the sorted sequence."""
    side, gap, strip = 4.9, 1.3, 0.5
    wide, tall = fit(scene.box, side)
    weights = found.weights / found.weights.max()
    spread = float(np.exp(-(found.weights[found.weights > 0] * np.log(found.weights[found.weights > 0])).sum()))
    visible = int((found.seen > 0).sum())
    lines = [
        scene.describe(),
        f'Tokens are sorted by cluster and cut into {found.chunks} chunks of {found.chunk_size}; each attends to its '
        'own chunk, the one before and the one after.',
    ]
    width = 2 * MARGIN + 0.35 + 2 * side + gap + 0.4
    height = TITLE + NOTE + tall + TICKS + 0.3 + TITLE + NOTE + strip + 0.7
    page = Page(width, Page.head(lines) + height, f'{title}: what a pixel attends to', lines)
    x, top = MARGIN + 0.35, page.top + TITLE + NOTE
    rows, columns = np.nonzero(found.weights > 1e-4 * found.weights.max())
    axes = page.axes(
        x,
        top,
        wide,
        tall,
        f'Attention of pixel ({scene.pixel[0]}, {scene.pixel[1]})',
        f'largest {100 * found.weights.max():.2f} %, spread over {spread:.0f} of {visible} tokens',
    )
    show(axes, pale(scene.grey), scene.box)
    inches = wide / scene.box.width
    order = np.argsort(weights[rows, columns])
    rows, columns = rows[order], columns[order]
    # A token of the mean weight fills its pixel; areas are as weights, within what can be told apart.
    shares = (found.weights * visible)[rows, columns]
    area = (72 * inches) ** 2 * shares.clip(0.6, max(1, 160 / (72 * inches) ** 2))
    axes.scatter(
        columns + scene.box.left,
        rows + scene.box.top,
        s=area,
        c=weights[rows, columns],
        cmap=heat(),
        vmin=0,
        vmax=1,
        linewidths=0,
    )
    mark(axes, *scene.pixel, size=12)
    page.heat_bar(x + wide + 0.12, top, 0.14, tall)

    right = x + side + gap
    axes = page.axes(right, top, wide, tall, 'Chunks that it sees', _chunk_names(found))
    picture = pale(scene.grey)
    for part, colour in _CHUNKS.items():
        inside = found.seen == part
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        picture[inside] = 0.15 * picture[inside] + 0.85 * rgb
    show(axes, picture, scene.box)
    mark(axes, *scene.pixel, size=12)

    below = top + tall + TICKS + 0.3 + TITLE + NOTE
    axes = page.axes(
        x,
        below,
        right + side - x,
        strip,
        'The sorted sequence',
        'coloured by cluster; the chunks that are seen are framed',
    )
    _sequence(axes, found)
    return page.figure


# Of the chunk before, the pixel's own, and the one after.
_CHUNKS = {1: COLOURS[0], 2: COLOURS[1], 3: COLOURS[2]}


def _chunk_names(found: Clustering) -> str:
    before, after = (found.chunk - 1) % found.chunks, (found.chunk + 1) % found.chunks
    return f'own, {found.chunk}: vermilion; before, {before}: blue; after, {after}: green'


def _sequence(axes: 'Axes', found: Clustering) -> None:
    """The tokens in their sorted order as a strip, with its chunks."""
    clusters = found.clusters[0].ravel()[found.order]
    length = len(clusters)
    axes.imshow(
        cluster_colours(found.count)[clusters][None], extent=(0, length, 0, 1), aspect='auto', interpolation='nearest'
    )
    for chunk in range(1, found.chunks):
        axes.axvline(chunk * found.chunk_size, color=PAPER, linewidth=0.8)
    for part, offset in ((1, -1), (3, 1), (2, 0)):
        chunk = (found.chunk + offset) % found.chunks
        start, end = chunk * found.chunk_size, min((chunk + 1) * found.chunk_size, length)
        for line, colour in ((4.5, PAPER), (2.6, _CHUNKS[part])):
            axes.plot(
                (start, end, end, start, start), (0, 0, 1, 1, 0), color=colour, linewidth=line, clip_on=False, zorder=4
            )
    axes.plot(
        found.position + 0.5, 0.5, 'o', markersize=8, color=PAPER, markeredgecolor=ACCENT, markeredgewidth=1.8, zorder=5
    )
    axes.set_xlim(0, length)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel('position in the sequence', color=GREY, fontsize=10.5)
