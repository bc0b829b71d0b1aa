"""Gathers what is wrong with an option file: by tables, by signatures, by registries."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from basicsr.utils.registry import Registry

from attnsr.options import schema, signatures
from attnsr.options.reading import nearest, suggest


class Report:
    """Problems of one file, as lines ``FILE: key.path: what is wrong; what would be right``.

    Every method that checks adds the lines of its problems; :attr:`count` before and after tells whether it did.

    Args:
        file (str): The file's name.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []

    @property
    def count(self) -> int:
        return len(self.lines)

    def add(self, key: str, text: str) -> None:
        """Adds a problem of the option ``key`` (names joined by dots)."""
        self.lines.append(f'{self.file}: {key}: {text}')

    def table(
        self,
        where: str,
        options: dict[str, Any],
        table: schema.Table,
        needs: Collection[str] = (),
        strict: bool = True,
        also: Iterable[str] = (),
    ) -> set[str]:
        """Checks a section by its table.

        Args:
            where (str): The section's key; '' for the file.
            options (dict): The section.
            table (Table): Its fields.
            needs (Collection[str]): Which ``Field.required`` hold.
            strict (bool): Whether keys that are not in the table are problems.
            also (Iterable[str]): Further keys that are not.

        Returns:
            set[str]: The keys that misspelt ones seem to mean, which are not reported as missing too.
        """
        dot = f'{where}.' if where else ''
        valid = [*table, *also]
        meant: set[str] = set()
        for key in options if strict else ():
            if key in valid:
                continue
            meant.update(nearest(key, [name for name in valid if name not in options])[:1])
            if not where and key in schema.COMMAND_LINE:
                right = f'it is given on the command line: {schema.COMMAND_LINE[key]}'
            else:
                right = suggest(key, valid)
            self.add(f'{dot}{key}', f'is not an option; {right}')
        for key, field in table.items():
            if key in options:
                if not field.kind.accepts(options[key]):
                    self.add(f'{dot}{key}', f'is {show(options[key])}; it must be {field.kind.text}')
            elif field.required in needs and key not in meant:
                self.add(f'{dot}{key}', f'is missing; it must be {field.kind.text} ({field.help})')
        return meant

    def registered(self, where: str, options: Any, registry: Registry, what: str) -> Any:
        """What ``type`` of a section names in a registry; None if it names nothing, which is a problem."""
        if not isinstance(options, dict):
            return None  # the table of the section around it has that
        name = options.get('type')
        target = lookup(registry, name)
        if 'type' not in options:
            self.add(f'{where}.type', f'is missing; it must name a {what}, and {registered_names("", registry)}')
        elif target is None:
            self.add(f'{where}.type', f'no {what} is registered as {name}; {registered_names(name, registry)}')
        return target

    def arguments(
        self, where: str, name: str, target: Callable[..., Any], options: dict[str, Any], given: Iterable[str] = ()
    ) -> bool:
        """Checks options against the parameters of the class or function that they are handed to.

        Args:
            where (str): The section's key.
            name (str): The name of ``target`` in messages.
            target (Callable): Class or function.
            options (dict): Its keyword arguments.
            given (Iterable[str]): Parameters that BasicSR gives itself.

        Returns:
            bool: Whether everything is right.
        """
        before = self.count
        known = {key: each for key, each in signatures.parameters(target).items() if key not in given}
        hints = signatures.hints(target)
        meant: set[str] = set()
        for key, value in options.items():
            if key not in known:
                if not signatures.reads_other_names(target):
                    meant.update(nearest(key, [each for each in known if each not in options])[:1])
                    self.add(f'{where}.{key}', f'is not an option of {name}; {suggest(key, known)}')
            elif key in hints:
                if not signatures.matches(value, hints[key]):
                    self.add(f'{where}.{key}', f'is {show(value)}; it must be {signatures.describe(hints[key])}')
            elif not signatures.fits_default(value, known[key].default):
                default = known[key].default
                example = show(list(default) if isinstance(default, tuple) else default)
                self.add(f'{where}.{key}', f'is {show(value)}; it must be of the kind of its default, {example}')
        for key, each in known.items():
            if each.default is each.empty and key not in options and key not in meant:
                kind = f'; it must be {signatures.describe(hints[key])}' if key in hints else ''
                self.add(f'{where}.{key}', f'is missing, and {name} has no default for it{kind}')
        return self.count == before

    def attempt(self, where: str, build: Callable[[], Any]) -> None:
        """Builds something; what its constructor objects to is a problem."""
        try:
            build()
        except (ValueError, TypeError, NotImplementedError) as error:
            self.add(where, ' '.join(str(error).split()))


def section(opt: dict[str, Any], key: str) -> dict[str, Any]:
    """The section below ``key``; an empty one if it is missing or not a section."""
    value = opt.get(key)
    return value if isinstance(value, dict) else {}


def without_type(options: dict[str, Any]) -> dict[str, Any]:
    """A section without its ``type``: what is handed to the constructor."""
    return {key: value for key, value in options.items() if key != 'type'}


def lookup(registry: Registry, name: Any) -> Any:
    """What a registry holds under ``name``, or under ``name`` with BasicSR's suffix; None if there is nothing."""
    entries = dict(iter(registry))
    return entries.get(name, entries.get(f'{name}_basicsr')) if isinstance(name, str) else None


def origin(target: Any) -> str:
    """The package that a class or function comes from; '' for None."""
    return getattr(target, '__module__', '').split('.')[0]


def registered_names(name: Any, registry: Registry) -> str:
    """The registered names that ``name`` may mean, or all of them; which are attnsr's is said too."""
    entries = {entry.removesuffix('_basicsr'): target for entry, target in iter(registry)}
    own = [entry for entry, target in entries.items() if origin(target) == 'attnsr']
    right = suggest(name, entries)
    return f'{right} (of attnsr: {", ".join(own)})' if own else right


def show(value: Any) -> str:
    """A value as an option file would have it, at most 60 characters of it."""
    if value is None:
        return '~'
    if isinstance(value, dict):
        return 'a section'
    if isinstance(value, bool):
        return 'true' if value else 'false'
    text = f'the text {value!r}' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
