"""TFRecord files as training data: each record once per epoch, in an order that no file layout decides.

    train = TFRecords(
        "data/digits/train-*",
        features={
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        },
        transform=lambda example: (tf.io.decode_png(example["image"]), example["label"]),
        batch_size=64,
    )
    distfit.fit(model, train, epochs=10)

There are two ways to read. With an *index* of where records lie, a process reads the records of its next batch from
any place of any file, so the order is that of `data.plan`: a global shuffle, the same for any number of processes.
What cannot be read in any order (compressed shards, object stores) is *streamed*: see `data.streaming`. Making a
`TFRecords` touches neither the files nor TensorFlow; both wait for the first use.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from distfit.data import plan
from distfit.data.bad_records import MOST_BAD, BadRecord, Policy, Tally, check_policy
from distfit.data.cache import check_place
from distfit.data.identity import of_files
from distfit.data.images import Images
from distfit.data.on_device import of as on_device_of
from distfit.data.pipeline import Dataset, Pipeline
from distfit.data.reading import Asked, Found, Indexed, Way, find, way_of
from distfit.data.rows import OfFunctions, OfImages, rows_of
from distfit.data.transforms import check_transform
from distfit.errors import InputError


class TFRecords:
    """TFRecord files to train, evaluate or predict on.

    Args:
        files: a folder, a pattern or a list of files that every process sees under the same path; also of a file system
            that TensorFlow has (`gs://`, `s3://`).
        features: what to parse from each record: a dict of `tf.io.FixedLenFeature` and its kin, as for
            `tf.io.parse_single_example`. None hands the serialized record (a scalar string) to `transform`.
        transform: from one parsed record to `x`, `(x, y)` or `(x, y, sample_weight)`: a function in TensorFlow
            operations, Keras layers, a list of both (see `data.transform`), or `distfit.Images`. It runs in
            parallel, so it must depend on the record, and on the seed it gets, alone. Its layers are told whether it is
            a training, so that random ones do nothing in validation; a recipe's random parts are left out there. None:
            the parsed dict (or the serialized record) is `x`.
        sequence_features: of a `tf.train.SequenceExample`, as for `tf.io.parse_single_sequence_example`;
            `features` are those of its context then.
        batch_size: rows of a *global* batch, over all replicas; None leaves it to `fit`.
        seed: of the order of records and of what transforms draw; None leaves it to the run.
        workers: records transformed at a time in each process; it changes the speed, never the result. None divides
            the cores among the processes of a host.
        bad_records: "raise" ends the run at the first record that is damaged or cannot be transformed; "skip"
            leaves it out of its batch, counts it, and ends the run when there are too many.
        most_bad: share of all records that may be left out in a pass.
        cache: "memory" or "disk" keeps what the part of the transform before anything random made of a record, for
            all processes of the host. None keeps nothing.
        streaming: True reads files as streams, False by an index. None streams compressed files and those of remote
            file systems.
        shuffle_window: records among which they are shuffled, read block by block: for storage on which random reads
            are slow. None shuffles over all.
        on_device: a Keras layer, a function of what `transform` returned, or a list of both, for the rows of each
            replica, run where the model runs: normalisation, MixUp, CutMix (see `data.on_device`).

    Raises:
        InputError: an argument is of the wrong kind or out of its range.
    """

    def __init__(
        self,
        files: str | os.PathLike | Iterable[str | os.PathLike],
        features: dict[str, Any] | None = None,
        transform: Any = None,
        *,
        sequence_features: dict[str, Any] | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        workers: int | None = None,
        bad_records: Policy = "raise",
        most_bad: float = MOST_BAD,
        cache: Literal["memory", "disk"] | None = None,
        streaming: bool | None = None,
        shuffle_window: int | None = None,
        on_device: Any = None,
    ) -> None:
        _check_arguments(files, features, sequence_features)
        _check_wholes(
            batch_size=(batch_size, 1), seed=(seed, 0), workers=(workers, 1), shuffle_window=(shuffle_window, 2)
        )
        check_policy(bad_records, most_bad)
        if not isinstance(transform, Images):
            check_transform(transform)
        check_place(cache)
        # A list is kept as it is now: an iterator could be read only once, and a caller may change theirs.
        self.files = files if isinstance(files, (str, os.PathLike)) else list(files)
        self.features, self.sequence_features, self.transform = features, sequence_features, transform
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.bad_records, self.most_bad, self.cache = bad_records, most_bad, cache
        self.streaming = streaming
        self.shuffle_window = shuffle_window
        # What a recipe leaves to the device comes first.
        self.on_device = on_device_of(_device_part(transform), on_device)
        self._found: Found | None = None
        self._way: Way | None = None
        self._rows: dict[bool, OfFunctions | OfImages] = {}

    def options(self) -> dict[str, Any]:
        """What has to be the same on every rank, beside the files and the transform."""
        names = ("batch_size", "seed", "bad_records", "most_bad", "cache", "streaming", "shuffle_window")
        return {name: getattr(self, name) for name in names} | {"on_device": self.on_device is not None}

    def find(self) -> Found:
        """What the files are, and where their records lie; looks at them on the first call.

        Raises:
            InputError: no files, missing shards, or a file that is no whole TFRecord file.
        """
        if self._found is None:
            self.use(find(self.files, self.streaming, self.bad_records))
        assert self._found is not None
        return self._found

    def use(self, found: Found) -> None:
        """Takes what another process found, instead of looking at the files here too.

        What it has taken already, for a training and its validation on the same records say, it keeps open.
        """
        if self._found is not None and self._found.name == found.name:
            return
        self.close()
        self._found = found

    @property
    def records(self) -> int | None:
        """Of all files; None for streams that nobody has counted."""
        return self._open_way().records

    @property
    def uneven(self) -> bool:
        """Whether a process gives what it has of a step, instead of its slices of a global batch."""
        return self._open_way().uneven or self.bad_records == "skip"

    def tally(self, training: bool) -> Tally:
        """What this process has left out of training, or of all else."""
        return self._pipeline(training).tally

    def steps_per_epoch(self, global_batch: int) -> int | None:
        """Of batches with so many rows; None for streams that nobody has counted."""
        return self._open_way().steps(global_batch)

    def batches(self, asked: Asked) -> Dataset:
        """The batches of one process for one epoch, as a `tf.data.Dataset`: see `data.pipeline`."""
        way, pipeline = self._open_way(), self._pipeline(asked.training)
        self._keep(way, asked.training)
        pipeline.tally.records = way.records
        return way.dataset(pipeline, asked)

    def begin(self, is_chief: bool, training: bool) -> None:
        """A pass over the data begins: what is left out in it is counted anew.

        A file of which the index knows only what comes before its damage counts as one bad record, of the chief.
        """
        tally = self.tally(training)
        tally.begin(self.records)
        for file, reason in self.find().damaged if is_chief else ():
            tally.note(BadRecord(file, None, None, f"{reason}; what comes before it is read"))

    def workers_of(self, processes_of_host: int) -> int:
        """Records transformed at a time, by each of so many processes of this host."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) // processes_of_host)

    def process_batches(
        self,
        *,
        order: plan.Order,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        replicas_per_process: int = 1,
        first_step: int = 0,
    ) -> Dataset:
        """The batches of one process in an order of your own, by an index.

        Each element is `(global_rows, origin, data)`: int64 scalars, and the transformed rows of this
        process with a batch dimension. Row 0 of `data` is row `origin` of the global batch. A process without
        rows in a short last batch gets one, which belongs to no slice of its replicas: see
        `plan.process_share`.

        Args:
            order: of the epoch.
            global_batch: rows of a full step over all replicas.
            rank, size, replicas_per_process: who reads.
            first_step: steps of the epoch to leave out; nothing of them is read.

        Raises:
            InputError: no such step, or the records are streams.
        """
        place, way = (rank, size, replicas_per_process), self._open_way()
        if not isinstance(way, Indexed):
            raise InputError(
                "Expected records by an index for an order of your own, received streams. Decompress them."
            )
        return self._pipeline(True).indexed(way, order, global_batch, place, self.workers_of(1), first_step)

    def notes(self) -> list[str]:
        """What the start of a run says about these data, a sentence each."""
        notes = []
        if self.find().streaming:
            counted = "" if self.records is not None else "; `distfit data index` counts them, so that steps are known"
            notes.append(f"Records come as streams, shuffled by files and within windows{counted}.")
        if self.bad_records == "skip":
            notes.append(f"Bad records are left out, up to {self.most_bad:.2%} of all.")
        return notes

    def identity(self) -> dict[str, Any]:
        """What a checkpoint recognises the data by: the same for a copy of the files elsewhere."""
        found, way = self.find(), self._open_way()
        # Streams are the same data before and after somebody has counted them.
        read = {"read": "as streams"} if found.streaming else {"read": "by an index", "records": way.records}
        options = {"bad records": self.bad_records, "shuffle window": self.shuffle_window, "own seed": self.seed}
        own = {name: value for name, value in options.items() if value is not None}
        return {**of_files(found.files, way.sizes()), **read, **own}

    @property
    def element_spec(self) -> Any:
        """The `tf.TypeSpec`s of a batch of data; the batch dimension is None. Reads no file."""
        return self._pipeline(True).element_spec

    def close(self) -> None:
        """Closes the files and ends what reads ahead; a later read opens them again."""
        if self._way is not None:
            self._closing()
            for rows in self._rows.values():
                rows.forget()
        self._way = None

    def explain(self, error: Exception, training: bool = True) -> Exception:
        """What to raise in place of an error that came out of these datasets: see `Pipeline.explain`."""
        files = f"{len(self.files)} files" if isinstance(self.files, list) else repr(os.fspath(self.files))
        return self._pipeline(training).explain(error, files)

    def _pipeline(self, training: bool) -> Pipeline:
        """Made once, with the functions that TensorFlow traces."""
        if training not in self._rows:
            rows = rows_of(self.features, self.sequence_features, self.transform, training)
            tally = Tally(self.bad_records, self.most_bad)
            rows.pipeline = Pipeline(rows, tally, seeded=self.on_device is not None)
            self._rows[training] = rows
        made = self._rows[training].pipeline
        assert made is not None
        return made

    def _keep(self, way: Way, training: bool) -> None:
        rows = self._rows[training]
        if self.cache is None or rows.cache is not None:
            return
        if way.uneven or way.records is None:
            raise InputError(
                f"Expected records with an index for cache={self.cache!r}, received streams, whose records are not "
                "found by number. Decompress the files, or leave out cache."
            )
        rows.keep(self.cache, way.records, f"{self.find().name}-{'training' if training else 'other'}")

    def _open_way(self) -> Way:
        if self._way is None:
            self._way = way_of(self.find(), self.shuffle_window)
            # TensorFlow keeps the reader alive; a dataset that outlives this source opens the files again.
            self._closing = weakref.finalize(self, self._way.close)
        return self._way


def _check_arguments(files: Any, features: Any, sequence_features: Any) -> None:
    if not isinstance(files, (str, os.PathLike, Iterable)) or isinstance(files, (bytes, dict)):
        raise InputError(
            f"Expected files to be a folder, a pattern or a list of files, received {type(files).__name__}."
        )
    for name, specs in (("features", features), ("sequence_features", sequence_features)):
        if specs is not None and not isinstance(specs, dict):
            raise InputError(
                f"Expected {name} to be a dict of tf.io feature specs such as "
                f"{{'label': tf.io.FixedLenFeature([], tf.int64)}}, or None, received {type(specs).__name__}."
            )


def _check_wholes(**numbers: tuple[Any, int]) -> None:
    """Each is None, or a whole number of at least so much."""
    for name, (value, least) in numbers.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and (not whole or value < least):
            raise InputError(f"Expected {name} to be a whole number of {least} or more, received {value!r}.")


def _device_part(transform: Any) -> Any:
    """What a recipe leaves to the device; None for nothing."""
    return transform.on_device() if isinstance(transform, Images) and transform.standardize is not None else None
