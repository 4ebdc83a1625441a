"""All devices of one process: tf.distribute.MirroredStrategy, used as a launcher of replicas.

Each replica runs the whole step, the optimizer included, on its own copy of every variable, exactly as an
MPI rank does; what they share is summed by `sum`. Three private seams of TensorFlow and Keras make that
possible, each pinned by tests/test_seams.py:

* a Keras variable's `_value` is replaced by a mirrored one with aggregation NONE, so that an assignment
  inside a replica touches that replica's copy and needs no other replica;
* `extended._use_merge_call` answers False while the optimizer runs, so that Keras' optimizer updates this
  replica's copies in place. With merge_call, gradient accumulation fails (it sits inside a tf.cond);
* `num_replicas_in_sync` answers 1 inside a replica. Keras multiplies losses by one over it in four places
  (keras/src/losses/loss.py, trainer.py) and leaves it out in others (an overridden compute_loss, reduction
  "sum"); the step does its own weighting, the same on every engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from distfit.backends.base import Backend
from distfit.backends.devices import replica_devices
from distfit.backends.hooks import build, everything_shared, hooked, of_this_thread
from distfit.backends.transport import Alone
from distfit.topology import Topology


class _Strategy(tf.distribute.MirroredStrategy):
    """MirroredStrategy whose replicas each count as one to Keras."""

    @property
    def num_replicas_in_sync(self) -> int:
        context = tf.distribute.get_replica_context()
        inside = context is not None and context.strategy is self
        return 1 if inside else super().num_replicas_in_sync


class Mirrored(Backend):
    """One process, a replica on each of its devices."""

    title = "mirrored (tf.distribute.MirroredStrategy)"

    def __init__(self, topology: Topology, devices: int | None = None) -> None:
        self.topology = topology
        self.transport = Alone()
        self._count = devices

    def start(self) -> None:
        tf.get_logger().addFilter(_is_no_chatter)
        self.devices = replica_devices(self._count)
        self.topology = self.topology.with_replicas(len(self.devices))
        self._strategy = _Strategy(self.devices, cross_device_ops=_reducer(self.devices))

    def build(self, model: Any, data_spec: Any, targets: bool = True) -> None:
        build(model, data_spec, targets)

    @contextmanager
    def adopted(self, model: Any) -> Iterator[None]:
        with everything_shared(model) as variables:
            originals = [variable._value for variable in variables]
            try:
                self._mirror(variables)
                with hooked(model, self, self._strategy, list(zip(variables, originals, strict=True))):
                    yield
            finally:
                for variable, original in zip(variables, originals, strict=True):
                    original.assign(self.replica_values(variable)[0])
                    variable._value = original

    def _mirror(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            with self._strategy.scope():
                variable._value = tf.Variable(
                    variable._value.numpy(),
                    dtype=variable._value.dtype,
                    # Of the value, not of the Keras variable, which may have changed its mind since: the tape asks
                    # the value, so that Keras gives no gradient to what was frozen when it was made.
                    trainable=variable._value.trainable,
                    name=variable.name,
                    aggregation=tf.VariableAggregation.NONE,
                )

    def run(self, function: Callable[..., Any], shards: Sequence[Sequence[Any]]) -> list[Any]:
        take_over = of_this_thread()

        def on_replica() -> Any:
            take_over()
            return function(*shards[self.replica()])

        return _by_replica(self._strategy.run(on_replica), len(self.devices))

    def replica(self) -> int:
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        # A constant tensor where the replica is traced into a graph, an int where it runs eagerly.
        return int(number if isinstance(number, int) else tf.get_static_value(number))

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        if not tensors:
            return []
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(tensors))

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        context = tf.distribute.get_replica_context()
        return [context.all_gather(tensor, axis=0) for tensor in tensors]

    @contextmanager
    def updating(self) -> Iterator[None]:
        # Replicas are traced one after the other between two merge calls, and the optimizer makes none.
        extended = self._strategy.extended
        extended._use_merge_call = lambda: False
        try:
            yield
        finally:
            del extended._use_merge_call

    def first_copy(self, variable: Any) -> Any:
        value = variable._value
        return value.values[0] if hasattr(value, "values") else value

    def replica_values(self, variable: Any) -> list[Any]:
        value = variable._value
        copies = value.values if hasattr(value, "values") else [value]
        return [copy.numpy() for copy in copies]


def _is_no_chatter(record: logging.LogRecord) -> bool:
    """Not that a strategy was made, nor each of its reductions: TensorFlow says so in interactive sessions, and the
    start block has said it."""
    return record.levelno > logging.INFO or record.module not in ("mirrored_strategy", "cross_device_ops")


def _reducer(devices: Sequence[str]) -> tf.distribute.CrossDeviceOps | None:
    """How replicas sum: TensorFlow's choice on GPUs (NCCL), one addition after the other on CPUs.

    TensorFlow's collective ops know groups by a key that two strategies of one process share, so that a
    second one of another size fails, and one failed step fails all that follow ("Restart your program").
    """
    if any("GPU" in device for device in devices):
        return None
    return tf.distribute.ReductionToOneDevice(accumulation_fn=_in_order)


def _in_order(addends: Sequence[Any]) -> Any:
    """The sum of the replicas' tensors, one after the other.

    `tf.add_n`, the default, begins with whichever addend's buffer nobody else holds any more when it runs
    (tensorflow/core/kernels/aggregate_ops.cc), so that three replicas or more would not end with the same bits in every
    run. TensorFlow's graph optimiser makes an `add_n` of additions in a row; what cannot be folded between them
    prevents it.
    """
    total = addends[0]
    for addend in addends[1:]:
        total = tf.raw_ops.PlaceholderWithDefault(input=total + addend, shape=total.shape)
    return total


def _by_replica(results: Any, replicas: int) -> list[Any]:
    def pick(number: int) -> Any:
        return tf.nest.map_structure(
            lambda value: value.values[number] if isinstance(value, tf.distribute.DistributedValues) else value,
            results,
        )

    return [pick(number) for number in range(replicas)]
