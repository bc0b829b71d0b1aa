"""Dynamic convolution against the definition, computed pixel by pixel in float64."""

from itertools import product

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops.dynamic_conv import aggregate, dynamic_conv, reference

# Error allowed to each element: absolute, and relative to the exact figure for the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: {'atol': 1e-11, 'rtol': 1e-12},
    torch.float32: {'atol': 1e-4, 'rtol': 1e-5},
    torch.float16: {'atol': 1e-2, 'rtol': 1e-3},
    torch.bfloat16: {'atol': 1e-1, 'rtol': 8e-3},
}
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (5, 7), (11, 4)]
# Channels, kernels, channels of z, kernel size.
SHAPES = [(2, 1, 1, 7), (6, 3, 2, 3), (4, 4, 3, 5), (3, 1, 2, 1)]
MODES = {'autograd': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}

sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)


def defined(u, z, weight, bias, kernel_size):
    return aggregated(u, torch.einsum('od,bdhw->bohw', weight[:, :, 0, 0], z) + bias[:, None, None], kernel_size)


def aggregated(u, kernels, kernel_size):
    channels, (height, width) = u.shape[1], u.shape[2:]
    k = kernels.unflatten(1, (-1, kernel_size, kernel_size))
    shared = torch.arange(channels) // (channels // k.shape[1])  # the kernel of each channel
    y = torch.zeros_like(u)
    for h, w, i, j in product(range(height), range(width), range(kernel_size), range(kernel_size)):
        row, column = h + i - kernel_size // 2, w + j - kernel_size // 2
        if 0 <= row < height and 0 <= column < width:
            y[:, :, h, w] = y[:, :, h, w] + k[:, shared, i, j, h, w] * u[:, :, row, column]
    return y


def arguments(size, shape, memory='channels-last', dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    channels, kernels, predictors, kernel_size = shape
    return {
        'u': random(batch, channels, *size, memory=memory, dtype=dtype),
        'z': random(batch, predictors, *size, memory=memory, dtype=dtype),
        'weight': random(kernels * kernel_size**2, predictors, 1, 1, dtype=dtype),
        'bias': random(kernels * kernel_size**2, dtype=dtype),
        'kernel_size': kernel_size,
    }


def assert_agrees(given, function=dynamic_conv):
    """The output and every gradient equal the definition's for the same inputs; dtypes are those of the inputs."""
    dtype = given['u'].dtype
    cotangent = torch.randn(given['u'].shape).to(dtype)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(defined, in_float64(given), cotangent.double())
    torch.testing.assert_close(y, expected.to(dtype), **TOLERANCES[dtype])
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name].to(dtype), **TOLERANCES[dtype], msg=lambda text, at=name: f'{at}: {text}'
        )


@pytest.mark.parametrize('rows', [1, 2, 100], ids='strips of {} rows'.format)
@shapes
@sizes
def test_equals_the_definition(monkeypatch, size, shape, rows):
    """Forward and backward go strip by strip."""
    kernels, kernel_size = shape[1], shape[3]
    strip = rows * (size[1] + kernel_size - 1) * kernels * kernel_size**2
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', strip)
    assert_agrees(arguments(size, shape))


def test_a_strip_is_a_row_at_least(monkeypatch):
    monkeypatch.setattr(reference, 'STRIP_ELEMENTS', 1)
    assert_agrees(arguments((5, 7), (6, 3, 2, 3)))


@pytest.mark.parametrize('memory', ['plain', 'channels-last', 'view'])
@pytest.mark.parametrize('mode', ['no_grad', 'inference'])
def test_without_autograd(mode, memory):
    """Any memory format; nothing that was passed in is written to."""
    given = arguments((5, 7), (6, 3, 2, 3), memory)
    before = {name: value.clone() for name, value in tensors(given).items()}
    with MODES[mode]():
        y = dynamic_conv(**given)
    torch.testing.assert_close(y, defined(**given), **TOLERANCES[torch.float64])
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name, value in before.items():
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize('memory', ['plain', 'view'])
def test_gradients_in_any_memory_format(memory):
    assert_agrees(arguments((5, 7), (6, 3, 2, 3), memory))


def test_gradcheck():
    given = arguments((3, 2), (4, 2, 2, 3), batch=1)
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    assert torch.autograd.gradcheck(lambda *values: dynamic_conv(*values, 3), leaves)


@dtypes
@shapes
def test_other_dtypes(shape, dtype):
    assert_agrees(arguments((5, 7), shape, dtype=dtype))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, mode):
    """bfloat16 out of float32 or bfloat16, the sums in float32."""
    given = arguments((5, 7), (6, 3, 2, 3), dtype=torch.bfloat16)
    given = {**given, **{name: value.to(dtype) for name, value in tensors(given).items()}}
    given['u'].requires_grad_(mode == 'autograd')
    with MODES[mode](), torch.autocast('cpu', dtype=torch.bfloat16):
        y = dynamic_conv(**given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, defined(**in_float64(given)).bfloat16(), **TOLERANCES[torch.bfloat16])


def test_gradients_under_autocast_are_in_float32():
    """Also where the gradients themselves are taken under it."""
    given = arguments((5, 7), (6, 3, 2, 3), dtype=torch.bfloat16)
    given = {**given, **{name: value.float() for name, value in tensors(given).items()}}
    cotangent = torch.randn(given['u'].shape).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, gradients = with_gradients(dynamic_conv, given, cotangent)
    _, expected = with_gradients(defined, in_float64(given), cotangent.double())
    for name in ('weight', 'bias'):  # those of the maps are rounded to bfloat16, as the maps were
        torch.testing.assert_close(gradients[name], expected[name].float(), **TOLERANCES[torch.float32])


@shapes
def test_compiled_whole(shape):
    torch.compiler.reset()
    compiled = torch.compile(dynamic_conv, backend='aot_eager', fullgraph=True)
    assert_agrees(arguments((5, 7), shape), compiled)
    with torch.no_grad():
        given = arguments((7, 4), shape)
        torch.testing.assert_close(compiled(**given), defined(**given), **TOLERANCES[torch.float64])


@sizes
@shapes
def test_counted_form_is_the_definition(size, shape):
    """On the meta device, for counting operations."""
    given = arguments(size, shape)
    size = given.pop('kernel_size')
    weight = given.pop('weight').flatten(1)
    y = reference.defined(**given, weight=weight, size=size)
    torch.testing.assert_close(
        y, defined(**given, weight=weight[:, :, None, None], kernel_size=size), **TOLERANCES[torch.float64]
    )


def test_operations_are_counted_on_the_meta_device():
    given = {name: value.to('meta') for name, value in tensors(arguments((8, 9), (12, 4, 3, 5), batch=2)).items()}
    with FlopCounterMode(display=False) as counter:
        y = dynamic_conv(**given, kernel_size=5)
    assert y.shape == (2, 12, 8, 9)
    pixels = 2 * 8 * 9
    assert counter.get_total_flops() == 2 * pixels * 25 * (4 * 3 + 12)  # prediction, and a tap for each channel


def given_kernels(size, shape, memory='channels-last', dtype=torch.float64):
    torch.manual_seed(0)
    channels, kernels, _, kernel_size = shape
    return {
        'u': random(2, channels, *size, memory=memory, dtype=dtype),
        'kernels': random(2, kernels * kernel_size**2, *size, memory=memory, dtype=dtype),
        'kernel_size': kernel_size,
    }


@shapes
@sizes
def test_given_kernels(size, shape):
    assert_kernels_are_used(given_kernels(size, shape))


@pytest.mark.parametrize('memory', ['plain', 'view'])
def test_given_kernels_in_any_memory_format(memory):
    assert_kernels_are_used(given_kernels((5, 7), (6, 3, 2, 3), memory))


def assert_kernels_are_used(given):
    cotangent = torch.randn_like(given['u'])
    y, gradients = with_gradients(aggregate, given, cotangent)
    expected, expected_gradients = with_gradients(aggregated, given, cotangent)
    torch.testing.assert_close(y, expected, **TOLERANCES[torch.float64])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **TOLERANCES[torch.float64])


def test_gradcheck_of_given_kernels():
    given = given_kernels((3, 2), (4, 2, 2, 3))
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    assert torch.autograd.gradcheck(lambda *values: aggregate(*values, 3), leaves)


@pytest.mark.parametrize('autocast', [False, True], ids=['as they are', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_given_kernels_of_other_dtypes(dtype, autocast):
    """Sums are in float32."""
    given = given_kernels((5, 7), (6, 3, 2, 3), dtype=torch.bfloat16)
    given = {**given, **{name: value.to(dtype) for name, value in tensors(given).items()}}
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        y = aggregate(**given)
    dtype = torch.bfloat16 if autocast else dtype
    torch.testing.assert_close(y, aggregated(**in_float64(given)).to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'kernel_size': 4}, r'kernel_size must be odd, got 4'),
        ({'u': (6, 4, 5)}, r'u of shape \(B, C, H, W\) and kernels .*\(B, G \* 9, H, W\); got \(6, 4, 5\) and'),
        ({'kernels': (1, 27, 4, 4)}, r'got \(1, 6, 4, 5\) and \(1, 27, 4, 4\)'),
        ({'kernels': (2, 27, 4, 5)}, r'got \(1, 6, 4, 5\) and \(2, 27, 4, 5\)'),
        ({'kernels': (1, 26, 4, 5)}, r'kernels must have G \* 9 channels; got 26'),
        ({'kernels': (1, 36, 4, 5)}, r'must divide the 6 channels of u; got 4 kernels'),
        ({'kernels': (1, 0, 4, 5)}, r'must divide the 6 channels of u; got 0 kernels'),
    ],
)
def test_wrong_kernels_say_what_is_right(change, message):
    shapes = {'u': (1, 6, 4, 5), 'kernels': (1, 27, 4, 5), 'kernel_size': 3, **change}
    given = {name: torch.zeros(shape) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        aggregate(**given)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'kernel_size': 4}, r'kernel_size must be odd, got 4'),
        ({'u': (6, 4, 5)}, r'u of shape \(B, C, H, W\).* got \(6, 4, 5\) and \(1, 2, 4, 5\)'),
        ({'z': (1, 2, 4, 4)}, r'got \(1, 6, 4, 5\) and \(1, 2, 4, 4\)'),
        ({'z': (2, 2, 4, 5)}, r'got \(1, 6, 4, 5\) and \(2, 2, 4, 5\)'),
        ({'weight': (27, 3, 1, 1)}, r'weight .*\(G \* 9, 2, 1, 1\); got \(27, 3, 1, 1\)'),
        ({'weight': (26, 2, 1, 1)}, r'weight .*\(G \* 9, 2, 1, 1\); got \(26, 2, 1, 1\)'),
        ({'weight': (36, 2, 1, 1)}, r'must divide the 6 channels of u; got 4 kernels'),
        ({'bias': (26,)}, r'bias must have the shape \(27,\); got \(26,\)'),
    ],
)
def test_wrong_arguments_say_what_is_right(change, message):
    shapes = {'u': (1, 6, 4, 5), 'z': (1, 2, 4, 5), 'weight': (27, 2, 1, 1), 'bias': (27,), 'kernel_size': 3, **change}
    given = {name: torch.zeros(shape) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        dynamic_conv(**given)
