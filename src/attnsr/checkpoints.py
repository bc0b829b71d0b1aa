"""Checkpoints: reading them safely, and giving them back in the published naming."""

import errno
import pickle
import textwrap
from collections import OrderedDict
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from attnsr.archs.arch_util import SRNetwork
from attnsr.errors import UsageError

__all__ = ['CheckpointError', 'read', 'to_published']


class CheckpointError(UsageError, ValueError):
    """A checkpoint file is torn, is no checkpoint, or does not fit."""


def to_published(net: SRNetwork) -> 'OrderedDict[str, Tensor]':
    """The state of ``net`` as the authors' code expects it: their names, with the constants that they store.

    Args:
        net: One of this package's networks.

    Returns:
        {published name: tensor on the CPU}; ``net.load_state_dict(..., strict=True)`` takes it back unchanged.

    Raises:
        TypeError: ``net`` is none of this package's networks.
    """
    net = getattr(net, 'module', net)
    if not isinstance(net, SRNetwork):
        raise TypeError(f'to_published takes a network of attnsr, got {type(net).__name__}')
    state = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    return OrderedDict(state | net.published_constants())


def read(path: str | PathLike[str]) -> Any:
    """What a checkpoint or training state file holds, tensors on the CPU, without running code from it.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        CheckpointError: the file is torn, is no checkpoint, or would need code to be run.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: there is no such file') from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path}: this file is torn, or it is a pickle with code in it, which is not run; expected a checkpoint '
            f'of tensors as torch.save writes it ({_first_line(error)})'
        ) from None
    except Exception as error:  # there is no end to what a damaged file makes torch.load raise
        # A file that cannot be read now is not said to be torn; in one that is cut off torch.load seeks too far back.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(f'{path}: this file is torn or is no checkpoint ({_first_line(error)})') from None


def _first_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 200, placeholder=' ...') or type(error).__name__
