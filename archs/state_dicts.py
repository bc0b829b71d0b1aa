"""State dicts: where a checkpoint keeps its own, whether one fits a network, and which network one is of."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from attnsr.archs.arch_util import SRNetwork
    from attnsr.archs.variants import Variant

#: Where published checkpoints keep the parameters, best first.
WRAPPERS = ('params_ema', 'params', 'model_state_dict', 'state_dict')

#: How many names of a kind a message lists.
LISTED = 4


def wrapper_of(checkpoint: Mapping[str, Any], preferred: str | None = None) -> str | None:
    """The key of ``checkpoint`` that holds its parameters, or None if they are not wrapped."""
    keys = (preferred, *WRAPPERS)
    return next((key for key in keys if key is not None and isinstance(checkpoint.get(key), Mapping)), None)


def unwrap_state_dict(checkpoint: Mapping[str, Any], preferred: str | None = None) -> dict[str, Tensor]:
    """The bare {name: tensor} in a checkpoint, without wrappers and without ``module.`` before the names.

    Args:
        checkpoint: What a checkpoint file holds.
        preferred: The wrapper to take where there are several, for example ``'params'``.

    Raises:
        ValueError: there are no parameters in it, or they are under a name that is not known.
    """
    wrapper = wrapper_of(checkpoint, preferred)
    parameters = checkpoint if wrapper is None else checkpoint[wrapper]
    state_dict = {str(name).removeprefix('module.'): value for name, value in parameters.items()}
    if len(state_dict) < len(parameters):
        raise ValueError("this checkpoint holds the same names with and without 'module.': expected one of them")
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(
            'this checkpoint holds no parameters: expected {name: tensor}, bare or under one of '
            f'{", ".join(WRAPPERS)}; found the keys {", ".join(map(repr, list(checkpoint)[:8])) or "(none)"}'
        )
    return state_dict


@dataclass(frozen=True)
class Mismatch:
    """In what a state dict differs from a network; false if in nothing.

    Attributes:
        missing: Names that only the network has.
        unexpected: Names that only the state dict has.
        misshapen: {name: (shape in the state dict, shape in the network)} where these are not the same.
        mistyped: {name: dtype in the state dict} where that is no floating-point one and the network's is.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    mistyped: Mapping[str, torch.dtype]

    @property
    def names(self) -> set[str]:
        return {*self.missing, *self.unexpected, *self.misshapen, *self.mistyped}

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        shapes = [f'{name} is {given} instead of {own}' for name, (given, own) in self.misshapen.items()]
        kinds: dict[str, Sequence[str]] = {
            'Missing key(s)': self.missing,
            'Unexpected key(s)': self.unexpected,
            'size mismatch': shapes,
            'not of floating point': [f'{name} is {dtype}' for name, dtype in self.mistyped.items()],
        }
        return '; '.join(f'{kind}: {_shortened(names)}' for kind, names in kinds.items() if names)


def _shortened(names: Sequence[str]) -> str:
    more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(names[:LISTED]) + more


def compare(net: nn.Module, state_dict: Mapping[str, Tensor]) -> Mismatch:
    """In what a bare state dict, without unused names, differs from a network's."""
    state = net.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in state.items()}
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    return Mismatch(
        # PyTorch does without BatchNorm's counters too, which old checkpoints lack.
        missing=tuple(name for name in own if name not in given and not name.endswith('.num_batches_tracked')),
        unexpected=tuple(name for name in given if name not in own),
        misshapen={name: (shape, own[name]) for name, shape in given.items() if name in own and shape != own[name]},
        mistyped={
            name: state_dict[name].dtype
            for name, tensor in state.items()
            if name in given and tensor.is_floating_point() and not state_dict[name].is_floating_point()
        },
    )


@dataclass(frozen=True)
class Identity:
    """Which network a state dict is of, as far as its names and shapes tell.

    Attributes:
        network: The class.
        arguments: Of its constructor; what the tensors do not tell is not among them.
    """

    network: 'type[SRNetwork]'
    arguments: Mapping[str, Any]

    @property
    def scale(self) -> int:
        return self.arguments['upscale']

    @property
    def variant(self) -> 'Variant | None':
        """The published network of these sizes, if there is one."""
        from attnsr.archs.variants import VARIANTS  # here, as the networks build on this module

        defaults = {name: each.default for name, each in inspect.signature(self.network).parameters.items()}
        for variant in VARIANTS.values():
            if variant.network is self.network and self.sizes.items() <= {**defaults, **variant.arguments}.items():
                return variant
        return None

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that every state dict tells, scale aside."""
        return {name: value for name, value in self.arguments.items() if name not in ('upscale', *self.network.untold)}

    def fits(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether the network has exactly the names and shapes of a bare state dict, unused names aside."""
        try:
            with torch.device('meta'):
                net = self.network(**self.arguments)
        except ValueError:  # no such network can be
            return False
        return not compare(net, net.without_unused(state_dict))

    def __str__(self) -> str:
        if self.variant:
            return f'{self.variant.title} x{self.scale}'
        sizes = [f'{name} {value}' for name, value in self.sizes.items()]
        return f'{self.network.__name__} x{self.scale} ({", ".join(sizes)})'


def identify(state_dict: Mapping[str, Tensor]) -> Identity | None:
    """Which network a bare state dict is of, published sizes or not; None if it is of none.

    Only some of the tensors are looked at: with others missing, left over or misshapen, a state dict is identified
    too (see :meth:`Identity.fits`).
    """
    from attnsr.archs.variants import VARIANTS  # here, as the networks build on this module

    for network in dict.fromkeys(variant.network for variant in VARIANTS.values()):
        try:
            return Identity(network, network.arguments_of(state_dict))
        except (LookupError, ValueError, TypeError, ArithmeticError):  # a tensor is not there, or has another form
            pass
    return None


def explain(net: 'SRNetwork', state_dict: Mapping[str, Tensor], mismatch: Mismatch) -> str:
    """Why a bare state dict does not fit a network, in a sentence; says which one it fits, if it fits another."""
    own, given = identify(net.state_dict()), identify(state_dict)
    name = str(own or type(net).__name__)
    if given and given.fits(state_dict):
        return f'this is a checkpoint of {given}, not of {name}; {mismatch}'
    return f'this is no checkpoint of {name}; {mismatch}'


def at_other_scale(net: 'SRNetwork', state_dict: Mapping[str, Tensor], mismatch: Mismatch) -> Identity | None:
    """What a bare state dict is of, if that is the same network at another scale: only the upsamplers differ."""
    given = identify(state_dict)
    only_upsampler = all(name.startswith(net.upsampler) for name in mismatch.names)
    return given if given and given.scale != net.upscale and only_upsampler else None


def count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the names of a state dict have in the place of the group of a regular expression."""
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})
