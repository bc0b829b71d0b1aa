"""ELAN's attention of a pixel: that of the network, from its layers' inputs by hand, shifted round the border too."""

import networks
import numpy as np
import pytest
import torch
from inspection import scenes

from attnsr.inspection import elan
from attnsr.ops import dispatch


@pytest.fixture(scope='module')
def net() -> torch.nn.Module:
    return networks.build('ELAN', upscale=2, img_range=4.0, m_elan=6, n_share=1).eval().double()


# The last lies where shifted windows go on round the border, in the padding too.
@pytest.mark.parametrize(('height', 'width', 'pixel'), [(40, 48, (21, 18)), (27, 36, (0, 26))], ids=str)
@pytest.mark.parametrize('block', [0, 1])
def test_the_attention_is_the_networks(
    net: torch.nn.Module, height: int, width: int, pixel: tuple[int, int], block: int
) -> None:
    scene = scenes.make(height, width, pixel)
    (found,) = elan.examine(net, scene, [block])
    assert (found.block, found.shifted) == (block, block == 1)
    gmsa = net.body[block].modules_gmsa['gmsa_0']
    (x, _), (out, _) = scenes.seen(net, scene, gmsa)
    with torch.no_grad():
        runs = gmsa.project_inp(x)[0].chunk(3)
    row, column = scene.place
    h, w = x.shape[2:]
    parts = []
    for window, run, size in zip(found.windows, runs, (2, 4, 8), strict=True):
        shift = size // 2 if found.shifted else 0
        rolled = run.roll((-shift, -shift), (1, 2))
        at = (row - shift) % h, (column - shift) % w
        top, left = (start // size * size for start in at)
        q, v = rolled[:, top : top + size, left : left + size].flatten(1).T.chunk(2, 1)
        token = (at[0] - top) * size + at[1] - left
        a = (q[token] @ q.T).softmax(-1)
        assert window.size == size
        np.testing.assert_allclose(window.weights, a.numpy(), atol=1e-12)
        assert window.weights.sum() == pytest.approx(1)
        assert 1 <= window.spread <= size**2
        rows, columns = np.mgrid[top : top + size, left : left + size].reshape(2, -1)
        np.testing.assert_array_equal(window.rows, (rows + shift) % h)
        np.testing.assert_array_equal(window.columns, (columns + shift) % w)
        # Applied to the values where the figure says that they are, it gives what the network has.
        parts.append(torch.from_numpy(window.weights) @ run[q.shape[1] :, window.rows, window.columns].T)
        torch.testing.assert_close(parts[-1], a @ v)
    with torch.no_grad():
        y = gmsa.project_out(torch.cat(parts)[None, :, None, None])[0, :, 0, 0]
    torch.testing.assert_close(x[0, :, row, column] + y, out[0, :, row, column])


def test_looking_changes_nothing(net: torch.nn.Module) -> None:
    scene = scenes.make()
    backend = dispatch.get_backend()
    with torch.no_grad():
        before = net(scene.tensor())
    elan.examine(net, scene, [0, 1])
    with torch.no_grad():
        assert torch.equal(net(scene.tensor()), before)
    assert dispatch.get_backend() == backend
    assert not any(module._forward_hooks for module in net.modules())


def test_the_figure_has_the_weights(net: torch.nn.Module) -> None:
    scene = scenes.make(27, 36, (0, 26))
    assert elan.blocks(net) == [0, 1, 2]
    found = elan.examine(net, scene, elan.blocks(net))
    drawn = scenes.drawn(elan.draw(net, scene, found, 'ELAN'))
    for block in found:
        for window in block.windows:
            name = f'Block {block.block}, {window.size} x {window.size}' + ', shifted' * block.shifted
            picture, weights = drawn[name]
            assert picture.shape == (window.view().height, window.view().width, 3)
            np.testing.assert_allclose(weights.ravel() * window.weights.max(), window.weights)
