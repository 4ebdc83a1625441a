"""Writing a data set: labelled records into TFRecord shards with a description beside them.

    write_dataset(source, "data/mine", seed=0)

Shards are written by several threads at a time, each by one, so that two builds with one seed are the same bytes
whatever their threads. The folder appears under its name complete or not at all, and no more than a few records are
held in memory.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from distfit.data import description as described
from distfit.data.ahead import ahead, usual_threads
from distfit.data.build.journal import Journal
from distfit.data.build.labelled import Writable
from distfit.data.build.shrink import Shrink
from distfit.data.build.split import OVERHEAD_BYTES, Layout
from distfit.data.build.whole_folder import Work, check_space, whole_folder
from distfit.data.description import Description, Shard, Split, parse_feature
from distfit.data.example import messages
from distfit.data.records import whole_file, write_records
from distfit.monitor.counting import Counting, Done, silent

_WRITTEN = "written"


def write_dataset(
    source: Writable,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    shards: int | None = None,
    validation_fraction: float | None = None,
    validation_shards: int | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
    threads: int | None = None,
    count: Counting = silent,
) -> Description:
    """Writes TFRecord shards `train-*`, `validation-*` and `dataset.json` into the folder `out`.

    Args:
        source: the labelled images or rows.
        out: a folder that is new or empty; its parents are made.
        seed: of the split and of the order of records, >= 0.
        shards: files of the training split, 1 to its records; by default one for each 128 MiB, 8 or more.
        validation_fraction: share of each class for validation, 0 < fraction < 1, by default 0.2; each class
            gets it to within one record, and the whole to rounding. None for a source that is split already.
        validation_shards: files of the validation split, 1 to its records; by default one for each 128 MiB, 2
            or more.
        shard_bytes: of a file at most, on average, where neither number is given; needs `source.sizes`.
        force: replace a data set that is there already.
        threads: that read and write, 1 or more; by default one for each core and four more. The result does not
            depend on them.
        count: shows how far the writing is.

    Returns:
        The description of what was written.

    Raises:
        InputError: an argument out of its range, `out` cannot be written or holds something, or there is too
            little space.
        RunError: writing failed; nothing is left of it.
    """
    layout = Layout(seed, validation_fraction, shards, validation_shards, shard_bytes)
    layout.files(source, layout.members(source))
    out = os.path.realpath(out)
    with whole_folder(out, described.NAME, force) as work:
        description = write_in(work, source, layout, threads, count)
    return dataclasses.replace(description, folder=out)


def write_in(
    work: Work,
    source: Writable,
    layout: Layout,
    threads: int | None,
    count: Counting,
    shrink: Shrink | None = None,
) -> Description:
    """Fills the folder of a work; whole shards that an interrupted one has left are kept.

    Args:
        shrink: what the source has made images smaller with, for the description.

    Raises:
        InputError: an argument out of its range, or there is too little space.
    """
    members = layout.members(source)
    files = layout.files(source, members)
    parts = [part for split, numbers in members.items() for part in _parts(split, numbers, files[split])]
    with closing(_Written(work)) as written:
        left = [part for part in parts if part.name not in written.shards]
        records = sum(len(part.numbers) for part in left)
        check_space(work.fresh, _bytes_of(source, left), source.name)
        with count("Writing", records, "records") as done:
            _Writer(source, work.fresh, done, written.add, threads).write(left)
        description = Description(
            version=described.VERSION,
            source=source.name,
            seed=int(layout.seed),
            validation_fraction=layout.fraction_of(source),
            classes=source.classes,
            image_format=source.image_format,
            pixels=source.pixels,
            features=source.features,
            splits={name: _split(source, numbers, parts, written, name) for name, numbers in members.items()},
            max_side=shrink.max_side if shrink else None,
            quality=shrink.quality if shrink else None,
        )
    with whole_file(os.path.join(work.fresh, described.NAME)) as file:
        file.write(description.to_json().encode())
    return description


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """What goes into one shard: its name, the split it is of, the positions of its records."""

    name: str
    split: str
    numbers: np.ndarray


def _parts(split: str, numbers: np.ndarray, shards: int) -> Iterator[_Part]:
    # Dealt like cards: shards differ by one record at most, and each is a random sample of the split.
    for shard in range(shards):
        yield _Part(f"{split}-{shard:05d}-of-{shards:05d}.tfrecord", split, numbers[shard::shards])


def _split(source: Writable, numbers: np.ndarray, parts: Sequence[_Part], written: "_Written", name: str) -> Split:
    per_class = np.bincount(source.labels[numbers], minlength=len(source.classes))
    shards = tuple(written.shards[part.name] for part in parts if part.split == name)
    return Split(records=len(numbers), per_class=tuple(per_class.tolist()), shards=shards)


def _bytes_of(source: Writable, parts: Sequence[_Part]) -> int:
    """What the records need; without sizes they are small."""
    if source.sizes is None:
        return 0
    return sum(int((source.sizes[part.numbers] + OVERHEAD_BYTES).sum()) for part in parts)


class _Written:
    """The shards that are whole, of this work and of the one it goes on with; all else in the folder is removed."""

    def __init__(self, work: Work) -> None:
        self._journal = Journal(work.file(_WRITTEN))
        found = [Shard(**json.loads(entry)) for entry in self._journal.entries]
        paths = {shard.name: os.path.join(work.fresh, shard.name) for shard in found}
        self.shards = {
            shard.name: shard
            for shard in found
            if os.path.isfile(paths[shard.name]) and os.path.getsize(paths[shard.name]) == shard.bytes
        }
        for name in set(os.listdir(work.fresh)) - self.shards.keys():
            os.unlink(os.path.join(work.fresh, name))

    def add(self, shard: Shard) -> None:
        self._journal.append(json.dumps(dataclasses.asdict(shard)).encode())
        self.shards[shard.name] = shard

    def close(self) -> None:
        self._journal.close()


class _Stopped(Exception):
    """A shard was given up because another one failed, or the user wants to stop."""


class _Writer:
    """Writes shards into a folder, several at a time, and calls `add` for each when it is on disk."""

    def __init__(
        self, source: Writable, folder: str, done: Done, add: Callable[[Shard], None], threads: int | None
    ) -> None:
        self._source, self._folder, self._done, self._add = source, folder, done, add
        self._threads = usual_threads() if threads is None else threads
        self._features = {name: parse_feature(text).kind for name, text in source.features.items()}
        self._stop = threading.Event()
        self._failures: list[BaseException] = []

    def write(self, parts: Sequence[_Part]) -> None:
        writers = min(self._threads, len(parts)) or 1
        # Where there are fewer shards than threads, the others read ahead for them.
        readers = self._threads // writers
        with closing(ahead(lambda part: self._guarded(part, readers), parts, writers)) as shards:
            try:
                for _ in shards:
                    if self._failures:
                        raise self._failures[0]
            finally:
                self._stop.set()

    def _guarded(self, part: _Part, readers: int) -> None:
        """Writes a shard; the first failure stops the others, which would go on for minutes."""
        try:
            self._add(self._shard(part, readers))
        except _Stopped:
            return
        except BaseException as error:
            self._failures.append(error)
            self._stop.set()

    def _shard(self, part: _Part, readers: int) -> Shard:
        path, longest = os.path.join(self._folder, part.name), 0
        numbers = part.numbers.tolist()
        read = ahead(self._example, numbers, readers) if readers > 1 else (self._example(one) for one in numbers)

        def payloads() -> Iterator[bytes]:
            nonlocal longest
            for payload in read:
                if self._stop.is_set():
                    raise _Stopped
                longest = max(longest, len(payload))
                yield payload
                self._done(len(payload))

        with closing(read):
            count = write_records(path, payloads())
        return Shard(name=part.name, records=count, bytes=os.path.getsize(path), longest=longest)

    def _example(self, number: int) -> bytes:
        types = messages()
        values = {**self._source.record(number), "label": int(self._source.labels[number])}
        features = {name: _feature(types, kind, values[name]) for name, kind in self._features.items()}
        # A protobuf map has no order of its own, and two builds must be the same bytes.
        return types.Example(features=types.Features(feature=features)).SerializeToString(deterministic=True)


def _feature(types: Any, kind: str, value: Any) -> Any:
    if kind == "bytes":
        return types.Feature(bytes_list=types.BytesList(value=[value] if isinstance(value, bytes) else value))
    if kind == "int64":
        return types.Feature(int64_list=types.Int64List(value=np.ravel(value)))
    return types.Feature(float_list=types.FloatList(value=np.ravel(value)))
