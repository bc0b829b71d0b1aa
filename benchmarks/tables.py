"""Results that are no comparison of kernels or networks: a JSON file and a Markdown file for each device and script."""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import torch

import attnsr
from attnsr.benchmarks import results
from attnsr.benchmarks.command import OUTPUT
from attnsr.benchmarks.measuring import machine
from attnsr.errors import UsageError
from attnsr.files import write_atomically


def parser(name: str, description: str | None, rounds: bool = True) -> argparse.ArgumentParser:
    """Of the script of this name; with what all of them take: ``--output`` and, where times are taken, ``--rounds``."""
    parser = argparse.ArgumentParser(
        prog=f'python -m attnsr.benchmarks.{name}',
        description=description.partition('\n')[0] if description else None,
        allow_abbrev=False,
    )
    if rounds:
        parser.add_argument('--rounds', type=int, default=3, metavar='N', help='default: %(default)s')
    parser.add_argument('--output', type=Path, default=OUTPUT, metavar='DIR', help='default: %(default)s')
    return parser


def result_file(folder: Path, what: str) -> Path:
    """``<device>_<what>.json`` in a folder, which is made.

    Raises:
        UsageError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'--output: {folder} cannot be made: {error.strerror}; name another folder') from None
    return folder / f'{results.slug(machine("cpu"))}_{what}.json'


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote; empty where there is nothing yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, content: dict[str, Any], markdown: Sequence[str]) -> None:
    """Write the JSON file ``path``, and lines of Markdown beside it."""
    for file_path, text in ((path, json.dumps(content, indent=1)), (path.with_suffix('.md'), '\n'.join(markdown))):
        with write_atomically(file_path) as file:
            file.write(f'{text}\n'.encode())


def environment() -> dict[str, str]:
    """Versions and date."""
    return {
        'attnsr': attnsr.__version__,
        'torch': torch.__version__,
        'opencv': cv2.__version__,
        'on': date.today().isoformat(),
    }


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(line[column]) for line in (titles, *rows)) for column in range(len(titles))]
    lines = [titles, ['-' * width for width in widths], *rows]
    return [f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |' for line in lines]
