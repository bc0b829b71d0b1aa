"""Settings of PyTorch's that decide how kernels compute."""

import subprocess
import sys

# PyTorch has two ways to say it, and refuses to read the one after the other was used: each in a process of its own.
EXPECTED = {
    'pass': 'tf32x3',
    'torch.backends.cuda.matmul.allow_tf32 = True': 'tf32',
    "torch.set_float32_matmul_precision('high')": 'tf32',
    "torch.backends.fp32_precision = 'tf32'": 'tf32',
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": 'tf32',
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'": 'tf32x3',
}

SCRIPT = """
import os
import torch
from attnsr.ops import launching

for setting in {settings}:
    if os.fork() == 0:
        exec(setting)
        print(launching.input_precision(torch.empty(0)), flush=True)
        os._exit(0)
    os.wait()
"""


def test_products_of_float32_are_as_exact_as_pytorchs_own():
    command = [sys.executable, '-c', SCRIPT.format(settings=list(EXPECTED))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == list(EXPECTED.values()), done.stderr
