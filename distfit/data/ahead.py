"""Work of several threads, in order and without holding more than a few results.

    for number, data in zip(numbers, ahead(read, numbers), strict=True): ...

Reading and decoding release Python's lock, so threads are enough, and start at once.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

# Beyond the cores, some threads wait for a disk or a network file system.
WAITING_THREADS = 4


def usual_threads() -> int:
    """One for each core that this process may use, and some that wait."""
    return len(os.sched_getaffinity(0)) + WAITING_THREADS


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int | None = None) -> Generator[Out, None, None]:
    """Results of `function`, in the order of the items, computed ahead in threads.

    Args:
        function: safe to call from several threads.
        items: any number of them; at most two for each thread are in work or wait.
        threads: by default one for each core that this process may use, and four more.

    Raises:
        Exception: what `function` raised, at its item; what was not yet started is not started.

    >>> list(ahead(lambda number: number ** 2, range(5)))
    [0, 1, 4, 9, 16]
    """
    threads = threads or usual_threads()
    items = iter(items)
    pool = ThreadPoolExecutor(threads, "distfit-ahead")
    try:
        waiting: deque[Future[Out]] = deque(pool.submit(function, item) for item in islice(items, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)
