"""Batches for a loop: cut for the replicas of this process, the same number of steps on every rank.

    feed = Feed(source, session.topology, session.transport, steps_per_epoch=None)
    feed.seek(epoch=3, step=120)
    for first, last, batches in feed:              # one epoch, step by step, as Keras counts them
        fingerprint, shards = next(batches)        # shards: one (rows, data) a local replica

Keras' EpochIterator decides how many steps an epoch has and when the data are iterated anew, so that
`steps_per_epoch` and data that run out mean what they mean in keras.Model.fit. Only records in a numbered
order (`distfit.TFRecords`) can do more: with `steps_per_epoch`, a training runs through pass after pass of them,
and each epoch goes on where the one before it stopped.

A feed that seeks is where one would be that had run until there. It jumps to numbered records; of other data it makes
as much again of what came before as their order depends on (`data.passes`), by the same calls of Keras.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.trainers.epoch_iterator import EpochIterator

from distfit.backends.transport import Transport
from distfit.data.bad_records import say_skipped, too_many
from distfit.data.passes import Needs
from distfit.data.sources import Source
from distfit.data.void import zeros
from distfit.errors import InputError, on_every_rank
from distfit.topology import Topology

# A batch's fingerprint is below this, so that its square, summed over a thousand ranks, is exact in float64.
_FINGERPRINTS = 2**20

# What a process adds to the small all-reduce of a step beside its rows: see `flags_of`.
FLAGS = 3

Batch = tuple[Any, tuple[tuple[Any, Any], ...]]

# A batch whose records are all bad, on every rank: its step is counted and not run, as a row that stands in for none
# would be trained on by a lonely replica, and statistics of no rows are 0 / 0.
NOTHING: Batch = ((), ())


class Feed(EpochIterator):
    """The batches of one process, epoch by epoch.

    Args:
        source: where they come from.
        topology: how many replicas share a batch.
        transport: agrees with the other processes on how many steps there are.
        steps_per_epoch: as in keras.Model.fit; None means all of the data.
        steps_per_execution: as in keras.Model.compile: steps from one call to the next.
        given: what the user passed as data, to say what it is.
        endless: the pass over a numbered order that follows the last one begins within an epoch of
            `steps_per_epoch`, as a training wants; an evaluation sees no record twice.

    Raises:
        InputError: ranks see different numbers of batches of what should be the same data, or none.
    """

    _epoch_iterator: Any

    def __init__(
        self,
        source: Source,
        topology: Topology,
        transport: Transport,
        steps_per_epoch: int | None = None,
        endless: bool = False,
        steps_per_execution: int = 1,
        given: Any = None,
    ) -> None:
        self.source = source
        self.given = given
        self._topology = topology
        self._transport = transport
        super().__init__(x=source.adapter, steps_per_epoch=steps_per_epoch, steps_per_execution=steps_per_execution)
        batches, self._agree_each_step = _agreed_length(source, transport, topology)
        self.endless = endless and source.numbered and steps_per_epoch is not None
        # Keras ends an epoch where it believes that the data end.
        self._agreed_batches = None if self.endless else batches
        self._num_batches = self._agreed_batches
        self._batches_per_pass = batches
        self._next_pass = self._next_step = 0
        # The next loop goes on in an epoch that has begun; and what is begun again is not used.
        self._within = self._begins_nothing = False
        self._last: Batch | None = None
        self._host_streams = _HostStreams()
        # The records may have been trained on before.
        self._counted = np.array([source.tally.skipped, source.tally.seen], np.float64)

    @functools.cached_property
    def element_spec(self) -> Any:
        """The tf.TypeSpecs of a batch; reads nothing."""
        return self._whole.element_spec

    @functools.cached_property
    def data_spec(self) -> Any:
        """The tf.TypeSpecs of one replica's (x, y, sample_weight), as the model sees them."""
        spec = self.element_spec[1][0][1]
        if self.source.on_device is not None:
            ready = tf.function(functools.partial(self.source.on_device, training=True), autograph=False)
            spec = ready.get_concrete_function(spec).structured_outputs
            spec = tf.nest.map_structure(tf.TensorSpec.from_tensor, spec)
        return tf.nest.map_structure(lambda leaf: None if leaf == tf.type_spec_from_value(None) else leaf, spec)

    def made_ready(self, step: Callable[..., Any], training: bool) -> Callable[..., Any]:
        """A step of (rows, flags, data) that gets the data as the model sees them.

        Args:
            training: tells layers what to do.
        """
        on_device = self.source.on_device
        if on_device is None:
            return step

        @functools.wraps(step, updated=())
        def with_data_ready(rows: Any, flags: Any, data: Any) -> Any:
            return step(rows, flags, on_device(data, training=training))

        return with_data_ready

    def start_at(self, epoch: int) -> None:
        """The next batch is the first one of this epoch.

        Raises:
            InputError: how many batches are in a pass would have to be known; on every rank.
        """
        self._next_pass, self._next_step = epoch, 0
        if self.endless and epoch > 0:
            if self._batches_per_pass is None:
                raise on_every_rank(
                    InputError(
                        f"Expected records whose number is known, to begin at epoch {epoch + 1} of "
                        f"{self.steps_per_epoch} steps each, received streams that nobody has counted. Count them once "
                        "with `distfit data index`, or leave steps_per_epoch out."
                    )
                )
            self._next_pass, self._next_step = divmod(epoch * (self._batches_of_epoch or 0), self._batches_per_pass)

    def seek(self, epoch: int, step: int, began: int = 0, ranks: int | None = None) -> None:
        """The next loop over this feed begins with this step of this epoch, as in a run that was not interrupted.

        After `reset`. The loop gives numbers that count on from `step`; where all steps of the epoch have run, it
        gives none, and the epoch ends as usual. Collective.

        What it costs: `distfit.TFRecords` nothing, nothing before is read; where bad records are left out, the epoch
        up to the step is read, to count them. Arrays: the rows of the epoch up to the step are copied. A
        tf.data.Dataset: the epoch up to the step is read again, and so are all epochs before, unless it tells that
        their batches do not matter (`data.passes`). Generators, PyDatasets, streams that nobody has counted with
        `steps_per_epoch`: everything before is read again.

        What it cannot make the same: shuffles without a seed, `deterministic=False`, what Python code draws from
        elsewhere than the states of `random` and `numpy.random` or in threads, files that have changed. With
        `steps_per_epoch`, records that are left out count for the epoch in which they were read ahead.

        Args:
            epoch: from 0.
            step: batches of the epoch that have run, 0 to all.
            began: the epoch with which the run began (`initial_epoch`): data without numbers were passed over from
                then on.
            ranks: of the run that goes on, if it was another number.

        Raises:
            InputError: no such step; or the steps of `distfit.local` were others, on another number of ranks.
        """
        self._check_place(step, ranks)
        known_endless = self.endless and self._batches_per_pass is not None
        if self.source.numbered and (self.steps_per_epoch is None or known_endless):
            self._jump(epoch, step)
        else:
            self._make_again(epoch - (0 if self.source.numbered else began), step)

    def passed(self, passes: int) -> None:
        """The next pass is the one after so many, each of which began at the data's beginning, as validations do.
        Collective; costs what `seek` costs."""
        for _ in range(0 if self.source.numbered else passes):
            self.reset()
            self._make_again(1, 0)
        self.reset()
        if self.source.numbered:
            self._next_pass, self._next_step = passes, 0

    def _check_place(self, step: int, ranks: int | None) -> None:
        if self.source.per_process and step and ranks not in (None, self._topology.size):
            raise on_every_rank(
                InputError(
                    f"Expected distfit.local to go on within an epoch on {ranks} ranks, as it began, received "
                    f"{self._topology.size}: each rank brings its own batches, and those of another number are others. "
                    f"Start {ranks} ranks, or go on from a checkpoint at the end of an epoch."
                )
            )
        total = self._batches_of_epoch
        if total is not None and step > total:
            raise on_every_rank(
                InputError(
                    f"Expected to go on within the {total} steps of an epoch, received step {step}. The data, "
                    "batch_size or steps_per_epoch have changed: give those that the run began with."
                )
            )

    @property
    def _batches_of_epoch(self) -> int | None:
        """Batches that an epoch takes; None where only their end tells."""
        if self.steps_per_epoch is None:
            return self._batches_per_pass
        each = self.steps_per_execution
        return -(-self.steps_per_epoch // each) * each

    def _jump(self, epoch: int, step: int) -> None:
        """To where numbered records are known to be; but where they are counted one by one, through the epoch."""
        self.start_at(epoch)
        counts = self.source.tally.policy == "skip"
        self._into_epoch(step, read=counts)
        if counts:
            return
        self._next_step += step
        if self._batches_per_pass is not None and self._next_step >= self._batches_per_pass:
            further, self._next_step = divmod(self._next_step, self._batches_per_pass)
            self._next_pass += further

    def _make_again(self, epochs: int, step: int) -> None:
        """What came before in the run, as far as what comes next depends on it."""
        if not epochs and not step:
            return
        needs = self.source.needs()
        read = needs is Needs.BATCHES or self._num_batches is None
        self._begins_nothing = needs is Needs.NOTHING and not read
        with self._host_streams.again():
            for _ in range(epochs):
                with self.catch_stop_iteration():
                    for first, last, batches in self:
                        batches.pass_over(last - first + 1, read)
            self._into_epoch(step, read)
            self._begins_nothing = False
            if isinstance(self._current_iterator, _Pass):
                self._current_iterator.catch_up()

    def _into_epoch(self, step: int, read: bool) -> None:
        """Begins an epoch, and passes over its first steps; the next loop goes on there."""
        if not step:
            return
        iter(self)
        ran = 0
        while ran < step:
            try:
                first, last, batches = next(self._epoch_iterator)
                ran += batches.pass_over(last - first + 1, read)
            except StopIteration:
                raise on_every_rank(
                    InputError(
                        f"Expected data with {step} batches in an epoch, as when the run stopped there, received "
                        f"{ran}. Give the data that the run began with."
                    )
                ) from None
        if ran > step and (read or self.endless or not batches.is_over):
            raise on_every_rank(
                InputError(
                    f"Expected to go on at a multiple of steps_per_execution={self.steps_per_execution}, received step "
                    f"{step}. Compile the model with the number that the run began with."
                )
            )
        self._within = True

    def fingerprint(self) -> int | None:
        """Of the last batch that this feed gave or passed over; None before any, and with `distfit.local` or numbered
        records. It is the same for any number of replicas, so that a checkpoint can tell that data are not."""
        if self._last is None or self.source.numbered or self.source.per_process:
            return None
        fingerprint, shards = self._last
        if self.source.compared:
            return int(fingerprint)
        return int(_fingerprint(_together(shards)))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint recognises the data by: plain values by name, none of which depends on the replicas.

        Record files by their names (without folders) and sizes; arrays by their content, up to a bound that the value
        says (`data.identity`); of datasets only the number of batches can be told without reading them.
        """
        rows = [leaf for leaf in tf.nest.flatten(self.element_spec[1][0][1]) if hasattr(leaf, "dtype")]
        own = {} if self.steps_per_epoch is None else {"steps per epoch": self.steps_per_epoch}
        return {**self.source.identity(), **own, "rows": ", ".join(map(_of_row, rows))}

    def reset(self) -> None:
        super().reset()
        self._num_batches = self._agreed_batches
        self._within = False
        self._last = None
        self._host_streams = _HostStreams()

    def __iter__(self) -> Feed:
        if self._within:  # an epoch that was sought
            self._within = False
            return self
        super().__iter__()
        return self

    def _interrupted_warning(self) -> None:
        # The run that was interrupted has said so.
        if not self._host_streams.are_again:
            super()._interrupted_warning()

    @contextmanager
    def catch_stop_iteration(self) -> Iterator[None]:
        """As Keras', which takes the number of batches of the first epoch for that of all. Passes over streams differ
        in it, and where one ends is no reason for a warning."""
        if not self.source.numbered or self._batches_per_pass is not None:
            with super().catch_stop_iteration():
                yield
            return
        try:
            yield
        except StopIteration:
            self._current_iterator = None
        self._epoch_iterator = None

    def __next__(self) -> tuple[int, int, Iterator[Batch]]:
        return next(self._epoch_iterator)

    def _get_iterator(self) -> _Pass:
        return _Pass(self, self._agree_each_step)

    def _begin_pass(self) -> Iterator[Batch]:
        self.source.begin()
        number, step = self._next_pass, self._next_step
        self._next_pass, self._next_step = number + 1, 0
        return iter(self._cut(number, step) if self.source.numbered else self._whole)

    @functools.cached_property
    def _whole(self) -> tf.data.Dataset:
        return self._cut(0, 0)

    def anybody_has_rows(self, batch: Batch) -> bool:
        """Whether a row of a batch counts; where bad records are left out, none may. Collective."""
        own = sum(int(rows) for rows, _ in batch[1])
        return bool(own if self._topology.size == 1 else self._transport.sum(np.array([own], np.float64))[0])

    def _cut(self, number: int, first_step: int) -> tf.data.Dataset:
        source, replicas = self.source, self._topology.replicas_per_process

        def cut(rows: Any, origin: Any, data: Any) -> Batch:
            prints = _fingerprint(data) if source.compared else tf.zeros([], tf.int64)
            if source.parts == 1:
                return prints, ((rows, data),)
            slices = (_slice(rows, origin, data, source.first_part + local, source.parts) for local in range(replicas))
            return prints, tuple(slices)

        return source.dataset(number, first_step).map(cut)

    def left_out(self) -> dict[str, float]:
        """Records that all ranks left out since the last call, as logs have it; empty where a bad record is an error.

        Collective.

        Raises:
            RunError: more of those that were read than may be; on every rank.
        """
        tally = self.source.tally
        if tally.policy != "skip":
            return {}
        own = np.array([tally.skipped, tally.seen], np.float64)
        skipped, seen = self._transport.sum(own - self._counted).tolist()
        self._counted = own
        of = max(seen, self.source.records or 0)
        if tally.too_many(skipped, of):
            raise on_every_rank(too_many(int(skipped), int(of), tally.most))
        return {"skipped_records": skipped}

    def tell_left_out(self, what: str) -> None:
        """Says how many records the last pass left out of which files, if any. Collective.

        Args:
            what: the data are, "training" say.
        """
        if self.source.tally.policy == "skip":
            say_skipped(self._transport.gather(self.source.tally.by_file), what)

    def void(self, batch: Batch | None) -> Batch:
        """A batch in which no row counts: the last one again, of whose shape the step may have been made, or
        zeros before there was any."""
        if batch is None:
            batch = zeros(self.element_spec)
        fingerprint, shards = batch
        return fingerprint, tuple((tf.zeros([], tf.int64), data) for _, data in shards)


class _Pass:
    """One pass over the data, begun when it is first needed; of an endless feed, one pass after the other."""

    def __init__(self, feed: Feed, agree_each_step: bool) -> None:
        self._feed = feed
        self._agree = agree_each_step
        # Void batches of `distfit.local` end with the longest rank: a call of several steps asks for more.
        self._void_until = (feed._batches_per_pass or 0) if feed.source.uneven else 0
        self._taken = self._owed = 0
        self._last: Batch | None = None
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> _Pass:
        # Keras iterates a dataset once more at the end of an epoch of known length; a seeded
        # Dataset.shuffle takes its next order from that, so it has to happen here as well. A numbered
        # order does not care, and its pass only counts when it is used.
        if not self._feed.source.numbered and not self._feed._begins_nothing:
            self._batches = self._feed._begin_pass()
        return self

    def pass_over(self, batches: int, read: bool = True) -> int:
        """Leaves out so many batches, or as many as there are; how many.

        Args:
            read: False leaves them to `catch_up`, which need not be called where nothing of this pass is used.

        Raises:
            StopIteration: there are none.
        """
        if not read:
            self._owed += batches
            return batches
        next(self)
        return 1 + sum(next(self, None) is not None for _ in range(batches - 1))

    @property
    def is_over(self) -> bool:
        """Whether what was passed over without being read is all."""
        return self._owed >= (self._feed._batches_per_pass or 0)

    def catch_up(self) -> None:
        """Reads what was passed over, unless that is all."""
        if self._owed and not self.is_over:
            owed, self._owed = self._owed, 0
            self.pass_over(owed)

    def __next__(self) -> Batch:
        batch = self._own_next()
        if self._agree:
            batch = self._agreed(batch)
        if batch is None:
            if not self._agree and self._taken >= self._void_until:
                raise StopIteration
            batch = self._feed.void(self._last)
        self._last = self._feed._last = batch
        self._taken += 1
        if self._feed.source.tally.policy == "skip" and not self._feed.anybody_has_rows(batch):
            return NOTHING
        return batch

    def _agreed(self, batch: Batch | None) -> Batch | None:
        """This rank's batch as long as some rank has one; of an endless feed the next pass begins everywhere then."""
        if self._anybody_has(batch):
            return batch
        if self._feed.endless:
            self._batches = self._feed._begin_pass()
            batch = self._own_next()
            if self._anybody_has(batch):
                return batch
        raise StopIteration

    def _anybody_has(self, batch: Batch | None) -> bool:
        return bool(self._feed._transport.sum(np.array([batch is not None], np.float64))[0])

    def _own_next(self) -> Batch | None:
        if self._batches is None:
            self._taken = self._feed._next_step
            self._batches = self._feed._begin_pass()
        try:
            batch = next(self._batches, None)
            if batch is None and self._feed.endless and not self._agree:
                self._batches = self._feed._begin_pass()
                batch = next(self._batches)
            return batch
        except tf.errors.OpError as error:
            told = self._feed.source.explain(error)
            # One that our code raised within tf.data is in TensorFlow's text already, with two tracebacks.
            raise told from (error if told.__traceback__ is None else None)


class _HostStreams:
    """Where the random states of Python and NumPy were when a training began, which users' data draw on."""

    def __init__(self) -> None:
        self._states = _host_states()
        self.are_again = False

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around what is made again. States that nothing has drawn on are put back."""
        there = _host_states()
        self._set(self._states)
        self.are_again = True
        try:
            yield
        finally:
            self.are_again = False
            if _same(_host_states(), self._states):
                self._set(there)

    def _set(self, states: tuple[Any, Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _host_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return one[0] == other[0] and all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def _agreed_length(source: Source, transport: Transport, topology: Topology) -> tuple[int | None, bool]:
    """Batches of a pass, None when unknown, and whether ranks have to ask each other before every step."""
    lengths = transport.gather(source.adapter.num_batches)
    if 0 in lengths and not any(lengths):
        raise on_every_rank(
            InputError("Expected data with at least one batch, received none. Check the data that were passed.")
        )
    if None in lengths:
        return None, topology.size > 1
    if not source.uneven and len(set(lengths)) > 1:
        raise on_every_rank(
            InputError(
                "Expected every rank to see the same data, received different numbers of batches: "
                + ", ".join(f"rank {rank} has {length}" for rank, length in enumerate(lengths))
                + ". Give every rank the same data, or wrap what each rank reads for itself in distfit.local(...)."
            )
        )
    return max(lengths), False


def _slice(rows: Any, origin: Any, data: Any, part: int, parts: int) -> tuple[Any, Any]:
    """`plan.slice_bounds` in the graph; a part without rows gets the first row that is there."""
    each, extra = rows // parts, rows % parts
    start = part * each + tf.minimum(tf.constant(part, tf.int64), extra)
    count = each + tf.cast(part < extra, tf.int64)
    first = tf.where(count > 0, start - origin, 0)
    stop = first + tf.maximum(count, 1)
    return count, tf.nest.map_structure(lambda leaf: _rows(leaf, first, stop), data)


def _rows(leaf: Any, first: Any, stop: Any) -> Any:
    """Rows of a tensor of any kind; of None (an output without weights) none."""
    if leaf is None:
        return None
    if isinstance(leaf, tf.SparseTensor):
        rest = leaf.dense_shape[1:]
        rows = tf.sparse.slice(leaf, tf.concat([[first], tf.zeros_like(rest)], 0), tf.concat([[stop - first], rest], 0))
        static = [None, *leaf.shape[1:]]
        return tf.SparseTensor(rows.indices, rows.values, tf.ensure_shape(rows.dense_shape, [len(static)]))
    return leaf[first:stop]


def _fingerprint(data: Any) -> tf.Tensor:
    """A number below 2**20 that depends on every byte of a batch (FarmHash64 of its tensors)."""
    total = tf.zeros([], tf.int64)
    for leaf in tf.nest.flatten(data, expand_composites=True):
        if leaf is None:
            continue
        own = tf.strings.to_hash_bucket_fast(tf.io.serialize_tensor(leaf), _FINGERPRINTS)
        total = (total * 31 + own) % _FINGERPRINTS
    return total


def _together(shards: Sequence[tuple[Any, Any]]) -> Any:
    """The rows of a batch that replicas have parts of."""
    parts = [data for rows, data in shards if int(rows)]
    if len(parts) == 1:
        return parts[0]
    return tf.nest.map_structure(lambda *leaves: None if leaves[0] is None else _concatenated(leaves), *parts)


def _concatenated(leaves: Sequence[Any]) -> Any:
    return tf.sparse.concat(0, leaves) if isinstance(leaves[0], tf.SparseTensor) else tf.concat(leaves, axis=0)


def _of_row(spec: tf.TypeSpec) -> str:
    """The type of one row.

    >>> _of_row(tf.TensorSpec([None, 28, 28], tf.float32)), _of_row(tf.SparseTensorSpec([None, 9], tf.int64))
    ('float32[28,28]', 'SparseTensor int64[9]')
    """
    kind = "" if isinstance(spec, tf.TensorSpec) else f"{spec.value_type.__name__} "
    sizes = ["?"] if spec.shape.rank is None else ["?" if size is None else str(size) for size in spec.shape[1:]]
    return f"{kind}{spec.dtype.name}[{','.join(sizes)}]"


def flags_of(fingerprint: Any, stop: Any) -> tf.Tensor:
    """What a process adds to the small all-reduce: its wish to stop, its batch's fingerprint and the square."""
    fingerprint = tf.cast(fingerprint, tf.float64)
    return tf.stack([stop, fingerprint, fingerprint * fingerprint])


def check_same_batches(flags: np.ndarray, size: int, step: int) -> None:
    """Compare fingerprints by their summed flags: equal everywhere if and only if the variance is zero.

    Raises:
        InputError: ranks trained on different batches; raised on all of them.
    """
    _, total, squares = flags
    if size * squares != total * total:
        raise on_every_rank(
            InputError(
                f"Expected every rank to iterate the same global batches, received different ones at step {step}: the "
                "dataset differs between ranks, most likely by an unseeded shuffle, and records would be trained on "
                "twice or never, or a hand-written loop ran a step more on one of them. Give shuffle(..., seed=...) "
                "the same seed everywhere, or wrap data that each rank shards for itself in distfit.local(...)."
            )
        )
