"""Building the index ahead of a run, and saying what was done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from distfit.data.framing import is_compressed
from distfit.data.index_cache import count_records, load_index
from distfit.monitor.counting import Counting, Done, silent


@dataclass(frozen=True)
class Indexed:
    """What was done for some files.

    Args:
        files: how many.
        scanned: how many of them were read for it; what was known of the others still held.
        records: of all files.
        path: of the index; "" where it could be kept nowhere, None of compressed files, whose records are counted
            alone.
    """

    files: int
    scanned: int
    records: int
    path: str | None


def indexed(files: Sequence[str], *, fresh: bool = False, count: Counting = silent) -> Indexed:
    """Brings the index of some files up to date; of compressed ones, the numbers of their records.

    Args:
        files: paths, in the order in which their records are numbered.
        fresh: scan all of them.
        count: shows how far it is.

    Raises:
        InputError: a file cannot be read, or is damaged.
    """
    scanned = _Scanned(count)
    if is_compressed(files[0]):
        counts = count_records(files, fresh=fresh, count=scanned)
        return Indexed(len(files), scanned.files, sum(counts), None)
    index = load_index(files, fresh=fresh, count=scanned)
    return Indexed(len(files), scanned.files, len(index), index.path)


def index_text(found: Indexed) -> str:
    """
    >>> index_text(Indexed(8, 2, 1437, "data/digits/.distfit-index"))
    '1,437 records in 8 files, 2 of them scanned; data/digits/.distfit-index'
    """
    where = {None: "counted, as compressed files are read as streams", "": "kept nowhere"}
    place = where.get(found.path, found.path)
    return f"{found.records:,} records in {found.files:,} files, {found.scanned:,} of them scanned; {place}"


class _Scanned:
    """Counts for somebody else, and keeps how many there were to be counted.

    Attributes:
        files: that were scanned.
    """

    def __init__(self, count: Counting) -> None:
        self.files = 0
        self._count = count

    def __call__(self, title: str, total: int, unit: str) -> AbstractContextManager[Done]:
        self.files += total
        return self._count(title, total, unit)
