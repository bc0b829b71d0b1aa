"""Tables of results as plain text and as Markdown, and results as JSON."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnsr.files import write_atomically

__all__ = ['Column', 'difference', 'json_text', 'markdown', 'mean', 'plain', 'write']


@dataclass
class Column:
    """One column of a table.

    Attributes:
        over: What stands above the title, for example whose figures they are; may be empty.
        title: The title.
        number: Set to the right.
    """

    over: str
    title: str
    number: bool = True


def plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table as plain text: titles, in two lines where something stands above one, a rule, the rows."""
    titles = [[c.over for c in columns], [c.title for c in columns]]
    titles = titles if any(titles[0]) else titles[1:]
    cells = [*titles, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        '  '.join(cell.rjust(w) if c.number else cell.ljust(w) for c, cell, w in zip(columns, row, widths, strict=True))
        for row in cells
    ]
    lines.insert(len(titles), '-' * len(lines[0]))
    return [line.rstrip() for line in lines]


def markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same table as Markdown."""
    titles = [f'{c.over} {c.title}'.strip() for c in columns]
    sides = ['---:' if c.number else ':---' for c in columns]
    return [f'| {" | ".join(row)} |' for row in (titles, sides, *rows)]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is missing: a mean over fewer images would not compare with the others."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def difference(ours: float | None, theirs: float | None) -> float | None:
    """None where a value is missing, and where both are infinite."""
    if ours is None or theirs is None or math.isnan(ours - theirs):
        return None
    return ours - theirs


def json_text(content: Any) -> str:
    """As JSON, which has no infinity: the PSNR of identical images is the string ``"inf"``, which ``float()`` reads."""
    return json.dumps(_jsonable(content), indent=2, allow_nan=False, ensure_ascii=False) + '\n'


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and make the folders that it lies in.

    Raises:
        OSError: a folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _jsonable(value: Any) -> Any:
    """Copy of nested dicts and lists in which floats that JSON lacks (inf, nan) are strings."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
