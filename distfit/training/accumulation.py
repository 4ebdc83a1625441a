"""Gradient accumulation with one communication an update: what lies in the accumulators in between.

An optimizer with `gradient_accumulation_steps=k` keeps a running sum of gradients and updates the weights on
every k-th batch. Each replica keeps the sum of its own addends, and only on the k-th batch the replicas add
up what they have. So between two updates a replica's accumulators are a *part*: their sum over the replicas is
what one device would hold.

    accumulation = Accumulation(model, backend, wire)
    accumulation.begin()                       # parts, from what the model was given with
    accumulation.updates()                     # whether the next batch ends an update; counts it
    accumulation.gather()                      # every replica holds the whole: to save, to show, to end

Outside of an epoch's batches accumulators are whole, so that a saved model is Keras' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.training.reduction import sum_in_buckets

if TYPE_CHECKING:
    from distfit.backends.base import Backend
    from distfit.training.wire import Wire


def batches_per_update(model: Any) -> int:
    """How many batches of a run make one communication of gradients.

    An optimizer that wraps others (LossScaleOptimizer, MultiOptimizer) leaves accumulation to them: whether a batch
    counts is then decided on the device, from the summed gradient, so that every batch communicates.
    """
    return getattr(getattr(model, "optimizer", None), "gradient_accumulation_steps", None) or 1


class Accumulation:
    """The accumulators of one model's optimizer on one engine.

    Args:
        model: compiled and built.
        backend: has adopted the model.
        wire: carries the parts.
        active: False where a model's own train_step calls the optimizer, which then gets sums every time.
    """

    def __init__(self, model: Any, backend: Backend, wire: Wire, active: bool) -> None:
        self._optimizer: Any = getattr(model, "optimizer", None)
        self._backend = backend
        self._wire = wire
        self._every = batches_per_update(model) if active and backend.topology.num_replicas > 1 else 1
        self._seen = 0
        self._functions: dict[str, Callable[[], Any]] = {}

    def begin(self) -> None:
        """Take up where the optimizer stands; the first replica holds what there is. Collective."""
        if self._every > 1:
            (counted, *_) = self._backend.replica_values(self._optimizer._iterations)
            self._seen = int(counted)
            self._on_all_replicas("part", self._part)

    def updates(self) -> bool:
        """Whether the next batch ends an update; counts it."""
        self._seen += 1
        return self._seen % self._every == 0

    def gather(self) -> None:
        """Every replica holds the sum of all parts. Collective."""
        self._on_all_replicas("gather", self._whole)

    def taken(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Inside a step that updates: gradients with what was accumulated, of which nothing is left behind."""
        if self._every == 1:
            return list(gradients)
        # A loss scale is divided out by Keras before it accumulates.
        scale = self._optimizer.loss_scale_factor or 1
        return [
            gradient + tf.cast(scale, gradient.dtype) * self._emptied(variable)
            for gradient, variable in zip(map(tf.convert_to_tensor, gradients), variables, strict=True)
        ]

    def _emptied(self, variable: Any) -> tf.Tensor:
        accumulator = self._optimizer._accumulated_gradients[self._optimizer._get_variable_index(variable)]
        held = tf.identity(accumulator.value)
        accumulator.assign(tf.zeros_like(held))
        return held

    def _on_all_replicas(self, name: str, function: Callable[[], None]) -> None:
        """Nothing to do where an update has just ended."""
        if self._seen % self._every:
            if name not in self._functions:
                self._functions[name] = self._traced(name, function)
            self._functions[name]()

    def _traced(self, name: str, function: Callable[[], None]) -> Callable[[], Any]:
        def on_replica() -> tf.Tensor:
            with self._wire.step(name):
                function()
            return tf.zeros([])

        replicas = self._backend.topology.replicas_per_process
        return tf.function(lambda: self._backend.run(on_replica, [()] * replicas), autograph=False)

    def _accumulators(self) -> list[Any]:
        return [held for held in self._optimizer._accumulated_gradients if isinstance(held, keras.Variable)]

    def _part(self) -> None:
        for accumulator in self._accumulators():
            kept = accumulator.value if self._backend.replica() == 0 else tf.zeros_like(accumulator.value)
            accumulator.assign(kept)

    def _whole(self) -> None:
        held = self._accumulators()
        totals = sum_in_buckets(self._wire, [one.value for one in held], [one.shape for one in held])
        for accumulator, total in zip(held, totals, strict=True):
            accumulator.assign(total)
