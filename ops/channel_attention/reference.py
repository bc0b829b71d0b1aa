"""Channel attention in plain PyTorch: the definition that every kernel is tested against.

Maps are (B, H, W, channels) here. Cut into groups of tokens, a map is a view of six dimensions: (B, rows of groups,
columns of groups, rows of tokens, columns of tokens, channels).
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from attnsr.ops.autocast import autocast_input, without_autocast
from attnsr.ops.symbolic import larger

# Without autograd groups are worked on a few at a time, of about this many elements, which stay in cache.
CHUNK_ELEMENTS = 2**20

EPSILON = 1e-12  # the least norm that q and k are divided by


def channel_attention(
    qkv: Tensor,
    temperature: Tensor,
    activation: str,
    heads: int,
    layout: str,
    window_size: int | None,
    weight: Tensor | None,
) -> Tensor:
    x = autocast_input(qkv).permute(0, 2, 3, 1)
    matrix = None if weight is None else weight.flatten(1).to(x.dtype)
    attend = partial(attention, temperature=temperature, activation=activation, heads=heads, weight=matrix)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, temperature, matrix))
    channels = x.shape[3] // 3 if matrix is None else len(matrix)
    is_empty = 0 in x.shape[:3]
    if is_empty:  # groups that have no token are all alike
        layout, window_size = 'image', None
    # Chunks are for a CPU's cache.
    whole = is_empty or trained or x.device.type != 'cpu' or torch.compiler.is_compiling()
    # Autocast would take the products in half precision, where they overflow.
    with without_autocast(qkv):
        size = window_size or 1  # 'image' is a grid of a single position
        if layout == 'overlapping':
            if torch.compiler.is_compiling() and not trained and not torch.compiler.is_exporting():
                y = _each_overlapping_opaque(x, temperature, activation, heads, size, matrix)
            else:
                y = _overlapping(x, size, attend) if whole else _each_overlapping(x, size, attend, channels)
        elif torch.compiler.is_compiling() and layout != 'image':
            y = _in_indexed_groups(x, layout, size, attend)
        else:
            y = _in_groups(x, layout, size, attend) if whole else _in_chunks(x, layout, size, attend, channels)
    return y.permute(0, 3, 1, 2)


def attention(groups: Tensor, temperature: Tensor, activation: str, heads: int, weight: Tensor | None) -> Tensor:
    """y of groups of tokens (n, T, 3C): (n, T, C), or (n, T, O) with a weight (O, C)."""
    exact = torch.promote_types(groups.dtype, torch.float32)
    q, k, v = groups.chunk(3, dim=2)
    q, k, v_heads = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (n, heads, T, c)
    q, k = q.to(exact), k.to(exact)
    # As good as normalising q and k, and on c x c numbers instead of T x c twice.
    scale = temperature.to(exact).reshape(-1, 1, 1) * _inverse_norm(q).transpose(2, 3) * _inverse_norm(k)
    scores = (q.transpose(2, 3) @ k) * scale
    a = scores.relu() if activation == 'relu' else scores.softmax(-1)
    if weight is not None and _folds(groups, weight):
        # weight times the matrix that has the heads' A along its diagonal: (n, O, C)
        folded = (weight.to(exact).unflatten(1, (heads, -1)).transpose(0, 1) @ a).transpose(1, 2).flatten(2)
        return v @ folded.to(v.dtype).transpose(1, 2)
    y = (v_heads @ a.to(v.dtype).transpose(2, 3)).transpose(1, 2).flatten(2)
    return y if weight is None else y @ weight.T


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / max(norm along the tokens, EPSILON) of (n, heads, T, c): (n, heads, 1, c)."""
    return x.square().sum(2, keepdim=True).clamp(min=EPSILON**2).rsqrt()


def _folds(groups: Tensor, weight: Tensor) -> bool:
    """Whether multiplying the weight into A is less work than applying it to the tokens."""
    if torch.compiler.is_compiling():  # the number of tokens may be unknown, and is large in all but tiny images
        return True
    # On the meta device nothing is computed but the operations counted, and those of the definition are meant.
    return not groups.is_meta and len(weight) < groups.shape[1]


def _groups(x: Tensor, layout: str, size: int) -> Tensor:
    """The map's groups of tokens, a view."""
    cut = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return cut.permute(0, 1, 3, 2, 4, 5) if layout == 'windows' else cut.permute(0, 2, 4, 1, 3, 5)


def _map(groups: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`_groups`."""
    cut = groups.permute(0, 1, 3, 2, 4, 5) if layout == 'windows' else groups.permute(0, 3, 1, 4, 2, 5)
    return cut.flatten(3, 4).flatten(1, 2)


def _in_groups(x: Tensor, layout: str, size: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    groups = _groups(x, layout, size)
    y = attend(groups.flatten(3, 4).flatten(0, 2))
    return _map(y.unflatten(1, groups.shape[3:5]).unflatten(0, groups.shape[:3]), layout)


def _in_indexed_groups(x: Tensor, layout: str, size: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """As :func:`_in_groups`, for sizes that are not known yet.

    A compiler takes one of anything for a constant: one window in a row, one token in a group. So pixels are moved by
    an index here, and groups on the grid have one more token, of 0, which changes neither norms nor scores.
    """
    b, h, w, channels = x.shape
    rows, columns = h // size, w // size
    pixel = torch.arange(b * h * w, device=x.device)
    line, image = pixel // w, pixel // w // h
    row, column = line // size - image * rows, (pixel - line * w) // size
    i, j = line - image * h - row * size, pixel - line * w - column * size
    window, position = row * columns + column, i * size + j
    if layout == 'windows':
        groups, tokens, at = b * rows * columns, size**2, (image * rows * columns + window) * size**2 + position
    else:
        groups, tokens = b * size**2, rows * columns + 1
        at = (image * size**2 + position) * tokens + window
    y = x.new_zeros(groups * tokens, channels).index_copy(0, at, x.reshape(-1, channels))
    y = attend(y.view(-1, tokens, channels)).flatten(0, 1)
    return y.index_select(0, at).view(b, h, w, -1)


def _in_chunks(x: Tensor, layout: str, size: int, attend: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """As :func:`_in_groups`, a few groups at a time; not for autograd."""
    y = x.new_empty(*x.shape[:3], channels)
    for image, out_image in zip(_groups(x, layout, size), _groups(y, layout, size), strict=True):
        for row, out_row in zip(image, out_image, strict=True):
            length = max(1, CHUNK_ELEMENTS // row[0].numel())
            for groups, out in zip(row.split(length), out_row.split(length), strict=True):
                out.copy_(attend(groups.flatten(1, 2)).view(out.shape))
    return y


def _overlapping(x: Tensor, size: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Overlapping windows all at once.

    All windows have the same size here, also where the map is smaller: tokens of 0, which change neither norms nor
    scores and come out as 0.
    """
    batch, height, width, channels = x.shape
    (rows, in_rows), (columns, in_columns) = (_coverage(side, size, x) for side in (height, width))
    # For each token of each window its pixel, and 1 if it is inside the map.
    pixels = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()
    inside = (in_rows[:, None, :, None] * in_columns[None, :, None, :]).flatten()[:, None]
    y = attend((x.flatten(1, 2).index_select(1, pixels) * inside).reshape(-1, size**2, channels))
    y = y.reshape(batch, rows.shape[0], columns.shape[0], size, size, y.shape[2])
    y = _mean_of_windows(y.transpose(2, 3).flatten(1, 2), 1, height, size)
    return _mean_of_windows(y.flatten(2, 3), 2, width, size)


def _mean_of_windows(y: Tensor, dim: int, side: int, size: int) -> Tensor:
    """For each pixel along an axis the mean of the windows that it is in, whose tokens ``y`` has one after the other.

    Gathered: scattered sums are not deterministic on a GPU, and ONNX Runtime loses summands when it has several
    threads.
    """
    starts, pixel = _starts(side, size, y.device), torch.arange(side, device=y.device)
    # The last of the windows that begin up to a pixel, and how many begin where that does: at the end of the map many
    # can. Two steps are more than a window, so that only two others can have the pixel too.
    window = (starts <= pixel[:, None]).sum(1) - 1
    number = (starts == starts[window][:, None]).sum(1)
    total, count = None, None
    for weight, before in ((number, number), (torch.ones_like(number), 1), (torch.ones_like(number), 1)):
        chosen = window.clamp(min=0)
        token = pixel - starts[chosen]
        weight = (weight * ((window >= 0) & (token < size))).to(y.dtype).view(-1, *(1,) * (y.ndim - dim - 1))
        part = y.index_select(dim, chosen * size + token.clamp(max=size - 1)) * weight
        total, count = (part, weight) if total is None or count is None else (total + part, count + weight)
        window = window - before
    assert total is not None
    assert count is not None
    return total / count


def _each_overlapping(x: Tensor, size: int, attend: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """As :func:`_overlapping`, one window at a time; not for autograd."""
    tops, lefts = (_starts(side, size, torch.device('cpu')).tolist() for side in x.shape[1:3])
    y = x.new_zeros(*x.shape[:3], channels)
    for image, out in zip(x, y, strict=True):
        for top, left in product(tops, lefts):
            window = (slice(top, top + size), slice(left, left + size))
            part = out[window]
            part += attend(image[window].flatten(0, 1)[None]).view(part.shape)
    for dim, starts in ((1, tops), (2, lefts)):
        count = y.new_zeros(x.shape[dim])
        for start in starts:
            count[start : start + size] += 1
        if len(starts) > 1:
            y /= count.view(-1, *(1,) * (3 - dim))
    return y


@torch.library.custom_op('attnsr::overlapping_channel_attention', mutates_args=())
def _each_overlapping_opaque(
    x: Tensor, temperature: Tensor, activation: str, heads: int, size: int, weight: Tensor | None
) -> Tensor:
    """:func:`_each_overlapping` for torch.compile, which takes minutes over sizes that depend on those of the map."""
    attend = partial(attention, temperature=temperature, activation=activation, heads=heads, weight=weight)
    return _each_overlapping(x, size, attend, x.shape[3] // 3 if weight is None else len(weight))


@_each_overlapping_opaque.register_fake
def _(x: Tensor, temperature: Tensor, activation: str, heads: int, size: int, weight: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:3], x.shape[3] // 3 if weight is None else len(weight))


def _coverage(side: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of each window along an axis, and 1 for those that are inside the map: both (windows, size)."""
    pixels = _starts(side, size, like.device)[:, None] + torch.arange(size, device=like.device)
    return pixels.clamp(max=side - 1), (pixels < side).to(like.dtype)


def _starts(side: int, size: int, device: torch.device) -> Tensor:
    """Where the overlapping windows begin along an axis."""
    count = (side + size - 1) // size
    if torch.compiler.is_compiling():  # to which one of anything is a constant; of twice the same window the mean is it
        count = larger(count, 2)
    # Tensors, lest a compiler reason about the sizes they come from.
    last = torch.full((), side - size, device=device).clamp(min=0)
    gaps = torch.full((), count - 1, device=device).clamp(min=1)
    return torch.minimum((last + gaps - 1) // gaps * torch.arange(count, device=device), last)
