"""ELAN: what a pixel attends to in its windows of three sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from attnsr.archs.arch_util import pad_by_reflection
from attnsr.archs.elan_arch import ELAB, ELAN, GMSA
from attnsr.inspection import windows
from attnsr.inspection.capture import watched
from attnsr.inspection.figures import MARGIN, NOTE, TICKS, TITLE, Page, fit, frame, mark, overview, show
from attnsr.inspection.scene import Scene
from attnsr.inspection.windows import Attended, attended
from attnsr.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['BlockAttention', 'blocks', 'draw', 'examine']

# Of the frames of windows, from the smallest size on.
FRAMES = COLOURS[4], COLOURS[2], COLOURS[0], COLOURS[3]


@dataclass(frozen=True)
class BlockAttention:
    """What a pixel attends to in a block.

    Attributes:
        block: Number of the block, from 0.
        shifted: Whether its windows are shifted, by half their side and round the borders.
        windows: For each window size, in the coordinates of the padded map.
    """

    block: int
    shifted: bool
    windows: list[Attended]


def blocks(net: ELAN) -> list[int]:
    """The first block, one in the middle with shifted windows, and the last."""
    last = len(net.body) - 1
    middle = min(last // 2 | 1, last)  # blocks of odd number are shifted
    return sorted({0, middle, last})


def examine(net: ELAN, scene: Scene, numbers: Sequence[int]) -> list[BlockAttention]:
    """What the scene's pixel attends to in some blocks: its rows of ``softmax(q q^T)`` in the block's first GMSA.

    The layers of a block that share attention attend in the same way.

    Args:
        net: In eval mode.
        scene: What it is shown.
        numbers: Of the blocks, from 0.
    """
    layers = {number: cast(GMSA, cast(ELAB, net.body[number]).modules_gmsa['gmsa_0']) for number in numbers}
    passed = watched(net, scene.tensor(next(net.parameters()).device), layers).passed
    return [
        BlockAttention(number, layers[number].shifted, attended(passed[number].output[1], scene.place))
        for number in numbers
    ]


def draw(net: ELAN, scene: Scene, found: Sequence[BlockAttention], title: str) -> 'Figure':
    """A row for each block, a column for each window size, beside the picture and its detail."""
    side, gap, left_width = 2.55, 0.62, 3.3
    row_height = TITLE + NOTE + side + TICKS + 0.2
    lines = [
        scene.describe(),
        'Each panel: softmax(q qᵀ) of the ringed pixel over its window. Shifted windows go on round the border.',
    ]
    columns = len(found[0].windows)
    width = 2 * MARGIN + left_width + gap + columns * (side + gap) + 0.7
    left_height = TITLE + NOTE + fit(scene.box, left_width)[1] + TICKS + 0.35
    height = max(len(found) * row_height, left_height + TITLE + NOTE + left_width + TICKS)
    page = Page(width, Page.head(lines) + height + MARGIN / 2, f'{title}: attention in windows', lines)

    padded = pad_by_reflection(scene.tensor(), net.multiple)[0].permute(1, 2, 0).numpy()
    x, top = MARGIN + 0.25, page.top + TITLE + NOTE
    whole = overview(page, scene, x, top, left_width)
    largest = found[0].windows[-1].view()
    box = windows.placed(largest, scene)
    frame(whole, box, COLOURS[0], 1.4)
    axes = page.axes(
        x, top + left_height, left_width, left_width, f'Windows of block {found[0].block}', 'blue frame in the picture'
    )
    show(axes, windows.cyclic(padded, largest), box)
    for window, colour in zip(found[0].windows, FRAMES, strict=False):
        frame(axes, windows.placed(window.corner, scene), colour)
    mark(axes, *scene.pixel)
    windows.draw_borders(axes, box, scene, padded.shape[:2])

    for row, block in enumerate(found):
        for column, window in enumerate(block.windows):
            left = x + left_width + gap + column * (side + gap)
            name = f'Block {block.block}, {window.size} x {window.size}' + ', shifted' * block.shifted
            windows.draw(page, left, top + row * row_height, side, name, window, padded, scene)
    page.heat_bar(page.width - MARGIN - 0.62, top, 0.16, side)
    return page.figure
