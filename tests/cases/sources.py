"""Where rows come from, and calls inside and beside a training."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from tests.cases.engines import cast, dataset
from tests.cases.models import LABEL, SPARSE, X, classes, classifier, classifying, seeded_input, sgd, subclassed
from tests.cases.table import Result, case

SPLITS = ("train", "validation")
FEATURES = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}


@case()
def shuffled_arrays_with_validation(engine) -> Result:
    """Shuffled arrays, `validation_split`, `EarlyStopping`, `LearningRateScheduler`"""
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.02, restore_best_weights=True)
    slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.8 * rate)
    return engine.fit(
        classifier(sgd()), X, LABEL, shuffle=True, epochs=8, validation_split=0.3, callbacks=[stop, slower]
    )


@case()
def a_dataset_of_unknown_length(engine) -> Result:
    """A filtered tf.data.Dataset, whose length nobody knows"""
    data = dataset(X, LABEL).filter(lambda x, y: x[0] > 0.3).batch(16)
    if engine.keras:
        # Keras counts one update too many in an epoch of unknown length: the step that finds no data left
        # runs the part of its graph that needs none (keras#23084).
        data = data.apply(tf.data.experimental.assert_cardinality(len(list(data))))
    return engine.fit(classifier(sgd()), data, batch_size=None)


@case()
def steps_per_epoch(engine) -> Result:
    """`steps_per_epoch` of an endless tf.data.Dataset"""
    data = dataset(X, LABEL).batch(16).repeat()
    return engine.fit(classifier(sgd()), data, batch_size=None, steps_per_epoch=4)


@case()
def sparse_rows(engine) -> Result:
    """Sparse tensors"""
    x = seeded_input(sparse=True)
    some = tf.sparse.from_dense(cast(np.where(X > 0.5, X, 0)))
    data = tf.data.Dataset.from_tensor_slices((some, LABEL)).batch(32)
    return engine.fit(classifying(x, x), data, batch_size=None)


@case()
def records_in_files(engine) -> Result:
    """Records in files (no Keras: it cannot read them): their order, a builder function, validation"""
    return _fit_digits(engine, batch_size=100)


@case()
def epochs_longer_than_the_records(engine) -> Result:
    """The same, two epochs over three passes of them"""
    return _fit_digits(engine, batch_size=120, epochs=2, steps_per_epoch=18)


def _fit_digits(engine: Any, **arguments: Any) -> Result:
    if engine.keras:
        return {}

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(10)])
        model.compile(sgd(), SPARSE(from_logits=True), metrics=["accuracy"])
        return model

    folder = engine.folder / "digits"
    train, valid = (distfit.TFRecords(folder / f"{split}-*", FEATURES, _pixels) for split in SPLITS)
    return engine.fit(build, train, validation_data=valid, shuffle=True, seed=4, **arguments)


def _pixels(example: dict) -> tuple:
    image = tf.io.decode_png(example["image"], channels=1)
    return tf.cast(tf.reshape(image, [64]), keras.config.floatx()) / 255, example["label"]


@case()
def data_sharded_by_the_script(engine) -> Result:
    """`distfit.local`: each process brings its part of a batch"""
    batches = dataset(X, LABEL).batch(32)

    def own_part(context: distfit.InputContext) -> tf.data.Dataset:
        return batches.map(lambda x, y: (x[context.rank :: context.size], y[context.rank :: context.size]))

    data = batches if engine.keras else distfit.local(own_part)
    return engine.fit(classifier(sgd()), data, batch_size=None)


@case()
def uneven_parts_of_static_shape(engine) -> Result:
    """`distfit.local`: the last process has fewer batches, of a fixed number of rows (updates alone compared)"""
    if engine.keras:
        return {}

    def own_part(context: distfit.InputContext) -> tf.data.Dataset:
        last = context.rank == context.size - 1
        rows = slice(0, 8) if last and context.size > 1 else slice(0, 24)
        return dataset(X[rows], LABEL[rows]).batch(8, drop_remainder=True)

    result = engine.fit(classifier(sgd()), distfit.local(own_part), batch_size=None)
    return {"updates": result["updates"]}


class EvaluatesItself(keras.callbacks.Callback):
    """What users do in callbacks: other calls of the same engine, in the middle of a training."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._engine = engine
        self.seen: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(self._engine.evaluate(self.model, X, LABEL))
        self.seen.append(self._engine.predict(self.model, X[:1]).sum(keepdims=True)[0].repeat(2))


@case()
def calls_inside_a_training(engine) -> Result:
    """evaluate and predict from a callback (no Keras: they take its metrics away)"""
    if engine.keras:
        return {}
    x = seeded_input()
    norm = keras.layers.BatchNormalization(trainable=False)
    watcher = EvaluatesItself(engine)
    result = engine.fit(classifying(x, norm(x), metrics=["accuracy"]), X, LABEL, callbacks=[watcher])
    return result | {"seen": np.array(watcher.seen)}


@case()
def predictions_without_targets(engine) -> Result:
    """predict alone: a model that was never built, outputs by name"""
    first = engine.predict(subclassed(sgd()), X)
    x = keras.Input((4,))
    named = keras.Model(x, {"a": keras.layers.Dense(2)(x), "b": classes(x)})
    second = engine.predict(named, X[:65])
    return {"first": first, "a": second["a"], "b": second["b"]}
