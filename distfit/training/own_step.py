"""A model's own `train_step` or `test_step` on several replicas: the user's code as it is, the same training.

    own = OwnStep(model, backend, wire)
    with own.installed():                                   # around all steps of a run
        logs, agreed = own.run("train_step", rows, flags, data)    # inside of each, as every replica runs it
    own.results("train_step", logs, totals)                 # what a callback sees, of the metrics' global results

What such a step does with its data cannot be looked into, so one rule holds: **a number that it computes is a mean
over the replica's rows**. What distfit does about it, at the places where a step meets Keras and TensorFlow:

* `tape.gradient(loss, weights)` answers the gradient of the *global* loss: each replica's backward pass starts from
  its share of the rows, and the gradients are summed. So everything that follows (clipping, norms, accumulation,
  optimizers, weights moved along a gradient) sees what one device sees. A loss that is a vector is summed over all
  rows, as the tape sums it. Gradients of inputs (a gradient penalty, say) stay with their rows.
* A `keras.losses.Loss`, compiled or held by the model, is exact whatever its reduction, mask and weights: its divisor
  is summed over the replicas (training/terms.py), and its value made such that the rule gives the global one.
* `optimizer.apply` and `weight.assign` get what is the same on all replicas (training/origin.py) as it is, and of
  anything else its mean over the replicas, weighted by rows: the replicas' weights never differ.
* A scalar given to a `keras.metrics.Mean` counts by rows (training/metric_updates.py, which has the rules of other
  metrics), and so does a scalar that the step returns and that is no metric's result.

Summing at the tape rather than at the optimizer is what makes a step exact that clips by itself, accumulates by hand
(no collective has to lie in the branch that applies) or climbs along a gradient first (SAM, arXiv:2010.01412). And as
the share is in the loss before the backward pass and not in the gradient after it, gradients may flow through other
collectives: synchronised BatchNormalization, or a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from distfit.backends.hooks import variables_of
from distfit.errors import InputError
from distfit.training import batch_norm, means, metric_updates
from distfit.training.changes import changed_elsewhere
from distfit.training.own_hooks import hooked, running
from distfit.training.reduction import AS_THEY_ARE, Packing
from distfit.training.replica import Replica

if TYPE_CHECKING:
    from distfit.backends.base import Backend
    from distfit.training.wire import Wire

STEPS = ("train_step", "test_step")


class OwnStep:
    """The steps that a model brings itself, on one engine.

    Args:
        model: compiled; built (see `build`) unless one replica is all there is.
        backend: the engine that has adopted the model.
        wire: sums over the replicas.
        sync_batch_norm: BatchNormalization takes the moments of the global batch.
        packing: how gradients travel.
    """

    def __init__(
        self,
        model: Any,
        backend: Backend,
        wire: Wire,
        sync_batch_norm: bool = False,
        packing: Packing = AS_THEY_ARE,
    ) -> None:
        self._model = model
        self._backend = backend
        self._wire = wire
        self._sync_batch_norm = sync_batch_norm
        self._packing = packing
        self._alone = backend.topology.num_replicas == 1
        self._means: dict[str, set[str]] = {method: set() for method in STEPS}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Around all steps of a run: what a step meets asks the replica that is being traced. Undone at the end."""
        model = self._model
        if self._alone or not any(overrides(model, method) for method in STEPS):
            yield
            return
        alike = batch_norm.weights_of(batch_norm.layers_of(model, everywhere=self._sync_batch_norm))
        with hooked(model, self._backend, alike):
            yield

    def run(self, method: str, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """The model's own step on what one replica got; its logs, and the flags summed over all replicas.

        Args:
            method: one of `STEPS`.
            rows, flags, data: as in training/step.py.

        Raises:
            InputError: something would have to be summed where some replicas might not arrive (see training/wire.py),
                or the step does what replicas cannot do alike.
        """
        step = getattr(self._model, method)
        if self._alone:
            return step(data), flags
        local = tf.concat([tf.cast(rows, tf.float64)[None], flags], axis=0)
        (total,) = self._wire.sum([local], name="small")
        replica = Replica(self._model, self._wire, self._packing, local[0], total[0], data)
        seen = metric_updates.Here(self._wire, rows, data, from_rows=replica.depends_on_rows)
        seen.met(replica.row_share)
        states = self._model.metrics_variables
        with (
            means.kept(states, rows, seen.alike),
            batch_norm.counting(rows),
            running(replica),
            metric_updates.here(seen),
        ):
            logs = step(data)
            logs, self._means[method] = replica.finished(logs)
        return logs, total[1:]

    def results(self, method: str, logs: dict, totals: dict) -> dict:
        """What Keras would show of a step's logs: the metrics if they are all of them, else what the step returned.

        Args:
            logs: of the last step.
            totals: the results of the model's metrics over all replicas, by name.
        """
        if set(logs) == set(totals):
            return totals
        own = self._means[method]
        return {name: totals[name] if name in totals and name not in own else value for name, value in logs.items()}


def overrides(model: Any, method: str) -> bool:
    """Whether the model's class has its own version of a method of keras.Model."""
    return getattr(type(model), method) is not getattr(keras.Model, method)


def notes(model: Any) -> list[str]:
    """What cannot be equal to one device when the model brings its own steps, for the start of a run."""
    own = [method for method in STEPS if overrides(model, method)]
    if not own:
        return []
    return [
        f"The model's own {' and '.join(own)}: what it computes counts as a mean over rows. A sum over the batch, or a "
        "loss that compares its rows with each other, sees the rows of one replica (docs: guides/own_steps)."
    ]


def build(model: Any, method: str, data_spec: Any) -> None:
    """Make every variable that the first trace of a model's step would make, and check that replicas can share them.

    The step is traced into a graph that is thrown away: no weight changes and no random stream moves, but what it does
    in Python happens, as in every trace.

    Args:
        method: one of `STEPS`; the model's own or Keras'.
        data_spec: tf.TypeSpecs of the (x, y, sample_weight) that it will see.

    Raises:
        InputError: the step changes something that is not the model's, of which replicas would have no copies.
    """
    if any(isinstance(variable._value, tf.distribute.DistributedValues) for variable in variables_of(model)):
        # A call inside of a training, by a callback: replicas share the model already.
        return
    # As Keras traces it: without AutoGraph.
    step = tf.function(lambda data: getattr(model, method)(data), autograph=False)
    graph = step.get_concrete_function(data_spec).graph
    # Keras' global random stream is shared too, if it has been made: to ask for it would make it.
    stream = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    foreign = changed_elsewhere(graph, [*variables_of(model), *([] if stream is None else [stream.state])])
    if foreign:
        raise InputError(
            f"Expected all that {type(model).__name__}.{method} changes to be found on the model (weights, "
            f"optimizers, metrics, random streams), received {', '.join(foreign)}, of which replicas would have no "
            "copies and a checkpoint no value. Make it a Keras object in an attribute of the model (self.d_optimizer = "
            "..., self.add_weight(...), no tf.Variable), and name a metric in `metrics`."
        )
