"""ELAN against the published networks' figures, and on every size."""

import json

import numpy as np
import pytest
import torch
from golden_recipe import HERE, sample_positions, seeded_image, seeded_state_dict

from attnsr.archs import ELAN
from attnsr.archs.elan_arch import shift_kernel
from attnsr.checkpoints import to_published

VARIANTS = {'elan': {}, 'elan_light': {'m_elan': 24, 'c_elan': 60, 'n_share': 1}}
PARAMETERS = {
    'elan': {2: 8_254_092, 3: 8_278_407, 4: 8_312_448},
    'elan_light': {2: 582_012, 3: 590_127, 4: 601_488},
}
FIGURES = sorted(path.stem for path in HERE.glob('elan*.npz'))
TINY = {'m_elan': 4, 'c_elan': 12, 'n_share': 1, 'window_sizes': (2, 4, 8)}


def seeded(variant, scale):
    net = ELAN(upscale=scale, img_range=1.0, **VARIANTS[variant]).double()
    state = {name: torch.tensor(array) for name, array in seeded_state_dict(variant, scale).items()}
    net.load_state_dict(state, strict=True)
    return net


def published_checkpoint(variant, scale):
    """Everything a released file holds: the constants and counters too, which the recipe leaves out."""
    shapes = json.loads((HERE / f'{variant}_x{scale}_keys.json').read_text())
    state = {name: torch.tensor(array) for name, array in seeded_state_dict(variant, scale).items()}
    return {name: state.get(name, torch.ones(shape, dtype=torch.float64)) for name, shape in shapes.items()}


@pytest.mark.parametrize('figure', FIGURES)
def test_published_figures(figure):
    stem, mode = figure.rsplit('_', 1)
    variant, scale = stem.rsplit('_x', 1)
    expected = np.load(HERE / f'{figure}.npz')
    net = seeded(variant, int(scale)).train(mode == 'train')
    x = torch.from_numpy(seeded_image(tuple(expected['input_shape']), int(expected['seed'])))
    output = net(x)
    assert tuple(output.shape) == tuple(expected['output_shape'])
    values = output.detach().numpy().ravel()
    tolerance = 1e-9 * expected['std']
    np.testing.assert_allclose(values[sample_positions(values.size)], expected['values'], rtol=0, atol=tolerance)
    assert abs(values.mean() - expected['mean']) < tolerance
    assert abs(values.std() - expected['std']) < tolerance
    if mode == 'train':
        r = torch.from_numpy(np.random.RandomState(7).standard_normal(output.shape))
        (output * r).mean().backward()
        norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
        published = dict(zip(expected['grad_names'].tolist(), expected['grad_norms'].tolist(), strict=True))
        # The published network also stores constants, some with a gradient; all that trains must agree.
        assert set(norms) <= set(published)
        for name, norm in norms.items():
            assert norm == pytest.approx(published[name], rel=1e-8, abs=1e-12), name


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('variant', VARIANTS)
def test_parameter_counts(variant, scale):
    net = ELAN(upscale=scale, **VARIANTS[variant])
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == PARAMETERS[variant][scale]


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_every_size_is_the_padded_image_cropped(training):
    """Sizes 1..40: equal to running on the image that NumPy reflects to the next multiple of the windows."""
    torch.manual_seed(0)
    net = ELAN(upscale=2, **TINY).double().train(training)
    generator = torch.Generator().manual_seed(1)
    for side in range(1, 41):
        h, w = side, (side * 7) % 40 + 1
        x = torch.rand(2, 3, h, w, generator=generator, dtype=torch.float64)
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), mode='reflect')
        y = net(x)
        whole = net(torch.from_numpy(padded))
        assert y.shape == (2, 3, 2 * h, 2 * w)
        torch.testing.assert_close(y, whole[:, :, : 2 * h, : 2 * w])
        if training:
            net.zero_grad()
            y.square().mean().backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())


def test_batch_is_independent_in_eval():
    net = ELAN(upscale=3, **TINY).double().eval()
    x = torch.rand(3, 3, 11, 13, dtype=torch.float64)
    torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]))


def test_eval_folds_the_batch_norm_of_the_unfolded_network():
    """Folded or not, the same mathematics: batch norm modules in eval mode inside a network left in train mode."""
    net = seeded('elan_light', 2)
    x = torch.rand(1, 3, 17, 20, dtype=torch.float64)
    folded = net.eval()(x)
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(net(x), folded, rtol=0, atol=1e-12)


def test_no_grad_is_the_same_in_float32():
    """Inference cuts the windows into chunks; large enough here that there are several."""
    net = ELAN(upscale=2, m_elan=2, c_elan=12, n_share=1).eval()
    x = torch.rand(1, 3, 96, 96)
    expected = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('wrapper', [None, 'params', 'params_ema', 'model_state_dict', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.'], ids=['plain', 'module'])
def test_released_checkpoint_loads_strictly(wrapper, prefix):
    state = {prefix + name: value for name, value in published_checkpoint('elan_light', 4).items()}
    net = ELAN(upscale=4, **VARIANTS['elan_light']).double()
    net.load_state_dict({'epoch': 3, wrapper: state} if wrapper else state, strict=True)
    name = 'body.11.modules_gmsa.gmsa_1.project_inp.0.weight'
    assert torch.equal(dict(net.named_parameters())[name], state[prefix + name])


def test_strict_loading_still_refuses_what_does_not_belong():
    state = published_checkpoint('elan_light', 4)
    net = ELAN(upscale=4, **VARIANTS['elan_light'])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*tail\.9\.weight'):
        net.load_state_dict({**state, 'tail.9.weight': torch.zeros(1)})
    del state['head.0.weight']
    with pytest.raises(RuntimeError, match=r'Missing key.*head\.0\.weight'):
        net.load_state_dict(state)
    with pytest.raises(ValueError, match=r'holds no parameters.*model_state_dict'):
        net.load_state_dict({'epoch': 3})


@pytest.mark.parametrize('variant', VARIANTS)
def test_to_published_has_the_published_names_and_round_trips(variant):
    net = ELAN(upscale=2, **VARIANTS[variant])
    published = to_published(net)
    shapes = json.loads((HERE / f'{variant}_x2_keys.json').read_text()) if variant == 'elan_light' else None
    if shapes:
        assert {name: list(value.shape) for name, value in published.items()} == shapes
    again = ELAN(upscale=2, **VARIANTS[variant])
    again.load_state_dict(published, strict=True)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_published_shift_kernel_is_the_shift():
    from attnsr.ops.shift_linear.reference import shift

    x = torch.rand(1, 13, 6, 7)
    kernel = shift_kernel(13, x.dtype)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, kernel, padding=1, groups=13), shift(x))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'upscale': 0}, 'upscale must be at least 1, got 0'),
        ({'m_elan': 5, 'n_share': 1}, 'm_elan must be a multiple of 1 \\+ n_share = 2, got 5'),
        ({'c_elan': 20}, 'c_elan must be .* multiple of the number of window sizes, 3, got 20'),
        ({'window_sizes': ()}, 'window_sizes must be'),
        ({'img_range': 0}, 'img_range must be greater than 0'),
    ],
)
def test_wrong_options_say_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        ELAN(**{'upscale': 2, **options})


def test_misspelt_option_is_refused():
    with pytest.raises(TypeError, match='windows_sizes'):
        ELAN(upscale=2, windows_sizes=(4, 8))
