"""`basicsr inspect`: what it is asked, and the files it writes."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from attnsr import plot
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.asid_arch import ASID
from attnsr.archs.dlgsanet_arch import DLGSANet
from attnsr.archs.elan_arch import ELAN
from attnsr.archs.lcoan_arch import LCoAN, UninitializedError
from attnsr.archs.state_dicts import identify
from attnsr.data_prep.lmdb_dataset import write_errors
from attnsr.errors import UsageError
from attnsr.inference import choose_device
from attnsr.inspection import asid, dlgsanet, elan, figures, lam, lcoan, scene
from attnsr.inspection.scene import Box, Scene
from attnsr.weights import load_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['EPILOG', 'add_arguments', 'run']

#: Side in pixels of what the network is shown at most. LCoAN keeps 1152 numbers for each pixel of it.
SIZE = 192

EPILOG = """\
examples:
  basicsr inspect -w elan_light_x4.pth picture.png
  basicsr inspect -w net_g_latest.pth picture.png --pixel 120,64 --what attention
  basicsr inspect -w asid_x4.pth picture.png --what lam --region 116,60,4,4

The network is recognised from the file. The figures, besides lam (local attribution map, Gu and Dong 2021):
  ELAN      windows               what the pixel attends to in windows of three sizes
  DLGSANet  kernels, sparsity     predicted kernels along the edge through the pixel; zeros after the ReLU by layer
  ASID      maps, distillation    the maps that all groups share; the distilled channels
  LCoAN     clusters, tokens      clusters of the picture; the tokens that the pixel attends to, and its chunks
They go to DIR/PICTURE_NETWORK_WHAT.png. Pixels are counted from 0, from the upper left of the picture, which is the LR
picture that the network enlarges. (Needs matplotlib: pip install 'attnsr[plot]'.)
"""

#: What is asked of all networks: all figures of the network's own, and these with the local attribution map.
ATTENTION, LAM, ALL = 'attention', 'lam', 'all'

Draw = Callable[[Any, Scene, int | None, str], 'Figure']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `basicsr inspect`."""
    parser.add_argument('image', type=Path, metavar='IMAGE', help='the LR picture, 8 bits a channel')
    parser.add_argument(
        '-w', '--weights', required=True, metavar='FILE', help='checkpoint, or a training, whose newest one is taken'
    )
    parser.add_argument('--network', metavar='NAME', help='what the weights are of; default: recognised from the file')
    parser.add_argument(
        '-o', '--output', type=Path, default=Path('inspection'), metavar='DIR', help='default: ./inspection'
    )
    parser.add_argument(
        '--what',
        nargs='+',
        default=[ALL],
        metavar='WHAT',
        help=f"figures by name; {ATTENTION}: all of the network's own; {ALL}, the default: these and {LAM}",
    )
    parser.add_argument(
        '--pixel', type=_integers(2), metavar='X,Y', help='which pixel; default: where the strongest edge is'
    )
    parser.add_argument(
        '--block',
        type=int,
        metavar='N',
        help="ELAN's block, DLGSANet's layer, ASID's group, from 0; default: a few telling ones",
    )
    parser.add_argument(
        '--size',
        type=int,
        default=SIZE,
        metavar='N',
        help=f'larger pictures are cut to N x N pixels around the pixel; default: {SIZE}',
    )
    parser.add_argument(
        '--region',
        type=_integers(4),
        metavar='X,Y,W,H',
        help=f'{LAM}: the region, in LR pixels; default: {lam.REGION} x {lam.REGION} pixels of the result',
    )
    parser.add_argument(
        '--lam-size',
        type=int,
        default=lam.SIDE,
        metavar='N',
        help=f'{LAM}: pictures are cut to N x N pixels around the region; default: {lam.SIDE}',
    )
    parser.add_argument(
        '--steps', type=int, default=lam.STEPS, metavar='N', help=f'{LAM}: of the path; default: {lam.STEPS}'
    )
    parser.add_argument('--device', default='auto', help='auto (the default), cpu, cuda or cuda:N')


def run(args: argparse.Namespace) -> list[Path]:
    """Draw what is asked for.

    Returns:
        The files, in the order they were written; each is printed when it is there.

    Raises:
        UsageError: An argument, the picture or the weights do not do; the message says what would.
        OSError: A file cannot be read or written.
    """
    plot.require_matplotlib()
    for option, value, least in (('size', args.size, scene.LEAST_SIDE), ('lam-size', args.lam_size, scene.LEAST_SIDE)):
        if value < least:
            raise UsageError(f'--{option} must be at least {least}, got {value}')
    if args.steps < 1:
        raise UsageError(f'--steps must be at least 1, got {args.steps}')
    device = choose_device(args.device)
    net = load_network(args.network, args.weights)
    own = _own(net)
    wanted = _wanted(args.what, own, net)
    _check_block(args.block, net)
    _check_useful(args, wanted)
    whole = scene.read(args.image, args.pixel)
    region = _region(args.region, whole, args.lam_size)
    if region and args.pixel is None:
        whole = replace(whole, pixel=_middle(args.region))
    shown = whole.cut(args.size, aligned=scene.ALIGNED)
    _say(args, shown, cut=wanted != [LAM])
    with write_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)

    net = net.requires_grad_(False).to(device)
    identity = identify(net.state_dict())
    assert identity is not None  # or it could not have been loaded
    name = identity.variant.name if identity.variant else identity.network.__name__.lower()
    title = f'{identity.variant.title if identity.variant else identity.network.__name__} x{identity.scale}'
    written = []
    for what in wanted:
        path = args.output / f'{whole.name}_{name}_x{identity.scale}_{what}.png'
        try:
            if what == LAM:
                figure = _attribution(net, whole, region, args, title)
            else:
                figure = own[what](net, shown, args.block, title)
        except UninitializedError as error:
            raise UsageError(f'{args.weights}: {error}') from None
        figures.write(figure, path)
        print(path, flush=True)
        written.append(path)
    return written


def _attribution(net: SRNetwork, whole: Scene, region: Box | None, args: argparse.Namespace, title: str) -> 'Figure':
    region = region or lam.default_region(net, whole)
    with tqdm(total=args.steps, desc=LAM, unit='step', disable=None, leave=False, dynamic_ncols=True) as bar:
        found = lam.examine(net, whole, region, side=args.lam_size, steps=args.steps, advance=bar.update)
    return lam.draw(found, title)


def _windows(net: ELAN, shown: Scene, block: int | None, title: str) -> 'Figure':
    numbers = elan.blocks(net) if block is None else [block]
    return elan.draw(net, shown, elan.examine(net, shown, numbers), title)


def _kernels(net: DLGSANet, shown: Scene, block: int | None, title: str) -> 'Figure':
    count = len(dlgsanet.layers(net))
    numbers = sorted({0, count // 2, count - 1}) if block is None else [block]
    points = dlgsanet.edge_points(shown.grey, shown.place)
    return dlgsanet.draw_kernels(shown, points, dlgsanet.examine_kernels(net, shown, numbers, points), title)


def _sparsity(net: DLGSANet, shown: Scene, block: int | None, title: str) -> 'Figure':
    return dlgsanet.draw_sparsity(net, shown, dlgsanet.examine_sparsity(net, shown), title)


def _maps(net: ASID, shown: Scene, block: int | None, title: str) -> 'Figure':
    return asid.draw_maps(net, shown, asid.examine_maps(net, shown), title)


def _distillation(net: ASID, shown: Scene, block: int | None, title: str) -> 'Figure':
    number = net.num_groups - 1 if block is None else block
    return asid.draw_distillation(shown, asid.examine_distillation(net, shown, number), title)


def _clusters(net: LCoAN, shown: Scene, block: int | None, title: str) -> 'Figure':
    return lcoan.draw_clusters(shown, lcoan.examine(net, shown), title)


def _tokens(net: LCoAN, shown: Scene, block: int | None, title: str) -> 'Figure':
    return lcoan.draw_tokens(shown, lcoan.examine(net, shown), title)


# The figures of each network's own, and how many blocks of what name --block chooses from.
OWN: Mapping[type[SRNetwork], dict[str, Draw]] = {
    ELAN: {'windows': _windows},
    DLGSANet: {'kernels': _kernels, 'sparsity': _sparsity},
    ASID: {'maps': _maps, 'distillation': _distillation},
    LCoAN: {'clusters': _clusters, 'tokens': _tokens},
}


def _own(net: SRNetwork) -> dict[str, Draw]:
    return OWN[type(net)]


def _wanted(asked: list[str], own: Mapping[str, Draw], net: SRNetwork) -> list[str]:
    """The names of the figures, each once, in the order they are asked for."""
    groups = {ATTENTION: [*own], LAM: [LAM], ALL: [*own, LAM], **{name: [name] for name in own}}
    for name in asked:
        if name not in groups:
            raise UsageError(f'--what {name}: {type(net).__name__} has {", ".join([*own, ATTENTION, LAM, ALL])}')
    return list(dict.fromkeys(figure for name in asked for figure in groups[name]))


def _check_block(block: int | None, net: SRNetwork) -> None:
    if block is None:
        return
    if isinstance(net, LCoAN):
        raise UsageError('--block: all groups of LCoAN attend as the first one does; leave it out')
    if isinstance(net, ELAN):
        what, count = 'blocks', len(net.body)
    elif isinstance(net, DLGSANet):
        what, count = 'layers', len(dlgsanet.layers(net))
    else:
        what, count = 'groups', cast(ASID, net).num_groups
    if not 0 <= block < count:
        raise UsageError(f'--block {block}: the {what} are numbered from 0 to {count - 1}')


def _check_useful(args: argparse.Namespace, wanted: Sequence[str]) -> None:
    """See that no option is given that nothing asked for would heed."""
    with_blocks = {'windows', 'kernels', 'distillation'}
    useful = {
        '--block': args.block is None or not with_blocks.isdisjoint(wanted),
        '--size': args.size == SIZE or wanted != [LAM],
        '--region': args.region is None or LAM in wanted,
        '--lam-size': args.lam_size == lam.SIDE or LAM in wanted,
        '--steps': args.steps == lam.STEPS or LAM in wanted,
    }
    if useless := [option for option, serves in useful.items() if not serves]:
        raise UsageError(f'{" and ".join(useless)}: would change nothing of --what {" ".join(args.what)}; leave it out')


def _region(given: tuple[int, ...] | None, whole: Scene, size: int) -> Box | None:
    if given is None:
        return None
    region, (width, height) = Box(*given), whole.whole
    asked = f'--region {",".join(map(str, given))}'
    if min(region.width, region.height) < 2:
        raise UsageError(f'{asked}: must be at least 2 pixels wide and high')
    if region.left < 0 or region.top < 0 or region.left + region.width > width or region.top + region.height > height:
        raise UsageError(f'{asked} is not within the picture, which has {width} x {height} pixels')
    if max(region.width, region.height) > size:
        raise UsageError(f'{asked}: must be at most --lam-size = {size} pixels wide and high')
    return region


def _middle(region: tuple[int, ...]) -> tuple[int, int]:
    left, top, width, height = region
    return left + width // 2, top + height // 2


def _say(args: argparse.Namespace, shown: Scene, cut: bool) -> None:
    """What was not asked for, but chosen."""
    x, y = shown.pixel
    if args.pixel is None:
        how = 'in the middle of the region' if args.region else 'on the strongest edge'
        print(f'pixel {x},{y}: {how}; choose another by --pixel X,Y', file=sys.stderr)
    if cut and (shown.box.width, shown.box.height) != shown.whole:
        width, height = shown.whole
        print(
            f'{args.image} has {width} x {height} pixels: the attention is that within {shown.box} (--size)',
            file=sys.stderr,
        )


def _integers(count: int) -> Callable[[str], tuple[int, ...]]:
    """The type of an argument of so many integers with commas between."""

    def parse(text: str) -> tuple[int, ...]:
        if not re.fullmatch(rf'-?\d+(,-?\d+){{{count - 1}}}', text):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not {count} integers with commas between, such as '
                f'{",".join(["120", "64", "4", "4"][:count])}'
            )
        return tuple(map(int, text.split(',')))

    return parse
