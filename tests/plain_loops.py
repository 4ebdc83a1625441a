"""What the loops of docs/guides/loops.md do without distfit: plain Keras and TensorFlow on one device.

    with in_place_of_distfit():
        runpy.run_path("gan.py")

The pages' scripts then find a session whose step is a tf.function, whose `apply` is the optimizer's and whose batches
are those of keras.Model.fit, and that divides and gathers nothing. No line of distfit runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter


class Plain:
    """In place of a session; what a script does not need is not there."""

    _rows: Any = None

    def batches(self, *arrays: Any, batch_size: int, shuffle: bool = True) -> PlainBatches:
        return PlainBatches(ArrayDataAdapter(*arrays, batch_size=batch_size, shuffle=shuffle))

    def step(self, function: Callable[..., Any]) -> Callable[[Any], None]:
        @tf.function(autograph=False, reduce_retracing=True)
        def traced(rows: Any, batch: Any) -> None:
            self._rows = rows
            function(*batch)

        return lambda batch: traced(tf.shape(batch[0], tf.int64)[0], batch)

    @contextmanager
    def training(self, models: Any, optimizers: Any, data: Any, metrics: Any, epochs: int, **rest: Any) -> Any:
        given = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in given:
            if not optimizer.built:
                optimizer.build(models.trainable_variables)
        yield PlainTraining(metrics if isinstance(metrics, list) else [metrics], epochs)

    def scale_loss(self, loss: Any) -> Any:
        return loss

    def apply(self, optimizer: Any, gradients: Any, variables: Any) -> None:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def share(self) -> Any:
        return tf.ones([], tf.float64)

    def gather(self, tensor: Any) -> Any:
        return tensor

    def rows(self) -> Any:
        return self._rows

    def first_row(self) -> Any:
        return tf.zeros([], tf.int64)


class PlainBatches:
    """The batches of keras.Model.fit, pass after pass."""

    def __init__(self, adapter: Any) -> None:
        self._dataset = adapter.get_tf_dataset()
        self._length = adapter.num_batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def __len__(self) -> int:
        return self._length


class PlainTraining:
    """Epochs, with the metrics of each as its history."""

    def __init__(self, metrics: list[Any], epochs: int) -> None:
        self._metrics = metrics
        self._epochs = epochs
        self.history = SimpleNamespace(history={})

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self._epochs):
            self._reset()
            self._logs: dict[str, float] = {}
            yield epoch
            for name, value in (self._logs or self._results()).items():
                self.history.history.setdefault(name, []).append(value)

    def validate(self, step: Callable[[Any], None], data: PlainBatches) -> None:
        self._logs = self._results()
        self._reset()
        for batch in data:
            step(batch)
        self._logs |= {f"val_{name}": value for name, value in self._results().items()}

    def _reset(self) -> None:
        for metric in self._metrics:
            metric.reset_state()

    def _results(self) -> dict[str, float]:
        return {metric.name: float(metric.result()) for metric in self._metrics}


@contextmanager
def in_place_of_distfit() -> Iterator[None]:
    """Inside, a script that imports distfit gets this."""
    stand_in = ModuleType("distfit")
    stand_in.init = Plain  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "distfit", stand_in)
        yield
