"""Which callback a rank is in, and by which name it calls something collective there.

    with InCallback(here, "Probe.on_epoch_end", everywhere=True):
        callback.on_epoch_end(epoch, logs)

Batches have callbacks, too: entering and leaving are assignments. The way to a collective is looked at when there is
one, or by the watch's thread.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from distfit.errors import RunError
from distfit.watch.calls import Call
from distfit.watch.here import Here
from distfit.watch.protocol import Message

# What users call these objects.
_SPOKEN = {"Session": "session", "HandWritten": "session", "_Watched": "session.transport"}
_OWN = "distfit."
_CALLBACKS = "distfit.callbacks."
# All that Horovod's functions do at once and together goes through this module of its.
_COLLECTIVES, _LIBRARY = "horovod.tensorflow.mpi_ops", "horovod."
_NOTE = "_distfit_callback"


class InCallback:
    """The context manager of `Watch.in_callback`."""

    __slots__ = ("_before", "_here", "_now")

    def __init__(self, here: Here, name: str, everywhere: bool) -> None:
        self._here, self._now = here, (name, everywhere)
        self._before: tuple[str, bool] | None = None

    def __enter__(self) -> None:
        here, now = self._here, self._now
        self._before = here.callback
        here.callback = now
        here.ran.append((here.waits, now[0]))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._here.callback = self._before
        if error is not None:
            # An attribute would be refused by an exception that is a frozen dataclass.
            error.__dict__.setdefault(_NOTE, self._now[0])


def raised_in(error: BaseException) -> str:
    """The callback that an error came from; "" for none."""
    return str(error.__dict__.get(_NOTE, ""))


def refuse_on_the_chief_alone(here: Here) -> None:
    """
    Raises:
        RunError: this rank is in a callback that the others do not run.
    """
    name, everywhere = here.callback or ("", True)
    if everywhere:
        return
    called, place = _called(sys._getframe(1))
    raise RunError(
        f"{name} runs on the chief alone and called {called} ({place}), which needs all ranks. Let it run everywhere: "
        f"distfit.on_every_rank({name.split('.')[0]}(...)), or take the call out of it. On the chief alone run "
        "distfit.chief_only(...) and callbacks that write."
    )


def call_of(here: Here, what: str) -> Call:
    """What this rank is about to do inside of its callback.

    Args:
        here: of this rank.
        what: as in `Watch.waiting`.
    """
    called, place = _called(sys._getframe(1))
    return _call(here, what, called, place)


def unasked_call(here: Here) -> Call | None:
    """The function of another library in which this rank's callback waits, as far as Python's frames show it; from
    any thread."""
    if here.callback is None or here.wait is not None:
        return None
    frames = list(_outwards(sys._current_frames().get(here.thread)))
    if _COLLECTIVES not in map(_module, frames):
        return None
    outermost = max(number for number, frame in enumerate(frames) if _module(frame).startswith(_LIBRARY))
    called = f"{_module(frames[outermost])}.{frames[outermost].f_code.co_name}"
    place = _place(frames[min(outermost + 1, len(frames) - 1)])
    return _call(here, "another library's collective", called, place, unasked=True)


class Unasked:
    """What to tell the chief of functions of other libraries, looked at now and then.

    Args:
        here: of this rank.
    """

    def __init__(self, here: Here) -> None:
        self._here = here
        self._seen: Call | None = None
        self._told: Call | None = None

    def news(self) -> Message | None:
        """A message when the rank's callback has been in one for two looks, and when it has left it."""
        before, self._seen = self._seen, unasked_call(self._here)
        if self._told is not None and self._seen != self._told:
            self._told = None
            return {"type": "call", "call": None}
        if self._told is None and self._seen is not None and self._seen == before:
            self._told = self._seen
            return self._told.message()
        return None


def _call(here: Here, what: str, called: str, place: str, unasked: bool = False) -> Call:
    """Of the rank's next wait."""
    name, number = here.callback_name, here.waits + 1
    return Call(number, what, called, name, place, here.position, here.inside, here.started, unasked)


def _called(frame: FrameType) -> tuple[str, str]:
    """The function of distfit that a callback has called, and where: on the way outwards the last one of distfit."""
    called = frame
    for caller in _outwards(frame):
        module = _module(caller)
        if module == "contextlib":
            continue
        if not module.startswith(_OWN) or module.startswith(_CALLBACKS):
            return _spoken(called), _place(caller)
        called = caller
    return _spoken(called), _place(called)


def _spoken(frame: FrameType) -> str:
    owner, _, name = frame.f_code.co_qualname.rpartition(".")
    if not owner:
        return f"distfit.{name}"
    return _SPOKEN.get(owner, owner) + ("" if name == "__call__" else f".{name}")


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
