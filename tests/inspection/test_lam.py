"""Local attribution maps: complete, local where the network is, and the diffusion index of known distributions."""

import networks
import numpy as np
import pytest
import torch
from inspection import scenes
from torch import Tensor, nn

from attnsr.errors import UsageError
from attnsr.inspection import lam
from attnsr.inspection.scene import Box


class Local(nn.Sequential):
    """Two 3x3 convolutions with a nonlinearity between, and the shuffle: sees two pixels far."""

    upscale = 2

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 12, 3, padding=1), nn.PixelShuffle(2))


class Global(Local):
    """The same, and every pixel attends to all others."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = 4 * x.flatten(2).transpose(1, 2)
        y = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return super().forward(x + y.transpose(1, 2).unflatten(2, x.shape[2:]))


def test_the_attributions_add_up_to_the_change_and_more_nearly_with_more_steps() -> None:
    net, image = Local(), scenes.make(20, 24, (10, 10)).image
    errors = []
    for steps in (2, 8, 32):
        attribution, change = lam.attribute(net, image, Box(16, 12, 8, 8), steps=steps)
        errors.append(abs(attribution.sum() - change) / abs(change))
    assert errors[2] < 1e-3
    assert errors[2] < errors[1] / 4 < errors[0] / 16


def test_the_change_is_the_detectors() -> None:
    net, image = Local(), scenes.make(20, 24, (10, 10)).image
    target = Box(16, 12, 8, 8)
    _, change = lam.attribute(net, image, target, steps=1, sigma=1.5)

    def texture(x: np.ndarray) -> float:
        with torch.no_grad():
            y = net(torch.from_numpy(x.transpose(2, 0, 1).astype(np.float32))[None])[0].double().numpy()
        down, right = y[:, 1:, :-1] - y[:, :-1, :-1], y[:, :-1, 1:] - y[:, :-1, :-1]
        return np.hypot(down, right)[:, 12:20, 16:24].sum()

    assert change == pytest.approx(texture(image) - texture(lam.blurred(image, 1.5)), rel=1e-4)


def test_a_blur_of_nothing_is_the_picture_and_constants_stay() -> None:
    image = scenes.make(20, 24, (10, 10)).image
    np.testing.assert_array_equal(lam.blurred(image, 0), image)
    np.testing.assert_allclose(lam.blurred(np.full((5, 6, 3), 0.3, np.float32), 2), 0.3, atol=1e-6)


def test_a_local_network_has_attributions_within_its_reach_only_and_a_lower_index() -> None:
    scene = scenes.make(32, 40, (20, 16))
    region = lam.default_region(Local(), scene)
    assert region == Box(16 + 16, 32 + 12, 8, 8)
    found = {kind: lam.examine(kind(), scene, region, steps=8) for kind in (Local, Global)}
    local = found[Local].attribution
    # The detector reads a pixel of the result further down and right: a pixel of the picture, as the region is whole.
    reach = np.zeros(local.shape, bool)
    reach[12 - 2 : 20 + 3, 16 - 2 : 24 + 3] = True
    assert (local[~reach] == 0).all()
    assert (local[12:20, 16:24] != 0).all()
    assert (found[Global].attribution != 0).all()
    assert found[Local].diffusion < found[Global].diffusion
    assert found[Local].completeness == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize('n', [1, 2, 100])
def test_the_gini_coefficient_of_known_distributions(n: int) -> None:
    assert lam.gini(np.full(n, 0.7)) == pytest.approx(0)
    assert lam.gini(np.eye(n)[0]) == pytest.approx((n - 1) / n)
    values = np.random.default_rng(0).exponential(size=n)
    pairs = np.abs(values[:, None] - values).sum() / (2 * n**2 * values.mean())
    assert lam.gini(values) == pytest.approx(pairs)
    assert lam.diffusion_index(-values) == pytest.approx(100 * (1 - pairs))


def test_the_network_is_left_as_it_was() -> None:
    net = Local()
    net[0].bias.requires_grad_(False)
    lam.attribute(net, scenes.make(20, 24, (10, 10)).image, Box(16, 12, 8, 8), steps=1)
    assert [each.requires_grad for each in net.parameters()] == [True, False, True, True]
    assert all(each.grad is None for each in net.parameters())


@pytest.mark.parametrize('pixel', [(0, 0), (47, 39), (20, 20)], ids=str)
def test_the_default_region_is_within_the_picture(pixel: tuple[int, int]) -> None:
    net = Local()
    net.upscale = 3
    scene = scenes.make(40, 48, pixel)
    region = lam.default_region(net, scene)
    assert (region.width, region.height) == (6, 6)
    assert 16 <= region.left <= 16 + 48 - 6
    assert 32 <= region.top <= 32 + 40 - 6
    assert region.left <= scene.pixel[0] < region.left + 6
    assert region.top <= scene.pixel[1] < region.top + 6


def test_a_picture_without_texture_has_none_to_attribute() -> None:
    scene = scenes.make(20, 24, (10, 10))
    scene.image[:] = 0.5
    with pytest.raises(UsageError, match='the picture has no texture there'):
        lam.examine(Local(), scene, Box(24, 40, 8, 8), steps=2)


@pytest.mark.parametrize('name', networks.SMALL)
def test_every_network_has_a_map_and_a_figure_of_it(name: str) -> None:
    net = networks.build(name, upscale=2).eval()
    scene = scenes.make()
    region = lam.default_region(net, scene)
    steps: list[int] = []
    found = lam.examine(net, scene, region, side=24, steps=3, advance=lambda: steps.append(1))
    assert len(steps) == 3
    assert found.attribution.shape == (24, 24)
    assert found.result.shape == (48, 48, 3)
    assert 0 < found.diffusion < 100
    figure = lam.draw(found, name)
    drawn = scenes.drawn(figure)
    np.testing.assert_array_equal(drawn['LR picture'][0], found.scene.image)
    np.testing.assert_array_equal(drawn['Result, x2'][0], found.result)
    relative = np.abs(found.attribution) / np.abs(found.attribution).max()
    np.testing.assert_allclose(drawn['Attribution'][0], np.cbrt(relative))
    assert f'{found.diffusion:.1f}' in [text.get_text() for text in figure.texts]
