"""DLGSANet's predicted kernels and its sparsity: both reproduce what the layers give."""

import itertools
import math

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inspection import scenes

from attnsr.inspection import dlgsanet


@pytest.fixture(scope='module')
def net() -> torch.nn.Module:
    return networks.build('DLGSANet', upscale=2, num_blocks=2).eval().double()


def test_the_kernels_are_those_that_the_layers_filter_with(net: torch.nn.Module) -> None:
    scene = scenes.make()
    points = np.array([(0, 0), (18, 21), (39, 47)])
    for found in dlgsanet.examine_kernels(net, scene, [0, 3], points):
        (u,), y = scenes.seen(net, scene, dlgsanet.layers(net)[found.layer][0].IDynamicDWConv.conv)
        assert found.taps.shape == (3, 4, 7, 7)
        assert found.sharing == 3
        padded = F.pad(u, (3,) * 4)
        for (row, column), taps in zip(points, found.taps, strict=True):
            near = padded[0, :, row : row + 7, column : column + 7]
            k = torch.from_numpy(taps).repeat_interleave(found.sharing, 0)
            torch.testing.assert_close((k * near).sum((1, 2)), y[0, :, row, column])


def test_the_zeros_are_those_of_the_layers_attention(net: torch.nn.Module) -> None:
    """Its windows overlap: 40 and 48 pixels in windows of 16."""
    scene = scenes.make(40, 48, (21, 18))
    for found, (_, layer) in zip(dlgsanet.examine_sparsity(net, scene), dlgsanet.layers(net), strict=True):
        attention = layer.restormer_attn
        (x, norm, _, size), out = scenes.seen(net, scene, attention)
        with torch.no_grad():
            u = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2)
            qkv = attention.qkv_dwconv(attention.qkv(u))[0]
        total, count, zeros, entries, of_pixel = torch.zeros_like(x[0]), torch.zeros(x.shape[2:]), 0, 0, None
        for top in (0, 12, 24):
            for left in (0, 16, 32):
                window = (slice(None), slice(top, top + size), slice(left, left + size))
                q, k, v = qkv[window].flatten(1).unflatten(0, (3, attention.heads, -1))
                a = F.relu(attention.temperature * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)))
                zeros += (a == 0).sum((1, 2))
                entries += a.shape[1] * a.shape[2]
                total[window] += (a @ v).flatten(0, 1).unflatten(1, (size, size)).detach()
                count[window[1:]] += 1
                if of_pixel is None and top <= 18 < top + size and left <= 21 < left + size:
                    of_pixel = a.detach().numpy()
        np.testing.assert_allclose(found.matrices, of_pixel, atol=1e-12)
        np.testing.assert_allclose(found.by_head, (zeros / entries).numpy())
        assert found.share == pytest.approx(float(zeros.sum() / entries / attention.heads))
        with torch.no_grad():
            y = attention.project_out((total / count)[None])
        torch.testing.assert_close(x + y, out)


@pytest.mark.parametrize('side', range(1, 60, 7))
def test_windows_cover_a_side(side: int) -> None:
    starts = dlgsanet.window_starts(side, 16)
    assert len(starts) == math.ceil(side / 16)
    assert starts[0] == 0
    assert starts[-1] == max(0, side - 16)
    assert all(0 <= b - a <= 16 for a, b in itertools.pairwise(starts))


def test_fewer_tokens_than_channels_have_a_matrix_too() -> None:
    qkv = torch.randn(24, 1, 2, dtype=torch.float64)
    q, k, _ = qkv.flatten(1).unflatten(0, (3, 2, 4))
    expected = F.relu(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2))
    torch.testing.assert_close(dlgsanet.channel_matrices(qkv, torch.ones(2, 1, 1), 2), expected)


def test_points_follow_an_edge_both_ways() -> None:
    y, x = np.mgrid[:60, :60]
    circle = (np.hypot(y - 30, x - 30) < 20).astype(np.float64)
    points = dlgsanet.edge_points(circle, (30, 50), count=9, step=4)
    assert len(points) == 9
    assert (30, 50) in map(tuple, points)
    distance = np.hypot(points[:, 0] - 30, points[:, 1] - 30)
    assert np.abs(distance - 19.7).max() < 1.2
    steps = np.hypot(*np.diff(points, axis=0).T)
    assert np.abs(steps - 4).max() < 1.2
    # Where there is no edge, and at the border.
    flat = dlgsanet.edge_points(np.zeros((30, 30)), (15, 3), count=5, step=3)
    assert flat.tolist() == [[15, 0], [15, 3], [15, 6], [15, 9], [15, 12]]


def test_the_figures_have_the_numbers(net: torch.nn.Module) -> None:
    scene = scenes.make()
    points = dlgsanet.edge_points(scene.grey, scene.place)
    kernels = dlgsanet.examine_kernels(net, scene, [1], points)
    drawn = scenes.drawn(dlgsanet.draw_kernels(scene, points, kernels, 'DLGSANet'))
    for kernel in range(4):
        taps = kernels[0].taps[:, kernel]
        for number, each in enumerate(taps):
            (tile,) = drawn[f'layer 1, kernel {kernel}, point {number + 1}']
            np.testing.assert_allclose(tile * np.abs(taps).max(), each)
            (change,) = drawn[f'layer 1, kernel {kernel}, point {number + 1}, change']
            changes = taps - taps.mean(0)
            np.testing.assert_allclose(change * np.abs(changes).max(), changes[number])
    variation = [kernels[0].variation(kernel) for kernel in range(4)]
    assert sorted(kernels[0].most_varied(2)) == sorted(np.argsort(variation)[-2:])

    sparsity = dlgsanet.examine_sparsity(net, scene)
    figure = dlgsanet.draw_sparsity(net, scene, sparsity, 'DLGSANet')
    (axes,) = (axes for axes in figure.axes if axes.get_label() == 'Zeros by layer')
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [100 * layer.share for layer in sparsity])
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], [100 * layer.by_head for layer in sparsity])
