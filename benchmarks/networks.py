"""How fast and how large are whole networks?

On the CPU, inference against SwinIR in its lightweight setting. All networks run in one process in turns, which does
nothing else, since what ran before decides how much memory the C library gives back and must fetch anew: with glibc as
it comes, a network of many large intermediate maps spends half its time on that. So times are taken twice, with the C
library as it comes and told to keep all memory. Memory is that of the first forward in a fresh process.

On a GPU, inference and steps of training on our kernels against the same network on our reference.

Inference of the reference as torch.compile makes it takes part where it is asked for: compiling takes minutes.

Before anything is measured, what a network gives is compared with the reference in double precision.
"""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from basicsr.archs.swinir_arch import SwinIR, SwinTransformerBlock
from torch import Tensor, nn

from attnsr.archs.lcoan_arch import SphericalKMeans
from attnsr.archs.variants import VARIANTS
from attnsr.benchmarks.measuring import (
    DTYPES,
    Call,
    Size,
    agreeing,
    agrees,
    backend,
    captured,
    figures,
    in_turns,
    measure,
    told,
    wall_timer,
)
from attnsr.benchmarks.published_lcoan import PublishedLCoAN
from attnsr.benchmarks.results import NETWORKS, Measurement

SCALE = 4

#: Measured where none is named.
DEFAULT = ('elan_light', 'asid', 'dlgsanet_light', 'lcoan')

#: Largest error of an element of the image, as a fraction of the standard deviation of all its elements.
BOUNDS = {'float32': 1e-4, 'bfloat16': 0.2}

#: Of a step of training: the norm of the error of all gradients, as a fraction of their norm. In LCoAN a single token
#: between two clusters, which rounding sends into the other one, is 7e-3 of it.
TRAINING_BOUNDS = {'float32': 2e-2, 'bfloat16': 0.1}

# LR map on which agreement is checked: large enough that inference works in several pieces; and patches for gradients.
CHECKED, CHECKED_PATCHES = Size('checked', 1, 64, 96), Size('checked', 2, 32, 32, training=True)

# Has glibc keep the memory that is freed.
KEEPING = {'MALLOC_MMAP_THRESHOLD_': str(2**30), 'MALLOC_TRIM_THRESHOLD_': str(2**33)}

DEVICE = 'cuda'  # of what is not measured in fresh processes

KERNEL, REFERENCE, GRAPH, COMPILED = 'kernel', 'reference', ', CUDA graph', 'torch.compile'


@dataclass(frozen=True)
class Entry:
    """A network that can be measured.

    Attributes:
        title: Its name in tables.
        build: It, for x4.
        multiple: The sides of its input must be multiples of this; for SwinIR of its windows, since it pads nothing.
    """

    title: str
    build: Callable[[], nn.Module]
    multiple: int = 1


def swinir_light() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid')
        return SwinIR(
            upscale=SCALE,
            img_size=64,
            window_size=8,
            img_range=1.0,
            embed_dim=60,
            depths=[6] * 4,
            num_heads=[6] * 4,
            mlp_ratio=2,
            upsampler='pixelshuffledirect',
        )


ENTRIES = {
    **{variant.name: Entry(variant.title, partial(variant.build, SCALE)) for variant in VARIANTS.values()},
    'swinir_light': Entry('SwinIR-light', swinir_light, multiple=8),
    'published_lcoan': Entry('LCoAN as published', partial(PublishedLCoAN, upscale=SCALE)),
}


def default_sizes(name: str, device: str) -> tuple[str, ...]:
    """Of :data:`attnsr.benchmarks.measuring.SIZES`, what a network is measured on where nothing is said."""
    if device == 'cuda':
        return ('720p', '1080p', 'training', '4K')
    return ('small',) if name == 'lcoan' else ('720p',)


def measurements(
    name: str, size: Size, device: str, dtypes: Sequence[str], seconds: float, compiled: bool = False
) -> Iterator[Measurement]:
    """Measure a network.

    Args:
        name: Of :data:`attnsr.archs.variants.VARIANTS`.
        size: Of the LR input; steps of training are measured on a GPU.
        device: ``'cpu'`` or ``'cuda'``.
        dtypes: Of :data:`attnsr.benchmarks.measuring.DTYPES`.
        seconds: For the rounds of one comparison.
        compiled: Whether torch.compile of the reference takes part; in inference only.
    """
    on_device = _on_cpu if device == 'cpu' else _on_gpu
    for dtype in dtypes:
        result = on_device(name, size, dtype, seconds, compiled)
        if not (compiled or size.training):
            result.absent[COMPILED] = 'not asked for by --with'
        yield result


def _baseline(name: str) -> str:
    return 'published_lcoan' if name == 'lcoan' else 'swinir_light'


def _result(name: str, size: Size, dtype: str, base: str) -> Measurement:
    return Measurement(
        what=NETWORKS,
        case=ENTRIES[name].title,
        size=size.name,
        extent=(size.batch, size.height, size.width),
        dtype=dtype,
        computed='training step' if size.training else 'forward',
        base=base,
        bound=(TRAINING_BOUNDS if size.training else BOUNDS)[dtype],
    )


# Of a comparison on the CPU: network, dtype, and whether torch.compile makes it.
Contestant: TypeAlias = tuple[str, str, bool]


@dataclass(frozen=True)
class Request:
    """What a fresh process is to do.

    Attributes:
        part: ``'alone'``: memory and agreement of the first contestant. ``'in turns'``: times of all.
        contestants: Those of the comparison that take part.
        size: Of the LR input.
        threads: Of PyTorch.
        seconds: For the rounds.
    """

    part: str
    contestants: list[Contestant]
    size: Size
    threads: int
    seconds: float


def _on_cpu(name: str, size: Size, dtype: str, seconds: float, compiled: bool) -> Measurement:
    base = _baseline(name)
    own: Contestant = (name, dtype, False)
    asked_for = [(base, 'float32', False), (base, dtype, False), own, *([(name, dtype, True)] if compiled else [])]
    contestants = {_label(each): each for each in asked_for}
    result = _result(name, size, dtype, next(iter(contestants)))
    request = Request('alone', [], size, torch.get_num_threads(), seconds)
    alone = {}
    for label, contestant in contestants.items():
        try:
            found = _in_fresh_process(replace(request, contestants=[contestant]))
        except subprocess.CalledProcessError as ended:
            _, _, optional = contestant
            (result.absent if optional else result.failed)[label] = _death(ended)
        else:
            if agrees(result, label, found['error']):
                alone[label] = found
    if not alone:
        return result
    request = replace(request, part='in turns', contestants=[contestants[label] for label in alone])
    try:
        all_times, all_kept = _in_fresh_process(request), _in_fresh_process(request, KEEPING)
    except subprocess.CalledProcessError as ended:
        result.failed.update(dict.fromkeys(alone, _death(ended)))
        return result
    for (label, found), times, kept in zip(alone.items(), all_times, all_kept, strict=True):
        of = result.figures[label] = figures(times, found['error'])
        of.held, of.peak, of.seconds_kept = found['held'], found['peak'], median(kept)
    result.remarks = _remarks(result, size, _label(own), ENTRIES[base].multiple)
    return result


def _label(contestant: Contestant) -> str:
    name, dtype, compiled = contestant
    return f'{ENTRIES[name].title}, {dtype}' + (f', {COMPILED}' if compiled else '')


def _remarks(result: Measurement, size: Size, own: str, multiple: int) -> list[str]:
    remarks = [
        f'{own} is {of.seconds / result.figures[own].seconds:.2f} times as fast as {other}'
        for other, of in result.figures.items()
        if own in result.figures and other != own
    ]
    padded = size.rounded(multiple)
    if padded != size:
        remarks.append(f'the input of {result.base} is {padded.height} x {padded.width}, in whole windows')
    return remarks


def _in_fresh_process(request: Request, environment: Mapping[str, str] | None = None) -> Any:
    """What a fresh process answers.

    Raises:
        CalledProcessError: it ended otherwise.
    """
    command = [sys.executable, '-m', 'attnsr.benchmarks.networks', json.dumps(asdict(request))]
    environment = os.environ | (environment or {})
    ended = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    return json.loads(ended.stdout)


def _death(ended: subprocess.CalledProcessError) -> str:
    """Why a process has no answer: in its own last words, where it had any."""
    return ': '.join([f'its process ended with status {ended.returncode}', *ended.stderr.strip().splitlines()[-1:]])


def _answer(request: Request) -> Any:
    """What a fresh process is for."""
    torch.set_num_threads(request.threads)
    with backend('reference'):
        calls = [_forward(contestant, request.size) for contestant in request.contestants]
        if request.part == 'in turns':
            timer = wall_timer('cpu')
            return list(in_turns({str(i): call for i, call in enumerate(calls)}, timer, request.seconds).values())
        (contestant,), (call,) = request.contestants, calls
        memory = _memory_of(call)  # first, as there is nothing yet to use again
        _, _, compiled = contestant
        if compiled:
            memory = dict.fromkeys(memory)  # that was the compiler's
        return {**memory, 'error': _error_of(contestant)}


def _forward(contestant: Contestant, size: Size) -> Call:
    """An inference on a random image."""
    name, dtype, compiled = contestant
    net = _network(name).to(DTYPES[dtype]).eval()
    size = size.rounded(ENTRIES[name].multiple)
    return partial(_infer, _compiled(net) if compiled else net, _images(size).to(DTYPES[dtype]))


def _compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled anew for each size."""
    return torch.compile(net, dynamic=False)


def _infer(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)  # in which SwinIR makes its masks on every forward
    try:
        with torch.inference_mode():
            return net(x)
    finally:
        torch.set_default_dtype(before)


def _memory_of(call: Call) -> dict[str, int | None]:
    """Bytes in the process before a call, and those beyond them at the highest moment of it."""
    Path('/proc/self/clear_refs').write_text('5')  # forgets the peak of loading
    held = _resident('VmRSS')
    call()
    return {'held': held, 'peak': _resident('VmHWM') - held}


def _resident(field: str) -> int:
    """Bytes in memory, now (VmRSS) or at most so far (VmHWM). Not ``ru_maxrss``, which begins with the parent's."""
    return 1024 * int(re.findall(rf'^{field}:\s*(\d+) kB$', Path('/proc/self/status').read_text(), re.MULTILINE)[0])


def _error_of(contestant: Contestant) -> float:
    name, dtype, compiled = contestant
    net = _trained_once(_network(name)).to(DTYPES[dtype]).eval()
    x = _images(CHECKED).to(DTYPES[dtype])
    return _error(_infer(_compiled(net) if compiled else net, x), _exact(net, x))


def _on_gpu(name: str, size: Size, dtype: str, seconds: float, compiled: bool) -> Measurement:
    result = _result(name, size, dtype, REFERENCE)
    contestants = (_steps if size.training else _inferences)(name, size, DTYPES[dtype])
    if not compiled:
        contestants.pop(COMPILED, None)
    torch.compiler.reset()
    optional = [REFERENCE + GRAPH, COMPILED, ENTRIES[_baseline(name)].title]
    tried = {contestant: partial(_tried, prepare) for contestant, prepare in contestants.items()}
    agreed = agreeing(result, tried, optional=optional, kernels=[KERNEL])
    measure(result, agreed, wall_timer('cuda'), 'cuda', seconds, without_memory=[KERNEL + GRAPH, REFERENCE + GRAPH])
    return result


def _know_masks(net: nn.Module, x: Tensor) -> None:
    """Has SwinIR keep its masks for images of this size; it would make them on the CPU on every forward."""
    for block in net.modules():
        if isinstance(block, SwinTransformerBlock):
            block.input_resolution = tuple(x.shape[2:])
            block.attn_mask = block.calculate_mask(block.input_resolution).to(x) if block.shift_size else None


def _tried(prepare: Callable[[], tuple[Call, float]]) -> tuple[Call, float]:
    """What agrees on little is called once on what is timed, for which the memory may not suffice."""
    call, error = prepare()
    call()
    return call, error


def _inferences(name: str, size: Size, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Call, float]]]:
    """Contestants for :func:`attnsr.benchmarks.measuring.agreeing`."""
    net = _trained_once(_network(name)).to(DEVICE, dtype).eval()
    base = _network(_baseline(name)).to(DEVICE, dtype).eval()
    checked, x = _images(CHECKED).to(DEVICE, dtype), _images(size).to(DEVICE, dtype)
    base_x = _images(size.rounded(ENTRIES[_baseline(name)].multiple)).to(DEVICE, dtype)
    _know_masks(base, base_x)
    expected = _exact(net, checked)

    def on(used: str, image: Tensor, model: Callable[[Tensor], Tensor] = net) -> Tensor:
        with backend(used):
            return _infer(model, image)

    def eager(used: str) -> tuple[Call, float]:
        return partial(on, used, x), _error(on(used, checked), expected)

    def graph(used: str) -> tuple[Call, float]:
        return captured(partial(on, used, x)), _error(captured(partial(on, used, checked))(), expected)

    def compiled() -> tuple[Call, float]:
        model = _compiled(net)
        return partial(on, 'reference', x, model), _error(on('reference', checked, model), expected)

    def baseline() -> tuple[Call, float]:
        return partial(_infer, base, base_x), _error(_infer(base, checked), _exact(base, checked))

    return {
        KERNEL: partial(eager, 'triton'),
        REFERENCE: partial(eager, 'reference'),
        KERNEL + GRAPH: partial(graph, 'triton'),
        REFERENCE + GRAPH: partial(graph, 'reference'),
        COMPILED: compiled,
        ENTRIES[_baseline(name)].title: baseline,
    }


def _steps(name: str, size: Size, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Call, float]]]:
    """As :func:`_inferences`, of steps of training: parameters are in float32, and in half precision under autocast."""
    net = _trained_once(_network(name)).to(DEVICE).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    checked, x = _images(CHECKED_PATCHES).to(DEVICE), _images(size).to(DEVICE)
    target = torch.rand(size.batch, 3, SCALE * size.height, SCALE * size.width, device=DEVICE)
    expected = _gradients(copy.deepcopy(net).double(), checked.double(), 'reference', torch.float64)

    def step(used: str) -> None:
        optimizer.zero_grad()
        _loss(net, x, target, used, dtype).backward()
        optimizer.step()

    def prepare(used: str) -> tuple[Call, float]:
        found = _gradients(copy.deepcopy(net), checked, used, dtype)
        return partial(step, used), ((found - expected).norm() / expected.norm()).item()

    return {KERNEL: partial(prepare, 'triton'), REFERENCE: partial(prepare, 'reference')}


def _loss(net: nn.Module, x: Tensor, target: Tensor, used: str, dtype: torch.dtype) -> Tensor:
    half = dtype == torch.bfloat16
    with backend(used), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
        return F.l1_loss(net(x), target)


def _gradients(net: nn.Module, x: Tensor, used: str, dtype: torch.dtype) -> Tensor:
    """Those of all parameters, in float64."""
    target = F.interpolate(x, scale_factor=SCALE, mode='bicubic')
    gradients = torch.autograd.grad(_loss(net, x, target, used, dtype), list(net.parameters()))
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = ENTRIES[name].build()
    if any(isinstance(module, SphericalKMeans) for module in net.modules()):
        _trained_once(net)  # without cluster centres there is no inference
    return net


def _trained_once(net: nn.Module) -> nn.Module:
    """It, with the statistics of BatchNorm and the centres of k-means from a batch.

    Features that nothing has normalised saturate every softmax, where rounding decides.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad(), backend('reference'):
        net.train()(torch.rand(1, 3, 32, 32))
    for norm in norms:
        norm.momentum = 0.1
    return net


def _images(size: Size) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(size.batch, 3, size.height, size.width)


def _exact(net: nn.Module, x: Tensor) -> Tensor:
    """What a network gives under autograd in double precision."""
    with backend('reference'):
        return copy.deepcopy(net).double()(x.double()).detach()


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.std()).item()


if __name__ == '__main__':
    fields = json.loads(sys.argv[1])
    try:
        answer = _answer(Request(**{**fields, 'size': Size(**fields['size'])}))
    except Exception as reason:
        sys.exit(told(reason))
    print(json.dumps(answer))
