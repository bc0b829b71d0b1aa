"""What is ELAN's own: padding, folding, shift kernels, arguments."""

import copy

import numpy as np
import pytest
import torch
from golden_recipe import seeded_state_dict
from networks import trained_once

from attnsr.archs import ELAN, elan_strips
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


@pytest.mark.parametrize('strip_pixels', [1, 300, 900, 10**6])
@pytest.mark.parametrize(
    ('n_share', 'window_sizes'), [(0, (2, 4, 8)), (1, (4, 8, 16)), (1, (2, 3, 4)), (1, (1, 3)), (3, (2, 8))], ids=str
)
def test_inference_in_strips_is_the_same(monkeypatch, n_share, window_sizes, strip_pixels):
    """Of one strip and of many, the last one shorter, straight and shifted; the input is left as it was."""
    monkeypatch.setattr(elan_strips, 'STRIP_PIXELS', strip_pixels)
    torch.manual_seed(0)
    arguments = {'m_elan': 2 + 2 * n_share, 'n_share': n_share, 'window_sizes': window_sizes}
    net = trained_once(ELAN(upscale=2, c_elan=12, img_range=1.0, **arguments)).double().eval()
    for batch, height, width in ((1, 5, 3), (1, 24, 16), (2, 70, 33), (1, 96, 20)):
        x = torch.rand(batch, 3, height, width, dtype=torch.float64)
        before, expected = x.clone(), net(x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-11)
        assert torch.equal(x, before)


def test_strips_leave_the_map_that_they_are_given_alone(monkeypatch):
    monkeypatch.setattr(elan_strips, 'STRIP_PIXELS', 1)
    block = ELAN(upscale=2, **TINY).double().eval().body[1]
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 12, 48, 32, dtype=torch.float64).contiguous(memory_format=memory)
        before, expected = x.clone(), block(x)
        with torch.no_grad():
            assert elan_strips.serves(block, x)
            torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
        assert torch.equal(x, before)


def test_inference_under_another_default_device():
    """As it may be while other networks are built; what strips keep from one call to the next is not of it."""
    net, x = ELAN(upscale=2, **TINY).eval(), torch.rand(1, 3, 17, 39)
    expected = net(x)
    elan_strips._places.cache_clear()
    for device in ('meta', 'cpu'):
        with torch.no_grad(), torch.device(device):
            y = net(x)
        assert y.device.type == 'cpu'
        torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit.trace:FutureWarning')
def test_traces_and_hooks_see_the_whole_maps():
    net, x = ELAN(upscale=2, **TINY).eval(), torch.rand(1, 3, 16, 24)
    expected, seen = net(x), []
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)
        for block in net.body:
            for lfe in block.modules_lfe.values():
                lfe.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        torch.testing.assert_close(net(x), expected)
    assert seen == [(1, 12, 16, 24)] * 4


def test_inference_follows_the_parameters_and_the_statistics():
    """What is folded is folded anew on every forward."""
    net, x = ELAN(upscale=2, **TINY).double().eval(), torch.rand(1, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        first = net(x)
        for tensor in (*net.parameters(), *(b for name, b in net.named_buffers() if name.endswith(('_mean', '_var')))):
            tensor.mul_(1.1)
        second = net(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, net(x).detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_inference_in_other_dtypes(dtype, tolerance):
    """Large enough that there are several strips and chunks."""
    torch.manual_seed(0)
    net = trained_once(ELAN(upscale=2, m_elan=4, c_elan=12, n_share=1, img_range=1.0)).eval()
    x = torch.rand(1, 3, 176, 160)
    expected = copy.deepcopy(net).double()(x.double()).detach()
    net.to(dtype)
    with torch.inference_mode():
        y = net(x.to(dtype))
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < tolerance * expected.std()


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
