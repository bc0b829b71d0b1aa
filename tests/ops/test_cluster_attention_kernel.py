"""The kernels of cluster attention against the reference in float64, for the same, already rounded, inputs."""

import networks
import pytest
import torch
import torch.nn.functional as F
from agreement import in_float64, random, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from attnsr import archs
from attnsr.ops import dispatch, launching
from attnsr.ops.cluster_attention import SortedTokens, assign_clusters, cluster_attention, shared_cluster_attention

# Error allowed to each element, absolute and relative: of the output, and of gradients.
TOLERANCES = {
    torch.float32: ({'atol': 2e-6, 'rtol': 1e-5}, {'atol': 5e-6, 'rtol': 1e-4}),
    torch.float16: ({'atol': 2e-3, 'rtol': 2e-3}, {'atol': 5e-3, 'rtol': 1e-2}),
    torch.bfloat16: ({'atol': 2e-2, 'rtol': 2e-2}, {'atol': 4e-2, 'rtol': 4e-2}),
}
TF32_TOLERANCES = ({'atol': 4e-3, 'rtol': 4e-3}, {'atol': 2e-2, 'rtol': 2e-2})

# Height and width, images, rounds, chunk size, channels of the embedding and of the values.
SMALL = {
    'a token': ((1, 1), 1, 1, 8, (4, 3)),
    'filled by several repetitions': ((1, 3), 2, 2, 8, (4, 3)),
    'filled by a part': ((1, 5), 1, 1, 8, (4, 3)),
    'one chunk': ((2, 4), 1, 2, 8, (16, 3)),
    'two chunks': ((3, 4), 2, 1, 8, (4, 17)),
    'filled from two chunks': ((1, 17), 1, 1, 8, (4, 3)),
    'many chunks': ((5, 7), 1, 2, 8, (5, 6)),
    'chunks of a token': ((2, 3), 1, 1, 1, (4, 3)),
}
# Blocks of queries and of keys are parts of chunks; the second is what LCoAN has, at fewer tokens.
BLOCKS = {
    torch.float32: ((6, 9), 1, 1, 35, (18, 17)),
    torch.float16: ((10, 13), 1, 1, 130, (18, 17)),
    torch.bfloat16: ((5, 8), 1, 1, 24, (128, 128)),
}
# LCoAN's chunks of 384 tokens of 128 channels: a batch of training, an image of 1280 x 720 to be, and odd ones.
FULL = {
    'in training': ((48, 48), 16, 1, 384, (128, 128)),
    'odd, in rounds': ((97, 53), 2, 3, 384, (128, 128)),
    'an image': ((180, 320), 1, 1, 384, (128, 128)),
}

dtypes = pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
devices = pytest.mark.usefixtures('kernel_device')


def by_name(cases):
    return pytest.mark.parametrize('case', [pytest.param(case, id=name) for name, case in cases.items()])


def inputs(case, device='cpu', dtype=torch.float32, memory='channels-last', clusters=5):
    """The maps that are differentiated, and what else the function of :func:`layers` takes."""
    torch.manual_seed(0)
    size, batch, rounds, chunk_size, (d, c) = case
    centres = F.normalize(torch.randn(rounds, clusters, d), dim=-1)
    e = random(batch, d, *size, dtype=torch.float32, memory=memory)
    # Near centres of the first round; for the others chance keeps them from the borders between clusters.
    nearest = centres[0, torch.randint(clusters, (batch, *size))].movedim(-1, 1)
    e.copy_(torch.rand(batch, 1, *size).add(1) * (nearest + 0.3 * e / d**0.5))
    v, w = (random(batch, c, *size, dtype=torch.float32, memory=memory) for _ in range(2))
    maps = {name: x.to(device, dtype) for name, x in (('e', e), ('v', v), ('w', w))}
    return maps, {'centres': centres.to(device), 'chunk_size': chunk_size}


def layers(others):
    """y of a layer, and of one that shares its attention, one after the other."""

    def function(e, v, w):
        y, shared = cluster_attention(e, v, **others)
        return torch.cat([y, shared_cluster_attention(w, shared)], 1)

    return function


def by_reference(function):
    def call(*args, **kwargs):
        backend = dispatch.get_backend()
        dispatch.set_backend('reference')
        try:
            return function(*args, **kwargs)
        finally:
            dispatch.set_backend(backend)

    return call


def exactly(maps, others):
    return in_float64(maps), by_reference(layers({**others, 'centres': others['centres'].double()}))


def assert_agrees(maps, others, function=None, tolerances=None, memory='channels-last'):
    """The outputs and every gradient; those are of the dtypes of the inputs."""
    exact_maps, exact_function = exactly(maps, others)
    torch.manual_seed(1)
    _, c, *_ = maps['v'].shape
    shape = len(maps['v']), 2 * c, *maps['v'].shape[2:]
    expanded = memory == 'expanded'
    cotangent = torch.ones(()).expand(shape) if expanded else random(*shape, dtype=torch.float32, memory=memory)
    cotangent = cotangent.to(maps['v'].device, maps['v'].dtype)
    of_output, of_gradients = tolerances or TOLERANCES[maps['v'].dtype]
    y, gradients = with_gradients(function or layers(others), maps, cotangent)
    expected, expected_gradients = with_gradients(exact_function, exact_maps, cotangent.double())
    assert y.dtype == maps['v'].dtype
    torch.testing.assert_close(y.double(), expected, **of_output)
    for name, gradient in gradients.items():
        assert gradient.dtype == maps[name].dtype
        torch.testing.assert_close(
            gradient.double(),
            expected_gradients[name],
            **of_gradients,
            msg=lambda text, at=name: f'{at}: {text}',
        )


def assert_agrees_without_gradients(maps, others, tolerances=None, function=None):
    """What is kept for the layers that share is no less exact than what is computed again."""
    exact_maps, exact_function = exactly(maps, others)
    with torch.inference_mode():
        y, expected = (function or layers(others))(**maps), exact_function(**exact_maps)
    of_output, _ = tolerances or TOLERANCES[maps['v'].dtype]
    torch.testing.assert_close(y.double(), expected, **of_output)


@by_name(SMALL)
def test_equals_the_reference(kernel_device, case):
    maps, others = inputs(case, kernel_device)
    assert_agrees(maps, others)
    assert_agrees_without_gradients(maps, others)


@dtypes
def test_blocks_within_chunks(kernel_device, dtype):
    maps, others = inputs(BLOCKS[dtype], kernel_device, dtype, clusters=37)
    assert_agrees(maps, others)
    assert_agrees_without_gradients(maps, others)


@pytest.mark.parametrize('memory', ['plain', 'view', 'expanded'])
def test_memory_formats(kernel_device, memory):
    """Of all maps, and of the gradient of the result, which alone may be expanded."""
    of_maps = 'plain' if memory == 'expanded' else memory
    maps, others = inputs(SMALL['two chunks'], kernel_device, memory=of_maps)
    assert_agrees(maps, others, memory=memory)


def test_embedding_and_values_of_two_dtypes(kernel_device):
    maps, others = inputs(SMALL['two chunks'], kernel_device)
    maps |= {name: maps[name].bfloat16() for name in ('v', 'w')}
    assert_agrees(maps, others, tolerances=TOLERANCES[torch.bfloat16])
    assert_agrees_without_gradients(maps, others)


@pytest.mark.parametrize('wanted', [('e',), ('v', 'w')], ids=['of the embedding', 'of the values'])
def test_some_gradients(kernel_device, wanted):
    """The others are no less right for it, nor is memory asked for that is not written."""
    maps, others = inputs(SMALL['filled from two chunks'], kernel_device)
    exact_maps, exact_function = exactly(maps, others)
    actual, expected = (
        with_gradients(
            lambda f=function, given=given, **leaves: f(**{**given, **leaves}),
            {name: given[name] for name in wanted},
            torch.ones_like(torch.cat([given['v']] * 2, 1)),
        )
        for function, given in ((layers(others), maps), (exact_function, exact_maps))
    )
    torch.testing.assert_close(actual[0].double(), expected[0], **TOLERANCES[torch.float32][0])
    for name in wanted:
        torch.testing.assert_close(actual[1][name].double(), expected[1][name], **TOLERANCES[torch.float32][1])


def test_keys_shorter_than_the_least_norm(kernel_device):
    maps, others = inputs(SMALL['two chunks'], kernel_device)
    maps['e'] *= 1e-5
    maps['e'][:, :, 0] = 0
    assert (maps['e'].norm(dim=1) < 5e-5).any()
    # Their gradients are as large as they are short.
    assert_agrees(maps, others, tolerances=(TOLERANCES[torch.float32][0], {'atol': 1e-2, 'rtol': 1e-4}))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(kernel_device, dtype):
    """Squared norms and products here are beyond float16, and differences of products below its resolution."""
    maps, others = inputs(SMALL['two chunks'], kernel_device, dtype)
    maps['e'] *= 250
    maps['e'][:, :, 1] = 30000
    maps['e'][:, :, 2] = 0
    assert_agrees_without_gradients(maps, others)


def test_half_precision_beside_tokens_of_no_length(kernel_device):
    """The gradient of a query has the quotient of its norm and each key's in between."""
    e, v = torch.zeros(1, 16, 1, 3), torch.zeros(1, 16, 1, 3)
    e[0, 0, 0, 1:], v[0, 0, 0, 0] = 4, 10
    cotangent = torch.zeros(1, 16, 1, 3)
    cotangent[0, 0, 0, 1:] = torch.tensor([100, -100])
    e, v, cotangent = (x.to(kernel_device, torch.float16) for x in (e, v, cotangent))
    others = {'v': v, 'centres': torch.ones(1, 1, 16, device=kernel_device), 'chunk_size': 3}
    _, gradients = with_gradients(lambda e: cluster_attention(e, **others)[0], {'e': e}, cotangent)
    others = {name: x.double() if torch.is_tensor(x) else x for name, x in others.items()}
    exact = by_reference(lambda e: cluster_attention(e, **others)[0])
    _, expected = with_gradients(exact, {'e': e.double()}, cotangent.double())
    found, expected = gradients['e'][..., 1:].double(), expected['e'][..., 1:]
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.float16][1])


def test_attention_that_needs_no_gradient_is_shared_with_layers_that_train(kernel_device):
    maps, others = inputs(SMALL['two chunks'], kernel_device)

    def frozen(e, v, w):
        with torch.no_grad():
            _, shared = cluster_attention(e, v, **others)
        return shared_cluster_attention(w, shared)

    exact_maps, _ = exactly(maps, others)
    results = []
    for function, given in ((frozen, maps), (by_reference(frozen), exact_maps)):
        w = given['w'].clone().requires_grad_()
        y = function(given['e'], given['v'], w)
        results.append((y.detach().double(), torch.autograd.grad(y.square().sum(), w)[0].double()))
    torch.testing.assert_close(results[0][0], results[1][0], **TOLERANCES[torch.float32][0])
    torch.testing.assert_close(results[0][1], results[1][1], **TOLERANCES[torch.float32][1])


@by_name({name: SMALL[name] for name in ('filled by several repetitions', 'filled from two chunks')})
def test_shared_with_the_reference(kernel_device, case, monkeypatch):
    """What the kernels left serves the reference, with its gradients; not the other way round."""
    maps, others = inputs(case, kernel_device)

    def across(e, v, w):
        y, shared = cluster_attention(e, v, **others)
        assert isinstance(shared.attention, SortedTokens)
        with monkeypatch.context() as patched:
            patched.setattr(launching, 'launch', None)
            return torch.cat([y, by_reference(shared_cluster_attention)(w, shared)], 1)

    assert_agrees(maps, others, across)
    assert_agrees_without_gradients(maps, others, function=across)
    _, shared = by_reference(cluster_attention)(maps['e'], maps['v'], **others)
    with pytest.raises(dispatch.BackendError, match=r'shared_cluster_attention: .*computed in plain PyTorch'):
        shared_cluster_attention(maps['w'], shared)


def test_more_sequences_than_a_grid_has_rows(kernel_device, monkeypatch):
    grids = []
    monkeypatch.setattr(launching, 'launch', lambda kernel, grid, *_, **__: grids.append(grid))
    maps, others = inputs(((1, 1), 65536, 1, 1, (1, 1)), kernel_device)
    layers(others)(**{name: x.requires_grad_() for name, x in maps.items()}).sum().backward()
    assert max(max(grid) for grid in grids) >= 65536
    assert all(len(grid) == 1 for grid in grids)  # the second axis ends at 65535


@dtypes
@pytest.mark.parametrize(('count', 'rounds', 'clusters', 'd'), [(150, 3, 37, 5), (70, 1, 128, 128)])
def test_clusters(kernel_device, count, rounds, clusters, d, dtype):
    """Of centres in float32 that no half precision holds: which is nearest is decided exactly."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(rounds, clusters, d), dim=-1)
    centres[:, 1::2] = centres[:, ::2][:, : clusters // 2] * (1 + 1e-4)
    tokens = (torch.randn(count, d) * 10).to(dtype)
    expected = by_reference(assign_clusters)(tokens.double(), centres.double())
    actual = assign_clusters(tokens.to(kernel_device), centres.to(kernel_device))
    assert actual.dtype == torch.int64
    torch.testing.assert_close(actual.cpu(), expected)


def test_ties_go_to_the_first_centre_and_stay_in_order(kernel_device):
    """Equal centres, and tokens that are equal, opposite or zero, in more than one block of either."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(2, 25, 4), dim=-1).repeat(1, 3, 1).to(kernel_device)
    e = torch.randint(-1, 2, (2, 1, 10, 15), device=kernel_device) * centres[0, 1, :, None, None]
    clusters = assign_clusters(e.movedim(1, -1).reshape(-1, 4), centres)
    assert clusters.max() < 25
    assert (clusters[(e == 0).all(1).flatten()] == 0).all()
    with torch.no_grad():
        _, shared = cluster_attention(e, e, centres, 24)
    places = shared.attention.places.view(2, 2, -1)[:, :, 24 : 24 + 150].cpu()
    for image in range(2):
        for turn in range(2):
            of_image = clusters[150 * image : 150 * (image + 1), turn].tolist()
            order = sorted(range(150), key=of_image.__getitem__)  # Python's sort is stable
            assert (places[image, turn] - 150 * image).tolist() == order


@by_name(SMALL)
def test_what_stands_where(kernel_device, case):
    """The sequences of the reference, in which the filling is told from the rest."""
    maps, others = inputs(case, kernel_device)
    with torch.no_grad():
        _, shared = cluster_attention(maps['e'], maps['v'], **others)
        _, expected = by_reference(cluster_attention)(maps['e'], maps['v'], **others)
    places = shared.attention.places
    assert torch.equal(torch.where(places < 0, ~places, places).long(), expected.attention.places)
    count = case[0][0] * case[0][1]
    inside = places[:, case[3] : -case[3]]
    assert (inside[:, :count] >= 0).all()
    assert (inside[:, count:] < 0).all()


@pytest.mark.parametrize('shape', [(0, 3, 2, 3), (1, 3, 0, 3), (1, 3, 2, 0)], ids=str)
def test_no_token(kernel_device, shape):
    e = torch.zeros(shape, device=kernel_device)
    with pytest.raises(ValueError, match='there must be a token to attend to, got'):
        cluster_attention(e, e, torch.zeros(1, 2, 3, device=kernel_device), 4)


def test_tokens_that_are_no_numbers_lead_nowhere_else(kernel_device):
    tokens = torch.full((3, 4), torch.nan, device=kernel_device)
    clusters = assign_clusters(tokens, torch.ones(1, 5, 4, device=kernel_device))
    assert ((clusters >= 0) & (clusters < 5)).all()


@devices
@pytest.mark.parametrize(
    ('d', 'c', 'dtype', 'message'),
    [
        (129, 3, torch.float32, 'more than 128 channels'),
        (3, 129, torch.float32, 'more than 128 channels'),
        (3, 3, torch.float64, 'float64'),
    ],
)
def test_what_is_not_supported_is_said(kernel_device, d, c, dtype, message):
    e, v = (torch.zeros(1, n, 2, 3, dtype=dtype, device=kernel_device) for n in (d, c))
    with pytest.raises(dispatch.BackendError, match=message):
        cluster_attention(e, v, torch.zeros(1, 2, d, device=kernel_device), 4)
    if d > 128:
        with pytest.raises(dispatch.BackendError, match=message):
            assign_clusters(torch.zeros(2, d, device=kernel_device), torch.zeros(1, 2, d, device=kernel_device))
    else:
        _, shared = cluster_attention(e.float(), e.float(), torch.zeros(1, 2, d, device=kernel_device), 4)
        with pytest.raises(dispatch.BackendError, match=f'shared_cluster_attention: .*{message}'):
            shared_cluster_attention(v, shared)


def test_operators(kernel_device):
    maps, others = inputs(((1, 3), 1, 2, 4, (4, 3)), kernel_device)
    sizes = 1, 4
    e, v, w = (x.movedim(1, -1).flatten(0, 2).contiguous() for x in maps.values())
    sequences, attend, again, gradients = (
        getattr(torch.ops.attnsr, f'cluster_{name}').default
        for name in ('sequences', 'attention', 'attention_again', 'attention_gradients')
    )
    known = sequences(e, others['centres'], *sizes)
    y, probabilities = attend(e, v, *known, *sizes, True)
    check = torch.library.opcheck
    check(torch.ops.attnsr.assign_clusters.default, (e, others['centres']))
    check(sequences, (e, others['centres'], *sizes))
    check(attend, (e, v, *known, *sizes, True))
    check(attend, (e.clone().requires_grad_(), v.clone().requires_grad_(), *known, *sizes, False))
    check(again, (v, known[0], probabilities, *sizes))
    for wanted in ((True, True), (True, False), (False, True)):
        check(gradients, (w, y, e, v, *known, *sizes, *wanted))


@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_compiled_whole(kernel_device, mode):
    torch.compiler.reset()
    maps, others = inputs(SMALL['filled by several repetitions'], kernel_device)
    compiled = torch.compile(layers(others), backend='aot_eager', fullgraph=True)
    if mode == 'training':
        assert_agrees(maps, others, compiled)
    else:
        with torch.no_grad():
            y = compiled(**maps)
        exact_maps, exact_function = exactly(maps, others)
        torch.testing.assert_close(y.double(), exact_function(**exact_maps), **TOLERANCES[torch.float32][0])


@pytest.mark.parametrize('gradients', [True, False], ids=['with gradients', 'without gradients'])
def test_exported_with_any_extent(kernel_device, gradients):
    maps, others = inputs(SMALL['two chunks'], kernel_device)

    class Layers(torch.nn.Module):
        def forward(self, e, v, w):
            return layers(others)(e, v, w)

    batch, height, width = (torch.export.Dim(name, min=least) for name, least in (('b', 1), ('h', 2), ('w', 2)))
    dynamic = {0: batch, 2: height, 3: width}
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(Layers(), tuple(maps.values()), dynamic_shapes=(dynamic,) * 3).module()
        for size, count in (((2, 2), 1), ((4, 4), 2)):
            maps, _ = inputs((size, count, *SMALL['two chunks'][2:]), kernel_device)
            y = exported(*maps.values())
            exact_maps, exact_function = exactly(maps, others)
            torch.testing.assert_close(y.double(), exact_function(**exact_maps), **TOLERANCES[torch.float32][0])


def test_autocast_leaves_the_precision_as_it_is(kernel_device):
    maps, others = inputs(SMALL['filled by several repetitions'], kernel_device)
    with torch.no_grad():
        expected = layers(others)(**maps)
        with torch.autocast(kernel_device, torch.bfloat16):
            y = layers(others)(**maps)
    assert torch.equal(y, expected)


@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_operations_are_counted_as_in_the_reference(kernel_device, mode):
    maps, others = inputs(SMALL['many chunks'], kernel_device)
    leaves = {name: x.requires_grad_(mode == 'training') for name, x in maps.items()}

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            y, shared = function(leaves['e'], leaves['v'], **others)
            if mode == 'training':
                y.sum().backward()
            else:
                shared_cluster_attention(leaves['w'], shared)
        return counter.get_total_flops()

    expected = by_reference(counted)(cluster_attention)
    assert counted(cluster_attention) == expected


@pytest.mark.parametrize(('rounds', 'use_checkpoint'), [(1, False), (2, True)])
def test_lcoan(kernel_device, rounds, use_checkpoint):
    """Training, in which centres are found and moved, with its gradients, then inference."""
    x = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(kernel_device)

    def run(use_checkpoint=False):
        torch.manual_seed(0)
        arguments = {**networks.SMALL['LCoAN'], 'num_groups': 2, 'num_rounds': rounds}
        net = archs.LCoAN(upscale=2, use_checkpoint=use_checkpoint, **arguments).to(kernel_device)
        y = net(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        with torch.no_grad():
            return {'training': y.detach(), 'inference': net.eval()(x), **gradients, **dict(net.named_buffers())}

    expected = by_reference(run)()
    for name, figure in run(use_checkpoint).items():
        unit = expected[name].float().abs().max().clamp(min=1e-30)
        torch.testing.assert_close(
            figure / unit,
            expected[name] / unit,
            atol=2e-5,
            rtol=1e-4,
            msg=lambda text, at=name: f'{at}: {text}',
        )


@pytest.mark.gpu
@by_name(FULL)
@pytest.mark.parametrize('precision', [*TOLERANCES, 'tf32'], ids=str)
def test_full_shapes(kernel_device, monkeypatch, case, precision):
    """Also: the same figures each time, bit by bit."""
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', precision == 'tf32')
    dtype = torch.float32 if precision == 'tf32' else precision
    maps, others = inputs(case, kernel_device, dtype, clusters=128)
    tolerances = TF32_TOLERANCES if precision == 'tf32' else TOLERANCES[dtype]
    assert_agrees(maps, others, tolerances=tolerances)
    assert_agrees_without_gradients(maps, others, tolerances)
    cotangent = torch.ones_like(torch.cat([maps['v']] * 2, 1))
    first, second = (with_gradients(layers(others), maps, cotangent) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in maps)


@pytest.mark.gpu
def test_captured_in_a_graph(kernel_device):
    maps, others = inputs(FULL['odd, in rounds'], kernel_device, torch.bfloat16, clusters=128)
    leaves = {name: x.clone().requires_grad_() for name, x in maps.items()}

    def step():
        y = layers(others)(**leaves)
        return y.detach(), torch.autograd.grad(y.sum(), list(leaves.values()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    with torch.no_grad():
        for x in leaves.values():
            x.copy_(x.flip(3))
    graph.replay()
    expected, expected_gradients = step()
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
