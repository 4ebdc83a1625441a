"""Scans the shards that have changed and keeps what is found, with all that has not changed, in one new file.

catalog, damaged = updated(request, old, rows, examine, count)
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np

from distfit.data import catalog, storage
from distfit.data.ahead import ahead
from distfit.data.catalog import Catalog, Stamp, Writer
from distfit.data.index_request import Request
from distfit.data.records import Scan, whole_file
from distfit.errors import InputError
from distfit.log import warn_once
from distfit.monitor.counting import Counting

# Why a file cannot be written, where nobody has to be told of it: there is another place.
_EXPECTED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


class Count(NamedTuple):
    """A file of which only the records are counted."""

    records: int
    framing: int


# What nobody has written to for a day is left of a run that was killed.
_LEFT_BEHIND_S = 24 * 3600

# From a path to what is in the file; refuses it by an InputError.
Examine: TypeAlias = Callable[[str], Scan | Count]


def updated(
    request: Request, old: Catalog | None, rows: np.ndarray, examine: Examine, count: Counting
) -> tuple[Catalog, dict[str, str]]:
    """A catalog with all files of the request, kept in the first place that takes it; and what is damaged."""
    refusals = []
    for place in request.places:
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            _remove_left_behind(place)
            with whole_file(place) as file:
                update = Update(file, place, request, old, examine)
                update.run(rows, count)
            return update.result()
        except OSError as error:
            refusals.append(f"{place!r}: {error.strerror}")
            if error.errno not in _EXPECTED:
                warn_once(f"The index of the TFRecord files cannot be kept in {place!r}: {error.strerror}.")
    warn_once(
        f"The index of {len(request.files)} TFRecord files is kept nowhere ({'; '.join(refusals) or 'no folder'}) "
        "and made anew at each start, in memory. Let XDG_CACHE_HOME name a folder that can be written."
    )
    update = Update(io.BytesIO(), "", request, old, examine)
    update.run(rows, count)
    return update.result()


def _remove_left_behind(place: str) -> None:
    """Halves of indexes that nobody is writing any more, of `records.whole_file`."""
    folder, name = os.path.split(place)
    with os.scandir(folder) as entries:
        halves = [entry.path for entry in entries if entry.name.startswith(f".{name}.")]
    for half in halves:
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            if time.time() - os.stat(half).st_mtime > _LEFT_BEHIND_S:
                os.unlink(half)


class Update:
    """Scans what has changed and writes it, and all that has not, into a new file."""

    def __init__(self, file: BinaryIO, place: str, request: Request, old: Catalog | None, examine: Examine) -> None:
        self._file, self._place = file, place
        self._request, self._old, self._examine = request, old, examine
        self._writer = Writer(file)
        self._damaged: dict[str, str] = {}
        self._failure: InputError | None = None

    def run(self, rows: np.ndarray, count: Counting) -> None:
        """
        Args:
            rows: of the files in the old catalog; -1 for those to scan.
            count: shows how far it is.

        Raises:
            InputError: the first file to scan is refused; if it is a later one, what was scanned is kept before.
        """
        self._scan(np.flatnonzero(rows < 0), count)
        if self._old is not None:
            for row in self._unchanged(self._old, rows):
                self._writer.copy(self._old, row)
        self._writer.finish()
        self._catalog = catalog.read(self._file, self._place)

    def result(self) -> tuple[Catalog, dict[str, str]]:
        if self._failure is not None:
            raise self._failure
        return self._catalog, self._damaged

    def _scan(self, stale: np.ndarray, count: Counting) -> None:
        request = self._request
        files = [request.files[number] for number in stale]
        with (
            count("Indexing", len(stale), "shards") as done,
            closing(ahead(self._outcome, files, request.workers)) as outcomes,
        ):
            for number, outcome in zip(stale.tolist(), outcomes, strict=True):
                if isinstance(outcome, InputError):
                    self._refuse(outcome, first=number == stale[0])
                    return
                self._add(number, outcome)
                done()

    def _outcome(self, file: str) -> Scan | Count | InputError:
        try:
            return self._examine(file)
        except InputError as error:
            return error

    def _refuse(self, failure: InputError, first: bool) -> None:
        # An hour of scanning is not to be lost because of its last file.
        if first:
            raise failure
        self._failure = failure

    def _add(self, number: int, outcome: Scan | Count) -> None:
        name, stamp = self._request.names[number], Stamp(*self._request.stamps[number].tolist())
        if isinstance(outcome, Count):
            self._writer.add_count(name, stamp, *outcome)
            return
        self._writer.add(name, stamp, outcome)
        if outcome.damage:
            self._damaged[self._request.files[number]] = outcome.damage.received

    def _unchanged(self, old: Catalog, rows: np.ndarray) -> Iterator[int]:
        """The rows of the request's other files, and of the folder's other files as long as they are there."""
        yield from rows[rows >= 0].tolist()
        requested = set(self._request.names)
        for row, name in enumerate(old.names):
            if name not in requested and _is_still(os.path.join(self._request.folder, name), old.stamp(row)):
                yield row


def _is_still(path: str, stamp: Stamp) -> bool:
    try:
        return storage.size_and_time(path) == stamp
    except OSError:
        return False
