"""The records of a split for looking at them: some at random by an index, the first ones where files are streamed.

records = records_of(files)
records.count, records.size, records.streamed
for number, serialized in records.sample(1000, seed=0): ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distfit.data import storage
from distfit.data.bad_records import BadRecord
from distfit.data.description import LABELS_MOST_BYTES
from distfit.data.files import refusing_what_cannot_be_asked
from distfit.data.framing import is_compressed, read_shard
from distfit.data.index import Index
from distfit.data.index_cache import cached_counts, load_index
from distfit.data.plan import Order
from distfit.data.reader import Reader
from distfit.monitor.counting import Counting, silent

# Up to so many records, of so many bytes as labels are checked in, all are read; of more, a sample.
MOST_READ = 200_000
SAMPLE = 1_000
_READ_AT_A_TIME = 64


@dataclass(frozen=True)
class Records:
    """The records of some files.

    Args:
        files: paths, in the order in which their records are numbered.
        size: of the files, bytes.
        count: how many records; None where they are streamed and nobody has counted them.
        index: where each lies; None where they are streamed, as compressed files are.
    """

    files: tuple[str, ...]
    size: int
    count: int | None
    index: Index | None

    @property
    def streamed(self) -> bool:
        """Whether the files can be read from their beginnings only."""
        return self.index is None

    def lengths(self) -> tuple[int, float] | None:
        """Bytes of the longest record and of a record on average; None where they are streamed."""
        if self.index is None:
            return None
        longest = max(int(self.index.of_file(number)[1].max(initial=0)) for number in range(len(self.files)))
        return longest, self.index.total_bytes / max(1, len(self.index))

    def to_read(self) -> int:
        """How many `sample` is best asked for: all where that is soon done."""
        if self.index is None or self.index.total_bytes > LABELS_MOST_BYTES or len(self.index) > MOST_READ:
            return SAMPLE
        return len(self.index)

    def sample(self, most: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
        """Records and their numbers, in rising order; of streamed files, the first ones.

        Args:
            most: how many; all if there are no more.
            seed: of the choice, which is that of an epoch's first batch.

        Raises:
            RunError: a damaged record.
        """
        if self.index is None:
            yield from _first(self.files, most)
            return
        reader = Reader(self.index)
        numbers = np.sort(Order(len(self.index), seed).positions(0, min(most, len(self.index))))
        for start in range(0, len(numbers), _READ_AT_A_TIME):
            part = numbers[start : start + _READ_AT_A_TIME]
            yield from zip(part.tolist(), reader.read(part), strict=True)
        reader.close()


def records_of(files: Sequence[str], count: Counting = silent) -> Records:
    """What is known of the files; scans those that were not scanned yet.

    Args:
        files: paths, in the order in which their records are to be numbered.
        count: shows how far the scan is.

    Raises:
        InputError: a file cannot be read, or is damaged.
    """
    streamed = is_compressed(files[0])
    with refusing_what_cannot_be_asked():
        size = sum(storage.size_and_time(path)[0] for path in files)
    if streamed:
        counts = cached_counts(files)
        return Records(tuple(files), size, None if counts is None else sum(counts), None)
    index = load_index(files, count=count)
    return Records(tuple(files), size, len(index), index)


def _first(files: Sequence[str], most: int) -> Iterator[tuple[int, bytes]]:
    items = itertools.chain.from_iterable(map(read_shard, files))
    for number, item in enumerate(itertools.islice(items, most)):
        if isinstance(item, BadRecord):
            raise item
        yield number, item
