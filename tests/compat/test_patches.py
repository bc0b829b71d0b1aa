"""The list of patches: which are applied, and how often."""

import basicsr
import pytest
from basicsr.models.base_model import BaseModel

from attnsr import compat
from attnsr.compat.patches import Patch


def test_the_release_needs_every_patch() -> None:
    names = [patch.name for patch in compat.PATCHES]
    assert len(set(names)) == len(names)
    if basicsr.__version__ == '1.4.2':
        assert compat.applied == names


def test_a_patch_is_applied_once_and_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    patches = [
        Patch(name, '', lambda name=name: name == 'needed', lambda name=name: calls.append(name))
        for name in ('needed', 'mended')
    ]
    monkeypatch.setattr(compat, 'PATCHES', [*compat.PATCHES, *patches])
    monkeypatch.setattr(compat, 'applied', [*compat.applied])
    before = dict(vars(BaseModel))
    compat.apply()
    compat.apply()
    assert calls == ['needed']
    assert compat.applied[-1] == 'needed'
    assert dict(vars(BaseModel)) == before
