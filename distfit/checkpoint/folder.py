"""The folder of a run: checkpoints that are whole or not there.

    checkpoints = Checkpoints("runs/a")
    checkpoints.publish(120, tensors, facts)      # runs/a/step-000000000120
    stored, damaged = checkpoints.newest()        # the newest that verifies, and what was damaged before it

A checkpoint is filled under a hidden name, its manifest last, all of it is flushed to disk, and then it is renamed; one
of the same step changes places with it. It exists if its manifest is there and every file has the size and checksum
that the manifest says. `latest` names the newest for people and scripts; the truth is the folders. Nothing here runs
what is read, follows a link, or reads a file that is not of the checkpoint.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distfit.checkpoint.manifest import FACTS, MANIFEST, MOST_BYTES, TENSORS, Manifest, NewerFormat
from distfit.checkpoint.tensors import (
    BAD_JSON,
    FileFact,
    Unreadable,
    check_file,
    read_small,
    read_tensors,
    write_blocks,
    write_tensors,
)
from distfit.errors import RunError

LATEST, PARTIAL, GOING = "latest", ".partial-", ".going-"
FACTS_FILE, _REPLACED = FACTS, "-replaced"
_ASIDE = re.compile(rf"{re.escape(GOING)}(\d{{12}}){_REPLACED}")
_NAME = re.compile(r"step-(\d{12})")
# Facts are read into memory as a whole.
MOST_FACTS = 2**28
# What a file system says that cannot flush a folder, or let two names change places.
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room within this user's quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Correct the folder's permissions",
    errno.EPERM: "Correct the folder's permissions",
    errno.ENOENT: "Bring the folder back: it was there when the run began",
    errno.EIO: "Look after the disk (dmesg)",
}


class Damaged(RunError):
    """A checkpoint is not what was written.

    Attributes:
        path: its folder.
        why: in words.
    """

    _is = "is damaged"

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"checkpoint {path} {self._is}: {why}")
        self.path, self.why = path, why


class Newer(Damaged):
    """A later version of distfit wrote it, in a format that this one does not know."""

    _is = "cannot be read here"


@dataclass(frozen=True)
class Entry:
    """A checkpoint as its manifest says it is; nothing else was read.

    Args:
        damage: why there is no manifest; "" where there is one.
    """

    step: int
    path: Path
    manifest: Manifest | None
    damage: str = ""


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read and found whole."""

    step: int
    path: Path
    manifest: Manifest
    facts: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Checkpoints:
    """
    Args:
        folder: of the run; need not be there.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        # Found damaged beside a manifest that can be read: `entries` says so too, so that they take nobody's place.
        self._known: dict[int, str] = {}

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:012d}"

    def entries(self) -> list[Entry]:
        """All checkpoints, oldest first."""
        try:
            names = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Those that were about to be replaced come first: where both are there, the other one counts.
        found = {
            int(match[1]): self.folder / name
            for pattern in (_ASIDE, _NAME)
            for name in names
            if (match := pattern.fullmatch(name))
        }
        return [self._entry(step, found[step]) for step in sorted(found)]

    def _entry(self, step: int, path: Path) -> Entry:
        if step in self._known:
            return Entry(step, path, None, self._known[step])
        try:
            return Entry(step, path, _manifest(path, step))
        except (OSError, ValueError) as error:
            return Entry(step, path, None, _why(error))

    def _there(self, step: int) -> Path:
        """Where one is: under another name while one that replaces it has not come (see `_exchange`)."""
        whole = self.path(step)
        aside = self._aside(step)
        return aside if aside.is_dir() and not os.path.lexists(whole) else whole

    def _aside(self, step: int) -> Path:
        return self.folder / f"{GOING}{step:012d}{_REPLACED}"

    def publish(self, step: int, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Entry:
        """Write one; it is there, whole, when this returns, and replaces one of the same step.

        Raises:
            RunError: it cannot be written; what was there still is.
        """
        partial = self.folder / f"{PARTIAL}{step:012d}-{os.getpid()}"
        _remove(partial)
        try:
            os.mkdir(partial)
            self._fill(partial, step, tensors, facts)
            self._rename(partial, step)
            self._point_to(self.path(step).name)
        except OSError as error:
            raise RunError(self._cannot(f"write the checkpoint of step {step} to {self.folder}", error)) from error
        finally:
            _remove(partial)  # what could not be written, or what was replaced
        return self._entry(step, self.path(step))

    def read(self, step: int) -> Stored:
        """One checkpoint, verified as a whole.

        Raises:
            Damaged: it is not what was written.
        """
        path = self._there(step)
        with self._naming(step, path):
            manifest = _manifest(path, step)
            _check_sizes(path, manifest)
            facts = _facts(read_small(path / FACTS, MOST_FACTS, manifest.files[FACTS]))
            tensors = read_tensors(path / TENSORS, manifest.files[TENSORS])
        return Stored(step, path, manifest, facts, tensors)

    @contextmanager
    def _naming(self, step: int, path: Path) -> Iterator[None]:
        """What is wrong with a checkpoint becomes `Damaged`, and is remembered until it is found whole."""
        try:
            yield
        except NewerFormat as error:
            raise Newer(path, str(error)) from error
        except (OSError, ValueError, MemoryError) as error:
            self._known[step] = _why(error)
            raise Damaged(path, _why(error)) from error
        self._known.pop(step, None)

    def newest(self) -> tuple[Stored | None, list[Damaged]]:
        """The newest that verifies, and what is damaged, or `Newer`, of those after it; touches nothing."""
        damaged: list[Damaged] = []
        for entry in reversed(self.entries()):
            try:
                return self.read(entry.step), damaged
            except Damaged as error:
                damaged.append(error)
        return None, damaged

    def verify(self, step: int) -> None:
        """Read every byte of one.

        Raises:
            Damaged: it is not what was written.
        """
        path = self._there(step)
        with self._naming(step, path):
            manifest = _manifest(path, step)
            _check_sizes(path, manifest)
            for name, fact in manifest.files.items():
                check_file(path / name, fact)

    def delete(self, step: int) -> None:
        """Take one away: by name at once, its files afterwards.

        Raises:
            RunError: it cannot be taken away.
        """
        going = self.folder / f"{GOING}{step:012d}-{os.getpid()}"
        _remove(going)
        try:
            os.rename(self._there(step), going)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(self._cannot(f"delete the checkpoint of step {step} in {self.folder}", error)) from error
        _remove(going)

    def replaced(self) -> list[Path]:
        """Checkpoints that were about to be replaced where two names cannot change places; `entries` has them too."""
        return sorted(path for path in self.folder.glob(f"{GOING}*") if _ASIDE.fullmatch(path.name))

    def put_back(self) -> None:
        """A checkpoint that was about to be replaced when its run was killed has its name again."""
        for path in self.replaced():
            whole = self.folder / f"step-{path.name.removeprefix(GOING).removesuffix(_REPLACED)}"
            if not os.path.lexists(whole):
                os.rename(path, whole)

    def clean(self) -> None:
        """Take away what a killed run has left half-written or half-deleted."""
        self.put_back()
        for path in [*self.folder.glob(f"{PARTIAL}*"), *self.folder.glob(f"{GOING}*")]:
            _remove(path)

    def _fill(self, partial: Path, step: int, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        files: dict[str, FileFact] = {TENSORS: write_tensors(partial / TENSORS, tensors)}
        files[FACTS] = write_blocks(partial / FACTS, iter([json.dumps(facts).encode()]))
        write_blocks(partial / MANIFEST, iter([Manifest.of(step, files, facts).to_json()]))
        _flush_folder(partial)

    def _rename(self, partial: Path, step: int) -> None:
        whole = self.path(step)
        if os.path.lexists(whole):
            self._exchange(partial, step)
        else:
            os.rename(partial, whole)
        _flush_folder(self.folder)
        self._known.pop(step, None)
        _remove(self._aside(step))

    def _exchange(self, partial: Path, step: int) -> None:
        """A folder cannot be renamed over another, but Linux lets two change places. Where the file system cannot, the
        one that is replaced waits under a name by which it is found until the other one has come."""
        whole, aside = self.path(step), self._aside(step)
        if _change_places(partial, whole):
            return
        _remove(aside)
        os.rename(whole, aside)
        try:
            os.rename(partial, whole)
        except OSError:
            os.rename(aside, whole)
            raise

    def _point_to(self, name: str) -> None:
        pointer = self.folder / f"{PARTIAL}{LATEST}-{os.getpid()}"
        _remove(pointer)
        try:
            write_blocks(pointer, iter([f"{name}\n".encode()]))
            os.replace(pointer, self.folder / LATEST)
        finally:
            _remove(pointer)
        _flush_folder(self.folder)

    def _cannot(self, what: str, error: OSError) -> str:
        try:
            whole = [entry.path.name for entry in self.entries() if entry.manifest is not None]
        except OSError:
            whole = []
        kept = f"{whole[-1]} is still there" if whole else "there is none before it"
        remedy = _REMEDIES.get(error.errno or 0, "Correct that")
        return (
            f"Expected to {what}, received: {error.strerror or error}; {kept}. {remedy}, and start the same command "
            "again: it goes on from the newest."
        )


def _manifest(path: Path, step: int) -> Manifest:
    if path.is_symlink():
        raise Unreadable("it is a link")
    try:
        return Manifest.from_json(read_small(path / MANIFEST, MOST_BYTES), step)
    except Unreadable as error:
        raise type(error)(f"{MANIFEST}: {error}") from error


def _check_sizes(path: Path, manifest: Manifest) -> None:
    """Sizes first, so that a truncated file is named without reading the others."""
    for name, fact in manifest.files.items():
        found = os.lstat(path / name)
        if found.st_size != fact.size:
            raise Unreadable(f"{name} has {found.st_size:,} bytes of {fact.size:,}")


def _facts(text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except BAD_JSON as error:
        raise Unreadable(f"{FACTS} cannot be read: {error!r}") from error
    if not isinstance(facts, dict):
        raise Unreadable(f"{FACTS} holds no facts by name")
    return facts


def _change_places(one: Path, other: Path) -> bool:
    """Rename each to the other at once; False where the file system or the C library cannot.

    `renameat2(2)`; Python has no function for it.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(path: Path) -> None:
    """As far as it can be: what stays has a name by which nobody reads it, and goes with the next `clean`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _CANNOT:  # then it keeps names in its own way, some of FUSE say
            raise
    finally:
        os.close(number)


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{Path(os.fsdecode(error.filename or '')).name}: {error.strerror or error}"
    return str(error)
