"""Models that override `train_step`: the patterns of Keras' documentation.

https://keras.io/guides/custom_train_step_in_tensorflow (the first five), /examples/generative (the last two).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.cases.models import LABEL, SPARSE, TARGET, WEIGHT, X, adam, seeded_input, sgd
from tests.cases.table import Result, case


def own(model: type[keras.Model], outputs: int = 2) -> keras.Model:
    """A functional model of this class."""
    x = seeded_input()
    return model(x, keras.layers.Dense(outputs, kernel_regularizer="l2")(keras.layers.Dense(6, "tanh")(x)))


class Simple(keras.Model):
    """`compute_loss` and a loop over the compiled metrics; takes sample weights; its own `test_step`."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self._updated(y, y_pred, sample_weight, loss)

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self(x, training=False)
        return self._updated(
            y, y_pred, sample_weight, self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
        )

    def _updated(self, y, y_pred, sample_weight, loss):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred, sample_weight=sample_weight)
        return {metric.name: metric.result() for metric in self.metrics}


@case()
def a_simple_train_step(engine) -> Result:
    """`train_step` of `compute_loss` and a loop over metrics; sample weights, clipping, accumulation; `test_step`"""
    model = own(Simple)
    model.compile(adam(global_clipnorm=0.1, gradient_accumulation_steps=2), "mse", weighted_metrics=["mae"])
    result = engine.fit(model, X[:65], TARGET[:65], sample_weight=WEIGHT[:65])
    return result | {"evaluated": np.array(engine.evaluate(model, X, TARGET, sample_weight=WEIGHT))}


class LowerLevel(keras.Model):
    """Its own loss object and trackers; compiled with an optimizer alone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = keras.losses.MeanSquaredError()

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.loss_fn(y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]


@case()
def a_lower_level_train_step(engine) -> Result:
    """`train_step` with a loss object and trackers of its own"""
    model = own(LowerLevel)
    model.compile(sgd())
    return engine.fit(model, X, TARGET)


class Prepared(keras.Model):
    """Changes its data, then leaves the step to Keras."""

    def train_step(self, data):
        x, y = data
        return super().train_step((2 * x - 1, y))


@case()
def a_prepared_train_step(engine) -> Result:
    """`train_step` that prepares its data and calls `super().train_step`"""
    model = own(Prepared, outputs=3)
    model.compile(sgd(), SPARSE(from_logits=True), metrics=["accuracy"])
    return engine.fit(model, X, LABEL)


class Adversaries(keras.Model):
    """A generator and a discriminator, each with its optimizer; latent vectors come with the data."""

    def __init__(self, generator: Any, discriminator: Any) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def train_step(self, data):
        latent, real = data
        rows = tf.shape(real)[0]
        both = tf.concat([self.generator(latent), real], axis=0)
        labels = tf.concat([tf.ones((rows, 1)), tf.zeros((rows, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(both))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(gradients, self.discriminator.trainable_weights)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(tf.zeros((rows, 1)), self.discriminator(self.generator(latent)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(gradients, self.generator.trainable_weights)
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}


@case()
def two_optimizers(engine) -> Result:
    """A GAN: two models, two losses, two optimizers (latent vectors in the data)"""
    keras.utils.set_random_seed(1)
    generator = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)])
    discriminator = keras.Sequential([keras.Input((2,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(1)])
    model = Adversaries(generator, discriminator)
    model.compile(adam(), adam(learning_rate=0.02), keras.losses.BinaryCrossentropy(from_logits=True))
    result = engine.fit(model, X, TARGET)
    updates = [optimizer.iterations.numpy() for optimizer in (model.d_optimizer, model.g_optimizer)]
    return result | {"updates": np.array(updates)}


class Divergence(keras.layers.Layer):
    """Adds the KL divergence of its codes from a normal distribution, a mean over rows."""

    def call(self, codes: Any) -> Any:
        mean, log_var = codes
        terms = 1 + log_var - keras.ops.square(mean) - keras.ops.exp(log_var)
        self.add_loss(-0.05 * keras.ops.mean(keras.ops.sum(terms, axis=1)))
        return mean


class Autoencoder(keras.Model):
    """Reconstruction in `train_step`, the KL term by `add_loss`, a tracker of each."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.total = keras.metrics.Mean(name="loss")
        self.reconstruction = keras.metrics.Mean(name="reconstruction_loss")
        self.divergence = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total, self.reconstruction, self.divergence]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            reconstructed = self(x, training=True)
            reconstruction = keras.ops.mean(keras.ops.sum(keras.ops.square(x - reconstructed), axis=1))
            divergence = sum(self.losses)
            # A factor, because TensorFlow's graph optimizer merges bare sums with the tracker's own and orders them by
            # the names of functions, which count on in a process: the last bit of the tracker depends on it.
            total = 0.5 * (reconstruction + divergence)
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total.update_state(total)
        self.reconstruction.update_state(reconstruction)
        self.divergence.update_state(divergence)
        return {metric.name: metric.result() for metric in self.metrics}


@case()
def an_autoencoder(engine) -> Result:
    """A variational autoencoder without sampling: `add_loss` and three trackers"""
    x = seeded_input()
    codes = Divergence()([keras.layers.Dense(2)(x), keras.layers.Dense(2)(x)])
    model = Autoencoder(x, keras.layers.Dense(4)(codes))
    model.compile(adam())
    return engine.fit(model, X)
