"""LCoAN's clusters and the tokens that a pixel attends to: those of the network, by hand."""

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inspection import scenes

from attnsr.inspection import lcoan
from attnsr.ops.cluster_attention import assign_clusters


def build(**arguments: int) -> torch.nn.Module:
    return networks.build('LCoAN', upscale=2, **arguments).eval().double()


# Chunks that are filled up, several rounds, two chunks, and a single one.
@pytest.mark.parametrize(
    'arguments',
    [{}, {'num_rounds': 2}, {'chunk_size': 300}, {'chunk_size': 700}],
    ids=lambda each: str(each or 'small'),
)
@pytest.mark.parametrize('pixel', [(0, 0), (19, 10)], ids=str)
def test_the_attention_is_the_networks(arguments: dict[str, int], pixel: tuple[int, int]) -> None:
    net = build(**arguments)
    scene = scenes.make(22, 25, pixel)
    found = lcoan.examine(net, scene)
    first = net.body[0]
    (local, e, centres), (out, _) = scenes.seen(net, scene, first.attention[0])
    tokens = e[0].flatten(1).T
    clusters = assign_clusters(tokens, centres)
    np.testing.assert_array_equal(found.clusters, clusters.T.reshape(-1, 22, 25).numpy())

    size, token, n = found.chunk_size, pixel[1] * 25 + pixel[0], 22 * 25
    weights, sums = [], []
    for number in range(centres.shape[0]):
        order = torch.argsort(clusters[:, number], stable=True)
        if number == 0:
            np.testing.assert_array_equal(found.order, order.numpy())
        chunks = -(-n // size)
        missing = chunks * size - n
        filled = torch.cat([order, order[n - missing :] if missing <= n else order.repeat(size)[:missing]])
        at = int((order == token).nonzero())
        near = [filled[chunk % chunks * size :][:size] for chunk in (at // size - 1, at // size, at // size + 1)]
        keys = torch.cat(near)
        scores = F.normalize(tokens[keys], dim=-1, eps=5e-5) @ tokens[token]
        weights.append(torch.zeros(n, dtype=torch.float64).index_add_(0, keys, scores.softmax(0)))
        sums.append(scores.logsumexp(0))
        if number == 0:
            assert (found.position, found.chunk, found.chunks) == (at, at // size, chunks)
            seen = {part: set(tokens_.tolist()) for part, tokens_ in zip((1, 2, 3), near, strict=True)}
    shares = torch.stack(sums).softmax(0)
    expected = sum(share * each for share, each in zip(shares, weights, strict=True))
    np.testing.assert_allclose(found.weights.ravel(), expected.numpy(), atol=1e-12)
    assert found.weights.sum() == pytest.approx(1)
    with torch.no_grad():
        v = first.attention[0].conv_assembly(local)[0].flatten(1)
    y = v @ torch.from_numpy(found.weights.ravel())
    place = (0, slice(None), pixel[1], pixel[0])
    torch.testing.assert_close(local[place] + first.attention[0].scale * y, out[place])

    assert set(np.flatnonzero(found.seen == 2)) == seen[2]
    assert set(np.flatnonzero(found.seen == 1)) == seen[1] - seen[2]
    assert set(np.flatnonzero(found.seen == 3)) == seen[3] - seen[2] - seen[1]


def test_colours_are_told_apart() -> None:
    colours = lcoan.cluster_colours(128)
    assert colours.shape == (128, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert len({tuple(colour) for colour in colours.round(3)}) == 128
    np.testing.assert_allclose(lcoan.oklab_to_rgb(np.array([[1.0, 0, 0], [0, 0, 0]])), [[1] * 3, [0] * 3], atol=1e-4)


@pytest.mark.parametrize('arguments', [{}, {'num_rounds': 2, 'chunk_size': 700}], ids=lambda each: str(each or 'small'))
def test_the_figures_have_the_numbers(arguments: dict[str, int]) -> None:
    scene = scenes.make(22, 25, (19, 10))
    found = lcoan.examine(build(**arguments), scene)
    figure = lcoan.draw_clusters(scene, found, 'LCoAN')
    axes = {each.get_label(): each for each in figure.axes}
    sizes = np.bincount(found.clusters[0].ravel())
    heights = [bar.get_height() for bar in axes['Tokens by cluster'].patches]
    assert heights == sorted(sizes[sizes > 0], reverse=True)
    # One colour for a cluster, but for the picture's shade.
    (picture,) = scenes.drawn(figure)['Clusters']
    inside = picture[found.clusters[0] == found.clusters[0][scene.place]]
    hues = inside / inside.max(1, keepdims=True)
    assert np.ptp(hues, axis=0).max() < 1e-6

    figure = lcoan.draw_tokens(scene, found, 'LCoAN')
    axes = {each.get_label(): each for each in figure.axes}
    (dots,) = axes['Attention of pixel (35, 42)'].collections
    at = np.asarray(dots.get_offsets()).astype(int) - (16, 32)
    relative = found.weights / found.weights.max()
    np.testing.assert_allclose(dots.get_array(), relative[at[:, 1], at[:, 0]])
    assert len(at) == (relative > 1e-4).sum()
