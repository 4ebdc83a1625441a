"""Writing a data set: labelled images or rows into TFRecord shards with a description beside them.

    write_dataset(source, "data/mine", seed=0)

Two builds with one seed are the same bytes. The folder appears under its name complete or not at all, and no
more than a few records are held in memory.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distfit.data import description as described
from distfit.data.build.ahead import ahead
from distfit.data.build.labelled import Source, Table
from distfit.data.build.split import fraction_of, shard_count, split_members
from distfit.data.build.whole_folder import check_space, whole_folder
from distfit.data.description import Description, Shard, Split, parse_feature
from distfit.data.records import whole_file, write_records
from distfit.monitor.counting import Counting, silent

# What a record holds beside its image: framing, names of features, label.
_OVERHEAD_BYTES = 100


def write_dataset(
    source: Source | Table,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    shards: int | None = None,
    validation_fraction: float | None = None,
    validation_shards: int | None = None,
    force: bool = False,
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
        force: replace a data set that is there already.
        count: shows how far the writing is.

    Returns:
        The description of what was written.

    Raises:
        InputError: an argument out of its range, `out` cannot be written or holds something, or there is too
            little space.
        RunError: writing failed; nothing is left of it.
    """
    out = os.path.realpath(out)
    members = split_members(source, seed, validation_fraction)
    files = {
        split: shard_count(source, split, members[split], asked)
        for split, asked in (("train", shards), ("validation", validation_shards))
    }
    with whole_folder(out, described.NAME, force) as folder, count("Writing", len(source.labels), "records") as done:
        check_space(folder, _bytes_of(source), source.name)
        writer = _Writer(source, folder, done)
        description = Description(
            version=described.VERSION,
            source=source.name,
            seed=int(seed),
            validation_fraction=fraction_of(source, validation_fraction),
            classes=source.classes,
            image_format=source.image_format,
            pixels=source.pixels,
            features=source.features,
            splits={split: writer.split(split, numbers, files[split]) for split, numbers in members.items()},
        )
        with whole_file(os.path.join(folder, described.NAME)) as file:
            file.write(description.to_json().encode())
    return dataclasses.replace(description, folder=out)


def _bytes_of(source: Source | Table) -> int:
    """What the records need; without sizes they are small."""
    return 0 if source.sizes is None else int(source.sizes.sum()) + len(source.sizes) * _OVERHEAD_BYTES


class _Writer:
    """Writes the records of a source into shards of a folder, calling `done` after each."""

    def __init__(self, source: Source | Table, folder: str, done: Callable[[], None]) -> None:
        self._source, self._folder, self._done = source, folder, done
        self._features = {name: parse_feature(text).kind for name, text in source.features.items()}

    def split(self, name: str, numbers: np.ndarray, shards: int) -> Split:
        # Dealt like cards: shards differ by one record at most, and each is a random sample of the split.
        written = [
            self._shard(f"{name}-{shard:05d}-of-{shards:05d}.tfrecord", numbers[shard::shards])
            for shard in range(shards)
        ]
        per_class = np.bincount(self._source.labels[numbers], minlength=len(self._source.classes))
        return Split(records=len(numbers), per_class=tuple(per_class.tolist()), shards=tuple(written))

    def _shard(self, name: str, numbers: np.ndarray) -> Shard:
        path = os.path.join(self._folder, name)
        with contextlib.closing(ahead(self._source.record, numbers.tolist())) as records:
            count = write_records(path, map(self._example, numbers.tolist(), records))
        return Shard(name=name, records=count, bytes=os.path.getsize(path))

    def _example(self, number: int, record: Mapping[str, Any]) -> bytes:
        from tensorflow import train

        values = {**record, "label": int(self._source.labels[number])}
        features = {name: _FEATURES[kind](values[name]) for name, kind in self._features.items()}
        example = train.Example(features=train.Features(feature=features))
        self._done()
        # A protobuf map has no order of its own, and two builds must be the same bytes.
        return example.SerializeToString(deterministic=True)


def _of_bytes(value: bytes) -> Any:
    from tensorflow import train

    return train.Feature(bytes_list=train.BytesList(value=[value]))


def _of_int64(value: int) -> Any:
    from tensorflow import train

    return train.Feature(int64_list=train.Int64List(value=np.ravel(value)))


def _of_float32(value: np.ndarray) -> Any:
    from tensorflow import train

    return train.Feature(float_list=train.FloatList(value=np.ravel(value)))


_FEATURES: dict[str, Callable[[Any], Any]] = {"bytes": _of_bytes, "int64": _of_int64, "float32": _of_float32}
