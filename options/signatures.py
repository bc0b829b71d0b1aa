"""What a class or function accepts, read off its signature: names, required ones, and kinds of value."""

import collections.abc
import dis
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from attnsr.options.schema import is_number, is_whole

WORDS = {
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    str: 'text',
    type(None): '~',
    dict: 'a section',
}
SEQUENCES = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function or constructor that can be given by name, ``*args`` and ``**kwargs`` left out."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: each for name, each in inspect.signature(target).parameters.items() if each.kind in by_name}


def reads_other_names(target: Callable[..., Any]) -> bool:
    """Whether a function or constructor has ``**kwargs`` and uses them.

    SwinIR and BasicSR's metrics swallow unknown names without a look at them; a subclass that hands them to its
    parent does not.
    """
    rest = [each.name for each in inspect.signature(target).parameters.values() if each.kind is each.VAR_KEYWORD]
    if not rest:
        return False
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    try:
        return any(instruction.argval == rest[0] for instruction in dis.get_instructions(function))
    except TypeError:  # not written in Python: nobody can know
        return True


def hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters, resolved; none if one of them names something that is not there at run time."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # whatever evaluating someone's annotation raises
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from an option file is of the annotated type; a type that YAML cannot express accepts any."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        plain = [each for each in inner if not _is_tensor(each)]
        return any(matches(value, each) for each in plain)
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is typing.Annotated:
        return matches(value, inner[0])
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_whole(value) or isinstance(value, float)
    if hint is str:
        return isinstance(value, str)
    base = origin or hint
    if base in SEQUENCES:
        if not isinstance(value, list):
            return False
        if base is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(matches, value, inner))
        return not inner or all(matches(item, inner[0]) for item in value)
    if base in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and (not inner or all(matches(item, inner[1]) for item in value.values()))
    return True


def describe(hint: Any) -> str:
    """An annotated type in words, for a message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(describe(each) for each in inner if not _is_tensor(each))
    if origin is typing.Literal:
        return ' or '.join(str(each) for each in inner)
    if origin is typing.Annotated:
        return describe(inner[0])
    base = origin or hint
    if base in SEQUENCES:
        if base is tuple and inner and inner[-1] is not Ellipsis:
            return f'a list of {len(inner)}: {", ".join(map(describe, inner))}'
        return f'a list, each {describe(inner[0])}' if inner else 'a list'
    return WORDS.get(base, str(getattr(base, '__name__', base)))


def fits_default(value: Any, default: Any) -> bool:
    """Whether a value may stand where a parameter without annotation has ``default``; None may always.

    Lenient, as the default says little: a number may be a list (a size for each side), a bool 0 or 1.
    """
    if value is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool) or (is_whole(value) and value in (0, 1))
    if is_number(default):
        return is_number(value) or isinstance(value, list)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, (tuple, list)):
        return isinstance(value, list) and not (any(map(is_number, default)) and any(type(v) is str for v in value))
    return True


def _is_tensor(hint: Any) -> bool:
    return getattr(hint, '__name__', '') == 'Tensor'
