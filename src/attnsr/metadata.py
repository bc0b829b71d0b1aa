"""What a safetensors file says about its network beside the tensors, so that it loads without being told anything."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attnsr
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import Identity, identify
from attnsr.archs.variants import VARIANTS

__all__ = ['arguments_in', 'describe', 'is_described']

#: That an argument from a file may be at most, and the multiple of pixels that images are padded to.
MOST = 4096

#: Letters of the arguments in a file.
MOST_LETTERS = 4096


def describe(net: SRNetwork) -> dict[str, str]:
    """Texts that say which network this is: ``network``, ``scale``, ``arguments``, ``attnsr``, and ``variant``.

    ``network`` is the class, ``arguments`` the JSON object of those of its constructor, ``attnsr`` the version that
    wrote this; ``variant`` is one of :data:`attnsr.archs.variants.VARIANTS`, and absent of networks of other sizes.
    """
    identity = identify(net.state_dict())
    variant = {'variant': identity.variant.name} if identity and identity.variant else {}
    return {
        'network': type(net).__name__,
        **variant,
        'scale': str(net.upscale),
        'arguments': json.dumps(net.arguments, default=list),
        'attnsr': attnsr.__version__,
    }


def is_described(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata are of :func:`describe`: others write some of their own, or none."""
    return not {'network', 'arguments'}.isdisjoint(metadata)


def arguments_in(metadata: Mapping[str, str], identity: Identity) -> dict[str, Any]:
    """The constructor's arguments that metadata tell, checked by what the tensors tell.

    Args:
        metadata: What :func:`describe` has written, or what somebody has made of it.
        identity: What the tensors are of.

    Raises:
        ValueError: they are of no such form, name what there is not, or contradict the tensors.
    """
    own: dict[str, str | None] = {
        'network': identity.network.__name__,
        'scale': str(identity.scale),
        'variant': identity.variant.name if identity.variant else None,
    }
    names = {
        'network': [each.network.__name__ for each in VARIANTS.values()],
        'variant': list(VARIANTS),
    }
    for name, value in own.items():
        given = metadata.get(name)
        if given is None and name != 'variant':
            raise ValueError(f'its metadata have no {name!r}')
        if name in names and given is not None and given not in names[name]:
            valid = ', '.join(dict.fromkeys(names[name]))
            raise ValueError(f'its metadata name the {name} {given[:40]!r}, which there is not; there are {valid}')
        if given is not None and given != value:
            raise ValueError(
                f'its metadata contradict its tensors: {name} is {given[:40]!r}, the tensors are of {identity}'
            )
    arguments = _parsed(metadata.get('arguments', ''), identity)
    for name, value in identity.arguments.items():
        given = arguments.get(name, value)
        # The range of ELAN is computed from rounded constants.
        if given != value and not (isinstance(value, float) and math.isclose(given, value, rel_tol=0.01)):
            raise ValueError(f'its metadata contradict its tensors: {name} is {given!r}, the tensors are of {identity}')
    multiple = math.lcm(*arguments.get('window_sizes', [1]))
    if multiple > MOST:
        raise ValueError(f'its metadata have images padded to multiples of {multiple} pixels; at most {MOST} are read')
    return arguments


def _parsed(text: str, identity: Identity) -> dict[str, Any]:
    try:
        arguments = json.loads(text) if len(text) <= MOST_LETTERS else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"its metadata's arguments are no JSON object of at most {MOST_LETTERS} letters")
    parameters = inspect.signature(identity.network).parameters
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(
                f'its metadata have the argument {name[:40]!r}, which {identity.network.__name__} has not; '
                f'it has {", ".join(parameters)}'
            )
        expected, fits = _KINDS[parameters[name].annotation]
        if not fits(value):
            raise ValueError(f'its metadata have {name} = {str(value)[:40]}; expected {expected}')
    return arguments


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


#: {annotation of a constructor's argument: what is expected of a file, whether a value is it}.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: (f'a whole number of at most {MOST}', _is_size),
    int | None: (f'a whole number of at most {MOST}, or null', lambda value: value is None or _is_size(value)),
    float: ('a finite number', _is_number),
    bool: ('true or false', lambda value: type(value) is bool),
    Sequence[int]: (
        f'a list of whole numbers from 1 to {MOST}',
        lambda value: isinstance(value, list) and bool(value) and all(_is_size(each) and each for each in value),
    ),
}
