"""Window attention as ELAN and ASID use it: a layer that computes attention and those that reuse it.

``scaled_dot_product_attention`` shares nothing: it computes the attention of every layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsr.benchmarks.operations import Case, Contestant, Tensors
from attnsr.ops.window_attention import reference, shared_window_attention, window_attention

ELAN_WINDOWS = (4, 8, 16)
ASID_WINDOW = 8


def elan(name: str, channels: int, sharing: int) -> Case:
    """A shifted layer of ELAN, q being k, and the layers that share its attention."""

    def make(batch: int, height: int, width: int) -> Tensors:
        # Scores without a scale saturate the softmax where q is not small, and little of it would be compared.
        x = _map(batch, 2 * channels, height, width) * (6 * len(ELAN_WINDOWS) / channels) ** 0.5
        return {'x': x, **_values(sharing, batch, channels, height, width)}

    def attend(x: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        y, shared = window_attention(x, ELAN_WINDOWS, shifted=True)
        return y, *(shared_window_attention(v, shared) for v in values.values())

    def by_sdpa(x: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        parts = [run.chunk(2, 1) for run in x.chunk(len(ELAN_WINDOWS), 1)]
        all_values = [[v for _, v in parts], *(v.chunk(len(ELAN_WINDOWS), 1) for v in values.values())]
        return tuple(
            torch.cat(
                [
                    _by_sdpa(q, q, v, size, grid=False, shift=size // 2, scale=1.0, bias=None)
                    for (q, _), v, size in zip(parts, of_layer, ELAN_WINDOWS, strict=True)
                ],
                1,
            )
            for of_layer in all_values
        )

    return Case(name, make, attend, multiple=16, rivals=(Contestant('scaled_dot_product_attention', by_sdpa),))


def asid(name: str, grid: bool, channels: int = 36, sharing: int = 2) -> Case:
    """The widest layer of ASID's first group, and those of the later groups that share its attention."""

    def make(batch: int, height: int, width: int) -> Tensors:
        table = torch.randn((2 * ASID_WINDOW - 1) ** 2)
        x = _map(batch, 3 * channels, height, width)
        return {'x': x, 'table': table, **_values(sharing, batch, channels, height, width)}

    def attend(x: Tensor, table: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        y, shared = window_attention(
            x, (ASID_WINDOW,), grid=grid, symmetric=False, scale=channels**-0.5, relative_bias=(table,)
        )
        return y, *(shared_window_attention(v, shared) for v in values.values())

    def by_sdpa(x: Tensor, table: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.chunk(3, 1)
        bias = reference.relative_bias(table, ASID_WINDOW)
        return tuple(
            _by_sdpa(q, k, of_layer, ASID_WINDOW, grid=grid, shift=0, scale=channels**-0.5, bias=bias)
            for of_layer in (v, *values.values())
        )

    return Case(name, make, attend, multiple=ASID_WINDOW, rivals=(Contestant('scaled_dot_product_attention', by_sdpa),))


def _map(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def _values(layers: int, *shape: int) -> Tensors:
    return {f'v{i}': _map(*shape) for i in range(layers)}


def _by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, size: int, *, grid: bool, shift: int, scale: float, bias: Tensor | None
) -> Tensor:
    """Attention of (B, d, H, W) as it is usually written: maps rolled, cut into windows, and put together again."""
    _, _, height, width = q.shape
    rows, columns = height // size, width // size
    # Image, row of windows, column of windows, row in the window, column in the window, channel; and back.
    there, back = ((0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)) if grid else ((0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5))
    cut = ((size, rows), (size, columns)) if grid else ((rows, size), (columns, size))

    def windows(x: Tensor) -> Tensor:
        x = torch.roll(x, (-shift, -shift), (2, 3)).permute(0, 2, 3, 1)
        x = x.unflatten(2, cut[1]).unflatten(1, cut[0]).permute(there)
        return x.flatten(3, 4).flatten(0, 2)[:, None]

    y = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=bias, scale=scale)
    y = y[:, 0].unflatten(1, (size, size)).unflatten(0, (-1, rows, columns)).permute(back)
    return torch.roll(y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2), (shift, shift), (2, 3))


CASES = (
    elan('ELAN-light, 2 layers', channels=60, sharing=1),
    elan('ELAN', channels=180, sharing=0),
    asid('ASID windows, 3 layers', grid=False),
    asid('ASID grid, 3 layers', grid=True),
)
