"""How everything is measured: agreement first, times in turns, memory at its highest, and the limits of the device."""

import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnsr.benchmarks import results
from attnsr.benchmarks.results import Figures, Measurement
from attnsr.ops import dispatch

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in results.DTYPES}

Call: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Call], float]

#: Of the rounds in which all contestants take their turn.
LEAST_ROUNDS, MOST_ROUNDS = 3, 50

# Clock cycles for which a GPU is kept busy while the host launches what is to be timed: at first and at most, which are
# 0.5 and 20 ms at 2 GHz; and before all else, until its clock is up.
CYCLES_AHEAD, MOST_CYCLES_AHEAD, WARMING_CYCLES = 10**6, 4 * 10**7, 10**8


@dataclass(frozen=True)
class Size:
    """What is worked on: a low-resolution map, or the patches of a training step.

    Attributes:
        name: For ``--size``.
        batch: Images.
        height: In pixels, as :attr:`width`.
        training: Whether these are patches of training.
    """

    name: str
    batch: int
    height: int
    width: int
    training: bool = False

    def rounded(self, multiple: int) -> 'Size':
        """With sides that are multiples of ``multiple``, at least as large."""
        height, width = (-(-side // multiple) * multiple for side in (self.height, self.width))
        return Size(self.name, self.batch, height, width, self.training)

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width


#: The maps from which x4 makes an output of 720p, 1080p and 4K; the patches of a training; and smaller ones.
SIZES = {
    size.name: size
    for size in (
        Size('720p', 1, 180, 320),
        Size('1080p', 1, 270, 480),
        Size('4K', 1, 540, 960),
        Size('training', 32, 64, 64, training=True),
        Size('patches', 4, 64, 64, training=True),
        Size('small', 1, 96, 96),
        Size('tiny', 1, 32, 48),
        Size('tiny_patches', 2, 16, 16, training=True),
    )
}


@dataclass(frozen=True)
class Limits:
    """What a device reaches at most, as measured on it.

    Attributes:
        bytes_per_second: Read and written, in a copy of a large tensor.
        flops_per_second: Of the product of two large matrices, for each dtype.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def least_seconds(self, moved: int, flops: int, dtype: str) -> tuple[float, str]:
        """The least time in which so many bytes are moved and so many operations done, and which of the two it is."""
        return max((moved / self.bytes_per_second, 'bandwidth'), (flops / self.flops_per_second[dtype], 'arithmetic'))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Operations run on this backend."""
    before = dispatch.get_backend()
    dispatch.set_backend(name)
    try:
        yield
    finally:
        dispatch.set_backend(before)


def agreeing(
    result: Measurement,
    contestants: Mapping[str, Callable[[], tuple[Call, float]]],
    optional: Collection[str] = (),
    kernels: Collection[str] = (),
) -> dict[str, tuple[Call, float]]:
    """The contestants that compute what is right; why others have no figures is noted in the result.

    Args:
        result: Has the bound.
        contestants: For each what is to be timed, and its error.
        optional: Names of those that may break without being a failure: compilers that lack what they need.
        kernels: Names of those that must be had wherever the base of the result is: that they do not support something,
            or need more memory than it, is a failure.

    Returns:
        What is to be timed, and its error.
    """
    found = {}
    for name, prepare in contestants.items():
        try:
            call, error = prepare()
        except (dispatch.BackendError, torch.OutOfMemoryError) as reason:
            result.absent[name] = _first_line(reason)
        except Exception as reason:  # one that breaks leaves the others
            broken = result.absent if name in optional else result.failed
            broken[name] = told(reason)
        else:
            if agrees(result, name, error):
                found[name] = call, error
    if result.base in found:
        for name in (each for each in kernels if each in result.absent):
            result.failed[name] = result.absent.pop(name)
    return found


def agrees(result: Measurement, name: str, error: float) -> bool:
    """Whether a contestant's error is within the bound; noted in the result if it is not."""
    if error <= result.bound:
        return True
    result.failed[name] = f'its error is {error:.2g}, and the bound is {result.bound:g}'
    return False


def measure(
    result: Measurement,
    contestants: Mapping[str, tuple[Call, float]],
    timer: Timer,
    device: str,
    seconds: float,
    without_memory: Collection[str] = (),
) -> None:
    """Put the figures of the contestants that agree into the result."""
    taken = in_turns({name: call for name, (call, _) in contestants.items()}, timer, seconds)
    for name, (call, error) in contestants.items():
        result.figures[name] = figures(taken[name], error)
        if name not in without_memory:
            result.figures[name].peak = peak_memory(call, device)


def figures(times: list[float], error: float) -> Figures:
    """Those of times and agreement."""
    return Figures(median(times), min(times), max(times), len(times), error)


def wall_timer(device: str) -> Timer:
    """Seconds from the call until everything is computed."""

    def seconds(call: Call) -> float:
        _finish(device)
        started = time.perf_counter()
        call()
        _finish(device)
        return time.perf_counter() - started

    return seconds


@cache
def operation_timer(device: str) -> Timer:
    """Seconds that the device works on a single operation.

    On a GPU this is without the time in which the host launches the kernels, which other work hides in a network: the
    GPU is kept busy meanwhile, for each call as long as it takes. And nothing is left in its cache by the call before.
    """
    if device != 'cuda':
        return wall_timer(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cache = torch.empty(2**28, dtype=torch.int8, device='cuda')
    cycles_ahead: WeakKeyDictionary[Call, int] = WeakKeyDictionary()
    torch.cuda._sleep(WARMING_CYCLES)

    def seconds(call: Call) -> float:
        while True:
            ahead = cycles_ahead.setdefault(call, CYCLES_AHEAD)
            torch.cuda.synchronize()
            cache.zero_()
            torch.cuda._sleep(ahead)
            begin.record()
            call()
            waited = begin.query()  # the GPU was there before all was launched
            end.record()
            end.synchronize()
            if not waited or ahead == MOST_CYCLES_AHEAD:
                return begin.elapsed_time(end) / 1e3
            cycles_ahead[call] = min(2 * ahead, MOST_CYCLES_AHEAD)

    return seconds


def in_turns(calls: Mapping[str, Call], timer: Timer, seconds: float) -> dict[str, list[float]]:
    """The times of each call; a machine that slows down slows all of them.

    Args:
        calls: What is timed, by name; each is called once beforehand, to warm up.
        timer: How.
        seconds: No round begins after these, once there were :data:`LEAST_ROUNDS`.
    """
    for call in calls.values():
        timer(call)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            taken[name].append(timer(call))
    return taken


def peak_memory(call: Call, device: str) -> int:
    """Bytes that PyTorch's allocator gave out during a call, at the highest moment beyond what it had before."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler is not to tell that it begins and ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def limits(device: str, dtypes: Sequence[str]) -> Limits:
    """Measure the limits of a device."""
    timer = operation_timer(device)
    source = torch.ones(2**29 if device == 'cuda' else 2**26, device=device)
    seconds = _least(partial(torch.empty_like(source).copy_, source), timer)
    return Limits(
        2 * source.nbytes / seconds, {dtype: _flops_per_second(device, DTYPES[dtype], timer) for dtype in dtypes}
    )


def _flops_per_second(device: str, dtype: torch.dtype, timer: Timer) -> float:
    side = 8192 if device == 'cuda' else 2048
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return 2 * side**3 / _least(partial(torch.mm, a, b, out=out), timer)


def _least(call: Call, timer: Timer) -> float:
    return min(in_turns({'': call}, timer, seconds=0.5)[''])


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph: launched at once, and always with the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def machine(device: str) -> str:
    """What the device is called."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    models = re.findall(r'^model name\s*:\s*(.+)$', cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f'{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores'


def told(reason: Exception) -> str:
    """An error in one line."""
    return f'{type(reason).__name__}: {_first_line(reason)}'


def _first_line(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [''])[0]


def _finish(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()
