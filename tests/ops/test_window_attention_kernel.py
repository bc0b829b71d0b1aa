"""The kernels of window attention against the reference in float64, for the same, already rounded, inputs."""

from contextlib import contextmanager

import networks
import pytest
import torch
from agreement import in_float64, random, tensors, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr.ops import dispatch, launching
from attnsr.ops.window_attention import MapScores, SharedAttention, shared_window_attention, window_attention

triton_kernel = pytest.importorskip('attnsr.ops.window_attention.triton_kernel')

# Error allowed to each element, absolute and relative; of gradients in units of the largest, since some of them are
# sums over all windows.
TOLERANCES = {
    torch.float32: {'atol': 4e-6, 'rtol': 4e-6},
    torch.float16: {'atol': 4e-3, 'rtol': 4e-3},
    torch.bfloat16: {'atol': 3e-2, 'rtol': 3e-2},
}
TF32_TOLERANCES = TOLERANCES[torch.float16]

ELAN = {'window_sizes': (4, 8, 16), 'symmetric': True}
ASID = {'window_sizes': (8,), 'symmetric': False, 'biased': True}
NETWORKS = {
    'ELAN': ELAN | {'d': 60},
    'ELAN, shifted': ELAN | {'d': 60, 'shifted': True},
    'ELAN-light': ELAN | {'d': 20},
    'ELAN-light, shifted': ELAN | {'d': 20, 'shifted': True},
    'ASID, SLA1': ASID | {'d': 36},
    'ASID, SGA1': ASID | {'d': 36, 'grid': True},
    'ASID, SLA2': ASID | {'d': 24},
    'ASID, SGA2': ASID | {'d': 24, 'grid': True},
    'ASID, SLA3': ASID | {'d': 12},
    'ASID, SGA3': ASID | {'d': 12, 'grid': True},
}
# What the interpreter has time for.
INTERPRETED = {
    ('ELAN', torch.bfloat16),
    ('ELAN-light, shifted', torch.float16),
    ('ASID, SLA1', torch.bfloat16),
    ('ASID, SGA2', torch.float32),
    ('ASID, SLA3', torch.float16),
}
WAYS = {
    'q = k': {'symmetric': True},
    'q = k, bias, shifted': {'symmetric': True, 'biased': True, 'shifted': True},
    'q, k, bias, grid': {'symmetric': False, 'biased': True, 'grid': True},
    'q, k, shifted': {'symmetric': False, 'shifted': True},
}
# Window sizes, height and width, and one of the ways.
MAPS = [
    ((1,), (1, 1), 'q, k, bias, grid'),
    ((1,), (3, 10), 'q = k, bias, shifted'),
    ((2,), (2, 2), 'q, k, shifted'),
    ((3,), (6, 15), 'q, k, bias, grid'),
    ((3,), (6, 15), 'q, k, shifted'),
    ((5, 4), (20, 20), 'q = k'),
    ((6, 2), (6, 12), 'q = k, bias, shifted'),
    ((7,), (14, 7), 'q, k, bias, grid'),
    ((7,), (7, 14), 'q = k, bias, shifted'),
    ((9,), (9, 18), 'q, k, shifted'),
    ((9,), (18, 9), 'q = k'),
    ((9,), (9, 9), 'q, k, bias, grid'),
    ((4, 2, 4), (4, 20), 'q = k, bias, shifted'),
]
FULL = {'1280 x 720 x4': (1, (192, 320)), 'training': (32, (64, 64))}


@pytest.fixture
def _large_tiles(kernel_device, monkeypatch):
    """Tiles of TF32, of which the interpreter needs fewer; there, products are exact all the same."""
    if kernel_device == 'cpu':
        monkeypatch.setattr(launching, 'input_precision', lambda x: 'tf32')


@pytest.fixture(params=[False, True], ids=['exact', 'TF32'])
def tf32(request):
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = False


def arguments(
    size,
    *,
    device,
    window_sizes,
    d=5,
    dv=None,
    symmetric=True,
    biased=False,
    shifted=False,
    grid=False,
    dtype=torch.float32,
    memory='channels-last',
    batch=1,
):
    """x, tables, and values for a layer that shares, ``dv`` in each run."""
    torch.manual_seed(0)
    runs, parts = len(window_sizes), 2 if symmetric else 3
    given = {
        'x': random(batch, runs * parts * d, *size, memory=memory, dtype=dtype),
        'v': random(batch, runs * (dv or d), *size, memory=memory, dtype=dtype),
        'tables': random(sum((2 * side - 1) ** 2 for side in window_sizes), dtype=dtype) if biased else None,
        'window_sizes': window_sizes,
        'symmetric': symmetric,
        'shifted': shifted,
        'grid': grid,
        'scale': d**-0.5,
    }
    # Moved as they are: a view stays one.
    return {**given, **{name: value.to(device) for name, value in tensors(given).items()}}


def layers(x, v, tables=None, *, window_sizes, **how):
    """Of a layer that computes attention and one that shares it, the outputs side by side."""
    if tables is not None:
        how['relative_bias'] = tables.split([(2 * side - 1) ** 2 for side in window_sizes])
    y, shared = window_attention(x, window_sizes, **how)
    return torch.cat((y, shared_window_attention(v, shared)), 1)


@contextmanager
def backend(name):
    before = dispatch.get_backend()
    dispatch.set_backend(name)
    yield
    dispatch.set_backend(before)


def referred(**given):
    with backend('reference'):
        return layers(**given)


def assert_close(found, expected, tolerances, unit=1.0, name='output'):
    torch.testing.assert_close(found.double() / unit, expected / unit, **tolerances, msg=lambda text: f'{name}: {text}')


def assert_gradients_close(gradients, expected, tolerances):
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], tolerances, expected[name].abs().max().clamp(min=1), name)


def assert_agrees(given, function=layers, tolerances=None, memory='channels-last'):
    """The outputs and every gradient equal the reference's, in dtypes of the inputs."""
    x = given['x']
    tolerances = tolerances or TOLERANCES[x.dtype]
    expected = referred(**in_float64(given)).shape
    torch.manual_seed(1)
    cotangent = random(*expected, memory=memory, dtype=x.dtype).to(x.device)
    y, gradients = with_gradients(function, given, cotangent)
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, tolerances)
    assert all(gradient.dtype == given[name].dtype for name, gradient in gradients.items())
    assert_gradients_close(gradients, expected_gradients, tolerances)


@pytest.mark.parametrize(
    ('network', 'dtype'),
    [
        pytest.param(
            name, dtype, id=f'{name}, {dtype}', marks=[] if (name, dtype) in INTERPRETED else [pytest.mark.gpu]
        )
        for name in NETWORKS
        for dtype in TOLERANCES
    ],
)
def test_equals_the_reference(kernel_device, network, dtype):
    assert_agrees(arguments((16, 16), device=kernel_device, dtype=dtype, **NETWORKS[network]))


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize(
    ('window_sizes', 'size', 'way'),
    MAPS,
    ids=[f'{",".join(map(str, sizes))} in {size[0]}x{size[1]}, {way}' for sizes, size, way in MAPS],
)
def test_any_windows(kernel_device, window_sizes, size, way):
    assert_agrees(arguments(size, device=kernel_device, window_sizes=window_sizes, d=3, dv=7, **WAYS[way]))


@pytest.mark.parametrize('way', WAYS.values(), ids=list(WAYS))
def test_exact_products_of_larger_windows(kernel_device, way):
    """Windows that are several tiles and no whole number of them."""
    assert_agrees(arguments((6, 6), device=kernel_device, window_sizes=(6,), d=3, **way))


def test_exact_products_of_elan_s_windows(kernel_device):
    """Smaller than a tile, of two of them, and of many."""
    assert_agrees(arguments((16, 16), device=kernel_device, **ELAN, shifted=True, d=2))


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize('d', [1, 16, 33, 64])
def test_any_channels(kernel_device, d):
    assert_agrees(arguments((4, 4), device=kernel_device, window_sizes=(4,), d=d, dv=65 - d, symmetric=False))


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize('memory', ['plain', 'channels-last', 'view'])
def test_any_memory_and_batch(kernel_device, memory):
    given = arguments((4, 8), device=kernel_device, window_sizes=(2, 4), memory=memory, batch=3)
    assert_agrees(given, memory=memory)


@pytest.mark.usefixtures('_large_tiles')
def test_channels_of_a_larger_map_are_read_where_they_stand(kernel_device, monkeypatch):
    given = arguments((4, 12), device=kernel_device, window_sizes=(4,), batch=2, d=8)
    for name, value in tensors(given).items():
        surroundings = torch.full((2, value.shape[1] + 5, 4, 12), torch.nan, device=kernel_device)
        surroundings = surroundings.contiguous(memory_format=torch.channels_last)
        given[name] = surroundings[:, 2:-3]
        given[name].copy_(value)
    strides = []
    launch = launching.launch

    def noting(kernel, *rest, **options):
        strides.append((options['X_STRIDE'], options['V_STRIDE']))
        launch(kernel, *rest, **options)

    monkeypatch.setattr(launching, 'launch', noting)
    with torch.no_grad():
        assert_close(layers(**given), referred(**in_float64(given)), TOLERANCES[torch.float32])
    assert strides == [(21, 21), (21, 13)]


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize('programs', [1, 3])
@pytest.mark.parametrize(('size', 'map_size'), [(3, (9, 30)), (9, (9, 18))], ids=['3 in 9x30', '9 in 9x18'])
def test_table_gradients_are_sums_of_parts(kernel_device, size, map_size, programs, monkeypatch):
    monkeypatch.setattr(triton_kernel, 'TABLE_PROGRAMS', programs)
    given = arguments(map_size, device=kernel_device, window_sizes=(size,), biased=True, d=2)
    leaf, exact = (values['tables'].requires_grad_() for values in (given, in_float64(given)))
    layers(**given).square().sum().backward()
    referred(**{**in_float64(given), 'tables': exact}).square().sum().backward()
    assert_gradients_close({'tables': leaf.grad}, {'tables': exact.grad}, TOLERANCES[torch.float32])


@pytest.mark.usefixtures('_large_tiles')
def test_large_scores_do_not_overflow(kernel_device):
    given = arguments((12, 12), device=kernel_device, window_sizes=(4, 12))
    given['x'], given['scale'] = (100 * given['x']).round(), 1.0
    with torch.no_grad():
        assert_close(layers(**given), referred(**in_float64(given)), {'atol': 1e-3, 'rtol': 1e-5})


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize(
    ('needed', 'computed'),
    [
        ((), None),
        (('x',), {(True, True), (True, False)}),  # x itself has the values of the first layer
        (('v',), {(False, True)}),
        (('tables',), {(False, False)}),
        (('x', 'v', 'tables'), {(True, True)}),
    ],
    ids=lambda needed: ' '.join(map(str, needed)) if needed else 'nothing',
)
@pytest.mark.parametrize('size', [4, 9], ids='windows of {}'.format)
def test_only_gradients_that_are_needed_are_computed(kernel_device, size, needed, computed, monkeypatch):
    given = arguments((size, size), device=kernel_device, window_sizes=(size,), biased=True, d=2)
    exact = in_float64(given)
    for name in needed:
        given[name].requires_grad_()
        exact[name].requires_grad_()
    launched, launch = set(), launching.launch

    def noting(kernel, *rest, **options):
        if kernel is triton_kernel._window_attention_gradient:
            launched.add((options['OF_X'], options['OF_V']))
        launch(kernel, *rest, **options)

    monkeypatch.setattr(launching, 'launch', noting)
    y, expected = layers(**given), referred(**exact)
    if needed:
        y.sum().backward()
        expected.sum().backward()
        assert launched == (computed if needed != ('tables',) or size == 4 else set())
    assert [name for name, value in tensors(given).items() if value.grad is not None] == list(needed)
    gradients, expected = ({name: leaves[name].grad for name in needed} for leaves in (given, exact))
    assert_gradients_close(gradients, expected, TOLERANCES[torch.float32])


@pytest.mark.usefixtures('_large_tiles')
def test_layers_train_on_attention_that_was_computed_without_autograd(kernel_device):
    given = arguments((8, 16), device=kernel_device, window_sizes=(2, 8))
    v, how = given['v'].requires_grad_(), {'shifted': True}
    with torch.inference_mode():
        _, shared = window_attention(given['x'], (2, 8), **how)
    with backend('reference'):
        _, expected = window_attention(given['x'].double(), (2, 8), **how)
        expected = shared_window_attention(v.double(), expected)
    with pytest.raises(RuntimeError, match='nference'):
        shared_window_attention(v, shared)
    with torch.no_grad():
        _, shared = window_attention(given['x'], (2, 8), **how)
    y = shared_window_attention(v, shared)
    assert_close(y, expected, TOLERANCES[torch.float32])
    gradients = (torch.autograd.grad(output.sum(), v)[0].double() for output in (y, expected))
    assert_close(*gradients, TOLERANCES[torch.float32], name='v')


@pytest.mark.usefixtures('_large_tiles')
def test_shared_with_the_reference(kernel_device):
    """What the kernel left serves the reference, with its gradients; not the other way round."""
    given = arguments((4, 8), device=kernel_device, window_sizes=(4, 2), symmetric=False, biased=True)

    def across(x, v, tables, *, window_sizes, **how):
        y, shared = window_attention(x, window_sizes, **how, relative_bias=tables.split([49, 9]))
        assert isinstance(shared.attention, MapScores)
        with backend('reference'):
            return torch.cat((y, shared_window_attention(v, shared)), 1).contiguous(memory_format=torch.channels_last)

    assert_agrees(given, across)
    with backend('reference'):
        _, shared = window_attention(given['x'], (4, 2), symmetric=False)
    with pytest.raises(dispatch.BackendError, match=r'shared_window_attention.*computed in plain PyTorch'):
        shared_window_attention(given['v'], shared)


@pytest.mark.parametrize(
    ('window_sizes', 'channels', 'message'),
    [
        ((33,), 4, r'windows of up to 32 x 32 tokens, and got \[33\]'),
        ((2, 33), 8, r'windows of up to 32 x 32 tokens, and got \[2, 33\]'),
        ((11,), 130, 'up to 64 channels a head, and got 65'),
    ],
)
def test_what_the_kernel_does_not_serve(kernel_device, window_sizes, channels, message):
    with pytest.raises(dispatch.BackendError, match=f'window_attention: .*{message}'):
        window_attention(torch.zeros(1, channels, 66, 66, device=kernel_device), window_sizes)


@pytest.mark.parametrize(
    ('v', 'message'),
    [
        (torch.zeros(1, 65, 2, 2), 'up to 64 channels a head, and got 65'),
        (torch.zeros(1, 3, 2, 2, dtype=torch.float16), r'computed in torch\.float32, and v is torch\.float16'),
    ],
)
def test_values_that_the_kernel_does_not_serve(kernel_device, v, message):
    _, shared = window_attention(torch.ones(1, 4, 2, 2, device=kernel_device), (2,))
    with pytest.raises(dispatch.BackendError, match=message):
        shared_window_attention(v.to(kernel_device), shared)


@pytest.mark.usefixtures('_large_tiles')
def test_an_expanded_gradient(kernel_device):
    given = arguments((4, 8), device=kernel_device, window_sizes=(2, 4))
    leaves = {name: value.requires_grad_() for name, value in tensors(given).items()}
    layers(**given).sum().backward()
    exact = {name: value.detach().requires_grad_() for name, value in in_float64(leaves).items()}
    referred(**{**given, **exact}).sum().backward()
    assert_gradients_close(
        {name: leaf.grad for name, leaf in leaves.items()},
        {name: leaf.grad for name, leaf in exact.items()},
        TOLERANCES[torch.float32],
    )


def test_values_of_another_map_do_nothing_however_large_the_gradient(kernel_device):
    """In windows that are whole tiles, and of several; the queries' gradient overflows, that of x's own values is 0."""
    given = arguments((6, 6), device=kernel_device, window_sizes=(2, 6), d=2)
    x = given['x'].requires_grad_()
    _, shared = window_attention(x, (2, 6))
    y = shared_window_attention(given['v'], shared)
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
    assert not gradient[:, [0, 1, 4, 5]].isfinite().any()
    assert not gradient[:, [2, 3, 6, 7]].any()


@pytest.mark.usefixtures('_large_tiles')
def test_the_same_every_time(kernel_device):
    given = arguments((6, 6), device=kernel_device, window_sizes=(2, 6), biased=True)
    cotangent = torch.randn(1, 20, 6, 6, device=kernel_device)
    (y, gradients), (again, gradients_again) = (with_gradients(layers, given, cotangent) for _ in range(2))
    assert torch.equal(y, again)
    assert all(torch.equal(value, gradients_again[name]) for name, value in gradients.items())


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize('way', [WAYS['q = k'], WAYS['q, k, bias, grid']], ids=['q = k', 'q, k, bias, grid'])
def test_operators_are_as_registered(kernel_device, way):
    given = arguments((2, 2), device=kernel_device, window_sizes=(2,), d=2, **way)
    x, v, tables = given['x'], given['v'], given['tables']
    how = ((2,), given['shifted'], given['grid'], given['symmetric'], given['scale'])
    _, lse = torch.ops.attnsr.window_attention(x, tables, *how)
    for values, of in ((None, (True, True)), (v, (True, True)), (v, (False, False))):
        given = torch.randn_like(v), values, x, tables, lse, None, *how, *of, tables is not None
        torch.library.opcheck(torch.ops.attnsr.window_attention_gradient, given)
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in (x, v, tables)]
    torch.library.opcheck(torch.ops.attnsr.window_attention, (leaves[0], leaves[2], *how))
    torch.library.opcheck(torch.ops.attnsr.shared_window_attention, (leaves[1], leaves[0], leaves[2], lse, *how))


def test_the_gradient_s_operator_in_windows_of_several_tiles(kernel_device):
    given = arguments((6, 6), device=kernel_device, window_sizes=(6,), d=2, biased=True)
    how = (6,), False, False, True, given['scale']
    y, lse = torch.ops.attnsr.window_attention(given['x'], given['tables'], *how)
    inputs = torch.randn_like(y), None, given['x'], given['tables'], lse, y
    torch.library.opcheck(torch.ops.attnsr.window_attention_gradient, (*inputs, *how, True, True, True))


@pytest.mark.usefixtures('_large_tiles')
def test_compiled_whole(kernel_device):
    torch.compiler.reset()
    compiled = torch.compile(layers, backend='aot_eager', fullgraph=True, dynamic=True)
    for size in ((8, 4), (4, 12)):
        assert_agrees(arguments(size, device=kernel_device, window_sizes=(2, 4), biased=True, d=2), compiled)


@pytest.mark.exhaustive
@pytest.mark.usefixtures('_large_tiles')
def test_compiled_by_inductor(kernel_device):
    """With what it makes kernels of its own from, and in memory formats that it chooses, before and after."""
    torch.compiler.reset()

    def function(x, v, tables, **how):
        y = layers(2 * x, v[:, :, :, ::2], tables, **how)
        return (y.relu() + 1)[:, 1::2, :, ::2] * 3

    given = arguments((4, 8), device=kernel_device, window_sizes=(2, 4), biased=True, d=2)
    given['v'] = torch.cat([given['v']] * 2, 3)
    torch.manual_seed(1)
    cotangent = torch.randn(1, 4, 4, 4, device=kernel_device)
    y, gradients = with_gradients(torch.compile(function, fullgraph=True), given, cotangent)
    expected, expected_gradients = with_gradients(function, given, cotangent)
    assert_close(y, expected.double(), TOLERANCES[torch.float32])
    assert y.stride() == expected.stride()
    expected_gradients = {name: gradient.double() for name, gradient in expected_gradients.items()}
    assert_gradients_close(gradients, expected_gradients, TOLERANCES[torch.float32])


@pytest.mark.usefixtures('_large_tiles')
def test_exported(kernel_device):
    class Module(torch.nn.Module):
        def forward(self, x, v):
            return layers(x, v, window_sizes=(2, 4), shifted=True)

    given = arguments((8, 12), device=kernel_device, window_sizes=(2, 4), batch=2)
    values = tuple(tensors(given).values())
    sizes = {0: torch.export.Dim('b'), 2: 4 * torch.export.Dim('h', min=1), 3: 4 * torch.export.Dim('w', min=1)}
    program = torch.export.export(Module(), values, dynamic_shapes=(sizes, sizes))
    targets = {node.target for node in program.graph.nodes}
    assert targets >= {torch.ops.attnsr.window_attention.default, torch.ops.attnsr.shared_window_attention.default}
    for batch, size in ((1, (8, 12)), (2, (4, 8))):
        values = tuple(tensors(arguments(size, device=kernel_device, window_sizes=(2, 4), batch=batch)).values())
        assert torch.equal(program.module()(*values), Module()(*values))


@pytest.mark.usefixtures('_large_tiles')
def test_autocast(kernel_device):
    """The result is of the lower precision, and gradients are of the parameters' own."""
    given = arguments((4, 8), device=kernel_device, window_sizes=(2, 4), biased=True)
    given = {**given, **{name: value.bfloat16().float() for name, value in tensors(given).items()}}
    cotangent = torch.randn(1, 20, 4, 8, device=kernel_device).bfloat16()
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        y, gradients = with_gradients(layers, given, cotangent)
    assert y.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    expected, expected_gradients = with_gradients(referred, in_float64(given), cotangent.double())
    assert_close(y, expected, TOLERANCES[torch.bfloat16])
    assert_gradients_close(gradients, expected_gradients, TOLERANCES[torch.bfloat16])


@pytest.mark.usefixtures('_large_tiles')
def test_operations_are_counted_as_the_reference_s(kernel_device):
    given = arguments((4, 8), device=kernel_device, window_sizes=(2, 4), symmetric=False, dv=3)
    cotangent = torch.randn(1, 16, 4, 8, device=kernel_device)
    counts = []
    for function in (layers, referred):
        with FlopCounterMode(display=False) as counter:
            with_gradients(function, given, cotangent)
        counts.append(counter.get_total_flops())
    assert counts == 2 * [3 * 2 * (4 * 8) * (2**2 + 4**2) * (5 + 5 + 3)]


@pytest.mark.usefixtures('_large_tiles')
@pytest.mark.parametrize(
    ('name', 'options'),
    [('ELAN', {}), ('ASID', {'window_size': 4, 'use_checkpoint': True})],
    ids=['ELAN', 'ASID, sharing across checkpoints'],
)
def test_networks(kernel_device, name, options, monkeypatch):
    """In training, with the gradient of every parameter; of all operations, only this one on its kernel."""
    with backend('reference'):
        net = networks.build(name, upscale=2, **options).to(kernel_device)
    x = torch.rand(1, 3, 8, 8, device=kernel_device)
    choose, used = dispatch.use_triton, set()

    def only_here(operation, *rest):
        return 'window_attention' in operation and choose(operation, *rest) and not used.add(operation)

    results = []
    for choice in (only_here, lambda *_: False):
        monkeypatch.setattr(dispatch, 'use_triton', choice)
        net.zero_grad()
        y = net.train()(x)
        y.square().mean().backward()
        results.append({'output': y.detach(), **{name: p.grad.clone() for name, p in net.named_parameters()}})
    assert used == {'window_attention', 'shared_window_attention'}
    found, expected = results
    least = 1e-3 * max(right.abs().max() for right in expected.values())  # some are nothing, as of a bias before a norm
    for name, right in expected.items():
        unit = right.abs().max().clamp(min=least)
        assert_close(found[name], right.double(), {'atol': 1e-4, 'rtol': 1e-4}, unit, name)


@pytest.mark.gpu
@pytest.mark.parametrize('full', FULL.values(), ids=list(FULL))
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('network', NETWORKS.values(), ids=list(NETWORKS))
def test_full_shapes(network, dtype, full, tf32, kernel_device):
    if tf32 and dtype != torch.float32:
        pytest.skip('TF32 is a way to multiply float32')
    batch, size = full
    given = arguments(size, device=kernel_device, dtype=dtype, batch=batch, **network)
    assert_agrees(given, tolerances=TF32_TOLERANCES if tf32 else None)


@pytest.mark.gpu
@pytest.mark.parametrize('d', [20, 60, 64])
def test_the_largest_windows(d, kernel_device):
    assert_agrees(arguments((64, 96), device=kernel_device, window_sizes=(32,), d=d, biased=True))


@pytest.mark.gpu
@pytest.mark.parametrize('network', NETWORKS.values(), ids=list(NETWORKS))
def test_captured_in_a_graph(network, kernel_device):
    given = arguments((64, 64), device=kernel_device, dtype=torch.bfloat16, **network)
    leaves = [value.requires_grad_() for value in tensors(given).values()]
    cotangent = torch.randn_like(layers(**given))

    def step():
        y = layers(**given)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


def test_what_layers_share_is_not_copied(kernel_device):
    x = torch.randn(1, 8, 4, 8, device=kernel_device).contiguous(memory_format=torch.channels_last)
    _, shared = window_attention(x, (2, 4))
    assert isinstance(shared, SharedAttention)
    assert isinstance(shared.attention, MapScores)
    assert shared.attention.x.data_ptr() == x.data_ptr()
    assert shared.attention.lse.shape == (2, 32)
