"""The kernels of the gated feed-forward against the reference in float64, for the same, already rounded, inputs."""

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops import dispatch, launching
from attnsr.ops.gated_feed_forward import gated_feed_forward, reference

pytest.importorskip('attnsr.ops.gated_feed_forward.triton_kernel')

# Error allowed to each element, absolute and relative, in units of the largest: each of the four steps is rounded.
TOLERANCES = {
    torch.float32: {'atol': 2e-6, 'rtol': 2e-6},
    torch.float16: {'atol': 3e-3, 'rtol': 3e-3},
    torch.bfloat16: {'atol': 2.5e-2, 'rtol': 2.5e-2},
}
TF32_TOLERANCES = TOLERANCES[torch.float16]

# Channels, and hidden ones.
NETWORKS = {
    'DLGSANet-light': (48, 96),
    'DLGSANet': (90, 180),
    'ASID, 48': (48, 48),
    'ASID, 36': (36, 36),
    'ASID, 24': (24, 24),
    'ASID, 12': (12, 12),
}
OTHERS = [(1, 1), (5, 3), (17, 33)]
SIZES = [(1, 6), (6, 1), (5, 9)]
FULL = {'1280 x 720 x4': (1, (180, 320)), 'training': (16, (48, 48))}

dtypes = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
networks = pytest.mark.parametrize('channels', NETWORKS.values(), ids=list(NETWORKS))


def arguments(channels, size=(5, 9), *, device, dtype=torch.float32, memory='channels-last', batch=1):
    torch.manual_seed(0)
    c, hidden = channels
    given = {
        'x': random(batch, c, *size, memory=memory, dtype=dtype),
        'norm_weight': random(c, dtype=dtype),
        'norm_bias': random(c, dtype=dtype),
        'eps': 1e-5,
        'project_in': random(2 * hidden, c, 1, 1, dtype=dtype) / c**0.5,
        'depthwise': random(2 * hidden, 1, 3, 3, dtype=dtype) / 3,
        'project_out': random(c, hidden, 1, 1, dtype=dtype) / hidden**0.5,
    }
    return {**given, **{name: value.to(device) for name, value in tensors(given).items()}}


def assert_close(found, expected, tolerances, name='output'):
    unit = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / unit, expected / unit, **tolerances, msg=lambda text: f'{name}: {text}')


def assert_agrees(given, function=gated_feed_forward, tolerances=None, memory='channels-last'):
    """The output and every gradient equal the reference's, in dtypes of the inputs."""
    x = given['x']
    tolerances = tolerances or TOLERANCES[x.dtype]
    torch.manual_seed(1)
    size = (1, 1) if memory == 'expanded' else x.shape[2:]
    cotangent = random(*x.shape[:2], *size, memory=memory, dtype=x.dtype).to(x.device).expand_as(x)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(reference.gated_feed_forward, in_float64(given), cotangent.double())
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
    assert_agrees(arguments((5, 3), size, device=kernel_device, memory=memory, batch=2), memory=memory)


def test_strided_parameters_and_an_expanded_cotangent(kernel_device):
    given = arguments((5, 3), device=kernel_device)
    given['norm_weight'] = torch.randn(10, device=kernel_device)[::2]
    given['norm_bias'] = torch.ones(1, device=kernel_device).expand(5)
    assert_agrees(given, memory='expanded')


def test_a_plain_map_is_copied_once(kernel_device, monkeypatch):
    launched, launch = {}, launching.launch

    def noting(kernel, grid, *rest, **constants):
        launched[kernel.__name__] = dict(zip(kernel.arg_names, rest, strict=False))['x'].data_ptr()
        launch(kernel, grid, *rest, **constants)

    monkeypatch.setattr(launching, 'launch', noting)
    gated_feed_forward(**arguments((5, 3), device=kernel_device, memory='plain'))
    assert launched['_normed_product'] == launched['_gated_product']


def test_nothing_outside_of_the_map_is_read(kernel_device):
    given = arguments((5, 3), device=kernel_device)
    surroundings = given['x'].new_full((5, *given['x'].shape[1:]), torch.nan).to(memory_format=torch.channels_last)
    surroundings[2:3] = given['x']
    assert_agrees({**given, 'x': surroundings[2:3]})


OF_CONVOLVED = {'_normed_product': set(), '_gated_product_gradients': {'grad_weight'}}
OF_U = {'_depthwise_gradients': {'x', 'grad_taps'}}


@pytest.mark.parametrize(
    ('needed', 'kernels'),
    [
        ('', {}),
        ('x', {**OF_CONVOLVED, **OF_U, '_input_gradients': {'grad_norm'}}),
        ('norm_weight', {**OF_CONVOLVED, **OF_U, '_input_gradients': {'grad_x'}}),
        ('project_in', {**OF_CONVOLVED, **OF_U, '_weight_gradient': set()}),
        ('depthwise', {**OF_CONVOLVED, '_depthwise_gradients': {'grad_x'}}),
        ('project_out', {'_normed_product': set(), '_gated_product_gradients': {'grad_convolved'}}),
    ],
)
def test_only_gradients_that_are_needed_are_computed(kernel_device, needed, kernels, monkeypatch):
    """Kernels, and which of their arguments they go without."""
    given = arguments((5, 3), (3, 4), device=kernel_device)
    expected = with_gradients(gated_feed_forward, given, torch.ones(1, 5, 3, 4, device=kernel_device))[1]
    launched, launch = [], launching.launch

    def noting(kernel, grid, *rest, **constants):
        names = [name for name in kernel.arg_names if name not in constants]
        lacking = {name for name, value in zip(names, rest, strict=True) if value is None}
        launched.append((kernel.__name__, lacking - {'residual'}))
        launch(kernel, grid, *rest, **constants)

    monkeypatch.setattr(launching, 'launch', noting)
    if needed:
        given[needed].requires_grad_()
    y = gated_feed_forward(**given)
    forward = len(launched)
    if needed:
        y.sum().backward()
        assert_close(given[needed].grad, expected[needed].double(), TOLERANCES[torch.float32], needed)
    assert [name for name, value in tensors(given).items() if value.grad is not None] == [needed] * bool(needed)
    assert dict(launched[forward:]) == kernels


def test_what_the_kernel_does_not_serve(kernel_device):
    given = arguments((129, 1), (1, 2), device=kernel_device)
    with pytest.raises(dispatch.BackendError, match=r'^gated_feed_forward: .*: more than 128 channels$'):
        gated_feed_forward(**given)
    dispatch.set_backend('auto')
    expected = reference.gated_feed_forward(**in_float64(given))
    assert_close(gated_feed_forward(**given), expected, TF32_TOLERANCES)  # which cuDNN's convolutions need


def test_operators_are_as_registered(kernel_device):
    given = arguments((5, 3), (3, 4), device=kernel_device)
    x, norm_weight, norm_bias, eps, *weights = given.values()
    project_in, depthwise, project_out = (weight.flatten(1) for weight in weights)
    u = torch.randn(1, 6, 3, 4, device=kernel_device).to(memory_format=torch.channels_last)
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(torch.ops.attnsr.gated_product_gradients, (x.clone(), u, depthwise, project_out, *needs))
    leaves = [value.requires_grad_() for value in (x, norm_weight, norm_bias, project_in, depthwise, project_out)]
    torch.library.opcheck(torch.ops.attnsr.gated_feed_forward, (*leaves[:3], eps, *leaves[3:]))


def test_compiled_whole(kernel_device):
    torch.compiler.reset()
    compiled = torch.compile(gated_feed_forward, backend='aot_eager', fullgraph=True)
    assert_agrees(arguments((5, 3), (3, 4), device=kernel_device), compiled)


def test_exported(kernel_device):
    class Module(torch.nn.Module):
        def forward(self, x, norm_weight, norm_bias, *weights):
            return gated_feed_forward(x, norm_weight, norm_bias, 1e-5, *weights)

    given = arguments((5, 3), (3, 4), device=kernel_device)
    values = tuple(tensors(given).values())
    program = torch.export.export(Module(), values)
    assert torch.ops.attnsr.gated_feed_forward.default in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(*values), gated_feed_forward(**given))


def test_autocast(kernel_device):
    """Products are of the lower precision; the result and the gradients are not."""
    given = arguments((5, 3), device=kernel_device)
    cotangent = torch.randn(1, 5, 5, 9).to(kernel_device)  # the same on all: sums over pixels may cancel out
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        y, gradients = with_gradients(gated_feed_forward, given, cotangent)
    assert y.dtype == torch.float32
    expected, expected_gradients = with_gradients(reference.gated_feed_forward, in_float64(given), cotangent.double())
    assert_close(y, expected, TOLERANCES[torch.bfloat16])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        assert_close(gradient, expected_gradients[name], TOLERANCES[torch.bfloat16], name)


def test_operations_are_counted(kernel_device):
    """Forward as the reference's; backward with recomputation, and without what PyTorch counts too often by groups."""
    given = arguments((5, 3), device=kernel_device)
    counts = []
    for function in (gated_feed_forward, reference.gated_feed_forward):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(**given)
        counts.append(counter.get_total_flops())
    pixels, into, depthwise, out = 5 * 9, 5 * 6, 9 * 6, 3 * 5
    assert counts == 2 * [2 * pixels * (into + depthwise + out)]
    with FlopCounterMode(display=False) as counter:
        with_gradients(gated_feed_forward, given, torch.randn(1, 5, 5, 9, device=kernel_device))
    assert counter.get_total_flops() == 2 * pixels * (4 * into + 4 * depthwise + 3 * out)


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
    cotangent = torch.randn_like(gated_feed_forward(**given))

    def step():
        y = gated_feed_forward(**given)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
