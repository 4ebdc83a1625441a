"""BatchNormalization: with `sync_batch_norm=True` the moments of the whole batch, where replicas meet in the middle
of whatever surrounds it; and without."""

from __future__ import annotations

from typing import Any

import keras

from tests.cases.models import IMAGES, LABEL, TOKENS, X, adam, classifying, seeded_input
from tests.cases.table import Result, case


def normalised(h: Any, **options: Any) -> Any:
    """BatchNormalization behind layers without a bias, whose gradient would be rounding alone."""
    return keras.layers.BatchNormalization(**options)(h)


@case(saved=True)
def batch_norm_in_sync(engine) -> Result:
    """BatchNormalization with `sync_batch_norm=True`, a last batch of 1; the saved file; predictions"""
    x = seeded_input()
    h = normalised(keras.layers.Dense(6, "tanh", use_bias=False)(normalised(x)))
    model = classifying(x, h, adam(), metrics=["accuracy"])
    result = engine.fit(model, X[:65], LABEL[:65], sync_batch_norm=True)
    return result | {"predicted": engine.predict(model, X)}


@case()
def batch_norm_of_images_in_sync(engine) -> Result:
    """The same over the axes of images, channels first for one of them, without scale"""
    x = seeded_input(6, 6, 2)
    h = normalised(keras.layers.Conv2D(3, 3, strides=2, use_bias=False)(x), momentum=0.8)
    h = normalised(h, axis=1, scale=False)
    model = classifying(x, keras.layers.GlobalAveragePooling2D()(keras.activations.tanh(h)))
    return engine.fit(model, IMAGES, LABEL, sync_batch_norm=True)


@case()
def batch_norm_of_masks_in_sync(engine) -> Result:
    """The same with masked steps"""
    tokens = seeded_input(6, dtype="int32")
    h = normalised(keras.layers.Embedding(9, 4, mask_zero=True)(tokens))
    model = classifying(tokens, keras.layers.GlobalAveragePooling1D()(h))
    return engine.fit(model, TOKENS[:65], LABEL[:65], sync_batch_norm=True)


@case()
def moving_means(engine) -> Result:
    """BatchNormalization without it: the moving mean of the first layer, linear in the rows"""
    x = seeded_input()
    norm = keras.layers.BatchNormalization()
    engine.fit(classifying(x, keras.layers.Dropout(0.3)(norm(x))), X, LABEL)
    return {"moving_mean": norm.moving_mean.numpy()}


@case()
def losses_of_layers_around_a_meeting(engine) -> Result:
    """`sync_batch_norm=True` in a nested model that is called twice, with `add_loss` before and behind"""
    x, inner = seeded_input(), keras.Input((4,))
    h = keras.layers.Dense(4, "tanh", use_bias=False, activity_regularizer=keras.regularizers.L2(0.1))(inner)
    nested = keras.Model(inner, keras.layers.ActivityRegularization(l2=0.1)(normalised(h)))
    h = normalised(nested(nested(x)), gamma_regularizer="l2")
    return engine.fit(classifying(x, h), X, LABEL, sync_batch_norm=True)


@keras.saving.register_keras_serializable("tests")
class Remembered(keras.layers.Layer):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(4, "tanh", use_bias=False)
        self.norm = keras.layers.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.norm.build((None, 4))

    def call(self, x: Any, training: bool = False) -> Any:
        return keras.remat(lambda y: self.norm(self.dense(y), training=training))(x)


@case()
def batch_norm_computed_again(engine) -> Result:
    """`sync_batch_norm=True` in `keras.remat`: the backward pass calls the layer once more; a last batch of 1"""
    x = seeded_input()
    h = Remembered()(keras.layers.Dense(4, "tanh")(x))
    return engine.fit(classifying(x, h), X[:65], LABEL[:65], sync_batch_norm=True)


@case()
def batch_norm_asked_for_by_the_layer(engine) -> Result:
    """Keras' own `BatchNormalization(synchronized=True)`, without `sync_batch_norm`; `renorm`; a last batch of 1"""
    x = seeded_input()
    h = normalised(keras.layers.Dense(6, "tanh", use_bias=False)(x), synchronized=True, renorm=True)
    return engine.fit(classifying(x, h), X[:65], LABEL[:65])
