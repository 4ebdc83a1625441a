"""The step: what one replica computes from its rows, the same program on every engine.

    forward -> this replica's share (one small all-reduce) -> loss -> backward -> sum over all replicas
            -> clip, decay, update (Keras' optimizer) -> metrics

The pieces are Keras' own (compute_loss, metrics, optimizer); their order, and everything between replicas,
is ours. With one replica it is keras.Model.train_step to the bit (tests/test_engines.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from distfit.training.share import Part, Whole

if TYPE_CHECKING:
    from distfit.backends.base import Backend


class Step:
    """The training, test and predict step of one model on one engine.

    Every method takes what one replica got: `rows` (int64 scalar: how many rows of `data` count, or 0 for a
    replica without rows, which computes one repeated row at weight zero), `flags` (float64 vector, summed
    over the replicas and returned) and `data` (x, y, sample_weight as Keras packs them, batch first).

    Args:
        model: compiled; built unless one replica is all there is.
        backend: the engine that has adopted the model.
    """

    def __init__(self, model: Any, backend: Backend) -> None:
        self._model = model
        self._backend = backend
        alone = backend.topology.num_replicas == 1
        self._share = Whole() if alone else Part(backend, opaque=overrides(model, "compute_loss"))

    def installed(self) -> AbstractContextManager[Any]:
        """Held around all steps of a run: the model tells the step what several replicas have to know."""
        return self._share.installed(self._model)

    def train(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """One update; Keras' logs as this replica sees them, and the summed flags."""
        if overrides(self._model, "train_step"):
            return self._model.train_step(data), flags
        # From the first line: layers and an overridden compute_loss may feed metrics as well.
        with self._share.kept(metric_variables(self._model), rows):
            return self._train(rows, flags, data)

    def test(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """The loss and metrics of this replica's rows; Keras' logs as it sees them, and the summed flags."""
        if overrides(self._model, "test_step"):
            return self._model.test_step(data), flags
        with self._share.kept(metric_variables(self._model), rows):
            return self._test(rows, flags, data)

    def predict(self, rows: Any, flags: Any, data: Any) -> tuple[Any, Any]:
        """The outputs for this replica's rows, none for a replica without; and its own flags."""
        outputs = self._model.predict_step(data)
        return self._share.rows_of(outputs, rows), flags

    def _train(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        model, (x, y, sample_weight) = self._model, unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            with self._share.moving_averages() as moved:
                y_pred = self._forward(x, training=True)
            weights, loss = self._loss(x, y, y_pred, sample_weight, rows, flags, training=True)
            own_loss = model.optimizer.scale_loss(weights.own_loss(loss))
        gradients = tape.gradient(own_loss, model.trainable_weights)
        self._update(weights, gradients, moved)
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight), weights.agreed

    def _test(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        x, y, sample_weight = unpack_x_y_sample_weight(data)
        y_pred = self._forward(x, training=False)
        weights, _ = self._loss(x, y, y_pred, sample_weight, rows, flags, training=False)
        return self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight), weights.agreed

    def _forward(self, x: Any, training: bool) -> Any:
        return self._model(x, training=training) if self._model._call_has_training_arg else self._model(x)

    def _loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, rows: Any, flags: Any, training: bool
    ) -> tuple[Any, Any]:
        model = self._model
        additional = self._share.additional_losses(model)
        weights = self._share.measure(model, y, y_pred, sample_weight, rows, flags)

        def compute_loss() -> Any:
            return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

        loss = weights.loss(model, compute_loss, additional)
        model._loss_tracker.update_state(loss, sample_weight=weights.tracked_rows(x))
        return weights, loss

    def _update(self, weights: Any, gradients: list[Any], moved: list[Any]) -> None:
        """Sum gradients and average moving statistics in one reduction, then let the optimizer update."""
        variables = self._model.trainable_weights
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        statistics = weights.averaged([variable.value for variable in moved])
        summed = self._share.summed(
            [*(gradients[index] for index in present), *statistics],
            [*(variables[index].shape for index in present), *(variable.shape for variable in moved)],
        )
        reduced = dict(zip(present, summed, strict=False))
        for variable, mean in zip(moved, summed[len(present) :], strict=True):
            variable.assign(mean)
        if variables:
            with self._backend.updating():
                self._model.optimizer.apply_gradients(
                    [(reduced.get(index), variable) for index, variable in enumerate(variables)]
                )


def overrides(model: Any, method: str) -> bool:
    """Whether the model's class has its own version of a method of keras.Model."""
    return getattr(type(model), method) is not getattr(keras.Model, method)


def metric_variables(model: Any) -> list[Any]:
    """The state of the metrics that see rows: all but the trackers of losses, which see the whole step."""
    compiled = model._compile_loss
    trackers = [model._loss_tracker, *(compiled.metrics if compiled is not None else [])]
    left_out = {id(variable) for tracker in trackers if tracker is not None for variable in tracker.variables}
    return [variable for variable in model.metrics_variables if id(variable) not in left_out]
