"""One replica while a model's own step is traced on it: its share of the rows, and what it has to agree on with others.

    replica = Replica(model, wire, AS_THEY_ARE, rows, all_rows, data)
    replica.upstream(loss, None)               # where its backward pass starts
    replica.summed(gradients, weights)         # the gradients of all replicas
    replica.finished(logs)                     # what the step leaves behind, made alike

training/own_hooks.py calls it where a step meets Keras and TensorFlow; training/own_step.py says what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from distfit.errors import InputError
from distfit.log import warn_once
from distfit.training import reduction, terms
from distfit.training.origin import Origin, Origins
from distfit.training.reduction import Packing

if TYPE_CHECKING:
    from distfit.training.wire import Wire


class Replica:
    """One replica while its step is traced (or run eagerly): its share of the rows, and what it has to agree on.

    Args:
        model, wire, packing: as of `OwnStep`.
        rows: how many this replica has, a float64 scalar.
        all_rows: how many the global batch has.
        data: what only this replica sees.
    """

    def __init__(self, model: Any, wire: Wire, packing: Packing, rows: Any, all_rows: Any, data: Any) -> None:
        self._model = model
        self._wire = wire
        self._packing = packing
        self._has_rows = tf.cast(rows > 0, tf.float64)
        self.row_share = tf.math.divide_no_nan(rows, all_rows)
        self.origins = Origins([data, rows, self._has_rows, self.row_share])
        self.updating = False
        self._assigned: dict[int, Any] = {}
        self._results: list[Any] = []

    def upstream(self, target: Any, given: Any) -> list[Any]:
        """Where the backward passes of these losses start: at this replica's share of the global loss.

        A scalar is a mean over rows and has the share of its rows; losses row by row are summed, so each is whole.
        """
        targets = tf.nest.flatten(target)
        weights = [self.row_share if _is_mean(loss) else self._has_rows for loss in targets]
        givens = [None] * len(targets) if given is None else tf.nest.flatten(given)
        starts = [tf.ones_like(loss) if one is None else one for loss, one in zip(targets, givens, strict=True)]
        return [start * tf.cast(weight, start.dtype) for start, weight in zip(starts, weights, strict=True)]

    def summed(self, gradients: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        """Gradients of these weights over all replicas, None where there is none; they may be derived once more."""
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        # A replica without rows counts for nothing, not even where its gradient is not finite.
        own = [reduction.counted(gradients[index], self._has_rows) for index in there]
        shapes = [weights[index].shape for index in there]
        wire: Any = _Differentiable(self._wire)
        totals = reduction.summed(wire, own, shapes, self._packing)
        self.origins.same(totals)
        found = dict(zip(there, totals, strict=True))
        return [found.get(index) for index in range(len(gradients))]

    def by_rows(self, value: Any, divisor: Any) -> Any:
        """A loss such that its mean over the replicas, weighted by rows, is that of the global batch.

        Args:
            value: what Keras computes on this replica.
            divisor: what it divided by; `terms.NO_NORMALISER` for a sum.
        """
        part = self._has_rows
        if divisor is not terms.NO_NORMALISER:
            own = tf.stop_gradient(self._has_rows * divisor)
            (total,) = self._wire.sum([own], name="loss")
            part = tf.math.divide_no_nan(own, total)
        return value * tf.cast(tf.math.divide_no_nan(part, self.row_share), value.dtype)

    def alike(self, values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Values that are the same on every replica: of those that are not, their mean, weighted by rows."""
        own = [index for index, value in enumerate(values) if value is not None and self._is_own(value)]
        means = self._mean([values[index] for index in own], [variables[index].shape for index in own])
        found = dict(zip(own, means, strict=True))
        return [found.get(index, value) for index, value in enumerate(values)]

    def note_assigned(self, weight: Any, value: Any) -> None:
        """The step assigns a value to a weight; what only this replica has becomes the mean when the step ends."""
        if self.updating or not self._is_own(value):
            return
        if "float" not in weight.dtype:
            raise InputError(
                f"Expected {type(self._model).__name__} to change weights of whole numbers alike on all replicas, "
                f"received a value for {weight.path} that is made of one replica's rows, of which there is no mean. "
                "Make it a keras.metrics.Sum, whose parts are added up, or train with one replica."
            )
        self._assigned[id(weight)] = weight

    def depends_on_rows(self, weight: Any) -> bool:
        """Whether a weight adds up over replicas by itself: how many rows there are, in Keras' own steps."""
        return self.origins.of(weight) is Origin.ROWS

    def note_result(self, result: Any) -> Any:
        """A metric's result, of which this replica sees its own part only."""
        self._results.extend(tf.nest.flatten(result))
        self.origins.of_metrics([result])
        return result

    def finished(self, logs: Any) -> tuple[dict, set[str]]:
        """What the step leaves behind made alike: assigned weights, and what it returned beside its metrics.

        Returns:
            The logs, and the names in them that are no metric's result.
        """
        logs = dict(_flattened(logs)) if isinstance(logs, dict) else {}
        metrics = {id(result) for result in self._results}
        others = {name: value for name, value in logs.items() if id(value) not in metrics}
        from_rows = {name: value for name, value in others.items() if self.origins.of(value) is Origin.ROWS}
        averaged = {name: value for name, value in from_rows.items() if is_scalar(value)}
        self._leave_out(logs, [name for name in others if name not in averaged and self._is_own(others[name])])
        weights = list(self._assigned.values())
        values = [*(tf.convert_to_tensor(weight.value) for weight in weights), *averaged.values()]
        means = self._mean(values, [value.shape for value in values])
        self.updating = True
        for weight, mean in zip(weights, means, strict=False):
            weight.assign(mean)
        logs.update(zip(averaged, means[len(weights) :], strict=True))
        return logs, set(others) & set(logs)

    def _leave_out(self, logs: dict, names: Sequence[str]) -> None:
        for name in names:
            del logs[name]
        if names:
            warn_once(
                f"{', '.join(names)} in what {type(self._model).__name__}'s step returns is neither a metric's result "
                "nor a scalar that was computed from rows, so that replicas have no common value of it: left out. Make "
                "it a keras.metrics.Metric of the model."
            )

    def _mean(self, values: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        parts = [reduction.counted(tf.convert_to_tensor(value), self.row_share) for value in values]
        totals = reduction.sum_in_buckets(self._wire, parts, shapes)
        self.origins.same(totals)
        return totals

    def _is_own(self, value: Any) -> bool:
        return self.origins.of(value) is not Origin.SAME


class _Differentiable:
    """A wire through whose sums gradients flow. Rows of embeddings are put together, not summed, and end there."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return [self._wire.differentiable_sum(tensor, name) for tensor in tensors]

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return self._wire.gather(tensors, name)

    def alike(self, tensor: Any) -> bool:
        return self._wire.alike(tensor)

    def witness(self, own: Any, total: Any) -> None:
        self._wire.witness(own, total)


def _flattened(logs: dict) -> Iterator[tuple[str, Any]]:
    """Names and values, those of `compile_metrics` included, as Keras flattens them."""
    for name, value in logs.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield name, value


def is_scalar(value: Any) -> bool:
    """Whether it is one floating-point number, as a tensor."""
    return tf.is_tensor(value) and value.shape.rank == 0 and value.dtype.is_floating


def _is_mean(loss: Any) -> bool:
    """Whether a loss is one number, and not one for each row: of which an eager replica may have one."""
    return loss.shape.rank == 0 or (not tf.executing_eagerly() and loss.shape.num_elements() == 1)
