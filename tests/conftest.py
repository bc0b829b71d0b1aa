"""Fixtures of whole runs, and of what BasicSR logs."""

import logging
from collections.abc import Iterator
from pathlib import Path

import attnsr  # noqa: F401  (makes basicsr importable)

# isort: split
import pytest
import util


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The option file of :func:`util.build_tiny`, beside its LMDBs; to be left as it is."""
    return util.build_tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> util.Training:
    """All 40 iterations of ``tiny`` by the command line, through pipes and without interruption; not to be changed."""
    folder = tmp_path_factory.mktemp('trained')
    return util.Training(folder, util.run('-m', 'attnsr', 'train', '-opt', tiny, '--auto_resume', cwd=folder))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What BasicSR's logger is given: level and message."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f'{record.levelname}: {record.getMessage()}')

    lines: list[str] = []
    handler = Lines()
    logger = logging.getLogger('basicsr')
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
