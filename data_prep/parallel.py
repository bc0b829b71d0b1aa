"""Work on many items in threads: results in the order of the items, and few of them in memory at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ['available_cores', 'in_order']

Item = TypeVar('Item')
Result = TypeVar('Result')


def available_cores() -> int:
    """The cores that this process may use, which in a container or under Slurm are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map`` with ``workers`` threads. Decoding, encoding and array arithmetic let other threads run meanwhile.

    At most two items more than there are workers are begun before their results are taken, so that memory is bounded.
    When the caller stops early, or the function raises, items not yet begun are never begun.

    Yields:
        The results, in the order of the items whatever the order they are finished in.

    Raises:
        Whatever the function raises, at the place of its item.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
