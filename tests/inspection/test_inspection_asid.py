"""ASID's shared maps and distilled channels: those of the network, by hand."""

import networks
import numpy as np
import pytest
import torch
from inspection import scenes

from attnsr.inspection import asid


@pytest.fixture(scope='module')
def net() -> torch.nn.Module:
    return networks.build('ASID', upscale=2).eval().double()


# Neither side of the second is a multiple of the windows.
@pytest.mark.parametrize(('height', 'width', 'pixel'), [(40, 48, (21, 18)), (27, 36, (35, 26))], ids=str)
def test_the_maps_are_the_networks(net: torch.nn.Module, height: int, width: int, pixel: tuple[int, int]) -> None:
    scene = scenes.make(height, width, pixel)
    found = asid.examine_maps(net, scene)
    idsa = net.block0.residual_layer[0]
    row, column = scene.place
    for step in (1, 2, 3):
        for kind, each in (('SLA', found.local[step - 1]), ('SGA', found.grid[step - 1])):
            attention = getattr(idsa, f'{kind}{step}').attn
            (x, grid), (out, _) = scenes.seen(net, scene, attention)
            h, w = x.shape[2:]
            assert grid == (kind == 'SGA')
            i, j = np.mgrid[:8, :8].reshape(2, -1)
            if grid:
                down, right = h // 8, w // 8
                rows, columns = i * down + row % down, j * right + column % right
                at = row // down, column // right
            else:
                rows, columns = i + row // 8 * 8, j + column // 8 * 8
                at = row % 8, column % 8
            np.testing.assert_array_equal(each.rows, rows)
            np.testing.assert_array_equal(each.columns, columns)
            with torch.no_grad():
                q, k, v = attention.to_qkv(x[0, :, rows, columns].T).chunk(3, 1)
                distance = (at[0] - i + 7) * 15 + at[1] - j + 7
                bias = attention.rel_pos_bias.weight[torch.from_numpy(distance), 0]
                a = (q[at[0] * 8 + at[1]] @ k.T / x.shape[1] ** 0.5 + bias).softmax(-1)
                y = attention.to_out(torch.from_numpy(each.weights) @ v)
            np.testing.assert_allclose(each.weights, a.numpy(), atol=1e-12)
            assert each.weights.sum() == pytest.approx(1)
            torch.testing.assert_close(y, out[0, :, row, column])


@pytest.mark.parametrize('group', [0, 1])
def test_the_distilled_channels_are_the_networks(net: torch.nn.Module, group: int) -> None:
    scene = scenes.make(27, 36, (3, 3))
    found = asid.examine_distillation(net, scene, group)
    layer = net.get_submodule(f'block{group}').residual_layer
    idsa = layer[0] if group == 0 else layer
    expected = {
        'd1': scenes.seen(net, scene, idsa.pw1)[1][0, :4],
        'd2': scenes.seen(net, scene, idsa.pw2)[1][0, :4],
        't': scenes.seen(net, scene, idsa.SGA3)[1][0][0],
        'loc': scenes.seen(net, scene, idsa.LB3)[1][0, :4],
    }
    assert list(found.parts) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found.parts[name], values[:, :27, :36].float().numpy(), atol=1e-6)


def test_the_figures_have_the_numbers(net: torch.nn.Module) -> None:
    scene = scenes.make(27, 36, (35, 26))
    maps = asid.examine_maps(net, scene)
    figure = asid.draw_maps(net, scene, maps, 'ASID')
    drawn = scenes.drawn(figure)
    axes = {each.get_label(): each for each in figure.axes}
    for step, (local, grid) in enumerate(zip(maps.local, maps.grid, strict=True), 1):
        _, weights = drawn[f'SLA{step}, window']
        np.testing.assert_allclose(weights.ravel() * local.weights.max(), local.weights)
        (squares,) = axes[f'SGA{step}, grid'].collections
        np.testing.assert_allclose(squares.get_array() * grid.weights.max(), grid.weights)
        middles = np.array([path.get_extents().intervalx.mean() for path in squares.get_paths()])
        np.testing.assert_allclose(middles, grid.columns + 16)
    found = asid.examine_distillation(net, scene, 1)
    drawn = scenes.drawn(asid.draw_distillation(scene, found, 'ASID'))
    for name, channels in found.parts.items():
        for number, values in enumerate(channels):
            np.testing.assert_array_equal(drawn[f'{name}, channel {number}'][0], values)
