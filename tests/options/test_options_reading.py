"""Option files and overrides are read as data, and what cannot be read is said with its line."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from basicsr.utils.options import _postprocess_yml_value

from attnsr import options
from attnsr.options import OptionError, reading


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(OptionError) as error:
        call()
    assert str(error.value) == '\n'.join(error.value.problems)
    return error.value.problems


def test_values_and_order(write: Callable[[str], str]) -> None:
    opt = options.load(write('b: 1e-4\na: !!float 2e-4\nc: {d: [1, 2.5, -3E+2], e: ~}\nf: yes\ng: 2024-05-01\nh: 1e4'))
    assert opt == OrderedDict(
        b=1e-4, a=2e-4, c=OrderedDict(d=[1, 2.5, -300.0], e=None), f=True, g='2024-05-01', h=10000.0
    )
    assert list(opt) == ['b', 'a', 'c', 'f', 'g', 'h']
    assert type(opt['c']) is OrderedDict


def test_loader_for_tools(tmp_path: Path) -> None:
    opt = yaml.load('b: {c: 1e-4}\na: &x [1]\nd: {<<: {e: *x}}', Loader=options.Loader)
    assert opt == OrderedDict(b=OrderedDict(c=1e-4), a=[1], d=OrderedDict(e=[1]))
    assert type(opt['b']) is OrderedDict
    with pytest.raises(yaml.YAMLError):
        yaml.load(f'!!python/object/apply:os.mkdir ["{tmp_path}/ran"]', Loader=options.Loader)
    assert not (tmp_path / 'ran').exists()


def test_aliases_are_copies(write: Callable[[str], str]) -> None:
    opt = options.load(write('a: &set {phase: x, io: {type: disk}}\nb: *set\nc: {<<: *set, phase: y}'))
    opt['a']['io']['type'] = 'lmdb'
    assert opt['b'] == {'phase': 'x', 'io': {'type': 'disk'}}
    assert opt['c'] == {'phase': 'y', 'io': {'type': 'disk'}}


@pytest.mark.parametrize(
    ('text', 'lines'),
    [
        pytest.param(
            'a: 1\nb:\n  lr: 1\n  lr: 2\na: 3\n',
            [
                'FILE:5:1: a is given twice, first on line 1; keep one',
                'FILE:4:3: lr is given twice, first on line 3; keep one',
            ],
            id='duplicate keys',
        ),
        pytest.param(
            'a: 1\nb: !!python/name:os.system\nc: !mine 2\n',
            [
                'FILE:2:4: the tag !!python/name:os.system is refused and nothing was run; '
                'option files are data: plain values only',
                'FILE:3:4: the tag !mine is refused and nothing was run; option files are data: plain values only',
            ],
            id='tags',
        ),
        pytest.param('a: !!float many\n', ["FILE:1:4: 'many' cannot be read as the tag !!float says"], id='float'),
        pytest.param('a: {2: x}\n', ['FILE:1:5: the key 2 is not text; write it in quotes'], id='key not text'),
        pytest.param(
            '- a\n',
            ['FILE: is not an option file: a mapping (`key: value` lines) belongs at its top level'],
            id='list',
        ),
        pytest.param(
            '# nothing\n',
            ['FILE: is empty; `name`, `model_type`, `datasets` and `network_g` belong there'],
            id='empty',
        ),
        pytest.param('a: \0\n', ['FILE: is not a text file; an option file is YAML in UTF-8'], id='control characters'),
        pytest.param(
            'a: &a [*a]\n',
            ['FILE: is nested too deeply; does an alias (*name) stand inside what it names?'],
            id='alias of itself',
        ),
        pytest.param(
            'a: &a [1,1,1,1,1,1,1,1,1,1]\n'
            + ''.join(f'{b}: &{b} [{",".join([f"*{a}"] * 10)}]\n' for a, b in zip('abcdef', 'bcdefg', strict=True)),
            ['FILE: has more than 100000 values; its aliases (*name) unfold too far'],
            id='alias bomb',
        ),
    ],
)
def test_unreadable_files(text: str, lines: list[str], write: Callable[[str], str]) -> None:
    file = write(text)
    assert problems(lambda: options.load(file)) == [line.replace('FILE', file) for line in lines]


def test_syntax_errors_have_their_place(write: Callable[[str], str]) -> None:
    file = write('a: 1\nb: [1, 2\nc: 3\n')
    (line,) = problems(lambda: options.load(file))
    assert re.fullmatch(rf"{file}:3:\d: is not YAML: .*expected ',' or ']'.*", line)  # libyaml and PyYAML differ a bit
    (line,) = problems(lambda: options.load(write('a:\n\tb: 1\n')))
    assert re.fullmatch(rf'{file}:2:1: is not YAML: found character .*; indent with spaces, not tabs', line)


def test_binary_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / 'model.pth').write_bytes(b'\x80\x04\xff\xfe')
    file = str(tmp_path / 'model.pth')
    assert problems(lambda: options.load(file)) == [f'{file}: is not a text file in UTF-8; an option file is YAML']
    file = str(tmp_path / 'none.yml')
    assert problems(lambda: options.load(file)) == [f'{file}: cannot be read: No such file or directory']


def test_nothing_in_a_file_runs(write: Callable[[str], str], tmp_path: Path) -> None:
    mark = tmp_path / 'ran'
    for value in (
        f'!!python/object/apply:os.system ["touch {mark}"]',
        f'!!python/object/new:subprocess.Popen [[touch, {mark}]]',
        f'!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{mark}"]]',
    ):
        lines = problems(lambda value=value: options.load(write(f'name: x\nscale: {value}\n')))  # type: ignore[misc]
        assert 'is refused and nothing was run' in lines[0]
        assert ':2:8: ' in lines[0]
        lines = problems(lambda value=value: options.force({'scale': 2}, [f'scale={value}']))  # type: ignore[misc]
        assert lines[0].startswith(f'--force_yml scale={value}:1:1: the tag ')
    code = f"__import__('os').system('touch {mark}')"
    opt: dict[str, object] = {'scale': 2, 'name': 'x'}
    options.force(opt, [f'name={code}', f'{code}=1', f'scale"]or {code} or opt["name=3'])
    assert opt['name'] == code
    assert opt['scale'] == 2
    options.force(opt, [f'name=[{code}]'])
    assert opt['name'] == [code]
    assert not mark.exists()


def test_text_outlives_the_file(write: Callable[[str], str]) -> None:
    file = write('a: 1  # kept\n')
    options.load(file)
    Path(file).unlink()
    assert options.source_text(file) == 'a: 1  # kept\n'
    with pytest.raises(KeyError):
        options.source_text('never read')


def test_find(write: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / 'package'
    package.mkdir()
    for name in ('elan_x2', 'elan_x4', 'demo_x2'):
        (package / f'{name}.yml').write_text('a: 1')
    monkeypatch.setattr(reading, 'FOLDER', package)
    assert options.shipped() == ['demo_x2', 'elan_x2', 'elan_x4']
    own = write('a: 1')
    assert options.find(own) == own
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'elan_x2').mkdir()  # a folder of that name, as of an experiment, is not the file
    for given in ('elan_x2', 'elan_x2.yml', 'options/elan_x2.yml', './options/elan_x2.yml'):
        assert options.find(given) == str(package / 'elan_x2.yml')
    assert problems(lambda: options.find('elan_x3.yml')) == [
        'elan_x3.yml: there is no such file; did you mean elan_x4 or elan_x2? '
        '(--help lists the option files that come with attnsr)'
    ]
    assert 'there is no such file; did you mean elan_x2' in problems(lambda: options.find('mine/elan_x2'))[0]
    assert 'there is no such file; give the path of a YAML file (' in problems(lambda: options.find('qqq'))[0]
    assert problems(lambda: options.find(str(package)))[0].startswith(f'{package}: this is a folder; ')


@pytest.mark.parametrize(
    'text',
    ['True', 'false', 'FALSE', '~', 'none', 'None', '3', '007', '0.5', '1.', '.25', '!!float 1e-4', '[1,2]', '[]',
     "['a', 'None', None, True]", '[1, [2.5, 3e-4]]', '(1, 2)', 'text', 'yes', 'on', 'a/b_x2.yml', '1.2.3',
     '2024-05-01', '12:30', '1_000', '*.png', 'a: b', '-', ''],
)  # fmt: skip
def test_overrides_have_the_values_that_basicsr_gives_them(text: str) -> None:
    opt: dict[str, object] = {'key': 'before'}
    options.force(opt, [f'key={text}'])
    expected = _postprocess_yml_value(text)
    assert opt == {'key': expected}
    assert type(opt['key']) is type(expected)


@pytest.mark.parametrize(
    ('text', 'value'),
    [('1e-4', 1e-4), ('-1', -1), ('-0.5', -0.5), ('2E+3', 2000.0), ('[a, 1e-4, ~]', ['a', 1e-4, None]),
     ('{b: 2}', {'b': 2}), ('"3"', '3'), ('null', None)],
)  # fmt: skip
def test_overrides_that_basicsr_would_leave_as_text(text: str, value: object) -> None:
    opt: dict[str, object] = {'key': 'before'}
    options.force(opt, [f'key={text}'])
    assert opt == {'key': value}
    assert type(opt['key']) in (type(value), OrderedDict)


def test_overrides_in_sections() -> None:
    opt = {'train': {'optim_g': {'lr': 1e-3}}, 'path': {}}
    options.force(opt, [' train:optim_g:lr = 5e-4 ', 'path:pretrain_network_g=/a/b=c.pth'])
    assert opt == {'train': {'optim_g': {'lr': 5e-4}}, 'path': {'pretrain_network_g': '/a/b=c.pth'}}


def test_wrong_overrides_change_nothing() -> None:
    opt = {'train': {'optim_g': {'lr': 1e-3}}, 'scale': 2}
    entries = ['scale=4', 'train:optim:lr=1', 'scale', 'scale:x=1', 'train:=2']
    assert problems(lambda: options.force({'train': {}}, ['train.total_iter=5'])) == [
        '--force_yml train.total_iter=5: keys are parted by colons; write train:total_iter=5'
    ]
    assert problems(lambda: options.force(opt, entries)) == [
        '--force_yml train:optim:lr=1: there is no section train:optim; did you mean optim_g?',
        '--force_yml scale: is not an override; write key=value or section:key=value',
        '--force_yml scale:x=1: there is no section scale; the sections there are: train',
        '--force_yml train:=2: is not an override; write key=value or section:key=value',
    ]
    assert opt == {'train': {'optim_g': {'lr': 1e-3}}, 'scale': 2}
