"""Child programs with a limit: what they said, and how they ended; nothing of them is left behind.

    answer = ask([sys.executable, "-m", "distfit.doctor.probe", "mpi4py"], environment, limit_s=17)
    answer.said, answer.problem

A child says what it finds as lines of JSON, one a stage, so that one that crashes or hangs has still said what
it knew by then.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from distfit.install.process import in_own_session

# Of what a program prints, the end is kept: Open MPI names the cause above twenty lines of what it may come from.
_KEPT_LINES = 100
FAREWELL_S = 1.0  # from asking a program to end to killing it
_REAPED_S = 0.2
_running: set[subprocess.Popen[str]] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What became of a child program.

    Args:
        said: the JSON objects that it printed, merged.
        output: the rest of its standard output.
        errors: the end of its standard error.
        problem: None when it ended well, else one phrase: "did not answer within 18 s", say.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""
    errors: str = ""
    problem: str | None = None


def ask(command: Sequence[str], environment: Mapping[str, str], limit_s: float, folder: Path | None = None) -> Answer:
    """Run a program to its end, or to the limit.

    Args:
        command: program and arguments.
        environment: its whole environment.
        limit_s: when it is killed, with all that it has started.
        folder: where it runs; here by default.
    """
    try:
        with _started(command, environment, folder) as process:
            output, errors = process.communicate(timeout=limit_s)
    except OSError as error:
        return Answer(problem=f"does not start: {error.strerror or error}")
    except subprocess.TimeoutExpired as stuck:
        said, rest = parse(_text(stuck.stdout))
        return Answer(said, rest, _end_of(_text(stuck.stderr)), f"did not answer within {limit_s:.0f} s")
    said, rest = parse(output)
    return Answer(said, rest, _end_of(errors), ended(process.returncode, errors))


def end_all() -> None:
    """End every program that is still running: the examination is over, or was interrupted."""
    with _lock:
        left = list(_running)
    _end(left)


def parse(output: str) -> tuple[dict[str, Any], str]:
    r"""The JSON objects among the lines, merged, and the other lines.

    >>> parse('{"a": 1}\nhello\n{"b": 2}\n')
    ({'a': 1, 'b': 2}, 'hello')
    """
    said: dict[str, Any] = {}
    rest = []
    for line in output.splitlines():
        found = _object(line)
        if found is None:
            rest.append(line)
        else:
            said |= found
    return said, "\n".join(rest).strip()


def ended(status: int, errors: str) -> str | None:
    """How a program ended, None when well; of a Python traceback its last line.

    >>> ended(1, "Traceback (most recent call last):\\n  ...\\nImportError: no libmpi")
    'ImportError: no libmpi'
    >>> ended(-11, "")
    'was ended by SIGSEGV'
    """
    if status == 0:
        return None
    if status < 0:
        return f"was ended by {_signal(-status)}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with status {status}"


def _object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:  # a program's own output, or a line cut off by a crash
        return None
    return found if isinstance(found, dict) else None


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


def _text(kept: str | bytes | None) -> str:
    return kept.decode(errors="replace") if isinstance(kept, bytes) else kept or ""


def _end_of(errors: str) -> str:
    return "\n".join([line for line in errors.splitlines() if line.strip()][-_KEPT_LINES:])


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None
) -> Iterator[subprocess.Popen[str]]:
    process = in_own_session(command, environment, folder)
    with _lock:
        _running.add(process)
    try:
        yield process
    finally:
        _end([process])
        with _lock:
            _running.discard(process)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """End programs with all that they started: mpirun's ranks have process groups of their own."""
    left = [process for process in processes if process.poll() is None]
    families = [member for process in processes for member in _family(process.pid)]
    for process in left:
        _signal_group(process, signal.SIGTERM)  # mpirun then takes its files out of /dev/shm and /tmp
    _wait(left, FAREWELL_S)
    for process in left:
        _signal_group(process, signal.SIGKILL)
    for member in families:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    _wait(left, _REAPED_S)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)


def _wait(processes: list[subprocess.Popen[str]], limit_s: float) -> None:
    """Wait for all, but not for one that waits for a broken driver or disk: not even SIGKILL ends that."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.01)


def _family(pid: int) -> list[psutil.Process]:
    """What a program has started; of one that has ended itself, as an mpirun that crashed, the rest of its session."""
    found = [_process(other) for other in psutil.pids() if other != pid and _session_of(other) == pid]
    with suppress(psutil.NoSuchProcess):
        found += psutil.Process(pid).children(recursive=True)
    return [member for member in found if member]


def _process(pid: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _session_of(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None
