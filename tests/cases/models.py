"""Rows and small models that cases share. Models are tiny, because tracing them is what the table costs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

CLASSES = 3
# With batches of 32: a last batch of 3, of which three replicas get a row each, and two 2 and 1. Cases that
# cut the rows at 65 have a last batch of a single row.
ROWS = 67
RNG = np.random.default_rng(0)
X = RNG.random((ROWS, 4))
LABEL = RNG.integers(0, CLASSES, ROWS)
TARGET = RNG.random((ROWS, 2))
WEIGHT = RNG.random(ROWS)
TOKENS = RNG.integers(1, 9, (ROWS, 6)) * (np.arange(6) < RNG.integers(1, 7, (ROWS, 1)))
IMAGES = RNG.random((ROWS, 6, 6, 2))
SPARSE = keras.losses.SparseCategoricalCrossentropy


def sgd(**arguments: Any) -> Any:
    return keras.optimizers.SGD(**({"learning_rate": 0.1, "momentum": 0.9} | arguments))


def adam(**arguments: Any) -> Any:
    return keras.optimizers.Adam(**({"learning_rate": 0.01} | arguments))


def seeded_input(*shape: int, **arguments: Any) -> Any:
    """The input of a model whose weights begin with the same numbers everywhere."""
    keras.utils.set_random_seed(1)
    return keras.Input(shape or (4,), **arguments)


def classifier(optimizer: Any, loss: Any = None, **compiled: Any) -> keras.Model:
    """Two layers, without biases: every variable is to be traced in each update."""
    x = seeded_input()
    h = keras.layers.Dense(8, "tanh", use_bias=False)(x)
    model = keras.Model(x, keras.layers.Dense(CLASSES, use_bias=False)(h))
    model.compile(optimizer, loss or SPARSE(from_logits=True), **compiled)
    return model


def classes(h: Any) -> Any:
    """The last layer: logits."""
    return keras.layers.Dense(CLASSES)(h)


def classifying(inputs: Any, h: Any, optimizer: Any = None, **compiled: Any) -> keras.Model:
    """A compiled classifier from its inputs to logits of `h`."""
    model = keras.Model(inputs, classes(h))
    model.compile(optimizer or sgd(), SPARSE(from_logits=True), **compiled)
    return model


def two_outputs(optimizer: Any, losses: list, **compiled: Any) -> keras.Model:
    x = seeded_input()
    h = keras.layers.Dense(8, "tanh")(x)
    model = keras.Model(x, [keras.layers.Dense(CLASSES, name="a")(h), keras.layers.Dense(2, name="b")(h)])
    model.compile(optimizer, losses, **compiled)
    return model


def masked(optimizer: Any, reduction: str, **compiled: Any) -> keras.Model:
    """Two masked terms under one weight: each has its own number of valid steps."""
    tokens = seeded_input(6, dtype="int32")
    h = keras.layers.Dense(5, "tanh")(keras.layers.Embedding(9, 4, mask_zero=True)(tokens))
    model = keras.Model(tokens, [keras.layers.Dense(CLASSES, name="a")(h), keras.layers.Dense(1, name="b")(h)])
    losses = [SPARSE(from_logits=True, reduction=reduction), keras.losses.MeanSquaredError(reduction=reduction)]
    model.compile(optimizer, losses, **compiled)
    return model


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Not built before its first batch, and not a functional model."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden = keras.layers.Dense(8, "tanh", activity_regularizer=keras.regularizers.L2(0.01))
        self.out = keras.layers.Dense(CLASSES, kernel_regularizer=keras.regularizers.L2(0.05))

    def call(self, x: Any) -> Any:
        return self.out(self.hidden(x))


def subclassed(optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = Subclassed()
    model.compile(optimizer, SPARSE(from_logits=True), metrics=["accuracy"])
    return model
