"""What makes runs of one training comparable row by row, in a process that does nothing else.

    watch = RowWatch(permuted=True, random_off=True)
    watch.install()                  # before a model is trained; never undone
    watch.switch_off(model)
    watch.digests, watch.drew        # afterwards

* `digests`: of each batch a sum over its rows, which is the same in whatever order and parts they came, so that
  data which change from run to run are told apart from a model that is trained otherwise.
* `permuted`: the rows of every batch of one device, in an order that depends on their number alone.
* `random_off`: what a step draws is drawn for the global batch, and each replica takes the numbers of its rows
  (draws.py). Layers that can be switched off by training=False are, as Keras would in an evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.backends.base import Backend
from distfit.checking import draws
from distfit.data.feed import Feed
from distfit.training.by_hand import ByHand
from distfit.training.step import Step


@dataclass
class RowWatch:
    """What the rows of this process go through.

    Args:
        permuted: give them another order.
        random_off: as above.

    Attributes:
        digests: one for each batch, of this process's rows.
        drew: from which modules a step drew random numbers, "keras.random" or "tf.random".
    """

    permuted: bool = False
    random_off: bool = False
    digests: list[int] = field(default_factory=list)
    drew: set[str] = field(default_factory=set)

    def install(self) -> None:
        """Put it between the data, the steps and the random streams of this process."""
        self._watch_batches()
        self._enter_steps()
        draws.install(self.drew, by_rows=self.random_off or self.permuted, alike=self.random_off)

    def switch_off(self, model: Any) -> Any:
        """The model, its layers that draw called with training=False from now on; those alone that hold no others,
        which would be switched off with them."""
        if self.random_off:
            for layer in random_layers(model):
                if layer._call_has_training_arg and not layer._flatten_layers(include_self=False):
                    layer.__dict__["call"] = _never_training(layer.call)
        return model

    def _watch_batches(self) -> None:
        cut, give = Feed._cut, Feed.__next__

        def permuted_cut(feed: Feed, number: int, first_step: int) -> tf.data.Dataset:
            batches = cut(feed, number, first_step)
            return batches.map(_permuted_batch) if self.permuted else batches

        def noted(feed: Feed) -> tuple[int, int, Iterator[Any]]:
            first, last, batches = give(feed)
            return first, last, self._noted(batches)

        put(Feed, _cut=permuted_cut, __next__=noted)

    def _noted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.digests.append(sum(_digest(int(rows), data) for rows, data in batch[1]))
            yield batch

    def _enter_steps(self) -> None:
        train, test, run, watch = Step._train, Step.test, ByHand.run, self

        def training(step: Step, name: str, rows: Any, flags: Any, data: Any) -> Any:
            with draws.within(watch._place(step._backend, rows, data)):
                return train(step, name, rows, flags, data)

        def testing(step: Step, rows: Any, flags: Any, data: Any) -> Any:
            with draws.within(watch._place(step._backend, rows, data)):
                return test(step, rows, flags, data)

        def by_hand(self: ByHand, name: str, function: Any, rows: Any, flags: Any, data: Any) -> Any:
            with draws.within(watch._place(self._backend, rows, data)):
                return run(self, name, function, rows, flags, data)

        put(Step, _train=training, test=testing)
        put(ByHand, run=by_hand)

    def _place(self, backend: Backend, rows: Any, data: Any) -> draws.Place:
        """Which rows a replica has. With `random_off` the replicas meet to find out where each one's begin."""
        static = keras.tree.flatten(data)[0].shape[0]
        rows = tf.cast(rows, tf.int64)
        replicas = backend.topology.num_replicas
        if replicas == 1:
            indices = _order(rows) if self.permuted else tf.range(rows)
            return draws.Place(indices, rows, static, whole=not self.permuted)
        if not self.random_off:
            return draws.Place(tf.range(rows), rows, static, whole=True)
        own = tf.one_hot(backend.replica(), replicas, dtype=tf.int64) * rows
        (counts,) = backend.sum([own], name="check.rows")
        total = tf.reduce_sum(counts)
        first = tf.minimum(tf.reduce_sum(counts[: backend.replica()]), total - 1)
        return draws.Place(tf.range(first, first + tf.maximum(rows, 1)), total, static, whole=False)


def put(owner: Any, **functions: Callable[..., Any]) -> None:
    """Functions in the place of a class's or a module's own, for the rest of this process."""
    for name, function in functions.items():
        setattr(owner, name, function)


def random_layers(model: Any) -> list[Any]:
    """The layers that keep a random stream, the model itself among them."""
    return [
        layer
        for layer in model._flatten_layers()
        if any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    ]


def _never_training(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def called(*arguments: Any, **options: Any) -> Any:
        return call(*arguments, **(options | {"training": False}))

    return called


def _order(rows: Any) -> Any:
    """An order of so many rows that depends on nothing else."""
    last = tf.maximum(rows, 1) - 1
    return tf.random.experimental.index_shuffle(tf.range(rows), seed=(1, 2), max_index=last)


def _permuted_batch(fingerprint: Any, shards: Any) -> Any:
    ((rows, data),) = shards
    order = _order(rows)
    return fingerprint, ((rows, tf.nest.map_structure(lambda leaf: _in_order(leaf, order), data)),)


def _in_order(leaf: Any, order: Any) -> Any:
    if leaf is None:
        return None
    if isinstance(leaf, tf.SparseTensor):
        return tf.sparse.from_dense(tf.gather(tf.sparse.to_dense(leaf), order))
    return tf.gather(leaf, order)


def _digest(rows: int, data: Any) -> int:
    """The sum of a number for each row, of all its bytes."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    arrays: Sequence[Any] = [np.asarray(leaf) for leaf in leaves if isinstance(leaf, tf.Tensor)]
    return sum(_of_bytes(b"".join(_bytes(array[row]) for array in arrays)) for row in range(rows))


def _bytes(row: Any) -> bytes:
    # Strings are objects to NumPy, and a row of them alone is one.
    return row if isinstance(row, bytes) else repr(row.tolist()).encode() if row.dtype.hasobject else row.tobytes()


def _of_bytes(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big")
