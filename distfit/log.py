"""Who speaks: the chief; each warning once, with the ranks that have it.

    speak_as(chief=True, size=3)     # when a session starts
    say("...")                       # on the chief
    warn_once("...")                 # on any rank: the chief prints it
    connect(rank, size, send)        # the failure watch has a connection, by which warnings travel
    hear(rank, message)              # on the chief: one has come
    disconnect()                     # the session ends

Any module says what it has to say without asking who it is. With several ranks, warnings go out of band to the chief,
which prints each once and says who has it ("on all 3 ranks", "on rank 2 of 3"): distfit's own, those of Python's
`warnings`, and those of Python's `logging` that would go to the screen. Nothing waits for them, no collective carries
them. Errors are printed where they arise. With one process nothing is changed.
"""

import atexit
import logging
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from distfit.warned import QUIET_S, WHO, Collector, who

# Of one rank. Each is sent at once and kept for as long as the run lasts.
MOST_SENT = 100
MOST_CHARACTERS = 4000
_TOO_MANY = f"distfit: warning: more than {MOST_SENT} different warnings; further ones are not shown{WHO}"
# Their handlers write to the screen; those of a user's own loggers are the user's.
_LOGGERS = ("", "absl", "distfit", "tensorflow")

Message = dict[str, Any]

_logger = logging.getLogger("distfit")


def speak_as(chief: bool, size: int = 1) -> None:
    """The chief prints from INFO upwards; every other process is silent, and its warnings travel.

    To standard error; in a notebook to standard output, as Jupyter shows the other on a ground of red.

    Args:
        chief: whether this process speaks.
        size: ranks of the job. From 2 on, warnings are held back until `connect`.
    """
    global _job
    _logger.handlers.clear()
    _logger.propagate = False
    handler: logging.Handler = logging.StreamHandler(_stream()) if chief or size > 1 else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO if chief else logging.WARNING)
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    if size == 1 and _job is not None:
        _job.chief = chief
        disconnect()
    elif size > 1 and _job is None:
        _job = _Job(chief)
        atexit.register(disconnect)


def _stream() -> TextIO:
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return sys.stdout if in_notebook else sys.stderr


def say(message: str) -> None:
    """Tell the user something, on the chief only."""
    _logger.info(message)


def warn_once(message: str) -> None:
    """Warn the user, once in this process however often it is called; of several ranks the chief prints it."""
    if message not in _said:
        _said.add(message)
        _logger.warning("distfit: warning: %s", message)


def connect(rank: int, size: int, send: Callable[[Message], bool]) -> None:
    """From now on warnings travel, those held back first.

    Args:
        rank, size: of this process.
        send: hands a message ("warned", with the warning's key and text) to the chief; False when nobody takes it any
            more. Not called on the chief.
    """
    if _job is not None:
        _job.connect(rank, size, send)


def hear(rank: int, message: Message) -> None:
    """On the chief: a rank warns. Returns at once."""
    if _job is not None:
        _job.hear(rank, message)


def remaining() -> list[str]:
    """On the chief: what has been heard and not printed, for who prints the end of a run."""
    return [] if _job is None else _job.remaining()


def flush() -> None:
    """Hand over what this rank has warned of so far; before it says that it has failed."""
    if _job is not None:
        _job.pass_on()


def disconnect() -> None:
    """The end of what several ranks have in common: on the chief everything is printed, after a moment in which others
    may join; on other ranks it is handed over. What comes later is printed where it arises."""
    global _job
    if _job is not None:
        _job.end()
        _job = None


class _Job:
    """The warnings of one rank of several, and on the chief those of all.

    A warning may arise anywhere, also while an object is destroyed in the middle of this class's own code: `take` locks
    nothing and sends nothing. A thread passes on what was taken.

    Args:
        chief: whether this rank prints.
    """

    def __init__(self, chief: bool) -> None:
        self.chief, self._pid = chief, os.getpid()
        self._rank, self._size = 0, 0
        self._send: Callable[[Message], bool] | None = None
        self._collector: Collector | None = None
        self._early: list[tuple[int, Message]] = []  # from ranks that were connected sooner
        self._keys: set[str] = set()
        self._taken: deque[Message] = deque()
        self._bell: SimpleQueue[bool] = SimpleQueue()  # False ends the thread
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._work, name="distfit-warnings", daemon=True)
        self._listening = _Listening(self.take)

    def take(self, key: str, text: str) -> None:
        """Something to warn of, with WHO in the text where ranks are to be named."""
        if self._is_child():
            if self.chief:
                _print([text.replace(WHO, "")])
            return
        if key in self._keys or len(self._keys) > MOST_SENT:
            return
        self._keys.add(key)
        if len(self._keys) > MOST_SENT:
            key = text = _TOO_MANY
        self._taken.append({"type": "warned", "key": _cut(key), "text": _cut(text)})
        self._bell.put(True)

    def connect(self, rank: int, size: int, send: Callable[[Message], bool]) -> None:
        """See `distfit.log.connect`."""
        self._rank, self._size, self._send = rank, size, send
        with self._lock:
            self._collector = Collector(size) if self.chief else None
            early, self._early = self._early, []
        for sender, message in early:
            self.hear(sender, message)
        self._thread.start()

    def hear(self, rank: int, message: Message) -> None:
        """See `distfit.log.hear`."""
        with self._lock:
            if self._collector is None:
                self._early.append((rank, message))
            else:
                self._collector.hear(rank, message["key"], message["text"], time.monotonic())
        self._bell.put(True)

    def pass_on(self) -> None:
        """Hand over what was taken, in order; it stays where nobody is connected yet."""
        with self._lock:
            while self._send is not None and self._taken:
                message = self._taken.popleft()
                if self._collector is not None:
                    self.hear(self._rank, message)
                elif not self._send(message):
                    _print([self._named(message)])

    def remaining(self) -> list[str]:
        """See `distfit.log.remaining`."""
        self.pass_on()
        with self._lock:
            return [] if self._collector is None else self._collector.rest()

    def end(self) -> None:
        """See `distfit.log.disconnect`."""
        if self._is_child():
            return
        self.pass_on()
        self._listening.stop()
        deadline = time.monotonic() + 2 * QUIET_S  # others may go on joining
        while (wait_s := self._held_for()) is not None and time.monotonic() < deadline:
            time.sleep(min(wait_s, 0.05) + 0.01)
        self._bell.put(False)
        # Never connected: the others say the same, or have a failure of their own to report.
        before = [self._named(message) for message in self._taken] if self.chief else []
        _print([*before, *self.remaining()])

    def _work(self) -> None:
        going_on = True
        while going_on:
            with suppress(Empty):
                going_on = self._bell.get(timeout=self._held_for())
            self.pass_on()
            with self._lock:
                lines = [] if self._collector is None else self._collector.due(time.monotonic())
            _print(lines)

    def _held_for(self) -> float | None:
        """Seconds until something is to be printed; None when nothing is held back."""
        with self._lock:
            due = None if self._collector is None else self._collector.next_due()
        return None if due is None else max(0.0, due - time.monotonic())

    def _is_child(self) -> bool:
        """Whether this is a forked child of the rank, which is nobody in the job."""
        return os.getpid() != self._pid

    def _named(self, message: Message) -> str:
        place = f" ({who([self._rank], self._size)})" if self._size else ""
        return message["text"].replace(WHO, place)


class _Listening:
    """Hears Python's warnings and log records in place of the screen.

    Args:
        take: is given a key, the same on all ranks, and a text.
    """

    def __init__(self, take: Callable[[str, str], None]) -> None:
        self._take = take
        self._shown_before = warnings.showwarning
        # Somebody who has put a function of their own there wants to see warnings on each rank.
        self._replaced = warnings.showwarning.__module__ == "warnings"
        if self._replaced:
            warnings.showwarning = self._warning
        self._filters: dict[logging.Handler, _Filter] = {}
        self._hear_handlers()
        # `logging.warning` makes a handler with its first record: one more look before any record is handled.
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._hear_handlers)

    def stop(self) -> None:
        """The screen hears them again."""
        if warnings.showwarning == self._warning:
            warnings.showwarning = self._shown_before
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._hear_handlers)
        for handler, heard in self._filters.items():
            handler.removeFilter(heard)

    def _hear_handlers(self, record: logging.LogRecord | None = None) -> bool:
        for handler in _handlers_of_the_screen():
            if handler not in self._filters:
                self._filters[handler] = _Filter(handler, self._take)
                handler.addFilter(self._filters[handler])
        return True

    def _warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None:
            self._shown_before(message, category, filename, lineno, file, line)
            return
        text = warnings.formatwarning(f"{message}{WHO}", category, filename, lineno, line)  # type: ignore[arg-type]
        # Hosts may have the same file in different folders.
        self._take(f"{category.__name__} {Path(filename).name}:{lineno} {message}", text.rstrip("\n"))


class _Filter(logging.Filter):
    """Takes warnings away from a handler; errors stay with it."""

    def __init__(self, handler: logging.Handler, take: Callable[[str, str], None]) -> None:
        super().__init__()
        self._handler, self._take = handler, take

    def filter(self, record: logging.LogRecord) -> bool:
        if not logging.WARNING <= record.levelno < logging.ERROR:
            return True
        try:
            key, text = f"{record.name} {record.getMessage()}", self._handler.format(record)
        except Exception:  # words and values that do not fit together: the handler says so
            return True
        # The key is without what a format adds: the time differs from rank to rank.
        self._take(key, text + WHO)
        return False


def _handlers_of_the_screen() -> list[logging.Handler]:
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    shown = [each for each in handlers if getattr(each, "stream", None) in (sys.stderr, sys.stdout)]
    return [*shown, *([logging.lastResort] if logging.lastResort else [])]


def _cut(text: str) -> str:
    kept = text[:MOST_CHARACTERS]
    return text if kept == text else f"{kept}...{'' if WHO in kept else WHO}"


def _print(lines: list[str]) -> None:
    # A closed or broken stream leaves nobody to tell.
    for line in lines:
        with suppress(OSError, ValueError):
            print(line, file=_stream(), flush=True)


_job: _Job | None = None
_said: set[str] = set()
