"""Work that stands back: behind a training that wants every core, a thread works a tenth of the time.

    pace = Pace()
    with pace.kept():                  # in the thread that works
        for block in blocks:
            work(block)                # for a millisecond or so
            rest()                     # nine times as long, where no core is free
    pace.hurry()                       # from another thread, which waits for the end of the work

A thread of low priority is not enough: what it writes in one go is missing from the two or three steps of the training
that meet it, and these are the longest gaps of all. Spread out, it lengthens each a little.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Of rest for each second of work.
RESTS = 9.0
# Shorter pieces of work are put together: below, waking up costs more than the work.
_PIECE_S = 0.001
# A boundary of the training that does not come: the first step is traced, say, or it is a long one.
_MOST_S = 5.0

_of_thread = threading.local()


def rest() -> None:
    """Between two pieces of work. Where nobody has asked for a pace, as in reading a checkpoint, nothing."""
    pace = getattr(_of_thread, "pace", None)
    if pace is not None:
        pace.rest()


class Pace:
    """Of one piece of work in a thread of its own. The time that it waits for a disk is no work."""

    def __init__(self) -> None:
        self._begins, self._hurries = threading.Event(), threading.Event()
        self._since = 0.0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """In the thread that works; its work begins when `begin` or `hurry` says so, or a few seconds have passed."""
        self._begins.wait(_MOST_S)
        self._since, _of_thread.pace = time.thread_time(), self
        try:
            yield
        finally:
            _of_thread.pace = None

    def begin(self) -> None:
        """The step that met the copy has ended: two delays would make one long gap."""
        self._begins.set()

    def hurry(self) -> None:
        """Somebody waits: no rest any more."""
        self._hurries.set()
        self._begins.set()

    def rest(self) -> None:
        worked = time.thread_time() - self._since
        if worked < _PIECE_S:
            return
        if not (self._hurries.is_set() or _is_a_core_free()):
            self._hurries.wait(RESTS * worked)
        self._since = time.thread_time()


def _is_a_core_free() -> bool:
    """Whether all that ran in the last minute leaves one. In a container the load is that of its host, and in some
    sandboxes nobody knows it: then rest is taken where none was needed."""
    try:
        return os.getloadavg()[0] <= len(os.sched_getaffinity(0)) - 1
    except OSError:
        return False
