"""Networks in BasicSR's models: loading whatever checkpoint, the moving average, the optimizers."""

import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import util
from basicsr.models.base_model import BaseModel
from torch import nn

from attnsr.archs import ELAN
from attnsr.archs.variants import VARIANTS
from attnsr.checkpoints import CheckpointError, to_published
from attnsr.compat import networks
from attnsr.data_prep.lmdb_dataset import write_lmdb


def make_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def model(tmp_path: Path) -> BaseModel:
    return util.make_model(tmp_path)


STATE = make_network(1).state_dict()
MODULE = {f'module.{name}': tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ('checkpoint', 'stock_fails'),
    [
        pytest.param({'params': STATE}, False, id='params'),
        pytest.param({'params_ema': STATE, 'params': make_network(2).state_dict()}, False, id='params_ema'),
        pytest.param({'params': MODULE}, False, id='module in params'),
        pytest.param(STATE, True, id='bare'),
        pytest.param(MODULE, True, id='module'),
        pytest.param({'model_state_dict': STATE}, True, id='model_state_dict'),
        pytest.param({'state_dict': MODULE, 'epoch': 7}, True, id='state_dict'),
    ],
)
def test_parameters_are_found_wherever_a_checkpoint_has_them(
    checkpoint: dict[str, Any], stock_fails: bool, model: BaseModel, tmp_path: Path
) -> None:
    file = str(tmp_path / 'net.pth')
    torch.save(checkpoint, file)
    if stock_fails:
        with pytest.raises(KeyError):
            util.stock(networks._load_network)(model, make_network(0), file, True, 'params_ema')
    net = make_network(0)
    model.load_network(net, file, True, 'params_ema')
    assert same(net, make_network(1))


class Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize('form', ['torch.save', 'pickle', 'old torch.save'])
def test_code_in_a_checkpoint_is_not_run(form: str, model: BaseModel, tmp_path: Path) -> None:
    file, folder = tmp_path / 'net.pth', tmp_path / 'made'
    checkpoint = {'params': STATE, 'more': Code(folder)}
    if form == 'pickle':
        file.write_bytes(pickle.dumps(checkpoint, protocol=2))
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=form == 'torch.save')
    torch.load(file, weights_only=False) if form != 'pickle' else pickle.loads(file.read_bytes())
    assert folder.is_dir(), 'the file does nothing'
    folder.rmdir()

    with pytest.raises(
        CheckpointError, match=r'net\.pth: this file is torn, or .* code in it \(\S+\), which is not run'
    ):
        model.load_network(make_network(0), str(file))
    assert not folder.exists()


def test_a_torn_checkpoint_is_named(model: BaseModel, tmp_path: Path) -> None:
    whole, file = tmp_path / 'whole.pth', tmp_path / 'torn.pth'
    torch.save({'params': STATE, 'more': torch.ones(5000)}, whole)  # what torch.load raises depends on the size too
    content = whole.read_bytes()
    for length in (*range(0, 40, 3), *range(40, len(content), 97), *range(len(content) - 100, len(content))):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf'torn\.pth: this file is {"torn" if length else "empty"}'):
            model.load_network(make_network(0), str(file))
    with pytest.raises(FileNotFoundError, match='no such file'):
        model.load_network(make_network(0), str(tmp_path / 'none.pth'))
    with pytest.raises(IsADirectoryError):
        model.load_network(make_network(0), str(tmp_path))


def test_parameters_that_do_not_fit_are_named(model: BaseModel, tmp_path: Path) -> None:
    file = str(tmp_path / 'net.pth')
    torch.save({'params': {**STATE, '0.bias': torch.ones(5)}}, file)
    with pytest.raises(CheckpointError, match=r'net\.pth: does not fit the network of the option file: [^$]*0\.bias'):
        model.load_network(make_network(0), file)
    net = make_network(0)
    model.load_network(net, file, strict=False)  # the rest is loaded, as by BasicSR
    assert torch.equal(net[0].weight, STATE['0.weight'])
    assert net[0].bias.shape == (4,)
    torch.save({'epoch': 3, 'optimizer': [1, 2]}, file)
    with pytest.raises(CheckpointError, match=r"net\.pth: .* holds no parameters.*'epoch', 'optimizer'"):
        model.load_network(make_network(0), file)


def test_a_param_key_that_the_file_lacks_is_named(model: BaseModel, tmp_path: Path) -> None:
    file = str(tmp_path / 'net.pth')
    torch.save({'generator': STATE, 'params': make_network(2).state_dict()}, file)
    net = make_network(0)
    model.load_network(net, file, param_key='generator')
    assert same(net, make_network(1))
    message = r"net\.pth: has no 'genrator', which param_key names; it has 'generator', 'params'"
    with pytest.raises(CheckpointError, match=message):
        model.load_network(net, file, param_key='genrator')
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r'net\.pth: this is no checkpoint, but a list'):
        model.load_network(net, file)


# Networks of attnsr --------------------------------------------------------------------------------------------------


def copies(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The names whose tensors are not the same in both."""
    same = {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}
    return (one.keys() | other.keys()) - same


@pytest.fixture
def told(logged: list[str]) -> Iterator[list[str]]:
    """What BasicSR's logger is given while it trains, without the lines that say what is being loaded."""
    logger = logging.getLogger('basicsr')
    level = logger.level
    logger.setLevel(logging.INFO)
    yield logged
    logger.setLevel(level)


@pytest.fixture
def pretrained(model: BaseModel, tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], str]:
    """Writes a checkpoint, and names it in the options of ``model``."""

    def write(state: dict[str, torch.Tensor]) -> str:
        file = model.opt['path']['pretrain_network_g'] = str(tmp_path / 'net.pth')
        torch.save(state, file)
        return file

    return write


@pytest.mark.parametrize(('given', 'scale'), [(2, 3), (2, 4), (4, 2)], ids=['x2 to x3', 'x2 to x4', 'x4 to x2'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_another_scale_starts_with_all_but_the_upsampler(
    variant: str,
    given: int,
    scale: int,
    model: BaseModel,
    pretrained: Callable[[dict[str, torch.Tensor]], str],
    told: list[str],
) -> None:
    title = VARIANTS[variant].title
    state = to_published(VARIANTS[variant].build(given))
    model.net_g, model.net_g_ema = VARIANTS[variant].build(scale), VARIANTS[variant].build(scale)
    before = copies(model.net_g)
    prefix = model.net_g.upsampler
    upsampler = {name for name in before if name.startswith(prefix)}
    assert len(upsampler) in (2, 4), 'one or two convolutions'

    file = pretrained({'params': state})
    with pytest.raises(CheckpointError) as error:
        model.load_network(model.net_g, file)
    message = str(error.value)
    assert message.startswith(
        f'path.pretrain_network_g: {file}: does not fit the network of the option file: '
        f'this is a checkpoint of {title} x{given}, not of {title} x{scale}; '
    )
    assert message.endswith(f'; `strict_load_g: false` would load all but the upsampler ({prefix}*)')
    assert differing(copies(model.net_g), before) == set()

    told.clear()
    model.load_network(model.net_g, file, strict=False)
    after = copies(model.net_g)
    expected = {name: tensor if name in upsampler else state[name] for name, tensor in before.items()}
    assert differing(after, expected) == set()
    model.load_network(model.net_g_ema, file, strict=False, param_key='params_ema')
    assert differing(copies(model.net_g_ema), after) == set()
    assert [line for line in told if 'upsampler' in line] == [
        f'INFO: {file} is a checkpoint of {title} x{given}: all but the upsampler ({prefix}*) is loaded.'
    ]
    assert not [line for line in told if line.startswith('WARNING')]


def test_what_fits_is_loaded_where_that_is_asked_for(
    model: BaseModel, pretrained: Callable[[dict[str, torch.Tensor]], str], told: list[str]
) -> None:
    """From a shallower network of the same width, with a name too many."""
    shallow = ELAN(upscale=2, m_elan=2, c_elan=12)
    deep = ELAN(upscale=2, m_elan=4, c_elan=12)
    before = copies(deep)
    file = pretrained({**shallow.state_dict(), 'extra': torch.ones(1)})
    message = r'this is no checkpoint of ELAN x2 \(m_elan 4, .*Missing key.*body\.2.*Unexpected key\(s\): extra'
    with pytest.raises(CheckpointError, match=message):
        model.load_network(deep, file, strict=True)
    told.clear()
    model.load_network(deep, file, strict=False)
    assert all(torch.equal(deep.state_dict()[name], tensor) for name, tensor in shallow.state_dict().items())
    assert not [name for name in differing(before, copies(deep)) if name.startswith(('body.2', 'body.3'))]
    (warning,) = [line for line in told if line.startswith('WARNING')]
    assert re.match(rf'WARNING: {re.escape(file)}: only what fits is loaded: {message}\.$', warning)


def test_what_a_run_resumes_from_fits_whole(
    model: BaseModel, pretrained: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    """``strict_load_g: false`` is for where a run starts: resumed with a deeper network it is an error."""
    file = pretrained({'params': ELAN(upscale=2, m_elan=2, c_elan=12).state_dict()})
    model.opt['path'].update(resume_state='3.state', models=str(Path(file).parent))
    with pytest.raises(CheckpointError, match=r'Missing key.*body\.2'):
        model.load_network(ELAN(upscale=2, m_elan=4, c_elan=12), file, strict=False)


@pytest.mark.parametrize('strict', [True, False], ids=['strict', 'not strict'])
def test_another_network_is_an_error(
    strict: bool, model: BaseModel, pretrained: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    """Of another width some biases and statistics have the same shape still."""
    net = VARIANTS['elan'].build(2)
    before = copies(net)
    file = pretrained({'params': VARIANTS['elan_light'].build(2).state_dict()})
    with pytest.raises(CheckpointError, match=r'net\.pth: .*this is a checkpoint of ELAN-light x2, not of ELAN x2; '):
        model.load_network(net, file, strict)
    assert differing(copies(net), before) == set()


def test_training_starts_from_another_scale(tmp_path: Path) -> None:
    """By the command line, x3 from x2: with strict_load_g the error says what to write, without it is trained."""
    pictures = util.pictures()
    write_lmdb(tmp_path / 'hr.lmdb', pictures)
    write_lmdb(tmp_path / 'lr.lmdb', {key: picture[::3, ::3] for key, picture in pictures.items()})
    weights = tmp_path / 'x2.safetensors'
    x2 = to_published(ELAN(upscale=2, m_elan=2, c_elan=12, window_sizes=(2, 4, 8)))
    safetensors.torch.save_file(x2, weights)
    options = util.OPTIONS.format(data=tmp_path).replace('scale: 2', 'scale: 3').replace('gt_size: 16', 'gt_size: 18')
    options = options.replace('path: {}', f'path: {{pretrain_network_g: {weights}, strict_load_g: false}}')
    options = options.replace('lr: 1e-3', 'lr: 1e-9').replace('total_iter: 40', 'total_iter: 2')
    file = tmp_path / 'x3.yml'

    file.write_text(options.replace('strict_load_g: false', 'strict_load_g: true'))
    process = util.run('-m', 'attnsr', 'train', '-opt', file, cwd=tmp_path, status=2)
    sizes = 'm_elan 2, c_elan 12, n_share 0, r_expand 2'
    assert process.stderr.splitlines()[-1].startswith(
        f'path.pretrain_network_g: {weights}: does not fit the network of the option file: '
        f'this is a checkpoint of ELAN x2 ({sizes}), not of ELAN x3 ({sizes}); size mismatch: '
    )
    assert process.stderr.endswith('; `strict_load_g: false` would load all but the upsampler (tail.*)\n')

    file.write_text(options)
    log = util.run('-m', 'attnsr', 'train', '-opt', file, cwd=tmp_path).stderr
    (line,) = [line for line in log.splitlines() if 'upsampler' in line]
    assert line.endswith(
        f'INFO: {weights} is a checkpoint of ELAN x2 ({sizes}): all but the upsampler (tail.*) is loaded.'
    )
    trained = torch.load(tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth', weights_only=True)
    for state in trained.values():
        assert state['tail.0.weight'].shape == (27, 12, 3, 3)
        for name in ('head.0.weight', 'body.1.modules_gmsa.gmsa_0.project_out.weight'):
            torch.testing.assert_close(state[name], x2[name], rtol=0, atol=1e-7)
    torch.testing.assert_close(trained['params']['tail.0.weight'], trained['params_ema']['tail.0.weight'])


# BasicSR's own -------------------------------------------------------------------------------------------------------


def test_the_moving_average_has_the_batch_norms_statistics(model: BaseModel) -> None:
    def averaged(model_ema: Any) -> nn.Module:
        model.net_g, model.net_g_ema = make_network(0).train(), make_network(0).eval()
        torch.manual_seed(3)
        for _ in range(50):
            model.net_g(5 + 2 * torch.randn(4, 3, 6, 6))
            model_ema(model, 0.5)
        return model.net_g_ema

    probe = 5 + 2 * torch.randn(4, 3, 6, 6)
    stock, mended = averaged(util.stock(networks._model_ema_with_buffers)), averaged(BaseModel.model_ema)
    expected = model.net_g.eval()(probe)  # its parameters have not changed: both networks are the same
    assert not torch.allclose(stock(probe), expected, atol=0.5)
    torch.testing.assert_close(mended(probe), expected)


@pytest.mark.parametrize(
    ('name', 'options'),
    [('AdamW', {'weight_decay': 0.1}), ('SGD', {'momentum': 0.9}), ('Adam', {'eps': 1e-6})],
)
def test_optimizers_of_torch_can_be_named(name: str, options: dict[str, Any], model: BaseModel) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    if name != 'Adam':
        with pytest.raises(NotImplementedError):
            util.stock(networks._get_optimizer)(model, name, parameters, 0.01, **options)
    optimizer = model.get_optimizer(name, parameters, 0.01, **options)
    assert type(optimizer) is getattr(torch.optim, name)
    assert {key: optimizer.defaults[key] for key in ('lr', *options)} == {'lr': 0.01, **options}
