"""The one function that starts a launcher, what reaches it of the signals that this process gets, and what a process
does to become another program.

A launcher that is told to end (Ctrl-C, SIGTERM) gives its ranks a second or two, which is less than they need to save,
and leaves with a code of its own: Open MPI sends them SIGTERM after one second and SIGKILL after two, and ends with 1.
A longer `odls_base_sigkill_timeout` would be waited for after every failure of a rank as well. But all of them pass
SIGUSR1 on, so that is what they get first, and their ranks end by themselves, with a code that the launcher hands on.
Hydra and srun pass SIGINT on as well; mpirun takes SIGUSR2 in its place. (Measured with Open MPI 4.1.8 and 5.0, MPICH's
Hydra 5.0 and Slurm 22.05; docs/guides/preemption.md has the table.)
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from distfit.errors import INTERRUPTED_EXIT_CODE, RunError

if TYPE_CHECKING:  # a rank that becomes its program has no use for what decides on launchers
    from distfit.launchers.command import Command

# How ranks are told of Ctrl-C where the launcher does not pass SIGINT on; training/interrupt.py looks at the variable.
CTRL_C_VARIABLE = "DISTFIT_CTRL_C"
CTRL_C = signal.SIGUSR2
_HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# `timeout` and systemd tell a process and then its group, which is the same wish twice.
SAME_WISH_S = 0.5
_PR_SET_PDEATHSIG = 1


def told_of_ctrl_c() -> dict[str, str]:
    """The variable, for the environment of ranks."""
    return {CTRL_C_VARIABLE: CTRL_C.name}


def run(command: "Command") -> int:
    """Run the launcher until it has ended; what to exit with.

    The first SIGTERM, SIGUSR1 or Ctrl-C asks the ranks to save and end, a second one ends the launcher at once, a third
    kills it. Should this process be killed, the launcher is told to end.

    Raises:
        RunError: it does not start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    told = _Told(command)
    with told.heard():
        try:
            told.launcher = subprocess.Popen(
                command.argv,
                env=dict(command.environment),
                start_new_session=not command.deaf,
                preexec_fn=_prepared(command),
            )
        except OSError as error:
            raise _does_not_start(command.argv[0], error) from error
        told.pass_on()
        code = told.launcher.wait()
    return _code(code, interrupted=told.first is signal.SIGINT)


def _code(returned: int, interrupted: bool) -> int:
    """The launcher's, where a shell would say 128 + the signal that ended it; after Ctrl-C, 130 unless all went well.

    >>> _code(75, False), _code(-9, False), _code(140, True), _code(0, True)
    (75, 137, 130, 0)
    """
    code = 128 - returned if returned < 0 else returned
    return INTERRUPTED_EXIT_CODE if interrupted and code else code


def _ends(command: "Command") -> signal.Signals:
    """The signal that ends the launcher and its ranks."""
    return signal.SIGHUP if command.deaf else signal.SIGTERM


def _prepared(command: "Command") -> Callable[[], None]:
    """What the launcher's process does before it becomes the launcher."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, int(_ends(command)))
        if command.deaf:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])

    return prepare


class _Told:
    """What this process was told, and has told its launcher.

    Attributes:
        launcher: None until it is started.
        first: what was heard first.
    """

    def __init__(self, command: "Command") -> None:
        self.launcher: subprocess.Popen | None = None
        self.first: signal.Signals | None = None
        self._ends_by = _ends(command)
        self._asks_by = {
            signal.SIGTERM: signal.SIGUSR1,
            signal.SIGUSR1: signal.SIGUSR1,
            signal.SIGINT: command.ctrl_c,
            signal.SIGHUP: self._ends_by,  # the terminal has gone
        }
        self._when, self._again, self._passed_on = 0.0, 0, False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are noted meanwhile, but for those that this process ignores (nohup)."""
        ours = threading.current_thread() is threading.main_thread()
        numbers = [number for number in _HEARD if ours and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """What was heard before there was a launcher."""
        if self.first is not None and not self._passed_on:
            self._tell(self._asks_by[self.first])

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        if self.first is None:
            self.first, self._when = came, time.monotonic()
            self._tell(self._asks_by[came])
        elif time.monotonic() - self._when > SAME_WISH_S:
            self._when, self._again = time.monotonic(), self._again + 1
            self._tell(self._ends_by if self._again == 1 else signal.SIGKILL)

    def _tell(self, number: signal.Signals) -> None:
        if self.launcher is not None:
            self._passed_on = True
            self.launcher.send_signal(number)


def become(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be replaced by a program, found on PATH or by its path.

    Raises:
        RunError: it does not start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these two, which what it becomes would inherit, down to the shell scripts that ranks may be.
    ignored = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        os.execvpe(argv[0], list(argv), dict(environment))
    except OSError as error:
        for number, before in ignored.items():
            signal.signal(number, before)
        raise _does_not_start(argv[0], error) from error


def _does_not_start(program: str, error: OSError) -> RunError:
    return RunError(f"Expected to start {program}, received {error}. Check that it is installed.")
