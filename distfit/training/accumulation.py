"""Gradient accumulation with one communication an update: what lies in the accumulators in between.

An optimizer with `gradient_accumulation_steps=k` keeps a running sum of gradients and updates the weights on
every k-th batch. Each replica keeps the sum of its own addends, and only on the k-th batch the replicas add
up what they have. So between two updates a replica's accumulators are a *part*: their sum over the replicas is
what one device would hold.

    accumulation = Accumulation(model, backend, wire)
    with accumulation.in_parts():              # around the batches of an epoch, also those that an exception ends
        accumulation.updates()                 # whether the next batch ends an update; counts it

Outside of an epoch's batches accumulators are whole, so that a saved model is Keras' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import optimizers_of
from distfit.errors import RunError, on_every_rank
from distfit.training.own_step import overrides
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


def communicates_every_batch(model: Any) -> bool:
    """Whether a model accumulates gradients of which replicas nevertheless send every batch's.

    >>> def communicates(optimizer):
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     model.compile(optimizer, "mse")
    ...     return communicates_every_batch(model)
    >>> own = keras.optimizers.SGD(gradient_accumulation_steps=2)
    >>> communicates(own), communicates(keras.optimizers.LossScaleOptimizer(own))
    (False, True)
    """
    optimizers = optimizers_of(model)
    if not any(optimizer.gradient_accumulation_steps for optimizer in optimizers):
        return False
    return overrides(model, "train_step") or batches_per_update(model) == 1


class Accumulation:
    """The accumulators of one model's optimizer on one engine.

    Args:
        model: compiled and built.
        backend: has adopted the model.
        wire: carries the parts.
        active: False where a model's own train_step calls the optimizer, which then gets sums every time.
    """

    def __init__(self, model: Any, backend: Backend, wire: Wire, active: bool) -> None:
        self._model = model
        self._optimizer: Any = getattr(model, "optimizer", None)
        self._backend = backend
        self._wire = wire
        self._every = batches_per_update(model) if active and backend.topology.num_replicas > 1 else 1
        self._seen = 0
        self._functions: dict[str, Callable[[], Any]] = {}

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Around the batches of an epoch: the first replica holds what there was, and in the end every replica holds
        the sum of all parts. Collective.

        Raises:
            RunError: a callback has set the optimizer's iterations meanwhile.
        """
        if self._every == 1:
            yield
            return
        self._seen = self._counted()
        if self.in_the_middle():
            self._on_all_replicas("part", self._part)
        try:
            yield
        except BaseException:
            # Ctrl-C, or a callback: whoever goes on with the model has all of it. Other processes may not arrive.
            if self._backend.topology.size == 1:
                self._on_all_replicas("gather", self._whole)
            raise
        self._check_count()
        if self.in_the_middle():
            self._on_all_replicas("gather", self._whole)

    def updates(self) -> bool:
        """Whether the next batch ends an update; counts it."""
        self._seen += 1
        return self._seen % self._every == 0

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

    def in_the_middle(self) -> bool:
        """Whether replicas hold parts of gradients that no update has applied."""
        return self._seen % self._every != 0

    def _on_all_replicas(self, name: str, function: Callable[[], None]) -> None:
        if name not in self._functions:
            self._functions[name] = self._traced(name, function)
        self._functions[name]()

    def _counted(self) -> int:
        (counted, *_) = self._backend.replica_values(self._optimizer._iterations)
        return int(counted)

    def _check_count(self) -> None:
        counted = self._counted()
        # A model of which nothing is trained counts nothing.
        if self._model.trainable_weights and counted != self._seen:
            raise on_every_rank(
                RunError(
                    f"Expected an optimizer with gradient_accumulation_steps={self._every} to have seen {self._seen} "
                    f"batches at the end of this epoch, received {counted}: something has set its iterations between "
                    "two batches, so that replicas updated with their own parts of gradients. Set them between "
                    "epochs, or train with one replica."
                )
            )

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
