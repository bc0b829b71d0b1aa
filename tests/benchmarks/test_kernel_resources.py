"""Every configuration of every kernel fits every GPU it is meant for: compiled here, without any of them.

What each takes is in docs/kernel_resources.json, each under the source that it was compiled from. Here all sources are
compared, and some are compiled again; ``pytest -m exhaustive`` compiles all of them, in some ten minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnsr.benchmarks.kernel_resources import RECORD, SHARED_LIMITS

REPOSITORY = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
from attnsr.benchmarks import kernel_resources

launches = kernel_resources.distinct_launches()
print(json.dumps([list(kernel_resources.check(launches, Path(docs), jobs=1)) for docs in sys.argv[1:]]))
"""


def test_all_configurations_are_known_and_fit(tmp_path):
    changed = shutil.copytree(REPOSITORY / 'docs', tmp_path / 'docs')
    record = json.loads((changed / RECORD).read_text())
    lacking, spilling, outdated = (record['resources'][place] for place in (3, 7, 11))
    record['resources'].remove(lacking)
    spilling['on']['90']['stack'] = 300
    outdated['source'] = '0' * 16
    (changed / RECORD).write_text(json.dumps(record))

    # In a process of its own: the kernels of this one are in the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-c', SCRIPT, str(REPOSITORY / 'docs'), str(changed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    as_it_is, told = json.loads(done.stdout)
    assert as_it_is == []
    if 'is of Triton' not in done.stderr:  # which may compile to something else
        for row in (lacking, outdated):
            for target in SHARED_LIMITS:
                assert any(
                    f' lacks {row["operation"]}.{row["kernel"]} ' in line and f'sm_{target}' in line for line in told
                )
        assert any(f' has {outdated["operation"]}.{outdated["kernel"]} as it is no more' in line for line in told)
    assert any('on sm_90: 300 bytes of stack' in line for line in told)
    assert any('has another table' in line for line in told)


def test_every_kernel_of_every_operation_is_compiled_for_every_target():
    rows = json.loads((REPOSITORY / 'docs' / RECORD).read_text())['resources']
    assert {tuple(map(int, row['on'])) for row in rows} == {tuple(SHARED_LIMITS)}
    compiled = {row['kernel'] for row in rows}
    for path in (REPOSITORY / 'ops').glob('*/triton_kernel.py'):
        launched = set(re.findall(r'_?launch\(\s*(_\w+),', path.read_text()))
        assert launched
        assert launched <= compiled


@pytest.mark.exhaustive
def test_all_configurations_compiled_anew_fit(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    environment['TRITON_CACHE_DIR'] = str(tmp_path)
    command = [sys.executable, '-m', 'attnsr.benchmarks.kernel_resources']
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
