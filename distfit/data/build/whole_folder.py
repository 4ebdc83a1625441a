"""A folder that appears under its name complete, or not at all; work on it can go on where it was interrupted.

    with whole_folder("data/mine", mark="dataset.json", force=False, facts={"seed": 0, "inputs": digest}) as work:
        check_space(work.fresh, 5 * 10**9, "mine")
        ...                                              # fill work.fresh

Until then it lies in a hidden folder beside its later place, `.mine.build`. That goes when the block fails. After
Ctrl-C, SIGTERM or SIGKILL it stays, and a next one with the same facts finds what is in it; without facts it goes too.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distfit.data.records import whole_file
from distfit.errors import InputError, RunError
from distfit.folders import existing

_STATE, _LOCK = "state.json", "lock"
_FRESH, _REPLACED = "new", "old"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}
# The fact whose value says nothing to people: a digest.
INPUTS = "inputs"


# Numbers, strings and None by name, as JSON has them.
Facts = Mapping[str, Any]


def work_folder_of(out: str | os.PathLike) -> str:
    """Where the work on a folder lies until it is whole.

    >>> work_folder_of("/data/mine")
    '/data/.mine.build'
    """
    parent, name = os.path.split(os.path.realpath(out))
    return os.path.join(parent, f".{name}.build")


class Work:
    """Work on a folder that is not whole yet.

    Args:
        folder: the hidden folder; beside `fresh` it has room for what the work needs to go on.

    Attributes:
        fresh: the folder to fill.
        resumed: whether it goes on with what an interrupted one has left.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.fresh, self.resumed = folder, os.path.join(folder, _FRESH), False

    def file(self, name: str) -> str:
        """The path of a file that the work needs to go on."""
        return os.path.join(self.folder, name)

    def begin(self, facts: Facts | None, fresh: bool, say: Callable[[str], None]) -> None:
        """Keeps what an earlier work of the same facts has left, or removes it."""
        before = None if fresh else _state(self.file(_STATE))
        self.resumed = facts is not None and before == facts and os.path.isdir(self.fresh)
        if self.resumed:
            return
        if before is not None and facts is not None and before != facts:
            say(f"the build that was interrupted had {_changes(before, facts)}: starting anew.")
        for name in set(os.listdir(self.folder)) - {_LOCK}:
            path = self.file(name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        os.mkdir(self.fresh)
        with whole_file(self.file(_STATE)) as file:
            file.write(json.dumps(facts).encode())


@contextlib.contextmanager
def whole_folder(
    out: str,
    mark: str,
    force: bool,
    facts: Facts | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Iterator[Work]:
    """A folder to fill that takes the name `out` when the block ends, or is removed when it fails.

    Args:
        out: its name, a real path; its parents are made.
        mark: a file that such a folder has and no other, by which one that may be replaced is known.
        force: replace one that is there; not where something of somebody else lies in it.
        facts: all that decides about the bytes; with them what is interrupted stays, to be gone on with.
        fresh: do not go on with it.
        say: gets a sentence if there is something that was interrupted and had other facts.

    Raises:
        InputError: something else is there, it cannot be written, or another process is at work on it.
        RunError: writing failed.
    """
    check_free(out, mark, force)
    work, made = Work(work_folder_of(out)), _missing(os.path.dirname(out))
    with _locked(work, out):
        _restore(work, out)
        check_free(out, mark, force)
        try:
            work.begin(facts, fresh, say)
            yield work
            _put_in_place(work.fresh, out, work.file(_REPLACED))
        except BaseException as error:
            # Of what was interrupted, by Ctrl-C or a signal, not by an error, the work stays.
            if facts is None or isinstance(error, Exception) or not os.path.isdir(work.fresh):
                _remove(work, made)
            if not isinstance(error, OSError):
                raise
            raise RunError(
                f"Expected to write the data set {out!r}, received: {error.strerror or error}. Nothing of it is left. "
                "Choose a place that has room and can be written, and build again."
            ) from error
        _remove(work, made)


def _remove(work: Work, made: list[str]) -> None:
    shutil.rmtree(work.folder)
    for folder in made:
        if os.listdir(folder):
            return
        os.rmdir(folder)


@contextlib.contextmanager
def _locked(work: Work, out: str) -> Iterator[None]:
    """The work folder, made where it is not there, for this process alone."""
    try:
        os.makedirs(work.folder, exist_ok=True)
        lock = open(work.file(_LOCK), "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(
            f"Expected a folder that can be written at {out!r}, received: {error.strerror}. Choose another."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Expected to be the only one that builds {out!r}, received another process that is at work on it in "
                f"{work.folder!r}. Wait for it, end it, or choose another folder."
            ) from error
        except OSError as error:
            # Some network file systems have no locks; there, as before, nothing tells of two builds at a time.
            if error.errno not in _WITHOUT_LOCKS:
                raise
        yield


def _restore(work: Work, out: str) -> None:
    """What a build was about to replace when it was killed is put back, or removed if it was replaced."""
    replaced = work.file(_REPLACED)
    if os.path.isdir(replaced) and not os.path.lexists(out):
        os.rename(replaced, out)
    elif os.path.isdir(replaced):
        shutil.rmtree(replaced)


def _state(path: str) -> dict[str, Any] | None:
    """The facts of an earlier work; None where there are none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


def _changes(before: Facts, now: Facts) -> str:
    differing = (name for name in {**now, **before} if before.get(name) != now.get(name))
    return ", ".join(
        f"other {INPUTS}" if name == INPUTS else f"{name} {before.get(name)} instead of {now.get(name)}"
        for name in differing
    )


def _missing(folder: str) -> list[str]:
    """The folders that have to be made for this one, the innermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _put_in_place(fresh: str, out: str, replaced: str) -> None:
    # All three are on one file system, so that each move is one rename and nothing is ever half there.
    if not os.path.isdir(out):
        os.rename(fresh, out)
        return
    try:
        os.rename(out, replaced)
        os.rename(fresh, out)
    except BaseException:  # Ctrl-C too: what was replaced goes with the work folder
        if not os.path.lexists(out):
            os.rename(replaced, out)
        raise


def check_free(out: str, mark: str, force: bool) -> None:
    """Nothing is in the way at `out`, or a data set that may be replaced, and a folder can be made there.

    Raises:
        InputError: something else is there.
    """
    _check_place(out)
    if os.path.isdir(out):
        entries = os.listdir(out)
        if force and mark in entries:
            _check_own(out, entries, mark)
            return
        if not entries:
            return
        remedy = "pass --force to replace it" if mark in entries else "empty this one"
        raise InputError(
            f"Expected a new or empty folder to build in, received {out!r} with {len(entries)} entries. "
            f"Choose another folder, or {remedy}."
        )
    if os.path.lexists(out):
        raise InputError(f"Expected a folder to build in, received the file {out!r}. Choose another name.")


def _check_place(out: str) -> None:
    if os.path.ismount(out):
        raise InputError(
            f"Expected a folder to build in that can be renamed, received {out!r}, where a disk is mounted. Name a "
            f"folder in it: {os.path.join(out, 'NAME')}"
        )
    above = existing(os.path.dirname(out))
    if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"Expected a folder that can be written at {out!r}, received {str(above)!r} above it, where this user may "
            "not write. Choose another."
        )


def _check_own(out: str, entries: list[str], mark: str) -> None:
    """What is replaced is removed, and may be all that somebody has of it: the images themselves, say."""
    # What distfit keeps beside records, their index say, is made again.
    others = sorted(
        name for name in entries if not (name == mark or name.endswith(".tfrecord") or name.startswith(".distfit-"))
    )
    if others:
        raise InputError(
            f"Expected nothing but a data set to replace in {out!r}, received {others[0]!r} in it, which is no part of "
            f"one ({len(others)} of {len(entries)} entries). Move it away, or choose another folder."
        )


def check_space(folder: str, needed: int, what: str) -> None:
    """There is room for so many bytes.

    Raises:
        InputError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"Expected {format_bytes(needed)} of free space to write {what}, "
            f"received {format_bytes(free)}. Choose a folder on another disk, or make room."
        )


def format_bytes(size: int) -> str:
    """
    >>> format_bytes(999), format_bytes(5 * 10**6), format_bytes(147_300_000_000)
    ('999 B', '5.0 MB', '147.3 GB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"
