"""What holds for every network: published figures, any size and precision, compiling, parallel training."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import HERE, sample_positions, seeded_image, seeded_state_dict
from networks import SMALL, build, trained_once
from published_figures import PARAMETERS

from attnsr import archs
from attnsr.archs.variants import SCALES, VARIANTS

FIGURES = sorted(path.stem for path in HERE.glob('*.npz'))
# As wide as published; LCoAN less deep, since float16 takes a minute on a processor otherwise.
WIDE = {
    'ELAN': VARIANTS['elan_light'].arguments,
    'DLGSANet': VARIANTS['dlgsanet_tiny'].arguments,
    'ASID': {},
    'LCoAN': {'num_groups': 2, 'num_blocks': 1},
}
# Largest error of an element of half precision in networks of random weights, over the output's standard deviation.
HALF_PRECISION = {torch.float16: 0.05, torch.bfloat16: 0.3}

each_network = pytest.mark.parametrize('name', SMALL)
each_mode = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


def images(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(seeded_image(shape, seed)).to(dtype)


def seeded(figure, dtype):
    """The network of a figure on the recipe's weights, in the figure's mode; and the figure."""
    stem, mode = figure.rsplit('_', 1)
    variant, scale = stem.rsplit('_x', 1)
    net = VARIANTS[variant].build(int(scale)).to(dtype).train(mode == 'train')
    if variant.startswith('elan'):
        net.img_range = 1.0
    state = {name: torch.tensor(array) for name, array in seeded_state_dict(variant, int(scale)).items()}
    net.load_state_dict(state, strict=True)
    return net, np.load(HERE / f'{figure}.npz')


@pytest.mark.parametrize('figure', FIGURES)
def test_published_figures(figure):
    net, expected = seeded(figure, torch.float64)
    output = net(images(*expected['input_shape'], seed=int(expected['seed']), dtype=torch.float64))
    assert tuple(output.shape) == tuple(expected['output_shape'])
    values = output.detach().numpy().ravel()
    tolerance = 1e-9 * expected['std']
    np.testing.assert_allclose(values[sample_positions(values.size)], expected['values'], rtol=0, atol=tolerance)
    assert abs(values.mean() - expected['mean']) < tolerance
    assert abs(values.std() - expected['std']) < tolerance
    if not net.training:
        return
    r = torch.from_numpy(np.random.RandomState(7).standard_normal(output.shape))
    (output * r).mean().backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    published = dict(zip(expected['grad_names'].tolist(), expected['grad_norms'].tolist(), strict=True))
    # The published network also stores constants, some with a gradient; all that trains must agree.
    assert set(norms) <= set(published)
    for name, norm in norms.items():
        assert norm == pytest.approx(published[name], rel=1e-8, abs=1e-12), name


@pytest.mark.parametrize('figure', FIGURES)
def test_published_figures_in_float32(figure):
    net, expected = seeded(figure, torch.float32)
    with torch.set_grad_enabled(net.training), torch.inference_mode(not net.training):
        values = net(images(*expected['input_shape'], seed=int(expected['seed']))).detach().numpy().ravel()
    tolerance = 1e-4 * expected['std']
    np.testing.assert_allclose(values[sample_positions(values.size)], expected['values'], rtol=0, atol=tolerance)


def test_every_variant_has_a_figure():
    assert {figure.rsplit('_x', 1)[0] for figure in FIGURES} == set(VARIANTS)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('variant', VARIANTS)
def test_parameters_are_the_published_ones(variant, scale):
    """Their number is the specification's; their names and shapes are the published ones, less what never trains."""
    with torch.device('meta'):
        net = VARIANTS[variant].build(scale)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[variant][SCALES.index(scale)]
    keys = HERE / f'{variant}_x{scale}_keys.json'
    if keys.exists():
        published = {name: shape for name, shape in json.loads(keys.read_text()).items() if not net.is_unused(name)}
        assert {name: list(value.shape) for name, value in net.state_dict().items()} == published


@each_mode
@each_network
def test_every_size(name, training):
    """Sizes 1..40: images do not mix at inference, nor does autograd change it; training has finite gradients."""
    net = build(name, upscale=2).double().train(training)
    for side in range(1, 41):
        x = images(2, 3, side, side * 7 % 40 + 1, seed=side, dtype=torch.float64)
        y = net(x)
        assert y.shape == (2, 3, 2 * x.shape[2], 2 * x.shape[3])
        if training:
            net.zero_grad()
            y.square().mean().backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())
        else:
            with torch.inference_mode():
                torch.testing.assert_close(torch.cat([net(image[None]) for image in x]), y)


@pytest.mark.parametrize('upscale', [1, 2, 3, 4])
@each_network
def test_every_scale(name, upscale):
    net = build(name, upscale=upscale).eval()
    assert net(images(1, 3, 9, 10)).shape == (1, 3, 9 * upscale, 10 * upscale)


@pytest.mark.parametrize(
    ('dtype', 'training'),
    [
        pytest.param(torch.float16, False, id='float16-eval'),
        pytest.param(torch.float16, True, id='float16-train', marks=pytest.mark.exhaustive),  # slow on a CPU
        pytest.param(torch.bfloat16, False, id='bfloat16-eval'),
        pytest.param(torch.bfloat16, True, id='bfloat16-train'),
    ],
)
@each_network
def test_autocast(name, dtype, training):
    """Inputs of 0, 1 and noise, in the published number of channels: finite, and near the result in float64."""
    torch.manual_seed(0)
    net = trained_once(getattr(archs, name)(upscale=2, **WIDE[name])).train(training)
    exact = copy.deepcopy(net).double()
    for x in (torch.zeros(1, 3, 17, 18), torch.ones(1, 3, 17, 18), torch.rand(1, 3, 17, 18), images(2, 3, 17, 18)):
        expected = exact(x.double())
        with torch.autocast('cpu', dtype):
            y = net(x)
        assert y.isfinite().all()
        assert y.dtype == x.dtype
        assert (y - expected).abs().max() < HALF_PRECISION[dtype] * expected.std()
        if training:
            with torch.autocast('cpu', dtype):
                loss = net(x).float().abs().mean()
            net.zero_grad()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())
        else:
            with torch.autocast('cpu', dtype), torch.inference_mode():
                assert net(x).isfinite().all()


@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float64], ids=['float16', 'bfloat16', 'float64']
)
@each_network
def test_network_turned_to_another_precision(name, dtype):
    net = build(name, upscale=2).eval()
    x = images(1, 3, 17, 18)
    with torch.inference_mode():
        expected = net(x)
        y = net.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y - expected).abs().max() < HALF_PRECISION.get(dtype, 1e-4) * expected.std()


# Inference is traced in the tests of export and folding too.
@pytest.mark.parametrize(
    'training', [pytest.param(False, marks=pytest.mark.exhaustive, id='eval'), pytest.param(True, id='train')]
)
@each_network
def test_compiled_gives_the_eager_result(name, training):
    """As one graph, whose forward and backward PyTorch runs as it is."""
    assert_compiled(name, training, 'aot_eager')


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler')
@each_mode
@each_network
def test_compiled_by_inductor(name, training):
    assert_compiled(name, training, 'inductor')


def assert_compiled(name, training, backend):
    torch.compiler.reset()  # one function is compiled for few networks in a process
    eager, x = build(name, upscale=2).train(training), images(2, 3, 12, 19)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=backend)
    expected, y = eager(x), compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    if training:
        expected.square().mean().backward()
        y.square().mean().backward()
        for (label, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item() + 1e-8, msg=lambda m, n=label: n + m
            )
        for (label, p), q in zip(eager.named_buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(q, p, msg=lambda m, n=label: n + m)


@each_network
def test_copies_and_pickles(name):
    net = build(name, upscale=2)
    x = images(1, 3, 9, 10)
    net(x).mean().backward()
    expected = net.eval()(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)):
        assert torch.equal(again(x), expected)
        again.train()(x).mean().backward()


@each_network
def test_gradient_checkpointing_changes_nothing(name):
    plain, x = build(name, upscale=2).double().train(), images(2, 3, 12, 19, dtype=torch.float64)
    checkpointed = build(name, upscale=2, use_checkpoint=True).double().train()
    checkpointed.load_state_dict(plain.state_dict())
    saved = [measure_saved(net, x) for net in (plain, checkpointed)]
    assert saved[1] < 0.7 * saved[0]
    for (label, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=label: n + m)
    for (label, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(p, q), label


def test_gradient_checkpointing_leaves_synchronised_statistics_alone():
    """Statistics move once, also those of SyncBatchNorm, which is no BatchNorm2d."""
    plain, x = build('ELAN', upscale=2).train(), images(2, 3, 12, 19)
    checkpointed = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build('ELAN', upscale=2, use_checkpoint=True).train())
    for net in (plain, checkpointed):
        net(x).square().mean().backward()
    for (label, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(p, q), label


@pytest.mark.exhaustive
@each_network
def test_gradient_checkpointing_compiles(name):
    torch.compiler.reset()
    eager, x = build(name, upscale=2).train(), images(2, 3, 12, 19)
    net = build(name, upscale=2, use_checkpoint=True).train()
    torch.compile(net, fullgraph=True, backend='aot_eager')(x).square().mean().backward()
    eager(x).square().mean().backward()
    for (label, p), q in zip(eager.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=label: n + m)
    for (label, p), q in zip(eager.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, n=label: n + m)


def measure_saved(net, x):
    """Forward and backward; the number of elements that autograd kept in between."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in parameters)
    y.square().mean().backward()
    return total


@each_network
def test_every_parameter_gets_a_gradient(name):
    net = build(name, upscale=2).train()
    net(images(2, 3, 24, 24)).square().mean().backward()
    for label, p in net.named_parameters():
        assert p.grad is not None, label
        assert p.grad.abs().max() > 0, label


def test_two_processes_train_as_one_without_searching_for_unused_parameters():
    """DistributedDataParallel as it comes; see train_in_parallel.py for what each process asserts."""
    script = Path(__file__).with_name('train_in_parallel.py')
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(SMALL)


@pytest.mark.parametrize(
    ('x', 'got'),
    [
        (torch.rand(3, 8, 8), r'\(3, 8, 8\), torch.float32'),
        (torch.rand(1, 1, 8, 8), r'\(1, 1, 8, 8\)'),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'torch.uint8'),
        (torch.rand(1, 3, 0, 8), r'\(1, 3, 0, 8\)'),
    ],
    ids=['no batch', 'grey', 'uint8', 'empty'],
)
@each_network
def test_what_is_no_batch_of_images_is_refused(name, x, got):
    with pytest.raises(ValueError, match=rf'{name} takes RGB images as a floating-point tensor .*{got}'):
        build(name, upscale=2)(x)
