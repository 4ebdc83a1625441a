"""Ranks as threads of this process: a distributed run in a test, within seconds and without a launcher.

    def train():
        keras.utils.set_random_seed(1)
        model = build()
        return distfit.fit(model, x, y, batch_size=32, verbose=0).history

    histories = run(train, ranks=3)              # one result a rank

Inside, `distfit.init()` and `distfit.fit` see a job of three ranks: each has a session, models, callbacks and a part of
the data of its own, and all numbers are global, as under mpirun. What is tried in this way: callbacks (one that calls a
collective on some ranks only is reported by its name), data, metrics, a train_step. What is not: launching, Horovod,
the rest of the failure watch, speed.

Each rank traces its own steps, one after the other, which is most of what a short test waits for.

What threads share and processes do not: modules and what lies in them (keep what a rank leaves behind in what it
returns), `keras.config.set_floatx`, environment variables, the working directory, and TensorFlow's own streams of
`tf.random` without a seed. Random states of Python, NumPy, Keras and TensorFlow's global seed are each rank's own, and
unseeded when it begins. Ranks compute on the CPU.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import keras
import tensorflow as tf

from distfit import log
from distfit.backends.threads import Group, Missed, RandomStates, Threads
from distfit.errors import InputError, RunError
from distfit.session import Session, as_session
from distfit.topology import Topology
from distfit.watch import Here, SharedWatch
from distfit.watch.calls import Call

Result = TypeVar("Result")

# What is left to ranks that were told to end.
_ENDING_S = 5.0


def run(function: Callable[[], Result], ranks: int = 3, limit_s: float = 120.0) -> list[Result]:
    """Call a function on so many ranks, each a thread of this process.

    Args:
        function: the script, so to speak; it asks `distfit.init()` which rank it is.
        ranks: at least 1.
        limit_s: seconds after which ranks that have not ended are told to.

    Returns:
        What the function returned on each rank, in their order.

    Raises:
        InputError: there is no such number of ranks.
        RunError: a rank has not ended in time, or waits for one that has ended.
        BaseException: whatever the function raised first, with a note that says on which rank.

    >>> import distfit
    >>> run(lambda: distfit.init().rank, ranks=3)
    [0, 1, 2]
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise InputError(f"Expected ranks to be a whole number of at least 1, received {ranks!r}.")
    job = _Job(ranks, keras.config.dtype_policy(), limit_s)
    before = RandomStates.now()
    threads = [
        threading.Thread(target=job.one, args=(function, rank), name=f"rank {rank}", daemon=True)
        for rank in range(ranks)
    ]
    try:
        with _only_the_chief_speaks(threads):
            for thread in threads:
                thread.start()
            late = [] if job.over.wait(limit_s) else _places(threads)
    finally:
        job.end(threads)
        before.restore()
    job.refuse(late)
    return [job.results[rank] for rank in range(ranks)]


@dataclass
class _Job:
    """One run: what its ranks left.

    Attributes:
        over: all have ended, or one has failed.
    """

    ranks: int
    policy: Any
    limit_s: float
    results: dict[int, Any] = field(default_factory=dict)
    problems: list[tuple[int, BaseException]] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.group = Group(self.ranks)
        self.over = threading.Event()

    def one(self, function: Callable[[], Any], rank: int) -> None:
        """The life of a rank."""
        self.group.turns.take(rank)
        try:
            # Keras keeps it for each thread.
            keras.config.set_dtype_policy(self.policy)
            with tf.device("CPU:0"), as_session(self._session(rank)):
                self.results[rank] = function()
        except BaseException as error:
            # What others raise from now on is a consequence.
            if not self.group.aborted:
                self.problems.append((rank, error))
            self.group.abort()
        finally:
            self.group.leave(rank)
            if self.group.aborted or len(self.group.ended) == self.ranks:
                self.over.set()

    def end(self, threads: Sequence[threading.Thread]) -> None:
        """Leave nothing behind: no rank that waits, no hook."""
        self.group.abort()
        deadline = time.monotonic() + _ENDING_S
        for thread in threads:
            if thread.ident is not None:  # has been started
                thread.join(max(0.0, deadline - time.monotonic()))
        # Each has laid a hook over the one before.
        for session in reversed(self.sessions):
            session.stop()

    def refuse(self, late: Sequence[str]) -> None:
        """
        Raises:
            BaseException: what the first rank raised that failed, or a RunError in place of the engine's words.
        """
        if late:
            raise RunError(
                f"Expected {self.ranks} ranks to end within {self.limit_s:g} s, received {len(late)} that did not: "
                f"{'; '.join(late)}. All ranks must make the same calls of distfit, in the same order; raise limit_s "
                "if they only need longer."
            )
        for rank, error in self.problems:
            if isinstance(error, (Missed, tf.errors.OutOfRangeError)) and self.group.ended:
                raise RunError(
                    f"Expected all ranks to make the same calls of distfit, received one on rank {rank} of "
                    f"{self.ranks} that waits for the others, of which some have ended. Let every rank run the same "
                    "lines; only the chief writes and speaks anyway."
                ) from error
            error.add_note(f"(on rank {rank} of {self.ranks}, a thread)")
            raise error

    def _session(self, rank: int) -> Session:
        topology = Topology(rank, self.ranks, rank, self.ranks)
        backend = Threads(topology, self.group)
        backend.start()
        watch = _TakesTurns(self.group, rank, self.limit_s)
        session = Session(backend, ("auto", None), self.limit_s, devices_were_chosen=True, watch=watch)
        self.sessions.append(session)
        return session


class _TakesTurns(SharedWatch):
    """Nobody's end is watched: `run` sees it. But where ranks wait for each other, turns end and begin; and what a
    callback calls begins when all ranks are about to, as between processes."""

    def __init__(self, group: Group, rank: int, stall_limit_s: float) -> None:
        super().__init__(Here(stall_limit_s))
        self._group, self._rank = group, rank
        group.watched(rank, self._here)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Who has waited in a step takes its turn again."""
        try:
            with super().waiting(what):
                self._group.waits()
                yield
        finally:
            self._group.turns.take(self._rank)

    def fail(self, error: BaseException, *, secondary: bool = False) -> NoReturn:
        """Raise it; `run` ends the others."""
        raise error

    def limit(self, stall_limit_s: float) -> None:
        """`run` has its own."""

    def install_hooks(self) -> None:
        """A rank's exceptions are `run`'s."""

    def close(self) -> None:
        """`run` knows."""

    def _meet(self, call: Call) -> None:
        self._group.meet(self._rank, call)

    def _section_changed(self) -> None:
        """Nobody asks."""


def _places(threads: Sequence[threading.Thread]) -> list[str]:
    """Where threads are that have not ended."""
    frames = sys._current_frames()
    alive = [(thread.name, frames.get(thread.ident or 0)) for thread in threads if thread.is_alive()]
    return [f"{name} in {_place(frame)}" for name, frame in alive if frame is not None]


def _place(frame: Any) -> str:
    """Who of the user's, or of distfit's, waits there: the innermost line that is not a library's."""
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if "site-packages" not in entry.filename and "threading.py" not in entry.filename]
    last = (own or stack)[-1]
    return f"{last.filename}:{last.lineno} ({last.name})"


@contextmanager
def _only_the_chief_speaks(threads: Sequence[threading.Thread]) -> Iterator[None]:
    """Of what distfit says, what the first rank says; each warning once, whoever comes first."""
    log.speak_as(True)
    logger = logging.getLogger("distfit")

    def heard(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.thread not in [thread.ident for thread in threads[1:]]

    logger.addFilter(heard)
    try:
        yield
    finally:
        logger.removeFilter(heard)
