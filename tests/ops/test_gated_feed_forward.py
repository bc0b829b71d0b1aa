"""The gated feed-forward against the definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnsr.ops.gated_feed_forward import gated_feed_forward
from attnsr.ops.separable_conv import reference as separable_reference

SIZES = [(1, 1), (1, 6), (5, 7), (9, 4)]

sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
memories = pytest.mark.parametrize(
    'memory', [torch.contiguous_format, torch.channels_last], ids=['plain', 'channels-last']
)


def arguments(size, c=5, hidden=3, memory=torch.contiguous_format):
    torch.manual_seed(0)
    shapes = {'norm_weight': (c,), 'norm_bias': (c,), 'project_in': (2 * hidden, c, 1, 1)}
    shapes |= {'depthwise': (2 * hidden, 1, 3, 3), 'project_out': (c, hidden, 1, 1)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, c, *size, dtype=torch.float64).contiguous(memory_format=memory)
    return {'x': x, **given, 'eps': 1e-6}


def defined(x, norm_weight, norm_bias, eps, project_in, depthwise, project_out):
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * norm_weight[:, None, None] + norm_bias[:, None, None]
    y = torch.einsum('oc,bchw->bohw', project_in[:, :, 0, 0], y)
    y = F.conv2d(y, depthwise, padding=1, groups=y.shape[1])
    a, b = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
    gated = a * (1 + torch.erf(a / math.sqrt(2))) / 2 * b
    return x + torch.einsum('oc,bchw->bohw', project_out[:, :, 0, 0], gated)


@memories
@sizes
def test_forward_and_gradients_are_the_definition_s(size, memory):
    given = arguments(size, memory=memory)
    leaves = [value.requires_grad_() for name, value in given.items() if name != 'eps']
    y, expected = gated_feed_forward(**given), defined(**given)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    for gradient, right in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-7, atol=1e-10)


def test_gradcheck():
    given = arguments((2, 3), c=2, hidden=2)
    eps = given.pop('eps')
    leaves = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(lambda *values: gated_feed_forward(*values[:3], eps, *values[3:]), leaves)


@memories
@pytest.mark.parametrize('strip_elements', [1, 100, 200, 10**6])
@sizes
def test_strips_are_the_whole_and_leave_the_input_alone(size, strip_elements, memory, monkeypatch):
    monkeypatch.setattr(separable_reference, 'STRIP_ELEMENTS', strip_elements)
    given = arguments(size, memory=memory)
    before = given['x'].clone()
    with torch.inference_mode():
        y = gated_feed_forward(**given)
    torch.testing.assert_close(y, defined(**given))
    assert torch.equal(given['x'], before)


@pytest.mark.parametrize('strip_elements', [100, 10**6], ids=['strips', 'whole'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('turned', [False, True], ids=['autocast', 'turned'])
def test_half_precision(turned, dtype, strip_elements, monkeypatch):
    monkeypatch.setattr(separable_reference, 'STRIP_ELEMENTS', strip_elements)
    given = {k: v if k == 'eps' else v.to(dtype if turned else torch.float32) for k, v in arguments((9, 7)).items()}
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=not turned):
        y = gated_feed_forward(**given)
    assert y.dtype == given['x'].dtype
    expected = defined(**{k: v if k == 'eps' else v.double() for k, v in given.items()})
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('shape', [(5, 4, 1, 1), (4, 3, 1, 1), (5, 3, 3, 3)])
def test_a_wrong_projection_is_named(shape):
    with pytest.raises(ValueError, match=r'project_out \(C, D, 1, 1\); got \(6, 5, 1, 1\) and'):
        gated_feed_forward(**{**arguments((5, 5)), 'project_out': torch.zeros(shape)})


@pytest.mark.parametrize('name', ['norm_bias', 'project_out'])
def test_dtypes_that_differ_are_named(name):
    given = arguments((5, 5))
    given[name] = given[name].bfloat16()
    with pytest.raises(ValueError, match=r'must be of one dtype; got torch.float64 and .*torch.bfloat16'):
        gated_feed_forward(**given)
