"""Which implementation an operation runs on: the Triton kernel beside its reference, or the reference itself."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from attnsr.errors import UsageError

BACKENDS = ('auto', 'reference', 'triton')

#: Read once, when an operation is first used; :func:`set_backend` goes before it.
VARIABLE = 'ATTNSR_BACKEND'

#: Of the tensors that the kernels compute on; sums and statistics are in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The kernels use tensor cores as they are since Ampere.
LEAST_CAPABILITY = (8, 0)

# Below BasicSR's own logger, so that a training's log file has it too.
logger = logging.getLogger('basicsr.attnsr')

_backend: str | None = None
_logged: set[tuple[str, str]] = set()


class BackendError(UsageError, RuntimeError):
    """The kernels were asked for by name, and cannot be had."""


def set_backend(name: str) -> None:
    """Choose what the operations of all networks run on, in this process, from now on.

    Args:
        name: ``'auto'``: Triton kernels for the CUDA tensors that they support, and plain PyTorch otherwise; why it
            is not the kernel is logged, each reason once. ``'reference'``: plain PyTorch. ``'triton'``: the kernels;
            where they cannot be had, the operation raises :class:`BackendError`.

    Raises:
        ValueError: the name is none of these.
    """
    global _backend
    _backend = _checked(name, 'the backend')


def get_backend() -> str:
    """What :func:`set_backend` was given last, or else the environment's ``ATTNSR_BACKEND``, or ``'auto'``.

    Raises:
        UsageError: the environment names none that there is.
    """
    global _backend
    if _backend is None:
        try:
            _backend = _checked(os.environ.get(VARIABLE) or 'auto', VARIABLE)
        except ValueError as error:
            raise UsageError(str(error)) from None
    return _backend


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """What operations within run on, see :func:`set_backend`, whatever was chosen before, which then holds again."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def use_triton(operation: str, x: Tensor, unsupported: str | None = None, slower: str | None = None) -> bool:
    """Whether an operation runs on its Triton kernel.

    Args:
        operation: Its name, for messages.
        x: Its main input, as the kernel would get it.
        unsupported: Why the kernel cannot serve this call, or None; goes on from "... the kernel is not used: ".
        slower: Why it should not although it can, unless it is asked for by name; or None.

    Raises:
        BackendError: ``'triton'`` was asked for, and is not to be had.
    """
    backend = get_backend()
    if backend == 'reference' or x.is_meta:  # on the meta device nothing is computed, and operations are counted
        return False
    reason = _refusal(x.device, x.dtype, backend == 'triton', _exports_to_onnx()) or unsupported
    if reason is None and backend == 'auto':
        reason = slower
    if reason is None:
        return True
    if backend == 'triton':
        raise BackendError(f'{operation}: {_NOT_TO_BE_HAD}{reason}')
    _log_once('every operation' if x.device.type == 'cpu' else operation, reason, x.device.type)
    return False


def unavailable(device: torch.device) -> str | None:
    """Why what was asked for is not to be had on a device, whatever is computed there, or None."""
    reason = _refusal(device, torch.float32, True, False) if get_backend() == 'triton' else None
    return reason and _NOT_TO_BE_HAD + reason


_NOT_TO_BE_HAD = "the backend 'triton' was asked for, and cannot be had: "


# Compilers take what the next two return for a constant, and do not look inside.
@torch.compiler.assume_constant_result
def _refusal(device: torch.device, dtype: torch.dtype, asked_for: bool, to_onnx: bool) -> str | None:
    """Why no kernel can work on such tensors, or None."""
    if not _has_triton():
        return 'Triton is not installed'
    if to_onnx:
        return 'ONNX has no such operators'
    if device.type == 'cpu' and not asked_for:
        return 'the tensors are on the CPU'
    if device.type == 'cpu' and not _runs_on_cpu():
        return (
            "the tensors are on the CPU, where Triton's kernels run in its interpreter only "
            '(TRITON_INTERPRET=1 before Python starts)'
        )
    if device.type not in ('cpu', 'cuda'):
        return f'the tensors are on {device.type}, and the kernels run on CUDA'
    if device.type == 'cuda' and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return (
                f'{torch.cuda.get_device_name(device)} has the compute capability {capability[0]}.{capability[1]}, '
                f'and the kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}'
            )
    if dtype not in DTYPES:
        return f'the tensors are {_names(dtype)}, and the kernels compute on {_names(*DTYPES)}'
    return None


@torch.compiler.assume_constant_result
def _log_once(operation: str, reason: str, device: str) -> None:
    if (operation, reason) not in _logged:
        _logged.add((operation, reason))
        level = logging.INFO if device == 'cpu' else logging.WARNING
        logger.log(level, '%s runs in plain PyTorch; the kernel is not used: %s', operation, reason)


@functools.cache  # looking through folders takes longer than some operations
def _has_triton() -> bool:
    return importlib.util.find_spec('triton') is not None


def _runs_on_cpu() -> bool:
    from attnsr.ops import launching

    return launching.runs_on_cpu()


def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{what} must be one of {", ".join(BACKENDS)}; got {name!r}')
    return name


def _names(*dtypes: torch.dtype) -> str:
    return ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
