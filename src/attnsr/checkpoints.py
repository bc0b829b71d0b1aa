"""Checkpoints: reading them safely, finding out what they are of, and giving them back in the published naming."""

import errno
import json
import os
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from attnsr import metadata
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import compare, explain, identify, unwrap_state_dict
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.errors import UsageError

__all__ = ['CheckpointError', 'load', 'read', 'to_published']

# Besides tensors, checkpoints hold what was measured of them, often as scalars of NumPy, which are but numbers.
_scalar = np.float64().__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    np.dtype,
    *(type(np.dtype(name)) for name in ('bool', 'int32', 'int64', 'float32', 'float64')),
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),  # of NumPy 1 and 2
]


# What is allowed is allowed to the process, not to the thread.
_reading = threading.Lock()


class CheckpointError(UsageError, ValueError):
    """A checkpoint file is torn, is no checkpoint, or does not fit."""


class UntoldError(CheckpointError):
    """The tensors of a checkpoint do not tell all arguments of its network."""


def load(path: str | PathLike[str], **arguments: Any) -> SRNetwork:
    """The network that a checkpoint is of, with its parameters, found out from the file alone.

    A safetensors file of ``basicsr export`` says it all in its metadata. Of others the tensors tell: of the published
    variants nothing needs to be said; what has no tensor (ELAN's window sizes and range, DLGSANet's
    tlc_size, LCoAN's chunk size and scales) is taken as published, and must be given where a training had others. Of
    other sizes, names and shapes tell most arguments of the constructor; those that they cannot tell must be given.

    Args:
        path: A ``.pth``, ``.pt`` or ``.safetensors`` file: a bare state dict, or a checkpoint with one under
            ``params_ema``, ``params``, ``model_state_dict`` or ``state_dict`` (the first that is there); names may
            begin with ``module.``.
        **arguments: Of the network's constructor, in the place of the published ones.

    Returns:
        The network in float32 on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        CheckpointError: the file is torn, is no checkpoint, would need code to be run, or is of no network of
            attnsr; its metadata contradict its tensors, or are none that attnsr writes; or the file does not tell an
            argument that is not given.
        TypeError: the network has no such argument.
    """
    checkpoint, texts = _read(path)
    state_dict = state_dict_of(checkpoint, path)
    identity = identify(state_dict)
    if identity is None:
        raise CheckpointError(f'{path}: this is a checkpoint of no network of attnsr, which are {_known()}')
    described: dict[str, Any] = {}
    if metadata.is_described(texts):
        try:
            described = metadata.arguments_in(texts, identity)
        except ValueError as error:
            raise CheckpointError(f'{path}: {error}') from None
    arguments = {**identity.arguments, **described, **arguments}
    untold = [name for name in identity.network.untold if name not in arguments]
    if identity.variant is None and untold:
        call = ', '.join(f'{name}=...' for name in untold)
        raise UntoldError(
            f'{path}: this is a checkpoint of {identity}, of which the tensors do not tell {" and ".join(untold)}; '
            f'write load(path, {call}). Of the published networks they need not be given: {_known()}'
        )
    try:
        with torch.device('meta'):  # compared before memory is taken for numbers that a file names
            shapes = identity.network(**arguments)
        given = shapes.without_unused(state_dict)
        if mismatch := compare(shapes, given):
            raise RuntimeError(explain(shapes, given, mismatch))
        net = identity.network(**arguments)
        net.load_state_dict(state_dict)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f'{path}: {error}') from None
    return net.eval()


def to_published(net: SRNetwork) -> 'OrderedDict[str, Tensor]':
    """The state of ``net`` as the authors' code expects it: their names, with the constants that they store.

    Args:
        net: One of this package's networks.

    Returns:
        {published name: tensor on the CPU}; ``net.load_state_dict(..., strict=True)`` takes it back unchanged.

    Raises:
        TypeError: ``net`` is none of this package's networks.
    """
    for wrapper in ('_orig_mod', 'module', '_orig_mod'):  # of torch.compile, of DistributedDataParallel, of both
        net = getattr(net, wrapper, net)
    if not isinstance(net, SRNetwork):
        raise TypeError(f'to_published takes a network of attnsr, got {type(net).__name__}')
    state = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
    return OrderedDict(state | net.published_constants())


def read(path: str | PathLike[str]) -> Any:
    """What a checkpoint or training state file holds, tensors on the CPU, without running code from it.

    Args:
        path: A file of ``torch.save``, or of safetensors, whatever its name.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        CheckpointError: the file is torn, is no checkpoint, or would need code to be run.
    """
    return _read(path)[0]


def _read(path: str | PathLike[str]) -> tuple[Any, dict[str, str]]:
    """What :func:`read` gives, and the metadata of a safetensors file."""
    try:
        with open(path, 'rb') as file:
            # By the content, not the name: safetensors has eight bytes of length, then a table in JSON.
            is_safetensors = file.read(9)[8:] == b'{'
            file.seek(0)
            if is_safetensors:
                content = file.read()
                tensors = safetensors.torch.load(content)
                table = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])
                return tensors, table.get('__metadata__') or {}
            with _reading, torch.serialization.safe_globals(NUMPY_SCALARS):
                return torch.load(file, map_location='cpu', weights_only=True), {}
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: there is no such file') from None
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r'GLOBAL (\S+)', str(error))
        raise CheckpointError(
            f'{path}: this file is torn, or it is a pickle with code in it{f" ({code[1]})" if code else ""}, which is '
            'not run; expected a checkpoint of tensors as torch.save or safetensors writes it'
        ) from None
    except Exception as error:  # there is no end to what a damaged file makes torch.load raise
        # A file that cannot be read now is not said to be torn; in one that is cut off torch.load seeks too far back.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        what = 'is torn, or is no checkpoint' if os.path.getsize(path) else 'is empty'
        raise CheckpointError(
            f'{path}: this file {what}; expected a checkpoint of tensors as torch.save or safetensors writes it'
        ) from None


def state_dict_of(checkpoint: Any, path: str | PathLike[str], preferred: str | None = None) -> dict[str, Tensor]:
    """The bare state dict in what :func:`read` gives, see :func:`attnsr.archs.state_dicts.unwrap_state_dict`.

    Raises:
        CheckpointError: there is none in it.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: this is no checkpoint, but a {type(checkpoint).__name__}')
    try:
        return unwrap_state_dict(checkpoint, preferred)
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}') from None


def _known() -> str:
    scales = ', '.join(f'x{scale}' for scale in SCALES)
    return f'{", ".join(variant.title for variant in VARIANTS.values())} ({scales})'
