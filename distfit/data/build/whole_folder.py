"""A folder that appears under its name complete, or not at all.

    with whole_folder("data/mine", mark="dataset.json", force=False) as folder:
        check_space(folder, 5 * 10**9, "mine")
        ...                                     # fill it

Until then it is a hidden folder beside its later place, which goes when the block fails or is interrupted.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from distfit.errors import InputError, RunError
from distfit.folders import existing


@contextlib.contextmanager
def whole_folder(out: str, mark: str, force: bool) -> Iterator[str]:
    """A folder to fill that takes the name `out` when the block ends, or is removed when it fails.

    Args:
        out: its name; its parents are made.
        mark: a file that such a folder has and no other, by which one that may be replaced is known.
        force: replace one that is there; not where something of somebody else lies in it.

    Raises:
        InputError: something else is there, or it cannot be written.
        RunError: writing failed.
    """
    check_free(out, mark, force)
    parent = os.path.dirname(out)
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out)}.", dir=parent)
    except OSError as error:
        raise InputError(
            f"Expected a folder that can be written at {out!r}, received: {error.strerror}. Choose another."
        ) from error
    try:
        fresh = os.path.join(temporary, "new")
        os.mkdir(fresh)
        yield fresh
        _put_in_place(fresh, out, os.path.join(temporary, "old"))
    except OSError as error:
        raise RunError(
            f"Expected to write the data set {out!r}, received: {error.strerror or error}. Nothing of it is left. "
            "Choose a place that has room and can be written, and build again."
        ) from error
    finally:
        shutil.rmtree(temporary)


def _put_in_place(fresh: str, out: str, replaced: str) -> None:
    # All three are on one file system, so that each move is one rename and nothing is ever half there.
    if not os.path.isdir(out):
        os.rename(fresh, out)
        return
    try:
        os.rename(out, replaced)
        os.rename(fresh, out)
    except BaseException:  # Ctrl-C too: what was replaced goes with the temporary folder
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
    others = sorted(name for name in entries if name != mark and not name.endswith(".tfrecord"))
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
