"""The kernels of channel attention against the reference in float64, for the same, already rounded, inputs."""

import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from networks import build
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops import dispatch, launching
from attnsr.ops.channel_attention import channel_attention, reference

triton_kernel = pytest.importorskip('attnsr.ops.channel_attention.triton_kernel')

# Error allowed to each element, absolute and relative, in units of the largest: gradients are sums over tokens.
TOLERANCES = {
    torch.float32: {'atol': 2e-6, 'rtol': 2e-6},
    torch.float16: {'atol': 2e-3, 'rtol': 2e-3},
    torch.bfloat16: {'atol': 1.6e-2, 'rtol': 1.6e-2},
}
TF32_TOLERANCES = TOLERANCES[torch.float16]

# Layout and window size; channels, heads, rows of the weight; activation.
LIGHT, LARGE, ASID = (48, 6, 48), (90, 6, 90), (48, 1, 48)
NETWORKS = {
    'DLGSANet-light, training': (('image', None), LIGHT, 'relu'),
    'DLGSANet-light x2': (('overlapping', 96), LIGHT, 'relu'),
    'DLGSANet-light x3': (('overlapping', 72), LIGHT, 'relu'),
    'DLGSANet-light x4': (('overlapping', 48), LIGHT, 'relu'),
    'DLGSANet, training': (('image', None), LARGE, 'relu'),
    'DLGSANet x4': (('overlapping', 48), LARGE, 'relu'),
    'ASID, windows': (('windows', 8), ASID, 'softmax'),
    'ASID, grid': (('grid', 8), ASID, 'softmax'),
}
FULL = {'1280 x 720 x4': (1, (184, 320)), '1280 x 720 x2': (1, (360, 640)), 'training': (32, (64, 64))}
# The same on fewer pixels: several parts of an image, windows with and without overlap, small groups and large ones.
SMALL = {
    'DLGSANet-light, training': (('image', None), LIGHT, 'relu', (17, 21)),
    'DLGSANet-light': (('overlapping', 12), LIGHT, 'relu', (13, 17)),
    'DLGSANet, training': (('image', None), LARGE, 'relu', (13, 20)),
    'DLGSANet': (('overlapping', 12), LARGE, 'relu', (9, 13)),
    'ASID, windows': (('windows', 8), ASID, 'softmax', (8, 16)),
    'ASID, grid': (('grid', 2), ASID, 'softmax', (34, 32)),
}
# Sizes as small as they may be, channels that fill no block, groups that overlap in every way.
OTHERS = {
    'a pixel': (('image', None), (6, 2, 5), 'softmax', (1, 1)),
    'parts': (('image', None), (6, 2, 5), 'softmax', (23, 29)),
    'windows': (('windows', 4), (6, 2, 5), 'softmax', (4, 8)),
    'overlap': (('overlapping', 4), (6, 2, 5), 'softmax', (3, 7)),
    'windows of a pixel': (('windows', 1), (6, 2, 5), 'softmax', (2, 3)),
    'windows of 3': (('windows', 3), (4, 4, 4), 'relu', (6, 9)),
    'large windows': (('windows', 17), (5, 1, 9), 'softmax', (17, 34)),
    'one position': (('grid', 1), (6, 2, 5), 'relu', (2, 3)),
    'a pixel for each position': (('grid', 3), (6, 2, 5), 'softmax', (3, 3)),
    'a window beyond the map': (('overlapping', 4), (6, 2, 5), 'softmax', (3, 2)),
    'no overlap': (('overlapping', 4), (6, 2, 5), 'relu', (4, 8)),
    'overlap along both axes': (('overlapping', 4), (6, 2, 5), 'softmax', (5, 7)),
    'overlap of the last windows': (('overlapping', 5), (6, 2, 5), 'relu', (26, 2)),
    'parts of overlapping windows': (('overlapping', 18), (4, 2, 3), 'softmax', (17, 19)),
    'the widest head': (('image', None), (64, 1, 128), 'softmax', (5, 13)),
    'heads of a channel': (('image', None), (70, 70, 3), 'softmax', (5, 7)),
    'no weight, runs': (('image', None), (80, 2, None), 'relu', (5, 13)),
    'no weight, windows': (('windows', 4), (6, 2, None), 'softmax', (4, 8)),
    'more rows than channels': (('windows', 4), (6, 1, 100), 'relu', (4, 4)),
}
# One for each way that kernels take.
FUSED, APART = OTHERS['windows'], OTHERS['overlap']

dtypes = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
networks = pytest.mark.parametrize('network', NETWORKS.values(), ids=list(NETWORKS))
ways = pytest.mark.parametrize('case', [FUSED, APART], ids=['fused', 'apart'])


def arguments(layout, shape, activation, size, *, device, dtype=torch.float32, memory='channels-last', batch=2):
    torch.manual_seed(0)
    channels, heads, rows = shape
    qkv = random(batch, 3 * channels, *size, memory=memory, dtype=torch.float32)
    qkv += qkv.sign() / 2  # gradients are inverse to norms: none that rounding alone would decide
    given = {
        'qkv': qkv.to(dtype),
        'temperature': 1 + torch.rand(heads, 1, 1),
        'activation': activation,
        'heads': heads,
        'layout': layout[0],
        'window_size': layout[1],
        'weight': None if rows is None else random(rows, channels, 1, 1, dtype=dtype) / channels**0.5,
    }
    return {**given, **{name: value.to(device) for name, value in tensors(given).items()}}


def cotangent_of(given, memory='channels-last'):
    torch.manual_seed(1)
    qkv = given['qkv']
    rows = qkv.shape[1] // 3 if given['weight'] is None else len(given['weight'])
    return random(len(qkv), rows, *qkv.shape[2:], memory=memory, dtype=qkv.dtype).to(qkv.device)


def referred(**given):
    return reference.channel_attention(**given)


def assert_close(found, expected, tolerances, name='output'):
    unit = expected.abs().max().clamp(min=1e-30)
    if name == 'temperature':  # a sum in which nearly all cancels
        tolerances = {key: 20 * value for key, value in tolerances.items()}
    torch.testing.assert_close(found.double() / unit, expected / unit, **tolerances, msg=lambda text: f'{name}: {text}')


def assert_agrees(given, function=channel_attention, tolerances=None, memory='channels-last'):
    """The output and every gradient equal the reference's, in dtypes of the inputs."""
    qkv = given['qkv']
    tolerances = tolerances or TOLERANCES[qkv.dtype]
    cotangent = cotangent_of(given, memory)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert y.dtype == qkv.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, tolerances)
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype, name
        assert_close(gradient, expected_gradients[name], tolerances, name)


@dtypes
@pytest.mark.parametrize('case', SMALL.values(), ids=list(SMALL))
def test_equals_the_reference(kernel_device, case, dtype):
    assert_agrees(arguments(*case, device=kernel_device, dtype=dtype, batch=1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('case', OTHERS.values(), ids=list(OTHERS))
def test_any_groups_and_channels(kernel_device, case, dtype):
    assert_agrees(arguments(*case, device=kernel_device, dtype=dtype, batch=1))


@pytest.mark.parametrize('programs', [1, 3, 256])
def test_a_fused_backward_pass_sums_over_groups(kernel_device, programs, monkeypatch):
    """In float32, which shows what is missing; on the GPU it takes too many registers to be fast."""
    monkeypatch.setattr(triton_kernel, 'FUSED_BACKWARD', (torch.float32,))
    monkeypatch.setattr(triton_kernel, 'FUSED_PROGRAMS', programs)
    assert_agrees(arguments(('windows', 3), (6, 2, 5), 'softmax', (6, 9), device=kernel_device, batch=1))
    assert_agrees(arguments(('grid', 2), (5, 1, None), 'relu', (12, 14), device=kernel_device, batch=1))


@ways
@pytest.mark.parametrize('memory', ['plain', 'view', 'channels', 'rows'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_any_memory(kernel_device, case, memory, dtype):
    """Channels of a larger map are read where they stand, and so is every other image; nothing around them is."""
    if memory in ('plain', 'view'):
        given = arguments(*case, device=kernel_device, dtype=dtype, memory=memory)
        assert_agrees(given, memory=memory)
        return
    given = arguments(*case, device=kernel_device, dtype=dtype)
    qkv = given['qkv']
    b, c, h, w = qkv.shape
    around = torch.full((2 * b, h, w, c + 5), torch.nan, dtype=dtype, device=kernel_device).permute(0, 3, 1, 2)
    given['qkv'] = around[:b, 2:-3] if memory == 'channels' else around[::2, :c]
    given['qkv'].copy_(qkv)
    assert_agrees(given)


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 1)], ids=str)
def test_sides_of_a_pixel(kernel_device, size):
    """Whose strides say nothing."""
    given = arguments(('image', None), (6, 2, 5), 'softmax', size, device=kernel_device)
    given['qkv'] = torch.cat([given['qkv'], torch.full_like(given['qkv'], torch.nan)], 1)[:, :18]
    assert_agrees(given)


@ways
def test_an_expanded_gradient(kernel_device, case):
    given = arguments(*case, device=kernel_device)
    rows = len(given['weight'])
    ones = torch.ones(1, 1, 1, 1, device=kernel_device).expand(2, rows, *given['qkv'].shape[2:])
    _, gradients = with_gradients(channel_attention, given, ones)
    _, expected = with_gradients(referred, in_float64(given), ones.double())
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], TOLERANCES[torch.float32], name)


@ways
def test_one_temperature_for_all_heads(kernel_device, case):
    layout, _, activation, size = case
    given = arguments(layout, (6, 2, 5), activation, size, device=kernel_device)
    assert_agrees({**given, 'temperature': given['temperature'][:1]})


@ways
@dtypes
@pytest.mark.parametrize('value', [0.0, 1e-14], ids=str)
@pytest.mark.filterwarnings('ignore:overflow encountered in cast')
def test_channels_that_hold_nothing(kernel_device, case, dtype, value):
    """Norms below the least that is divided by; 0 too, where a norm has no gradient."""
    layout, shape, _, size = case
    given = arguments(layout, shape, 'softmax', size, device=kernel_device, dtype=dtype)
    given['qkv'][:, [0, 4, 7, 11]] *= value
    given['qkv'][0] *= value
    y, gradients = with_gradients(channel_attention, given, cotangent_of(given))
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent_of(given).double())
    assert_close(y, expected, TOLERANCES[dtype])
    for name, gradient in gradients.items():
        right = expected_gradients[name]
        large = right.abs() > 1e6  # inverse to norms of 1e-12, and infinite in float16
        assert torch.equal(gradient.isfinite(), right.to(dtype).isfinite())
        assert_close(gradient.where(~large, 0), right.where(~large, 0), TOLERANCES[dtype], name)
        if dtype != torch.float16:
            assert_close(gradient.where(large, 0), right.where(large, 0), TOLERANCES[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@ways
def test_sums_of_half_precision_do_not_overflow(kernel_device, case, dtype):
    """Products of 1e4, of which sums over tokens exceed 65504, where float16 ends."""
    layout, shape, _, _ = case
    size = (24, 24) if layout[0] == 'overlapping' else (8, 8)
    layout = (layout[0], size[0])
    given = arguments(layout, shape, 'softmax', size, device=kernel_device, dtype=dtype, batch=1)
    given['qkv'] *= 100
    cotangent = 100 * cotangent_of(given)
    _, gradients = with_gradients(channel_attention, given, cotangent)
    _, expected = with_gradients(referred, in_float64(given), cotangent.double())
    for name in ('qkv', 'temperature'):  # the weight's own overflows
        assert_close(gradients[name], expected[name], TOLERANCES[dtype], name)


@pytest.mark.parametrize('layout', [('image', None), ('windows', 4), ('grid', 4), ('overlapping', 3)], ids=str)
@pytest.mark.parametrize(('batch', 'size'), [(0, (4, 8)), (2, (0, 8)), (2, (4, 0))], ids=str)
def test_no_image_at_all(kernel_device, batch, size, layout):
    given = arguments(layout, (6, 2, 5), 'softmax', size, device=kernel_device, batch=batch)
    y, gradients = with_gradients(channel_attention, given, torch.empty(batch, 5, *size, device=kernel_device))
    assert y.shape == (batch, 5, *size)
    assert y.dtype == torch.float32
    assert not gradients['weight'].any()
    assert not gradients['temperature'].any()


FORWARD = ['_products', '_matrices', '_values']


@pytest.mark.parametrize('needed', [(), ('qkv',), ('temperature',), ('weight',)], ids=lambda names: ''.join(names))
@pytest.mark.parametrize(
    ('case', 'dtype', 'kernels', 'backward', 'by_token'),
    [
        (FUSED, torch.bfloat16, ['_fused'], ['_fused_backward'], []),
        (FUSED, torch.float32, ['_fused'], ['_products', '_matrices'], ['_token_gradients']),
        (APART, torch.bfloat16, FORWARD, ['_products', '_matrices'], ['_token_gradients']),
    ],
    ids=['fused', 'fused forward', 'apart'],
)
def test_only_gradients_that_are_needed_are_computed(
    kernel_device, case, dtype, kernels, backward, by_token, needed, monkeypatch
):
    given = arguments(*case, device=kernel_device, dtype=dtype)
    expected = dict(
        zip(tensors(given), with_gradients(channel_attention, given, cotangent_of(given))[1].values(), strict=True)
    )
    for name in needed:
        given[name].requires_grad_()
    launched, launch = [], launching.launch

    def noting(kernel, *rest, **options):
        launched.append(kernel.__name__)
        launch(kernel, *rest, **options)

    monkeypatch.setattr(launching, 'launch', noting)
    y = channel_attention(**given)
    if needed:
        y.backward(cotangent_of(given))
    assert launched == kernels + (backward if needed else []) + (by_token if 'qkv' in needed else [])
    assert [name for name, value in tensors(given).items() if value.grad is not None] == list(needed)
    for name in needed:
        assert torch.equal(given[name].grad, expected[name])


@ways
def test_the_same_every_time(kernel_device, case):
    given = arguments(*case, device=kernel_device, dtype=torch.bfloat16)
    (y, gradients), (again, gradients_again) = (
        with_gradients(channel_attention, given, cotangent_of(given)) for _ in range(2)
    )
    assert torch.equal(y, again)
    assert all(torch.equal(value, gradients_again[name]) for name, value in gradients.items())


@pytest.mark.parametrize(
    ('case', 'has_weight'),
    [(FUSED, True), (FUSED, False), (APART, True)],
    ids=['fused', 'fused without weight', 'apart'],
)
def test_operators_are_as_registered(kernel_device, case, has_weight):
    layout, _, activation, size = case
    shape = (6, 2, 5 if has_weight else None)
    given = arguments(layout, shape, activation, size, device=kernel_device, dtype=torch.bfloat16)
    weight = given['weight'].flatten(1) if has_weight else None
    qkv, temperature, names = given['qkv'], given['temperature'].flatten(), (activation, *layout)
    gradient = torch.randn_like(channel_attention(**given))
    needs = (has_weight, has_weight)
    torch.library.opcheck(
        torch.ops.attnsr.channel_attention_backward, (gradient, qkv, temperature, weight, *names, *needs)
    )
    leaves = [value if value is None else value.requires_grad_() for value in (qkv, temperature, weight)]
    torch.library.opcheck(torch.ops.attnsr.channel_attention, (*leaves, *names))


@ways
def test_compiled_whole_for_any_size(kernel_device, case):
    torch.compiler.reset()
    compiled = torch.compile(channel_attention, backend='aot_eager', fullgraph=True, dynamic=True)
    layout, _, activation, (height, width) = case
    for size in ((height, width), (2 * height, width)):
        assert_agrees(arguments(layout, (6, 2, 5), activation, size, device=kernel_device), compiled)


@ways
def test_exported_for_any_size(kernel_device, case):
    layout, _, activation, (height, width) = case

    class Module(torch.nn.Module):
        def forward(self, qkv, temperature, weight):
            given = {'activation': activation, 'heads': 2, 'layout': layout[0], 'window_size': layout[1]}
            return channel_attention(qkv, temperature, weight=weight, **given)

    given = arguments(layout, (6, 2, 5), activation, (2 * height, 2 * width), device=kernel_device)
    sides = torch.export.Dim('rows'), torch.export.Dim('columns')
    dims = {2 + i: layout[1] * side if layout[0] == 'windows' else side for i, side in enumerate(sides)}
    program = torch.export.export(Module(), tuple(tensors(given).values()), dynamic_shapes=(dims, None, None))
    assert torch.ops.attnsr.channel_attention.default in {node.target for node in program.graph.nodes}
    given = arguments(layout, (6, 2, 5), activation, (height, 3 * width), device=kernel_device)
    assert torch.equal(program.module()(*tensors(given).values()), channel_attention(**given))


@ways
def test_autocast(kernel_device, case):
    """The result is of the lower precision, and gradients are of the parameters' own."""
    given = arguments(*case, device=kernel_device)
    given = {**given, **{name: value.bfloat16().float() for name, value in tensors(given).items()}}
    cotangent = cotangent_of(given).bfloat16()
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        y, gradients = with_gradients(channel_attention, given, cotangent)
    assert y.dtype == torch.bfloat16
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert_close(y, expected, TOLERANCES[torch.bfloat16])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        assert_close(gradient, expected_gradients[name], TOLERANCES[torch.bfloat16], name)


@pytest.mark.parametrize('name', ['parts', 'windows', 'one position', 'no overlap', 'no weight, windows'])
def test_operations_are_counted_as_the_reference_s(kernel_device, name):
    """On the meta device, where the reference computes what the definition says."""
    given = arguments(*OTHERS[name], device=kernel_device)
    with FlopCounterMode(display=False) as counter:
        with_gradients(channel_attention, given, cotangent_of(given))
    of_meta = {**given, **{key: value.to('meta') for key, value in tensors(given).items()}}
    with FlopCounterMode(display=False) as expected:
        with_gradients(channel_attention, of_meta, torch.empty_like(cotangent_of(given), device='meta'))
    assert counter.get_total_flops() == expected.get_total_flops() > 0


@pytest.mark.parametrize(
    ('shape', 'reason'),
    [
        ((65, 1, None), 'heads of more than 64 channels'),
        ((130, 5, None), 'more than 128 channels'),
        ((6, 2, 129), 'more than 128 channels'),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(kernel_device, shape, reason, monkeypatch):
    given = arguments(('image', None), shape, 'relu', (2, 3), device=kernel_device)
    with pytest.raises(dispatch.BackendError, match=f'channel_attention: .* cannot be had: {reason}$'):
        channel_attention(**given)
    monkeypatch.setattr(dispatch, '_backend', 'auto')
    assert torch.equal(channel_attention(**given), referred(**given))


def test_a_network_on_this_kernel_alone(kernel_device, monkeypatch):
    with monkeypatch.context() as patched:  # on the CPU, where kernels run in the interpreter alone
        patched.setattr(dispatch, 'use_triton', lambda *_: False)
        net = build('DLGSANet', upscale=2).eval().to(kernel_device)
    given = {'x': torch.rand(1, 3, 12, 17, device=kernel_device), **dict(net.named_parameters())}

    def run(x, **parameters):
        return torch.func.functional_call(net, parameters, (x,))

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, 'use_triton', lambda *_: False)
        expected = run(**given).detach()
        cotangent = torch.randn_like(expected)
        _, expected_gradients = with_gradients(run, given, cotangent)
    monkeypatch.setattr(dispatch, 'use_triton', lambda operation, *_: operation == 'channel_attention')
    y, gradients = with_gradients(run, given, cotangent)
    assert_close(y, expected.double(), {'atol': 1e-5, 'rtol': 1e-5})
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name].double(), {'atol': 1e-4, 'rtol': 1e-4}, name)


@pytest.mark.gpu
@pytest.mark.parametrize('tf32', [False, True], ids=['exact', 'TF32'])
@pytest.mark.parametrize('full', FULL.values(), ids=list(FULL))
@dtypes
@networks
def test_full_shapes(network, full, dtype, tf32, kernel_device, monkeypatch):
    if tf32 and dtype != torch.float32:
        pytest.skip('TF32 is a way to multiply float32')
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', tf32)
    layout, shape, activation = network
    batch, size = full
    # Where the exact score is within an error of 0, a whole gradient would appear or go at ReLU.
    activation = 'softmax' if tf32 else activation
    given = arguments(layout, shape, activation, size, device=kernel_device, dtype=dtype, batch=batch)
    assert_agrees(given, tolerances=TF32_TOLERANCES if tf32 else None)


@pytest.mark.gpu
@networks
def test_captured_in_a_graph(network, kernel_device):
    given = arguments(*network, (64, 96), device=kernel_device, dtype=torch.bfloat16)
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    cotangent = cotangent_of(given)

    def step():
        y = channel_attention(**given)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
