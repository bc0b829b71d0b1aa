"""Networks as files for other programs: ONNX, torch.export's, and safetensors; ``basicsr export``.

A file is written under a temporary name, loaded again and compared with the network at several sizes, and only then
appears under its own.
"""

import argparse
import copy
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnsr import checkpoints
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import identify
from attnsr.errors import UsageError
from attnsr.files import write_atomically
from attnsr.inference import DTYPES
from attnsr.metadata import describe
from attnsr.ops import dispatch
from attnsr.weights import find_weights, load_network

__all__ = ['KINDS', 'OPSETS', 'SIZES', 'TOLERANCES', 'Exported', 'Exporter', 'add_arguments', 'run']

EPILOG = """\
examples:
  basicsr export -w elan_light_x4.pth -o elan_light_x4.onnx
  basicsr export -w experiments/ELAN_light_x4 -o net.pt2 net.safetensors
  basicsr export -w net_g_latest.pth --network my_options.yml -o net.onnx

ONNX and torch.export's files take images of any number and size. Each file is loaded again and compared with PyTorch at
several sizes before it appears under its name. docs/export.md says how to use them. For ONNX:
pip install 'attnsr[export]'
"""

#: {ending of a file's name: what it is}.
KINDS = {'.onnx': 'ONNX', '.pt2': "torch.export's program", '.safetensors': 'safetensors'}

#: Versions of ONNX's operators that can be asked for.
OPSETS = range(18, 24)
DEFAULT_OPSET = 20

#: Batch, height and width of the images that a file is compared on: a single pixel, sizes that are padded and that are
#: not, and one with several of each network's windows along a side.
SIZES = ((1, 1, 1), (2, 5, 7), (3, 16, 24), (1, 40, 33), (1, 101, 30))

#: By dtype: how far a file may be off the network in float32, over the largest magnitude of the result, or 1 if that
#: is less.
TOLERANCES = {'float32': 1e-4, 'float16': 0.02, 'bfloat16': 0.1}

#: The images that are traced: of a number and sizes that nothing can take for constants.
EXAMPLE = (2, 3, 17, 20)

IMAGE = 'RGB in [0, 1], float32, (batch, 3, height, width), any sizes of at least 1'
UPSCALED = 'RGB, float32, (batch, 3, {0} height, {0} width), not clipped to [0, 1]'


class DisagreementError(UsageError):
    """What was written does not compute what the network computes."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: Where it is.
        kind: One of the values of :data:`KINDS`.
        bytes: Its size.
        errors: {size of :data:`SIZES`: largest difference from the network in float32}.
        bound: {size: what that may be}.
        seconds: What tracing, writing and comparing took.
    """

    path: Path
    kind: str
    bytes: int
    errors: dict[tuple[int, int, int], float]
    bound: dict[tuple[int, int, int], float]
    seconds: float

    def __str__(self) -> str:
        size = f'{self.bytes / 1e6:.2f} MB' if self.bytes >= 1e5 else f'{self.bytes / 1e3:.1f} kB'
        lines = [f'{self.path}: {self.kind}, {size}, {self.seconds:.0f} s; largest differences from PyTorch:']
        for (batch, height, width), error in self.errors.items():
            bound = self.bound[batch, height, width]
            lines.append(f'  {f"{batch} x {height} x {width}":>12}  {error:.1e} (at most {bound:.1e})')
        return '\n'.join(lines)


class Exporter:
    """Writes a network into files; what several files need is computed once.

    Args:
        net: A network on any device, in any dtype. It is copied.
        dtype: Of the parameters, and of what ONNX and torch.export's programs compute in; images enter and leave in
            float32. ONNX takes no bfloat16, which ONNX Runtime does not compute on CPUs.
        opset: For ONNX; one of :data:`OPSETS`, :data:`DEFAULT_OPSET` by default.

    Raises:
        UsageError: there is no such dtype or opset; the network cannot be used (LCoAN's centres were never
            initialised), or has parameters that are not finite in that dtype.
    """

    def __init__(self, net: SRNetwork, dtype: str = 'float32', opset: int | None = None) -> None:
        if dtype not in DTYPES:
            raise UsageError(f'dtype {dtype}: valid are {", ".join(DTYPES)}')
        if opset is not None and opset not in OPSETS:
            raise UsageError(f'opset {opset}: valid are {OPSETS[0]} to {OPSETS[-1]}')
        self.dtype, self.opset = dtype, opset or DEFAULT_OPSET
        self.net = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
        for name, tensor in self.net.state_dict().items():
            if tensor.is_floating_point() and not tensor.to(DTYPES[dtype]).isfinite().all():
                raise UsageError(f'{name}: has numbers that are not finite in {dtype}')
        with dispatch.backend('reference'), torch.inference_mode():
            self.expected = {size: (x, self.net(x)) for size, x in _images()}

    def write(self, path: str | os.PathLike[str]) -> Exported:
        """Write, compare, and put into place.

        Args:
            path: The ending says what is written, see :data:`KINDS`. A file that is there is replaced.

        Raises:
            UsageError: another ending, no such folder, or a package is missing.
            DisagreementError: what was written computes something else; nothing is left of it.
            OSError: the file cannot be written.
        """
        path, started = Path(path), time.monotonic()
        check_target(path, self.dtype)
        write, load = {
            '.onnx': (self._write_onnx, self._load_onnx),
            '.pt2': (self._write_program, self._load_program),
            '.safetensors': (self._write_safetensors, self._load_safetensors),
        }[path.suffix]
        with write_atomically(path) as file:
            write(file)
            file.flush()
            errors, bound = self._compared(load(file.name), path)
        return Exported(path, KINDS[path.suffix], path.stat().st_size, errors, bound, time.monotonic() - started)

    @cached_property
    def converted(self) -> SRNetwork:
        """What is traced: folded, in the dtype, with the mean that is exact."""
        net = copy.deepcopy(self.net).fold_for_inference().to(DTYPES[self.dtype])
        net.mean = self.net.mean
        return net

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The network as torch.export's program, for any batch, height and width."""
        sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        with dispatch.backend('reference'), _quiet():
            program = torch.export.export(self.converted, (torch.rand(EXAMPLE),), dynamic_shapes=(sizes,))
        _share_indices(program)
        return program

    def _write_program(self, file: BinaryIO) -> None:
        with _quiet():
            described = {**describe(self.net), 'dtype': self.dtype}
            torch.export.save(self.program, file, extra_files={'attnsr.json': json.dumps(described)})

    def _load_program(self, name: str) -> Callable[[Tensor], Tensor]:
        with open(name, 'rb') as file, _quiet():
            return torch.export.load(file).module()

    def _write_onnx(self, file: BinaryIO) -> None:
        import onnx

        with dispatch.backend('reference'), _quiet():
            names: dict[str, Any] = {'input_names': ['image'], 'output_names': ['upscaled']}
            exported = torch.onnx.export(self.program, dynamo=True, verbose=False, opset_version=self.opset, **names)
        assert exported is not None
        model = exported.model_proto
        opset = {each.domain: each.version for each in model.opset_import}['']
        if opset != self.opset:
            raise UsageError(f'opset {self.opset}: these operators cannot be converted; {opset} would do')
        (image,), (upscaled,) = model.graph.input, model.graph.output
        scale, dims = self.net.upscale, ('batch', 'height', 'width')
        named = {image.type.tensor_type.shape.dim[i].dim_param: name for i, name in zip((0, 2, 3), dims, strict=True)}
        for value in (image, *model.graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = named.get(dim.dim_param, dim.dim_param)
        for i, name in zip((0, 2, 3), ('batch', f'{scale}*height', f'{scale}*width'), strict=True):
            upscaled.type.tensor_type.shape.dim[i].dim_param = name
        image.doc_string, upscaled.doc_string = IMAGE, UPSCALED.format(scale)
        onnx.helper.set_model_props(model, {**describe(self.net), 'dtype': self.dtype})
        onnx.checker.check_model(model)
        file.write(model.SerializeToString())

    def _load_onnx(self, name: str) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(name, providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(['upscaled'], {'image': x.numpy()})[0])

    def _write_safetensors(self, file: BinaryIO) -> None:
        net = copy.deepcopy(self.net).to(DTYPES[self.dtype])
        tensors = {name: tensor.contiguous() for name, tensor in checkpoints.to_published(net).items()}
        file.write(safetensors.torch.save(tensors, {'format': 'pt', **describe(self.net)}))

    def _load_safetensors(self, name: str) -> Callable[[Tensor], Tensor]:
        return checkpoints.load(name)

    def _compared(self, function: Callable[[Tensor], Tensor], path: Path) -> tuple[dict[Any, float], dict[Any, float]]:
        errors, bounds = {}, {}
        for size, (x, expected) in self.expected.items():
            with dispatch.backend('reference'), torch.inference_mode():
                y = function(x)
            if y.shape != expected.shape or y.dtype != expected.dtype:
                raise DisagreementError(
                    f'{path}: was not written: of images {tuple(x.shape)} it makes {tuple(y.shape)}, {y.dtype}; '
                    f'PyTorch makes {tuple(expected.shape)}, {expected.dtype}'
                )
            errors[size] = (y - expected).abs().max().item()
            bounds[size] = TOLERANCES[self.dtype] * max(1.0, expected.abs().max().item())
            if not errors[size] <= bounds[size]:  # nor is what is no number
                raise DisagreementError(
                    f'{path}: was not written: on images {tuple(x.shape)} it differs from PyTorch by '
                    f'{errors[size]:.2g}, which should be at most {bounds[size]:.2g} in {self.dtype}'
                )
        return errors, bounds


def check_target(path: Path, dtype: str = 'float32') -> None:
    """See that a file can be written before minutes are spent on what is to be in it.

    Raises:
        UsageError: it cannot.
    """
    if path.suffix not in KINDS:
        valid = ', '.join(f'{ending} ({kind})' for ending, kind in KINDS.items())
        raise UsageError(f'{path}: the ending of the name says what is written; valid are {valid}')
    if path.is_dir():
        raise UsageError(f'{path}: is a folder')
    if not path.parent.is_dir():
        raise UsageError(f'{path}: there is no folder {path.parent}')
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f'{path}: the folder {path.parent} cannot be written to')
    if path.suffix != '.onnx':
        return
    if dtype == 'bfloat16':
        raise UsageError(f'{path}: ONNX Runtime does not compute in bfloat16 on CPUs; valid are float32 and float16')
    missing = [each for each in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(each) is None]
    if missing:
        are = 'is' if len(missing) == 1 else 'are'
        raise UsageError(f"{path}: {' and '.join(missing)} {are} not installed: pip install 'attnsr[export]'")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``basicsr export``."""
    parser.add_argument(
        '-w', '--weights', required=True, metavar='FILE', help='checkpoint, or the folder of a training'
    )
    parser.add_argument(
        '-o',
        '--output',
        required=True,
        nargs='+',
        type=Path,
        metavar='FILE',
        help=f'what to write: {", ".join(KINDS)}',
    )
    parser.add_argument(
        '--network',
        metavar='NAME',
        help='what the weights are of: a published network or an option file; default: what the file tells',
    )
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='of the parameters and the computing; default: float32'
    )
    parser.add_argument('--opset', type=int, metavar='N', help=f'for ONNX; default: {DEFAULT_OPSET}')


def run(args: argparse.Namespace) -> None:
    """``basicsr export``.

    Raises:
        UsageError: the weights, a name or an option is wrong, or a file does not compute what the network computes.
        OSError: a file cannot be read or written.
    """
    for path in args.output:
        check_target(path, args.dtype)
    if args.opset is not None and all(path.suffix != '.onnx' for path in args.output):
        raise UsageError(f'--opset {args.opset}: is for ONNX, and no .onnx file is to be written; leave it out')
    if args.opset is not None and args.opset not in OPSETS:
        raise UsageError(f'--opset {args.opset}: valid are {OPSETS[0]} to {OPSETS[-1]}')
    weights = find_weights(args.weights)
    if any(path.exists() and path.samefile(weights) for path in args.output):
        raise UsageError(f'{weights}: would be replaced by what is made of it; name another file')
    net = load_network(args.network, weights)
    try:
        exporter = Exporter(net, args.dtype, args.opset)
    except UsageError as error:
        raise UsageError(f'{weights}: {error}') from None
    print(f'{weights}: {identify(net.state_dict())}, in {args.dtype}', flush=True)
    for path in args.output:
        if path.suffix != '.safetensors':
            print(f'{path}: takes a minute or several ...', file=sys.stderr, flush=True)
        print(exporter.write(path), flush=True)


def _images() -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in SIZES:
        yield (batch, height, width), torch.rand(batch, 3, height, width, generator=generator)


def _share_indices(program: torch.export.ExportedProgram) -> None:
    """Compute once what is computed several times of sizes and indices, such as each layer's order of the windows.

    That is most of the nodes of some networks, and converting takes time with their square.
    """
    graph = program.graph_module.graph
    calls = [node for node in graph.nodes if node.op == 'call_function']
    for node in calls:
        schema = getattr(node.target, '_schema', None)
        if schema is not None and schema.is_mutable and _is_index(node.args[0]):
            return  # an index that is written to is not what another one of the same origin is
    outputs = set(graph.output_node().all_input_nodes)
    seen: dict[Any, torch.fx.Node] = {}
    for node in calls:
        if node in outputs or not _is_index(node):
            continue
        leaves, form = pytree.tree_flatten((node.args, dict(node.kwargs)))
        key = node.target, str(form), tuple((type(leaf), leaf) for leaf in leaves)
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    program.graph_module.recompile()
    program.validate()


def _is_index(node: Any) -> bool:
    """Whether a node is a size, or a tensor of whole numbers or truth values."""
    value = node.meta.get('val') if isinstance(node, torch.fx.Node) else None
    return isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not value.is_floating_point())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what converters say on the way; what comes of it is looked at afterwards."""
    loggers = [logging.getLogger(name) for name in ('onnxscript', 'onnx_ir', 'torch.onnx', 'torch.export')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
