"""The list of patches, and how one replaces something of BasicSR's."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One defect of BasicSR's and its mending.

    Attributes:
        name: Short name, unique.
        mends: What fails without it, in a sentence.
        needed: Whether the installed BasicSR has the defect: its repository has some of them mended.
        apply: Mends it.
    """

    name: str
    mends: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


PATCHES: list[Patch] = []
_replaced: list[tuple[Any, Any]] = []


def patch(name: str, mends: str, needed: Callable[[], bool]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator that adds the function below it to :data:`PATCHES`."""

    def add(apply: Callable[[], None]) -> Callable[[], None]:
        PATCHES.append(Patch(name, mends, needed, apply))
        return apply

    return add


def replace(owner: ModuleType | type, name: str, new: Any) -> None:
    """Put ``new`` in the place of ``owner.name``."""
    _replaced.append((getattr(owner, name), new))
    setattr(owner, name, new)


def rebind() -> None:
    """Give the replacements to modules that imported the originals by name before, BasicSR's own and the user's."""
    news = {id(old): new for old, new in _replaced}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and not module.__name__.startswith('attnsr.'):
            for name, value in list(vars(module).items()):
                if id(value) in news:
                    setattr(module, name, news[id(value)])


def fails(function: Callable[[], Any], *errors: type[BaseException]) -> bool:
    """Whether the function raises one of these errors: how a patch sees that it is needed."""
    try:
        function()
    except errors:
        return True
    return False
