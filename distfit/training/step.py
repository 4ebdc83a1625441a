"""The step: what one replica computes from its rows, the same program on every engine.

    forward -> this replica's share (one small all-reduce) -> loss -> backward -> sum over all replicas
            -> clip, decay, update (Keras' optimizer) -> metrics

The pieces are Keras' own (compute_loss, metrics, optimizer); their order, and everything between replicas,
is ours. With one replica it is keras.Model.train_step to the bit (tests/test_engines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from distfit.log import warn_once
from distfit.training import batch_norm, metric_updates, programs
from distfit.training.accumulation import Accumulation
from distfit.training.own_step import OwnStep, overrides
from distfit.training.reduction import BUCKET_BYTES, Packing
from distfit.training.share import Part, Whole
from distfit.training.wire import Transfer, Wire

if TYPE_CHECKING:
    from distfit.backends.base import Backend


@dataclass(frozen=True)
class Choices:
    """What a user may choose about how replicas work together.

    Args:
        sync_batch_norm: BatchNormalization takes the moments of the global batch, as one device does.
        reduction_dtype: gradients travel and are added in this type ("float16", say); None in their own.
        bucket_bytes: of gradients that travel together, at most.
    """

    sync_batch_norm: bool = False
    reduction_dtype: str | None = None
    bucket_bytes: int = BUCKET_BYTES

    @property
    def packing(self) -> Packing:
        """How gradients travel."""
        return Packing(self.reduction_dtype, self.bucket_bytes)


class Step:
    """The training, test and predict step of one model on one engine.

    Every method takes what one replica got: `rows` (int64 scalar: how many rows of `data` count, or 0 for a
    replica without rows, which computes one repeated row at weight zero), `flags` (float64 vector, summed
    over the replicas and returned) and `data` (x, y, sample_weight as Keras packs them, batch first).

    Args:
        model: compiled; built unless one replica is all there is.
        backend: the engine that has adopted the model.
        choices: of the user.

    Attributes:
        transfers: of each step that was traced, by name: its collectives in their order.
        accumulation: says which batches end an update.
    """

    def __init__(self, model: Any, backend: Backend, choices: Choices) -> None:
        self._model = model
        self._backend = backend
        self._wire = Wire(backend)
        replicas = backend.topology.num_replicas
        self._alone = replicas == 1
        opaque = overrides(model, "compute_loss")
        self._share = (
            Whole() if self._alone else Part(self._wire, replicas, opaque, choices.sync_batch_norm, choices.packing)
        )
        self._own = OwnStep(model, backend, self._wire, choices.sync_batch_norm, choices.packing)
        # With synchronised moments a collective lies inside the forward pass.
        self._in_parts = bool(model.jit_compile and not backend.supports_jit and not synchronises(model, choices))
        self._program = programs.compiled if self._in_parts else programs.as_it_is
        self.accumulation = Accumulation(model, backend, self._wire, active=not overrides(model, "train_step"))
        self.transfers: dict[str, list[Transfer]] = {}

    def expect(self, ragged: bool) -> None:
        """Before the first step: whether data of replicas may differ in more than their number of rows."""
        self._wire.ragged = ragged

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Held around all steps of a run: the model tells the step what several replicas have to know."""
        with self._share.installed(self._model), self._own.installed():
            yield

    def next_training(self) -> Callable[..., tuple[dict, Any]]:
        """The step for the next batch: `train` where an update ends, else `accumulate`."""
        return self.train if self.accumulation.updates() else self.accumulate

    def train(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """One update; Keras' logs as this replica sees them, and the summed flags; with several replicas followed by
        `Wire.evidence`."""
        return self._train("train", rows, flags, data)

    def accumulate(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """As `train`, for a batch that ends no update: its gradients stay on the replica."""
        return self._train("accumulate", rows, flags, data)

    def test(self, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        """The loss and metrics of this replica's rows; Keras' logs as it sees them, and the summed flags."""
        if overrides(self._model, "test_step"):
            with self._recorded("test", [rows, data]):
                return self._own.run("test_step", rows, flags, data)
        with self._recorded("test", [rows, data]), self._counting(rows, data):
            batch = unpack_x_y_sample_weight(data)
            weights, y_pred = self._test(batch, rows, flags)
            return self._metrics(batch, y_pred, weights), weights.agreed

    def predict(self, rows: Any, flags: Any, data: Any) -> tuple[Any, Any]:
        """The outputs for this replica's rows, none for a replica without; and its own flags."""
        outputs = self._program(lambda: self._model.predict_step(data))
        return self._share.rows_of(outputs, rows), flags

    def results(self, method: str, logs: dict, totals: dict) -> dict:
        """What callbacks see of the last step's logs.

        Args:
            method: of the model, "train_step" or "test_step".
            totals: the results of the model's metrics over all replicas, by name.
        """
        if overrides(self._model, method):
            return self._own.results(method, logs, totals)
        unknown = sorted(set(logs) - set(totals))
        if unknown:
            warn_once(
                f"{', '.join(unknown)} in what compute_metrics returns is no metric of the model, so that replicas "
                "cannot add it up: left out. Make it a keras.metrics.Metric of the model."
            )
        return totals

    def _train(self, name: str, rows: Any, flags: Any, data: Any) -> tuple[dict, Any]:
        if overrides(self._model, "train_step"):
            with self._recorded(name, [rows, data]):
                logs, agreed = self._own.run("train_step", rows, flags, data)
                return logs, self._with_evidence(agreed)
        with self._recorded(name, [rows, data]), self._counting(rows, data):
            batch = unpack_x_y_sample_weight(data)
            gradients_of = self._compiled_gradients if self._in_parts else self._gradients
            weights, y_pred, gradients = gradients_of(batch, rows, flags)
            self._update(gradients, ends_update=name == "train")
            return self._metrics(batch, y_pred, weights), self._with_evidence(weights.agreed)

    def _with_evidence(self, agreed: Any) -> Any:
        """The summed flags, and behind them `Wire.evidence`, where there are replicas to sum."""
        return agreed if self._alone else tf.concat([agreed, self._wire.evidence()], axis=0)

    def _gradients(self, batch: tuple, rows: Any, flags: Any) -> tuple[Any, Any, list[Any]]:
        """This replica's weights in the batch, its outputs and its addends of the gradients."""
        with tf.GradientTape() as tape:
            seen = self._see(batch, training=True)
            weights = self._share.measure(seen.normalisers, seen.moved, rows, flags)
            own_loss = self._own_loss(batch, seen, weights)
        gradients = weights.counted(tape.gradient(own_loss, self._model.trainable_weights))
        _assign(seen.moved, weights.means)
        return weights, seen.y_pred, gradients

    def _compiled_gradients(self, batch: tuple, rows: Any, flags: Any) -> tuple[Any, Any, list[Any]]:
        """The same from one XLA program, before which replicas meet."""
        weights = self._share.measure(self._previewed(batch, training=True), [], rows, flags)
        moved: list[Any] = []

        def forward_and_backward() -> tuple[Any, list[Any]]:
            with tf.GradientTape() as tape:
                seen = self._see(batch, training=True)
                own_loss = self._own_loss(batch, seen, weights)
            moved.extend(seen.moved)
            return seen.y_pred, weights.counted(tape.gradient(own_loss, self._model.trainable_weights))

        y_pred, gradients = programs.compiled(forward_and_backward)
        _assign(moved, self._share.averaged(moved, weights))
        return weights, y_pred, gradients

    def _test(self, batch: tuple, rows: Any, flags: Any) -> tuple[Any, Any]:
        """This replica's weights in the batch, and its outputs."""
        if self._in_parts:
            weights = self._share.measure(self._previewed(batch, training=False), [], rows, flags)

            def forward() -> Any:
                seen = self._see(batch, training=False)
                self._loss(batch, seen, weights, training=False)
                return seen.y_pred

            return weights, programs.compiled(forward)
        seen = self._see(batch, training=False)
        weights = self._share.measure(seen.normalisers, [], rows, flags)
        self._loss(batch, seen, weights, training=False)
        return weights, seen.y_pred

    def _previewed(self, batch: tuple, training: bool) -> list[Any]:
        """The normalisers of the losses, from a forward pass of which TensorFlow keeps only what they need (masks):
        nothing that it assigns is kept."""
        with keras.StatelessScope(), metric_updates.discarded():
            x, y, sample_weight = batch
            return self._share.normalisers(self._model, y, self._forward(x, training), sample_weight)

    def _see(self, batch: tuple, training: bool) -> _Seen:
        """The forward pass, and what can be said of it before replicas have met."""
        x, y, sample_weight = batch
        with self._share.forward() as moved:
            y_pred = self._forward(x, training)
        additional = self._share.additional_losses(self._model)
        normalisers = [] if self._in_parts else self._share.normalisers(self._model, y, y_pred, sample_weight)
        return _Seen(y_pred, additional, normalisers, moved)

    def _forward(self, x: Any, training: bool) -> Any:
        return self._model(x, training=training) if self._model._call_has_training_arg else self._model(x)

    def _own_loss(self, batch: tuple, seen: _Seen, weights: Any) -> Any:
        """This replica's addend of the loss, where its backward pass begins."""
        loss = self._loss(batch, seen, weights, training=True)
        return self._model.optimizer.scale_loss(weights.own_loss(loss))

    def _loss(self, batch: tuple, seen: _Seen, weights: Any, training: bool) -> Any:
        model, (x, y, sample_weight) = self._model, batch

        def compute_loss() -> Any:
            return model._compute_loss(x=x, y=y, y_pred=seen.y_pred, sample_weight=sample_weight, training=training)

        loss = weights.loss(model, compute_loss, seen.additional)
        value, counts = weights.tracked(loss, x)
        model._loss_tracker.update_state(value, sample_weight=counts)
        return loss

    def _metrics(self, batch: tuple, y_pred: Any, weights: Any) -> dict:
        x, y, sample_weight = batch
        with weights.scalars():
            return self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _update(self, gradients: list[Any], ends_update: bool) -> None:
        """Sum gradients where an update ends, then let the optimizer update, or accumulate."""
        variables = self._model.trainable_weights
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if ends_update:
            of = [variables[index] for index in present]
            taken = self.accumulation.taken([gradients[index] for index in present], of)
            for index, total in zip(present, self._share.summed(taken, of), strict=True):
                gradients[index] = total

        def apply() -> None:
            self._model.optimizer.apply_gradients(zip(gradients, variables, strict=True))

        if variables:
            with self._backend.updating():
                self._program(apply)

    @contextmanager
    def _recorded(self, name: str, data: Any) -> Iterator[None]:
        with self._wire.step(name, data) as transfers:
            yield
        self.transfers[name] = transfers

    def _counting(self, rows: Any, data: Any) -> AbstractContextManager[None]:
        # From the first line: layers and an overridden compute_loss may feed metrics as well.
        return self._share.kept(metric_variables(self._model), rows, data)


@dataclass
class _Seen:
    """What a forward pass gave on one replica."""

    y_pred: Any
    additional: list[Any]
    normalisers: list[Any]
    moved: list[Any]


def _assign(variables: list[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def synchronises(model: Any, choices: Choices) -> bool:
    """Whether replicas meet inside the forward pass, for the moments of BatchNormalization."""
    return bool(batch_norm.layers_of(model, everywhere=choices.sync_batch_norm))


def metric_variables(model: Any) -> list[Any]:
    """The state of the metrics that see rows: all but the trackers of losses, which see the whole step."""
    compiled = model._compile_loss
    trackers = [model._loss_tracker, *(compiled.metrics if compiled is not None else [])]
    left_out = {id(variable) for tracker in trackers if tracker is not None for variable in tracker.variables}
    return [variable for variable in model.metrics_variables if id(variable) not in left_out]
