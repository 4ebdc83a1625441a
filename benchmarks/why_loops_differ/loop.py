"""A training in plain TensorFlow and Keras that ends with the same bits as `keras.Model.fit`, and `fit` itself.

    Fit(task, seed=0).run(epochs=20)      # -> [Epoch, ...]
    Loop(task, seed=0).run(epochs=20)     # the same numbers, the same weights

Each method of `Loop` is one thing that such a loop has to get right. `benchmarks.why_loops_differ.causes` replaces one
at a time. Both give two kinds of numbers: those that the training *reports*, and those that are *measured* after each
epoch: cross-entropy and accuracy of the validation records, computed at once from the model in inference mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.why_loops_differ.tasks import BATCH, Task

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(3e-3),
    "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
}


@dataclass(frozen=True)
class Epoch:
    """The numbers of one epoch.

    Args:
        train_loss, train_accuracy, loss, accuracy: as reported; the latter two of the validation.
        true_loss, true_accuracy: as measured, of the validation; the loss is cross-entropy alone.
    """

    train_loss: float
    train_accuracy: float
    loss: float
    accuracy: float
    true_loss: float
    true_accuracy: float


class Training:
    """What fit and the loops share: the model, the optimizer, the order of the records, and what is measured.

    Args:
        task: data and network.
        seed: of the first weights, of dropout and of the order of the records.
        optimizer: "adam" or "sgd".
    """

    def __init__(self, task: Task, seed: int, optimizer: str = "adam"):
        keras.utils.set_random_seed(seed)
        self.task, self.seed = task, seed
        self.model = self.build()
        self.optimizer = self.make_optimizer(optimizer)
        self._measured = tf.function(self.probabilities, input_signature=[tf.TensorSpec(self._shape)])

    @property
    def _shape(self) -> tuple[int | None, ...]:
        return (None, *self.task.train_x.shape[1:])

    def build(self) -> Any:
        return self.task.network()

    def make_optimizer(self, name: str) -> Any:
        return OPTIMIZERS[name]()

    def records(self) -> tf.data.Dataset:
        """Batches of the training, in another order in every epoch."""
        data = tf.data.Dataset.from_tensor_slices((self.task.train_x, self.task.train_y))
        return data.shuffle(len(self.task.train_y), seed=self.seed).batch(BATCH)

    def validation(self) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices((self.task.valid_x, self.task.valid_y)).batch(BATCH)

    def probabilities(self, x: tf.Tensor) -> tf.Tensor:
        """What the model says, for measuring."""
        return tf.nn.softmax(self.model(x, training=False))

    def measured(self) -> tuple[float, float]:
        """Cross-entropy and accuracy of the validation records."""
        probabilities = self._measured(self.task.valid_x).numpy().astype(np.float64)
        labels = self.task.valid_y
        own = probabilities[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(own, 1e-12)).mean()), float((probabilities.argmax(1) == labels).mean())

    def weights(self) -> np.ndarray:
        """All of the model's variables as one vector."""
        return np.concatenate([np.ravel(variable) for variable in self.model.get_weights()])


class Fit(Training):
    """`keras.Model.fit`."""

    def run(self, epochs: int) -> list[Epoch]:
        """Trains and returns the numbers of each epoch."""
        measured = []
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(self.optimizer, loss, metrics=["accuracy"])
        history = self.model.fit(
            self.records(),
            validation_data=self.validation(),
            epochs=epochs,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: measured.append(self.measured()))],
            verbose=0,
        ).history
        reported = zip(*(history[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")), strict=True)
        return [Epoch(*[*numbers, *true]) for numbers, true in zip(reported, measured, strict=True)]


class Loop(Training):
    """The same in a loop of our own, right in every part."""

    def __init__(self, task: Task, seed: int, optimizer: str = "adam"):
        super().__init__(task, seed, optimizer)
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.train_metrics = [keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()]
        self.valid_metrics = [keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()]
        # One graph for full and short batches, as in fit.
        batch = [tf.TensorSpec(self._shape), tf.TensorSpec([None], tf.int64)]
        self._train_step = tf.function(self.train_step, input_signature=batch)
        self._valid_step = tf.function(self.valid_step, input_signature=batch)

    def run(self, epochs: int) -> list[Epoch]:
        """Trains and returns the numbers of each epoch."""
        records, validation = self.records(), self.validation()
        return [self.epoch(records, validation) for _ in range(epochs)]

    def epoch(self, records: tf.data.Dataset, validation: tf.data.Dataset) -> Epoch:
        self.reset(self.train_metrics)
        for x, y in records:
            self._train_step(x, y)
        iter(records)  # fit makes a second iterator in every epoch, and each one draws a new order
        trained = [float(metric.result()) for metric in self.train_metrics]
        return Epoch(*[*trained, *self.evaluate(validation), *self.measured()])

    def train_step(self, x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = self.forward(x)
            loss = self.total(self.loss(y, outputs))
        self.apply(tape.gradient(loss, self.model.trainable_variables))
        self.update(self.train_metrics, loss, y, outputs)
        # As in fit, which shows them. TensorFlow optimises a graph without them otherwise: SGD's last bits differ.
        return [metric.result() for metric in self.train_metrics]

    def forward(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x, training=True)

    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """The mean over the batch's rows, however many there are."""
        return self.cross_entropy(y, outputs)

    def total(self, loss: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum([loss, *self.model.losses])

    def apply(self, gradients: Iterable[tf.Tensor]) -> None:
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))

    def update(self, metrics: list[Any], loss: tf.Tensor, y: tf.Tensor, outputs: tf.Tensor) -> None:
        """A batch counts as many times as it has rows."""
        metrics[0].update_state(loss, sample_weight=tf.shape(y)[0])
        metrics[1].update_state(y, outputs)

    def evaluate(self, validation: tf.data.Dataset) -> list[float]:
        """The validation's loss and accuracy, from state summed over all batches."""
        self.reset(self.valid_metrics)
        for x, y in validation:
            self._valid_step(x, y)
        return [float(metric.result()) for metric in self.valid_metrics]

    def valid_step(self, x: tf.Tensor, y: tf.Tensor) -> None:
        outputs = self.infer(x)
        self.update(self.valid_metrics, self.total(self.loss(y, outputs)), y, outputs)

    def infer(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x, training=False)

    def reset(self, metrics: list[Any]) -> None:
        for metric in metrics:
            metric.reset_state()
