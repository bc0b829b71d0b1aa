"""Shift and 1x1 convolution against the definition, computed pixel by pixel in float64."""

from itertools import product

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients

from attnsr.ops.shift_linear import reference, shift_linear

# Error allowed to each element: absolute, and relative to the exact figure for the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: {'atol': 1e-12, 'rtol': 1e-12},
    torch.float32: {'atol': 1e-5, 'rtol': 1e-5},
    torch.float16: {'atol': 4e-3, 'rtol': 2e-3},
    torch.bfloat16: {'atol': 3e-2, 'rtol': 1e-2},
}
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (5, 7)]
CHANNELS = [(4, 3), (5, 5), (7, 13), (13, 4)]  # in, out
FORMATS = ['plain', 'channels-last', 'view']
MODES = {'autograd': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}
# Bias, activation, residual.
PARTS = [(False, None, False), (True, 'relu', False), (False, None, True), (True, 'relu', True)]

sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
channels = pytest.mark.parametrize('channels', CHANNELS, ids=lambda channels: f'{channels[0]}to{channels[1]}')
formats = pytest.mark.parametrize('memory', FORMATS)
parts = pytest.mark.parametrize(
    'parts', PARTS, ids=lambda parts: '+'.join(n for n, p in zip(('bias', 'relu', 'residual'), parts, strict=True) if p)
)


def defined(x, weight, bias=None, activation=None, residual=None):
    count, (height, width), g = x.shape[1], x.shape[2:], x.shape[1] // 5
    reads = [(0, 1)] * g + [(0, -1)] * g + [(1, 0)] * g + [(-1, 0)] * g + [(0, 0)] * (count - 4 * g)
    outside = x.new_zeros(len(x))
    pixels = []
    for row, column in product(range(height), range(width)):
        at = [(row + down, column + right) for down, right in reads]
        shifted = [x[:, c, i, j] if 0 <= i < height and 0 <= j < width else outside for c, (i, j) in enumerate(at)]
        pixels.append(torch.einsum('oc,cb->bo', weight[:, :, 0, 0], torch.stack(shifted)))
    y = torch.stack(pixels, dim=2).unflatten(2, (height, width))
    y = y if bias is None else y + bias[:, None, None]
    y = y.clamp(min=0) if activation == 'relu' else y
    return y if residual is None else y + residual


def arguments(size, channels, parts, memory='plain', dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    c, o = channels
    has_bias, activation, has_residual = parts
    return {
        'x': random(batch, c, *size, memory=memory, dtype=dtype),
        'weight': random(o, c, 1, 1, dtype=dtype) / c**0.5,
        'bias': random(o, dtype=dtype) if has_bias else None,
        'activation': activation,
        'residual': random(batch, o, *size, memory=memory, dtype=dtype) if has_residual else None,
    }


def assert_agrees(given, function=shift_linear):
    """The output and every gradient equal the definition's for the same inputs; dtypes are those of the inputs."""
    dtype = given['x'].dtype
    cotangent = torch.randn(len(given['x']), len(given['weight']), *given['x'].shape[2:]).to(dtype)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(defined, in_float64(given), cotangent.double())
    torch.testing.assert_close(y, expected.to(dtype), **TOLERANCES[dtype])
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name].to(dtype), **TOLERANCES[dtype], msg=lambda text, at=name: f'{at}: {text}'
        )


@parts
@formats
@channels
@sizes
def test_equals_the_definition(size, channels, memory, parts):
    assert_agrees(arguments(size, channels, parts, memory))


@pytest.mark.parametrize('rows', [1, 2, 100], ids='strips of {} rows'.format)
@formats
@parts
@sizes
def test_strips_equal_the_definition(monkeypatch, size, parts, memory, rows):
    """Without autograd the map is worked on in strips; nothing that was passed in is written to."""
    given = arguments(size, (7, 13), parts, memory)
    before = {name: value.clone() for name, value in tensors(given).items()}
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', rows * len(given['x']) * size[1] * 13)
    with torch.no_grad():
        y = shift_linear(**given)
    torch.testing.assert_close(y, defined(**given), **TOLERANCES[torch.float64])
    for name, value in before.items():
        assert torch.equal(given[name], value), name


def test_a_strip_is_a_row_at_least(monkeypatch):
    given = arguments((5, 7), (13, 4), (True, 'relu', True))
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', 1)
    with torch.no_grad():
        torch.testing.assert_close(shift_linear(**given), defined(**given), **TOLERANCES[torch.float64])


@parts
def test_gradcheck(parts):
    given = arguments((2, 3), (6, 2), parts, batch=1)
    leaves = {name: value.requires_grad_() for name, value in tensors(given).items()}

    def function(*values):
        return shift_linear(**{**given, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@formats
@channels
def test_other_dtypes(channels, memory, dtype):
    """No activation: where rounding moves a sum across 0, a whole gradient appears or goes."""
    assert_agrees(arguments((5, 7), channels, (True, None, True), memory, dtype))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('mode', MODES)
@parts
def test_other_dtypes_forward(monkeypatch, parts, mode, dtype):
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', 2 * 2 * 7 * 13)
    given = arguments((5, 7), (13, 4), parts, 'channels-last', dtype)
    with MODES[mode]():
        y = shift_linear(**given)
    torch.testing.assert_close(y, defined(**in_float64(given)).to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize('residual', [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_autocast_gives_the_dtype_of_the_convolution(monkeypatch, mode, residual):
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', 2 * 2 * 7 * 13)
    given = arguments((5, 7), (13, 4), (True, 'relu', residual is not None), 'channels-last', torch.float32)
    given = {**given, **{name: value.bfloat16().float() for name, value in tensors(given).items()}}
    expected = defined(**in_float64(given))
    if residual is not None:
        given['residual'] = given['residual'].to(residual)
    with MODES[mode](), torch.autocast('cpu', dtype=torch.bfloat16):
        y = shift_linear(**given)
    torch.testing.assert_close(y, expected.bfloat16(), **TOLERANCES[torch.bfloat16])


def test_autocast_gradients_come_in_the_dtype_of_the_parameters():
    given = arguments((5, 7), (13, 4), (True, None, False), 'channels-last', torch.float32)
    given = {**given, **{name: value.bfloat16().float() for name, value in tensors(given).items()}}
    cotangent = torch.randn(2, 4, 5, 7).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, gradients = with_gradients(shift_linear, given, cotangent)
    _, expected = with_gradients(defined, in_float64(given), cotangent.double())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name].float(), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
def test_compiled_whole(mode):
    torch.compiler.reset()
    compiled = torch.compile(shift_linear, backend='aot_eager', fullgraph=True)
    given = arguments((5, 7), (13, 4), (True, 'relu', True), 'channels-last')
    if mode == 'autograd':
        assert_agrees(given, compiled)
    else:
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given), defined(**given), **TOLERANCES[torch.float64])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'x': (10, 5, 7)}, r'x of shape \(B, C, H, W\) .* got \(10, 5, 7\)'),
        ({'weight': (6, 9, 1, 1)}, r'weight of shape \(O, C, 1, 1\); got \(2, 10, 5, 7\) and \(6, 9, 1, 1\)'),
        ({'weight': (6, 10, 3, 3)}, r'got .* and \(6, 10, 3, 3\)'),
        ({'weight': (6, 10)}, r'got .* and \(6, 10\)'),
        ({'bias': (5,)}, r'bias .*\(6,\).* got \(5,\)'),
        ({'bias': (6, 1)}, r'bias .*\(6,\).* got \(6, 1\)'),
        ({'residual': (2, 10, 5, 7)}, r'shape of the output, \(2, 6, 5, 7\); got \(2, 10, 5, 7\)'),
        ({'residual': (6, 1, 1)}, r'shape of the output, \(2, 6, 5, 7\); got \(6, 1, 1\)'),
    ],
)
@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
def test_wrong_shapes(mode, change, message):
    given = {'x': (2, 10, 5, 7), 'weight': (6, 10, 1, 1), **change}
    with MODES[mode](), pytest.raises(ValueError, match=message):
        shift_linear(**{name: torch.zeros(shape) for name, shape in given.items()})


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match=r"activation 'gelu' is not known; valid: None, 'relu'"):
        shift_linear(torch.zeros(1, 5, 2, 2), torch.zeros(5, 5, 1, 1), activation='gelu')
