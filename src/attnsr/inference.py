"""Networks prepared for inference: on their device, in their dtype, with everything combined that can be."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attnsr.archs.arch_util import SRNetwork
from attnsr.errors import UsageError

__all__ = ['DTYPES', 'Dtype', 'PreparedNetwork', 'choose_device', 'exact_convolutions']

#: What a network may compute in; images enter and leave in float32.
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

Dtype: TypeAlias = Literal['auto', 'float32', 'bfloat16', 'float16']

#: Side in pixels of the image that a GPU's memory is measured with.
PROBE = 128

#: CUDA graphs that are kept, each for one shape of the input: a picture in tiles has four.
GRAPHS = 8


def choose_device(device: str | torch.device = 'auto') -> torch.device:
    """``'auto'`` is the current CUDA device where there is one, and the CPU elsewhere.

    Raises:
        UsageError: there is no such device here; the message names those that there are.
    """
    cuda = torch.cuda.is_available()
    if device == 'auto':
        return torch.device('cuda' if cuda else 'cpu')
    valid = ['auto', 'cpu', *(['cuda', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))] if cuda else [])]
    if str(device) not in valid:
        reason = '' if cuda or not str(device).startswith('cuda') else ': this PyTorch finds no CUDA device'
        raise UsageError(f'device {device}{reason}; valid here: {", ".join(valid)}')
    return torch.device(device)


class PreparedNetwork:
    """A network in eval mode on its device, called with whole images. May be used from several threads at once.

    Args:
        net: The network; it is moved and converted in place, and belongs to this object from now on.
        device: See :func:`choose_device`.
        dtype: What it computes in, by its name or as PyTorch's; ``'auto'`` is float32.
        fast: Replay CUDA graphs: what is launched for one shape of the input is recorded when it comes for the second
            time, and then launched all at once. The same kernels compute the same result.
        compiled: Have ``torch.compile`` compile the network, when it is first called and again for other sizes, which
            takes a minute or several. The result differs by rounding.

    Attributes:
        net: The network.
        scale: Its scale factor.
        device: Where it computes.
        dtype: What it computes in.
        fast: Whether CUDA graphs are replayed.

    Raises:
        UsageError: there is no such device or dtype, or no CUDA graphs on this device.
    """

    def __init__(
        self,
        net: SRNetwork,
        device: str | torch.device = 'auto',
        dtype: Dtype | torch.dtype = 'auto',
        fast: bool = False,
        compiled: bool = False,
    ) -> None:
        name = str(dtype).removeprefix('torch.')
        if name not in ('auto', *DTYPES):
            raise UsageError(f'dtype must be one of auto, {", ".join(DTYPES)}, got {name}')
        self.device = choose_device(device)
        if fast and self.device.type != 'cuda':
            raise UsageError(f'fast: replays CUDA graphs, and the device is {self.device}; leave it out there')
        self.dtype, self.fast = DTYPES['float32' if name == 'auto' else name], fast
        net = net.eval().requires_grad_(False).fold_for_inference()  # in the precision of the checkpoint
        mean = net.mean
        self.net = net.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        self.net.mean = None if mean is None else mean.to(self.device)  # images are centred in float32
        self._compute = torch.compile(self.net) if compiled else self.net
        self.scale = net.upscale
        self._graphs: OrderedDict[torch.Size, _Graph | None] = OrderedDict()
        self._graphs_in_use = threading.Lock()

    @cached_property
    def bytes_per_pixel(self) -> float:
        """Memory that the forward of one image takes at most beyond the parameters, by LR pixel.

        On a GPU it is measured, on a small image; CPUs do not count, and there it is what each class of networks says.
        """
        if self.device.type == 'cuda':
            return self._measured(PROBE)
        channels = len(next(self.net.parameters()))  # of the first convolution
        return self.net.bytes_per_channel * channels * self.dtype.itemsize / 4

    def _measured(self, side: int) -> float:
        """Of a GPU's allocator, for a square image."""
        with torch.inference_mode(), self._precision():
            x = torch.rand(1, 3, side, side, device=self.device)
            self.net(x)  # kernels may try configurations at first
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.net(x)
        return (torch.cuda.max_memory_allocated(self.device) - before) / side**2

    def __call__(self, x: Tensor) -> Tensor:
        """Upscale whole images.

        Args:
            x: (B, 3, H, W), float32, RGB in [0, 1], on any device.

        Returns:
            (B, 3, scale * H, scale * W), float32, not clipped, on :attr:`device`.
        """
        with torch.inference_mode(), self._precision():
            x = x.to(self.device, torch.float32)
            return self._replayed(x) if self.fast else self._compute(x)

    def _precision(self) -> AbstractContextManager[None]:
        exact = self.device.type == 'cuda' and self.dtype == torch.float32
        return exact_convolutions() if exact else nullcontext()

    def _replayed(self, x: Tensor) -> Tensor:
        with self._graphs_in_use, torch.cuda.device(self.device):
            if x.shape not in self._graphs:  # it may never come again
                self._graphs[x.shape] = None
                while len(self._graphs) > GRAPHS:
                    self._graphs.popitem(last=False)
                return self._compute(x)
            graph = self._graphs[x.shape] or self._recorded(x)
            self._graphs[x.shape] = graph
            self._graphs.move_to_end(x.shape)
            # Another thread may be on another stream, and what it has launched must be done with x and y.
            torch.cuda.current_stream().wait_event(graph.done)
            graph.x.copy_(x)
            graph.graph.replay()
            y = graph.y.clone()
            graph.done.record()
            return y

    def _recorded(self, x: Tensor) -> '_Graph':
        x, graph = x.clone(), torch.cuda.CUDAGraph()
        # On a stream of its own first: libraries set themselves up then, which cannot be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(x)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may go on with their own work on the GPU.
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):
            y = self._compute(x)
        return _Graph(graph, x, y, torch.cuda.Event())


@dataclass(frozen=True)
class _Graph:
    """What is launched for an input of one shape, which is at ``x``, and leaves its output at ``y``."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    done: torch.cuda.Event


_precision_in_use = threading.Lock()
_exact_users = 0
_before: list[tuple[bool, tuple[str, str]]] = []


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 is convolved in float32: by default PyTorch has cuDNN do it in TF32, which has ten bits of 23.

    The setting belongs to the process. It is as it was when the last thread that is within leaves.
    """
    global _exact_users
    with _precision_in_use:
        if not _exact_users:
            _before[:] = [_precision_of_convolutions()]
            _set_precision_of_convolutions(False, ('ieee', 'ieee'))
        _exact_users += 1
    try:
        yield
    finally:
        with _precision_in_use:
            _exact_users -= 1
            if not _exact_users:
                _set_precision_of_convolutions(*_before.pop())


def _precision_of_convolutions() -> tuple[bool, tuple[str, str]]:
    """By PyTorch's older name of the setting, and by its newer ones."""
    cudnn: Any = torch.backends.cudnn  # whose annotations lack what follows
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        return cudnn.allow_tf32, precisions
    except RuntimeError:  # PyTorch says the older one only where all agree
        return precisions[0] != 'tf32', precisions


def _set_precision_of_convolutions(allow_tf32: bool, precisions: tuple[str, str]) -> None:
    """By all names, lest who asks by another be told that they disagree; the older one sets the newer ones too."""
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allow_tf32
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions
