"""Layers with state, without gradients, with sparse ones, shared and nested; BatchNormalization."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.cases.engines import dataset
from tests.cases.models import IMAGES, LABEL, SPARSE, TOKENS, X, adam, classes, classifying, seeded_input
from tests.cases.table import Result, case

WORDS = np.array(["red", "green", "blue", "unheard of"])
TEXT = np.array([" ".join(WORDS[:3][row]) for row in TOKENS[:, :4] % 3])


@case()
def embeddings(engine) -> Result:
    """Embeddings: sparse gradients under Adam"""
    tokens = seeded_input(6, dtype="int32")
    h = keras.layers.Embedding(20, 4)(tokens)
    return engine.fit(classifying(tokens, keras.layers.GlobalAveragePooling1D()(h), adam()), TOKENS, LABEL)


@keras.saving.register_keras_serializable("tests")
class Placed(keras.layers.Layer):
    """Adds to each word what its place in the sentence is worth, as keras.io's transformers do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.places = keras.layers.Embedding(6, 4)

    def build(self, shape: Any) -> None:
        self.places.build((6,))

    def call(self, x: Any) -> Any:
        return x + self.places(keras.ops.arange(keras.ops.shape(x)[1]))


@case()
def places(engine) -> Result:
    """Embeddings of places in a sentence, which each row has: one sparse gradient for all rows, under Adam"""
    tokens = seeded_input(None, dtype="int32")
    h = Placed()(keras.layers.Embedding(20, 4)(tokens))
    return engine.fit(classifying(tokens, keras.layers.GlobalAveragePooling1D()(h), adam()), TOKENS, LABEL)


@keras.saving.register_keras_serializable("tests")
class Unused(keras.layers.Layer):
    """Has a weight that gets no gradient, and a count that it moves by itself."""

    def build(self, shape: Any) -> None:
        self.idle = self.add_weight(shape=(2,), initializer="ones")
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1)
        return x


@case()
def frozen_shared_and_unused(engine) -> Result:
    """A shared and a frozen layer, a weight without gradient, a counter; a model inside a model"""
    x = seeded_input()
    shared = keras.layers.Dense(4, "tanh")
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, shared(keras.layers.Dense(4, trainable=False)(shared(inner_input))))
    return engine.fit(classifying(x, Unused()(inner(x))), X, LABEL)


@case()
def text(engine) -> Result:
    """`StringLookup` and `TextVectorization` inside the model, on strings"""
    x = seeded_input(dtype="string")
    lookup = keras.layers.StringLookup(vocabulary=list(WORDS[:3]), output_mode="multi_hot")
    vectors = keras.layers.TextVectorization(output_sequence_length=4, vocabulary=list(WORDS[:2]))
    words = keras.layers.Embedding(4, 3)(vectors(x[:, :1]))
    h = keras.layers.Concatenate()([keras.layers.Flatten()(words), lookup(x[:, 1:])])
    model = classifying(x, h)
    strings = np.stack([TEXT, *WORDS[TOKENS[:, :3] % 4].T], axis=1)
    return engine.fit(model, dataset(strings, LABEL).batch(32), batch_size=None)


@case()
def numbers_looked_up(engine) -> Result:
    """`Normalization` (adapted), `Discretization`, `IntegerLookup`"""
    numbers, codes = seeded_input(name="numbers"), keras.Input((2,), dtype="int64", name="codes")
    normal = keras.layers.Normalization()
    normal.adapt(X.astype(keras.config.floatx()))
    bins = keras.layers.Discretization([0.25, 0.5, 0.75], output_mode="multi_hot")
    looked_up = keras.layers.IntegerLookup(vocabulary=[2, 3, 5], output_mode="multi_hot")
    h = keras.layers.Concatenate()([normal(numbers), bins(numbers), looked_up(codes)])
    model = classifying([numbers, codes], keras.layers.Dense(6, "tanh")(h))
    return engine.fit(model, [X, TOKENS[:, :2].astype("int64")], LABEL)


@case()
def the_same_bits_again(engine) -> Result:
    """Twice on one engine gives the same bits: dropout, augmentation, noise, shuffled rows"""

    def train() -> bytes:
        x = seeded_input(6, 6, 2)
        h = keras.layers.RandomTranslation(0.2, 0.2)(keras.layers.RandomFlip("horizontal")(x))
        h = keras.layers.Conv2D(3, 3, activation="relu")(keras.layers.GaussianNoise(0.1)(h))
        h = keras.layers.Dropout(0.3)(keras.layers.BatchNormalization()(h))
        model = keras.Model(x, classes(keras.layers.GlobalAveragePooling2D()(h)))
        model.compile(adam(), SPARSE(from_logits=True))
        return engine.fit(model, IMAGES, LABEL, shuffle=True, epochs=2)["weights"].tobytes()

    assert train() == train(), "the same training gave other bits"
    return {"repeats": np.array(True)}
