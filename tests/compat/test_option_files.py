"""Option files through BasicSR's own functions: nothing in them is run, and they can be used from where they are."""

import sys
from pathlib import Path
from typing import Any

import pytest
import util
import yaml
from basicsr.utils import options

from attnsr import options as attnsr_options
from attnsr.compat import option_files


def evil_yaml(folder: Path) -> str:
    return f'name: !!python/object/apply:os.mkdir ["{folder}"]\n'


def load(functions: tuple[Any, Any], text: str) -> Any:
    return yaml.load(text, Loader=functions[0])


def test_ordered_yaml_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / 'made'
    load(util.stock(option_files._ordered_yaml)(), evil_yaml(folder))
    assert folder.is_dir()

    folder.rmdir()
    with pytest.raises(yaml.YAMLError):
        load(options.ordered_yaml(), evil_yaml(folder))
    assert not folder.exists()
    read = load(options.ordered_yaml(), 'b: {d: 1e-4, c: [1, ~]}\na: text\n')
    assert list(read.items()) == [('b', {'d': 1e-4, 'c': [1, None]}), ('a', 'text')]
    written = yaml.dump(read, Dumper=options.ordered_yaml()[1], sort_keys=False)
    assert list(load(options.ordered_yaml(), written).items()) == list(read.items())


@pytest.mark.parametrize('place', ['file', 'value', 'key'])
def test_parse_options_runs_nothing(place: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'made'
    file, override = tiny, 'name=other'
    if place == 'file':
        file = tmp_path / 'evil.yml'
        file.write_text(evil_yaml(folder) + tiny.read_text().partition('\n')[2])
    elif place == 'value':
        override = f'scale=[__import__("os").mkdir("{folder}")]'
    else:
        override = f'name" + str(__import__("os").mkdir("{folder}")) + "=other'
    monkeypatch.setattr(sys, 'argv', ['train', '-opt', str(file), '--force_yml', override])
    monkeypatch.chdir(tmp_path)
    # The stock function calls the loader of its module, which is mended too.
    with monkeypatch.context() as stock:
        stock.setattr(options, 'ordered_yaml', util.stock(option_files._ordered_yaml))
        util.stock(attnsr_options.parse_options)(str(tmp_path))
    assert folder.is_dir()

    folder.rmdir()
    with pytest.raises(attnsr_options.OptionError):
        options.parse_options(str(tmp_path))
    assert not folder.exists()


def test_the_copy_in_the_experiment_can_be_the_option_file(tiny: Path, tmp_path: Path) -> None:
    """A run that is started again with the file that it copied: by then its folder bears another name."""
    copied, moved = tmp_path / 'experiments' / 'tiny.yml', tmp_path / 'moved'
    copied.parent.mkdir()
    copied.write_text(tiny.read_text())
    attnsr_options.load(str(copied))
    stock = util.stock(option_files._copy_opt_file)
    with pytest.raises(OSError, match='same file'):  # as when resuming
        stock(str(copied), str(copied.parent))
    copied.parent.rename(moved)
    copied.parent.mkdir()
    with pytest.raises(FileNotFoundError):
        stock(str(copied), str(copied.parent))

    options.copy_opt_file(str(copied), str(copied.parent))
    assert copied.read_text().startswith('# GENERATE TIME: ')
    assert copied.read_text().endswith(tiny.read_text())
    assert [file.name for file in copied.parent.iterdir()] == ['tiny.yml']


def test_an_option_file_that_was_read_in_another_way_is_copied_too(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / 'own.yml'
    file.write_text(tiny.read_text())
    (tmp_path / 'experiment').mkdir()
    options.copy_opt_file(str(file), str(tmp_path / 'experiment'))
    assert (tmp_path / 'experiment' / 'own.yml').read_text().endswith(tiny.read_text())
