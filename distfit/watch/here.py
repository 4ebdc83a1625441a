"""What this rank is doing: written by the main thread with plain assignments, read by the watch's thread."""

import time

from distfit.watch.protocol import Message
from distfit.watch.stacks import all_stacks


class Here:
    """Position and wait of this rank.

    Attributes:
        position: where the loop is, for messages ("epoch 2, step 17"); "" outside of training.
        wait: (what, since when on the monotonic clock) while inside something collective, else None.
        inside: what this rank does in a section that needs every rank ("training"); "" outside of one.
        limit_s: seconds, > 0, that one wait may take.
        started: sections entered so far.
        done: number of the last section that ended well. A rank that left normally is missed only in
            sections with a greater number, so that ranks may end a section at different times.
    """

    __slots__ = ("_told", "done", "inside", "limit_s", "position", "started", "wait")

    def __init__(self, stall_limit_s: float) -> None:
        self.position = ""
        self.wait: tuple[str, float] | None = None
        self.inside = ""
        self.started = self.done = 0
        self.limit_s = stall_limit_s
        self._told = False

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
        waiting = wait[0] if wait else None
        return {"type": "stacks", "text": all_stacks(), "waiting": waiting, "position": self.position}


class Waiting:
    """The context manager of `Watch.waiting`: two assignments, as it surrounds every step."""

    __slots__ = ("_before", "_here", "_what")

    def __init__(self, here: Here, what: str) -> None:
        self._here, self._what = here, what
        self._before: tuple[str, float] | None = None

    def __enter__(self) -> None:
        self._before = self._here.wait
        self._here.wait = (self._what, time.monotonic())

    def __exit__(self, *error: object) -> None:
        self._here.wait = self._before
