"""``basicsr export``: what is written computes what PyTorch computes, at any size, and loads where it says it does."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
import util
from golden_recipe import seeded_image
from networks import SMALL, build
from torch import Tensor, nn

import attnsr
from attnsr import archs, checkpoints, export, metadata
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.variants import VARIANTS
from attnsr.checkpoints import CheckpointError
from attnsr.cli import main
from attnsr.errors import UsageError
from attnsr.export import SIZES, DisagreementError, Exporter
from attnsr.ops import dispatch

each_network = pytest.mark.parametrize('name', SMALL)

# Larger and smaller than the export's own, of other batches: multiples of every window and not.
OTHER_SIZES = [(1, 17, 20), (2, 16, 24), (3, 9, 31), (1, 40, 33), (2, 48, 16), (2, 8, 8), (1, 1, 1), (1, 2, 67)]

#: Loads a program where attnsr is not to be found, and computes the images of a file.
WITHOUT_ATTNSR = """
import sys
sys.modules['attnsr'] = None  # as if it were not installed
import torch

program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
with torch.inference_mode():
    torch.save([program(x) for x in images], sys.argv[3])
assert not any(name.startswith('attnsr.') for name in sys.modules)
"""


def images(*shape: int) -> Tensor:
    return torch.from_numpy(seeded_image(shape, 1)).float()


#: Still fewer layers, of each kind one: converting takes time with the square of their number.
SMALLER = {'DLGSANet': {'num_groups': 1}}


class Written:
    """A small network, its exporter, and its files, which are written once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.net = build(name, upscale=2, **SMALLER.get(name, {})).eval().requires_grad_(False)
        self.exporter = Exporter(self.net)
        self.folder, self.name = folder, name
        self.results: dict[str, export.Exported] = {}

    def file(self, ending: str) -> Path:
        path = self.folder / f'{self.name}{ending}'
        if ending not in self.results:
            self.results[ending] = self.exporter.write(path)
        return path


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp('exported')

    class Networks(dict[str, Written]):
        def __missing__(self, name: str) -> Written:
            self[name] = Written(name, folder)
            return self[name]

    return Networks()


# ONNX ----------------------------------------------------------------------------------------------------------------


@each_network
def test_onnx_is_pytorch_at_any_size(name: str, written: dict[str, Written]) -> None:
    one = written[name]
    session = onnxruntime.InferenceSession(one.file('.onnx'), providers=['CPUExecutionProvider'])
    for batch, height, width in OTHER_SIZES:
        x = images(batch, 3, height, width)
        (y,) = session.run(['upscaled'], {'image': x.numpy()})
        np.testing.assert_allclose(y, one.net(x).numpy(), rtol=0, atol=1e-5)
    result = one.results['.onnx']
    assert result.errors.keys() == set(SIZES)
    assert all(error <= 1e-5 < result.bound[size] for size, error in result.errors.items())


@each_network
def test_onnx_says_what_it_is(name: str, written: dict[str, Written]) -> None:
    path = written[name].file('.onnx')
    model = onnx.load(path, load_external_data=False)
    properties = {each.key: each.value for each in model.metadata_props}
    assert (properties['network'], properties['scale'], properties['dtype']) == (name, '2', 'float32')
    assert properties['attnsr'] == attnsr.__version__
    assert 'variant' not in properties
    assert [(each.domain, each.version) for each in model.opset_import] == [('', 20)]
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (image,), (upscaled,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape, image.type) == ('image', ['batch', 3, 'height', 'width'], 'tensor(float)')
    assert (upscaled.name, upscaled.shape) == ('upscaled', ['batch', 3, '2*height', '2*width'])
    assert 'RGB in [0, 1]' in model.graph.input[0].doc_string
    # All in one file.
    assert not any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer)


@each_network
def test_onnx_has_no_scattered_sums(name: str, written: dict[str, Written]) -> None:
    """ONNX Runtime loses summands of them where it has several threads: seen with overlapping windows."""
    model = onnx.load(written[name].file('.onnx'))
    scattering = [node for node in model.graph.node if node.op_type.startswith('Scatter')]
    assert not any(each.name == 'reduction' and each.s != b'none' for node in scattering for each in node.attribute)


def test_another_opset(written: dict[str, Written], tmp_path: Path) -> None:
    one = written['LCoAN']
    exporter = Exporter(one.net, opset=18)
    exporter.__dict__['program'] = one.exporter.program  # that serves all opsets
    exporter.write(tmp_path / 'net.onnx')
    assert onnx.load(tmp_path / 'net.onnx').opset_import[0].version == 18


def test_onnx_in_half_precision(tmp_path: Path) -> None:
    """Images enter and leave in float32, whatever the network computes in."""
    net = build('LCoAN', upscale=2).eval().requires_grad_(False)
    result = Exporter(net, 'float16').write(tmp_path / 'net.onnx')
    assert 0 < max(result.errors.values()) < 1e-3
    model = onnx.load(tmp_path / 'net.onnx')
    weights = {each.data_type for each in model.graph.initializer if len(each.dims) == 4 and max(each.dims) > 3}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert [each.type.tensor_type.elem_type for each in (model.graph.input[0], model.graph.output[0])] == [1, 1]


# torch.export --------------------------------------------------------------------------------------------------------


def test_programs_load_where_attnsr_is_not_installed(written: dict[str, Written], tmp_path: Path) -> None:
    inputs = [images(batch, 3, height, width) for batch, height, width in OTHER_SIZES]
    torch.save(inputs, tmp_path / 'images.pt')
    processes = {
        name: util.start(
            '-c', WITHOUT_ATTNSR, written[name].file('.pt2'), tmp_path / 'images.pt', tmp_path / name, cwd=tmp_path
        )
        for name in ('ELAN', 'DLGSANet')  # each takes its time; of the others see the test below
    }
    for name, process in processes.items():
        util.finish(process)
        for x, y in zip(inputs, torch.load(tmp_path / name), strict=True):
            torch.testing.assert_close(y, written[name].net(x), rtol=1e-5, atol=1e-5)


@each_network
def test_programs_have_nothing_but_operators_of_pytorch(name: str, written: dict[str, Written]) -> None:
    program = written[name].exporter.program
    targets = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert not [target for target in targets if 'attnsr' in target]
    with zipfile.ZipFile(written[name].file('.pt2')) as archive:
        (described,) = (each for each in archive.namelist() if each.endswith('extra/attnsr.json'))
        assert json.loads(archive.read(described))['network'] == name


def test_a_program_in_bfloat16(tmp_path: Path) -> None:
    net = build('LCoAN', upscale=2).eval().requires_grad_(False)
    result = Exporter(net, 'bfloat16').write(tmp_path / 'net.pt2')
    assert 1e-4 < max(result.errors.values()) < 0.05


def test_indices_are_computed_once(written: dict[str, Written]) -> None:
    """The order of windows is the same in all layers of a kind; and nothing but indices is shared."""
    one = written['ELAN']
    nodes = [node for node in one.exporter.program.graph.nodes if node.op == 'call_function']
    divisions = [node for node in nodes if 'floor_divide' in str(node.target)]
    assert len(divisions) < 100  # of 240
    convolutions = [module for module in one.net.modules() if isinstance(module, nn.Conv2d)]
    assert [str(node.target) for node in nodes].count('aten.conv2d.default') == len(convolutions)


# safetensors ---------------------------------------------------------------------------------------------------------


@each_network
def test_safetensors_round_trip(name: str, written: dict[str, Written]) -> None:
    """Bit for bit, and without being told what tensors do not tell."""
    net, path = written[name].net, written[name].file('.safetensors')
    loaded = checkpoints.load(path)
    assert loaded.arguments == json.loads(json.dumps(net.arguments))
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    x = images(2, 3, 13, 18)
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(attnsr.load(path, tile=None).tensor(x), attnsr.Upscaler(loaded, tile=None).tensor(x))
    with safetensors.safe_open(path, 'pt') as file:
        texts = file.metadata()
        assert set(file.keys()) == set(checkpoints.to_published(net))
    assert (texts['format'], texts['network'], texts['scale']) == ('pt', name, '2')
    assert set(written[name].results['.safetensors'].errors.values()) == {0.0}


def test_safetensors_of_a_published_network(tmp_path: Path) -> None:
    """Arguments that a training has set otherwise are kept; given ones go before them."""
    net = archs.ELAN(upscale=3, m_elan=24, c_elan=60, n_share=1, window_sizes=(3, 5, 6), img_range=1.0)
    Exporter(net).write(tmp_path / 'net.safetensors')
    with safetensors.safe_open(tmp_path / 'net.safetensors', 'pt') as file:
        texts = file.metadata()
    assert (texts['network'], texts['variant'], texts['scale']) == ('ELAN', 'elan_light', '3')
    loaded = checkpoints.load(tmp_path / 'net.safetensors')
    assert loaded.arguments['window_sizes'] == [3, 5, 6]
    assert loaded.img_range == 1.0
    assert checkpoints.load(tmp_path / 'net.safetensors', img_range=255.0).img_range == 255.0


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_safetensors_in_half_precision(dtype: str, tmp_path: Path) -> None:
    net = build('ASID', upscale=2)
    sizes = {}
    for each in ('float32', dtype):
        sizes[each] = Exporter(net, each).write(tmp_path / f'{each}.safetensors').bytes
    assert sizes[dtype] < 0.75 * sizes['float32']  # the table of names is the same
    loaded = checkpoints.load(tmp_path / f'{dtype}.safetensors').state_dict()
    kept = {key: tensor.to(getattr(torch, dtype)).float() for key, tensor in net.state_dict().items()}
    assert all(torch.equal(tensor, kept[key]) for key, tensor in loaded.items())


def test_numbers_that_half_precision_has_not_are_told() -> None:
    net = build('ELAN', upscale=2)
    net.get_buffer('body.0.modules_gmsa.gmsa_0.project_inp.1.running_var').fill_(1e5)
    with pytest.raises(
        UsageError, match=r'gmsa_0\.project_inp\.1\.running_var: has numbers that are not finite in float16'
    ):
        Exporter(net, 'float16')
    Exporter(net, 'bfloat16')


@pytest.fixture(scope='module')
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    path = tmp_path_factory.mktemp('described') / 'net.safetensors'
    Exporter(archs.ELAN(upscale=2, **SMALL['ELAN'])).write(path)
    with safetensors.safe_open(path, 'pt') as file:
        return safetensors.torch.load_file(path), file.metadata()


def arguments(**changed: Any) -> dict[str, str]:
    told = {'upscale': 2, **SMALL['ELAN'], 'img_range': 255.0}
    return {'arguments': json.dumps({**told, **changed})}


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'network': 'os.system'}, "name the network 'os.system', which there is not; there are ELAN, DLGSANet, ASID"),
        ({'network': 'ASID'}, r"contradict its tensors: network is 'ASID', the tensors are of ELAN x2 \(m_elan 4"),
        ({'network': None}, "have no 'network'"),
        ({'variant': 'elan_x'}, "name the variant 'elan_x', which there is not; there are elan, elan_light"),
        ({'variant': 'elan_light'}, "contradict its tensors: variant is 'elan_light'"),
        ({'scale': '4'}, "contradict its tensors: scale is '4'"),
        ({'scale': 'two'}, "contradict its tensors: scale is 'two'"),
        ({'scale': None}, "have no 'scale'"),
        ({'arguments': None}, 'arguments are no JSON object'),
        ({'arguments': '{'}, 'arguments are no JSON object'),
        ({'arguments': '[1]'}, 'arguments are no JSON object'),
        ({'arguments': '[' * 4000}, 'arguments are no JSON object'),
        ({'arguments': '{"a": ' + '1' * 5000 + '}'}, 'arguments are no JSON object of at most 4096 letters'),
        (arguments(c_elan=24), 'contradict its tensors: c_elan is 24'),
        (arguments(upscale=3), 'contradict its tensors: upscale is 3'),
        (arguments(m_elan=10**12), 'm_elan = 1000000000000; expected a whole number of at most 4096'),
        (arguments(m_elan=4.0), 'm_elan = 4.0; expected a whole number'),
        (arguments(m_elan=True), 'm_elan = True; expected a whole number'),
        (arguments(window_sizes=[2, 4, 10**9]), 'expected a list of whole numbers from 1 to 4096'),
        (arguments(window_sizes=[0, 4, 8]), 'expected a list of whole numbers from 1 to 4096'),
        (arguments(window_sizes='248'), 'expected a list of whole numbers from 1 to 4096'),
        (arguments(window_sizes=[]), 'expected a list of whole numbers from 1 to 4096'),
        (arguments(window_sizes=[4091, 4093, 4095]), 'padded to multiples of 685'),
        (arguments(img_range=float('nan')), 'img_range = nan; expected a finite number'),
        (arguments(img_range='255'), 'img_range = 255; expected a finite number'),
        (arguments(img_range=1.0), 'contradict its tensors: img_range is 1.0'),
        (arguments(img_range=-255), 'contradict its tensors: img_range is -255'),
        (arguments(use_checkpoint=1), 'use_checkpoint = 1; expected true or false'),
        (arguments(code='x'), "have the argument 'code', which ELAN has not; it has upscale, m_elan"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else '',
)
def test_metadata_that_are_wrong_are_one_sentence(
    changed: dict[str, Any],
    message: str,
    described: tuple[dict[str, Tensor], dict[str, str]],
    tmp_path: Path,
) -> None:
    tensors, texts = described
    texts = {key: text for key, text in {**texts, **changed}.items() if text is not None}
    safetensors.torch.save_file(tensors, tmp_path / 'net.safetensors', texts)
    with pytest.raises(CheckpointError, match=r'net\.safetensors: its metadata') as error:
        checkpoints.load(tmp_path / 'net.safetensors')
    assert error.match(message)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_what_metadata_do_not_tell_is_as_without(
    described: tuple[dict[str, Tensor], dict[str, str]], tmp_path: Path
) -> None:
    tensors, texts = described
    for kept in (
        None,
        {},
        {'format': 'pt'},
        {'format': 'pt', 'scale': '7', 'title': 'x'},
        {**texts, 'arguments': '{}'},
    ):
        safetensors.torch.save_file(tensors, tmp_path / 'net.safetensors', kept)
        with pytest.raises(checkpoints.UntoldError, match='the tensors do not tell window_sizes'):
            checkpoints.load(tmp_path / 'net.safetensors')
        assert checkpoints.load(tmp_path / 'net.safetensors', window_sizes=(2, 4, 8)).img_range == 255


def test_arguments_of_every_network_can_be_described() -> None:
    for variant in VARIANTS.values():
        with torch.device('meta'):
            net = variant.build(2)
        texts = metadata.describe(net)
        assert texts['variant'] == variant.name
        identity = metadata.identify(net.state_dict())
        assert identity is not None
        assert metadata.arguments_in(texts, identity) == json.loads(texts['arguments'])


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ASID-like size, which tells all of its arguments."""
    path = tmp_path_factory.mktemp('weights') / 'net.pth'
    torch.save({'params': build('ASID', upscale=2).state_dict()}, path)
    return path


def test_the_command_says_what_it_has_seen(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / 'one.safetensors', tmp_path / 'two.safetensors'
    assert main(['export', '-w', str(weights), '-o', str(one), str(two), '--dtype', 'bfloat16']) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith(f'{weights}: ASID x2 (num_feat 16, num_groups 2,')
    assert lines[1].startswith(f'{one}: safetensors, ')
    assert len(lines) == 1 + 2 * (1 + len(SIZES))
    assert all('(at most 1.0e-01)' in line for line in lines if line.startswith('  '))
    assert sorted(tmp_path.iterdir()) == [one, two]
    assert type(checkpoints.load(one)) is archs.ASID


def test_own_sizes_are_told_by_an_option_file(
    trained: util.Training, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As upscaling has it; of a training that is not moved, nothing needs to be told."""
    checkpoint = trained.experiment / 'models' / 'net_g_latest.pth'
    assert main(['export', '-w', str(trained.experiment), '-o', str(tmp_path / 'a.safetensors')]) == 0
    moved = tmp_path / 'moved.pth'
    moved.write_bytes(checkpoint.read_bytes())
    assert main(['export', '-w', str(moved), '-o', str(tmp_path / 'b.safetensors')]) == 2
    assert 'name the option file of its training: --network FILE.yml' in capsys.readouterr().err
    command = ['export', '-w', str(moved), '--network', str(tiny), '-o', str(tmp_path / 'b.safetensors')]
    assert main(command) == 0
    for name in 'ab':
        assert checkpoints.load(tmp_path / f'{name}.safetensors').arguments['window_sizes'] == [2, 4, 8]
    assert main(['export', '-w', str(moved), '--network', 'asid', '-o', str(tmp_path / 'c.safetensors')]) == 2
    assert not (tmp_path / 'c.safetensors').exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that ends with status 2."""
    assert main(['export', *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    (line,) = captured.err.splitlines()
    return line


def test_wrong_files_are_one_line(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'net.safetensors'
    assert 'none.pth: there is no such file' in refused(capsys, '-w', tmp_path / 'none.pth', '-o', out)
    (tmp_path / 'notes.txt').write_text('no checkpoint')
    assert 'notes.txt: this file is torn, or' in refused(capsys, '-w', tmp_path / 'notes.txt', '-o', out)
    (tmp_path / 'torn.pth').write_bytes(weights.read_bytes()[:-100])
    assert 'torn.pth: this file is torn' in refused(capsys, '-w', tmp_path / 'torn.pth', '-o', out)
    valid = ".onnx (ONNX), .pt2 (torch.export's program), .safetensors (safetensors)"
    for name in ('net', 'net.pth', 'net.ONNX'):
        line = refused(capsys, '-w', weights, '-o', tmp_path / name)
        assert line == f'{tmp_path / name}: the ending of the name says what is written; valid are {valid}'
    assert 'there is no folder' in refused(capsys, '-w', weights, '-o', tmp_path / 'no' / 'net.onnx')
    assert 'there is no folder' in refused(capsys, '-w', weights, '-o', tmp_path / 'notes.txt' / 'net.onnx')
    (tmp_path / 'folder.pt2').mkdir()
    assert 'folder.pt2: is a folder' in refused(capsys, '-w', weights, '-o', tmp_path / 'folder.pt2')
    assert '--opset 7: valid are 18 to 23' in refused(capsys, '-w', weights, '-o', tmp_path / 'n.onnx', '--opset', 7)
    line = refused(capsys, '-w', weights, '-o', tmp_path / 'net.onnx', '--dtype', 'bfloat16')
    assert 'net.onnx: ONNX Runtime does not compute in bfloat16 on CPUs; valid are float32 and float16' in line
    assert not out.exists()


def test_a_folder_that_cannot_be_written_to_is_told(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # whoever runs the tests may write anywhere
    assert 'cannot be written to' in refused(capsys, '-w', weights, '-o', tmp_path / 'net.safetensors')


def test_weights_are_not_replaced_by_what_is_made_of_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Exporter(checkpoints.load(weights)).write(tmp_path / 'net.safetensors')
    before = (tmp_path / 'net.safetensors').read_bytes()
    line = refused(capsys, '-w', tmp_path / 'net.safetensors', '-o', tmp_path / 'net.safetensors', '--dtype', 'float16')
    assert 'would be replaced by what is made of it' in line
    assert (tmp_path / 'net.safetensors').read_bytes() == before


def test_lcoan_without_centres_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(archs.LCoAN(upscale=2).state_dict(), tmp_path / 'net.pth')
    line = refused(capsys, '-w', tmp_path / 'net.pth', '-o', tmp_path / 'net.onnx')
    assert line == (
        f'{tmp_path}/net.pth: these cluster centres were never initialised: load a checkpoint or train first'
    )


def test_missing_packages_are_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None if name.startswith('onnx') else name)
    line = refused(capsys, '-w', weights, '-o', tmp_path / 'net.onnx')
    missing = "onnx and onnxscript and onnxruntime are not installed: pip install 'attnsr[export]'"
    assert line == f'{tmp_path}/net.onnx: {missing}'


# What must not be left -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ending', ['.onnx', '.pt2', '.safetensors'])
@pytest.mark.parametrize(
    ('result', 'said'),
    [
        (lambda y: y + 1e-3, 'differs from PyTorch by 0.001, which should be at most 0.0001'),
        (lambda y: y * float('nan'), 'differs from PyTorch by nan'),
        (lambda y: y[:, :, :-1], 'it makes'),
        (lambda y: y.double(), 'torch.float64; PyTorch makes'),
    ],
    ids=['off', 'nan', 'cropped', 'float64'],
)
def test_what_disagrees_is_no_file(
    result: Any, said: str, ending: str, written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = written['LCoAN']
    path = tmp_path / f'net{ending}'
    path.write_text('what was there before')
    loaders = {'.onnx': '_load_onnx', '.pt2': '_load_program', '.safetensors': '_load_safetensors'}
    writers = {'.onnx': '_write_onnx', '.pt2': '_write_program', '.safetensors': '_write_safetensors'}
    monkeypatch.setattr(one.exporter, loaders[ending], lambda name: lambda x: result(one.net(x)))
    monkeypatch.setattr(one.exporter, writers[ending], lambda file: file.write(b'something'))
    with pytest.raises(DisagreementError) as error:
        one.exporter.write(path)
    assert f'net{ending}: was not written' in str(error.value)
    assert said in str(error.value)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == 'what was there before'


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    weights, out = tmp_path / 'net.pth', tmp_path / 'out'
    out.mkdir()
    torch.save(build('ASID', upscale=2).state_dict(), weights)
    with util.CommandLine(tmp_path) as command_line:
        process = command_line.start('export', '-w', weights, '-o', out / 'net.pt2')
        while not list(out.iterdir()):  # the file under its temporary name
            time.sleep(0.05)
        os.kill(process, signal.SIGINT)
        status, said = command_line.finish()
    assert status == 130
    assert said.splitlines()[-1] == 'interrupted'
    assert 'Traceback' not in said
    assert list(out.iterdir()) == []


def test_kernels_asked_for_do_not_get_into_files(written: dict[str, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, '_backend', 'triton')
    exporter = Exporter(written['LCoAN'].net)
    assert not any('attnsr' in str(node.target) for node in exporter.program.graph.nodes)
    assert dispatch.get_backend() == 'triton'


def test_the_network_stays_as_it_is() -> None:
    net = build('ELAN', upscale=2).double()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    exporter = Exporter(net)
    assert exporter.converted is not net
    assert net.training
    assert isinstance(net, SRNetwork)
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float64}
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_the_command_line_starts_without_onnx(tmp_path: Path) -> None:
    """Packages that only some need are not asked for by others."""
    code = 'import sys; sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None); import attnsr.cli'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env=util.environment())
