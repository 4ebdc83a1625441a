"""Records that cannot be used: what is said of one, and how many a pass over the data may leave out.

    tally = Tally("skip", most=0.01, records=100_000)
    tally.note(BadRecord("train-00003", 17, 48_213, "bytes that do not match their checksum"))   # or it is raised
    tally.skipped, tally.by_file         # 1, {"train-00003": 1}

A record is left out of its batch, never out of the plan: the other rows of its step and all other steps stay what
they are, so that no rank has a step more or less than the others.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from distfit.errors import InputError, RunError
from distfit.log import say

Policy: TypeAlias = Literal["raise", "skip"]

# A thousandth or so of a large crawl is usual; more is a mistake in the reading.
MOST_BAD = 0.01


class BadRecord(RunError):
    """A record that cannot be used.

    Args:
        file: that holds it.
        number: of the record in its file, from 0; None where it is not known.
        offset: in bytes, where its payload begins; in a compressed file, in what comes out of it. None if unknown.
        reason: what is wrong with it, after "received".
        remedy: what to do, a sentence; by default that of damaged files.

    >>> print(BadRecord("train-00003", 17, 48213, "bytes that do not match their checksum"))
    Expected a whole record 17 at byte 48213 of 'train-00003', received bytes that do not match their checksum. Copy \
the file again from its source, rebuild it, or leave bad records out with bad_records="skip".
    """

    def __init__(
        self, file: str, number: int | None, offset: int | None, reason: str, remedy: str | None = None
    ) -> None:
        self.file, self.number, self.offset, self.reason = file, number, offset, reason
        what = "records" if number is None else f"a whole record {number}"
        where = "" if offset is None else f" at byte {offset}"
        remedy = remedy or (
            'Copy the file again from its source, rebuild it, or leave bad records out with bad_records="skip".'
        )
        super().__init__(f"Expected {what}{where} of {file!r}, received {reason}. {remedy}")


class Tally:
    """Counts what one process leaves out; safe to use from several threads.

    Args:
        policy: "raise" lets nothing bad pass, "skip" counts it.
        most: share of `records` that may be left out in one pass, 0 to 1.
        records: of the whole data set; None while unknown, when those that were `seen` count instead.
    """

    def __init__(self, policy: Policy = "raise", most: float = MOST_BAD, records: int | None = None) -> None:
        self.policy, self.most, self.records = policy, most, records
        self._lock = threading.Lock()
        self._by_file: dict[str, int] = {}
        self._seen = self._in_pass = self._skipped = 0

    @property
    def skipped(self) -> int:
        """Records left out so far."""
        return self._skipped

    @property
    def seen(self) -> int:
        """Records read so far, bad ones among them."""
        return self._seen

    @property
    def by_file(self) -> dict[str, int]:
        """Records left out in the last pass."""
        with self._lock:
            return dict(self._by_file)

    def begin(self, records: int | None = None) -> None:
        """A new pass over the data, of so many records; what is left out in it is counted anew against `most`."""
        with self._lock:
            self.records = self.records if records is None else records
            self._by_file, self._in_pass = {}, 0

    def saw(self, records: int) -> None:
        """So many records were read, bad ones among them."""
        with self._lock:
            self._seen += records
            self._in_pass += records

    def note(self, bad: BadRecord) -> None:
        """Counts one that is left out.

        Raises:
            BadRecord: it itself, with the policy "raise".
            RunError: more were left out than may be.
        """
        if self.policy == "raise":
            raise bad
        with self._lock:
            self._skipped += 1
            self._by_file[bad.file] = self._by_file.get(bad.file, 0) + 1
            skipped, of = sum(self._by_file.values()), self.records or self._in_pass
        if self.too_many(skipped, of):
            raise too_many(skipped, of, self.most, bad)

    def too_many(self, skipped: float, of: float) -> bool:
        """Whether so many bad records of so many are more than may be."""
        # One bad record of a small file is no sign that everything is wrong.
        return skipped > max(1, self.most * of)


def too_many(skipped: int, of: int, most: float, last: BadRecord | None = None) -> RunError:
    """What to raise when more was left out than may be.

    Args:
        last: the one that was too many, where one process has found so many; None for what all have.
    """
    where = "" if last is None else f" in one process. The last one: {last.reason} in {last.file!r}"
    return RunError(
        f"Expected at most {most:.2%} of {of:,} records to be bad, received {skipped:,}{where}. See `distfit data "
        "verify`, correct the files, or raise most_bad."
    )


def in_words(by_rank: Sequence[Mapping[str, int]], most_files: int = 5) -> str | None:
    """What all ranks left out, by file, the most first; None for nothing.

    >>> in_words([{"a": 1}, {"b": 2, "a": 2}, {}])
    '5 bad records: 3 of a, 2 of b'
    """
    total: Counter[str] = Counter()
    for own in by_rank:
        total.update(own)
    if not total:
        return None
    files = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count:,} of {file}" for file, count in files[:most_files])
    more = f", and of {len(files) - most_files} more files" if len(files) > most_files else ""
    return f"{total.total():,} bad record{'s' if total.total() > 1 else ''}: {listed}{more}"


def say_skipped(by_rank: Sequence[Mapping[str, int]], what: str) -> None:
    """Tells the user, on the chief, what the last pass over the data left out on each rank."""
    words = in_words(by_rank)
    if words is not None:
        text = f"distfit: the last pass over the {what} data left out {words}"
        say(f"{text}; `distfit data verify` says what is wrong with them.")


def check_policy(policy: str, most: float) -> None:
    """
    Raises:
        InputError: no such policy, or no share.
    """
    if policy not in ("raise", "skip"):
        raise InputError(f'Expected bad_records to be "raise" or "skip", received {policy!r}.')
    if isinstance(most, bool) or not isinstance(most, (int, float)) or not 0 <= most <= 1:
        raise InputError(f"Expected most_bad to be a share from 0 to 1, received {most!r}.")
