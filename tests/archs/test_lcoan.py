"""LCoAN's cluster centres and upsamplers; what holds for every network is in test_archs.py."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden_recipe import HERE, seeded_state_dict

from attnsr.archs.lcoan_arch import LCoAN, SphericalKMeans
from attnsr.benchmarks.published_lcoan import PublishedLCoAN
from attnsr.checkpoints import to_published

SMALL = {'num_feat': 8, 'num_groups': 3, 'num_blocks': 1, 'num_clusters': 4, 'chunk_size': 24}
NEVER = 'these cluster centres were never initialised: load a checkpoint or train first'


def kmeans(d=6, clusters=5, rounds=1, decay=0.9, dtype=torch.float64):
    return SphericalKMeans(d, clusters, rounds, decay).to(dtype)


def embeddings(count, batch=2, d=6, size=(4, 5)):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, batch, d, *size, generator=generator, dtype=torch.float64)


def tokens_of(e):
    return e.permute(0, 2, 3, 1).reshape(-1, e.shape[1]).numpy()


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def summed(tokens, centres):
    """{cluster: sum of its tokens}, of those that have any."""
    sums = {}
    for token in tokens:
        cluster = int(np.argmax((centres * token).sum(-1)))
        sums[cluster] = sums.get(cluster, 0) + token
    return sums


def moved(tokens, centres, decay):
    centres = centres.copy()
    for cluster, total in summed(unit(tokens), centres).items():
        centres[cluster] = unit(decay * centres[cluster] + (1 - decay) * unit(total))
    return centres


def first_centres(tokens, centres):
    for _ in range(10):
        centres = centres.copy()
        for cluster, total in summed(tokens, centres).items():
            centres[cluster] = unit(total)
    return centres


def random_tokens(tokens, rounds, clusters):
    """What the generator's present state chooses."""
    if len(tokens) < clusters:
        return tokens[torch.randint(len(tokens), (rounds, clusters)).numpy()]
    return np.stack([tokens[torch.randperm(len(tokens))[:clusters].numpy()] for _ in range(rounds)])


def network(**arguments):
    torch.manual_seed(0)
    return LCoAN(**{'upscale': 2, **SMALL, **arguments})


def image(seed=0, batch=2, size=(12, 19), dtype=torch.float32):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize('rounds', [1, 3])
@pytest.mark.parametrize('clusters', [5, 17, 90])
def test_the_first_batch_makes_the_centres(clusters, rounds):
    """Random tokens, then ten iterations on the tokens as they are; empty clusters keep theirs. Used, then moved."""
    module, e = kmeans(clusters=clusters, rounds=rounds), embeddings(1)[0]
    if clusters > 40:
        # More than there are tokens: many start alike. Twice the unit vectors, of which all products are exact.
        e = 2 * torch.eye(6, dtype=e.dtype).view(1, 6, 2, 3)
    torch.manual_seed(3)
    start = random_tokens(tokens_of(e), rounds, clusters)
    torch.manual_seed(3)
    used = module.train()(e)
    expected = np.stack([first_centres(tokens_of(e), centres) for centres in start])
    np.testing.assert_allclose(used, expected, rtol=0, atol=1e-12)
    after = np.stack([moved(tokens_of(e), centres, 0.9) for centres in expected])
    np.testing.assert_allclose(module.means, after, rtol=0, atol=1e-12)
    assert module.initted


def test_each_step_uses_the_centres_and_then_moves_them():
    """Tokens of all images of a batch together; a cluster without any stays."""
    module = kmeans(clusters=9, rounds=2).train()
    batches = embeddings(4)
    module(batches[0])
    for e in batches[1:]:
        e = e.clone()
        e[:, 0] = e[:, 0].abs() + 1  # in half of the directions there is no token
        before = module.means.numpy().copy()
        used = module(e)
        np.testing.assert_array_equal(used, before)
        expected = np.stack([moved(tokens_of(e), centres, 0.9) for centres in before])
        np.testing.assert_allclose(module.means, expected, rtol=0, atol=1e-12)
        stay = [c for c in range(9) if c not in summed(tokens_of(e), before[0])]
        assert stay
        np.testing.assert_array_equal(module.means[0, stay], before[0, stay])


def test_evaluation_freezes_the_centres():
    net = network()
    net(image(0))
    before = copy.deepcopy(net.state_dict())
    net.eval()(image(1))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_ema_decay_1_leaves_the_centres_as_the_first_batch_made_them():
    net = network(ema_decay=1)
    net(image(0))
    before = net.body[0].attention[0].kmeans.means.clone()
    for seed in range(1, 4):
        net(image(seed))
    assert torch.equal(net.body[0].attention[0].kmeans.means, before)
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(1, 4))


def test_the_generator_alone_decides_the_first_centres():
    centres = []
    for seed in (5, 5, 6):
        net = network()
        torch.manual_seed(seed)
        net(image())
        centres.append(net.body[0].attention[0].kmeans.means)
    assert torch.equal(centres[0], centres[1])
    assert not torch.equal(centres[0], centres[2])


def test_evaluation_of_what_was_never_trained_is_an_error():
    net = network().eval()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=NEVER):
            net(image())
    net.train()(image())
    net.eval()(image())
    net.load_state_dict(network().state_dict())
    with pytest.raises(RuntimeError, match=NEVER):
        net(image())


@pytest.mark.parametrize('way', ['load_state_dict', 'copied buffers', 'deepcopy', 'pickle'])
def test_centres_come_along(way):
    """Copied buffers are how BasicSR's averaged network gets them."""
    net, other = network(), network()
    net(image())
    if way == 'load_state_dict':
        other.load_state_dict(net.state_dict())
    elif way == 'copied buffers':
        for mine, theirs in zip(other.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)
    else:
        other = copy.deepcopy(net) if way == 'deepcopy' else pickle.loads(pickle.dumps(net))
    assert torch.equal(other.eval()(image(1)), net.eval()(image(1)))


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    def train(net, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            net(image(seed)).square().mean().backward()
            optimizer.step()

    net, again = network(), network()
    optimizer, optimizer_again = (torch.optim.Adam(each.parameters(), 1e-3) for each in (net, again))
    train(net, optimizer, range(3))
    torch.save({'params': net.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'state.pth')
    train(net, optimizer, range(3, 6))
    saved = torch.load(tmp_path / 'state.pth', weights_only=True)
    again.load_state_dict(saved['params'])
    optimizer_again.load_state_dict(saved['optimizer'])
    train(again, optimizer_again, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
def test_centres_keep_their_precision_under_autocast(dtype):
    """As a step of 0.001 in half precision would be lost: with the tokens of autocast, the figures of float32."""
    module, e = kmeans(decay=0.999, dtype=torch.float32).train(), embeddings(2)[:, :, :, :3].to(dtype)
    module(e[0])
    before = module.means.numpy().astype(np.float64)
    with torch.autocast('cpu', dtype):
        module(e[1])
    assert module.means.dtype == torch.float32
    expected = moved(tokens_of(e[1].double()), before[0], 0.999)
    assert np.abs(expected - before[0]).max() > 1e-4
    np.testing.assert_allclose(module.means[0], expected, rtol=0, atol=1e-6)


def in_a_process(rank, folder, clusters):
    """One of two, of which the second has fewer images and another random state."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(10 + rank)
    module = kmeans(clusters=clusters, rounds=2).train()
    for e in embeddings(4, batch=3):
        module(e[:2] if rank == 0 else e[2:])
    torch.save(module.means, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize('clusters', [5, 50], ids=['few', 'more than one process has tokens'])
def test_two_processes_cluster_the_joined_batch(clusters, tmp_path):
    torch.multiprocessing.spawn(in_a_process, (tmp_path, clusters), nprocs=2)
    centres = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2)]
    assert torch.equal(*centres)
    torch.manual_seed(10)
    alone = kmeans(clusters=clusters, rounds=2).train()
    for e in embeddings(4, batch=3):
        alone(e)
    torch.testing.assert_close(centres[0], alone.means, rtol=0, atol=1e-12)


def test_compiling_does_without_the_first_centres_only_where_a_graph_may_break():
    """They are made eagerly; a whole graph cannot have them, and says so."""
    torch.compiler.reset()
    with pytest.raises(Exception, match='train on a batch before compiling'):
        torch.compile(network(), backend='eager', fullgraph=True)(image())
    torch.compiler.reset()
    eager, compiled = network(), network()
    whole = torch.compile(compiled, backend='eager')
    for seed in range(3):
        torch.manual_seed(seed)
        expected = eager(image(seed))
        torch.manual_seed(seed)
        torch.testing.assert_close(whole(image(seed)), expected)
    for (name, value), other in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(other, value, msg=lambda text, at=name: f'{at}: {text}')


@pytest.mark.parametrize('arguments', [{}, {'num_rounds': 3, 'reduction': 2, 'num_blocks': 2}], ids=['', 'rounds'])
@pytest.mark.parametrize('size', [(3, 4), (4, 6), (5, 9), (17, 11)], ids=str)
def test_equals_the_plain_form_that_it_is_measured_against(size, arguments):
    net = network(**arguments).double()
    net(image(0, dtype=torch.float64))
    net.body[0].attention[0].scale = net.body[1].attention[0].scale = 0.7
    torch.manual_seed(0)
    plain = PublishedLCoAN(upscale=2, **{**SMALL, **arguments}).double()
    plain.body[0].attention[0].scale = plain.body[1].attention[0].scale = 0.7
    missing = plain.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert {name.split('.')[0] for name in missing} == {'unused_match'}
    x = image(1, size=size, dtype=torch.float64)
    expected = plain.eval()(x)
    torch.testing.assert_close(net.eval()(x), expected, rtol=0, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_a_released_checkpoint_loads_and_comes_back(scale):
    """Strictly, with all that is never used; and what is given back has the published names, shapes and dtypes."""
    shapes = json.loads((HERE / f'lcoan_x{scale}_keys.json').read_text())
    state = {name: torch.tensor(array).float() for name, array in seeded_state_dict('lcoan', scale).items()}
    for name in shapes.keys() - state.keys():
        state[name] = torch.ones(shapes[name])
    for name in state:
        if name.endswith('initted'):
            state[name] = torch.tensor(True)
    net = LCoAN(upscale=scale)
    net.load_state_dict({'params': state}, strict=True)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    published = to_published(net)
    assert {name: list(value.shape) for name, value in published.items()} == shapes
    assert {name: value.dtype for name, value in published.items()} == {name: v.dtype for name, v in state.items()}
    assert not any(published[name].any() for name in ('a', 'body.9.attention.0.conv_match.0.weight'))
    torch.testing.assert_close(published['sub_mean.bias'], -torch.tensor([0.4488, 0.4371, 0.4040]))
    again = LCoAN(upscale=scale)
    again.load_state_dict(published, strict=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


def test_only_what_is_never_used_may_be_left_over():
    state = network().state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*body\.1\.attention\.0\.conv_match\.1\.weight'):
        network().load_state_dict({**state, 'body.1.attention.0.conv_match.1.weight': torch.zeros(1)})
    del state['body.0.attention.0.kmeans.means']
    with pytest.raises(RuntimeError, match=r'Missing key.*body\.0\.attention\.0\.kmeans\.means'):
        network().load_state_dict(state)


@pytest.mark.parametrize(
    ('upscale', 'convolutions'), [(1, []), (2, ['0']), (3, ['0']), (4, ['0', '2']), (8, ['0', '2', '4'])]
)
def test_upsamplers(upscale, convolutions):
    net = network(upscale=upscale)
    names = [name for name, _ in net.named_parameters() if name.startswith('tail.0.') and name.endswith('weight')]
    assert names == [f'tail.0.{i}.weight' for i in convolutions]
    assert net(image()).shape == (2, 3, 12 * upscale, 19 * upscale)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'upscale': 6}, r'upscale must be 3 or a power of 2 \(1, 2, 4, 8, ...\), got 6'),
        ({'upscale': 0}, 'upscale must be 3 or a power of 2'),
        ({'num_groups': 0}, 'num_groups must be at least 1, got 0'),
        ({'chunk_size': 0}, 'chunk_size must be at least 1, got 0'),
        ({'num_clusters': -1}, 'num_clusters must be at least 1, got -1'),
        ({'num_rounds': 0}, 'num_rounds must be at least 1, got 0'),
        ({'reduction': 3}, 'reduction must divide num_feat = 128, got 3'),
        ({'ema_decay': 1.1}, r'ema_decay must be in \[0, 1\], got 1.1'),
        ({'ema_decay': float('nan')}, r'ema_decay must be in \[0, 1\], got nan'),
    ],
)
def test_wrong_options_say_what_is_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        LCoAN(**{'upscale': 2, **arguments})


def test_centres_that_never_were_are_no_image_compiled_or_exported_either():
    net, x = LCoAN(upscale=2, **SMALL).eval(), torch.rand(1, 3, 9, 10)
    with pytest.raises(RuntimeError, match='load or train them before compiling'):
        torch.compile(net, fullgraph=True, backend='eager')(x)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=NEVER):
        torch.compile(net, backend='eager')(x)
    with pytest.raises(RuntimeError, match=NEVER):
        torch.export.export(net, (x,))
