"""What passes through a network's modules, without changing what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from attnsr.archs.arch_util import SRNetwork
from attnsr.errors import UsageError
from attnsr.ops import dispatch

__all__ = ['Passed', 'Watched', 'watched']

Key = TypeVar('Key')


@dataclass(frozen=True)
class Passed:
    """One call of a module.

    Attributes:
        inputs: Its positional arguments.
        output: What it returned.
    """

    inputs: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class Watched(Generic[Key]):
    """A pass of an image through a network.

    Attributes:
        output: (1, 3, upscale * H, upscale * W).
        passed: What passed through the modules, by their keys.
    """

    output: Tensor
    passed: dict[Key, Passed]


def watched(net: SRNetwork, x: Tensor, modules: Mapping[Key, nn.Module]) -> Watched[Key]:
    """Send an image through a network and keep what passes through some of its modules.

    Args:
        net: In eval mode; it is left as it was.
        x: (1, 3, H, W), RGB in [0, 1].
        modules: Modules of ``net``, each called once in a pass.

    Raises:
        UsageError: What comes out is not finite.
    """
    passed: dict[Key, Passed] = {}

    def keep(key: Key) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            passed[key] = Passed(inputs, output)

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        # In plain PyTorch attention is left in a form to look into. Not in inference mode: it is computed with later.
        with dispatch.backend('reference'), torch.no_grad():
            output = net(x)
    finally:
        for handle in handles:
            handle.remove()
    if not output.isfinite().all():
        raise UsageError('the network gives values that are no numbers: these weights cannot be looked into')
    return Watched(output, passed)
