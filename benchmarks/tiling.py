"""What tiles change: pictures upscaled in tiles, compared with the same pictures upscaled whole.

    python -m attnsr.benchmarks.tiling -w net.pth ... --pictures DIR

Of d, the picture in tiles less the whole one, in grey levels of 8 bits before rounding, clipped to [0, 255]:

- max, rms: the largest |d| and the root of the mean of d^2 over all pictures; PSNR of the one against the other;
- seam: the largest step that d makes between two neighbouring lines of pixels, rows or columns, in the mean over the
  line. That is what an eye sees of a seam, and a bound for it: a seam is such a line;
- dB of HR: how much PSNR against HR changes, where ``--hr`` names HR pictures of the same names: RGB, no border cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsr import pictures
from attnsr.archs.state_dicts import identify
from attnsr.benchmarks import tables
from attnsr.data_prep import images
from attnsr.upscaler import Upscaler
from attnsr.weights import load_network

TITLES = ('network', 'tile, overlap', 'max', 'rms', 'PSNR, dB', 'seam', 'dB of HR')

#: Sides and overlaps, in LR pixels.
TILES = ((64, 32), (128, 32), (128, 64))


@dataclass
class Difference:
    """What tiles of a side and overlap, in LR pixels, change of a network's pictures."""

    network: str
    tile: int
    overlap: int
    max: float
    rms: float
    psnr: float
    seam: float
    gain: float | None


def measure(
    weights: Path, small: Sequence[Path], hr: Path | None, tiles: Sequence[tuple[int, int]], side: int
) -> list[Difference]:
    """Compare for one network.

    Args:
        weights: Its checkpoint.
        small: LR pictures, of which the upper left ``side x side`` pixels are used.
        hr: Folder of HR pictures of the same names.
        tiles: Sides and overlaps, in LR pixels.
        side: In LR pixels.
    """
    net = load_network(None, weights)
    identity = identify(net.state_dict())
    inputs = [_read(path)[:, :, :side, :side] for path in small]
    large = [_read(hr / path.name) if hr and (hr / path.name).exists() else None for path in small]
    scale = net.upscale
    whole = [_levels(Upscaler(net, tile=None), x) for x in inputs]
    found = []
    for tile, overlap in tiles:
        upscaler = Upscaler(net, tile=tile, overlap=overlap)
        squares, gains = [], []
        most = seam = 0.0
        for x, y, target in zip(inputs, whole, large, strict=True):
            z = _levels(upscaler, x)
            d = z - y
            most = max(most, float(d.abs().max()))
            squares.append(float((d**2).mean()))
            for dim in (2, 3):
                if d.shape[dim] > 1:
                    seam = max(seam, float(d.diff(dim=dim).mean(5 - dim).abs().max()))
            if target is not None:
                target = 255 * target[:, :, : scale * side, : scale * side]
                gains.append(_psnr(z, target) - _psnr(y, target))
        mean = sum(squares) / len(squares)
        psnr = 10 * math.log10(255**2 / mean) if mean else math.inf
        gain = sum(gains) / len(gains) if gains else None
        found.append(Difference(str(identity), tile, overlap, most, mean**0.5, psnr, seam, gain))
    return found


def rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of the table."""
    return [
        [
            each['network'],
            f'{each["tile"]}, {each["overlap"]}',
            *(f'{each[name]:.2f}' for name in ('max', 'rms', 'psnr', 'seam')),
            '' if each['gain'] is None else f'{each["gain"]:+.3f}',
        ]
        for each in found
    ]


def main() -> None:
    parser = tables.parser('tiling', __doc__, rounds=False)
    parser.add_argument('-w', '--weights', type=Path, nargs='+', required=True, metavar='FILE')
    parser.add_argument('--pictures', type=Path, required=True, metavar='DIR', help='of LR pictures')
    parser.add_argument('--hr', type=Path, metavar='DIR', help='of HR pictures, where they have the same names')
    parser.add_argument('--side', type=int, default=320, help='of the pictures, which are cut to it (%(default)s)')
    args = parser.parse_args()
    small = images.find(args.pictures, recursive=False)
    path = tables.result_file(args.output, 'tiling')
    kept = tables.load(path)
    for weights in args.weights:
        found = measure(weights, small, args.hr, TILES, args.side)
        others = [each for each in kept.get('found', []) if each['network'] != found[0].network]
        measured = {**tables.environment(), 'pictures': len(small), 'side': args.side}
        kept = {'found': others + [asdict(each) | {'measured': measured} for each in found]}
        tables.save(path, kept, tables.table(TITLES, rows(kept['found'])))
    print(path.with_suffix('.md').read_text())


def _read(path: Path) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    pixels = pictures.read(path).pixels[..., :3].astype(np.float32) / 255
    return torch.from_numpy(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()).permute(2, 0, 1)[None]


def _levels(upscaler: Upscaler, x: Tensor) -> Tensor:
    return 255 * upscaler.tensor(x).cpu().double().clamp(0, 1)


def _psnr(y: Tensor, target: Tensor) -> float:
    return 10 * math.log10(255**2 / float((y - target[:, :, : y.shape[2], : y.shape[3]]).pow(2).mean()))


if __name__ == '__main__':
    main()
