"""Trainings that every engine must end with the same numbers, and the program that runs them on one.

`python -m tests.cases OUT CASE,CASE... ENGINE[:DEVICES]...` runs these cases and every check of
`tests.conformance` on each engine named and writes `OUT/ENGINE-DEVICES.npz`: for each case its final weights,
its history and what evaluate and predict say. "keras" is keras.Model.fit itself. Under a launcher, the chief
writes. OUT/digits holds the record files. Everything is float64, so that what remains of a difference is a
mistake and not rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit.session import init
from tests.conformance import CHECKS
from tests.ranks import show_stacks_when_asked

EPOCHS = 3
CLASSES = 3
SPLITS = ("train", "validation")
RNG = np.random.default_rng(0)
X = RNG.random((67, 4))
LABEL = RNG.integers(0, CLASSES, 67)
TARGET = RNG.random((67, 2))
WEIGHT = RNG.random(67)
TOKENS = RNG.integers(1, 9, (67, 6)) * (np.arange(6) < RNG.integers(1, 7, (67, 1)))
SPARSE = keras.losses.SparseCategoricalCrossentropy
Result = dict[str, Any]


class Engine:
    """fit, evaluate and predict on one engine, and a look at the replicas when a training ends."""

    def __init__(self, name: str, devices: int | None, records: Path) -> None:
        self.name = name
        self.records = records
        self.options = {} if name == "keras" else {"strategy": name, "devices": devices}

    def fit(self, model: Any, *data: Any, **arguments: Any) -> Result:
        arguments = {"batch_size": 32, "epochs": EPOCHS, "verbose": 0, "shuffle": False} | arguments
        if self.name == "keras":
            history = model.fit(*data, **arguments)
        else:
            arguments["callbacks"] = [*arguments.pop("callbacks", []), ReplicasAgree(self)]
            history = distfit.fit(model, *data, **arguments, **self.options)
        trained = history.model
        assert not any(isinstance(variable._value, tf.distribute.DistributedValues) for variable in trained.variables)
        logs = {f"history/{name}": np.array(values) for name, values in history.history.items()}
        weights = [np.ravel(weight) for weight in trained.get_weights()]
        return {
            "weights": np.concatenate(weights),
            "updates": np.array(int(trained.optimizer.iterations)),
            **logs,
        }

    def evaluate(self, model: Any, *data: Any, **arguments: Any) -> Any:
        call = (
            model.evaluate if self.name == "keras" else lambda *a, **k: distfit.evaluate(model, *a, **k, **self.options)
        )
        return call(*data, batch_size=32, verbose=0, **arguments)

    def predict(self, model: Any, data: Any) -> Any:
        call = (
            model.predict if self.name == "keras" else lambda *a, **k: distfit.predict(model, *a, **k, **self.options)
        )
        return call(data, batch_size=32, verbose=0)


class ReplicasAgree(keras.callbacks.Callback):
    """At the end of a training every replica of every rank holds the same weights and optimizer state."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_end(self, logs: Any = None) -> None:
        session = init(**self._engine.options)
        variables = [*self.model.weights, *self.model.optimizer.variables]
        copies = [session.backend.replica_values(variable) for variable in variables]
        for variable, own in zip(variables, copies, strict=True):
            assert len(own) == session.topology.replicas_per_process
            assert all((copy == own[0]).all() for copy in own), f"{variable.path} differs between replicas"
        fingerprints = session.transport.gather(b"".join(own[0].tobytes() for own in copies))
        assert len(set(fingerprints)) == 1, "weights differ between ranks"


def classifier(optimizer: Any, loss: Any = None, **compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = keras.layers.Dense(8, "tanh")(x)
    model = keras.Model(x, keras.layers.Dense(CLASSES)(h))
    model.compile(optimizer, loss or SPARSE(from_logits=True), **({"metrics": ["accuracy"]} | compiled))
    return model


def two_outputs(optimizer: Any, losses: list, **compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = keras.layers.Dense(8, "tanh")(x)
    model = keras.Model(x, [keras.layers.Dense(CLASSES, name="a")(h), keras.layers.Dense(2, name="b")(h)])
    model.compile(optimizer, losses, **compiled)
    return model


def masked(reduction: str) -> keras.Model:
    """Two masked terms under one weight: each has its own number of valid steps."""
    keras.utils.set_random_seed(1)
    tokens = keras.Input((6,), dtype="int32")
    h = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    h = keras.layers.SimpleRNN(5, return_sequences=True)(h)
    model = keras.Model(tokens, [keras.layers.Dense(CLASSES, name="a")(h), keras.layers.Dense(1, name="b")(h)])
    model.compile(
        "sgd",
        [SPARSE(from_logits=True, reduction=reduction), keras.losses.MeanSquaredError(reduction=reduction)],
    )
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


class OwnLoss(keras.Model):
    """Keras' documented pattern of an overridden compute_loss: a mean over rows, and a metric fed with it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.error = keras.metrics.Mean(name="error")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        error = keras.ops.mean(keras.ops.square(y - y_pred))
        self.error.update_state(error)
        return error + sum(self.losses)


def _sgd(**arguments: Any) -> Any:
    return keras.optimizers.SGD(**({"learning_rate": 0.1, "momentum": 0.9} | arguments))


def _adam(**arguments: Any) -> Any:
    return keras.optimizers.Adam(0.01, **arguments)


def batches_that_divide(engine: Engine) -> Result:
    return engine.fit(classifier(_sgd()), X[:48], LABEL[:48], batch_size=12)


def a_short_last_batch(engine: Engine) -> Result:
    model = classifier(_sgd())
    result = engine.fit(model, X, LABEL)
    result["predicted"] = engine.predict(model, X)
    result["evaluated"] = np.array(engine.evaluate(model, X, LABEL))
    return result


def a_last_batch_smaller_than_the_replicas(engine: Engine) -> Result:
    return engine.fit(classifier(_adam()), X[:65], LABEL[:65])


def global_clipnorm(engine: Engine) -> Result:
    return engine.fit(classifier(_sgd(global_clipnorm=0.05)), X, LABEL)


def clipnorm_and_schedule(engine: Engine) -> Result:
    rate = keras.optimizers.schedules.CosineDecay(0.05, 9)
    return engine.fit(classifier(keras.optimizers.Adam(rate, clipnorm=0.05)), X, LABEL)


def sample_weights(engine: Engine) -> Result:
    model = classifier(_adam(), weighted_metrics=["accuracy"])
    result = engine.fit(model, X, LABEL, sample_weight=WEIGHT)
    result["evaluated"] = np.array(engine.evaluate(model, X, LABEL, sample_weight=WEIGHT))
    return result


def weights_as_divisor(engine: Engine) -> Result:
    loss = SPARSE(from_logits=True, reduction="mean_with_sample_weight")
    return engine.fit(classifier(_sgd(), loss), X, LABEL, sample_weight=WEIGHT)


@keras.saving.register_keras_serializable("tests")
class Hits(keras.metrics.Metric):
    """Keras' documented pattern of an own metric, whose result is the variable itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hits = self.add_weight(name="hits", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        right = keras.ops.equal(keras.ops.argmax(y_pred, -1), keras.ops.cast(y_true, "int64"))
        self.hits.assign_add(keras.ops.sum(keras.ops.cast(right, self.dtype)))

    def result(self) -> Any:
        return self.hits


def an_own_metric(engine: Engine) -> Result:
    return engine.fit(classifier(_sgd(), metrics=[Hits(name="hits")]), X[:65], LABEL[:65])


def class_weights(engine: Engine) -> Result:
    return engine.fit(classifier(_sgd()), X, LABEL, class_weight={0: 0.2, 1: 1.0, 2: 3.0})


def a_sum_of_losses(engine: Engine) -> Result:
    return engine.fit(classifier(_sgd(learning_rate=0.005), SPARSE(from_logits=True, reduction="sum")), X, LABEL)


def several_outputs(engine: Engine) -> Result:
    model = two_outputs(
        _sgd(), [SPARSE(from_logits=True), "mse"], loss_weights=[1.0, 0.3], metrics=[["accuracy"], ["mae"]]
    )
    result = engine.fit(model, X, [LABEL, TARGET])
    first, second = engine.predict(model, X)
    return result | {"first": first, "second": second}


def several_outputs_by_weight(engine: Engine) -> Result:
    losses = [
        SPARSE(from_logits=True, reduction="mean_with_sample_weight"),
        keras.losses.MeanSquaredError(reduction="sum"),
    ]
    model = two_outputs(_adam(), losses, loss_weights=[1.0, 0.01])
    return engine.fit(model, X, [LABEL, TARGET], sample_weight=[WEIGHT, WEIGHT[::-1].copy()])


def masked_sequences(engine: Engine) -> Result:
    return engine.fit(masked("sum_over_batch_size"), TOKENS, [TOKENS % CLASSES, TOKENS[..., None] / 9])


def masked_sequences_by_weight(engine: Engine) -> Result:
    return engine.fit(masked("mean_with_sample_weight"), TOKENS, [TOKENS % CLASSES, TOKENS[..., None] / 9])


def a_subclassed_model_with_regularisation(engine: Engine) -> Result:
    keras.utils.set_random_seed(1)
    model = Subclassed()
    model.compile(_adam(), SPARSE(from_logits=True), metrics=["accuracy"])
    return engine.fit(model, X, LABEL)


def an_own_compute_loss(engine: Engine) -> Result:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    model = OwnLoss(x, keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.05))(x))
    model.compile(_sgd())
    return engine.fit(model, X, TARGET)


def accumulation_decay_and_ema(engine: Engine) -> Result:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True, gradient_accumulation_steps=2)
    return engine.fit(classifier(optimizer), X, LABEL)


def frozen_and_unused_layers(engine: Engine) -> Result:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    shared = keras.layers.Dense(4, "tanh")
    frozen = keras.layers.Dense(4, trainable=False)
    model = keras.Model(x, keras.layers.Dense(CLASSES)(frozen(shared(shared(x)))))
    model.compile(_sgd(), SPARSE(from_logits=True))
    return engine.fit(model, X, LABEL)


def shuffled_arrays_with_validation(engine: Engine) -> Result:
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.02, restore_best_weights=True)
    slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.8 * rate)
    return engine.fit(
        classifier(_sgd()), X, LABEL, shuffle=True, epochs=8, validation_split=0.3, callbacks=[stop, slower]
    )


def a_global_dataset(engine: Engine) -> Result:
    data = tf.data.Dataset.from_tensor_slices(({"x": X}, LABEL)).shuffle(67, seed=3).batch(16)
    keras.utils.set_random_seed(1)
    x = keras.Input((4,), name="x")
    model = keras.Model({"x": x}, keras.layers.Dense(CLASSES)(x))
    model.compile(_sgd(), SPARSE(from_logits=True))
    return engine.fit(model, data, batch_size=None, validation_data=data.take(2))


def a_dataset_of_unknown_length(engine: Engine) -> Result:
    data = tf.data.Dataset.from_tensor_slices((X, LABEL)).filter(lambda x, y: x[0] > 0.3).batch(16)
    if engine.name == "keras":
        # Keras counts one update too many in an epoch of unknown length: the step that finds no data left
        # runs the part of its graph that needs none (keras#23084).
        data = data.apply(tf.data.experimental.assert_cardinality(len(list(data))))
    return engine.fit(classifier(_sgd()), data, batch_size=None)


def steps_per_epoch(engine: Engine) -> Result:
    data = tf.data.Dataset.from_tensor_slices((X, LABEL)).batch(16).repeat()
    return engine.fit(classifier(_sgd()), data, batch_size=None, steps_per_epoch=4)


def records_in_files(engine: Engine) -> Result:
    """The order of records depends on the seed alone; a builder function; validation by records."""
    return _fit_digits(engine, batch_size=100)


def epochs_longer_than_the_records(engine: Engine) -> Result:
    """Two epochs of 18 steps over 12 batches are three passes, and validation sees each record once."""
    return _fit_digits(engine, batch_size=120, epochs=2, steps_per_epoch=18)


def _fit_digits(engine: Engine, **arguments: Any) -> Result:
    """Nothing for Keras, which cannot read records."""
    if engine.name == "keras":
        return {}

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(10)])
        model.compile(_sgd(), SPARSE(from_logits=True), metrics=["accuracy"])
        return model

    train, valid = (distfit.TFRecords(engine.records / f"{split}-*", FEATURES, _pixels) for split in SPLITS)
    return engine.fit(build, train, validation_data=valid, shuffle=True, seed=4, **arguments)


class EvaluatesItself(keras.callbacks.Callback):
    """What users do in callbacks: other calls of the same engine, in the middle of a training."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.seen: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(self._engine.evaluate(self.model, X, LABEL))
        self.seen.append(self._engine.predict(self.model, X[:1]).sum(keepdims=True)[0].repeat(2))


def calls_inside_a_training(engine: Engine) -> Result:
    keras.utils.set_random_seed(1)
    norm = keras.layers.BatchNormalization(trainable=False)
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(CLASSES)])
    model.compile(_sgd(), SPARSE(from_logits=True), metrics=["accuracy"])
    if engine.name == "keras":
        # Keras' evaluate takes the metrics of the training away with it, and its history is replaced by none.
        return {}
    watcher = EvaluatesItself(engine)
    result = engine.fit(model, X, LABEL, callbacks=[watcher])
    return result | {"seen": np.array(watcher.seen)}


def predictions_without_targets(engine: Engine) -> Result:
    """A compiled model that was never built, and one with several outputs by name."""
    keras.utils.set_random_seed(1)
    model = Subclassed()
    model.compile(_adam(), SPARSE(from_logits=True), metrics=["accuracy"])
    first = engine.predict(model, X)
    x = keras.Input((4,))
    named = keras.Model(x, {"a": keras.layers.Dense(2)(x), "b": keras.layers.Dense(1)(x)})
    second = engine.predict(named, X[:65])
    return {"first": first, "a": second["a"], "b": second["b"]}


def sparse_rows(engine: Engine) -> Result:
    keras.utils.set_random_seed(1)
    x = keras.Input((4,), sparse=True)
    model = keras.Model(x, keras.layers.Dense(CLASSES)(x))
    model.compile(_sgd(), SPARSE(from_logits=True))
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(np.where(X > 0.5, X, 0)), LABEL)).batch(32)
    return engine.fit(model, data, batch_size=None)


FEATURES = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}


def _pixels(example: dict) -> tuple:
    image = tf.io.decode_png(example["image"], channels=1)
    return tf.cast(tf.reshape(image, [64]), tf.float64) / 255, example["label"]


def data_sharded_by_the_script(engine: Engine) -> Result:
    """Each process brings its part of the same global batches; the rows of a batch come in another order."""
    batches = tf.data.Dataset.from_tensor_slices((X, LABEL)).batch(32)

    def own_part(context: distfit.InputContext) -> tf.data.Dataset:
        return batches.map(lambda x, y: (x[context.rank :: context.size], y[context.rank :: context.size]))

    data = batches if engine.name == "keras" else distfit.local(own_part)
    return engine.fit(classifier(_sgd()), data, batch_size=None)


def uneven_parts_of_static_shape(engine: Engine) -> Result:
    """The last process has fewer batches than the others, and their number of rows is part of their type."""
    if engine.name == "keras":
        return {}

    def own_part(context: distfit.InputContext) -> tf.data.Dataset:
        last = context.rank == context.size - 1
        rows = slice(0, 8) if last and context.size > 1 else slice(0, 24)
        return tf.data.Dataset.from_tensor_slices((X[rows], LABEL[rows])).batch(8, drop_remainder=True)

    result = engine.fit(classifier(_sgd()), distfit.local(own_part), batch_size=None)
    return {"updates": result["updates"]}


def moving_means(engine: Engine) -> Result:
    """The moving mean of what goes into the first layer is linear in the rows, so the same for any replicas."""
    keras.utils.set_random_seed(1)
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dropout(0.3), keras.layers.Dense(CLASSES)])
    model.compile(_sgd(), SPARSE(from_logits=True))
    engine.fit(model, X, LABEL)
    return {"moving_mean": norm.moving_mean.numpy()}


def the_same_bits_again(engine: Engine) -> Result:
    """An engine repeats itself exactly, random layers included."""

    def train() -> np.ndarray:
        keras.utils.set_random_seed(1)
        x = keras.Input((4,))
        h = keras.layers.BatchNormalization()(keras.layers.Dropout(0.3)(keras.layers.Dense(32, "relu")(x)))
        model = keras.Model(x, keras.layers.Dense(CLASSES)(h))
        model.compile(_adam(), SPARSE(from_logits=True))
        return engine.fit(model, X, LABEL, shuffle=True)["weights"]

    first, second = train(), train()
    assert first.tobytes() == second.tobytes(), "the same training gave other bits"
    return {"repeats": np.array(True)}


CASES: dict[str, Callable[[Engine], Result]] = {
    case.__name__: case
    for case in (
        batches_that_divide,
        a_short_last_batch,
        a_last_batch_smaller_than_the_replicas,
        global_clipnorm,
        clipnorm_and_schedule,
        sample_weights,
        weights_as_divisor,
        an_own_metric,
        class_weights,
        a_sum_of_losses,
        several_outputs,
        several_outputs_by_weight,
        masked_sequences,
        masked_sequences_by_weight,
        a_subclassed_model_with_regularisation,
        an_own_compute_loss,
        accumulation_decay_and_ema,
        frozen_and_unused_layers,
        shuffled_arrays_with_validation,
        a_global_dataset,
        a_dataset_of_unknown_length,
        steps_per_epoch,
        epochs_longer_than_the_records,
        records_in_files,
        data_sharded_by_the_script,
        uneven_parts_of_static_shape,
        moving_means,
        calls_inside_a_training,
        predictions_without_targets,
        sparse_rows,
        the_same_bits_again,
    )
}


def main(out: str, cases: str, *engines: str) -> None:
    show_stacks_when_asked()
    keras.backend.set_floatx("float64")
    if "mirrored:3" in engines:
        init("mirrored", 3)  # the most devices first: logical ones can only be made before TensorFlow starts
    for text in engines:
        name, _, devices = text.partition(":")
        engine = Engine(name, int(devices) if devices else None, Path(out) / "digits")
        results = {f"{case}//{key}": value for case in cases.split(",") for key, value in CASES[case](engine).items()}
        session = None if name == "keras" else init(**engine.options)
        if session is not None:
            for check, run_check in CHECKS.items():
                run_check(session)
                results[f"{check}//passed"] = np.array(True)
        if session is None or session.is_chief:
            np.savez(Path(out) / f"{text.replace(':', '-')}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
