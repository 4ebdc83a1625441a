"""Work of one thread, ahead of the one that takes it, in bounded memory.

    closed = threading.Event()
    ahead = ReadAhead(items, closed, size_of=len, blocks=2, name="distfit-lane-0")
    ahead.take(8)
    ahead.close()

Unlike `ahead`, which computes many results at a time and ends with its loop, this one follows a single iterator
that holds files open, may be left before its end, and has to end its thread then.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from distfit.errors import RunError

Item = TypeVar("Item")

# A block is handed on as a whole, which costs a few microseconds.
BLOCK_BYTES = 2**20
# A thread whose storage does not answer cannot be ended; it is left behind and holds up no exit.
_PATIENCE_S = 5.0


class ReadAhead(Generic[Item]):
    """Items of an iterator that a thread goes through.

    Args:
        items: what the thread goes through; it ends the thread soon when `closed` is set.
        closed: set by `close`.
        size_of: bytes of an item.
        blocks: of a megabyte, or of one item where that is longer, that may wait; two more are in use.
        name: of the thread.
    """

    def __init__(
        self, items: Iterator[Item], closed: threading.Event, size_of: Callable[[Item], int], blocks: int, name: str
    ) -> None:
        self._taken: deque[Item] = deque()
        self._ended = False
        self._closed = closed
        self._room = threading.Semaphore(blocks)
        self._ready: queue.SimpleQueue[list[Item] | BaseException | None] = queue.SimpleQueue()
        # The thread knows nothing of this object, so as not to keep it alive.
        work = (_blocks(items, size_of), self._room, self._ready, closed)
        self._thread = threading.Thread(target=_work, args=work, name=name, daemon=True)
        self._thread.start()

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left; waits until that is known.

        Raises:
            BaseException: as `take`.
        """
        self._hold(1)
        return not self._taken

    def take(self, count: int) -> list[Item]:
        """The next ones; fewer only at the end.

        Raises:
            BaseException: what the thread ran into, after what came before it.
            RunError: it was closed meanwhile.
        """
        self._hold(count)
        return [self._taken.popleft() for _ in range(min(count, len(self._taken)))]

    def close(self) -> None:
        """Ends the thread; may be called twice, and by any thread."""
        self._closed.set()
        self._room.release()
        # The collector of garbage may call this in the thread itself.
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE_S)

    def _hold(self, count: int) -> None:
        while len(self._taken) < count and not self._ended:
            got = self._ready.get()
            if isinstance(got, list):
                self._taken.extend(got)
                self._room.release()
                continue
            self._ready.put(got)  # whoever asks once more hears the same
            if isinstance(got, BaseException):
                raise got
            if self._closed.is_set():
                raise RunError("Expected streams that are open, received the next step of ones that were closed.")
            self._ended = True


def _blocks(items: Iterator[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    block: list[Item] = []
    held = 0
    for item in items:
        block.append(item)
        held += size_of(item)
        if held >= BLOCK_BYTES:
            yield block
            block, held = [], 0
    yield block


def _work(
    blocks: Iterator[list[Item]],
    room: threading.Semaphore,
    ready: queue.SimpleQueue[list[Item] | BaseException | None],
    closed: threading.Event,
) -> None:
    end: BaseException | None = None
    try:
        for block in blocks:
            room.acquire()
            if closed.is_set():
                break
            ready.put(block)
    except BaseException as error:
        end = error
    ready.put(end)
