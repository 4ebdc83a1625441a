"""One run per folder: a second one is refused, and what a killed one has left is told from one that works.

    with RunLock("runs/a", "distfit.fit") as lock:
        lock.left                  # what a holder had said that was killed; None after one that ended
        lock.touch(step=120)       # every few seconds
        lock.at(121)               # at every step, if one likes

The lock is one of the kernel (flock) on `run.lock`, which ends with its process, however that ends. On file systems
whose locks other hosts do not see, the file itself is looked at: whoever holds it renews it every few seconds. A fresh
file of another host is waited for: a node that has just failed renews nothing, and its job that was put on another node
goes on by itself. Where there are no locks at all, this goes for this host too, and who has written the file last holds
it. The file stays when the lock is released, and says so: taking it away would let two others hold two files of that
name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil

from distfit.checkpoint.tensors import BAD_JSON
from distfit.errors import InputError
from distfit.log import say

FILE = "run.lock"
# A holder on another host that has not renewed the file for so long is gone.
FRESH_S = 60.0
# How often a file of another host's is looked at meanwhile.
_LOOK_S = 1.0
_MOST_BYTES = 2**16
_RELEASED = "released"
_STEP = "step"
# How a file begins that has a step, whose number fills so many characters: JSON allows blanks before it.
_HEAD, _DIGITS = b'{"step": ', 20
# The content fills so many bytes at least, so that renewing it is one write and nobody reads half of it.
_ROOM = 1024
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Without locks two that begin at once both find nobody; after so long the last one to write has written.
_SETTLED_S = 1.0


# Those that this process holds.
_held: WeakSet[Any] = WeakSet()


class RunLock:
    """
    Args:
        folder: that is there.
        who: holds it, for the message to others.

    Attributes:
        left: facts that a holder left that did not release it.
    """

    def __init__(self, folder: str | os.PathLike, who: str) -> None:
        self._path, self._who = Path(folder) / FILE, who
        self._number: int | None = None
        self._own: dict[str, Any] = {}
        self.left: dict[str, Any] | None = None

    def acquire(self) -> None:
        """
        Raises:
            InputError: somebody else works in the folder, or it cannot be written.
        """
        try:
            number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(_cannot(self._path, error)) from error
        try:
            self._take(number)
        except BaseException:
            os.close(number)
            raise

    def _take(self, number: int) -> None:
        locked = self._lock(number)
        held = _content(number)
        if locked is False or (locked is None and _is_alive_here(held)) or self._lives_elsewhere():
            raise InputError(_refusal(self._path, _content(number)))
        held = _content(number)
        self.left = {name: value for name, value in held.items() if name != _RELEASED} or None
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "who": self._who}
        try:
            _write(number, self._own)
        except OSError as error:
            raise InputError(_cannot(self._path, error)) from error
        if locked is None:
            time.sleep(_SETTLED_S)
            if (now := _content(number)) != self._own:
                raise InputError(_refusal(self._path, now))
        self._number = number
        _held.add(self)

    def _lives_elsewhere(self) -> bool:
        """Whether a process on another host shows that it works there: this host's kernel would have said so of one
        here. Takes as long as it may be silent, where it is."""
        before = _seen(self._path)
        left_s = _may_live_s(*before)
        if left_s <= 0:
            return False
        who, host = _words(before[0], "who", "host")
        say(
            f"distfit: {self._path.parent} was in use by {who} on host {host} {FRESH_S - left_s:.0f} s ago; waiting "
            f"{left_s:.0f} s at most for a sign of its life."
        )
        end = time.monotonic() + left_s
        while time.monotonic() < end:
            time.sleep(_LOOK_S)
            if (now := _seen(self._path)) != before:
                return _may_live_s(*now) > 0
        return False

    def _lock(self, number: int) -> bool | None:
        """Whether the kernel gave us its lock; None where the file system has none."""
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise InputError(_cannot(self._path, error)) from error
            return None
        return True

    def touch(self, **facts: Any) -> None:
        """Show that this process lives, and what it says of itself.

        Raises:
            OSError: the file cannot be written.
        """
        assert self._number is not None, "held"
        self._own |= facts
        _write(self._number, self._own)

    def at(self, step: int) -> None:
        """The run has come to this step. A few bytes in the file and no more, so that each step may say it: whoever
        goes on knows what a kill has cost. The page cache outlives a process."""
        if self._number is not None and _STEP in self._own:
            self._own[_STEP] = step
            with suppress(OSError):  # the next save says what is wrong with the folder
                os.pwrite(self._number, _step(step), len(_HEAD))

    def release(self, keep: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            keep: what `left` says to the next holder; None says that this one has ended well.
        """
        if self._number is None:
            return
        try:
            _write(self._number, {**(keep or {}), _RELEASED: time.time()})
        except OSError:
            # Without its folder, or on a full disk: the kernel's lock ends with the file.
            self._own = {}
        os.close(self._number)
        self._number = None

    def let_go(self) -> None:
        """In a forked child: the lock is its parent's, and must not outlive it in a worker that nobody has ended."""
        if self._number is not None:
            os.close(self._number)
            self._number = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _step(step: int) -> bytes:
    return str(step).rjust(_DIGITS).encode()


def _write(number: int, held: Mapping[str, Any]) -> None:
    content = json.dumps(held).encode()
    if isinstance(held.get(_STEP), int):  # first and of a fixed width, for `at`
        others = json.dumps({name: value for name, value in held.items() if name != _STEP}).encode()
        content = _HEAD + _step(held[_STEP]) + (b", " + others[1:] if others != b"{}" else b"}")
    content = content.ljust(_ROOM)
    os.pwrite(number, content, 0)
    os.ftruncate(number, len(content))
    os.utime(number)


def _content(number: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(number, _MOST_BYTES, 0) or b"{}")
    except BAD_JSON:  # cut off while it was written
        return {}
    return found if isinstance(found, dict) else {}


def _seen(path: Path) -> tuple[dict[str, Any], float]:
    """What the file says, and when it was written. Opened anew: NFS asks its server then, and only then."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(_cannot(path, error)) from error
    try:
        return _content(number), os.fstat(number).st_mtime
    finally:
        os.close(number)


def _may_live_s(held: Mapping[str, Any], changed: float) -> float:
    """For how many seconds a holder on another host may still be silent; 0 where there is none."""
    if "host" not in held or held["host"] == socket.gethostname() or _RELEASED in held:
        return 0.0
    # A clock that is ahead of ours does not make it younger than new.
    return max(0.0, FRESH_S - max(0.0, time.time() - changed))


def _is_alive_here(held: Mapping[str, Any]) -> bool:
    """Whether the process that wrote it still runs: one that has started later has its number by chance."""
    pid, since = held.get("pid"), held.get("since")
    if held.get("host") != socket.gethostname() or _RELEASED in held or not isinstance(pid, int):
        return False
    try:
        return not isinstance(since, float) or psutil.Process(pid).create_time() <= since + 1.0
    except psutil.NoSuchProcess:
        return False


def _when(since: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    except (TypeError, ValueError, OverflowError, OSError):  # somebody else may have written anything there
        return "unknown"


def _cannot(path: Path, error: OSError) -> str:
    return (
        f"Expected to be able to write to {path}, received: {error.strerror or error}. Make room, correct its "
        "permissions, or choose another folder."
    )


def _refusal(path: Path, held: Mapping[str, Any]) -> str:
    who, host, process = _words(held, "who", "host", "pid")
    return (
        f"Expected to be the only run in {path.parent}, received {who} on host {host}, process {process}, since "
        f"{_when(held.get('since'))}. Wait for its end, stop it, or choose another folder."
    )


def _words(held: Mapping[str, Any], *names: str) -> list[str]:
    """Of what anybody may have written there."""
    return [ascii(held.get(name, "unknown")).strip("'") for name in names]


def _in_a_child() -> None:
    for lock in list(_held):
        lock.let_go()


os.register_at_fork(after_in_child=_in_a_child)
