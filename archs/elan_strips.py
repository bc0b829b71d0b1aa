"""ELAN's blocks at inference on a CPU: a strip of rows at a time goes through all of a block's layers.

What a layer leaves to the next is then still in cache, and attention is kept only until the last layer that shares it
has seen its strip. A layer is a generator here that yields how many rows it has finished, and reads the rows that the
generator before it has. Rows are numbered round a ring, row ``height`` being row 0 again, since shifted windows cross
the border: each layer begins some rows after the one before, goes round once, and what it began with is what it lacks
last. Source: see ``elan_arch``.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from attnsr.ops import dispatch
from attnsr.ops.shift_linear.reference import shifted_rows, strip_memory
from attnsr.ops.window_attention.reference import Scores, attend_in_chunks

if TYPE_CHECKING:
    from attnsr.archs.elan_arch import ELAB, GMSA, LFE

# A strip has about this many pixels.
STRIP_PIXELS = 10 * 2**10

# Of images in a batch, which strips take one after the other, when they are too little work for that.
FEW_PIXELS = 2**10

Rows = Iterator[int]


def serves(block: 'ELAB', x: Tensor) -> bool:
    """Whether a block may work in strips on (B, C, H, W): autograd keeps everything, and compilers block themselves."""
    if type(x) is not Tensor or x.device.type != 'cpu' or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if len(x) > 1 and x.shape[2] * x.shape[3] <= FEW_PIXELS:
        return False
    # Strips are computed without calling the block's modules as a whole.
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    return not hooked and not _has_any_global_hook() and dispatch.get_backend() != 'triton'


def forward(block: 'ELAB', x: Tensor) -> Tensor:
    """The block in eval mode; sides of the map are multiples of all window sizes."""
    out = torch.empty_like(x)
    for image in range(len(x)):
        _forward(block, x[image : image + 1], out[image : image + 1])
    return out


def _forward(block: 'ELAB', x: Tensor, out: Tensor) -> None:
    layers = cast('zip[tuple[LFE, GMSA]]', zip(block.modules_lfe.values(), block.modules_gmsa.values(), strict=True))
    pairs = list(layers)
    height, width = x.shape[2:]
    multiple = math.lcm(*pairs[0][1].window_sizes)
    length = min(height, max(1, STRIP_PIXELS // (width * multiple)) * multiple)
    rolls = _rolls(pairs[0][1])
    attended = torch.empty_like(x)
    kept: dict[tuple[int, int], Tensor] = {}
    rows: Rows = iter((height + 2,))  # all, and the two below that a row's local features would need
    start = first = 0
    for pair, (lfe, gmsa) in enumerate(pairs):
        last = pair == len(pairs) - 1
        y = out if last else torch.empty_like(x)
        rows = _local_features(lfe, x, y, rows, start, length)
        while _strip(first, length, height)[1] + min(rolls) < start:  # whose first rows would come last
            first += 1
        rows = _attention(gmsa, y, attended, rows, first, length, kept, len(pairs) > 1, last)
        start = _strip(first, length, height)[1] + max(rolls) + 2
        x = y
    for _ in rows:
        pass


def _local_features(lfe: 'LFE', x: Tensor, y: Tensor, source: Rows, start: int, length: int) -> Rows:
    """LFE of x into y, from the row ``start`` round to it."""
    first, second = lfe.conv0.shift_conv.conv1x1, lfe.conv1.shift_conv.conv1x1
    height = x.shape[2]
    inputs, hiddens = strip_memory(x, x.shape[1], length + 2), strip_memory(x, len(first.weight), length)
    done, end = start, start + height
    for ready in _and_all(source, end + 2):
        while done < min(ready - 2, end):
            until = min(done + length, ready - 2, end)
            for rows in _pieces(done, until, height):
                top, bottom = max(rows.start - 1, 0), min(rows.stop + 1, height)
                hidden = F.conv2d(shifted_rows(inputs, x, slice(top, bottom), height), first.weight, first.bias)
                shifted = shifted_rows(hiddens, hidden, rows, height, top, relu=True)
                torch.add(F.conv2d(shifted, second.weight, second.bias), x[:, :, rows], out=y[:, :, rows])
            done = until
            yield done


def _attention(
    gmsa: 'GMSA',
    x: Tensor,
    attended: Tensor,
    source: Rows,
    first: int,
    length: int,
    kept: dict[tuple[int, int], Tensor],
    shared: bool,
    last: bool,
) -> Rows:
    """GMSA of x in place, from the strip ``first`` round to it.

    A strip is of the rolled map: of each window size other rows. ``attended`` is memory for what enters the last
    convolution; ``kept`` has the probabilities of each strip and window size.
    """
    weight, bias = gmsa.folded()
    channels, height, width = x.shape[1:]
    runs, rolls = len(gmsa.window_sizes), _rolls(gmsa)
    d, low, high = channels // runs, min(rolls), max(rolls)
    strips, exact = -(-height // length), torch.promote_types(x.dtype, torch.float32)
    done = _strip(first, length, height)[1] + high
    end = done + height
    number = first
    for ready in _and_all(source, end + high):
        while number < first + strips:
            strip, top, bottom = _strip(number, length, height)
            if bottom + high > ready:
                break
            pieces = [x[:, :, rows] for rows in _pieces(top + low, bottom + high, height)]
            projected = F.conv2d(torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0], weight, bias)
            table = projected.permute(0, 2, 3, 1).reshape(-1, projected.shape[1] // runs)
            for run, (size, roll) in enumerate(zip(gmsa.window_sizes, rolls, strict=True)):
                there, back = _places(bottom - top, width, size, roll, roll - low, runs, run)
                windows = table.index_select(0, there).view(-1, size**2, table.shape[1])
                v = windows[:, :, -d:]
                out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
                if gmsa.computes:
                    a = v.new_empty(len(v), size**2, size**2) if shared else None
                    # Converted with the values beside it, which takes a third of the time of converting the slice.
                    q = windows.to(exact)[:, :, :d]
                    attend_in_chunks(Scores(q, q, 1.0, None), v, out, a)
                    if a is not None:
                        kept[strip, run] = a
                else:
                    torch.bmm(kept.pop((strip, run)) if last else kept[strip, run], v, out=out)
                pixels, at = out.flatten(0, 1).index_select(0, back).view(-1, width, d).permute(2, 0, 1), 0
                for rows in _pieces(top + roll, bottom + roll, height):
                    attended[0, run * d : (run + 1) * d, rows] = pixels[:, at : at + rows.stop - rows.start]
                    at += rows.stop - rows.start
            number += 1
            until = end if number == first + strips else bottom + low
            for rows in _pieces(done, until, height):
                x[:, :, rows] += gmsa.project_out(attended[:, :, rows])
            done = max(done, until)
            yield done


def _rolls(gmsa: 'GMSA') -> list[int]:
    return [size // 2 if gmsa.shifted else 0 for size in gmsa.window_sizes]


def _and_all(source: Rows, everything: int) -> Rows:
    """What the source yields, and when it has finished everything."""
    yield from source
    yield everything


def _strip(number: int, length: int, height: int) -> tuple[int, int, int]:
    """Of the strips of the ring, numbered on from turn to turn: which of the map's it is, and its rows of the ring."""
    turn, strip = divmod(number, -(-height // length))
    return strip, turn * height + strip * length, turn * height + min((strip + 1) * length, height)


def _pieces(start: int, stop: int, height: int) -> Iterator[slice]:
    """The rows of the map that rows of the ring are."""
    while start < stop:
        top = start % height
        rows = slice(top, min(top + stop - start, height))
        start += rows.stop - top
        yield rows


@lru_cache(maxsize=64)
def _places(rows: int, width: int, size: int, roll: int, skip: int, runs: int, run: int) -> tuple[Tensor, Tensor]:
    """For the windows of a strip after ``skip`` rows: the row of each token in the table of pixels and runs.

    And its inverse within the strip: for each pixel its token.
    """
    with torch.inference_mode(False), torch.device('cpu'):  # kept, whatever the caller's default device is
        pixel = torch.arange(rows * width).view(rows, width).roll(-roll, 1)
        there = pixel.view(rows // size, size, width // size, size).transpose(1, 2).flatten()
        back = torch.empty_like(there).scatter_(0, there, torch.arange(rows * width))
        return ((there + skip * width) * runs + run).int(), back.int()
