"""What is ELAN's own: padding, folding, shift kernels, arguments."""

import numpy as np
import pytest
import torch
from golden_recipe import seeded_state_dict

from attnsr.archs import ELAN
from attnsr.archs.elan_arch import shift_kernel

VARIANTS = {'elan': {}, 'elan_light': {'m_elan': 24, 'c_elan': 60, 'n_share': 1}}
TINY = {'m_elan': 4, 'c_elan': 12, 'n_share': 1, 'window_sizes': (2, 4, 8)}


def seeded(variant, scale):
    net = ELAN(upscale=scale, img_range=1.0, **VARIANTS[variant]).double()
    state = {name: torch.tensor(array) for name, array in seeded_state_dict(variant, scale).items()}
    net.load_state_dict(state, strict=True)
    return net


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
