"""Layer norm, 1x1 and depthwise 3x3 convolution against the definition, written out in float64."""

import pytest
import torch
from agreement import in_float64, with_gradients

from attnsr.ops.separable_conv import reference, separable_conv

EPS = 1e-5
SIZES = [(1, 1), (1, 6), (6, 1), (5, 7), (9, 4)]

sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')


def arguments(size, c=5, o=6):
    torch.manual_seed(0)
    shapes = {'x': (2, c, *size), 'norm_weight': (c,), 'norm_bias': (c,), 'pointwise': (o, c, 1, 1)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {**given, 'depthwise': torch.randn(o, 1, 3, 3, dtype=torch.float64), 'eps': EPS}


def defined(x, norm_weight, norm_bias, eps, pointwise, depthwise):
    mean = x.sum(1, keepdim=True) / x.shape[1]
    variance = (x - mean).square().sum(1, keepdim=True) / x.shape[1]
    x = (x - mean) / (variance + eps).sqrt() * norm_weight[:, None, None] + norm_bias[:, None, None]
    x = torch.einsum('oc,bchw->bohw', pointwise[:, :, 0, 0], x)
    (b, c, h, w), rows = x.shape, []
    framed = x.new_zeros(b, c, h + 2, w + 2)
    framed[:, :, 1:-1, 1:-1] = x
    for i in range(h):
        neighbourhoods = [framed[:, :, i : i + 3, j : j + 3] for j in range(w)]
        rows.append(torch.stack([(n * depthwise[:, 0]).sum((2, 3)) for n in neighbourhoods], dim=2))
    return torch.stack(rows, dim=2)


@sizes
def test_forward_and_gradients_are_the_definition_s(size):
    given = arguments(size)
    leaves = [value.requires_grad_() for name, value in given.items() if name != 'eps']
    y, expected = separable_conv(**given), defined(**given)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    for gradient, right in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-7, atol=1e-10)


def test_gradcheck():
    leaves = [value.requires_grad_() for name, value in arguments((2, 3), c=3, o=2).items() if name != 'eps']
    assert torch.autograd.gradcheck(lambda *values: separable_conv(*values[:3], EPS, *values[3:]), leaves)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
def test_gradients_of_the_norm_are_sums_in_float32(dtype):
    given = {k: v if k == 'eps' else v.to(dtype) for k, v in arguments((64, 64)).items()}
    cotangent = torch.randn(2, 6, 64, 64).to(dtype)
    _, gradients = with_gradients(separable_conv, given, cotangent)
    _, expected = with_gradients(defined, in_float64(given), cotangent.double())
    for name in ('norm_weight', 'norm_bias'):
        unit = expected[name].abs().max()
        torch.testing.assert_close(gradients[name] / unit, expected[name] / unit, check_dtype=False, rtol=0, atol=2e-2)


@pytest.mark.parametrize('strip_elements', [1, 100, 200, 10**6])
@sizes
def test_strips_are_the_whole(size, strip_elements, monkeypatch):
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', strip_elements)
    given = arguments(size)
    expected = defined(**given)
    for memory in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            torch.testing.assert_close(
                separable_conv(**{**given, 'x': given['x'].contiguous(memory_format=memory)}), expected
            )


@pytest.mark.parametrize('strip_elements', [100, 10**6], ids=['strips', 'whole'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
def test_autocast(dtype, strip_elements, monkeypatch):
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', strip_elements)
    given = {k: v if k == 'eps' else v.float() for k, v in arguments((9, 7)).items()}
    with torch.no_grad(), torch.autocast('cpu', dtype):
        y = separable_conv(**given)
    assert y.dtype == dtype
    expected = defined(**given)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('x', (2, 4, 5, 5), r'pointwise weight of shape \(O, C, 1, 1\); got \(2, 4, 5, 5\) and \(6, 5, 1, 1\)'),
        ('x', (5, 5, 5), r'expected x of shape \(B, C, H, W\)'),
        ('depthwise', (5, 1, 3, 3), r'depthwise weight must have the shape \(6, 1, 3, 3\); got \(5, 1, 3, 3\)'),
        ('norm_bias', (4,), r'norm must have the shape \(5,\); got \(5,\) and \(4,\)'),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    with pytest.raises(ValueError, match=message):
        separable_conv(**{**arguments((5, 5)), name: torch.zeros(shape)})


@pytest.mark.parametrize('name', ['norm_bias', 'depthwise'])
def test_dtypes_that_differ_are_named(name):
    given = arguments((5, 5))
    given[name] = given[name].bfloat16()
    with pytest.raises(ValueError, match=r'must be of one dtype; got torch.float64 and .*torch.bfloat16'):
        separable_conv(**given)
