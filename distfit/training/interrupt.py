"""Ctrl-C that is not lost.

    with Interrupt().heard() as interrupt:
        for batch in batches:
            run(batch)
            interrupt.check()           # raises the KeyboardInterrupt that was swallowed

Python raises KeyboardInterrupt wherever the main thread happens to be when a step returns, which may be a finalizer
(Keras has one for each tensor that carries a mask or a score). Python ignores what a finalizer raises, and the run
would go on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Remembers that Ctrl-C was pressed."""

    def __init__(self) -> None:
        self._came = False

    @contextmanager
    def heard(self) -> Iterator[Interrupt]:
        """Listen meanwhile; whoever handles SIGINT in another way than Python's own keeps doing so."""
        ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if ours:
            signal.signal(signal.SIGINT, self._note)
        try:
            yield self
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that came and did not end this."""
        if self._came:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        signal.default_int_handler(number, frame)
