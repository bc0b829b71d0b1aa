"""How much memory is free, and what it looks like when there is too little."""

from pathlib import Path

import torch

from attnsr.errors import UsageError

__all__ = ['OutOfMemory', 'free_memory', 'is_out_of_memory']

#: Taken to be free where the system does not tell.
ASSUMED = 2 * 2**30

#: What a plain RuntimeError says of too little memory on the CPU; the last are oneDNN's.
ON_CPU = ("can't allocate memory", 'not enough memory', 'could not create a primitive', 'could not create a memory')

CGROUP = Path('/sys/fs/cgroup')


class OutOfMemory(UsageError):
    """Memory does not suffice, and nothing can be made smaller that was not asked for as it is."""


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of a GPU's memory, or of the machine's and its control group's."""
    if device.type == 'cuda':
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(min(_of_machine(), _of_control_group()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or Python says that memory does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ON_CPU)


def _of_machine() -> int:
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
    except OSError:
        return ASSUMED
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:')), ASSUMED)


def _of_control_group() -> float:
    """What a container leaves; infinite where there is no limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ('memory.max', 'memory.current'))
        # Pages of files are given back when they are wanted.
        stat = dict(line.split() for line in (CGROUP / 'memory.stat').read_text().splitlines())
    except (OSError, ValueError):
        return float('inf')
    return float('inf') if limit == 'max' else max(0, int(limit) - int(used) + int(stat.get('inactive_file', 0)))
