"""Signals that ask a run to end: Ctrl-C (SIGINT), SIGTERM and SIGUSR1, noted instead of obeyed at once.

    interrupt = Interrupt(session.watch, keeps=True)
    with interrupt.heard():                    # from the beginning of `fit`: opening data and tracing take minutes
        for batch in batches:
            run(batch)
            interrupt.check()                  # without checkpoints: raises the KeyboardInterrupt that was swallowed
            if interrupt.pending:              # with them: tell the others, save together, then
                raise ended(session, interrupt, "epoch 3, step 17", "checkpoint runs/a/step-... is saved")

A run that keeps checkpoints finishes its step, and its ranks agree and save before they leave: with exit code 75 after
SIGTERM (a scheduler, a spot machine) or SIGUSR1 (Slurm's warning), 130 after Ctrl-C. One rank that was told is enough.
A second signal ends all ranks at once, also while the main thread is in a collective that never returns: a thread
waits for signals beside it. Python by itself calls handlers only between two of the main thread's instructions.

A run without checkpoints has nothing to save. SIGTERM and SIGUSR1 end it as they end every program, and Ctrl-C raises
KeyboardInterrupt: wherever the main thread happens to be, which may be a finalizer (Keras has one for each tensor that
carries a mask or a score), whose exceptions Python ignores. So it is remembered until the next step.

Whoever handles one of these signals already keeps it. Forked children of a run (workers of a PyDataset) hear them as
before it, so that they can be ended.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from distfit import log
from distfit.differences import ranks_text
from distfit.errors import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, Ended, Interrupted, Preempted
from distfit.launchers.start import CTRL_C_VARIABLE, SAME_WISH_S
from distfit.watch import NoWatch, Watch

if TYPE_CHECKING:
    from distfit.session import Session

# The chief's watch prints, tells all ranks and waits for them, in no more than six seconds.
_AT_ONCE_LIMIT_S = 8.0


class Wanted(Enum):
    """What a signal asks for, with the exit code of a run that follows it."""

    PREEMPTED = PREEMPTED_EXIT_CODE
    INTERRUPTED = INTERRUPTED_EXIT_CODE


class Interrupt:
    """Notes the signals that ask this process to end.

    Args:
        watch: of the session; tells the other ranks when a second signal ends this one. None where there are none.
        keeps: the run keeps checkpoints, so that it is worth finishing a step and saving.
    """

    def __init__(self, watch: Watch | None = None, keeps: bool = False) -> None:
        self._watch, self._keeps = watch or NoWatch(), keeps
        self._asks = _signals(keeps)
        self._came: tuple[signal.Signals, float] | None = None

    @property
    def pending(self) -> Wanted | None:
        """What somebody asked for, where the run keeps checkpoints."""
        return None if self._came is None or not self._keeps else self._asks[self._came[0]]

    @property
    def came(self) -> str:
        """How it was asked for first: "SIGTERM", "Ctrl-C"; "" when nobody asked."""
        return "" if self._came is None else _name(self._came[0], self._asks)

    @contextmanager
    def heard(self) -> Iterator[Interrupt]:
        """Listen meanwhile, where this is the main thread, to the signals that nobody else handles."""
        mine = self._free() if threading.current_thread() is threading.main_thread() else []
        with (
            _Beside(self._arrived, mine if self._keeps else []) as self._beside,
            _taken(mine, self._heard_by_main),
        ):
            yield self

    def check(self) -> None:
        """Raise the KeyboardInterrupt that came and did not end this; nothing where the run keeps checkpoints."""
        if self._came is not None and not self._keeps:
            raise KeyboardInterrupt

    def _free(self) -> list[signal.Signals]:
        caught = _caught()
        free = [number for number in self._asks if _is_free(number, caught)]
        kept = [number for number in self._asks if number not in free and self._keeps and _is_foreign(number)]
        if kept:
            log.warn_once(
                f"{', '.join(_name(number, self._asks) for number in kept)} "
                f"{'is' if len(kept) == 1 else 'are'} handled by somebody else in this process, who keeps on doing so: "
                "training does not save and end on it."
            )
        return free

    def _heard_by_main(self, number: int, frame: FrameType | None) -> None:
        if not self._keeps:
            self._came = (signal.Signals(number), time.monotonic())
            signal.default_int_handler(number, frame)
        elif self._beside.listens:
            self._note(number)  # its thread counts
        else:
            self._arrived(number)

    def _note(self, number: int) -> bool:
        """Remember the first; whether this one is the same wish."""
        if self._came is None:
            self._came = (signal.Signals(number), time.monotonic())
        return time.monotonic() - self._came[1] < SAME_WISH_S

    def _arrived(self, number: int) -> None:
        if self._note(number):
            return
        came = signal.Signals(number)
        wanted = self._asks[came]
        why = f"{wanted.name.lower()} again ({_name(came, self._asks)})"
        # Not here: the main thread may hold a lock that telling others needs, and this may be the main thread.
        teller = threading.Thread(target=self._watch.leave_at_once, args=(why, wanted.value), daemon=True)
        teller.start()
        teller.join(_AT_ONCE_LIMIT_S)
        os._exit(wanted.value)


def ended(session: Session, interrupt: Interrupt, position: str, saved: str) -> Ended:
    """What all ranks raise when somebody asked for the end; the chief has said so in one line. Collective.

    Args:
        interrupt: of this rank; another one's may be what was heard.
        position: "epoch 3, step 17 (step 217 of the run)".
        saved: what is left behind: "checkpoint runs/a/step-000000000217 is saved".
    """
    heard = session.transport.gather((interrupt.pending, interrupt.came))
    # A person who wants to stop does not want the job to be started again.
    interrupted = any(pending is Wanted.INTERRUPTED for pending, _ in heard)
    error = Interrupted() if interrupted else Preempted()
    log.say(announcement(error, [came for _, came in heard], position, saved))
    _at_exit.code = error.code
    return error


def announcement(error: Ended, came: Sequence[str], position: str, saved: str) -> str:
    """The one line.

    Args:
        came: of each rank, what it heard, "" for nothing.

    >>> announcement(Preempted(), ["", "SIGTERM"], "epoch 1, step 3", "checkpoint a/step-3 is saved")
    'distfit: preempted (SIGTERM on rank 1) at epoch 1, step 3: checkpoint a/step-3 is saved; exit 75'
    >>> announcement(Interrupted(), ["Ctrl-C"], "epoch 1, step 3", "checkpoint a/step-3 is saved")
    'distfit: interrupted (Ctrl-C) at epoch 1, step 3: checkpoint a/step-3 is saved; exit 130'
    """
    ranks = {name: [rank for rank, each in enumerate(came) if each == name] for name in came if name}
    single = len(came) == 1
    told = [name if single else f"{name} on {ranks_text(members)}" for name, members in ranks.items()]
    return f"distfit: {type(error).__name__.lower()} ({', '.join(told)}) at {position}: {saved}; exit {error.code}"


def _signals(keeps: bool) -> dict[signal.Signals, Wanted]:
    """What is listened to, and what each asks for."""
    found = {signal.SIGTERM: Wanted.PREEMPTED, signal.SIGUSR1: Wanted.PREEMPTED} if keeps else {}
    named = os.environ.get(CTRL_C_VARIABLE, "")
    stands_for_it = [signal.Signals[named]] if named in signal.Signals.__members__ else []
    return found | dict.fromkeys([signal.SIGINT, *stands_for_it], Wanted.INTERRUPTED)


def _name(number: signal.Signals, asks: dict[signal.Signals, Wanted]) -> str:
    return "Ctrl-C" if asks[number] is Wanted.INTERRUPTED else number.name


def _is_free(number: signal.Signals, caught: int) -> bool:
    """Whether Python does with a signal what it does by itself, and no native code has taken it (faulthandler has, for
    one), which Python does not know of."""
    handler = signal.getsignal(number)
    if handler is signal.default_int_handler or handler == _at_exit.leave:
        return True
    return handler is signal.SIG_DFL and not caught >> (number - 1) & 1


def _is_foreign(number: signal.Signals) -> bool:
    """Whether somebody handles it, other than an outer section of distfit's or the system, by ignoring it (nohup)."""
    handler = signal.getsignal(number)
    return handler is not signal.SIG_IGN and not isinstance(getattr(handler, "__self__", None), Interrupt)


def _caught() -> int:
    """The signals for which this process has a handler, native ones too, as bits; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)


@contextmanager
def _taken(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """These signals call `handler` meanwhile. When all ranks end by a signal, further ones end this process quietly:
    what could be saved is saved."""
    before = {number: signal.signal(number, handler) for number in numbers}
    _in_children.restore(before)
    ending = False
    try:
        yield
    except Ended:
        ending = True
        raise
    finally:
        for number, handled in before.items():
            signal.signal(number, _at_exit.leave if ending and handled is signal.SIG_DFL else handled)
        if before:
            _in_children.restore({})


class _Beside:
    """A thread that hears signals at once, whatever the main thread does.

    Args:
        arrived: is called in it, with the number of a signal.
        numbers: the signals that matter.

    Attributes:
        listens: False where somebody else has Python's one descriptor for signals (an event loop).
    """

    def __init__(self, arrived: Callable[[int], None], numbers: Sequence[signal.Signals]) -> None:
        self._arrived, self._numbers = arrived, {int(number) for number in numbers}
        self.listens = False

    def __enter__(self) -> _Beside:
        if not self._numbers:
            return self
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
        self.listens = before == -1
        self._thread = threading.Thread(target=self._listen, name="distfit-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._numbers:
            return
        if self.listens:
            signal.set_wakeup_fd(-1)
            self.listens = False
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        while 0 not in (numbers := os.read(self._read, 64)):
            for number in numbers:
                if number in self._numbers:
                    self._arrived(number)


class _AtExit:
    """Between the end of a training that was asked to end, and that of its process."""

    code = 0

    def leave(self, number: int, frame: FrameType | None) -> None:
        """Another signal, when all is saved: nothing more to say."""
        os._exit(self.code)

    def ignore(self) -> None:
        """The launcher ends the other ranks when the first has left with 75 or 130, and Slurm takes the highest code:
        a rank that is about to leave must not die of that. Hooks of the user's own have run by now."""
        if self.code:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)


class _InChildren:
    """What forked children get back: a signal meant for them must neither be noted, nor reach the parent's thread by
    the pipe that they share."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def restore(self, before: dict[signal.Signals, Any]) -> None:
        """What children that begin from now on get back."""
        self._before = before

    def begin(self) -> None:
        """In a child."""
        if self._before:
            signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)


_at_exit = _AtExit()
_in_children = _InChildren()
atexit.register(_at_exit.ignore)
os.register_at_fork(after_in_child=_in_children.begin)
