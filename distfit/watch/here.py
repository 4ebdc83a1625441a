"""What this rank is doing: written by the main thread with plain assignments, read by the watch's thread."""

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from distfit.watch.protocol import Message
from distfit.watch.stacks import all_stacks

if TYPE_CHECKING:
    from distfit.watch.calls import Call

_RAN = 16


class Here:
    """Position and wait of this rank.

    Attributes:
        position: where the loop is, for messages ("epoch 2, step 17"); "" outside of training.
        wait: (what, since when on the monotonic clock, the number of this wait) while inside something collective,
            else None.
        waits: how often this rank has begun to wait. All ranks make the same collectives, so it says how far one is.
        callback: (class and method, whether every rank runs it) while a callback may call something collective, None
            outside of callbacks, and where all ranks have agreed to what a callback calls.
        ran: the callbacks entered last, each as (`waits` at that time, class and method).
        call: which this rank has announced and waits to make, else None.
        met: set when all ranks have announced the same call.
        thread: of the training.
        inside: what this rank does in a section that needs every rank ("training"); "" outside of one.
        limit_s: seconds, > 0, that one wait may take.
        started: sections entered so far.
        done: number of the last section that ended well. A rank that left normally is missed only in
            sections with a greater number, so that ranks may end a section at different times.
    """

    def __init__(self, stall_limit_s: float) -> None:
        self.position = ""
        self.wait: tuple[str, float, int] | None = None
        self.waits = 0
        self.callback: tuple[str, bool] | None = None
        self.ran: deque[tuple[int, str]] = deque(maxlen=_RAN)
        self.call: Call | None = None
        self.met = threading.Event()
        self.thread = threading.get_ident()
        self.inside = ""
        self.started = self.done = 0
        self.limit_s = stall_limit_s
        self._told = False

    @property
    def callback_name(self) -> str:
        """Of the callback that this rank is in; "" outside."""
        callback = self.callback
        return callback[0] if callback else ""

    @property
    def ran_last(self) -> str:
        """The callbacks that this rank has run since it waited last: a rank that is missing may be in one of them."""
        ran = list(self.ran)
        return ", ".join(dict.fromkeys(name for waits, name in ran if waits == ran[-1][0]))

    def section(self) -> Message:
        """What the chief has to know whenever this rank enters or leaves a section."""
        return {"type": "running", "what": self.inside, "started": self.started, "done": self.done}

    def stalled(self) -> Message | None:
        """The message to send when this rank has waited for longer than the limit; once."""
        wait = self.wait
        if wait is None or self._told or time.monotonic() - wait[1] < self.limit_s:
            return None
        self._told = True
        return {
            "type": "stalled",
            "what": wait[0],
            "seconds": time.monotonic() - wait[1],
            "limit_s": self.limit_s,
        }

    def stacks(self) -> Message:
        """The answer to the chief's question where every thread is."""
        wait = self.wait
        return {
            "type": "stacks",
            "text": all_stacks(),
            "waiting": wait[0] if wait else None,
            "position": self.position,
            "callback": self.callback_name,
            "ran": self.ran_last,
        }

    def all_have_met(self) -> None:
        """All ranks have announced the same call; from the watch's thread. Nothing is waited for from here on: the
        chief may be told to be gone before this rank's own thread has woken up."""
        self.call = None
        self.met.set()

    def place(self) -> Message:
        """The answer to the chief's question what this rank waits in; what it announces itself is none of that."""
        what, _, number = self.wait or ("", 0.0, 0)
        return {"type": "place", "what": what if self.call is None else "", "number": number}


class Waiting:
    """The context manager of `Watch.waiting`: assignments alone, as it surrounds every step."""

    __slots__ = ("_before", "_here", "_what")

    def __init__(self, here: Here, what: str) -> None:
        self._here, self._what = here, what
        self._before: tuple[str, float, int] | None = None

    def __enter__(self) -> None:
        here, before = self._here, self._here.wait
        self._before = before
        here.waits += 1
        # Of one wait inside of another, the outer one says more: the step, not how a part of it travels.
        here.wait = (before[0] if before else self._what, time.monotonic(), here.waits)

    def __exit__(self, *error: object) -> None:
        self._here.wait = self._before
