"""Fixtures of whole runs, and of what BasicSR logs."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# As many test processes as cores: a process that wants them all makes every other wait.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

# Without a GPU, kernels run in Triton's interpreter, which must be chosen before Triton is imported, as BasicSR does.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without it cuBLAS is not deterministic

import attnsr  # noqa: F401  (makes basicsr importable)

# isort: split
import pytest
import util


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of kernels run on the GPU where there is one, and in the interpreter where there is none.

    Those that take many minutes run only where they are asked for by name.
    """
    for item in items:
        if item.get_closest_marker('interpreter') and _is_left_to_a_gpu(item):
            item.add_marker('exhaustive')
    left_out = {'interpreter' if torch.cuda.is_available() else 'gpu'}
    if 'exhaustive' not in config.option.markexpr:
        left_out.add('exhaustive')
    dropped = [item for item in items if not left_out.isdisjoint(mark.name for mark in item.iter_markers())]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _is_left_to_a_gpu(item: pytest.Item) -> bool:
    """Of half precision the interpreter, which is slow, sees bfloat16."""
    given = item.callspec.params.values() if hasattr(item, 'callspec') else ()
    return any(value is torch.float16 for value in given)


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
