"""Registries that say what they know."""

import difflib
from typing import Any

from basicsr.utils.registry import Registry

from attnsr.compat.patches import fails, patch, replace


def _get(self: Registry, name: str, suffix: str = 'basicsr') -> Any:
    for candidate in (name, f'{name}_{suffix}'):
        if candidate in self._obj_map:
            return self._obj_map[candidate]
    known = sorted(self._obj_map)
    near = difflib.get_close_matches(str(name), known, n=3)
    raise KeyError(
        f'{self._name} {name!r} is not registered'
        + (f'; nearest: {", ".join(near)}' if near else '')
        + f'; valid: {", ".join(known)}'
    )


def _do_register(self: Registry, name: str, obj: Any, suffix: str | None = None) -> None:
    name = f'{name}_{suffix}' if isinstance(suffix, str) else name
    other = self._obj_map.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (obj.__module__, obj.__qualname__):
        raise ImportError(
            f'{self._name} {name!r} is registered twice: by {other.__module__} and by {obj.__module__}. Rename one of '
            f'the two, or register it with a suffix'
        )
    self._obj_map[name] = obj  # the same class again is its module reloaded


def _register_twice() -> None:
    registry = Registry('probe')
    registry.register(Registry)
    registry.register(Registry)


@patch(
    'registry',
    mends='an unknown name gives a hint about a suffix and a bare KeyError; registering a class anew asserts',
    needed=lambda: fails(_register_twice, AssertionError),
)
def _patch_registry() -> None:
    replace(Registry, 'get', _get)
    replace(Registry, '_do_register', _do_register)
