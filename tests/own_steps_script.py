"""Models that bring their own train_step: what the rows of tests/cases/own_steps.py do not hold.

`python -m tests.own_steps_script OUT ENGINE[:DEVICES]...` trains every case on each engine named and writes
`OUT/ENGINE-DEVICES.npz`; "keras" is keras.Model.fit itself. Under a launcher, the chief writes. Everything is float64,
so that what remains of a difference is a mistake and not rounding. The last of three batches has one row.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops, optimizers

import distfit
from distfit.backends.hooks import optimizers_of, variables_of
from distfit.errors import InputError
from distfit.session import init
from tests.ranks import collect_less_garbage, show_stacks_when_asked

ROWS, CLASSES = 65, 3
RNG = np.random.default_rng(0)
X = RNG.random((ROWS, 4))
LABEL = RNG.integers(0, CLASSES, ROWS)
TARGET, NOISE = RNG.random((ROWS, 2)), RNG.random((ROWS, 2))
WEIGHT = RNG.random(ROWS)
Result = dict[str, Any]


class Engine:
    """One of distfit's, such as "mirrored:3", or keras.Model.fit itself ("keras")."""

    def __init__(self, text: str) -> None:
        self.name, _, devices = text.partition(":")
        self.options = {"strategy": self.name, "devices": int(devices) if devices else None}
        self.synchronised = {} if self.name == "keras" else {"sync_batch_norm": True}


def sparse(**options: Any) -> Any:
    """Made when it is needed: a loss computes in the float type that Keras has then."""
    return losses.SparseCategoricalCrossentropy(from_logits=True, **options)


class ReplicasAgree(keras.callbacks.Callback):
    """At the end of a training every replica holds the same weights and optimizer states, to the bit."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_end(self, logs: Any = None) -> None:
        session = init(**self._engine.options)
        metrics = {id(variable) for variable in self.model.metrics_variables}
        shared = [variable for variable in variables_of(self.model) if id(variable) not in metrics]
        copies = [session.backend.replica_values(variable) for variable in shared]
        for variable, own in zip(shared, copies, strict=True):
            assert all((copy == own[0]).all() for copy in own), f"{variable.path} differs between replicas"
        states = session.transport.gather([own[0].tobytes() for own in copies])
        for number, variable in enumerate(shared):
            assert len({state[number] for state in states}) == 1, f"{variable.path} differs between ranks"


class EvaluatesItself(keras.callbacks.Callback):
    """Another call of the same engine, in the middle of a training."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.seen: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(distfit.evaluate(self.model, X, LABEL, verbose=0, **self._engine.options))


class HearsBatches(keras.callbacks.Callback):
    """What a callback is told after each batch, in the order of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[list[float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.logs.append([float(value) for _, value in sorted(logs.items())])


def fit(engine: Engine, model: Any, *data: Any, **arguments: Any) -> Result:
    """The weights, optimizer states and logs after two epochs."""
    arguments = {"batch_size": 32, "epochs": 2, "verbose": 0, "shuffle": False} | arguments
    if engine.name == "keras":
        history = model.fit(*data, **arguments)
    else:
        watchers = [*arguments.pop("callbacks", []), ReplicasAgree(engine)]
        # Each step's values, as Keras has them.
        history = distfit.fit(model, *data, **arguments, callbacks=watchers, logs_every_steps=1, **engine.options)
    states = [variable.numpy().ravel() for optimizer in optimizers_of(model) for variable in optimizer.variables]
    logs = {f"history/{name}": np.array(values) for name, values in history.history.items()}
    return {"weights": np.concatenate([np.ravel(weight) for weight in model.get_weights()] + states), **logs}


def mlp(inputs: int, outputs: int) -> keras.Model:
    x = keras.Input((inputs,))
    return keras.Model(x, layers.Dense(outputs)(layers.Dense(8, "tanh")(x)))


def functional(kind: type) -> Any:
    """A model of that class between the inputs and outputs of `mlp`."""
    keras.utils.set_random_seed(1)
    inner = mlp(4, CLASSES)
    return kind(inner.inputs, inner.outputs)


class LowerLevel(keras.Model):
    """keras.io, Customizing what happens in fit: going lower-level, with a loss object of its own and raw logs."""

    def __init__(self, *arguments: Any, loss: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = loss or losses.MeanSquaredError()

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.loss_fn(y, y_pred, sample_weight) + sum(self.losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
        return {
            "loss": self.loss_tracker.result(),
            "mae": self.mae_metric.result(),
            "norm": norm,
            "last": ops.mean(y_pred),
        }

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]


class Augmented(keras.Model):
    """The data changed, the rest left to Keras."""

    def train_step(self, data):
        x, y = data
        return super().train_step((ops.concatenate([x, x[:, ::-1]]), ops.concatenate([y, y])))


class Gan(keras.Model):
    """keras.io, DCGAN overriding train_step: two optimizers; the noise comes with the data or from a seed."""

    def __init__(self, noise: Any = None) -> None:
        super().__init__()
        self.discriminator, self.generator = mlp(4, 1), mlp(2, 4)
        self.seed_generator = None if noise is None else keras.random.SeedGenerator(noise)

    def compile(self, d_optimizer: Any, g_optimizer: Any, loss_fn: Any) -> None:
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def train_step(self, data):
        real, z = data
        rows = ops.shape(real)[0]
        if self.seed_generator is not None:
            z = keras.random.normal(ops.shape(z), seed=self.seed_generator, dtype=z.dtype)
        fake = self.generator(z)
        combined = ops.concatenate([fake, real], axis=0)
        labels = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(gradients, self.discriminator.trainable_weights)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((rows, 1)), self.discriminator(self.generator(z)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(gradients, self.generator.trainable_weights)
        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


class Vae(keras.Model):
    """keras.io, Variational AutoEncoder: three trackers; the sampling is left out to be comparable."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(4, 4), mlp(2, 4)
        names = ("total_loss", "reconstruction_loss", "kl_loss")
        self.trackers = [keras.metrics.Mean(name=name) for name in names]

    @property
    def metrics(self):
        return self.trackers

    def train_step(self, data):
        with tf.GradientTape() as tape:
            z_mean, z_log_var = ops.split(self.encoder(data), 2, axis=-1)
            reconstruction = self.decoder(z_mean + ops.exp(0.5 * z_log_var))
            reconstruction_loss = ops.mean(ops.sum(ops.square(data - reconstruction), axis=1))
            kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
            kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
        gradients = tape.gradient(total_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        for tracker, value in zip(self.trackers, (total_loss, reconstruction_loss, kl_loss), strict=True):
            tracker.update_state(value)
        return {tracker.name: tracker.result() for tracker in self.trackers}


class Distiller(keras.Model):
    """A student learns from a frozen teacher's soft outputs; losses as vectors, row by row, are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = mlp(4, CLASSES), mlp(4, CLASSES)
        self.teacher.trainable = False
        self.hits = keras.metrics.SparseCategoricalAccuracy(name="hits")

    def train_step(self, data):
        x, y = data
        soft = ops.softmax(self.teacher(x, training=False) / 3)
        with tf.GradientTape() as tape:
            y_pred = self.student(x, training=True)
            student_loss = losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
            distillation_loss = losses.kl_divergence(soft, ops.softmax(y_pred / 3))
            each = 0.1 * student_loss + 0.9 * distillation_loss
        gradients = tape.gradient(each, self.student.trainable_variables)
        self.optimizer.apply(gradients, self.student.trainable_variables)
        self.hits.update_state(y, y_pred)
        return {"hits": self.hits.result(), "student": ops.mean(student_loss)}


class Sam(keras.Model):
    """keras.io, Sharpness-aware minimization: climbs along the gradient, and takes the gradient there."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        weights = self.trainable_variables
        gradients = tape.gradient(loss, weights)
        scale = 0.05 / (ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients)) + 1e-12)
        climbed = [gradient * scale for gradient in gradients]
        for weight, step in zip(weights, climbed, strict=True):
            weight.assign_add(step)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, weights)
        for weight, step in zip(weights, climbed, strict=True):
            weight.assign_sub(step)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return self.compute_metrics(x, y, y_pred, None)


class WassersteinGan(Gan):
    """keras.io, WGAN-GP: several critic steps, and a penalty on the gradient at the inputs."""

    def train_step(self, data):
        real, z = data
        for _ in range(2):
            with tf.GradientTape() as tape:
                fake = self.generator(z, training=True)
                cost = ops.mean(self.discriminator(fake)) - ops.mean(self.discriminator(real))
                between = (real + fake) / 2
                with tf.GradientTape() as inner:
                    inner.watch(between)
                    predicted = self.discriminator(between, training=True)
                norm = ops.sqrt(ops.sum(ops.square(inner.gradient(predicted, between)), axis=1))
                d_loss = cost + 10 * ops.mean((norm - 1.0) ** 2)
            gradients = tape.gradient(d_loss, self.discriminator.trainable_variables)
            pairs = zip(gradients, self.discriminator.trainable_variables, strict=True)
            self.d_optimizer.apply_gradients(pairs)
        with tf.GradientTape() as tape:
            g_loss = -ops.mean(self.discriminator(self.generator(z, training=True)))
        gradients = tape.gradient(g_loss, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(zip(gradients, self.generator.trainable_variables, strict=True))
        return {"d_loss": d_loss, "g_loss": g_loss}


class MeanTeacher(keras.Model):
    """A teacher that is the moving average of the student, and a centre that is one of what it sees (DINO)."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = mlp(4, CLASSES), mlp(4, CLASSES)
        self.teacher.trainable = False
        self.center = self.add_weight(shape=(CLASSES,), initializer="zeros", trainable=False, name="center")

    def train_step(self, data):
        x, _ = data
        target = self.teacher(x)
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self.student(x) - ops.softmax(target - self.center)))
        gradients = tape.gradient(loss, self.student.trainable_variables)
        self.optimizer.apply(gradients, self.student.trainable_variables)
        for slow, fast in zip(self.teacher.weights, self.student.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.center.assign(0.9 * self.center + 0.1 * ops.mean(target, axis=0))
        return {"distance": loss}


class ByHand(keras.Model):
    """Gradients clipped and accumulated by the step itself, and applied in a branch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen = self.add_weight(shape=(), initializer="zeros", dtype="int64", trainable=False, name="seen")
        self.held = [
            self.add_weight(shape=weight.shape, initializer="zeros", trainable=False, name=f"held_{number}")
            for number, weight in enumerate(self.trainable_weights)
        ]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, self.trainable_weights), 0.05)
        self.seen.assign_add(1)
        for held, gradient in zip(self.held, gradients, strict=True):
            held.assign_add(gradient)

        def update() -> Any:
            self.optimizer.apply([held / 2 for held in self.held], self.trainable_weights)
            for held in self.held:
                held.assign(ops.zeros_like(held))
            return 0

        tf.cond(self.seen % 2 == 0, update, lambda: 0)
        return {"norm": norm}


class Inner(keras.Model):
    """A second derivative of weights: the loss after a step of gradient descent (MAML, arXiv:1703.03400)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=(4, 2), initializer="glorot_uniform", name="kernel")

    def train_step(self, data):
        x, y = data
        kernel = self.kernel
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner_loss = ops.mean(ops.square(y - ops.tanh(ops.matmul(x, kernel))))
            moved = kernel - 0.5 * inner.gradient(inner_loss, kernel)
            loss = ops.mean(ops.square(y - ops.tanh(ops.matmul(x, moved))))
        self.optimizer.apply([outer.gradient(loss, kernel)], [kernel])
        return {"loss": loss}


class Hebbian(keras.Model):
    """No gradient at all: a weight, and what an optimizer gets, made of the replica's rows by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=(4, 2), initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight(shape=(2,), initializer="zeros", name="bias")
        self.seen = keras.metrics.Mean(name="seen")

    def train_step(self, data):
        x, y = data
        rows = ops.cast(ops.shape(x)[0], x.dtype)
        self.kernel.assign(0.9 * self.kernel + 0.1 * ops.matmul(ops.transpose(x), y) / rows)
        self.optimizer.apply([-ops.mean(y, axis=0)], [self.bias])
        self.optimizer.learning_rate.assign(0.1 * ops.mean(y))
        self.seen.update_state(y)
        root = ops.sqrt(self.seen.result())
        return {"rows": ops.shape(x)[0], "root": root, "size": ops.sum(ops.square(self.kernel))}


def _compiled(model: Any, *arguments: Any, **options: Any) -> Any:
    model.compile(*arguments, **options)
    return model


def _sgd(**arguments: Any) -> Any:
    return optimizers.SGD(**({"learning_rate": 0.1, "momentum": 0.9} | arguments))


def _lower_level(engine: Engine, loss: Any, sample_weight: Any = None) -> Result:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2(0.05))(x)
    h = layers.ActivityRegularization(l2=0.01)(h)
    model = LowerLevel(x, layers.Dense(2)(h), loss=loss)
    model.compile(optimizers.Adam(0.01))
    heard = HearsBatches()
    result = fit(engine, model, X, TARGET, sample_weight=sample_weight, callbacks=[heard])
    return result | {"batches": np.array(heard.logs)}


def a_loss_object_and_raw_logs(engine: Engine) -> Result:
    loss = losses.MeanSquaredError(reduction="mean_with_sample_weight")
    return _lower_level(engine, loss, WEIGHT)


def a_loss_object_that_sums(engine: Engine) -> Result:
    return _lower_level(engine, losses.MeanSquaredError(reduction="sum"))


def _gan(kind: type, **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = kind(**options)
    model.compile(optimizers.Adam(0.01), _sgd(learning_rate=0.02), losses.BinaryCrossentropy(from_logits=True))
    return model


def two_optimizers_and_noise(engine: Engine) -> Result:
    """Each replica draws its own noise: not comparable, and the same bits again."""
    if engine.name == "keras":
        return {}
    first, second = (fit(engine, _gan(Gan, noise=3), X, NOISE) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first), "the same training gave other bits"
    return {"repeats": np.array(True)}


def a_gradient_penalty(engine: Engine) -> Result:
    return fit(engine, _gan(WassersteinGan), X, NOISE)


def _own(engine: Engine, kind: Callable[[], Any], y: Any, optimizer: Any = None) -> Result:
    keras.utils.set_random_seed(1)
    data = (X,) if y is None else (X, y)
    return fit(engine, _compiled(kind(), optimizer or _sgd(learning_rate=0.02)), *data)


def a_variational_autoencoder(engine: Engine) -> Result:
    return _own(engine, Vae, None, optimizers.Adam(0.01))


def a_distilled_student(engine: Engine) -> Result:
    return _own(engine, Distiller, LABEL, _sgd(learning_rate=0.005))


def sharpness_aware_minimization(engine: Engine) -> Result:
    model = _compiled(functional(Sam), _sgd(), sparse(), metrics=["accuracy"])
    return fit(engine, model, X, LABEL)


def a_moving_teacher(engine: Engine) -> Result:
    return _own(engine, MeanTeacher, LABEL)


def clipped_and_accumulated_by_hand(engine: Engine) -> Result:
    model = _compiled(functional(ByHand), optimizers.Adam(0.01), sparse())
    return fit(engine, model, X, LABEL)


def a_second_derivative(engine: Engine) -> Result:
    return _own(engine, Inner, TARGET)


def weights_without_gradients(engine: Engine) -> Result:
    result = _own(engine, Hebbian, TARGET)
    # How many rows a replica has, or the root of its own metric, is no number that replicas share.
    left_out = ("history/rows", "history/root")
    assert all((name in result) == (engine.name == "keras") for name in left_out)
    return {name: value for name, value in result.items() if name not in left_out}


def _normalising(layer: Any) -> Any:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    return _compiled(Augmented(x, layers.Dense(CLASSES)(layer(x))), _sgd(), sparse())


def moving_means(engine: Engine) -> Result:
    """Moments are each replica's own, so only what is linear in the rows is comparable: the first moving mean."""
    norm = layers.BatchNormalization()
    watcher = EvaluatesItself(engine)
    fit(engine, _normalising(norm), X, LABEL, callbacks=[] if engine.name == "keras" else [watcher])
    assert len(set(watcher.seen)) == len(watcher.seen)
    return {"moving_mean": norm.moving_mean.numpy()}


def synchronised_moments(engine: Engine) -> Result:
    """Gradients flow through the sums of moments as well."""
    return fit(engine, _normalising(layers.BatchNormalization()), X, LABEL, **engine.synchronised)


def an_embedding(engine: Engine) -> Result:
    """Keras squares each of the rows that a word has in a batch, so they must not be added up before."""
    keras.utils.set_random_seed(1)
    tokens = keras.Input((4,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(tokens))
    model = _compiled(Augmented(tokens, layers.Dense(CLASSES)(h)), optimizers.Adam(0.01), sparse())
    return fit(engine, model, np.int32(9 * X), LABEL)


def half_precision(engine: Engine) -> Result:
    """The scale of the loss and every update are the same as on one device; digits are those of float16."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = functional(Augmented)
        model.compile(optimizers.LossScaleOptimizer(_sgd(learning_rate=0.01), dynamic_growth_steps=4), sparse())
        fit(engine, model, X, LABEL, epochs=4)
    finally:
        keras.config.set_dtype_policy("float64")
    optimizer = model.optimizer
    weights = np.concatenate([np.ravel(weight) for weight in model.get_weights()])
    return {"scale": np.array(optimizer.dynamic_scale), "half": weights, "updates": np.array(optimizer.iterations)}


class Answering(keras.Model):
    """Gives its metrics one number for a batch, by itself and weighted by the rows that it counts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.once, self.by_size = keras.metrics.Mean(name="once"), keras.metrics.Mean(name="by_size")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        error = ops.mean(ops.abs(y - y_pred))
        self.once.update_state(error)
        self.by_size.update_state(error, sample_weight=tf.shape(x)[0])
        return super().compute_metrics(x, y, y_pred, sample_weight=sample_weight)


class AnsweringStep(Answering):
    def train_step(self, data):
        return super().train_step(data)


def one_number_for_a_batch(engine: Engine) -> Result:
    """In Keras' step and in the model's own; a compiled metric that is a function answers one as well."""
    results = {}
    for kind in (Answering, AnsweringStep):
        model = _compiled(functional(kind), _sgd(), "mse", metrics=[_mean_error])
        found = fit(engine, model, X, LABEL[:, None] * np.ones(CLASSES))
        results |= {f"{kind.__name__}/{name}": value for name, value in found.items()}
    return results


def _mean_error(y: Any, y_pred: Any) -> Any:
    return ops.mean(ops.square(y - y_pred))


def run_eagerly(engine: Engine) -> Result:
    """Without a graph nothing tells what is the same on all replicas, so all of it is averaged."""
    keras.utils.set_random_seed(1)
    model = _compiled(MeanTeacher(), _sgd(), run_eagerly=True)
    return fit(engine, model, X[:33], LABEL[:33], epochs=1)


CASES: dict[str, Callable[[Engine], Result]] = {
    case.__name__: case
    for case in (
        a_loss_object_and_raw_logs,
        a_loss_object_that_sums,
        two_optimizers_and_noise,
        a_gradient_penalty,
        a_variational_autoencoder,
        a_distilled_student,
        sharpness_aware_minimization,
        a_moving_teacher,
        clipped_and_accumulated_by_hand,
        a_second_derivative,
        weights_without_gradients,
        moving_means,
        synchronised_moments,
        an_embedding,
        half_precision,
        one_number_for_a_batch,
        run_eagerly,
    )
}


class Counting(keras.Model):
    """A whole number made of rows has no mean over replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.add_weight(shape=(), initializer="zeros", dtype="int64", trainable=False, name="rows")

    def train_step(self, data):
        self.rows.assign_add(ops.cast(ops.shape(data[0])[0], "int64"))
        return {}


class GlobalOptimizer(keras.Model):
    """An optimizer that no attribute of the model has."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        OF_THE_SCRIPT.append(optimizers.SGD(0.1))

    def train_step(self, data):
        OF_THE_SCRIPT[-1].apply([ops.ones_like(w) for w in self.trainable_weights], self.trainable_weights)
        return {}


OF_THE_SCRIPT: list[Any] = []


class Forgotten(keras.Model):
    """A metric that `metrics` does not name."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.forgotten = keras.metrics.Mean(name="forgotten")

    @property
    def metrics(self):
        return []

    def train_step(self, data):
        self.forgotten.update_state(1.0)
        return {"forgotten": self.forgotten.result()}


class Mixed(keras.Model):
    """Gradients of weights and of inputs in one call."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = ops.mean(self(x))
        tape.gradient(loss, [x, *self.trainable_weights])
        return {}


class LossInABranch(keras.Model):
    """A divisor would have to be summed where some replicas may not arrive."""

    def train_step(self, data):
        x, y = data
        tf.cond(ops.mean(x) > 0.5, lambda: self.compute_loss(y=y, y_pred=self(x)), lambda: tf.zeros([], tf.float64))
        return {}


REFUSED = {
    "of which there is no mean": Counting,
    "self.d_optimizer = ...": lambda: functional(GlobalOptimizer),
    "received forgotten/": lambda: functional(Forgotten),
    "Take a persistent tape and ask twice": lambda: functional(Mixed),
    "inside a tf.cond": lambda: functional(LossInABranch),
}


def refusals(engine: Engine) -> None:
    """What replicas cannot do alike ends before the first step, on every rank, with a sentence."""
    for words, make in REFUSED.items():
        with pytest.raises(InputError, match=re.escape(words)) as refused:
            fit(engine, _compiled(make(), "sgd", sparse()), X, LABEL)
        assert refused.value.agreed


def main(out: str, *engines: str) -> None:
    show_stacks_when_asked()
    collect_less_garbage()
    keras.config.set_dtype_policy("float64")
    keras.backend.set_floatx("float64")
    if "mirrored:3" in engines:
        init("mirrored", 3)  # the most devices first: logical ones can only be made before TensorFlow starts
    for text in engines:
        engine = Engine(text)
        results = {f"{case}//{key}": value for case, run in CASES.items() for key, value in run(engine).items()}
        session = None if engine.name == "keras" else init(**engine.options)
        if session is not None and session.num_replicas > 1:
            refusals(engine)
        if session is None or session.is_chief:
            np.savez(Path(out) / f"{text.replace(':', '-')}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
