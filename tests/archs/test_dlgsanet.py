"""What is DLGSANet's own: attention over the image in training and over overlapping windows otherwise, its kernels."""

import pytest
import torch
from golden_recipe import seeded_image

from attnsr.archs import DLGSANet

TINY = {'upscale': 2, 'dim': 12, 'num_groups': 1, 'num_blocks': 2, 'num_heads': 3}


def tiny(**options):
    torch.manual_seed(0)
    net = DLGSANet(**{**TINY, **options}).double().eval()
    with torch.no_grad():  # heads that differ
        for name, parameter in net.named_parameters():
            if name.endswith('temperature'):
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)).view_as(parameter))
    return net


def image(*size, batch=1):
    return torch.from_numpy(seeded_image((batch, 3, *size)))


@pytest.mark.parametrize(('upscale', 'side'), [(2, 96), (3, 72), (4, 48)])
def test_published_windows_by_scale(upscale, side):
    """What fits in a window is attended to as a whole, as in training; one pixel more makes two windows."""
    net, fits, exceeds = tiny(upscale=upscale, num_blocks=1), image(side, 5), image(side + 1, 5)
    with torch.no_grad():
        torch.testing.assert_close(net(fits), net.train()(fits))
        assert not torch.allclose(net.eval()(exceeds), net.train()(exceeds))


def test_given_windows_go_before_published_ones():
    x = image(9, 14)
    with torch.no_grad():
        torch.testing.assert_close(tiny(upscale=8, tlc_size=14)(x), tiny(upscale=8, tlc_size=14).train()(x))
        assert not torch.allclose(tiny(tlc_size=13)(x), tiny(tlc_size=14)(x))


def test_training_attends_over_the_whole_image():
    x = image(20, 31)
    torch.testing.assert_close(tiny(tlc_size=8).train()(x), tiny(tlc_size=40)(x))


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_images_of_a_batch_do_not_mix(training):
    net, x = tiny(tlc_size=8).train(training), torch.cat([image(17, 20), image(17, 20).flip(3)])
    torch.testing.assert_close(net(x), torch.cat([net(each[None]) for each in x]))


def test_no_grad_is_the_same_in_float32():
    """Inference works in strips and window by window; large enough here that there are several."""
    torch.manual_seed(0)
    net, x = DLGSANet(upscale=4, dim=48, num_groups=1, num_blocks=1).eval(), image(96, 150).float()
    expected = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_training_keeps_no_kernels():
    """49 numbers a pixel for every 3 channels; nothing that waits for the backward pass has even 49."""
    net, x, kept = tiny().train(), image(10, 12), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        net(x)
    assert max(tensor.numel() for tensor in kept) < 49 * x[0, 0].numel()


SIZES = [(1, 3, 2, 2), (3, 3, 5, 6), (1, 3, 8, 21), (2, 3, 33, 40), (1, 3, 16, 8)]


def test_export_takes_images_below_and_above_the_windows():
    net = tiny(num_blocks=1, tlc_size=8)
    dims = {dim: torch.export.Dim(name) for dim, name in ((0, 'batch'), (2, 'height'), (3, 'width'))}
    program = torch.export.export(net, (image(12, 13, batch=2),), dynamic_shapes=({**dims},)).module()
    for batch, _, *size in SIZES:
        x = image(*size, batch=batch)
        torch.testing.assert_close(program(x), net(x))


def test_compiled_takes_images_below_and_above_the_windows():
    torch.compiler.reset()
    net = tiny(num_blocks=1, tlc_size=8)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, _, *size in SIZES[1:]:
            x = image(*size, batch=batch)
            torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'upscale': 0}, 'upscale must be at least 1, got 0'),
        ({'upscale': 8}, 'upscale 8 has no published tlc_size .only 2, 3, 4 have.; give one'),
        ({'tlc_size': 0}, 'tlc_size must be at least 1, got 0'),
        ({'num_groups': 0}, 'num_groups must be at least 1, got 0'),
        ({'num_blocks': 0}, 'num_blocks must be at least 1, got 0'),
        ({'num_heads': 0}, 'num_heads must be at least 1, got 0'),
        ({'ffn_expansion': 0}, 'ffn_expansion must be at least 1, got 0'),
        ({'dim': 13}, 'dim must be .* multiple of num_heads = 3, got 13'),
        ({'dim': 3}, 'dim must be at least 4 .* got 3'),
        ({'kernel_size': 6}, 'kernel_size must be odd and at least 1, got 6'),
    ],
)
def test_wrong_options_say_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        DLGSANet(**{**TINY, **options})
