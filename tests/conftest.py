"""Makes this folder importable, so that tests in its sub-folders share their helpers; fixtures of whole runs."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import attnsr  # noqa: F401  (makes basicsr importable)

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Training:
    """A training that has ended: where it was started, and its process's result."""

    folder: Path
    process: subprocess.CompletedProcess

    @property
    def experiment(self) -> Path:
        return self.folder / 'experiments' / 'tiny'


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The option file of :func:`util.build_tiny`, beside its LMDBs; to be left as it is."""
    import util

    return util.build_tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """All 40 iterations of ``tiny`` by the command line, through pipes and without interruption; not to be changed."""
    import util

    folder = tmp_path_factory.mktemp('trained')
    return Training(folder, util.run('-m', 'attnsr', 'train', '-opt', tiny, '--auto_resume', cwd=folder))


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
