"""The mistakes: each is the right loop with one method replaced, and nothing else.

    CAUSES["double_softmax"].loop(task, seed=0, optimizer="adam").run(epochs=10)

A new one is a class here with the `@cause` that names its group, and a few sentences in docs/why-loops-differ.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.why_loops_differ.loop import Loop
from benchmarks.why_loops_differ.tasks import BATCH

REPLICAS = 4
BUFFER = 64
# Of the validation records, in the order of their labels: what four ranks read that share class folders unevenly.
SHARDS = (0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Group:
    """Causes that share a figure.

    Args:
        title: of the figure.
        optimizer: that all of its trainings use, `fit` included.
        shown: the numbers in the figure, fields of loop.Epoch.
        also: more numbers, in the table.
    """

    title: str
    optimizer: str = "adam"
    shown: tuple[str, ...] = ("true_loss", "true_accuracy")
    also: tuple[str, ...] = ()


GROUPS = {
    "logits": Group("Logits and probabilities"),
    "reduction": Group("Reduction over the batch", "sgd"),
    "epsilon": Group("Adam's epsilon"),
    "training": Group("Training flags, BatchNormalization, penalties", also=("accuracy",)),
    "shuffle": Group("Shuffle buffers"),
    "averages": Group("Averaged averages", shown=("loss", "accuracy")),
}


@dataclass(frozen=True)
class Cause:
    """One mistake.

    Args:
        name: also of its row in the table.
        group: one of GROUPS.
        label: in the figure.
        loop: the loop that makes it.
        optimizer: "adam" or "sgd".
    """

    name: str
    group: str
    label: str
    loop: type[Loop]
    optimizer: str


CAUSES: dict[str, Cause] = {}


def cause(group: str, label: str, optimizer: str | None = None) -> Callable[[type[Loop]], type[Loop]]:
    """Adds a loop to CAUSES, under its class' name in lower case with underscores."""

    def add(loop: type[Loop]) -> type[Loop]:
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in loop.__name__)[1:]
        CAUSES[name] = Cause(name, group, label, loop, optimizer or GROUPS[group].optimizer)
        return loop

    return add


class EndsInSoftmax(Loop):
    """The model gives probabilities."""

    def build(self) -> Any:
        model = super().build()
        return keras.Model(model.inputs, keras.layers.Softmax()(model.outputs[0]))

    def probabilities(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x, training=False)


@cause("logits", "probabilities taken for logits")
class DoubleSoftmax(EndsInSoftmax):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=outputs))


@cause("logits", "logits taken for probabilities")
class LogitsAsProbabilities(Loop):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return keras.losses.SparseCategoricalCrossentropy()(y, outputs)


@cause("logits", "log(softmax(x)) written out")
class LogarithmWrittenOut(EndsInSoftmax):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return -tf.reduce_mean(tf.math.log(tf.gather(outputs, y, batch_dims=1)))


class RowLosses(Loop):
    """A loop that sums up its rows itself."""

    def rows(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=outputs)


@cause("reduction", "sum over the batch")
class SumOverBatch(RowLosses):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(self.rows(y, outputs))


@cause("reduction", "sum over the batch, under Adam", optimizer="adam")
class SumUnderAdam(SumOverBatch):
    pass


@cause("reduction", f"means of {REPLICAS} replicas summed")
class MeansSummed(RowLosses):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        rows = self.rows(y, outputs)
        return tf.add_n([tf.reduce_mean(rows[replica::REPLICAS]) for replica in range(REPLICAS)])


@cause("reduction", f"divided by {REPLICAS} replicas twice")
class DividedTwice(RowLosses):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        rows = tf.shape(y)[0]
        return tf.nn.compute_average_loss(self.rows(y, outputs), global_batch_size=rows * REPLICAS)


@cause("reduction", "short batch counted as full")
class ShortBatchAsFull(RowLosses):
    def loss(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.nn.compute_average_loss(self.rows(y, outputs), global_batch_size=BATCH)


class OtherEpsilon(Loop):
    """Adam with another epsilon."""

    epsilon: float

    def make_optimizer(self, name: str) -> Any:
        optimizer = super().make_optimizer(name)
        optimizer.epsilon = self.epsilon
        return optimizer


@cause("epsilon", "1e-8 (tf.compat.v1)")
class EpsilonSmall(OtherEpsilon):
    epsilon = 1e-8


@cause("epsilon", "1e-8 behind the correction (paper, PyTorch)")
class EpsilonOfThePaper(Loop):
    """Adam written out as in the paper: the biases of both moments are corrected before epsilon is added."""

    def __init__(self, task, seed: int, optimizer: str = "adam"):
        super().__init__(task, seed, optimizer)
        zeros = [[tf.Variable(tf.zeros_like(value)) for value in self.model.trainable_variables] for _ in range(2)]
        self.first, self.second = zeros
        self.step = tf.Variable(0.0)

    def apply(self, gradients: Iterable[tf.Tensor]) -> None:
        step = self.step.assign_add(1.0)
        rate = self.optimizer.learning_rate
        for value, m, v, gradient in zip(
            self.model.trainable_variables, self.first, self.second, gradients, strict=True
        ):
            m_hat = m.assign(0.9 * m + 0.1 * gradient) / (1 - 0.9**step)
            v_hat = v.assign(0.999 * v + 0.001 * gradient**2) / (1 - 0.999**step)
            value.assign_sub(rate * m_hat / (tf.sqrt(v_hat) + 1e-8))


@cause("epsilon", "0.1 (advice for Inception)")
class EpsilonTenth(OtherEpsilon):
    epsilon = 0.1


@cause("epsilon", "1.0 (advice for Inception)")
class EpsilonOne(OtherEpsilon):
    epsilon = 1.0


@cause("training", "training=False in training")
class TrainingFalse(Loop):
    def forward(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x, training=False)


@cause("training", "model(x) without the flag")
class NoFlag(Loop):
    def forward(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x)


@cause("training", "training=True in evaluation")
class TrainingTrueInEvaluation(Loop):
    def infer(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x, training=True)


@cause("training", "moving statistics never updated")
class StatisticsNotUpdated(Loop):
    """`stateless_call` gives the new state back, and only dropout's is kept."""

    def forward(self, x: tf.Tensor) -> tf.Tensor:
        model = self.model
        outputs, state = model.stateless_call(
            model.trainable_variables, model.non_trainable_variables, x, training=True
        )
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            if "moving" not in variable.name:
                variable.assign(value)
        return outputs

    def total(self, loss: tf.Tensor) -> tf.Tensor:
        """A stateless call leaves no losses behind."""
        return tf.reduce_sum([loss, *(weight.regularizer(weight) for weight in penalised(self.model))])


@cause("training", "moving statistics of a second forward pass")
class ForwardTwice(Loop):
    """The accuracy of the training comes from another call of the model, behind the update."""

    def train_step(self, x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        super().train_step(x, y)
        self.train_metrics[1].update_state(y, self.model(x, training=True))
        return [metric.result() for metric in self.train_metrics]


@cause("training", "model.losses forgotten")
class PenaltiesForgotten(Loop):
    def total(self, loss: tf.Tensor) -> tf.Tensor:
        return loss


def penalised(model: Any) -> list[Any]:
    return [weight for weight in model.trainable_variables if weight.regularizer is not None]


def sorted_records(loop: Loop) -> tf.data.Dataset:
    """One record after the other, class by class, as a folder of class folders is listed."""
    return tf.data.Dataset.from_tensor_slices((loop.task.train_x, loop.task.train_y))


@cause("shuffle", "no shuffle")
class NoShuffle(Loop):
    def records(self) -> tf.data.Dataset:
        return sorted_records(self).batch(BATCH)


@cause("shuffle", f"buffer of {BUFFER} records")
class SmallBuffer(Loop):
    def records(self) -> tf.data.Dataset:
        return sorted_records(self).shuffle(BUFFER, seed=self.seed).batch(BATCH)


@cause("shuffle", "batches shuffled, not records")
class ShuffledBatches(Loop):
    def records(self) -> tf.data.Dataset:
        return sorted_records(self).batch(BATCH).shuffle(len(self.task.train_y), seed=self.seed)


@cause("shuffle", "shuffled before cache")
class ShuffledBeforeCache(Loop):
    def records(self) -> tf.data.Dataset:
        return sorted_records(self).shuffle(len(self.task.train_y), seed=self.seed).cache().batch(BATCH)


@cause("shuffle", "the same order in every epoch")
class NoReshuffle(Loop):
    def records(self) -> tf.data.Dataset:
        records = sorted_records(self)
        return records.shuffle(len(records), seed=self.seed, reshuffle_each_iteration=False).batch(BATCH)


class MeanOfMeans(Loop):
    """The validation's numbers are an average of the averages of parts."""

    def parts(self, validation: tf.data.Dataset) -> Iterable[tf.data.Dataset]:
        raise NotImplementedError

    def evaluate(self, validation: tf.data.Dataset) -> list[float]:
        return np.mean([super(MeanOfMeans, self).evaluate(part) for part in self.parts(validation)], axis=0).tolist()


@cause("averages", "mean of the batches' means")
class MeanOfBatches(MeanOfMeans):
    def parts(self, validation: tf.data.Dataset) -> Iterable[tf.data.Dataset]:
        return [validation.skip(batch).take(1) for batch in range(len(validation))]


@cause("averages", "mean of the means of uneven shards")
class MeanOfShards(MeanOfMeans):
    def parts(self, validation: tf.data.Dataset) -> Iterable[tf.data.Dataset]:
        edges = np.round(np.cumsum([0.0, *SHARDS]) * len(self.task.valid_y)).astype(int)
        rows = validation.unbatch()
        return [rows.skip(a).take(b - a).batch(BATCH) for a, b in pairwise(edges)]


@cause("averages", "metrics never reset")
class NeverReset(Loop):
    def reset(self, metrics: list[Any]) -> None:
        """Forgotten."""


@cause("averages", "the last batch's number for all")
class LastBatch(MeanOfBatches):
    def evaluate(self, validation: tf.data.Dataset) -> list[float]:
        return Loop.evaluate(self, list(self.parts(validation))[-1])
