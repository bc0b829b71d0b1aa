"""Cluster attention against the definition, computed token by token in float64."""

import pytest
import torch

from attnsr.ops.cluster_attention import assign_clusters, cluster_attention, shared_cluster_attention

# Error allowed to each element: absolute, and relative to the exact figure for the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: {'atol': 1e-12, 'rtol': 1e-12},
    torch.float32: {'atol': 1e-5, 'rtol': 1e-5},
    torch.float16: {'atol': 6e-3, 'rtol': 6e-3},
    torch.bfloat16: {'atol': 5e-2, 'rtol': 5e-2},
}
# Gradients pass through more products of rounded figures.
GRADIENT_TOLERANCES = {dtype: {name: 3 * value for name, value in at.items()} for dtype, at in TOLERANCES.items()}
MODES = {'autograd': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}
# Tokens as height x width, of chunks of 8: one, half a chunk and its neighbours, whole chunks and their neighbours,
# one, two, three and many chunks.
SIZES = [(1, 1), (1, 2), (1, 3), (2, 2), (1, 5), (1, 7), (2, 4), (3, 3), (3, 4), (1, 13), (4, 4), (1, 17), (5, 11)]
CHUNK = 8
# The published chunk: 384.
PUBLISHED = [(1, 1), (1, 2), (10, 10), (1, 191), (12, 16), (1, 193), (1, 383), (16, 24), (5, 77), (25, 32)]

sizes = pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
rounds = pytest.mark.parametrize('rounds', [1, 3], ids='{} rounds'.format)


def defined_order(tokens, centres):
    """Tokens (n, d) by cluster: the first centre with the largest inner product with the unit token."""
    clusters = []
    for token in tokens:
        products = centres @ (token / token.norm().clamp(min=1e-12))
        clusters.append(min(k for k in range(len(centres)) if products[k] == products.max()))
    return sorted(range(len(tokens)), key=clusters.__getitem__)  # Python's sort is stable


def defined_round(e, v, centres, chunk_size):
    """One image's tokens e (n, d), v (n, c) and centres (k, d): y (n, c) and the log-sum-exp (n,)."""
    count = len(e)
    order = defined_order(e.detach(), centres)
    missing = -count % chunk_size
    filling = order[count - missing :] if missing <= count else (order * chunk_size)[:missing]
    sequence = order + (filling if missing else [])
    chunks = [sequence[i : i + chunk_size] for i in range(0, len(sequence), chunk_size)]
    keys = e / e.norm(dim=1, keepdim=True).clamp(min=5e-5)
    y, lse = [None] * count, [None] * count
    for i, chunk in enumerate(chunks):
        attended = [*chunk, *chunks[i - 1], *chunks[(i + 1) % len(chunks)]]
        for j, token in enumerate(chunk):
            if i * chunk_size + j >= count:
                break  # the filling
            scores = keys[attended] @ e[token]
            lse[token] = torch.logsumexp(scores, 0)
            y[token] = (scores - lse[token]).exp() @ v[attended]
    return torch.stack(y), torch.stack(lse)


def defined(e, values, centres, chunk_size):
    """The outputs of layers that attend to ``values``, maps (B, C, H, W), by the embedding e (B, d, H, W)."""
    layers = []
    for v in values:
        images = []
        for image_e, image_v in zip(e, v, strict=True):
            each = [defined_round(image_e.flatten(1).t(), image_v.flatten(1).t(), c, chunk_size) for c in centres]
            y, lse = (torch.stack(part) for part in zip(*each, strict=True))
            images.append((y * lse.softmax(0)[:, :, None]).sum(0).t().unflatten(1, v.shape[2:]))
        layers.append(torch.stack(images))
    return layers


def layers(e, values, centres, chunk_size):
    y, shared = cluster_attention(e, values[0], centres, chunk_size)
    return [y, *(shared_cluster_attention(v, shared) for v in values[1:])]


def inputs(size, batch=2, rounds=1, memory='channels-last', dtype=torch.float64, d=4, clusters=5):
    """e, the values of a layer and of one that shares, with another number of channels, and the centres."""
    torch.manual_seed(0)
    maps = []
    for channels in (d, 3, 6):
        x = torch.randn(batch, channels, *size)
        if memory == 'view':  # the inside of a larger map: contiguous in no format
            x = torch.randn(batch, channels + 2, size[0] + 1, size[1] + 3)[:, 1:-1, 1:, 2:-1]
        x = x.to(dtype)
        maps.append(x.contiguous(memory_format=torch.channels_last) if memory == 'channels-last' else x)
    centres = torch.nn.functional.normalize(torch.randn(rounds, clusters, d), dim=-1)
    return maps[0], maps[1:], centres.to(torch.promote_types(dtype, torch.float32))


def assert_all_close(actual, expected, **tolerances):
    """Layer by layer, against float64 figures rounded to the dtype of the first."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e.to(a.dtype), **tolerances, msg=lambda text, at=i: f'{at}: {text}')


def assert_agrees(e, values, centres, chunk_size=CHUNK, function=layers):
    """Every layer's output, and the gradients of every layer with respect to e and its values."""
    dtype = e.dtype
    given = [x.detach().requires_grad_() for x in (e, *values)]
    exact = [x.detach().double().requires_grad_() for x in (e, *values)]
    outputs = function(given[0], given[1:], centres, chunk_size)
    expected = defined(exact[0], exact[1:], centres.double(), chunk_size)
    assert_all_close(outputs, expected, **TOLERANCES[dtype])
    assert all(y.dtype == dtype for y in outputs)
    for layer, (y, e_y) in enumerate(zip(outputs, expected, strict=True), start=1):
        cotangent = torch.randn(y.shape).to(dtype)
        gradients = torch.autograd.grad(y, [given[0], given[layer]], cotangent, retain_graph=True)
        exact_gradients = torch.autograd.grad(e_y, [exact[0], exact[layer]], cotangent.double(), retain_graph=True)
        assert_all_close(gradients, exact_gradients, **GRADIENT_TOLERANCES[dtype])


@pytest.mark.parametrize(('batch', 'memory'), [(1, 'channels-last'), (2, 'plain'), (2, 'view')])
@rounds
@sizes
def test_equals_the_definition(size, rounds, batch, memory):
    assert_agrees(*inputs(size, batch, rounds, memory))


@pytest.mark.parametrize('mode', ['no_grad', 'inference'])
@rounds
@sizes
def test_without_autograd(size, rounds, mode):
    e, values, centres = inputs(size, rounds=rounds)
    before = [x.clone() for x in (e, *values, centres)]
    with MODES[mode]():
        y, shared = cluster_attention(e, values[0], centres, CHUNK)
        # The last a second time: sharing must leave what is shared as it was.
        outputs = [y, *(shared_cluster_attention(v, shared) for v in (values[1], values[1]))]
    expected = defined(e, values, centres, CHUNK)
    assert_all_close(outputs, [*expected, expected[-1]], **TOLERANCES[torch.float64])
    assert all(torch.equal(a, b) for a, b in zip((e, *values, centres), before, strict=True))


@pytest.mark.parametrize('size', PUBLISHED, ids=lambda size: f'{size[0] * size[1]} tokens')
def test_published_chunks(size):
    """Chunks of 384, 128 clusters; two rounds where that is quick."""
    quick = size[0] * size[1] < 300
    e, values, centres = inputs(size, 2 if quick else 1, 2 if quick else 1, d=8, clusters=128)
    with torch.no_grad():
        outputs = layers(e, values, centres, 384)
    assert_all_close(outputs, defined(e, values, centres, 384), **TOLERANCES[torch.float64])


@rounds
def test_gradcheck(rounds):
    e, values, centres = inputs((3, 4), 2, rounds, d=2, clusters=3)
    leaves = [x.requires_grad_() for x in (e, *values)]

    def function(e, *values):
        return tuple(layers(e, values, centres, 4))

    assert torch.autograd.gradcheck(function, leaves)


def test_ties_go_to_the_first_centre_and_stay_in_order():
    """Equal centres, tokens that are equal, opposite or zero: every order among equals is the tokens' own."""
    _, values, centres = inputs((5, 7), clusters=3)
    centres = centres.repeat(1, 3, 1)
    e = torch.randint(-1, 2, (2, 1, 5, 7)).double() * centres[0, 1, :, None, None]
    clusters = assign_clusters(e[0].flatten(1).t(), centres)[:, 0]
    assert set(clusters.tolist()) <= {0, 1, 2}
    assert set(clusters[(e[0] == 0).all(0).flatten()].tolist()) == {0}
    with torch.no_grad():
        assert_all_close(
            layers(e, values, centres, CHUNK), defined(e, values, centres, CHUNK), **TOLERANCES[torch.float64]
        )


def test_a_key_shorter_than_the_least_norm_is_not_made_a_unit_vector():
    e, values, centres = inputs((3, 5))
    e = e * 1e-5
    e[:, :, 0] = 0
    assert_agrees(e, values, centres)


def test_the_length_of_a_token_does_not_change_its_cluster():
    tokens, centres = torch.randn(50, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    expected = assign_clusters(tokens, centres)
    assert expected.shape == (50, 2)
    assert torch.equal(assign_clusters(tokens * torch.rand(50, 1, dtype=torch.float64).exp() * 1e-9, centres), expected)


def test_images_are_independent():
    e, values, centres = inputs((5, 7), 3, 2)
    whole = layers(e, values, centres, CHUNK)
    alone = [layers(e[i : i + 1], [v[i : i + 1] for v in values], centres, CHUNK) for i in range(3)]
    assert_all_close(whole, [torch.cat(parts) for parts in zip(*alone, strict=True)], **TOLERANCES[torch.float64])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@rounds
def test_other_dtypes(rounds, dtype):
    assert_agrees(*inputs((5, 7), rounds=rounds, dtype=dtype))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(dtype):
    """Squared norms and products here are beyond float16, and differences of products below its resolution."""
    e, values, centres = inputs((5, 7), dtype=dtype)
    e = e * 250
    e[:, :, 1] = 30000
    e[:, :, 2] = 0
    with torch.no_grad():
        outputs = layers(e, values, centres, CHUNK)
    expected = defined(e.double(), [v.double() for v in values], centres.double(), CHUNK)
    assert_all_close(outputs, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('mode', ['autograd', 'inference'])
def test_autocast_leaves_the_precision_as_it_is(mode, dtype):
    e, values, centres = inputs((5, 7), rounds=3, dtype=torch.float32)
    with MODES[mode]():
        expected = layers(e, values, centres, CHUNK)
        with torch.autocast('cpu', dtype):
            outputs = layers(e, values, centres, CHUNK)
    assert all(torch.equal(y, expected_y) for y, expected_y in zip(outputs, expected, strict=True))


@pytest.mark.parametrize('mode', ['autograd', 'no_grad'])
@pytest.mark.parametrize('rounds', [1, 2], ids='{} rounds'.format)
def test_compiled_whole(rounds, mode):
    torch.compiler.reset()
    compiled = torch.compile(layers, backend='aot_eager', fullgraph=True)
    for size in ((5, 7), (2, 3)):
        e, values, centres = inputs(size, rounds=rounds)
        if mode == 'autograd':
            # As every layer's gradients are taken on their own, what one leaves must stay for the next.
            with torch._functorch.config.patch(donated_buffer=False):
                assert_agrees(e, values, centres, function=compiled)
        else:
            with torch.no_grad():
                outputs = compiled(e, values, centres, CHUNK)
            assert_all_close(outputs, defined(e, values, centres, CHUNK), **TOLERANCES[torch.float64])


def test_exported_with_any_extent():
    """One graph for every batch, height and width, a single chunk included."""

    class Layers(torch.nn.Module):
        def forward(self, e, v, w, centres):
            return layers(e, [v, w], centres, CHUNK)

    e, values, centres = inputs((5, 7), rounds=2)
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in (('b', 1), ('h', 2), ('w', 2)))
    dynamic = {0: batch, 2: height, 3: width}
    exported = torch.export.export(
        Layers(), (e, *values, centres), dynamic_shapes=(dynamic, dynamic, dynamic, None)
    ).module()
    for size, count in (((2, 2), 1), ((3, 4), 2), ((4, 4), 3), ((9, 6), 1)):
        e, values, centres = inputs(size, count, rounds=2)
        outputs = exported(e, *values, centres)
        assert_all_close(outputs, defined(e, values, centres, CHUNK), **TOLERANCES[torch.float64])


def test_layers_train_on_attention_that_needs_no_gradient():
    """As in fine-tuning with the first layers frozen: of two layers that share, only the second is trained."""
    e, values, centres = inputs((5, 7), rounds=2)
    with torch.no_grad():
        _, shared = cluster_attention(e, values[0], centres, CHUNK)
    given, exact = (values[1].clone().requires_grad_() for _ in range(2))
    y, expected = shared_cluster_attention(given, shared), defined(e, [exact], centres, CHUNK)[0]
    cotangent = torch.randn(y.shape, dtype=y.dtype)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(given.grad, exact.grad, **TOLERANCES[torch.float64])


@rounds
def test_what_is_shared_is_as_documented(rounds):
    e, values, centres = inputs((5, 7), rounds=rounds)
    _, shared = cluster_attention(e, values[0], centres, CHUNK)
    tokens = e.permute(0, 2, 3, 1).reshape(2 * 35, -1)
    chunks = 5
    assert shared.extent == (2, 5, 7)
    attention = shared.attention
    places = attention.places.view(2, rounds, chunks + 2, CHUNK)
    assert torch.equal(places[:, :, 0], places[:, :, -2])
    assert torch.equal(places[:, :, -1], places[:, :, 1])
    for image in range(2):
        for r in range(rounds):
            order = defined_order(tokens[image * 35 : image * 35 + 35], centres[r])
            sequence = places[image, r, 1:-1].flatten() - image * 35
            assert sequence.tolist() == order + order[-5:]
            at = attention.restore.view(2, rounds, 35)[image, r] - (image * rounds + r) * chunks * CHUNK
            assert torch.equal(sequence[at], torch.arange(35))
    assert attention.probabilities.shape == (2 * rounds * chunks, CHUNK, 3 * CHUNK)
    torch.testing.assert_close(attention.probabilities.sum(-1), torch.ones_like(attention.probabilities[:, :, 0]))
    if rounds == 1:
        assert attention.weights is None
    else:
        image = tokens[:35]
        lse = torch.stack([defined_round(image, image, c, CHUNK)[1] for c in centres])
        torch.testing.assert_close(attention.weights[0, :, :, 0], lse.softmax(0))


@pytest.mark.parametrize(
    ('e', 'v', 'centres', 'chunk_size', 'message'),
    [
        ((2, 4, 6), (2, 4, 6), (1, 5, 4), 8, r'of one extent, got \(2, 4, 6\)'),
        ((2, 4, 6, 6), (2, 4, 6, 5), (1, 5, 4), 8, r'of one extent, got .* \(2, 4, 6, 5\)'),
        ((2, 4, 6, 6), (1, 4, 6, 6), (1, 5, 4), 8, r'of one extent'),
        ((2, 4, 6, 6), (2, 4, 6, 6), (1, 5, 3), 8, r'must be \(rounds, clusters, 4\), got \(1, 5, 3\)'),
        ((2, 4, 6, 6), (2, 4, 6, 6), (5, 4), 8, r'must be \(rounds, clusters, 4\), got \(5, 4\)'),
        ((2, 4, 6, 6), (2, 4, 6, 6), (0, 5, 4), 8, r'must be \(rounds'),
        ((2, 4, 6, 6), (2, 4, 6, 6), (1, 5, 4), 0, r'chunk_size must be at least 1, got 0'),
        ((0, 4, 6, 6), (0, 4, 6, 6), (1, 5, 4), 8, r'there must be a token to attend to, got \(0, 4, 6, 6\)'),
        ((2, 4, 0, 6), (2, 4, 0, 6), (1, 5, 4), 8, r'there must be a token'),
        ((2, 4, 6, 0), (2, 4, 6, 0), (1, 5, 4), 8, r'there must be a token'),
    ],
)
def test_wrong_shapes(e, v, centres, chunk_size, message):
    with pytest.raises(ValueError, match=message):
        cluster_attention(torch.zeros(e), torch.zeros(v), torch.zeros(centres), chunk_size)


@pytest.mark.parametrize('shape', [(2, 3, 35), (1, 3, 5, 7), (2, 3, 7, 5), (2, 3, 5, 8)], ids=str)
def test_sharing_refuses_another_extent(shape):
    """Also where the tokens are as many, so that their attention would go to other tokens without notice."""
    e, values, centres = inputs((5, 7))
    _, shared = cluster_attention(e, values[0], centres, CHUNK)
    with pytest.raises(ValueError, match=r'\(2, 5, 7\), and v must have it too; got \(' + ', '.join(map(str, shape))):
        shared_cluster_attention(torch.zeros(shape), shared)
