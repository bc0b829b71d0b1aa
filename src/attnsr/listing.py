"""What ``basicsr list`` shows: every published network with its size, its cost, its option file and its paper."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsr.archs.variants import SCALES, VARIANTS

__all__ = ['NOTES', 'OUTPUT', 'PUBLISHED_MACS', 'Entry', 'count_macs', 'entries', 'table']

#: Height and width of the output that multiply-accumulates are counted for; at x3 as much of it as LR pixels give.
OUTPUT = (720, 1280)

#: {variant: {scale: multiply-accumulates for that output, in units of 10^9}}, counted on the published networks.
PUBLISHED_MACS = {
    'elan': {2: 2311.8, 3: 1020.2, 4: 606.7},
    'elan_light': {2: 200.3, 3: 89.0, 4: 53.5},
    'dlgsanet': {2: 1121.5, 3: 498.9, 4: 282.1},
    'dlgsanet_light': {2: 178.0, 3: 79.7, 4: 45.4},
    'dlgsanet_tiny': {2: 135.1, 3: 60.6, 4: 34.7},
    'asid': {2: 77.8, 3: 35.7, 4: 20.8},
    'asid_d8': {2: 190.4, 3: 86.3, 4: 49.6},
    'lcoan': {4: 1058.5},
}

#: What there is to say about the columns of :func:`table`.
NOTES = """\
G MACs: 10^9 multiply-accumulates of the convolutions and matrix products, those of the attention included, for an
output of 1280 x 720 (1278 x 720 at x3). Published: the same, counted on the published networks.
- ELAN's stores its shifts as depthwise 3x3 convolutions, which are 1.8 % of its products (ELAN-light: 4.5 %). Here a
  shift multiplies nothing.
- DLGSANet's is counted without the overlap of the windows that it attends in. Here this is 0.5 to 1.2 %.
- ASID's projects before and after an attention that is shared. Here the two projections are one, which spares 2.4 %
  (ASID-D8: 3.4 %).
- LCoAN's is counted without its match convolutions that are never used; with them 1134.9."""


@dataclass(frozen=True)
class Entry:
    """One published network at one scale.

    Attributes:
        variant: As in :data:`attnsr.archs.variants.VARIANTS`.
        title: As the paper writes it.
        scale: The scale factor.
        parameters: How many parameters are trained.
        macs: Multiply-accumulates for an output of :data:`OUTPUT`, as :func:`count_macs` counts them.
        published_macs: The same on the published network, to 10^8; None where it is not known.
        option_file: Name of the option file that trains it, for ``-opt``.
        paper: Authors, venue and arXiv number.
    """

    variant: str
    title: str
    scale: int
    parameters: int
    macs: int
    published_macs: int | None
    option_file: str
    paper: str


def entries() -> list[Entry]:
    """All variants at all scales."""
    found = []
    for name, variant in VARIANTS.items():
        for scale in SCALES:
            with torch.device('meta'):  # shapes only: nothing is computed
                net = variant.build(scale)
            height, width = (side // scale for side in OUTPUT)
            published = PUBLISHED_MACS[name].get(scale)
            found.append(
                Entry(
                    variant=name,
                    title=variant.title,
                    scale=scale,
                    parameters=sum(parameter.numel() for parameter in net.parameters()),
                    macs=count_macs(net, height, width),
                    published_macs=None if published is None else round(published * 1e9),
                    option_file=f'{name}_x{scale}.yml',
                    paper=variant.paper,
                )
            )
    return found


def count_macs(net: nn.Module, height: int, width: int) -> int:
    """Multiply-accumulates of one inference: of convolutions and matrix products, those of the attention included.

    What is computed element by element (activations, norms, softmax, bilinear resizing) does not count, and neither
    does what a device without memory to spare computes again.

    Args:
        net: On the device ``'meta'``. Is in eval mode afterwards.
        height: Of the LR image.
        width: Of the LR image.
    """
    # With autograd the networks work on whole maps and keep what is used twice: what is counted is the mathematics.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        net.eval()(torch.empty(1, 3, height, width, device='meta'))
    return counter.get_total_flops() // 2


def table(rows: Sequence[Entry]) -> str:
    """The entries as plain text, one line each, below a line of titles and above :data:`NOTES`."""
    titles = ('network', 'scale', 'parameters', 'G MACs', 'published', 'option file', 'paper')
    cells = [
        (
            row.title,
            f'x{row.scale}',
            f'{row.parameters:,}',
            f'{row.macs / 1e9:.1f}',
            '-' if row.published_macs is None else f'{row.published_macs / 1e9:.1f}',
            row.option_file,
            row.paper,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [
        '  '.join(
            cell.rjust(width) if title in ('parameters', 'G MACs', 'published') else cell.ljust(width)
            for title, cell, width in zip(titles, line, widths, strict=True)
        ).rstrip()
        for line in (titles, *cells)
    ]
    lines.insert(1, '-' * max(map(len, lines)))
    return '\n'.join([*lines, '', NOTES])
