"""Networks in BasicSR's models: loading whatever checkpoint, the moving average, the optimizers."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import util
from basicsr.models.base_model import BaseModel
from torch import nn

from attnsr.checkpoints import CheckpointError
from attnsr.compat import networks


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

    with pytest.raises(CheckpointError, match=r'net\.pth: this file is torn, or .* code in it, which is not run'):
        model.load_network(make_network(0), str(file))
    assert not folder.exists()


def test_a_torn_checkpoint_is_named(model: BaseModel, tmp_path: Path) -> None:
    whole, file = tmp_path / 'whole.pth', tmp_path / 'torn.pth'
    torch.save({'params': STATE, 'more': torch.ones(5000)}, whole)  # what torch.load raises depends on the size too
    content = whole.read_bytes()
    for length in (*range(0, 40, 3), *range(40, len(content), 97), *range(len(content) - 100, len(content))):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'torn\.pth: this file is torn'):
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
