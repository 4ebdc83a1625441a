"""Every way to divide a loss. The last batch has one row, so that all replicas but one have nothing."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.cases.models import (
    CLASSES,
    LABEL,
    SPARSE,
    TARGET,
    TOKENS,
    WEIGHT,
    X,
    adam,
    classifier,
    masked,
    seeded_input,
    sgd,
    subclassed,
    two_outputs,
)
from tests.cases.table import Result, case

X, LABEL, TARGET, WEIGHT, TOKENS = (rows[:65] for rows in (X, LABEL, TARGET, WEIGHT, TOKENS))
STEPS = [TOKENS % CLASSES, TOKENS[..., None] / 9]
STEP_WEIGHTS = [WEIGHT[:, None] * (1 + np.arange(6)), WEIGHT[::-1, None] / (1 + np.arange(6))]


@case()
def sample_weights(engine) -> Result:
    """`sample_weight`, weighted metrics; evaluate with weights"""
    model = classifier(adam(), weighted_metrics=["accuracy"])
    result = engine.fit(model, X, LABEL, sample_weight=WEIGHT)
    result["evaluated"] = np.array(engine.evaluate(model, X, LABEL, sample_weight=WEIGHT))
    return result


@case()
def weights_as_divisor(engine) -> Result:
    """Reduction `mean_with_sample_weight`"""
    loss = SPARSE(from_logits=True, reduction="mean_with_sample_weight")
    return engine.fit(classifier(sgd(), loss), X, LABEL, sample_weight=WEIGHT)


@case()
def class_weights(engine) -> Result:
    """`class_weight`, reduction `mean`"""
    loss = SPARSE(from_logits=True, reduction="mean")
    return engine.fit(classifier(sgd(), loss), X, LABEL, class_weight={0: 0.2, 1: 1.0, 2: 3.0})


@case()
def a_sum_of_losses(engine) -> Result:
    """Reduction `sum`"""
    return engine.fit(classifier(sgd(learning_rate=0.005), SPARSE(from_logits=True, reduction="sum")), X, LABEL)


@case()
def no_reduction(engine) -> Result:
    """Reduction `None`: Keras trains on the sum and shows the mean"""
    loss = SPARSE(from_logits=True, reduction=None)
    return engine.fit(classifier(sgd(learning_rate=0.005), loss), X, LABEL, sample_weight=WEIGHT)


@case()
def an_ignored_class(engine) -> Result:
    """`ignore_class`: a mask that the loss makes itself"""
    return engine.fit(classifier(sgd(), SPARSE(from_logits=True, ignore_class=0)), X, LABEL)


@case()
def masked_sequences(engine) -> Result:
    """Two masked terms under one weight"""
    return engine.fit(masked(adam(), "sum_over_batch_size"), TOKENS, STEPS)


@case()
def masked_sequences_by_weight(engine) -> Result:
    """Two masked terms, `mean_with_sample_weight`, a weight for each step of either, accumulation over 2"""
    optimizer = sgd(gradient_accumulation_steps=2)
    model = masked(optimizer, "mean_with_sample_weight", weighted_metrics=[["accuracy"], ["mae"]])
    return engine.fit(model, TOKENS, STEPS, sample_weight=STEP_WEIGHTS)


@case()
def several_outputs(engine) -> Result:
    """Several outputs, each with its own reduction, weights and metric, and loss weights; predictions of both"""
    losses = [
        SPARSE(from_logits=True, reduction="mean_with_sample_weight"),
        keras.losses.MeanSquaredError(reduction="sum"),
    ]
    model = two_outputs(adam(), losses, loss_weights=[1.0, 0.01], weighted_metrics=[["accuracy"], ["mae"]])
    result = engine.fit(model, X, [LABEL, TARGET], sample_weight=[WEIGHT, WEIGHT[::-1].copy()])
    first, second = engine.predict(model, X)
    return result | {"first": first, "second": second}


@case()
def regularisation(engine) -> Result:
    """Weight and activity regularisation, in a subclassed model"""
    return engine.fit(subclassed(adam()), X, LABEL)


@keras.saving.register_keras_serializable("tests")
class Penalty(keras.layers.Layer):
    """A layer with a loss of its own: a mean over its rows."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


@case()
def added_losses(engine) -> Result:
    """`add_loss` in a layer, beside a regularised weight"""
    x = seeded_input()
    h = Penalty()(keras.layers.Dense(8, "tanh", kernel_regularizer="l2")(x))
    model = keras.Model(x, keras.layers.Dense(2)(h))
    model.compile(sgd(), "mse", metrics=["mae"])
    return engine.fit(model, X, TARGET)


class OwnLoss(keras.Model):
    """Keras' documented pattern of an overridden compute_loss: a mean over rows, and a metric fed with it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.error = keras.metrics.Mean(name="error")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        error = keras.ops.mean(keras.ops.square(y - y_pred))
        self.error.update_state(error)
        return error + sum(self.losses)


@case()
def an_own_compute_loss(engine) -> Result:
    """An overridden `compute_loss`, a mean over rows, with a metric of its own"""
    x = seeded_input()
    model = OwnLoss(x, keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.05))(x))
    model.compile(sgd())
    return engine.fit(model, X, TARGET)
