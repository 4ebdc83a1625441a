"""A file that the processes of a host share for the time of a run, and that no run leaves behind.

    path = place_for("memory", None, "rows-of-run-7", needed=2**30)
    file = SharedFile(path, 2**30)           # sparse; the same file for every process that asks for this path
    file.remove()

Each process holds a shared lock on the file, which the kernel takes back whatever happens to the process. A file of
which an exclusive lock can be had is nobody's: the next run removes it, or empties it before it uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from typing import Literal, TypeAlias

from distfit import cgroups, log
from distfit.errors import InputError

Where: TypeAlias = Literal["memory", "disk"]

PREFIX = "distfit-rows-"
_IN_MEMORY = "/dev/shm"
_MIB = 2**20
# What a file system has to keep free for everything else.
_MARGIN = 64 * _MIB


def place_for(where: Where, folder: str | os.PathLike | None, name: str, needed: int) -> str:
    """The path for the file: in a folder that has it already, or in the first one with room for all of it.

    Files that crashed runs left in these folders are removed first.

    Args:
        where: "memory" is /dev/shm, or the temporary folder if that has no room; "disk" is `folder`.
        folder: made if need be; None is the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
        name: of the file, after `PREFIX`.
        needed: bytes.

    Raises:
        InputError: too little room.
        OSError: a folder that cannot be written.
    """
    folders = _folders(where, folder)
    for one in folders:
        _remove_abandoned(one)
    file = PREFIX + name
    there = [one for one in folders if os.path.exists(os.path.join(one, file))]
    roomy = [one for one in folders if needed + _MARGIN <= room_in(one)]
    if not there and not roomy:
        raise InputError(_too_little(where, folders, needed))
    chosen = (there or roomy)[0]
    if chosen != folders[0]:
        log.say(f"distfit: a cache of {_mib(needed)} does not fit into {folders[0]} and goes to {chosen}.")
    return os.path.join(chosen, file)


def room_in(folder: str) -> int:
    """Bytes that can be written there; what is written to memory counts against the limit of a container."""
    free = shutil.disk_usage(folder).free
    left = cgroups.memory_left(cgroups.of_this_process()) if folder == _IN_MEMORY else None
    return free if left is None else min(free, left)


class SharedFile:
    """The file, open until the last thread lets go of it: the number of a file that was closed may be another's.

    Args:
        path: of `place_for`.
        size: bytes; it takes room as it is written.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path, self._owner = path, os.getpid()
        self.fd = -1
        self.fd = _opened(path, size)

    def remove(self) -> None:
        """Takes its name away, if it is still its own; who has the file open keeps it. Not in a fork, where Python's
        end would take it from the process that goes on."""
        if os.getpid() == self._owner and _is_at(self.path, self.fd):
            with contextlib.suppress(FileNotFoundError):  # every rank of the host removes it
                os.unlink(self.path)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _opened(path: str, size: int) -> int:
    """The file's descriptor, with a lock that others may share; made, or emptied if nobody has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _is_nobodys(fd):
            # What a crashed run left may be of other data.
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        fcntl.flock(fd, fcntl.LOCK_SH)
        # Whoever had it may have removed it before the lock was ours; from here on nobody does.
        if _is_at(path, fd) and os.fstat(fd).st_size == size:
            return fd
        os.close(fd)


def _folders(where: Where, folder: str | os.PathLike | None) -> list[str]:
    if where == "memory":
        return [one for one in (_IN_MEMORY, tempfile.gettempdir()) if os.path.isdir(one)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    chosen = os.path.join(home, "distfit") if folder is None else os.fspath(folder)
    os.makedirs(chosen, exist_ok=True)
    return [chosen]


def _too_little(where: Where, folders: list[str], needed: int) -> str:
    found = " and ".join(f"{_mib(room_in(one))} in {one}" for one in folders)
    other = 'take cache="disk"' if where == "memory" else "name another folder"
    return (
        f"Expected room for the rows of cache={where!r}, {_mib(needed)} and {_mib(_MARGIN)} to spare, received "
        f"{found}. Make rows smaller (uint8 instead of float32), free some space, {other}, or leave out cache."
    )


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"


def _remove_abandoned(folder: str) -> None:
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not name.startswith(PREFIX):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # gone meanwhile, or another user's
        if _is_nobodys(fd) and _is_at(path, fd):
            os.unlink(path)
        os.close(fd)


def _is_nobodys(fd: int) -> bool:
    """Whether an exclusive lock can be had, which is then held."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: str, fd: int) -> bool:
    """Whether the path leads to the open file, and not to nothing or to a newer one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))
