"""What is ASID's own: shared attention, small maps, sizes that are not known yet."""

import pytest
import torch
import torch.nn.functional as F
from golden_recipe import seeded_image

from attnsr.archs import ASID
from attnsr.archs.asid_arch import ESA, LocalBlock, ReusingAttention
from attnsr.ops.window_attention import SharedAttention, window_attention

TINY = {'upscale': 2, 'num_feat': 16, 'num_groups': 3, 'esa_channels': 4}
# Height and width below and above what ESA's pooling window of 7 needs (16 pixels), and at its strides (22, 28).
SIZES = [(8, 8), (8, 16), (16, 8), (8, 40), (16, 16), (24, 40), (48, 8)]
sizes = pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)


def tiny(**options):
    torch.manual_seed(0)
    return ASID(**{**TINY, **options}).double().eval()


def image(*size, batch=1):
    return torch.from_numpy(seeded_image((batch, 3, *size)))


def test_image_is_padded_with_zeros_to_whole_windows():
    net, x = tiny(), image(13, 18, batch=2)
    assert torch.equal(net(x), net(F.pad(x, (0, 6, 0, 3)))[:, :, :26, :36])


def test_images_of_a_batch_do_not_mix():
    """In training neither: the statistics of squeeze-excitation and of attention are each image's own."""
    net, x = tiny().train(), torch.cat([image(17, 20), image(17, 20).flip(3)])
    torch.testing.assert_close(net(x), torch.cat([net(each[None]) for each in x]))


def test_no_grad_is_the_same_in_float32():
    """Inference works in strips and chunks; large enough here that there are several."""
    torch.manual_seed(0)
    net, x = ASID(upscale=2).eval(), image(96, 240).float()
    expected = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_later_groups_attend_as_the_first():
    """The first group's maps are what its own q, k and biases give, and all that later groups depend on."""
    net, x = tiny(), torch.randn(1, 16, 16, 24, dtype=torch.float64)
    y, shared = net.block0(x, None)
    assert [a.layout.grid for a in (*shared.local, *shared.grid)] == [False] * 3 + [True] * 3
    later, same = net.block1(y, shared)
    assert all(a is b for a, b in zip((*same.local, *same.grid), (*shared.local, *shared.grid), strict=True))
    with torch.no_grad():
        net.block0.residual_layer[0].SGA2.attn.rel_pos_bias.weight[3] += 1
    _, changed = net.block0(x, None)
    equal = [
        torch.equal(a.attention[0], b.attention[0])
        for a, b in zip((*changed.local, *changed.grid), (*shared.local, *shared.grid), strict=True)
    ]
    assert equal == [True, True, False, True, False, False]  # SLA1 and 2, then SLA3 after SGA2; SGA1, SGA2, SGA3
    assert not torch.allclose(net.block1(y, changed)[0], later)


@pytest.mark.parametrize('grid', [False, True], ids=['windows', 'grid'])
def test_values_and_output_projected_in_one_go(grid):
    """Equal to projecting the values, attending, and projecting what comes out, as the paper writes it."""
    torch.manual_seed(0)
    attn = ReusingAttention(6).double()
    x = torch.randn(2, 6, 8, 16, dtype=torch.float64, requires_grad=True)
    _, shared = window_attention(torch.randn(2, 4, 8, 16, dtype=torch.float64), (4,), grid=grid)
    v = attn.to_v(x.permute(0, 2, 3, 1))
    cut = v.unflatten(2, (4, -1) if grid else (-1, 4)).unflatten(1, (4, -1) if grid else (-1, 4))
    order = (0, 2, 4, 1, 3, 5) if grid else (0, 1, 3, 2, 4, 5)
    y = shared.attention[0] @ cut.permute(order).flatten(3, 4).flatten(0, 2)
    y = y.view(2, 2, 4, 4, 4, 6).permute((0, 3, 1, 4, 2, 5) if grid else (0, 1, 3, 2, 4, 5)).reshape(v.shape)
    expected, given = attn.to_out(y).permute(0, 3, 1, 2), attn(x, shared)
    torch.testing.assert_close(given, expected)
    leaves = (x, attn.to_v.weight, attn.to_out[0].weight)
    cotangent = torch.randn_like(given)
    for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (given, expected)), strict=True):
        torch.testing.assert_close(a, b)


def defined_esa(esa, x):
    """Pixel by pixel where the layers have no plain form."""
    narrow = esa.conv1(x)
    strided = esa.conv2(narrow)
    height, width = (min(7, side) for side in strided.shape[2:])
    tops, lefts = (range(0, side - k + 1, 3) for side, k in zip(strided.shape[2:], (height, width), strict=True))
    pooled = [[strided[:, :, top : top + height, left : left + width].amax((2, 3)) for left in lefts] for top in tops]
    far = esa.conv3(torch.stack([torch.stack(row, 2) for row in pooled], 2))
    for dim in (2, 3):
        side, target = far.shape[dim], x.shape[dim]
        lines = []
        for i in range(target):
            source = min(max((i + 0.5) * side / target - 0.5, 0), side - 1)
            low = min(int(source), max(side - 2, 0))
            high = min(low + 1, side - 1)
            lines.append(far.select(dim, low) * (low + 1 - source) + far.select(dim, high) * (source - low))
        far = torch.stack(lines, dim)
    return x * torch.sigmoid(esa.conv4(far + esa.conv_f(narrow)))


@pytest.mark.parametrize('compiling', [False, True], ids=['eager', 'size unknown'])
@sizes
def test_esa_equals_the_definition(monkeypatch, size, compiling):
    """Also as it is compiled and exported."""
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    torch.manual_seed(0)
    esa = ESA(8, 4).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    y, expected = esa(x), defined_esa(esa, x)
    torch.testing.assert_close(y, expected)
    leaves, cotangent = (x, *esa.parameters()), torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_local_block_equals_the_definition():
    torch.manual_seed(0)
    block = LocalBlock(8).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    expand, _, depthwise, _, excitation, project = block.net.fn
    gelu = lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))  # noqa: E731
    y = gelu(torch.einsum('oc,bchw->bohw', expand.weight[:, :, 0, 0], x) + expand.bias[:, None, None])
    padded = F.pad(y, (1, 1, 1, 1))
    kernel = depthwise.weight[:, 0, :, :, None, None]
    y = sum(kernel[:, i, j] * padded[:, :, i : i + 5, j : j + 7] for i in range(3) for j in range(3))
    y = gelu(y + depthwise.bias[:, None, None])
    squeezed = y.mean((2, 3)) @ excitation.gate[1].weight.T
    y = y * torch.sigmoid((squeezed * torch.sigmoid(squeezed)) @ excitation.gate[3].weight.T)[:, :, None, None]
    y = torch.einsum('oc,bchw->bohw', project.weight[:, :, 0, 0], y) + project.bias[:, None, None]
    torch.testing.assert_close(block(x), x + y)


@pytest.mark.parametrize(('window_size', 'size'), [(3, (3, 3)), (4, (5, 9)), (16, (20, 7))])
def test_other_window_sizes(window_size, size):
    """Each image is its own, sides below a window's too, and the gradients are finite."""
    net, x = tiny(window_size=window_size), torch.cat([image(*size), image(*size).flip(2)])
    y = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([net(each[None]) for each in x]), y)
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'upscale': 0}, 'upscale must be at least 1, got 0'),
        ({'num_feat': 18}, 'num_feat must be a multiple of 4 and at least 8, got 18'),
        ({'num_feat': 4}, 'num_feat must be a multiple of 4 and at least 8, got 4'),
        ({'num_groups': 0}, 'num_groups must be at least 1, got 0'),
        ({'window_size': 2}, 'window_size must be at least 3, got 2'),
        ({'esa_channels': 0}, 'esa_channels must be at least 1, got 0'),
    ],
)
def test_wrong_options_say_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        ASID(**{**TINY, **options})


def test_shared_attention_is_kept_as_probabilities():
    _, shared = tiny().block0(torch.randn(1, 16, 16, 24, dtype=torch.float64), None)
    for of_layer in (*shared.local, *shared.grid):
        assert isinstance(of_layer, SharedAttention)
        (a,) = of_layer.attention
        assert a.shape == (6, 64, 64)
        torch.testing.assert_close(a.sum(-1), torch.ones(6, 64, dtype=torch.float64))
