"""Reading and decoding every file of a listing before anything is written; what was checked need not be again.

checked = check_files(listing, Journal("work/checked"), threads=6, count=shown)
checked.listing.wrong                            # [Wrong("'pictures/198.spider/RENAME2'", "no image"), ...]
checked.read(7)                                  # {"image": ...}, the bytes as they were checked
"""

import json
import os
import stat
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import google_crc32c
import numpy as np

from distfit.data.ahead import ahead
from distfit.data.build.image_check import FORMATS, NotAnImage, checked_image, refuse_other
from distfit.data.build.journal import Journal
from distfit.data.build.listing import Listing, Wrong
from distfit.errors import RunError
from distfit.monitor.counting import Counting, Done, silent

# Handing over a piece of work costs as much as checking a small image; so many records are one piece.
_PIECE = 8
# And so many pieces are one entry of the journal.
_ENTRY = 128

# What is known of a file: the position of its format in FORMATS, the pixels of its longer side, its bytes, and
# their CRC-32C, by which a change is noticed.
FACTS = np.dtype([("format", "u1"), ("side", "<u4"), ("size", "<i8"), ("checksum", "<u4")])


@dataclass(frozen=True, eq=False)
class Checked:
    """Records whose files are all whole images.

    Args:
        listing: these alone, with all that is wrong.
        facts: of each file, `FACTS`, shape [records, file features].
    """

    listing: Listing
    facts: np.ndarray

    def read(self, number: int) -> dict[str, bytes]:
        """The files of a record by their feature, as they were checked.

        Raises:
            RunError: one has changed since.
        """
        paths = self.listing.paths(number)
        return {
            feature: _as_checked(path, int(facts["checksum"]))
            for feature, path, facts in zip(self.listing.file_features, paths, self.facts[number], strict=True)
        }


def check_files(
    listing: Listing, journal: Journal | None = None, threads: int | None = None, count: Counting = silent
) -> Checked:
    """Reads and decodes every file, several at a time.

    Args:
        listing: what to check.
        journal: holds what an interrupted check had done, and takes what this one does; None keeps nothing.
        threads: as for `ahead`.
        count: shows how far it is.

    Returns:
        The records that are whole; the others are in `listing.wrong` of it.
    """
    records, files = len(listing), len(listing.file_features)
    if not files:
        return Checked(listing, np.zeros((records, 0), FACTS))
    facts, keeps, wrong = np.zeros((records, files), FACTS), np.zeros(records, bool), []
    at = 0
    with closing(_results(listing, journal, threads, count)) as parts:
        for part_facts, reasons in parts:
            stop = at + len(part_facts)
            facts[at:stop], keeps[at:stop] = part_facts, True
            for position, where, reason in reasons:
                keeps[at + position] = False
                wrong.append(Wrong(where, reason))
            at = stop
    return Checked(listing.only(keeps, wrong), facts[keeps])


# Facts of records one behind the other, and of those that are wrong (position among them, where, reason).
_Part = tuple[np.ndarray, list[tuple[int, str, str]]]


def _results(
    listing: Listing, journal: Journal | None, threads: int | None, count: Counting
) -> Generator[_Part, None, None]:
    """Those of the journal, and then those that are found now, which go into it."""
    at = 0
    for entry in journal.entries if journal else ():
        part = _unpacked(entry, len(listing.file_features))
        at += len(part[0])
        yield part
    pieces = (range(start, min(start + _PIECE, len(listing))) for start in range(at, len(listing), _PIECE))
    with (
        count("Checking", len(listing) - at, listing.unit) as done,
        closing(ahead(lambda piece: _check_records(listing, piece, done), pieces, threads)) as parts,
        closing(_Entry(journal)) as gathered,
        _quiet(),
    ):
        for part in parts:
            gathered.add(part)
            yield part


class _Entry:
    """Gathers parts to entries of the journal; what is there when it is closed, by Ctrl-C too, is an entry.

    Ctrl-C may come between any two steps, so each of them leaves whole parts, and none in two entries.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._parts: list[_Part] = []

    def add(self, part: _Part) -> None:
        self._parts.append(part)
        if len(self._parts) >= _ENTRY:
            self.close()

    def close(self) -> None:
        parts, self._parts = self._parts, []
        if self._journal is not None and parts:
            self._journal.append(_packed(parts))


def _packed(parts: list[_Part]) -> bytes:
    facts, reasons, at = [], [], 0
    for part_facts, part_reasons in parts:
        facts.append(part_facts)
        reasons += [(at + position, where, reason) for position, where, reason in part_reasons]
        at += len(part_facts)
    return json.dumps([at, reasons]).encode() + b"\0" + np.concatenate(facts).tobytes()


def _unpacked(entry: bytes, files: int) -> _Part:
    head, _, facts = entry.partition(b"\0")
    records, reasons = json.loads(head)
    return np.frombuffer(facts, FACTS).reshape(records, files), reasons


def _check_records(listing: Listing, numbers: range, done: Done) -> _Part:
    facts, reasons = np.zeros((len(numbers), len(listing.file_features)), FACTS), []
    for position, number in enumerate(numbers):
        for file, path in enumerate(listing.paths(number)):
            result = _check(path)
            if isinstance(result, str):
                reasons.append((position, listing.where(number, path), result))
                break
            facts[position, file] = result
        done(int(facts["size"][position].sum()))
    return facts, reasons


def _check(path: str) -> tuple[int, int, int, int] | str:
    """The facts of an image, or why it is none."""
    try:
        # A pipe would be waited for, a device never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no regular file"
        with open(path, "rb") as file:
            refuse_other(file)
            data = file.read()
        image = checked_image(data)
        return FORMATS.index(image.format), image.side, len(data), google_crc32c.value(data)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    except NotAnImage as reason:
        return str(reason)


def _as_checked(path: str, checksum: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise _changed(path, f"{error.strerror}") from error
    if google_crc32c.value(data) != checksum:
        raise _changed(path, "other bytes")
    return data


def _quiet() -> warnings.catch_warnings:
    """Pillow warns of large images and of odd metadata, neither of which keeps TensorFlow from decoding them."""
    return warnings.catch_warnings(action="ignore")


def _changed(path: str, received: str) -> RunError:
    return RunError(
        f"Expected {path!r} as it was when it was checked, received {received}: it has changed while the data set "
        "was built. Build it again when nobody writes to the folder."
    )
