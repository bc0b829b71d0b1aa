"""Window attention against the definition, computed window by window in float64."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from attnsr.ops.window_attention import reference, shared_window_attention, window_attention

# Error allowed to each element: absolute, and relative to the exact figure for the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: {'atol': 1e-12, 'rtol': 1e-12},
    torch.float32: {'atol': 1e-5, 'rtol': 1e-5},
    torch.float16: {'atol': 6e-3, 'rtol': 6e-3},
    torch.bfloat16: {'atol': 5e-2, 'rtol': 5e-2},
}
# Gradients pass through more products of rounded figures.
GRADIENT_TOLERANCES = {dtype: {name: 3 * value for name, value in at.items()} for dtype, at in TOLERANCES.items()}
# Window sizes; height, width. The first maps of a size are one window large.
CASES = [
    ((1,), (1, 1)),
    ((1,), (3, 5)),
    ((2,), (2, 2)),
    ((2,), (6, 4)),
    ((3,), (3, 9)),
    ((4,), (4, 4)),
    ((1, 2, 3), (6, 12)),
    ((4, 2, 4), (8, 4)),
    ((8,), (8, 8)),
    ((16, 2), (16, 16)),
    ((4, 8, 16), (16, 32)),
]
MODES = {'autograd': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}

cases = pytest.mark.parametrize(
    ('window_sizes', 'size'),
    [pytest.param(*case, id=f'{",".join(map(str, case[0]))} in {case[1][0]}x{case[1][1]}') for case in CASES],
)
shifts = pytest.mark.parametrize('shifted', [False, True], ids=['straight', 'shifted'])
layouts = pytest.mark.parametrize(('batch', 'memory'), [(1, 'plain'), (3, 'channels-last'), (3, 'view')])
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)


def defined(q, k, v, window_sizes, shifted=False, grid=False, scale=1, tables=None):
    """Attention with the maps q, k and v, (B, C, H, W), of all runs one after the other."""
    runs, (height, width) = len(window_sizes), q.shape[2:]
    outputs = []
    for run, size in enumerate(window_sizes):
        roll = size // 2 if shifted else 0
        queries, keys, values = (x.chunk(runs, 1)[run].roll((-roll, -roll), (2, 3)) for x in (q, k, v))
        down, right = (height // size, width // size) if grid else (1, 1)
        y = torch.zeros_like(values)
        for top, left in product(range(height // size), range(width // size)):
            begin = (top, left) if grid else (top * size, left * size)
            window = (
                ...,
                slice(begin[0], begin[0] + size * down, down),
                slice(begin[1], begin[1] + size * right, right),
            )
            scores = scale * torch.einsum('bci,bcj->bij', queries[window].flatten(2), keys[window].flatten(2))
            if tables is not None:
                scores = scores + bias(tables[run], size)
            powers = (scores - scores.amax(2, keepdim=True)).exp()
            weights = powers / powers.sum(2, keepdim=True)
            y[window] = torch.einsum('bij,bcj->bci', weights, values[window].flatten(2)).unflatten(2, (size, size))
        outputs.append(y.roll((roll, roll), (2, 3)))
    return torch.cat(outputs, 1)


def bias(table, size):
    tokens = list(product(range(size), repeat=2))
    entries = [(y - v + size - 1) * (2 * size - 1) + x - u + size - 1 for y, x in tokens for v, u in tokens]
    return torch.stack([table.flatten()[entry] for entry in entries]).view(size**2, size**2)


def defined_layers(window_sizes, shifted, qv, *shared_values):
    """The layer that computes attention, and the layers that share it."""
    q, v = parts(qv, window_sizes, 2)
    return [defined(q, q, values, window_sizes, shifted) for values in (v, *shared_values)]


def parts(x, window_sizes, count):
    """The maps q, v or q, k, v out of one that holds all parts of a run side by side."""
    runs = [run.chunk(count, 1) for run in x.chunk(len(window_sizes), 1)]
    return [torch.cat(part, 1) for part in zip(*runs, strict=True)]


def layers(window_sizes, shifted, qv, *shared_values):
    y, shared = window_attention(qv, window_sizes, shifted)
    return [y, *(shared_window_attention(values, shared) for values in shared_values)]


def inputs(window_sizes, size, batch=1, memory='plain', dtype=torch.float64, d=3):
    """qv, and the values of two layers that share, the second with a channel more in each run."""
    torch.manual_seed(0)
    maps = []
    for c in (2 * d, d, d + 1):
        shape = (batch, c * len(window_sizes), *size)
        x = torch.randn(shape)
        if memory == 'view':  # the inside of a larger map: contiguous in no format
            x = torch.randn(shape[0], shape[1] + 2, shape[2] + 1, shape[3] + 3)[:, 1:-1, 1:, 2:-1]
        maps.append(x.to(dtype))
    return [x.contiguous(memory_format=torch.channels_last) if memory == 'channels-last' else x for x in maps]


def assert_all_close(actual, expected, **tolerances):
    """Layer by layer, against float64 figures rounded to the dtype of the first."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e.to(a.dtype), **tolerances, msg=lambda text, at=i: f'{at}: {text}')


def assert_agrees(window_sizes, shifted, maps, function=layers):
    """Every layer's output, and the gradient of every layer with respect to every map, equal the definition's."""
    dtype = maps[0].dtype
    given = [x.detach().requires_grad_() for x in maps]
    exact = [x.detach().double().requires_grad_() for x in maps]
    outputs, expected = function(window_sizes, shifted, *given), defined_layers(window_sizes, shifted, *exact)
    assert_all_close(outputs, expected, **TOLERANCES[dtype])
    assert all(y.dtype == dtype for y in outputs)
    for layer, (y, e) in enumerate(zip(outputs, expected, strict=True)):
        cotangent = torch.randn(y.shape).to(dtype)
        used = [0, layer] if layer else [0]  # q comes with the first map, the values with the layer's own
        gradients = torch.autograd.grad(y, [given[i] for i in used], cotangent, retain_graph=True)
        exact_gradients = torch.autograd.grad(e, [exact[i] for i in used], cotangent.double(), retain_graph=True)
        assert_all_close(gradients, exact_gradients, **GRADIENT_TOLERANCES[dtype])


@layouts
@shifts
@cases
def test_equals_the_definition(window_sizes, size, shifted, batch, memory):
    assert_agrees(window_sizes, shifted, inputs(window_sizes, size, batch, memory))


@pytest.mark.parametrize('chunk', [1, 3 * 16**2, 5 * 64**2, 2**20], ids='chunks of {}'.format)
@pytest.mark.parametrize('kept', [0, 4, 64, 256], ids='kept to {} tokens'.format)
@shifts
def test_chunks_and_recomputing_equal_the_definition(monkeypatch, shifted, kept, chunk):
    """Without autograd: as many windows at a time as a chunk holds, and attention kept or computed again."""
    monkeypatch.setattr(reference, 'KEPT_TOKENS', kept)
    monkeypatch.setattr(reference, 'CHUNK_ELEMENTS', chunk)
    window_sizes = (2, 4, 8)
    maps = inputs(window_sizes, (16, 24), 3, 'channels-last')
    before = [x.clone() for x in maps]
    with torch.no_grad():
        first, shared = window_attention(maps[0], window_sizes, shifted)
        # The last a second time: sharing must leave what is shared as it was.
        outputs = [first, *(shared_window_attention(v, shared) for v in (maps[1], maps[2], maps[2]))]
    assert [isinstance(a, torch.Tensor) for a in shared.attention] == [size**2 <= kept for size in window_sizes]
    expected = defined_layers(window_sizes, shifted, *maps)
    assert_all_close(outputs, [*expected, expected[-1]], **TOLERANCES[torch.float64])
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


@layouts
@shifts
@cases
def test_without_autograd(window_sizes, size, shifted, batch, memory):
    maps = inputs(window_sizes, size, batch, memory)
    with torch.inference_mode():
        outputs = layers(window_sizes, shifted, *maps)
    assert_all_close(outputs, defined_layers(window_sizes, shifted, *maps), **TOLERANCES[torch.float64])


@shifts
def test_gradcheck(shifted):
    maps = [x.requires_grad_() for x in inputs((1, 2), (2, 4), d=1)]

    def function(*maps):
        return tuple(layers((1, 2), shifted, *maps))

    assert torch.autograd.gradcheck(function, maps)
    assert torch.autograd.gradgradcheck(function, maps)


@pytest.mark.parametrize('mode', ['no_grad', 'autograd, but q needs no gradient'])
@shifts
def test_layers_train_on_attention_that_needs_no_gradient(shifted, mode):
    """As in fine-tuning with the first layers frozen: of two layers that share, only the second is trained."""
    window_sizes = (2, 16)  # of which the second keeps no probabilities where q needs no gradient
    qv, v, _ = inputs(window_sizes, (16, 32))
    with torch.set_grad_enabled(mode != 'no_grad'):
        _, shared = window_attention(qv, window_sizes, shifted)
    given, exact = v.clone().requires_grad_(), v.clone().requires_grad_()
    y, expected = shared_window_attention(given, shared), defined_layers(window_sizes, shifted, qv, exact)[1]
    torch.testing.assert_close(y, expected, **TOLERANCES[torch.float64])
    cotangent = torch.randn(y.shape, dtype=y.dtype)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(given.grad, exact.grad, **TOLERANCES[torch.float64])


@shifts
def test_index_cached_at_inference_serves_training(shifted):
    reference._kept_permutations.cache_clear()
    maps = inputs((2, 4), (8, 12))
    with torch.inference_mode():
        layers((2, 4), shifted, *maps)
    assert reference._kept_permutations.cache_info().misses == 1
    assert_agrees((2, 4), shifted, maps)
    assert reference._kept_permutations.cache_info().misses == 1


def test_an_index_captured_in_a_graph_is_not_kept(monkeypatch):
    """Nothing fills it before the graph runs."""
    reference._kept_permutations.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda capturing=capturing: capturing)
        window_attention(torch.randn(1, 2, 4, 4), (2,))
        assert bool(reference._kept_permutations.cache_info().currsize) != capturing


def test_what_is_no_real_tensor_leaves_the_cached_index_usable():
    maps = inputs((2, 4), (8, 12))
    reference._kept_permutations.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = layers((2, 4), True, *map(mode.from_tensor, maps))
        assert [tuple(y.shape) for y in outputs] == [(1, 6, 8, 12), (1, 6, 8, 12), (1, 8, 8, 12)]
    assert reference._kept_permutations.cache_info().currsize == 0
    outputs = layers((2, 4), True, *(x.to('meta') for x in maps))
    assert [(y.is_meta, tuple(y.shape)) for y in outputs[1:]] == [(True, (1, 6, 8, 12)), (True, (1, 8, 8, 12))]
    outputs = layers((2, 4), True, *maps)
    assert all(type(y) is torch.Tensor for y in outputs)
    assert_all_close(outputs, defined_layers((2, 4), True, *maps), **TOLERANCES[torch.float64])


@dtypes
@layouts
@shifts
def test_other_dtypes(shifted, batch, memory, dtype):
    assert_agrees((2, 8), shifted, inputs((2, 8), (8, 16), batch, memory, dtype))


@dtypes
@pytest.mark.parametrize('kept', [0, 64], ids=['recomputing', 'keeping'])
@shifts
def test_other_dtypes_without_autograd(monkeypatch, shifted, kept, dtype):
    monkeypatch.setattr(reference, 'KEPT_TOKENS', kept)
    monkeypatch.setattr(reference, 'CHUNK_ELEMENTS', 3 * 64**2)
    maps = inputs((1, 2, 8), (8, 32), 2, 'channels-last', dtype)
    with torch.no_grad():
        outputs = layers((1, 2, 8), shifted, *maps)
    assert all(y.dtype == dtype for y in outputs)
    assert_all_close(outputs, defined_layers((1, 2, 8), shifted, *(x.double() for x in maps)), **TOLERANCES[dtype])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kept', [0, 64], ids=['recomputing', 'keeping'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_autocast(monkeypatch, dtype, kept, mode):
    """The batch products are autocast's: bfloat16 out of float32 or bfloat16."""
    monkeypatch.setattr(reference, 'KEPT_TOKENS', kept)
    maps = [x.to(dtype) for x in inputs((2, 8), (8, 16), 2, 'channels-last', torch.bfloat16)]
    maps = [x.requires_grad_(mode == 'autograd') for x in maps]
    with MODES[mode](), torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = layers((2, 8), True, *maps)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    assert_all_close(outputs, defined_layers((2, 8), True, *(x.double() for x in maps)), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize('mode', MODES)
def test_large_scores_do_not_overflow(mode):
    """Scores of 1e5, whose exponential float32 does not have; of whole numbers, so that they are known exactly."""
    maps = [
        (100 * x).round().requires_grad_(mode == 'autograd') for x in inputs((2, 16), (16, 16), dtype=torch.float32)
    ]
    with MODES[mode]():
        outputs = layers((2, 16), False, *maps)
    assert_all_close(outputs, defined_layers((2, 16), False, *(x.double() for x in maps)), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_scores_leave_half_precision(mode, dtype):
    """Scores of 1e6, past the end of float16, that differ by less than bfloat16 resolves; known exactly again."""
    q = torch.tensor([1024.0, 1024.0, 1024.0, 1023.0]).view(1, 1, 2, 2)
    v = torch.tensor([3.0, 5.0, 7.0, 100.0]).view(1, 1, 2, 2)
    x = torch.cat((q, q / 1024, v), 1).to(dtype).requires_grad_(mode == 'autograd')
    with MODES[mode]():
        y, shared = window_attention(x, (2,), symmetric=False, scale=1024.0)
        again = shared_window_attention(x[:, 2:], shared)
    expected = defined(*x.detach().double().chunk(3, 1), (2,), scale=1024.0)
    assert_all_close([y, again], [expected, expected], **TOLERANCES[dtype])


class Layers(torch.nn.Module):
    """All that the op does, as a network."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(49, dtype=torch.float64))

    def forward(self, x, v):
        first, shared = window_attention(x[:, :8], (2, 4), shifted=True)
        y, on_grid = window_attention(x, (4,), grid=True, symmetric=False, scale=0.7, relative_bias=[self.table])
        return first, shared_window_attention(v, shared), y, shared_window_attention(v, on_grid)


@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
def test_compiled_whole(mode):
    torch.compiler.reset()
    torch.manual_seed(0)
    net, x, v = Layers(), *(torch.randn(2, c, 8, 12, dtype=torch.float64, requires_grad=True) for c in (9, 4))
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    with MODES[mode]():
        outputs, expected = compiled(x, v), net(x, v)
    assert_all_close(outputs, expected, **TOLERANCES[torch.float64])
    if mode == 'autograd':
        cotangents = [torch.randn_like(y) for y in expected]
        gradients = (torch.autograd.grad(y, (x, v, net.table), cotangents) for y in (outputs, expected))
        assert_all_close(*gradients, **GRADIENT_TOLERANCES[torch.float64])


def test_exported_with_sizes_left_open():
    torch.manual_seed(0)
    net = Layers()
    sizes = {0: Dim('b'), 2: 4 * Dim('h', min=1), 3: 4 * Dim('w', min=1)}
    x, v = (torch.randn(2, c, 8, 12, dtype=torch.float64) for c in (9, 4))
    exported = torch.export.export(net, (x, v), dynamic_shapes=(sizes, sizes)).module()
    for b, h, w in ((2, 8, 12), (1, 4, 4), (3, 20, 8)):
        x, v = (torch.randn(b, c, h, w, dtype=torch.float64) for c in (9, 4))
        assert_all_close(exported(x, v), net(x, v), **TOLERANCES[torch.float64])


lies = pytest.mark.parametrize(
    'lie', [{}, {'shifted': True}, {'grid': True}], ids=lambda lie: next(iter(lie), 'straight')
)


def general_inputs(window_sizes, size, batch=1, memory='plain', dtype=torch.float64, d=2):
    """(q, k, v) of each run, other values, and the tables."""
    torch.manual_seed(0)
    maps = [torch.randn(batch, c * len(window_sizes), *size).to(dtype) for c in (3 * d, d + 1)]
    maps = [x.contiguous(memory_format=torch.channels_last) if memory == 'channels-last' else x for x in maps]
    return *maps, *(torch.randn((2 * side - 1) ** 2).to(dtype) for side in window_sizes)


def general_layers(window_sizes, lie, x, v, *tables):
    """Of q, k and v, with scale and bias; and of q and v, with a scale; each with a layer that shares."""
    y, shared = window_attention(x, window_sizes, **lie, symmetric=False, scale=0.6, relative_bias=tables)
    outputs = [y, shared_window_attention(v, shared)]
    y, shared = window_attention(parts_kept(x, window_sizes), window_sizes, **lie, scale=-1.5)
    return [*outputs, y, shared_window_attention(v, shared)]


def parts_kept(x, window_sizes):
    """k and v of (q, k, v)."""
    return torch.cat([run.chunk(3, 1)[i] for run in x.chunk(len(window_sizes), 1) for i in (1, 2)], 1)


def defined_general_layers(window_sizes, lie, x, v, *tables):
    q, k, first = parts(x, window_sizes, 3)
    outputs = [defined(q, k, values, window_sizes, **lie, scale=0.6, tables=tables) for values in (first, v)]
    return [*outputs, *(defined(k, k, values, window_sizes, **lie, scale=-1.5) for values in (first, v))]


@lies
@pytest.mark.parametrize(('batch', 'memory'), [(1, 'plain'), (3, 'channels-last')])
@pytest.mark.parametrize(
    ('window_sizes', 'size'), [((1,), (3, 2)), ((2,), (2, 2)), ((3,), (9, 3)), ((8,), (16, 24)), ((4, 2), (12, 8))]
)
def test_keys_scale_and_bias_equal_the_definition(window_sizes, size, lie, batch, memory):
    """Outputs, the gradient with respect to every map and table, and the outputs without autograd."""
    given = general_inputs(window_sizes, size, batch, memory)
    exact = [x.clone().requires_grad_() for x in given]
    expected = defined_general_layers(window_sizes, lie, *exact)
    with torch.inference_mode():
        assert_all_close(general_layers(window_sizes, lie, *given), expected, **TOLERANCES[torch.float64])
    given = [x.requires_grad_() for x in given]
    outputs = general_layers(window_sizes, lie, *given)
    assert_all_close(outputs, expected, **TOLERANCES[torch.float64])
    cotangents = [torch.randn_like(y) for y in outputs]
    gradients, exact_gradients = (
        torch.autograd.grad(ys, leaves, cotangents) for ys, leaves in ((outputs, given), (expected, exact))
    )
    assert_all_close(gradients, exact_gradients, **GRADIENT_TOLERANCES[torch.float64])


@lies
def test_gradcheck_of_keys_scale_and_bias(lie):
    leaves = [x.requires_grad_() for x in general_inputs((2,), (4, 2), d=1)]
    assert torch.autograd.gradcheck(lambda *leaves: tuple(general_layers((2,), lie, *leaves)), leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: tuple(general_layers((2,), lie, *leaves)), leaves)


@pytest.mark.parametrize('chunk', [1, 3 * 16**2], ids='chunks of {}'.format)
@pytest.mark.parametrize('kept', [0, 4, 16], ids='kept to {} tokens'.format)
@lies
def test_chunks_of_keys_scale_and_bias_equal_the_definition(monkeypatch, lie, kept, chunk):
    monkeypatch.setattr(reference, 'KEPT_TOKENS', kept)
    monkeypatch.setattr(reference, 'CHUNK_ELEMENTS', chunk)
    given = general_inputs((2, 4), (8, 12), 2)
    before = [x.clone() for x in given]
    with torch.no_grad():
        outputs = general_layers((2, 4), lie, *given)
    assert_all_close(outputs, defined_general_layers((2, 4), lie, *given), **TOLERANCES[torch.float64])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@dtypes
@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
@lies
def test_other_dtypes_of_keys_scale_and_bias(lie, mode, dtype):
    given = [x.requires_grad_(mode == 'autograd') for x in general_inputs((4,), (8, 12), 2, 'channels-last', dtype)]
    exact = [x.detach().double() for x in given]
    with MODES[mode]():
        outputs = general_layers((4,), lie, *given)
    assert all(y.dtype == dtype for y in outputs)
    assert_all_close(outputs, defined_general_layers((4,), lie, *exact), **TOLERANCES[dtype])


def test_bias_alone_can_be_trained():
    """As in fine-tuning with all but the tables frozen."""
    x, v, table = general_inputs((8,), (8, 16))
    given, exact = (table.clone().requires_grad_() for _ in range(2))
    y = general_layers((8,), {}, x, v, given)[1]
    expected = defined_general_layers((8,), {}, x, v, exact)[1]
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(given.grad, exact.grad, **GRADIENT_TOLERANCES[torch.float64])


@pytest.mark.parametrize(
    ('shape', 'window_sizes', 'message'),
    [
        ((12, 8, 8), (2, 4), r'\(B, C, H, W\) with C a multiple of 4, got \(12, 8, 8\)'),
        ((1, 10, 8, 8), (2, 4), r'C a multiple of 4, got \(1, 10, 8, 8\)'),
        ((1, 12, 8, 6), (2, 4), r'multiples of the window size 4, got \(1, 12, 8, 6\)'),
        ((1, 12, 9, 8), (3, 2), r'multiples of the window size'),
        ((1, 12, 8, 8), (), r'window'),
        ((1, 12, 8, 8), (4, 0), r'window'),
        ((1, 12, 8, 8), (-4, 4), r'window'),
    ],
)
def test_wrong_shapes(shape, window_sizes, message):
    with pytest.raises(ValueError, match=message):
        window_attention(torch.zeros(shape), window_sizes)


def test_wrong_combinations():
    with pytest.raises(ValueError, match='either shifted or on a grid'):
        window_attention(torch.zeros(1, 6, 8, 8), (2,), shifted=True, grid=True)
    with pytest.raises(ValueError, match=r'C a multiple of 3, got \(1, 4, 8, 8\)'):
        window_attention(torch.zeros(1, 4, 8, 8), (2,), symmetric=False)
    for tables, entries in (([torch.zeros(9)], '9'), ([torch.zeros(9), torch.zeros(9, 1)], '9, 9')):
        with pytest.raises(ValueError, match=rf'\[9, 49\] entries, got \[{entries}\]'):
            window_attention(torch.zeros(1, 4, 8, 8), (2, 4), relative_bias=tables)


@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
@pytest.mark.parametrize(
    'shape',
    [
        (6, 8, 16),
        (2, 5, 8, 16),
        (2, 6, 8, 12),
        (2, 6, 16, 8),
        (4, 6, 8, 8),
        (1, 6, 16, 16),
        (3, 6, 8, 16),
        (2, 6, 8, 8),
    ],
    ids=str,
)
def test_sharing_refuses_another_extent(shape, mode):
    """Also where the windows are as many, so that their attention would go to other windows without notice."""
    with MODES[mode]():
        _, shared = window_attention(torch.randn(2, 12, 8, 16, requires_grad=True), (4, 8))
        with pytest.raises(ValueError, match=r'got \(' + ', '.join(map(str, shape))):
            shared_window_attention(torch.zeros(shape), shared)
