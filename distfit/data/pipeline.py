"""From the numbers of records to batches of rows, in tf.data, without losing the plan on the way.

    pipeline = Pipeline(make, tally)
    for rows, origin, data in pipeline.indexed(way, order, global_batch=64, place=(0, 1, 1), workers=2): ...

Each element is one step's part of one process: how many rows the batch has that is cut, which row of it the first
row of `data` is, and the rows. Where every record becomes a row it is the global batch that is cut; where some are
left out, or come as they are (`streamed`), it is what this process has of it, which may be nothing: `data` then holds
one row that does not count, so that every step has its shape on every rank.

A step's records are read in one call, its rows are made one by one, several at a time, and put together again. In
memory are, beside the step in use, the records of at most `AHEAD` others, of which at most four are rows already.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np

from distfit.data import one_step, plan
from distfit.data.bad_records import BadRecord, Tally
from distfit.data.one_step import Step
from distfit.data.void import zeros
from distfit.errors import InputError, RunError

# Two steps are made at a time, so that the reading of one hides behind the decoding of another, and two wait.
_AT_A_TIME = 2
_WAITING = 2
# What lies between the steps of tf.data is its own matter; tests/test_rows.py counts what it comes to.
AHEAD = 4 * _AT_A_TIME + _WAITING

# Of a process: rank, size, replicas per process.
Place: TypeAlias = tuple[int, int, int]
# A tf.data.Dataset; TensorFlow is imported when the first one is made.
Dataset: TypeAlias = Any
# What TensorFlow puts before a message.
_GRAPH_NAMES = re.compile(r"\{\{[^}]*\}\}\s*")


class Places(Protocol):
    """Knows where records lie."""

    def place_of(self, number: int) -> tuple[str, int, int | None]:
        """File, number in the file and offset of a record, for messages."""
        ...


class Records(Places, Protocol):
    """Where records come from, any of them at any time."""

    def read_each(self, numbers: np.ndarray) -> Sequence[bytes | BadRecord]:
        """The records of these numbers; in place of one that cannot be read, what is wrong with it."""
        ...

    def will_read(self, order: plan.Order, position: int) -> None:
        """The records from this position of an order on come next."""
        ...


# From (number, serialized record, seed: int32 [2]) to one row, in TensorFlow's graph.
OneByOne: TypeAlias = Callable[[Any, Any, Any], Any]


class AtOnce(Protocol):
    """Makes all rows of a step at once, in Python."""

    @property
    def specs(self) -> Sequence[Any]:
        """The tf.TensorSpec of each array, the first dimension None."""
        ...

    def made(
        self, pipeline: Pipeline, places: Places, workers: int, numbers: np.ndarray, strings: Any, seeds: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Which records are good, bool [n], and the seeds and arrays of all; of no records, one row that is not."""
        ...


class Pipeline:
    """Makes a row of each record, and puts the rows of a step together.

    Args:
        make: what makes rows, one by one or all of a step at once.
        tally: counts what is left out, or raises.
        seeded: the rows come as (rows, seeds), for what is drawn on the device.
    """

    def __init__(self, make: OneByOne | AtOnce, tally: Tally, seeded: bool = False) -> None:
        # Several steps are made at a time, so that it need not be the first whose text TensorFlow hands on.
        self._failures: deque[RunError] = deque(maxlen=64)
        # The numbers of what was read last, to find out which record it was that a row could not be made of.
        self._recent: deque[tuple[Records, np.ndarray, plan.Order]] = deque(maxlen=AHEAD + 2)
        self._make = make
        self.tally = tally
        self._seeded = seeded
        self._skips = tally.policy == "skip"

    def indexed(
        self,
        records: Records,
        order: plan.Order,
        global_batch: int,
        place: Place,
        workers: int,
        first_step: int = 0,
    ) -> Dataset:
        """The batches of one process for one epoch.

        Args:
            records: to read.
            order: of the epoch.
            global_batch: rows of a full step over all replicas.
            place: who reads.
            workers: rows made at a time.
            first_step: steps of the epoch to leave out; nothing of them is read.

        Raises:
            InputError: no such step.
        """
        import tensorflow as tf

        steps = plan.steps_per_epoch(len(order), global_batch)
        if not 0 <= first_step < steps:
            raise InputError(f"Expected a first step below the epoch's {steps} steps, received {first_step}.")
        # The order travels as data: TensorFlow keeps a Python function, and what it has closed over, for the life of
        # the process, which would be an order for each epoch.
        key = tf.constant([*one_step.packed(order), global_batch, *place], tf.int64)
        numbers = tf.data.Dataset.range(first_step, steps).map(_as_it_is(lambda number: (key, number)))
        share = functools.partial(self._share, records)
        if not callable(self._make):
            return self._at_once(self._make, numbers, share, records, workers, uneven=self._skips)
        read = self.python(share, [tf.int64, tf.int64, *(spec.dtype for spec in one_step.specs())])

        def step(key: Any, number: Any) -> tuple[Any, Any, Step]:
            rows, origin, *own = read(key, number)
            return tf.ensure_shape(rows, []), tf.ensure_shape(origin, []), one_step.shaped(own)

        read_steps = numbers.map(_as_it_is(step), num_parallel_calls=_AT_A_TIME, deterministic=True)
        return self._one_by_one(self._make, read_steps, records, workers, uneven=self._skips)

    def streamed(self, places: Places, batches: Callable[[], Iterator[Step]], workers: int) -> Dataset:
        """As `indexed`, of what comes as it is: numbers, records and seeds of each step, or of none."""
        import tensorflow as tf

        def heard() -> Iterator[Step]:
            with self._remembered():
                yield from batches()

        steps = tf.data.Dataset.from_generator(heard, output_signature=one_step.specs())
        if not callable(self._make):
            return self._at_once(self._make, steps, lambda *own: (0, 0, *own), places, workers, uneven=True)
        none = tf.constant(0, tf.int64)
        steps = steps.map(_as_it_is(lambda *own: (none, none, own)))
        return self._one_by_one(self._make, steps, places, workers, uneven=True)

    @functools.cached_property
    def element_spec(self) -> Any:
        """The `tf.TypeSpec`s of a batch of data; the batch dimension is None. Reads no file."""
        import tensorflow as tf

        if not callable(self._make):
            return self._with_seeds(_one_or_all(self._make.specs), tf.TensorSpec([None, 2], tf.int32))
        none = tf.constant(0, tf.int64)
        steps = tf.data.Dataset.from_tensors((none, none, zeros(one_step.specs())))
        return self._one_by_one(self._make, steps, _Nowhere(), workers=1, uneven=False).element_spec[2]

    def explain(self, error: Exception, files: str) -> Exception:
        """What to raise in place of an error that came out of these datasets.

        TensorFlow hands on an exception of Python code as text with two tracebacks; this gives it back. Its other
        errors come from parsing or from the transform, and are told in one paragraph. An error that is not
        TensorFlow's is returned as it is.
        """
        import tensorflow as tf

        if not isinstance(error, tf.errors.OpError):
            return error
        known = [failure for failure in self._failures if str(failure) in error.message]
        if known:
            return known[-1]
        said = _GRAPH_NAMES.sub("", error.message).strip().splitlines()[0]
        return RunError(
            f"Expected every record of {files} to have the declared features and to pass the transform, received"
            f"{self._culprit()}: {said}. Correct features, transform or files."
        )

    def _culprit(self) -> str:
        """Where the first record lies that no row can be made of, among those that were read last."""
        import tensorflow as tf

        if not callable(self._make):
            return ""  # it names the record itself
        for records, read, order in tuple(self._recent):
            strings = [record for record in records.read_each(read) if isinstance(record, bytes)]
            for number, string, seed in zip(*one_step.step_of(read, strings, order.seed, order.epoch), strict=False):
                try:
                    self._make(tf.constant(number), tf.constant(string), tf.constant(seed))
                except tf.errors.OpError:
                    file, in_file, offset = records.place_of(int(number))
                    return f" of record {in_file}{'' if offset is None else f' at byte {offset}'} of {file!r}"
        return ""

    def _share(self, records: Records, key: np.ndarray, step: np.ndarray) -> tuple[Any, ...]:
        """What this process reads of a step: rows of the global batch, the first one's place, and its records."""
        *packed, global_batch, rank, size, replicas = key.tolist()
        order = one_step.unpacked(packed)
        share = plan.process_share(order, global_batch, int(step), rank, size, replicas)
        records.will_read(order, int(step) * global_batch)
        numbers = share.records
        if self._skips:  # who has none has none: the one that would keep step may be bad
            start, stop = plan.process_bounds(share.global_rows, rank, size, replicas)
            numbers = numbers[: stop - start]
        return np.int64(share.global_rows), np.int64(share.origin), *self._read(records, numbers, order)

    def _read(self, records: Records, numbers: np.ndarray, order: plan.Order) -> Step:
        read, whole = records.read_each(numbers), np.ones(len(numbers), bool)
        self.tally.saw(len(numbers))
        for position, record in enumerate(read):
            if isinstance(record, BadRecord):
                self.tally.note(record)
                whole[position] = False
        whole_ones = [record for record in read if isinstance(record, bytes)]
        self._recent.append((records, numbers[whole], order))
        return one_step.step_of(numbers[whole], whole_ones, order.seed, order.epoch)

    def _one_by_one(self, make: OneByOne, steps: Dataset, places: Places, workers: int, uneven: bool) -> Dataset:
        """From the records of each step to its rows, several of them at a time."""
        import tensorflow as tf

        def one(rows: Any, origin: Any, step: Step) -> Dataset:
            def bounded(numbers: Any, data: Any, seeds: Any) -> tuple[Any, Any, Any]:
                data = self._with_seeds(data, seeds)
                if uneven:
                    return tf.size(numbers, tf.int64), tf.constant(0, tf.int64), data
                return rows, origin, data

            return self._rows(make, step, places, workers, uneven).map(_as_it_is(bounded))

        made = steps.interleave(
            _as_it_is(one), cycle_length=_AT_A_TIME, num_parallel_calls=_AT_A_TIME, deterministic=True
        )
        return made.prefetch(_WAITING).with_options(_options(workers))

    def _rows(self, make: OneByOne, step: Step, places: Places, workers: int, uneven: bool) -> Dataset:
        """The rows of one step, as one element (numbers, data, seeds)."""
        import tensorflow as tf

        def row(number: Any, record: Any, seed: Any) -> Any:
            return number, make(number, record, seed), seed

        numbers = step[0]
        made = tf.data.Dataset.from_tensor_slices(step).map(
            _as_it_is(row), num_parallel_calls=workers, deterministic=True
        )
        _check_row(made.element_spec[1])
        if self._skips:
            made = made.ignore_errors()
        made = made.batch(tf.maximum(tf.size(numbers, tf.int64), 1))
        if uneven:
            void = tf.data.Dataset.from_tensors(one_step.void(made.element_spec))
            made = made.concatenate(void).take(1)
        if self._skips:
            note = self.python(functools.partial(self._note_missing, places), [tf.int64])
            made = made.map(_as_it_is(lambda kept, *rest: (tf.ensure_shape(note(numbers, kept)[0], [None]), *rest)))
        return made

    def _at_once(
        self, make: AtOnce, steps: Dataset, read: Callable[..., tuple], places: Places, workers: int, uneven: bool
    ) -> Dataset:
        """From steps to their rows, reading included, in one call of Python code a step.

        Handed through TensorFlow as strings, records would be copied three times, which for images of 12 megapixels
        takes half as long as decoding them.

        Args:
            read: from an element of `steps` to (rows, origin, numbers, records, seeds), in Python.
        """
        import tensorflow as tf

        def made(*arguments: np.ndarray) -> tuple[Any, ...]:
            rows, origin, *step = read(*arguments)
            # So many steps are made side by side.
            good, arrays = make.made(self, places, -(-workers // _AT_A_TIME), *step)
            if uneven:
                rows, origin = np.count_nonzero(good), 0
            if not good.all():
                # One row stays where none is good, and does not count.
                good = good if good.any() else np.arange(len(good)) < 1
                arrays = [array[good] for array in arrays]
            return np.int64(rows), np.int64(origin), *arrays

        call = self.python(made, [tf.int64, tf.int64, tf.int32, *(spec.dtype for spec in make.specs)])

        def step(*arguments: Any) -> tuple[Any, Any, Any]:
            rows, origin, seeds, *arrays = call(*arguments)
            shaped = [tf.ensure_shape(array, spec.shape) for array, spec in zip(arrays, make.specs, strict=True)]
            data = self._with_seeds(_one_or_all(shaped), tf.ensure_shape(seeds, [None, 2]))
            return tf.ensure_shape(rows, []), tf.ensure_shape(origin, []), data

        made_steps = steps.map(_as_it_is(step), num_parallel_calls=_AT_A_TIME, deterministic=True)
        return made_steps.prefetch(_WAITING).with_options(_options(workers))

    def _with_seeds(self, data: Any, seeds: Any) -> Any:
        return (data, seeds) if self._seeded else data

    def _note_missing(self, places: Places, numbers: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray]:
        for number in np.setdiff1d(numbers, kept).tolist():
            reason = "what has not the declared features or does not pass the transform"
            self.tally.note(BadRecord(*places.place_of(number), reason))
        return (kept,)

    def python(self, function: Callable[..., tuple], types: Sequence[Any]) -> Callable[..., list[Any]]:
        """A Python function as one of TensorFlow's; what it raises is remembered."""
        import tensorflow as tf

        def called(*arguments: np.ndarray) -> tuple:
            with self._remembered():
                return function(*arguments)

        # Stateless, so that tf.data may run several calls at a time.
        return lambda *arguments: tf.numpy_function(called, arguments, types, stateful=False)

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except RunError as error:
            self._failures.append(error)
            raise


class _Nowhere:
    """Of a pipeline that is only asked for its shapes."""

    def place_of(self, number: int) -> tuple[str, int, int | None]:
        raise AssertionError("nothing is read for shapes")


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Our own functions need no conversion of Python's `if` and `for`, which would wrap what they raise."""
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def _one_or_all(arrays: Sequence[Any]) -> Any:
    return tuple(arrays) if len(arrays) > 1 else arrays[0]


def _options(workers: int) -> Any:
    import tensorflow as tf

    options = tf.data.Options()
    # A process of several on a host keeps to its share of the cores.
    options.threading.private_threadpool_size = workers + _AT_A_TIME
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def _check_row(spec: Any) -> None:
    if isinstance(spec, tuple) and not 1 <= len(spec) <= 3:
        raise InputError(
            "Expected the transform of TFRecords to return x, (x, y) or (x, y, sample_weight), received a tuple of "
            f"{len(spec)}. Put several inputs or outputs into a dict or an inner tuple."
        )
