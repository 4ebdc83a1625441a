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

An index of all records lets a process read the records of its next batch from any place of any file, so the
order is that of `data.plan`: a global shuffle, the same for any number of processes. Making a `TFRecords`
touches neither the files nor TensorFlow; both wait for the first use.
"""

import functools
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from distfit.data import plan
from distfit.data.index import Index, build_index, expand
from distfit.data.records import read_at
from distfit.errors import InputError, RunError

# Below the usual limit of 1024 open files, with room for everything else that a training process opens.
_MOST_OPEN_FILES = 512


class TFRecords:
    """TFRecord files to train, evaluate or predict on.

    Args:
        files: a folder, a pattern or a list of files; uncompressed, on a file system that every process sees
            under the same path.
        features: what to parse from each record: a dict of `tf.io.FixedLenFeature` and its kin, as for
            `tf.io.parse_single_example`. None hands the serialized record (a scalar string) to `transform`.
        transform: from one parsed record to `x`, `(x, y)` or `(x, y, sample_weight)`, in TensorFlow
            operations, without a batch dimension; it runs in parallel, so it must depend on the record
            alone. None: the parsed dict (or the serialized record) is `x`.
        batch_size: rows of a *global* batch, over all replicas; None leaves it to `fit`.
        seed: of the order of records; None leaves it to the run.
        workers: records transformed at a time in each process; it changes the speed, never the result.

    Raises:
        InputError: an argument is of the wrong kind or out of its range.
    """

    def __init__(
        self,
        files: str | os.PathLike | Iterable[str | os.PathLike],
        features: dict[str, Any] | None = None,
        transform: Callable[..., Any] | None = None,
        *,
        batch_size: int | None = None,
        seed: int | None = None,
        workers: int = 2,
    ) -> None:
        _check_arguments(files, features, transform)
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value is not None:
                _check_whole(name, value, least)
        _check_whole("workers", workers, 1)
        # A list is kept as it is now: an iterator could be read only once, and a caller may change theirs.
        self.files = files if isinstance(files, (str, os.PathLike)) else list(files)
        self.features = features
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self._index: Index | None = None
        self._reader: _Reader | None = None

    def load_index(self) -> Index:
        """Where every record lies; finds and scans the files on the first call.

        Raises:
            InputError: no files, missing shards, or a file that is no whole TFRecord file.
        """
        if self._index is None:
            self.use_index(build_index(expand(self.files)))
        assert self._index is not None
        return self._index

    def use_index(self, index: Index) -> None:
        """Takes an index that another process scanned, instead of scanning the files here too."""
        self.close()
        self._index = index

    def process_batches(
        self,
        *,
        order: np.ndarray,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        replicas_per_process: int = 1,
        first_step: int = 0,
    ) -> Any:
        """The batches of one process for one epoch, as a `tf.data.Dataset`.

        Each element is `(global_rows, origin, data)`: int64 scalars, and the transformed rows of this
        process with a batch dimension. Row 0 of `data` is row `origin` of the global batch. A process without
        rows in a short last batch gets one, which belongs to no slice of its replicas: see
        `plan.process_share`.

        Args:
            order: record numbers of the epoch, in the order of training: `plan.epoch_order`.
            global_batch: rows of a full step over all replicas.
            rank, size, replicas_per_process: who reads.
            first_step: steps of the epoch to leave out; nothing of them is read.
        """
        import tensorflow as tf

        steps = plan.steps_per_epoch(len(order), global_batch)
        if not 0 <= first_step < steps:
            raise InputError(f"Expected a first step below the epoch's {steps} steps, received {first_step}.")
        place = (rank, size, replicas_per_process)
        # Cut where the batches change their size, so that within each part records can be transformed one
        # by one, in parallel across batches, and be put together again by counting.
        start, full = first_step * global_batch, len(order) // global_batch * global_batch
        parts = [(order[start:full], global_batch), (order[max(start, full) :], len(order) - full)]
        batches = [self._equal_batches(part, rows, place) for part, rows in parts if len(part)]
        dataset = functools.reduce(lambda left, right: left.concatenate(right), batches)
        return dataset.prefetch(tf.data.AUTOTUNE)

    @property
    def element_spec(self) -> Any:
        """The `tf.TypeSpec`s of a batch of data; the batch dimension is None. Reads no file."""
        import tensorflow as tf

        return self._transformed(tf.data.Dataset.from_tensors("")).batch(1).element_spec

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def explain(self, error: Exception) -> Exception:
        """What to raise in place of an error that came out of the datasets of `process_batches`.

        TensorFlow hands on an exception of the reader as text with two tracebacks; this gives the reader's
        back. Its other errors come from parsing or from `transform`, and are told in one paragraph. An error
        that is not TensorFlow's is returned as it is.
        """
        import tensorflow as tf

        if not isinstance(error, tf.errors.OpError):
            return error
        failure = self._reader.failure if self._reader is not None else None
        if failure is not None and str(failure) in error.message:
            return failure
        return RunError(
            f"Expected every record of {self._files_in_words()} to have the declared features and to pass "
            f"the transform, received: {error.message.strip().splitlines()[0]}. Correct features, "
            "transform or files."
        )

    def _equal_batches(self, order: np.ndarray, global_rows: int, place: tuple[int, int, int]) -> Any:
        """Whole global batches of `global_rows` each."""
        import tensorflow as tf

        first = plan.process_share(order, global_rows, 0, *place)
        local = slice(first.origin, first.origin + len(first.records))
        # The numbers travel as data: TensorFlow keeps a Python function, and what it has closed over, for
        # the life of the process, which would be an order for each epoch.
        serialized = tf.data.Dataset.from_tensor_slices(order.reshape(-1, global_rows)[:, local]).map(
            _strings_from(self._open_reader().read), num_parallel_calls=self.workers, deterministic=True
        )
        data = self._transformed(serialized.unbatch()).batch(len(first.records))
        rows = tf.data.Dataset.from_tensors(np.int64(global_rows)).repeat()
        origin = tf.data.Dataset.from_tensors(np.int64(first.origin)).repeat()
        return tf.data.Dataset.zip((rows, origin, data))

    def _transformed(self, serialized: Any) -> Any:
        rows = serialized.map(self._parse_and_transform, num_parallel_calls=self.workers, deterministic=True)
        spec = rows.element_spec
        if isinstance(spec, tuple) and not 1 <= len(spec) <= 3:
            raise InputError(
                "Expected the transform of TFRecords to return x, (x, y) or (x, y, sample_weight), received "
                f"a tuple of {len(spec)}. Put several inputs or outputs into a dict or an inner tuple."
            )
        return rows

    def _parse_and_transform(self, serialized: Any) -> Any:
        # One record at a time: parsed as a batch, a record of varying length would be padded to the longest
        # of its neighbours, who are others on every rank.
        import tensorflow as tf

        example = serialized
        if self.features is not None:
            example = tf.io.parse_single_example(serialized, self.features)
        return example if self.transform is None else self.transform(example)

    def _files_in_words(self) -> str:
        return f"{len(self.files)} files" if isinstance(self.files, list) else repr(os.fspath(self.files))

    def _open_reader(self) -> "_Reader":
        if self._reader is None:
            self._reader = _Reader(self.load_index())
            # TensorFlow keeps the reader alive; a dataset that outlives this source opens the files again.
            weakref.finalize(self, self._reader.close)
        return self._reader


class _Reader:
    """Reads records of an index in any order, from several threads, opening each file once.

    Attributes:
        failure: the first error of a read, which TensorFlow would only hand on as text.
    """

    def __init__(self, index: Index) -> None:
        self.failure: RunError | None = None
        self._index = index
        # A file that is crowded out closes when the last thread that reads it lets go of it.
        self._open = functools.lru_cache(maxsize=_MOST_OPEN_FILES)(_OpenFile)

    def read(self, records: np.ndarray) -> np.ndarray:
        """The payloads of the given record numbers, as an object array of bytes."""
        try:
            payloads = np.empty(len(records), dtype=object)
            payloads[:] = [self._payload(record) for record in records]
            return payloads
        except RunError as error:
            self.failure = self.failure or error
            raise

    def close(self) -> None:
        self._open.cache_clear()

    def _payload(self, record: int) -> bytes:
        index = self._index
        name = index.files[index.file_of[record]]
        # Two threads may both open a file that is not cached yet; the one that is not kept must live until
        # its read is over, so it is a method that reads, not a bare file descriptor.
        return self._open(name).read(int(index.offsets[record]), int(index.lengths[record]))


class _OpenFile:
    """A file descriptor that closes with its last reference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = -1
        try:
            self.fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(
                f"Expected every process to find the indexed file {name!r}, received: {error.strerror}. "
                "Put the data on a file system that all hosts see under the same path."
            ) from error

    def read(self, offset: int, length: int) -> bytes:
        return read_at(self.fd, offset, length, self.name)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _strings_from(read: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """A Python function that returns a vector of strings, as one that tf.data can map."""
    import tensorflow as tf

    def strings(argument: Any) -> Any:
        # Stateless, so that tf.data may run several calls at a time.
        result = tf.numpy_function(read, [argument], tf.string, stateful=False)
        result.set_shape([None])
        return result

    return strings


def _check_arguments(files: Any, features: Any, transform: Any) -> None:
    if not isinstance(files, (str, os.PathLike, Iterable)) or isinstance(files, (bytes, dict)):
        raise InputError(
            f"Expected files to be a folder, a pattern or a list of files, received {type(files).__name__}."
        )
    if features is not None and not isinstance(features, dict):
        raise InputError(
            "Expected features to be a dict of tf.io feature specs such as "
            f"{{'label': tf.io.FixedLenFeature([], tf.int64)}}, or None, received {type(features).__name__}."
        )
    if transform is not None and not callable(transform):
        raise InputError(
            f"Expected transform to be a function of one parsed record, or None, received {type(transform).__name__}."
        )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"Expected {name} to be a whole number of {least} or more, received {value!r}.")
