"""Records of an index in any order, from several threads, each verified.

    reader = Reader(load_index(files))
    reader.read(np.array([17, 3, 99_000]))          # payloads; the first bad record is raised
    reader.read_each(np.array([17, 3, 99_000]))     # payloads, with a BadRecord in the place of each bad one

A record is read with its length and both checksums in one call to the operating system, and must be what the index
says. A file is opened once, however many records are read of it.
"""

from __future__ import annotations

import errno
import functools

import numpy as np

from distfit.data import storage
from distfit.data.bad_records import BadRecord
from distfit.data.index import Index
from distfit.data.records import FRAME_BYTES, HEADER_BYTES, header_of, unframed, what_is_wrong
from distfit.errors import RunError

# Of one reader: a training and its validation have one each, and the usual limit is 1024 open files for everything.
MOST_OPEN_FILES = 256
# Reason and remedy.
_GONE = (
    "no such file any more, which was there when it was indexed",
    "Put the data on a file system that all hosts see under the same path, and let it stay there during a run.",
)
# What fails because of this process and not because of the file.
_OF_THIS_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Two ranges that are nearer than this are fetched as one: a disk reads the gap faster than it seeks over it.
_GAP = 128 << 10


class Reader:
    """Reads records by number; safe to use from several threads.

    Args:
        index: where they lie.

    Attributes:
        failure: the first error that `read` raised, which TensorFlow would only hand on as text.
    """

    def __init__(self, index: Index) -> None:
        self.failure: RunError | None = None
        self._index = index
        # A file that is crowded out closes when the last thread that reads it lets go of it.
        self._open = functools.lru_cache(maxsize=MOST_OPEN_FILES)(storage.open_file)

    def read(self, records: np.ndarray) -> np.ndarray:
        """The payloads of the given record numbers, as an object array of bytes.

        Raises:
            BadRecord: the first one that cannot be read.
        """
        found = self.read_each(records)
        for payload in found:
            if isinstance(payload, BadRecord):
                self.failure = self.failure or payload
                raise payload
        payloads = np.empty(len(found), dtype=object)
        payloads[:] = found
        return payloads

    def read_each(self, records: np.ndarray) -> list[bytes | BadRecord]:
        """The payload of each of the given record numbers, or what is wrong with it.

        Raises:
            RunError: storage fails, or this process has too many open files: which makes no record a bad one.
        """
        records = np.asarray(records, np.int64)
        places = (column.tolist() for column in self._index.locate(records))
        return [self._payload(*place) for place in zip(records.tolist(), *places, strict=True)]

    def will_need(self, records: np.ndarray) -> None:
        """Asks the operating system to fetch these records in the background, where it can.

        What cannot be opened is left for `read` to complain about.
        """
        file_of, starts, ends = _ranges(*self._index.locate(records))
        for number, start, end in zip(file_of.tolist(), starts.tolist(), ends.tolist(), strict=True):
            try:
                self._open(self._index.files[number]).will_need(start, end - start)
            except OSError:
                continue

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._open.cache_clear()

    def _payload(self, record: int, file: int, offset: int, length: int) -> bytes | BadRecord:
        path = self._index.files[file]
        try:
            framed = self._open(path).read_at(offset - HEADER_BYTES, length + FRAME_BYTES)
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, IsADirectoryError)):
                raise _refused(path, error) from error
            return self._bad(record, file, offset, *_GONE)
        payload = unframed(framed, length)
        if payload is None:
            return self._bad(record, file, offset, what_is_wrong(framed, length), _remedy(framed, length))
        return payload

    def _bad(self, record: int, file: int, offset: int, reason: str, remedy: str | None = None) -> BadRecord:
        return BadRecord(self._index.files[file], record - int(self._index.starts[file]), offset, reason, remedy)


def _remedy(framed: bytes, length: int) -> str | None:
    """Another one than that of damaged files where another record, or the middle of one, may be in its place."""
    if len(framed) < HEADER_BYTES or framed.startswith(header_of(length)):
        return None
    return (
        "Copy the file again from its source, or rebuild it; if `distfit data verify` finds nothing wrong with it, it "
        "was replaced by one of the same size and time: index it anew by `distfit data index --force`."
    )


def _refused(path: str, error: OSError) -> RunError:
    remedy = "Look after the storage and its permissions; no record is bad because it cannot be read now."
    if error.errno in _OF_THIS_PROCESS:
        remedy = "Allow this process more (ulimit -n, memory), or let fewer files be open at a time."
    return RunError(f"Expected to read {path!r}, received: {error.strerror}. {remedy}")


def _ranges(file_of: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(file, start, end) of the byte ranges that cover these payloads and their framing, near ones joined."""
    order = np.lexsort((offsets, file_of))
    file_of, starts = file_of[order], offsets[order] - HEADER_BYTES
    ends = starts + lengths[order] + FRAME_BYTES
    opens = np.ones(len(order), bool)
    opens[1:] = (file_of[1:] != file_of[:-1]) | (starts[1:] > ends[:-1] + _GAP)
    closes = np.append(opens[1:], True)[: len(order)]
    return file_of[opens], starts[opens], ends[closes]
