"""The smaller and the larger of two sizes that a compiler may not know yet."""

from typing import cast

import torch


def smaller(a: int, b: int) -> int:
    # In torch.compile, PyTorch 2.11 knows Python's own only; torch.export would take Python's for a condition.
    return min(a, b) if torch.compiler.is_dynamo_compiling() else cast(int, torch.sym_min(a, b))


def larger(a: int, b: int) -> int:
    return max(a, b) if torch.compiler.is_dynamo_compiling() else cast(int, torch.sym_max(a, b))
