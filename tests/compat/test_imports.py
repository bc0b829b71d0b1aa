"""Importing attnsr: before, after and without BasicSR. Each case is a process of its own."""

from pathlib import Path

import util

from attnsr.compat.imports import FUNCTIONAL_TENSOR

AS_A_USER = """
import sys
sys.argv = ['script', '--no_option_of_ours']
try:
    import basicsr
except ModuleNotFoundError as error:
    print('stock:', error.name)
print('import')
import attnsr
import basicsr
import torch
print('done')
print(sys.argv, torch.cuda.is_initialized())
"""

# A user who made BasicSR importable himself, took names out of it, and then imports attnsr.
EARLY_USER = """
import os
import sys
import types
from time import perf_counter

import torch
from torchvision.transforms.functional import rgb_to_grayscale

shim = types.ModuleType('torchvision.transforms.functional_tensor')
shim.rgb_to_grayscale = rgb_to_grayscale
sys.modules[shim.__name__] = shim
import basicsr
import basicsr.train as pipelines
from basicsr.data import build_dataset
from basicsr.models.base_model import BaseModel
from basicsr.train import load_resume_state, train_pipeline
from basicsr.utils.options import parse_options

kept = {'stock': parse_options}
for _ in range(3):
    if not os.fork():
        start = perf_counter()
        import attnsr
        print('seconds', perf_counter() - start, flush=True)
        os._exit(0)
    os.wait()

import attnsr
from attnsr import options

assert parse_options is options.parse_options is basicsr.parse_options is pipelines.parse_options is not kept['stock']
assert load_resume_state.__module__ == 'attnsr.compat.resuming'
assert load_resume_state is pipelines.load_resume_state is basicsr.load_resume_state
assert BaseModel.load_network.__module__ == 'attnsr.compat.networks'
assert build_dataset is basicsr.data.build_dataset is not pipelines.build_dataset
assert train_pipeline.__globals__['load_resume_state'] is load_resume_state

import importlib
from basicsr.utils.registry import ARCH_REGISTRY

elan = ARCH_REGISTRY.get('ELAN')
for name in [name for name in sys.modules if name.startswith(('attnsr.archs.', 'attnsr.losses.'))]:
    importlib.reload(sys.modules[name])
importlib.reload(attnsr.archs)
importlib.reload(attnsr.losses)
assert ARCH_REGISTRY.get('ELAN') is attnsr.archs.ELAN is not elan
print('done')
"""


def output(script: str, cwd: Path, status: int = 0, **variables: str) -> tuple[list[str], list[str]]:
    """Lines of output and of errors of a script."""
    ended = util.run('-W', 'ignore', '-c', script, cwd=cwd, status=status, variables=variables)
    return ended.stdout.splitlines(), ended.stderr.splitlines()


def test_stock_basicsr_does_not_import_and_with_attnsr_it_does_in_silence(tmp_path: Path) -> None:
    """Even after the import failed, in the same process; no GPU and no command line is looked at."""
    out, err = output(AS_A_USER, tmp_path)
    if out[0] != 'import':
        assert out.pop(0) == f'stock: {FUNCTIONAL_TENSOR}'
    assert out == ['import', 'done', "['script', '--no_option_of_ours'] False"]
    assert err == []
    assert list(tmp_path.iterdir()) == []


def test_imported_after_basicsr_it_is_quick_and_mends_what_was_taken_out_before(tmp_path: Path) -> None:
    out, err = output(EARLY_USER, tmp_path)
    assert err == []
    assert out[-1] == 'done'
    seconds = [float(line.removeprefix('seconds ')) for line in out[:-1]]
    assert len(seconds) == 3
    assert min(seconds) < 1


def test_without_basicsr_one_sentence_says_so(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['basicsr'] = None; import attnsr"
    _, err = output(hidden, tmp_path, status=1)
    assert err[-1] == 'ImportError: attnsr builds on BasicSR, which is not installed: pip install basicsr.'


def test_a_basicsr_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / 'basicsr.py').write_text("raise ImportError('operator torchvision::nms does not exist')")
    _, err = output('import attnsr', tmp_path, status=1, PYTHONPATH=str(tmp_path))
    assert err[-1] == (
        'ImportError: BasicSR is installed but cannot be imported: operator torchvision::nms does not exist. If torch '
        'and torchvision do not match, install them together: pip install --upgrade torch torchvision'
    )
