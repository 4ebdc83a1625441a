"""One run per folder: a second one is refused, and what a killed one has left is told from one that works.

    with RunLock("runs/a", "distfit.fit") as lock:
        lock.left                  # what a holder had said that was killed; None after one that ended
        lock.touch(step=120)       # every few seconds

The lock is one of the kernel (flock) on `run.lock`, which ends with its process, however that ends. On file systems
whose locks other hosts do not see, the file itself is looked at: whoever holds it renews it every few seconds, and a
file of another host that is fresh is somebody's. Where there are no locks at all, this goes for this host too, and who
has written the file last holds it. The file stays when the lock is released, and says so: taking it away would let two
others hold two files of that name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil

from distfit.checkpoint.tensors import BAD_JSON
from distfit.errors import InputError

FILE = "run.lock"
# A holder on another host that has not renewed the file for so long is gone.
FRESH_S = 60.0
_MOST_BYTES = 2**16
_RELEASED = "released"
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
        here = locked is None and _is_alive_here(held)
        if locked is False or here or _is_elsewhere(held, os.fstat(number).st_mtime):
            raise InputError(_refusal(self._path, held))
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


def _write(number: int, held: Mapping[str, Any]) -> None:
    content = json.dumps(held).encode().ljust(_ROOM)
    os.pwrite(number, content, 0)
    os.ftruncate(number, len(content))
    os.utime(number)


def _content(number: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(number, _MOST_BYTES, 0) or b"{}")
    except BAD_JSON:  # cut off while it was written
        return {}
    return found if isinstance(found, dict) else {}


def _is_elsewhere(held: Mapping[str, Any], changed: float) -> bool:
    """Whether somebody on another host holds it: this one's kernel would have said so of its own."""
    elsewhere = "host" in held and held["host"] != socket.gethostname() and _RELEASED not in held
    return elsewhere and time.time() - changed < FRESH_S


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
    who, host, process = (ascii(held.get(name, "unknown")).strip("'") for name in ("who", "host", "pid"))
    return (
        f"Expected to be the only run in {path.parent}, received {who} on host {host}, process {process}, since "
        f"{_when(held.get('since'))}. Wait for its end, stop "
        f"it, or choose another folder; if its host is gone, this ends {FRESH_S:.0f} seconds after its last sign of "
        "life."
    )


def _in_a_child() -> None:
    for lock in list(_held):
        lock.let_go()


os.register_at_fork(after_in_child=_in_a_child)
