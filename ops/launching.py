"""Launching Triton kernels: on the device of their tensors, in Triton's interpreter, or only noted down.

Imports Triton: nothing imports this module before a kernel is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# How every kernel is compiled: a product and the sum it goes into are rounded once, as in PyTorch's own kernels.
OPTIONS = {'enable_fp_fusion': True}

_launches: list['Launch'] | None = None


@dataclass(frozen=True)
class Launch:
    """A launch that was noted down: all that decides what a kernel is compiled to.

    Attributes:
        kernel: The ``triton.jit`` function.
        arguments: {name: value} of those that are no constants, in their order.
        constants: {name: value} of the ``tl.constexpr``.
        num_warps: Warps in a program.
        num_stages: Depth of the pipelining of loads.
    """

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Tensor | float | None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs along up to three axes; nothing runs where one is 0.
        arguments: All arguments that are no ``tl.constexpr``, in order, the first a tensor; the kernel runs on its
            device.
        num_warps: Warps in a program.
        num_stages: Depth of the pipelining of loads.
        constants: All ``tl.constexpr`` arguments.
    """
    if 0 in grid:
        return
    if _launches is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        _launches.append(Launch(kernel, dict(zip(names, arguments, strict=True)), constants, num_warps, num_stages))
        for x in arguments:
            if isinstance(x, Tensor):
                x.data.zero_()  # what comes after may use indices that were to be computed here
        return
    assert isinstance(arguments[0], Tensor)
    on_gpu = arguments[0].is_cuda
    with torch.cuda.device(arguments[0].device if on_gpu else -1):
        kernel[tuple(grid)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, **OPTIONS)


def input_precision(x: Tensor) -> str:
    """``input_precision`` of ``tl.dot``: products of float32 are TF32 where PyTorch may take its own so.

    Triton has no TF32 on AMD.
    """
    if x.dtype != torch.float32:
        return 'ieee'  # of half precision, products are as they are
    # Not allow_tf32, which raises where the caller has used fp32_precision.
    tf32 = torch.backends.cuda.matmul.fp32_precision == 'tf32'
    return 'tf32' if tf32 and torch.version.hip is None else exact_precision()


def exact_precision() -> str:
    """``input_precision`` of products that are to be of float32's precision.

    Of two parts of each factor, three products of TF32, which have about 21 bits, on tensor cores; those of float32 in
    full are made without them.
    """
    return 'tf32x3' if torch.version.hip is None else 'ieee'


def wide_precision(x: Tensor) -> str:
    """As :func:`input_precision`, of products beyond the range of float16: TF32 there, which has as many digits."""
    return 'tf32' if x.dtype == torch.float16 and torch.version.hip is None else input_precision(x)


def is_exact(x: Tensor) -> bool:
    """Whether products are of float32's precision, which takes more registers: few terms at a time then."""
    return x.dtype == torch.float32 and input_precision(x) != 'tf32'


def padded(size: int) -> int:
    """What products, whose blocks are powers of 2 and at least 16, have instead of a size."""
    return max(16, triton.next_power_of_2(size))


def runs_on_cpu() -> bool:
    """Whether kernels take tensors on the CPU: in Triton's interpreter, or where launches are noted down only."""
    return _launches is not None or isinstance(_probe, InterpretedFunction)


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches are noted in the list and not run; what kernels would have written, and their inputs, are set to 0."""
    global _launches
    launches: list[Launch] = []
    _launches = launches
    try:
        yield launches
    finally:
        _launches = None


@triton.jit
def _probe() -> None:
    pass
