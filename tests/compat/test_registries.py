"""Registries: names that are not there, and classes that are there already."""

import pytest
import util
from basicsr.utils.registry import ARCH_REGISTRY, Registry

from attnsr.compat import registries


def make_class(module: str) -> type:
    return type('Net', (), {'__module__': module})


def test_an_unknown_name_is_answered_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        util.stock(registries._get)(ARCH_REGISTRY, 'ELAM')
    assert 'use name: ELAM_basicsr!' in capsys.readouterr().out  # as if that name were there

    with pytest.raises(KeyError, match=r"arch 'ELAM' is not registered; nearest: ELAN.*; valid: .*\bSwinIR\b"):
        ARCH_REGISTRY.get('ELAM')
    assert capsys.readouterr() == ('', '')


def test_a_name_with_a_suffix_is_found_by_the_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry('probe')
    net = make_class('one')
    registry.register(net, suffix='basicsr')
    assert registry.get('Net') is net
    assert capsys.readouterr() == ('', '')


def test_a_reloaded_module_may_register_its_classes_again() -> None:
    register = util.stock(registries._do_register)
    stock, mended = Registry('stock'), Registry('mended')
    first, again = make_class('one'), make_class('one')
    register(stock, 'Net', first)
    with pytest.raises(AssertionError):
        register(stock, 'Net', again)

    mended.register(first)
    mended.register(again)
    assert mended.get('Net') is again


def test_two_modules_cannot_register_one_name() -> None:
    registry = Registry('arch')
    registry.register(make_class('one'))
    with pytest.raises(ImportError) as error:
        registry.register(make_class('two'))
    assert str(error.value) == (
        "arch 'Net' is registered twice: by one and by two. Rename one of the two, or register it with a suffix"
    )
    assert registry.get('Net').__module__ == 'one'
