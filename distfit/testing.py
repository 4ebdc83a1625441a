"""For the tests of a user's own code: real ranks, started and ended.

    from distfit.testing import launch_ranks

    def test_two_ranks_train():
        job = launch_ranks(["train.py", "--epochs", "1"], ranks=2, limit_s=120)
        assert job.code == 0, job.report()

Whatever a job has started is gone when the call returns: also when the limit passes, when the test is interrupted, and
what its ranks started. `distfit.check` compares a whole training on several engines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distfit.errors import RunError
from distfit.install.process import in_own_session

Value = TypeVar("Value")

# A test's ranks compute alike on every machine, and leave its GPUs to others.
_ON_CPUS = {"CUDA_VISIBLE_DEVICES": "-1"}
# Python then prints the stacks of all threads when it is aborted, which is how a rank that hangs is asked for them.
_STACKS = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
# A program of somebody's own may have registered faulthandler for the second one.
_ASKING = (signal.SIGABRT, signal.SIGQUIT)
# How the kernel's names of launchers and of their daemons begin: they would end their ranks, or pass a signal on.
_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "orted", "prte", "hydra", "srun")
_STACKS_PRINTED_S = 1.5
_PASSED_ON_S = 1.0  # by the launcher
_READ_S = 10.0


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Args:
        argv: its command line.
        code: its exit code, as the launcher gives it; negative when a signal ended it.
        output: all that its ranks printed.
        errors: all that they wrote to standard error.
        seconds: that it took.
    """

    argv: tuple[str, ...]
    code: int
    output: str
    errors: str
    seconds: float

    def report(self) -> str:
        """All of it, for the message of an assertion."""
        return (
            f"{' '.join(self.argv)}\nexit code {self.code} after {self.seconds:.1f} s"
            f"\n--- stdout\n{self.output}\n--- stderr\n{self.errors}"
        )


def launch_ranks(
    program: str | os.PathLike | Sequence[str],
    ranks: int = 2,
    *,
    limit_s: float = 150.0,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike | None = None,
) -> Result:
    """Run a Python program on several ranks of this machine, as `distfit launch -np` does, and wait for its end.

    ::

        job = launch_ranks("train.py", ranks=2)
        assert job.code == 0, job.report()
        assert "val_accuracy" in job.output

    Args:
        program: a script, or the arguments of Python: ["train.py", "--epochs", "1"], ["-m", "mypackage.train"].
        ranks: how many, >= 1; one is started without a launcher.
        limit_s: seconds after which the ranks are asked for their stacks and ended; > 0.
        env: further variables of their environment. They compute on CPUs, unless it says otherwise.
        cwd: where they run; here by default.

    Returns:
        The exit code and all that was printed; a program that fails is no error here.

    Raises:
        InputError: there is no launcher here, or this process is a rank itself.
        RunError: the limit passed; its message has what was printed, with the stacks of all ranks.
    """
    arguments = [os.fspath(program)] if isinstance(program, (str, os.PathLike)) else list(program)
    argv, environment = _command(ranks, (sys.executable, *arguments))
    return finished(argv, {**environment, **_ON_CPUS, **_STACKS, **(env or {})}, limit_s, cwd)


def run_as_threads(function: Callable[[], Value], ranks: int = 3, *, limit_s: float = 120.0) -> list[Value]:
    """Call a function on ranks that are threads of this process: a distributed run in a test, within seconds.

    Args, returns and raises: as `distfit.thread_ranks.run`, which says what threads share and processes do not.

    >>> import distfit
    >>> run_as_threads(lambda: distfit.init().rank, ranks=2)
    [0, 1]
    """
    from distfit.thread_ranks import run

    return run(function, ranks, limit_s)


def finished(
    argv: Sequence[str],
    environment: Mapping[str, str],
    limit_s: float,
    cwd: str | os.PathLike | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Result:
    """Run any command to its end, or to the limit; nothing of it is left behind.

    Args:
        argv: program and arguments.
        environment: all of its environment.
        limit_s: as in `launch_ranks`.
        cwd: as in `launch_ranks`.
        meanwhile: is given the process while it runs.

    Raises:
        OSError: it does not start.
        RunError: the limit passed.
    """
    started = time.monotonic()
    process = in_own_session(argv, environment, None if cwd is None else Path(cwd))
    try:
        if meanwhile is not None:
            meanwhile(process)
        return _result(argv, process, limit_s, started)
    except subprocess.TimeoutExpired:
        _ask_for_stacks(process.pid)
        _end(process)
        job = _result(argv, process, _READ_S, started)
        raise RunError(f"The job hung: ended after {limit_s:.0f} s.\n{job.report()}") from None
    finally:
        _end(process)


def _command(ranks: int, program: tuple[str, ...]) -> tuple[Sequence[str], Mapping[str, str]]:
    if ranks == 1:
        return program, os.environ
    from distfit.launchers.choice import command_for
    from distfit.launchers.facts import gather
    from distfit.launchers.job import Job

    facts = gather()
    command = command_for(Job(ranks=ranks, program=program), facts)
    return command.argv, command.environment


def _result(argv: Sequence[str], process: subprocess.Popen[str], limit_s: float, started: float) -> Result:
    output, errors = process.communicate(timeout=limit_s)
    return Result(tuple(argv), process.returncode, output, errors, time.monotonic() - started)


def _ask_for_stacks(leader: int) -> None:
    """Have every process of a job that can print where its threads are, and give it the time."""
    found = {pid: status for pid in (leader, *_members(leader)) if (status := _status(pid))}
    launchers = [pid for pid, status in found.items() if status["Name"].startswith(_LAUNCHERS)]
    asking = {pid: _prints_stacks_at(found[pid]) for pid in found.keys() - launchers}
    asked = {pid: number for pid, number in asking.items() if number is not None}
    # A launcher ends all ranks when the first one has printed its stacks and died.
    _tell(dict.fromkeys(launchers, signal.SIGSTOP))
    _tell(asked)
    time.sleep(_STACKS_PRINTED_S if asked else 0)
    _tell(dict.fromkeys(launchers, signal.SIGCONT))
    time.sleep(_PASSED_ON_S if asked else 0)


def _tell(signals: Mapping[int, signal.Signals]) -> None:
    for pid, number in signals.items():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _status(pid: int) -> dict[str, str]:
    """What the kernel says of a process, nothing of one that has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _prints_stacks_at(status: Mapping[str, str]) -> signal.Signals | None:
    """The signal at which a process prints its stacks, None for one that would only die of it."""
    caught = int(status["SigCgt"], 16)
    return next((number for number in _ASKING if caught >> (number - 1) & 1), None)


def _end(process: subprocess.Popen[str]) -> None:
    """End everything that a job has started, and nothing else."""
    import psutil

    for pid in _members(process.pid):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    if process.poll() is None:
        process.kill()


def _members(leader: int) -> list[int]:
    """What a process has started: its descendants (horovodrun's ranks have sessions of their own), and of one that has
    ended itself the rest of the session that it opened, in which mpirun's ranks have groups of their own."""
    import psutil

    found: set[int] = set()
    with suppress(psutil.NoSuchProcess):
        found.update(process.pid for process in psutil.Process(leader).children(recursive=True))
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                found.add(pid)
    return sorted(found - {leader})
