"""TFRecord files read from their beginnings to their ends: compressed ones, and those of storage that cannot seek.

    streams = Streams(files, lanes=16, window=512)
    for numbers, records in streams.steps(seed=0, epoch=3, shuffle=True, global_batch=64, rank=1, size=3):
        ...
    streams.close()

The files are dealt to lanes (see `lanes`). A thread for each lane reads ahead, verifies, and shuffles the records
within a window. What a step trains on depends on the files, (seed, epoch, step), the global batch, the number of lanes
and the window, not on the number of processes; every record comes exactly once in an epoch.

Where the number of records of each file is known (`counts`), every batch is full but the last and all processes know
how many steps there are. Without it the lanes end one after the other: the batches at the end of an epoch get smaller,
and each process stops where its own lanes have ended.

In memory are, for each lane that a process reads: a window of records, `read_ahead` + 2 blocks of a megabyte (or of one
record, where that is longer), and about three pieces of the file of a megabyte.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from distfit.data import plan
from distfit.data.bad_records import BadRecord, Tally
from distfit.data.framing import COMPRESSIONS, Compression, Lost, read_shard
from distfit.data.lanes import Deal, Part
from distfit.data.read_ahead import ReadAhead
from distfit.data.shuffle_window import Window
from distfit.errors import InputError, RunError

# As many as most hosts have accelerators, or a multiple; each costs a process that reads it a thread and a window.
LANES = 16
# Of one lane. All lanes together mix as many records as tutorials shuffle, some 8,000.
WINDOW = 512
READ_AHEAD = 2

# A record's number: its file's position above, its position in the file below.
_IN_FILE_BITS = 40
# What a record takes beside its bytes, so that blocks of tiny ones are no longer either.
_RECORD_BYTES = 128
# What is drawn for one purpose says nothing about another: see `lanes`.
_WINDOWS = 6

# A record's number, and the record or why there is none.
Slot: TypeAlias = tuple[int, bytes | BadRecord]


class Streams:
    """Files that are read as streams.

    Args:
        files: paths, or addresses of TensorFlow's file systems, in the order in which records are numbered.
        compression: "GZIP", "ZLIB", None, or "auto": by each file's first bytes.
        lanes: streams that are read at a time, by all processes together; at most one for each file.
        window: records of a lane among which the next one is drawn; None for the default.
        read_ahead: blocks of a megabyte that wait in each lane.
        counts: records of each file, on every process the same; None where they are not known.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        files: Sequence[str],
        compression: Compression = "auto",
        lanes: int = LANES,
        window: int | None = None,
        read_ahead: int = READ_AHEAD,
        counts: Sequence[int] | None = None,
    ) -> None:
        window = WINDOW if window is None else window
        _check(files, compression, counts, lanes=lanes, window=window, read_ahead=read_ahead)
        self.files = tuple(files)
        self.compression = compression
        self.lanes = min(lanes, len(files))
        self.window = window
        self.read_ahead = read_ahead
        self._counts = None if counts is None else tuple(int(count) for count in counts)
        self._open: weakref.WeakSet[ReadAhead[Slot]] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def records(self) -> int | None:
        """Of all files; None where their counts are not known."""
        return None if self._counts is None else sum(self._counts)

    def num_steps(self, global_batch: int) -> int | None:
        """Steps of an epoch; None where the counts of records are not known."""
        return None if self.records is None else plan.steps_per_epoch(self.records, global_batch)

    def place_of(self, number: int) -> tuple[str, int, None]:
        """(file, position in the file, None) of a record; its offset in bytes is not known any more."""
        return self.files[number >> _IN_FILE_BITS], number & ((1 << _IN_FILE_BITS) - 1), None

    def steps(
        self,
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        first_step: int = 0,
        tally: Tally | None = None,
    ) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """What one process has of each step of an epoch: the records' numbers (int64) and the records.

        It may have none: where all of them are bad, where a batch has fewer rows than there are processes, and,
        with known counts, where others still have some.

        Args:
            seed: of the order, >= 0.
            epoch: 0 for the first; each has its own order.
            shuffle: False takes the files in their order, in turns as they are dealt to the lanes.
            global_batch: rows of a full step over all processes.
            rank, size: who reads.
            first_step: steps to leave out. Where records are counted, files that lie wholly before it are not read;
                otherwise everything before it is read again, and not handed out.
            tally: counts bad records or raises them, which is the default.

        Raises:
            InputError: no such step.
            BadRecord: a record is damaged or the rest of a file is lost, and the tally raises it.
            RunError: a file cannot be read, or has another number of records than was counted.
        """
        steps = self.num_steps(global_batch)
        if first_step < 0 or (steps is not None and first_step >= max(steps, 1)):
            below = "" if steps is None else f" and below the epoch's {steps} steps"
            raise InputError(f"Expected a first step of 0 or more{below}, received {first_step}.")
        # With a row of each lane in every step no step is empty before all lanes have ended.
        lanes = min(self.lanes, global_batch)
        deal = Deal.of(len(self.files), lanes, seed, epoch, shuffle, self._counts)
        windows = [Window(self.window, (seed, epoch, _WINDOWS, lane) if shuffle else None) for lane in range(lanes)]
        return self._read(deal.part(rank, size), windows, global_batch, first_step, tally or Tally())

    def close(self) -> None:
        """Ends the threads of all epochs that are being read; what is still taken from these raises."""
        with self._lock:
            ended = list(self._open)
        for lane in ended:
            lane.close()

    def _read(
        self, part: Part, windows: Sequence[Window], global_batch: int, first_step: int, tally: Tally
    ) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """Opens the lanes of a part, goes through the steps and closes them, also where it is left before the end."""
        files, start = part.deal.files, first_step * global_batch
        skip = part.deal.taken(start)
        lanes: dict[int, ReadAhead[Slot]] = {}
        try:
            for lane in part.shares:
                lanes[lane] = self._ahead(files[lane], skip[lane], windows[lane], f"distfit-lane-{lane}")
            while self._goes_on(start, lanes):
                stop = start + global_batch if self.records is None else min(start + global_batch, self.records)
                taken = [lanes[lane].take(rows)[own] for lane, rows, own in part.of_step(start, stop)]
                yield _whole(list(itertools.chain.from_iterable(taken)), tally)
                start = stop
        finally:
            for ahead in lanes.values():
                ahead.close()

    def _goes_on(self, start: int, lanes: dict[int, ReadAhead[Slot]]) -> bool:
        # A file with more records than were counted is heard of where its lane should have ended.
        return (self.records is not None and start < self.records) or not all(
            ahead.exhausted for ahead in lanes.values()
        )

    def _ahead(self, files: Sequence[int], skip: int, window: Window, name: str) -> ReadAhead[Slot]:
        closed = threading.Event()
        ahead = ReadAhead(self._lane(files, skip, window, closed), closed, _size, self.read_ahead, name)
        with self._lock:
            self._open.add(ahead)
        return ahead

    def _lane(self, files: Sequence[int], skip: int, window: Window, closed: threading.Event) -> Iterator[Slot]:
        """The slots of a lane after the first `skip`, in the order of training."""
        passed = 0
        if self._counts is not None:
            ends = list(itertools.accumulate(self._counts[file] for file in files))
            passed = bisect.bisect_right(ends, window.first_left(ends[-1], skip)) if skip else 0
        slots = itertools.takewhile(lambda _: not closed.is_set(), self._slots(files, passed))
        yield from itertools.islice(window.shuffled(slots), skip, None)

    def _slots(self, files: Sequence[int], passed: int) -> Iterator[Slot]:
        """The slots of files, empty ones for the first `passed`, which are not read."""
        for position, file in enumerate(files):
            items: Iterator[bytes | BadRecord]
            if self._counts is None:
                items = read_shard(self.files[file], self.compression)
            elif position < passed:
                items = itertools.repeat(b"", self._counts[file])
            else:
                items = _exactly(read_shard(self.files[file], self.compression), self._counts[file], self.files[file])
            for number, item in enumerate(items):
                yield file << _IN_FILE_BITS | number, item


def _exactly(items: Iterator[bytes | BadRecord], count: int, file: str) -> Iterator[bytes | BadRecord]:
    """As many as were counted, with one that is lost in place of each that is not there any more."""
    number = 0
    for item in items:
        if isinstance(item, Lost):
            # With all records there and each of them verified, nothing is lost by damage behind them.
            yield from itertools.repeat(item, count - number)
            return
        if number == count:
            raise RunError(
                f"Expected the {count} records that were counted in {file!r}, received more: the file has changed "
                "since. Start the run again, which counts again."
            )
        yield item
        number += 1
    if number < count:
        reason = f"the end of the file: {count} records were counted in it, and it has {number} now"
        yield from itertools.repeat(Lost(file, number, None, reason), count - number)


def _size(slot: Slot) -> int:
    return _RECORD_BYTES + (len(slot[1]) if isinstance(slot[1], bytes) else 0)


def _whole(slots: list[Slot], tally: Tally) -> tuple[np.ndarray, list[bytes]]:
    """Numbers and records of those that are whole."""
    tally.saw(len(slots))
    numbers, records = [], []
    for number, item in slots:
        if isinstance(item, BadRecord):
            tally.note(item)
        else:
            numbers.append(number)
            records.append(item)
    return np.array(numbers, np.int64), records


def _check(files: Sequence[str], compression: Compression, counts: Sequence[int] | None, **least_one: int) -> None:
    if not files:
        raise InputError("Expected at least one TFRecord file, received none. Name a file or a folder.")
    if compression not in COMPRESSIONS:
        raise InputError(f"Expected compression to be one of {COMPRESSIONS}, received {compression!r}.")
    if counts is not None and (len(counts) != len(files) or min(counts) < 0):
        raise InputError(f"Expected a count for each of {len(files)} files, received {list(counts)}.")
    for name, value in least_one.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"Expected {name} to be a whole number of 1 or more, received {value!r}.")
