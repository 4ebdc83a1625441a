"""The session: one engine started in this process, who we are in the job, and how its processes agree.

    session = init(strategy="auto")
    session.rank, session.size, session.num_replicas, session.is_chief

`init` is optional (`distfit.fit` calls it) and repeatable: the same session comes back.
"""

from __future__ import annotations

import atexit
import numbers
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np

from distfit import log, meeting
from distfit.backends import STRATEGIES, choose, settle
from distfit.backends.base import Backend
from distfit.backends.devices import gpu_identities
from distfit.backends.transport import Transport
from distfit.differences import comparable, table
from distfit.errors import DistfitError, InputError, RunError, nearest, on_every_rank
from distfit.loops.face import HandWritten
from distfit.topology import Topology, from_environment
from distfit.watch import Watch, start

Value = TypeVar("Value")

# Longer than the slowest first trace or checkpoint that others wait for, shorter than a lost night.
STALL_LIMIT_S = 600.0
_CHIEF_FIRST_S = 3.0
# Of `chief_first`: the chief, one rank of each other host, everybody else.
_TURNS = 3


class Session(HandWritten):
    """This process in its job; made by `init`.

    Attributes:
        backend: the engine, started.
        topology: rank, size and replicas.
        watch: ends every rank when one fails.
        transport: host values to and from the other processes; each call is watched.
        in_turn: inside of `chief_first`.
    """

    def __init__(
        self,
        backend: Backend,
        asked: tuple[str, int | None],
        stall_limit_s: float,
        devices_were_chosen: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.backend = backend
        self.asked = asked
        self.topology: Topology = backend.topology
        self.in_turn = False
        self._meet(devices_were_chosen)
        self.watch = watch or start(self.topology, backend.transport.broadcast, stall_limit_s)
        self.watch.install_hooks()
        # The engine's own calls are known to the watch as well.
        self.transport: Transport = _Watched(backend.transport, self.watch)
        backend.transport = self.transport
        from distfit import downloads  # loads Keras

        self._until_stop = ExitStack()
        self._until_stop.enter_context(downloads.whole(lambda: self.size == 1 or self.in_turn))

    def _meet(self, devices_were_chosen: bool) -> None:
        """Compare what the ranks run before anything else travels between them; warn of hardly meant jobs."""
        mine = meeting.introduction(self.topology.host, gpu_identities(), self.backend.gpus_taken())
        everybody = self.backend.transport.gather(mine)
        reason = meeting.problem(everybody)
        if reason is not None:
            raise on_every_rank(InputError(reason))
        for warning in meeting.advice(everybody, os.environ, devices_were_chosen):
            log.warn_once(warning)

    def __repr__(self) -> str:
        return f"<distfit session: {self.backend.title}, rank {self.rank} of {self.size}, {self.num_replicas} replicas>"

    @property
    def rank(self) -> int:
        """This process's number in the job, 0 for the chief."""
        return self.topology.rank

    @property
    def size(self) -> int:
        """Processes of the job."""
        return self.topology.size

    @property
    def local_rank(self) -> int:
        """This process's number on its host."""
        return self.topology.local_rank

    @property
    def num_replicas(self) -> int:
        """Copies of the model that train together, over all processes."""
        return self.topology.num_replicas

    @property
    def is_chief(self) -> bool:
        """Whether this process publishes and speaks."""
        return self.topology.is_chief

    def agree(self, check: Callable[[], Value], in_turns: bool = False) -> Value:
        """Run something that may refuse the input, on every rank; if one refuses, all do.

        Args:
            check: makes no collective call; its DistfitErrors are shared, any other exception is this rank's
                failure.
            in_turns: it may download or build files that ranks share: as in `chief_first`.

        Raises:
            DistfitError: the lowest failing rank's, on all ranks.
        """
        value, own = None, None
        try:
            with self.chief_first() if in_turns else nullcontext():
                value = check()
        except DistfitError as error:
            own = error
        problems = self.transport.gather(None if own is None else (type(own), str(own)))
        first = next((rank for rank, problem in enumerate(problems) if problem is not None), None)
        if first is None:
            return value  # type: ignore[return-value]
        kind, text = problems[first]
        everywhere = all(problem is not None for problem in problems)
        if everywhere and problems[first] == problems[self.rank] and own is not None:
            # As it is: one made of it would show the same paragraph twice.
            raise on_every_rank(own)
        raise on_every_rank(kind(text if everywhere else f"On rank {first} of {self.size}: {text}")) from own

    def from_chief(self, make: Callable[[], Value]) -> Value:
        """What the chief makes, on every rank; the others do not call `make`.

        Raises:
            DistfitError: the chief's, on all ranks.
        """
        made: tuple[Any, Any, str] = (None, None, "")
        if self.is_chief:
            try:
                made = (make(), None, "")
            except DistfitError as error:
                made = (None, type(error), str(error))
        value, kind, text = self.transport.broadcast(made)
        if kind is not None:
            raise on_every_rank(kind(text))
        return value

    @contextmanager
    def chief_first(self) -> Iterator[None]:
        """Around what ranks must not do at the same time, such as downloading weights into a shared folder.

        The chief runs the block first, then one rank of each other host, then all others, who find what the
        first ones left. Inside of another one it is this rank's turn already. Collective: every rank comes here,
        and the others wait for a turn no longer than `stall_limit_s` (600 s). ::

            with distfit.init().chief_first():
                base = keras.applications.ResNet50(weights="imagenet")

        Raises:
            RunError: the block failed on the chief or on the first rank of a host; on every rank that had not
                begun it.
        """
        if self.in_turn:
            yield
            return
        turn = 0 if self.is_chief else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self._next_turn(None)
        self.in_turn = True
        try:
            yield
        except BaseException as error:
            if turn < _TURNS - 1:  # somebody waits for this rank
                self._next_turn(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.in_turn = False
        for _ in range(turn, _TURNS - 1):
            self._next_turn(None)

    def _next_turn(self, failure: str | None) -> None:
        failures = self.transport.gather(failure)
        first = next((rank for rank, each in enumerate(failures) if each is not None), None)
        if first is not None and failure is None:
            raise on_every_rank(
                RunError(f"Rank {first} of {self.size} failed while the others waited for it: {failures[first]}")
            )

    def same(self, what: str, remedy: str, **values: Any) -> None:
        """Refuse what ranks say differently: their collectives would pair up wrongly or wait for ever.

        Args:
            what: is the same on every rank, for the message, e.g. "the same call".
            remedy: ends the message.
            values: compared by their text, long ones by a digest of it.

        Raises:
            InputError: ranks differ; on all of them, with a table.
        """
        own = {name: comparable(value) for name, value in values.items()}
        gathered = self.transport.gather((self.topology.host, own))
        differences = table([values for _, values in gathered], [host for host, _ in gathered])
        if differences:
            raise on_every_rank(InputError(f"Expected {what} on every rank, received:\n{differences}\n{remedy}"))

    def same_call(self, call: str, **arguments: Any) -> None:
        """`same` for what decides how many collectives a call like "fit" makes."""
        remedy = "Let all ranks run the same lines with the same arguments; only the chief writes and speaks anyway."
        self.same("the same call", remedy, call=f"distfit.{call}", **arguments)

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Around everything that needs all ranks: what goes wrong on one ends all of them.

        An error that all ranks raise leaves as it is; any other ends the job here, with this rank's
        traceback on the screen once.
        """
        try:
            with self.watch.running(what):
                yield
        except BaseException as error:
            if not getattr(error, "agreed", False):
                self.watch.fail(error, secondary=self.backend.failed_elsewhere(error))
            raise

    def in_callback(self, name: str, everywhere: bool) -> AbstractContextManager[None]:
        """Around each call of a callback's method; two assignments.

        What is collective in a callback (distfit.evaluate, `transport`, ...) begins when all ranks are about to make
        it. If some never will, as it is under a condition, the run ends with a report that names the callback.

        Args:
            name: class and method: "Probe.on_epoch_end".
            everywhere: every rank runs this callback; False where the chief alone does, which may make no such call.
        """
        return self.watch.in_callback(name, everywhere)

    def stop(self) -> None:
        """Leave the job."""
        self._until_stop.close()
        self.watch.close()
        self.backend.stop()


class _Watched:
    """A transport whose every call is known to the watch while it waits."""

    def __init__(self, transport: Transport, watch: Watch) -> None:
        self._transport, self._watch = transport, watch

    def broadcast(self, value: Any) -> Any:
        with self._watch.waiting("a broadcast of host values"):
            return self._transport.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        with self._watch.waiting("a gathering of host values"):
            return self._transport.gather(value)

    def collect(self, value: Any) -> list[Any] | None:
        with self._watch.waiting("a collection of host values"):
            return self._transport.collect(value)

    def sum(self, array: np.ndarray) -> np.ndarray:
        with self._watch.waiting("a sum of host values"):
            return self._transport.sum(array)


_current: Session | None = None


class _OfThread(threading.local):
    """Ranks that are threads (distfit/thread_ranks.py) have a session each."""

    session: Session | None = None


_of_thread = _OfThread()


@contextmanager
def as_session(session: Session) -> Iterator[None]:
    """In this thread `init` returns this session."""
    _of_thread.session = session
    try:
        yield
    finally:
        _of_thread.session = None


def init(strategy: str = "auto", devices: int | None = None, *, stall_limit_s: float | None = None) -> Session:
    """Start the engine, or return the session that is there.

    Args:
        strategy: "auto" (horovod when the process was started as one of several ranks, mirrored with several
            GPUs or devices, else single), "single", "mirrored" or "horovod". The environment variable
            DISTFIT_STRATEGY overrides it.
        devices: devices of this process; None means all GPUs, or one CPU. Without GPUs, so many logical CPU
            devices are made. The environment variable DISTFIT_DEVICES overrides it.
        stall_limit_s: seconds that a rank may stay away from a collective before the run ends. None leaves what
            an earlier call said, 600 at first.

    Raises:
        InputError: the strategy is unknown, not installed or cannot serve this job, or its devices are not there.
    """
    global _current
    if _of_thread.session is not None:
        return _of_thread.session
    topology = from_environment(os.environ)
    try:
        asked = _overridden_by_environment(strategy, devices)
        _check_limit(stall_limit_s)
        settled = settle(*asked, topology)
        # Starting the same engine again would stop it for both: Horovod is one for the whole process.
        if _current is not None and (settled == _current.asked or asked == ("auto", None)):
            if stall_limit_s is not None:
                _current.watch.limit(stall_limit_s)
            return _current
        log.speak_as(topology.is_chief, topology.size)
        from distfit.backends.seams import check  # loads Keras

        check()
        if not topology.is_chief:
            _silence_keras()
        backend = choose(*asked, topology)
        backend.start()
        _leave()
        limit_s = STALL_LIMIT_S if stall_limit_s is None else stall_limit_s
        _current = Session(backend, settled, limit_s, devices_were_chosen=asked[1] is not None)
    except DistfitError as error:
        if _current is not None:
            # The ranks know each other, and all of them asked for the same.
            raise on_every_rank(error) from error.__cause__
        _refuse_on_one_rank(error, topology)
        raise
    log.speak_as(_current.is_chief, _current.size)
    return _current


@atexit.register
def _leave() -> None:
    global _current
    if _current is not None:
        _current, leaving = None, _current
        leaving.stop()


def _silence_keras() -> None:
    """What Keras prints (EarlyStopping(verbose=1), model.summary()) the chief says for all; see `log` for the rest."""
    import keras

    keras.config.disable_interactive_logging()


def _overridden_by_environment(strategy: str, devices: int | None) -> tuple[str, int | None]:
    strategy = os.environ.get("DISTFIT_STRATEGY", strategy)
    if "DISTFIT_STRATEGY" in os.environ and strategy not in STRATEGIES:
        raise InputError(
            "Expected the environment variable DISTFIT_STRATEGY to be one of "
            f"{', '.join(STRATEGIES)}, received {strategy!r}; {nearest(strategy, list(STRATEGIES))}"
        )
    text = os.environ.get("DISTFIT_DEVICES")
    if text is None:
        return strategy, devices
    if not text.isdigit() or int(text) < 1:
        raise InputError(
            "Expected the environment variable DISTFIT_DEVICES to be a whole number of at least 1, received "
            f"{text!r}. Correct it or unset it."
        )
    return strategy, int(text)


def _check_limit(stall_limit_s: float | None) -> None:
    if stall_limit_s is None:
        return
    if not isinstance(stall_limit_s, numbers.Real) or not stall_limit_s > 0:
        raise InputError(f"Expected stall_limit_s to be a number of seconds above 0, received {stall_limit_s!r}.")


def _refuse_on_one_rank(error: DistfitError, topology: Topology) -> None:
    """Before the ranks watch each other: one says why, every rank leaves with the same exit code.

    The launcher ends the others when the first has left, so a rank that is still here after a while is
    the only one with this error, and speaks.
    """
    if topology.size == 1:
        return
    log.disconnect()
    if not topology.is_chief:
        time.sleep(_CHIEF_FIRST_S)
    if topology.is_chief or not error.agreed:
        print(f"distfit: error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
