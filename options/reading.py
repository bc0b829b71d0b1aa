"""Option files as data: finding, reading and overriding them. Nothing in a file or a value is ever run."""

import ast
import difflib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from attnsr.errors import UsageError

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

FOLDER = Path(__file__).parent

# An alias repeats what it names, so a file of a few lines could unfold without end.
MOST_VALUES = 100_000

YAML_TAG = 'tag:yaml.org,2002:'
NUMBER = re.compile(r'[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?')

_texts: dict[str, str] = {}


class OptionError(UsageError, ValueError):
    """What is wrong with an option file or an override, one line for each problem.

    Args:
        problems (Sequence[str]): Lines of the form ``FILE: key.path: what is wrong; what would be right``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__('\n'.join(problems))
        self.problems = list(problems)


class Loader(SafeLoader):
    """PyYAML's safe loader for option files: mappings are OrderedDict, and ``1e-4`` is a number.

    YAML 1.1 wants ``1.0e-4`` and gives text for the short form, on which an optimizer crashes. :func:`load` is
    stricter; this is for code that calls ``yaml.load`` itself, as BasicSR's tools do.
    """


def _ordered_dict(loader: Any, node: yaml.MappingNode) -> OrderedDict[str, Any]:
    loader.flatten_mapping(node)
    return OrderedDict(loader.construct_pairs(node, deep=True))


Loader.add_constructor(f'{YAML_TAG}map', _ordered_dict)
Loader.add_implicit_resolver(
    f'{YAML_TAG}float', re.compile(r'[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$'), list('-+.0123456789')
)


def nearest(name: object, valid: Iterable[str]) -> list[str]:
    """The (at most three) names of ``valid`` that ``name`` may be a misspelling of, the nearest first."""
    by_lower = {word.lower(): word for word in valid}
    return [by_lower[word] for word in difflib.get_close_matches(str(name).lower(), by_lower, n=3)]


def suggest(name: object, valid: Iterable[str], valid_are: str = 'valid are') -> str:
    """The part of a message that says what would be right: the nearest names, or all of them if none is near."""
    valid = list(valid)
    near = nearest(name, valid)
    return f'did you mean {" or ".join(near)}?' if near else f'{valid_are}: {", ".join(valid) or "none"}'


def shipped() -> list[str]:
    """Names (without ``.yml``) of the option files that come with the package, sorted."""
    return sorted(file.stem for file in FOLDER.glob('*.yml'))


def find(path: str) -> str:
    """The option file that ``path`` names: the file itself, or one that comes with the package.

    Args:
        path (str): A file, or the name of a shipped one as ``elan_x4``, ``elan_x4.yml`` or ``options/elan_x4.yml``.

    Returns:
        str: Path of a file that is there.

    Raises:
        OptionError: If it names neither; the nearest shipped names are in the message.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    folder, name = os.path.split(os.path.normpath(path))
    stem = name.removesuffix('.yml').removesuffix('.yaml')
    if folder in ('', 'options') and stem in shipped():
        return str(FOLDER / f'{stem}.yml')
    what = 'this is a folder' if os.path.isdir(path) else 'there is no such file'
    near = nearest(stem, shipped())
    right = f'did you mean {" or ".join(near)}?' if near else 'give the path of a YAML file'
    raise OptionError([f'{path}: {what}; {right} (--help lists the option files that come with attnsr)'])


def load(path: str) -> OrderedDict[str, Any]:
    """Reads an option file as plain data.

    Mappings keep their order; ``1e-4`` is a number; dates stay text; an alias is a copy of what it names.

    Args:
        path (str): A YAML file in UTF-8.

    Returns:
        OrderedDict: The file's mapping, made of OrderedDict, list, str, int, float, bool and None.

    Raises:
        OptionError: If the file cannot be read, is empty, is not YAML or not a mapping, repeats a key, has a key
            that is not text, or a tag (``!!python/...``) beyond YAML's plain values. Lines are numbered from 1.
    """
    try:
        text = Path(path).read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise OptionError([f'{path}: cannot be read: {error.strerror}']) from error
    except UnicodeDecodeError as error:
        raise OptionError([f'{path}: is not a text file in UTF-8; an option file is YAML']) from error
    data = _parse(text, path)
    if data is None:
        raise OptionError([f'{path}: is empty; `name`, `model_type`, `datasets` and `network_g` belong there'])
    if not isinstance(data, OrderedDict):
        raise OptionError([f'{path}: is not an option file: a mapping (`key: value` lines) belongs at its top level'])
    _texts[path] = text
    return data


def source_text(path: str) -> str:
    """Text of an option file as :func:`load` last read it in this process, even if the file has changed since.

    Raises:
        KeyError: If ``path`` was not read.
    """
    return _texts[path]


def force(opt: dict[str, Any], entries: Sequence[str]) -> None:
    """Overrides options in place, as ``--force_yml`` names them; nothing is changed if one of them is wrong.

    A value is read as in an option file, except that plain words stay text (``yes``, ``on``) and, as in BasicSR,
    ``none`` is None and a list may be written as in Python.

    Args:
        opt (dict): Options to change.
        entries (Sequence[str]): ``key:key:...=value``; sections must be there, the last key may be new.

    Raises:
        OptionError: If an entry has no '=', names a section that is not there, or its value cannot be read.
    """
    changes: list[tuple[dict[str, Any], str, Any]] = []
    problems: list[str] = []
    for entry in entries:
        where = f'--force_yml {entry}'
        path, equals, text = entry.partition('=')
        *sections, key = path.strip().split(':')
        if not equals or not key:
            problems.append(f'{where}: is not an override; write key=value or section:key=value')
            continue
        if '.' in path and path.split('.')[0] in opt:
            problems.append(f'{where}: keys are parted by colons; write {path.replace(".", ":")}={text}')
            continue
        section: Any = opt
        for depth, name in enumerate(sections):
            inner = [known for known, value in section.items() if isinstance(value, dict)]
            if name not in inner:
                right = suggest(name, inner, 'the sections there are')
                problems.append(f'{where}: there is no section {":".join(sections[: depth + 1])}; {right}')
                break
            section = section[name]
        else:
            try:
                changes.append((section, key, _forced_value(text.strip(), where)))
            except OptionError as error:
                problems += error.problems
    if problems:
        raise OptionError(problems)
    for section, key, value in changes:
        section[key] = value


def _forced_value(text: str, where: str) -> Any:
    """Reads the value of an override, with BasicSR's result for whatever BasicSR could read without running it."""
    word = text.lower()
    if word in ('~', 'none', 'null'):
        return None
    if word in ('true', 'false'):
        return word == 'true'
    if NUMBER.fullmatch(text):
        return int(text) if text.lstrip('+-').isdecimal() else float(text)
    if text.startswith('['):
        try:
            return ast.literal_eval(text)  # reads literals only: no names, no calls
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # not Python's notation: YAML's
    if text[:1] in ('[', '{', '!', '"', "'"):
        return _parse(text, where)
    return text


def _parse(text: str, file: str) -> Any:
    """Plain data of one YAML document; None if there is none. Raises OptionError with lines ``file:line:column``."""
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            builder = _Builder(loader, file)
            data = None if node is None else builder.build(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f'{file}:{mark.line + 1}:{mark.column + 1}' if mark else file
        tab = mark is not None and '\t' in ''.join(text.splitlines()[mark.line : mark.line + 1])
        hint = '; indent with spaces, not tabs' if tab else ''
        raise OptionError([f'{position}: is not YAML: {error.problem or error.context}{hint}']) from error
    except yaml.YAMLError as error:
        raise OptionError([f'{file}: is not a text file; an option file is YAML in UTF-8']) from error
    except RecursionError as error:
        raise OptionError(
            [f'{file}: is nested too deeply; does an alias (*name) stand inside what it names?']
        ) from error
    if builder.problems:
        raise OptionError(builder.problems)
    return data


class _Builder:
    """Builds plain data from YAML's nodes and gathers every key and tag that is wrong."""

    def __init__(self, loader: Any, file: str) -> None:
        self.loader = loader
        self.file = file
        self.problems: list[str] = []
        self.count = 0

    def build(self, node: yaml.Node) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            raise OptionError([f'{self.file}: has more than {MOST_VALUES} values; its aliases (*name) unfold too far'])
        tag = node.tag.removeprefix(YAML_TAG)
        if isinstance(node, yaml.MappingNode) and tag == 'map':
            return self.mapping(node)
        if isinstance(node, yaml.SequenceNode) and tag == 'seq':
            return [self.build(item) for item in node.value]
        if tag in ('str', 'timestamp'):
            return node.value
        if tag in ('int', 'float', 'bool', 'null'):
            try:
                return self.loader.construct_object(node)
            except (ValueError, KeyError, yaml.YAMLError):
                self.problem(node, f'{node.value!r} cannot be read as the tag !!{tag} says')
                return None
        name = f'!!{tag}' if node.tag.startswith(YAML_TAG) else node.tag
        self.problem(node, f'the tag {name} is refused and nothing was run; option files are data: plain values only')
        return None

    def mapping(self, node: yaml.MappingNode) -> OrderedDict[str, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (f'{YAML_TAG}str', f'{YAML_TAG}merge'):
                self.problem(key, f'the key {self.build(key)!r} is not text; write it in quotes')
            elif key.value in first:
                self.problem(key, f'{key.value} is given twice, first on line {first[key.value]}; keep one')
            else:
                first[key.value] = line
        self.loader.flatten_mapping(node)  # `<<: *name` takes over what the other mapping has
        return OrderedDict((key.value, self.build(value)) for key, value in node.value if isinstance(key.value, str))

    def problem(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f'{self.file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {text}')
