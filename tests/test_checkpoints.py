"""Checkpoints in the published naming: which network they are of, loading them in every form, and writing them."""

import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_recipe import HERE
from torch import Tensor, nn

from attnsr import archs, checkpoints
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.checkpoints import CheckpointError, to_published

CASES = [(variant, scale) for variant in VARIANTS for scale in SCALES]
every_case = pytest.mark.parametrize(('variant', 'scale'), CASES, ids=[f'{name}_x{scale}' for name, scale in CASES])

# One small network of each kind, of sizes that are not published: arguments that tensors tell, and others.
OWN_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'ELAN': (
        {'upscale': 2, 'm_elan': 6, 'c_elan': 12, 'n_share': 2, 'r_expand': 3},
        {'window_sizes': (2, 4, 8), 'img_range': 1.0},
    ),
    'DLGSANet': (
        {
            'upscale': 4,
            'dim': 24,
            'num_groups': 2,
            'num_blocks': 1,
            'num_heads': 4,
            'kernel_size': 5,
            'ffn_expansion': 1,
        },
        {'tlc_size': 16},
    ),
    'ASID': ({'upscale': 3, 'num_feat': 24, 'num_groups': 2, 'window_size': 4, 'esa_channels': 8}, {}),
    'LCoAN': (
        {
            'upscale': 4,
            'num_feat': 12,
            'num_groups': 2,
            'num_blocks': 3,
            'num_clusters': 5,
            'num_rounds': 2,
            'reduction': 2,
        },
        {'chunk_size': 24, 'attention_scale': 0.3, 'res_scale': 0.2},
    ),
}
NETWORKS = [name for name in OWN_SIZES if hasattr(archs, name)]


def published_shapes(variant: str, scale: int) -> dict[str, list[int]]:
    """{published name: shape}; where the figures have one scale only, the others differ in one convolution."""
    file = HERE / f'{variant}_x{scale}_keys.json'
    if file.exists():
        return json.loads(file.read_text())
    shapes = published_shapes(variant, 4)
    prefix = VARIANTS[variant].network.upsampler
    return {name: [3 * scale**2, *shape[1:]] if name.startswith(prefix) else shape for name, shape in shapes.items()}


def published(variant: str, scale: int) -> dict[str, Tensor]:
    """All that a released file holds, with random parameters in float32; constants are ones."""
    generator = torch.Generator().manual_seed(0)
    is_unused = VARIANTS[variant].network.is_unused
    state = {}
    for name, shape in published_shapes(variant, scale).items():
        if name.endswith('initted'):
            state[name] = torch.tensor(True)
        elif name.endswith('num_batches_tracked'):
            state[name] = torch.tensor(1234)
        else:
            state[name] = torch.ones(shape) if is_unused(name) else torch.rand(shape, generator=generator) + 0.5
    return state


def title(variant: str, scale: int) -> str:
    return f'{VARIANTS[variant].title} x{scale}'


def assert_has(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Each of the network's tensors is that of the state dict, bit for bit."""
    own = net.state_dict()
    assert own.keys() <= state.keys()
    assert [name for name, tensor in own.items() if not torch.equal(tensor, state[name])] == []


# Finding out ---------------------------------------------------------------------------------------------------------


@every_case
def test_a_published_file_tells_its_network(variant: str, scale: int, tmp_path: Path) -> None:
    state = published(variant, scale)
    torch.save(state, tmp_path / 'released.pth')
    net = checkpoints.load(tmp_path / 'released.pth')
    assert type(net) is VARIANTS[variant].network
    assert repr(net) == repr(VARIANTS[variant].build(scale).eval())
    assert net.upscale == scale
    assert net.img_range == (255 if 'elan' in variant else 1)
    assert_has(net, state)
    strict = VARIANTS[variant].build(scale)
    strict.load_state_dict(state, strict=True)
    assert_has(strict, state)


@pytest.mark.parametrize('name', NETWORKS)
def test_other_sizes_load_with_what_tensors_do_not_tell(name: str, tmp_path: Path) -> None:
    told, untold = OWN_SIZES[name]
    torch.manual_seed(0)
    net = getattr(archs, name)(**told, **untold)
    x = torch.rand(2, 3, 13, 18)
    net.train()(x)
    torch.save({'params': net.state_dict()}, tmp_path / 'net_g_7.pth')
    if untold:
        sizes = ', '.join(f'{key} {value}' for key, value in told.items() if key != 'upscale')
        with pytest.raises(CheckpointError) as error:
            checkpoints.load(tmp_path / 'net_g_7.pth')
        assert str(error.value).startswith(
            f'{tmp_path}/net_g_7.pth: this is a checkpoint of {name} x{told["upscale"]} ({sizes}), of which the '
            f'tensors do not tell {" and ".join(untold)}; write load(path, {"=..., ".join(untold)}=...). '
        )
    loaded = checkpoints.load(tmp_path / 'net_g_7.pth', **untold)
    with torch.no_grad():
        assert torch.equal(loaded(x), net.eval()(x))


@pytest.mark.parametrize('name', NETWORKS)
def test_arguments_can_be_given(name: str, tmp_path: Path) -> None:
    told, untold = OWN_SIZES[name]
    torch.save(getattr(archs, name)(**told, **untold).state_dict(), tmp_path / 'net.pt')
    with pytest.raises(TypeError, match='chunksize'):
        checkpoints.load(tmp_path / 'net.pt', **untold, chunksize=7)
    scale = 4 if told['upscale'] == 2 else 2
    message = rf'net\.pt: this is a checkpoint of {name} x{told["upscale"]} \(.*, not of {name} x{scale} \(.* (tail|up)'
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / 'net.pt', **untold, upscale=scale)


@pytest.mark.parametrize('img_range', [1.0, 127.5, 255.0])
def test_published_constants_tell_the_range_of_elan(img_range: float, tmp_path: Path) -> None:
    net = archs.ELAN(upscale=2, m_elan=24, c_elan=60, n_share=1, img_range=img_range)
    for dtype in (torch.float32, torch.float64, torch.float16):
        state = {name: tensor.to(dtype) for name, tensor in to_published(net).items()}
        safetensors.torch.save_file(state, tmp_path / 'net.safetensors')
        assert checkpoints.load(tmp_path / 'net.safetensors').img_range == img_range


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_networks_are_loaded_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in published('elan_light', 2).items()}
    torch.save(state, tmp_path / 'net.pth')
    net = checkpoints.load(tmp_path / 'net.pth')
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert_has(net, {name: tensor.to(net.state_dict().get(name, tensor).dtype) for name, tensor in state.items()})
    assert not net.training


# Forms ---------------------------------------------------------------------------------------------------------------


def write(checkpoint: dict[str, Any], file: Path) -> None:
    if file.suffix == '.safetensors':
        safetensors.torch.save_file(checkpoint, file)
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=file.suffix == '.pth')


@pytest.mark.parametrize(
    ('suffix', 'wrapper'),
    [
        ('.safetensors', None),  # it holds tensors only
        *itertools.product(['.pth', '.pt'], [None, 'params', 'params_ema', 'state_dict', 'model_state_dict']),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'module.'], ids=['plain', 'module'])
def test_parameters_are_found_in_every_form(suffix: str, wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    state = published('elan_light', 3)
    checkpoint: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper:
        # What was measured, by Python and by NumPy, is no code.
        checkpoint = {'epoch': 3, 'best': [31.5, np.float64(0.9), np.int64(7)], wrapper: checkpoint}
    write(checkpoint, tmp_path / f'net{suffix}')
    net = checkpoints.load(tmp_path / f'net{suffix}')
    assert_has(net, state)
    net = VARIANTS['elan_light'].build(3)
    net.load_state_dict(checkpoint, strict=True)
    assert_has(net, state)


def test_the_averaged_parameters_are_preferred(tmp_path: Path) -> None:
    state = published('elan_light', 2)
    trained = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({'params': trained, 'params_ema': state}, tmp_path / 'net.pth')
    assert_has(checkpoints.load(tmp_path / 'net.pth'), state)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    state = published('elan_light', 2)
    safetensors.torch.save_file(state, tmp_path / 'net.pth')
    torch.save(state, tmp_path / 'net.safetensors')
    for file in tmp_path.iterdir():
        assert_has(checkpoints.load(file), state)


# Writing -------------------------------------------------------------------------------------------------------------


@every_case
def test_published_names_and_shapes_round_trip(variant: str, scale: int) -> None:
    net = VARIANTS[variant].build(scale)
    state = to_published(net)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == published_shapes(variant, scale)
    again = VARIANTS[variant].build(scale)
    again.load_state_dict(state, strict=True)
    assert_has(again, net.state_dict())
    second = to_published(again)
    assert [name for name in state if not torch.equal(second[name], state[name])] == []


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_trained_network_round_trips(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    told, untold = OWN_SIZES[name]
    torch.manual_seed(0)
    net = getattr(archs, name)(**told, **untold).to(dtype)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.rand(2, 3, 12, 15, dtype=dtype)).square().mean().backward()
        optimizer.step()
    torch.save(to_published(nn.DataParallel(net)), tmp_path / 'net.pth')
    loaded = checkpoints.load(tmp_path / 'net.pth', **untold).to(dtype)
    assert_has(loaded, {key: tensor.float().to(tensor.dtype) for key, tensor in net.state_dict().items()})
    again = getattr(archs, name)(**told, **untold).to(dtype)
    again.load_state_dict(to_published(net), strict=True)
    assert_has(again, net.state_dict())


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('case', 'other'),
    list(zip(CASES, CASES[1:] + CASES[:1], strict=True)),
    ids=[f'{name}_x{scale}' for name, scale in CASES],
)
def test_a_checkpoint_of_another_network_is_named(case: tuple[str, int], other: tuple[str, int]) -> None:
    """Of another scale, of another variant, and of another network."""
    net = VARIANTS[other[0]].build(other[1])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict(published(*case))
    assert str(error.value).startswith(f'this is a checkpoint of {title(*case)}, not of {title(*other)}; ')
    assert len(str(error.value)) < 1500
    assert_has(net, before)


def test_all_that_does_not_fit_is_one_error() -> None:
    state = published('elan_light', 4)
    for name in ('head.0.weight', 'body.3.modules_gmsa.gmsa_1.project_inp.1.running_mean'):
        del state[name]
    state['tail.9.weight'] = torch.zeros(1)
    state['body.0.modules_lfe.lfe_0.conv0.shift_conv.conv1x1.bias'] = torch.zeros(7)
    with pytest.raises(RuntimeError) as error:
        VARIANTS['elan_light'].build(4).load_state_dict(state)
    assert str(error.value) == (
        'this is no checkpoint of ELAN-light x4; '
        'Missing key(s): head.0.weight, body.3.modules_gmsa.gmsa_1.project_inp.1.running_mean; '
        'Unexpected key(s): tail.9.weight; '
        'size mismatch: body.0.modules_lfe.lfe_0.conv0.shift_conv.conv1x1.bias is (7,) instead of (120,)'
    )
    with pytest.raises(RuntimeError, match=r'Missing key\(s\): (\S+, ){3}\S+ and 288 more; Unexpected key\(s\): one$'):
        VARIANTS['elan_light'].build(4).load_state_dict({'one': torch.zeros(1)})


def test_batch_norms_without_counters_load_as_in_pytorch() -> None:
    state = published('elan_light', 4)
    old = {name: tensor for name, tensor in state.items() if not name.endswith('num_batches_tracked')}
    net = VARIANTS['elan_light'].build(4)
    net.load_state_dict(old)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items() if name in old)


def test_a_file_of_no_network_lists_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / 'net.pth'
    torch.save(nn.Conv2d(3, 3, 3).state_dict(), file)
    titles = ', '.join(variant.title for variant in VARIANTS.values())
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(file)
    assert str(error.value) == f'{file}: this is a checkpoint of no network of attnsr, which are {titles} (x2, x3, x4)'
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r'net\.pth: this is no checkpoint, but a list'):
        checkpoints.load(file)
    torch.save({'epoch': 3}, file)
    with pytest.raises(CheckpointError, match=r"net\.pth: this checkpoint holds no parameters.*'epoch'"):
        checkpoints.load(file)
    state = published('elan_light', 4)
    torch.save({**state, 'head.0.bias': torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match=r'net\.pth: this is no checkpoint of ELAN-light x4; size mismatch: head'):
        checkpoints.load(file)
    with pytest.raises(FileNotFoundError, match=r'none\.pth: there is no such file'):
        checkpoints.load(tmp_path / 'none.pth')
    with pytest.raises(IsADirectoryError):
        checkpoints.load(tmp_path)


def test_a_torn_safetensors_file_is_named(tmp_path: Path) -> None:
    content = safetensors.torch.save(published('elan_light', 2))
    file = tmp_path / 'torn.safetensors'
    for length in (*range(0, 300, 7), *range(300, len(content), 50_021), len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf'torn\.safetensors: this file is {"torn" if length else "empty"}'):
            checkpoints.load(file)


class Code:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize('name', ['net.pth', 'net.pt', 'net.safetensors'])
@pytest.mark.parametrize('form', ['torch.save', 'old torch.save', 'pickle', 'pickle in an array'])
def test_code_in_a_file_is_refused(form: str, name: str, tmp_path: Path) -> None:
    file, made = tmp_path / name, tmp_path / 'made'
    code: Any = Code(os.mkdir, str(made))
    checkpoint = {'params': {'head.0.weight': torch.zeros(1)}, 'best': code}
    if form == 'pickle in an array':
        checkpoint['best'] = np.array([code, None])
    if form == 'pickle':
        file.write_bytes(pickle.dumps(checkpoint, protocol=2))
        pickle.loads(file.read_bytes())
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=form != 'old torch.save')
        with open(file, 'rb') as content:
            torch.load(content, weights_only=False)
    assert made.is_dir(), 'the file does nothing'
    made.rmdir()

    with pytest.raises(CheckpointError, match=r'/net\.\w+: this file is torn, or it is a pickle with code in it \(\S+'):
        checkpoints.load(file)
    assert not made.exists()


# What must not be taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype) -> None:
    net = VARIANTS['asid'].build(2)
    state = {**published('asid', 2), 'input.weight': torch.ones(48, 3, 3, 3).to(dtype)}
    with pytest.raises(RuntimeError, match=rf'not of floating point: input.weight is {dtype}'):
        net.load_state_dict(state)


def test_a_name_with_and_without_module_is_refused() -> None:
    state = published('asid', 2)
    with pytest.raises(ValueError, match=r"same names with and without 'module\.'"):
        VARIANTS['asid'].build(2).load_state_dict({**state, 'module.input.bias': state['input.bias'] + 1})


def test_no_memory_is_taken_for_numbers_that_only_a_file_names(tmp_path: Path) -> None:
    """A tensor that says 300 million ESA channels in four bytes: the network would take gigabytes."""
    state = {**published('asid', 2), 'block0.esa.conv1.weight': torch.ones(1).expand(300_000_000, 48, 1, 1)}
    torch.save(state, tmp_path / 'net.pth')
    with pytest.raises(CheckpointError, match=r'net\.pth: this is no checkpoint of ASID.*size mismatch'):
        checkpoints.load(tmp_path / 'net.pth')


def test_a_compiled_network_is_given_back_as_itself() -> None:
    net = VARIANTS['asid'].build(2)
    compiled = checkpoints.to_published(torch.compile(net))  # type: ignore[arg-type]
    assert compiled.keys() == checkpoints.to_published(net).keys()
    net.get_parameter('input.bias').data += 1
    assert not torch.equal(compiled['input.bias'], net.get_parameter('input.bias'))
