"""The kernels of shift and 1x1 convolution against the reference in float64, for the same, already rounded, inputs."""

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops import launching
from attnsr.ops.shift_linear import reference, shift_linear

triton_kernel = pytest.importorskip('attnsr.ops.shift_linear.triton_kernel')

# Error allowed to each element, absolute and relative; of gradients in units of the largest, since some of them are
# sums over all pixels.
TOLERANCES = {
    torch.float32: {'atol': 2e-6, 'rtol': 2e-6},
    torch.float16: {'atol': 1e-3, 'rtol': 1e-3},
    torch.bfloat16: {'atol': 8e-3, 'rtol': 8e-3},
}
# TF32 has 10 bits, to which tensor cores cut both factors off: a product is smaller by 0.1 % on average and 0.2 % at
# most. Over the millions of elements of a map the largest of such errors in sums of 60 to 360 products was 4.6e-3.
TF32_TOLERANCES = {'atol': 4e-3, 'rtol': 4e-3}
# Sums of up to 360 products, one after the other in float32: the largest error of 47 million was 5.1e-6.
FULL_TOLERANCES = {**TOLERANCES, torch.float32: {'atol': 5e-6, 'rtol': 5e-6}}

# Channels in and out; bias, activation, residual.
NETWORKS = {
    'ELAN-light, first': ((60, 120), (True, 'relu', False)),
    'ELAN-light, second': ((120, 60), (True, None, True)),
    'ELAN, first': ((180, 360), (True, 'relu', False)),
    'ELAN, second': ((360, 180), (True, None, True)),
}
CHANNELS = [(4, 3), (1, 2), (5, 5), (7, 13), (66, 65), (16, 129)]
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (5, 7), (9, 13)]
PARTS = [(False, None, False), (True, 'relu', False), (False, 'relu', True), (True, None, True)]
FORMATS = ['plain', 'channels-last', 'view']
FULL = {'1280 x 720 x4': (1, (192, 320)), 'training': (32, (64, 64))}

dtypes = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
networks = pytest.mark.parametrize('network', NETWORKS.values(), ids=list(NETWORKS))
parts = pytest.mark.parametrize(
    'parts', PARTS, ids=lambda parts: '+'.join(n for n, p in zip(('bias', 'relu', 'residual'), parts, strict=True) if p)
)


def arguments(channels, parts, size=(5, 7), *, device, dtype=torch.float32, memory='channels-last', batch=2):
    torch.manual_seed(0)
    c, o = channels
    has_bias, activation, has_residual = parts
    given = {
        'x': random(batch, c, *size, memory=memory, dtype=dtype),
        'weight': random(o, c, 1, 1, dtype=dtype) / c**0.5,
        'bias': random(o, dtype=dtype) if has_bias else None,
        'activation': activation,
        'residual': random(batch, o, *size, memory=memory, dtype=dtype) if has_residual else None,
    }
    # Moved as they are: a view stays one.
    return {**given, **{name: value.to(device) for name, value in tensors(given).items()}}


def referred(x, weight, bias=None, activation=None, residual=None):
    return reference.shift_linear(x, weight, bias, activation, residual)


def assert_close(found, expected, tolerances, unit=1.0, name='output'):
    torch.testing.assert_close(found.double() / unit, expected / unit, **tolerances, msg=lambda text: f'{name}: {text}')


def assert_agrees(given, function=shift_linear, tolerances=None, memory='channels-last'):
    """The output and every gradient equal the reference's, in dtypes of the inputs."""
    x, weight = given['x'], given['weight']
    tolerances = tolerances or TOLERANCES[x.dtype]
    torch.manual_seed(1)
    cotangent = random(len(x), len(weight), *x.shape[2:], memory=memory, dtype=x.dtype).to(x.device)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, tolerances)
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype, name
        expected = expected_gradients[name]
        assert_close(gradient, expected, tolerances, expected.abs().max().clamp(min=1), name)


@dtypes
@networks
def test_equals_the_reference(kernel_device, network, dtype):
    assert_agrees(arguments(*network, device=kernel_device, dtype=dtype))


@pytest.mark.parametrize('channels', CHANNELS, ids=lambda channels: f'{channels[0]}to{channels[1]}')
@parts
def test_any_channels(kernel_device, channels, parts):
    assert_agrees(arguments(channels, parts, device=kernel_device))


@pytest.mark.parametrize('memory', FORMATS)
@pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
def test_any_size_and_memory(kernel_device, size, memory):
    assert_agrees(arguments((7, 13), (True, None, True), size, device=kernel_device, memory=memory), memory=memory)


def test_nothing_outside_of_the_map_is_read(kernel_device):
    given = arguments((10, 6), (True, 'relu', False), device=kernel_device)
    surroundings = (
        given['x'].new_full((6, *given['x'].shape[1:]), torch.nan).contiguous(memory_format=torch.channels_last)
    )
    surroundings[2:4] = given['x']
    assert_agrees({**given, 'x': surroundings[2:4]})


@pytest.mark.parametrize('programs', [1, 3, 5])
def test_parameter_gradients_are_sums_of_parts(kernel_device, programs, monkeypatch):
    monkeypatch.setattr(triton_kernel, 'PARAMETER_PROGRAMS', programs)
    assert_agrees(arguments((7, 13), (True, 'relu', False), (9, 13), device=kernel_device))


def test_an_expanded_gradient(kernel_device):
    given = arguments((7, 13), (True, 'relu', True), device=kernel_device)
    leaves = {name: value.requires_grad_() for name, value in tensors(given).items()}
    shift_linear(**given).sum().backward()
    exact = {name: value.detach().requires_grad_() for name, value in in_float64(leaves).items()}
    referred(**{**given, **exact}).sum().backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, exact[name].grad, TOLERANCES[torch.float32], 10, name)


def test_relu_passes_what_is_no_number_on(kernel_device):
    given = arguments((5, 3), (False, 'relu', False), device=kernel_device)
    given['x'][0, 4, 2, 3] = torch.nan
    assert torch.equal(shift_linear(**given).isnan(), referred(**given).isnan())


@pytest.mark.parametrize(
    ('needed', 'kernels'),
    [
        ((), ['_shift_linear']),
        (('x', 'residual'), ['_shift_linear', '_input_gradient']),
        (('bias',), ['_shift_linear', '_parameter_gradients']),
        (('residual',), ['_shift_linear']),
    ],
    ids=['nothing', 'x', 'bias', 'residual'],
)
def test_only_gradients_that_are_needed_are_computed(kernel_device, needed, kernels, monkeypatch):
    given = arguments((5, 3), (True, None, True), device=kernel_device)
    for name in needed:
        given[name].requires_grad_()
    launched, launch = [], launching.launch

    def noting(kernel, *rest, **options):
        launched.append(kernel.__name__)
        launch(kernel, *rest, **options)

    monkeypatch.setattr(launching, 'launch', noting)
    y = shift_linear(**given)
    if needed:
        y.sum().backward()
    assert launched == kernels
    assert [name for name, value in tensors(given).items() if value.grad is not None] == list(needed)


def test_the_same_every_time(kernel_device):
    given = arguments((7, 13), (True, 'relu', True), (9, 13), device=kernel_device)
    cotangent = torch.randn(2, 13, 9, 13, device=kernel_device)
    (y, gradients), (again, gradients_again) = (with_gradients(shift_linear, given, cotangent) for _ in range(2))
    assert torch.equal(y, again)
    assert all(torch.equal(value, gradients_again[name]) for name, value in gradients.items())


@parts
def test_operators_are_as_registered(kernel_device, parts):
    given = arguments((7, 13), parts, device=kernel_device)
    x, weight, bias, residual = (given[name] for name in ('x', 'weight', 'bias', 'residual'))
    weight, relu = weight.flatten(1), parts[1] == 'relu'
    y = shift_linear(x, given['weight'], bias, given['activation'])
    gradient, result = torch.randn_like(y), y if relu else None
    torch.library.opcheck(torch.ops.attnsr.shift_linear_input_gradient, (gradient, result, weight))
    torch.library.opcheck(torch.ops.attnsr.shift_linear_parameter_gradients, (gradient, result, x))
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias if bias is None else bias.requires_grad_()]
    torch.library.opcheck(torch.ops.attnsr.shift_linear, (*leaves, None if relu else residual, relu))


@pytest.mark.parametrize('dynamic', [False, True], ids=['these sizes', 'any size'])
def test_compiled_whole(kernel_device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(shift_linear, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for size in ((5, 7), (6, 4)):
        assert_agrees(arguments((7, 13), (True, 'relu', True), size, device=kernel_device), compiled)


def test_exported(kernel_device):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return shift_linear(x, weight, bias, 'relu')

    given = arguments((7, 13), (True, 'relu', False), device=kernel_device)
    values = tuple(tensors(given).values())
    program = torch.export.export(Module(), values)
    assert torch.ops.attnsr.shift_linear.default in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(*values), shift_linear(**given))


@parts
def test_autocast(kernel_device, parts):
    """The result is of the lower precision, and gradients are of the parameters' own."""
    given = arguments((7, 13), parts, device=kernel_device)
    given = {**given, **{name: value.bfloat16().float() for name, value in tensors(given).items()}}
    cotangent = torch.randn(2, 13, 5, 7, device=kernel_device).bfloat16()
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        y, gradients = with_gradients(shift_linear, given, cotangent)
    assert y.dtype == torch.bfloat16
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert_close(y, expected, TOLERANCES[torch.bfloat16])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        expected = expected_gradients[name]
        assert_close(gradient, expected, TOLERANCES[torch.bfloat16], expected.abs().max(), name)


def test_operations_are_counted_as_the_reference_s(kernel_device):
    given = arguments((7, 13), (True, 'relu', False), device=kernel_device)
    cotangent = torch.randn(2, 13, 5, 7, device=kernel_device)
    counts = []
    for function in (shift_linear, referred):
        with FlopCounterMode(display=False) as counter:
            with_gradients(function, given, cotangent)
        counts.append(counter.get_total_flops())
    assert counts == 2 * [3 * 2 * (2 * 5 * 7) * 7 * 13]


@pytest.mark.gpu
@pytest.mark.parametrize('tf32', [False, True], ids=['exact', 'TF32'])
@pytest.mark.parametrize('full', FULL.values(), ids=list(FULL))
@dtypes
@networks
def test_full_shapes(network, full, dtype, tf32, kernel_device, monkeypatch):
    if tf32 and dtype != torch.float32:
        pytest.skip('TF32 is a way to multiply float32')
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', tf32)
    batch, size = full
    given = arguments(*network, size, device=kernel_device, dtype=dtype, batch=batch)
    # Where the exact sum is within an error of 0, a whole gradient appears or goes: none is.
    assert_agrees({**given, 'activation': None}, tolerances=TF32_TOLERANCES if tf32 else FULL_TOLERANCES[dtype])


@pytest.mark.gpu
@networks
def test_captured_in_a_graph(network, kernel_device):
    given = arguments(*network, (64, 64), device=kernel_device, dtype=torch.bfloat16)
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    cotangent = torch.randn_like(shift_linear(**given))

    def step():
        y = shift_linear(**given)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        if result.data_ptr() != cotangent.data_ptr():  # the gradient of the residual is the cotangent itself
            result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
