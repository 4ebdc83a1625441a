"""The two ways to read TFRecord files, behind one face: by an index, or as streams.

found = find("data/train-*")                  # on the chief; the others receive it
way = way_of(found)
way.records, way.steps(global_batch=64)
way.dataset(pipeline, Asked(seed=0, epoch=3, shuffle=True, global_batch=64, place=(0, 1, 1)))
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from distfit.data import plan
from distfit.data.bad_records import BadRecord, Policy
from distfit.data.files import expand
from distfit.data.framing import is_compressed
from distfit.data.index import Index
from distfit.data.index_cache import cached_counts, load_index
from distfit.data.one_step import Step, step_of
from distfit.data.pipeline import Dataset, Pipeline, Place
from distfit.data.reader import Reader
from distfit.data.storage import is_remote, size_and_time
from distfit.data.streaming import LANES, Streams

# Of a shuffle window: so many blocks, each read in one go, are mixed.
_BLOCKS_IN_WINDOW = 16
# At a time; an object store takes its while for each.
_FILES_ASKED = 16


@dataclass(frozen=True)
class Found:
    """What one process found out about the files, for all.

    Args:
        files: in the order in which records are numbered.
        streaming: they are read as streams.
        counts: of streams: records of each file; None while unknown.
        index: of others, as `Index.to_bytes` gives it: itself, or where it lies.
        name: drawn anew, the same on every rank.
        damaged: files of which the index holds only what comes before the damage, and why; only where bad records are
            left out.
    """

    files: tuple[str, ...]
    streaming: bool
    counts: tuple[int, ...] | None = None
    index: bytes = b""
    damaged: tuple[tuple[str, str], ...] = ()
    name: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Asked:
    """Which batches are wanted.

    Args:
        seed: of the order of records, and of what is drawn for each.
        epoch: of the order.
        shuffle: False keeps the order of the files.
        global_batch: rows of a full step over all replicas.
        place: who reads.
        workers: records transformed at a time.
        first_step: steps of the epoch to leave out.
        training: layers are told, and a recipe is random only then.
    """

    seed: int
    epoch: int
    shuffle: bool
    global_batch: int
    place: Place = (0, 1, 1)
    workers: int = 2
    first_step: int = 0
    training: bool = True


def find(files: str | os.PathLike | Iterable[str | os.PathLike], streaming: bool | None, bad: Policy) -> Found:
    """Finds the files, and where their records lie.

    Args:
        streaming: None streams compressed and remote files.
        bad: of files that are damaged: "skip" keeps the records before the damage.

    Raises:
        InputError: no files, missing shards, compressed ones by an index, or one that is no whole TFRecord file.
    """
    names = tuple(expand(files))
    if streaming is None:
        streaming = any(is_remote(name) for name in names) or is_compressed(names[0])
    if streaming:
        counts = cached_counts(names)
        return Found(names, True, None if counts is None else tuple(counts))
    index = load_index(names, damaged="keep" if bad == "skip" else "raise")
    return Found(names, False, index=index.to_bytes(), damaged=tuple(index.damaged.items()))


def way_of(found: Found, shuffle_window: int | None) -> Way:
    """How these files are read."""
    if found.streaming:
        # Of all lanes together, each of which has a window of its own.
        window = None if shuffle_window is None else max(1, shuffle_window // min(LANES, len(found.files)))
        return Streamed(Streams(found.files, counts=found.counts, window=window))
    return Indexed(Index.from_bytes(found.index), shuffle_window)


class Indexed:
    """Any record at any time.

    Attributes:
        index: where they lie.
        records: of all files.
        uneven: whether a process gives what it has of a step, which its number in the plan does not tell.
    """

    uneven = False

    def __init__(self, index: Index, shuffle_window: int | None) -> None:
        self.index = index
        self.records: int | None = len(index)
        self._block = 1
        if shuffle_window is not None:
            self._block = max(1, shuffle_window // _BLOCKS_IN_WINDOW)
            shuffle_window -= shuffle_window % self._block
        self._window = shuffle_window
        self._reader = Reader(index)
        self._asked: deque[tuple[plan.Order, int]] = deque(maxlen=4)
        self._asking = threading.Lock()

    def steps(self, global_batch: int) -> int | None:
        """Of an epoch."""
        return plan.steps_per_epoch(len(self.index), global_batch)

    def sizes(self) -> Sequence[int]:
        """Bytes of each file, as far as there are records in it."""
        return self.index.ends.tolist()

    def read_each(self, numbers: np.ndarray) -> list[bytes | BadRecord]:
        """The records of these numbers."""
        return self._reader.read_each(numbers)

    def will_read(self, order: plan.Order, position: int) -> None:
        """Of a block shuffle, asks for the blocks of this window and of the next, each as a whole and ahead of time."""
        if order.window is None or not order.shuffle:
            return
        for start in (position, position + order.window):
            window = order.window_of(min(start, len(order) - 1))
            # No record is in two windows of a pass; the array itself may be made twice, by two threads.
            key = order, int(window[0])
            with self._asking:
                if key not in self._asked:
                    self._asked.append(key)
                    self._reader.will_need(window)

    def place_of(self, number: int) -> tuple[str, int, int | None]:
        """File, number in the file and offset of a record."""
        file, offset, _ = (int(part[0]) for part in self.index.locate(np.array([number])))
        return self.index.files[file], number - int(self.index.starts[file]), offset

    def dataset(self, pipeline: Pipeline, asked: Asked) -> Dataset:
        """The batches of one process for one epoch."""
        order = plan.Order(len(self.index), asked.seed, asked.epoch, asked.shuffle, self._window, self._block)
        return pipeline.indexed(self, order, asked.global_batch, asked.place, asked.workers, asked.first_step)

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._reader.close()


class Streamed:
    """Each file from its beginning to its end, by one process.

    Attributes:
        records: of all files; None while unknown.
        uneven: as of `Indexed`.
    """

    uneven = True

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.records = streams.records

    def steps(self, global_batch: int) -> int | None:
        """Of an epoch; None while unknown."""
        return self._streams.num_steps(global_batch)

    def sizes(self) -> Sequence[int]:
        """Bytes of each file; asks the file system."""
        with ThreadPoolExecutor(_FILES_ASKED) as pool:
            return [size for size, _ in pool.map(size_and_time, self._streams.files)]

    def place_of(self, number: int) -> tuple[str, int, int | None]:
        """As of `Indexed`."""
        return self._streams.place_of(number)

    def dataset(self, pipeline: Pipeline, asked: Asked) -> Dataset:
        """As of `Indexed`."""

        def batches() -> Iterator[Step]:
            rank, size, _ = asked.place
            for numbers, records in self._streams.steps(
                seed=asked.seed,
                epoch=asked.epoch,
                shuffle=asked.shuffle,
                global_batch=asked.global_batch,
                rank=rank,
                size=size,
                first_step=asked.first_step,
                tally=pipeline.tally,
            ):
                yield step_of(numbers, records, asked.seed, asked.epoch)

        return pipeline.streamed(self, batches, asked.workers)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._streams.close()


Way: TypeAlias = Indexed | Streamed
