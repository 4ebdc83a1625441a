"""Writes in the background: one thread, one job in flight, and no error is lost.

    writer = Writer("runs/a")
    writer.check()                         # at a boundary: raises what the last job raised, lets one begin
    if not writer.busy:
        snapshot.take()
        writer.start(lambda: checkpoints.publish(step, snapshot.tensors, facts))
    writer.close()                         # the last one is waited for

A job that has been started is finished: Python waits for its thread also where nobody calls `close`, and what it raised
and nobody has asked for is said when the interpreter ends.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from distfit.checkpoint.pace import Pace
from distfit.errors import DistfitError, RunError
from distfit.log import warn_once

# How far the thread stands back where cores are short: about a tenth of one beside a training that wants all of it.
# Further back (19 is the end), it would be stopped for longer while it holds Python's lock, and the training with it.
NICENESS = 10
_THREAD = "distfit-checkpoint"


class Writer:
    """Runs one job at a time in a thread that makes room for the training.

    For one thread to use, that of the training. As a context manager it closes itself at the end; an error that is
    on its way out then goes on, and what a job raised is said beside it.

    Args:
        folder: what the jobs write to, for messages.

    >>> with Writer("runs/a") as writer:
    ...     written = []
    ...     writer.start(lambda: written.append("step 3"))
    ...     writer.wait(timeout_s=60), writer.busy, written
    (True, False, ['step 3'])
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = os.fspath(folder)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pace = Pace()

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], Any]) -> None:
        """Run a job in the background, from the next `check` on. What it reads has to stay as it is until it has ended.

        Raises:
            RunError: what the job before raised, as `check`; or that one still runs.
        """
        if self.busy:
            raise RunError(
                f"Expected the save before to have ended when another one begins, received one that still writes to "
                f"{self._folder}. Ask `busy`, or wait."
            )
        self.check()
        # No daemon: the interpreter does not end before a save that has begun.
        self._pace = Pace()
        self._thread = threading.Thread(target=self._run, args=(job, self._pace), name=_THREAD, daemon=False)
        atexit.unregister(self._say_error)
        atexit.register(self._say_error)
        self._thread.start()

    def check(self) -> None:
        """A boundary has come: raise what the last job raised; once. One that was started begins.

        Raises:
            RunError: the job failed; its cause is what it raised.
        """
        self._pace.begin()
        if self._error is not None and not self.busy:
            error, self._error = self._error, None
            raise self._explained(error)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until no job runs, at most so many seconds; whether none does. It hurries; Ctrl-C ends the wait alone."""
        self._pace.hurry()
        if self._thread is not None and self.busy:
            self._thread.join(timeout_s)
        return not self.busy

    def close(self) -> None:
        """Wait for the last job.

        Raises:
            RunError: as `check`.
        """
        self.wait()
        atexit.unregister(self._say_error)
        self.check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.wait()
            atexit.unregister(self._say_error)
            self._say_error()

    def _run(self, job: Callable[[], Any], pace: Pace) -> None:
        _stand_back()
        try:
            with pace.kept():
                job()
        except BaseException as error:  # raised again by `check`, in the thread of the training
            self._error = error

    def _say_error(self) -> None:
        """For who will not ask any more."""
        if self._error is not None:
            error, self._error = self._error, None
            warn_once(str(self._explained(error)))

    def _explained(self, error: BaseException) -> DistfitError:
        """What the job raised, where it is a sentence already, or what it means."""
        if isinstance(error, DistfitError):
            return error
        what = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        explained = RunError(
            f"Expected to write a checkpoint to {self._folder}, received: {what}. What was complete there still is. "
            "Make room or correct what failed; started again, the run goes on from the last complete checkpoint."
        )
        explained.__cause__ = error
        return explained


def _stand_back() -> None:
    """The calling thread gives way to others. Linux has a priority for each thread."""
    own = threading.get_native_id()
    with suppress(OSError):  # a sandbox may forbid it, and a save at full priority is better than none
        os.setpriority(os.PRIO_PROCESS, own, max(NICENESS, os.getpriority(os.PRIO_PROCESS, own)))
