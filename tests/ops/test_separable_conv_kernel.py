"""The kernels of layer norm, 1x1 and depthwise convolution against the reference in float64, for the same inputs."""

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops import dispatch, launching
from attnsr.ops.separable_conv import reference, separable_conv

triton_kernel = pytest.importorskip('attnsr.ops.separable_conv.triton_kernel')

# Error allowed to each element, absolute and relative, in units of the largest: the norm, its 1x1 convolution and the
# result are rounded one after the other.
TOLERANCES = {
    torch.float32: {'atol': 2e-6, 'rtol': 2e-6},
    torch.float16: {'atol': 2e-3, 'rtol': 2e-3},
    torch.bfloat16: {'atol': 1.5e-2, 'rtol': 1.5e-2},
}
TF32_TOLERANCES = TOLERANCES[torch.float16]

# Channels in and out.
NETWORKS = {'DLGSANet-light and ASID': (48, 144), 'DLGSANet': (90, 270)}
OTHERS = [(1, 1), (5, 7), (17, 33), (128, 3)]
SIZES = [(1, 1), (1, 6), (6, 1), (5, 9)]
FULL = {'1280 x 720 x4': (1, (180, 320)), 'training': (16, (48, 48))}

dtypes = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
networks = pytest.mark.parametrize('channels', NETWORKS.values(), ids=list(NETWORKS))


def arguments(channels, size=(5, 9), *, device, dtype=torch.float32, memory='channels-last', batch=1):
    torch.manual_seed(0)
    c, o = channels
    given = {
        'x': random(batch, c, *size, memory=memory, dtype=dtype),
        'norm_weight': random(c, dtype=dtype),
        'norm_bias': random(c, dtype=dtype),
        'eps': 1e-5,
        'pointwise': random(o, c, 1, 1, dtype=dtype) / c**0.5,
        'depthwise': random(o, 1, 3, 3, dtype=dtype) / 3,
    }
    return {**given, **{name: value.to(device) for name, value in tensors(given).items()}}


def assert_close(found, expected, tolerances, name='output'):
    unit = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / unit, expected / unit, **tolerances, msg=lambda text: f'{name}: {text}')


def assert_agrees(given, function=separable_conv, tolerances=None, memory='channels-last'):
    """The output and every gradient equal the reference's, in dtypes of the inputs."""
    x = given['x']
    tolerances = tolerances or TOLERANCES[x.dtype]
    torch.manual_seed(1)
    size = (1, 1) if memory == 'expanded' else x.shape[2:]
    cotangent = random(len(x), len(given['pointwise']), *size, memory=memory, dtype=x.dtype)
    cotangent = cotangent.to(x.device).expand(-1, -1, *x.shape[2:])
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(reference.separable_conv, in_float64(given), cotangent.double())
    assert y.dtype == x.dtype
    assert_close(y, expected, tolerances)
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype, name
        assert_close(gradient, expected_gradients[name], tolerances, name)


@dtypes
@networks
def test_equals_the_reference(kernel_device, channels, dtype):
    assert_agrees(arguments(channels, (3, 4), device=kernel_device, dtype=dtype))


@pytest.mark.parametrize('channels', OTHERS, ids=lambda channels: f'{channels[0]}to{channels[1]}')
def test_any_channels(kernel_device, channels):
    assert_agrees(arguments(channels, (3, 4), device=kernel_device))


@pytest.mark.parametrize('memory', ['plain', 'channels-last', 'view'])
@pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
def test_any_size_and_memory(kernel_device, size, memory):
    assert_agrees(arguments((5, 7), size, device=kernel_device, memory=memory, batch=2), memory=memory)


def test_strided_parameters_and_an_expanded_cotangent(kernel_device):
    given = arguments((5, 7), device=kernel_device)
    given['norm_weight'] = torch.randn(10, device=kernel_device)[::2]
    given['norm_bias'] = torch.ones(1, device=kernel_device).expand(5)
    assert_agrees(given, memory='expanded')


@pytest.mark.parametrize('programs', [1, 3])
def test_gradients_are_sums_of_parts(kernel_device, programs, monkeypatch):
    monkeypatch.setattr(triton_kernel, 'PARAMETER_PROGRAMS', programs)
    assert_agrees(arguments((5, 7), (9, 13), device=kernel_device))


def test_nothing_outside_of_the_map_is_read(kernel_device):
    given = arguments((5, 7), device=kernel_device)
    surroundings = given['x'].new_full((5, *given['x'].shape[1:]), torch.nan).to(memory_format=torch.channels_last)
    surroundings[2:3] = given['x']
    assert_agrees({**given, 'x': surroundings[2:3]})


@pytest.mark.parametrize(
    ('needed', 'kernels'),
    [
        ('', {}),
        ('x', {'_depthwise_gradients': {'x', 'grad_taps'}, '_input_gradients': {'grad_norm'}}),
        ('norm_weight', {'_depthwise_gradients': {'x', 'grad_taps'}, '_input_gradients': {'grad_x'}}),
        ('norm_bias', {'_depthwise_gradients': {'x', 'grad_taps'}, '_input_gradients': {'grad_x'}}),
        ('pointwise', {'_depthwise_gradients': {'x', 'grad_taps'}, '_weight_gradient': set()}),
        ('depthwise', {'_normed_product': set(), '_depthwise_gradients': {'grad_x'}}),
    ],
)
def test_only_gradients_that_are_needed_are_computed(kernel_device, needed, kernels, monkeypatch):
    """Kernels, and which of their arguments they go without."""
    given = arguments((5, 7), (3, 4), device=kernel_device)
    expected = with_gradients(separable_conv, given, torch.ones(1, 7, 3, 4, device=kernel_device))[1]
    launched, launch = [], launching.launch

    def noting(kernel, grid, *rest, **constants):
        names = [name for name in kernel.arg_names if name not in constants]
        lacking = {name for name, value in zip(names, rest, strict=True) if value is None}
        launched.append((kernel.__name__, lacking - {'residual'}))
        launch(kernel, grid, *rest, **constants)

    monkeypatch.setattr(launching, 'launch', noting)
    if needed:
        given[needed].requires_grad_()
    y = separable_conv(**given)
    forward = len(launched)
    if needed:
        y.sum().backward()
        assert_close(given[needed].grad, expected[needed].double(), TOLERANCES[torch.float32], needed)
    assert [name for name, value in tensors(given).items() if value.grad is not None] == [needed] * bool(needed)
    assert dict(launched[forward:]) == kernels


def test_what_the_kernel_does_not_serve(kernel_device):
    given = arguments((129, 2), (1, 2), device=kernel_device)
    with pytest.raises(dispatch.BackendError, match=r'^separable_conv: .*: more than 128 channels$'):
        separable_conv(**given)
    dispatch.set_backend('auto')
    expected = reference.separable_conv(**in_float64(given))
    assert_close(separable_conv(**given), expected, TF32_TOLERANCES)  # which cuDNN's convolutions need


def test_operators_are_as_registered(kernel_device):
    given = arguments((5, 7), (3, 4), device=kernel_device)
    x, norm_weight, norm_bias, eps, pointwise, depthwise = given.values()
    pointwise, depthwise = pointwise.flatten(1), depthwise.flatten(1)
    ops = torch.ops.attnsr
    u = ops.normed_product(x, norm_weight, norm_bias, eps, pointwise)
    torch.library.opcheck(ops.normed_product, (x, norm_weight, norm_bias, eps, pointwise))
    torch.library.opcheck(ops.depthwise_gradients, (torch.randn_like(u), u, depthwise, False))
    torch.library.opcheck(ops.depthwise_gradients, (u, None, depthwise, True))
    for residual, *needs in ((x.clone(), True, False), (None, False, True)):
        torch.library.opcheck(ops.normed_product_input_gradients, (u, x, norm_weight, eps, pointwise, residual, *needs))
    torch.library.opcheck(ops.normed_product_weight_gradient, (u, x, norm_weight, norm_bias, eps))
    leaves = [value.requires_grad_() for value in (x, norm_weight, norm_bias, pointwise, depthwise)]
    torch.library.opcheck(ops.separable_conv, (*leaves[:3], eps, *leaves[3:]))


def test_compiled_whole(kernel_device):
    torch.compiler.reset()
    compiled = torch.compile(separable_conv, backend='aot_eager', fullgraph=True)
    assert_agrees(arguments((5, 7), (3, 4), device=kernel_device), compiled)


def test_exported(kernel_device):
    class Module(torch.nn.Module):
        def forward(self, x, norm_weight, norm_bias, pointwise, depthwise):
            return separable_conv(x, norm_weight, norm_bias, 1e-5, pointwise, depthwise)

    given = arguments((5, 7), (3, 4), device=kernel_device)
    values = tuple(tensors(given).values())
    program = torch.export.export(Module(), values)
    assert torch.ops.attnsr.separable_conv.default in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(*values), separable_conv(**given))


def test_autocast(kernel_device):
    """Convolutions are of the lower precision, the norm is not, and gradients are of the parameters' own."""
    given = arguments((5, 7), device=kernel_device)
    cotangent = torch.randn(1, 7, 5, 9, device=kernel_device).bfloat16()
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        y, gradients = with_gradients(separable_conv, given, cotangent)
    assert y.dtype == torch.bfloat16
    expected, expected_gradients = with_gradients(reference.separable_conv, in_float64(given), cotangent.double())
    assert_close(y, expected, TOLERANCES[torch.bfloat16])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        assert_close(gradient, expected_gradients[name], TOLERANCES[torch.bfloat16], name)


def test_operations_are_counted(kernel_device):
    """Forward as the reference's; backward with recomputation, and without what PyTorch counts too often by groups."""
    given = arguments((5, 7), device=kernel_device)
    counts = []
    for function in (separable_conv, reference.separable_conv):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(**given)
        counts.append(counter.get_total_flops())
    pixels = 5 * 9
    assert counts == 2 * [2 * pixels * 7 * (5 + 9)]
    with FlopCounterMode(display=False) as counter:
        with_gradients(separable_conv, given, torch.randn(1, 7, 5, 9, device=kernel_device))
    assert counter.get_total_flops() == 2 * pixels * 7 * (4 * 5 + 3 * 9)


@pytest.mark.gpu
@pytest.mark.parametrize('tf32', [False, True], ids=['exact', 'TF32'])
@pytest.mark.parametrize('full', FULL.values(), ids=list(FULL))
@dtypes
@networks
def test_full_shapes(channels, full, dtype, tf32, kernel_device, monkeypatch):
    if tf32 and dtype != torch.float32:
        pytest.skip('TF32 is a way to multiply float32')
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', tf32)
    batch, size = full
    given = arguments(channels, size, device=kernel_device, dtype=dtype, batch=batch)
    assert_agrees(given, tolerances=TF32_TOLERANCES if tf32 else None)


@pytest.mark.gpu
@networks
def test_captured_in_a_graph(channels, kernel_device):
    given = arguments(channels, (48, 48), device=kernel_device, dtype=torch.bfloat16)
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    cotangent = torch.randn_like(separable_conv(**given))

    def step():
        y = separable_conv(**given)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
