"""Programs that take a while: their output in a log, a sign of life on the screen, nothing left behind.

    run(["pip", "install", "cmake"], environment=env, log=log, watch=Progress("Fetching", say))

The program runs in a process group of its own, which is ended whole when time is up or the user
interrupts.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from distfit.errors import RunError

_SPEAK_EVERY_S = 15.0
_TAIL_LINES = 20


class Progress:
    """A bar on a terminal, a line every 15 seconds elsewhere.

    Args:
        title: what is being done.
        say: where the lines go.
        clock: seconds; a test gives its own.
    """

    def __init__(self, title: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._title, self._say, self._clock = title, say, clock
        self._start = self._spoke = clock()
        self._percent: int | None = None
        self._bar = _bar(title) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        else:
            self._say(f"{self._title} ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._clock() - self._start > _SPEAK_EVERY_S:
            self._say(f"{self._title}: done after {self._clock() - self._start:.0f} s")

    def line(self, text: str) -> None:
        """Take notice of one line of the program's output."""
        percent = percent_of(text)
        if percent is not None:
            self._percent = percent
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._percent, total=self._percent and 100)
        elif self._clock() - self._spoke >= _SPEAK_EVERY_S:
            self._spoke = self._clock()
            share = "" if self._percent is None else f" {self._percent} %,"
            self._say(f"{self._title}:{share} {self._spoke - self._start:.0f} s")


def _bar(title: str):
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=None)
    return bar


def percent_of(line: str) -> int | None:
    """How far `make` is, from what CMake's makefiles print.

    >>> percent_of("[ 42%] Building CXX object common.cc.o")
    42
    >>> percent_of("g++: warning: 3% slower")
    """
    found = re.match(r"\s*\[\s*(\d+)%\]", line)
    return int(found[1]) if found else None


def run(
    command: list[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    watch: Progress | None = None,
    folder: Path | None = None,
    timeout_s: float = 3600.0,
) -> int:
    """Run a program to its end, its output appended to the log.

    Args:
        command: program and arguments; the program is looked up in the environment's PATH.
        environment: its whole environment.
        log: the file that gets all it prints.
        watch: is shown each line.
        folder: where it runs; here by default.
        timeout_s: when to end it; an hour is far more than the slowest step needs.

    Returns:
        Its exit status; negative when a signal, ours after `timeout_s` too, ended it.

    Raises:
        RunError: it cannot be started.
    """
    with log.open("a") as record:
        record.write(f"\n$ {' '.join(command)}\n")
        record.flush()
        with _running(command, environment, folder, timeout_s) as process:
            for line in process.stdout or ():
                record.write(line)
                if watch:
                    watch.line(line)
            return process.wait()


@contextmanager
def ended_through_finally() -> Iterator[None]:
    """SIGTERM and a closed terminal unwind the program as Ctrl-C does, so that what it started is ended and
    what it replaced is put back."""

    def unwind(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handling(unwind, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _running(
    command: list[str], environment: Mapping[str, str], folder: Path | None, timeout_s: float
) -> Iterator[subprocess.Popen[str]]:
    """A started program whose group is gone afterwards, however the block ends."""
    process, alarm, came = None, None, []
    try:
        # A signal that arrives before the process is known would leave it behind: it waits until then.
        with _handling(lambda number, _: came.append(number), signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            process = _start(command, environment, folder)
        for number in came:
            signal.raise_signal(number)
        alarm = threading.Timer(timeout_s, _end_group, [process])
        alarm.daemon = True
        alarm.start()
        yield process
    finally:
        if alarm:
            alarm.cancel()
        if process:
            _end_group(process)


@contextmanager
def _handling(handler: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets the main thread alone handle signals
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def tail(log: Path, before: str = "") -> str:
    """The end of a log, for an error message.

    Args:
        log: the file.
        before: leave out the last occurrence of this and all behind it.
    """
    text = log.read_text(errors="replace")
    if before:
        text = text.rpartition(before)[0] or text
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def _start(command: list[str], environment: Mapping[str, str], folder: Path | None) -> subprocess.Popen[str]:
    try:
        return in_own_session(command, environment, folder, errors=subprocess.STDOUT)
    except OSError as error:
        raise RunError(f"Expected to start {command[0]!r}, received {error}. Check that it is installed.") from error


def in_own_session(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None, errors: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a program that can be ended with all that it starts, and that nobody types to.

    Args:
        errors: where its standard error goes.

    Raises:
        OSError: it does not start.
    """
    return subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _end_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
