"""Trains by hand on each engine named, and by `fit` beside it.

    python -m tests.loops_script OUT ENGINE[:DEVICES][/SET]... [FAULT]

Writes OUT/ENGINE-REPLICAS.npz: of every file of docs/guides/loops.md (FILE/PRECISION) and of the cases of a set
(CASE/...) the final weights, optimizer state and history. Under a launcher, the chief writes. "plain" runs the page's
loops without distfit (tests/plain_loops.py). All is float64, but for `loop.py` and `fit.py`, which are run as they are
written as well.

A job that is given one of `FAULTS` ends with a loop that is another one on the last rank.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import distfit
from distfit.data.records import write_records
from distfit.errors import DistfitError
from distfit.session import Session, init
from distfit.training.wire import Wire
from tests import pages
from tests.counters_script import Reads
from tests.plain_loops import in_place_of_distfit
from tests.ranks import collect_less_garbage, show_stacks_when_asked

PAGE = "docs/guides/loops.md"
AS_WRITTEN = ("loop.py", "fit.py")
# Five steps an epoch; in the last one only the first replica has a row.
BATCH, ROWS, STEPS, CLASSES, WORDS, LENGTH = 12, 49, 5, 3, 9, 4
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(ROWS, 4)), RNG.integers(0, CLASSES, ROWS)
SENTENCES, TAGS = RNG.integers(0, WORDS, (ROWS, LENGTH)), RNG.integers(0, CLASSES, (ROWS, LENGTH))
SENTENCES[4:8] = 0  # no valid word on the second of three replicas
WEIGHT = RNG.random(ROWS)
Numbers = dict[str, Any]
dense = layers.Dense


def main(out: str, *labels: str) -> None:
    show_stacks_when_asked()
    collect_less_garbage()
    target, folder = Path(out).resolve(), Path(tempfile.mkdtemp())
    for name, text in pages.files(PAGE):
        (folder / name).write_text(text)
    os.chdir(folder)
    fault = FAULTS.get(labels[-1])
    for label in labels if fault is None else labels[:-1]:
        _run(label, folder, target)
    if fault is not None:
        fault(init(stall_limit_s=10))


def _run(label: str, folder: Path, target: Path) -> None:
    if label == "plain":
        with in_place_of_distfit():
            numbers = dict(_of_files(path for path in folder.glob("*.py") if path.name != "fit.py"))
        np.savez(target / "plain.npz", **numbers)
        return
    engine, _, chosen = label.partition("/")
    strategy, _, devices = engine.partition(":")
    session = init(strategy, int(devices) if devices else None)
    numbers = dict(_of_files(folder.glob("*.py")))
    for case in SETS[chosen]:
        with _precision("float64"), _quiet():
            found = case(session)
        numbers |= {f"{case.__name__}/{name}": value for name, value in found.items()}
    if session.is_chief:
        np.savez(target / f"{strategy}-{session.num_replicas}.npz", **numbers)


def _of_files(paths: Any) -> Iterator[tuple[str, Any]]:
    for path in sorted(paths):
        for precision in ("float32", "float64") if path.name in AS_WRITTEN else ("float64",):
            shutil.rmtree("runs", ignore_errors=True)  # each is a run of its own
            with _precision(precision), _quiet():
                found = runpy.run_path(str(path))
            models = found.get("models") or [found["model"]]
            optimizers = [found[name] for name in ("optimizer", "g_optimizer", "d_optimizer") if name in found]
            for name, value in numbers_of(models, optimizers, found["history"]).items():
                yield f"{path.name}/{precision}/{name}", value


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def numbers_of(models: Any, optimizers: Any, history: dict[str, Any]) -> Numbers:
    """Weights, optimizer states and histories, to be compared."""
    state = [variable for optimizer in optimizers for variable in optimizer.variables]
    return {
        "weights": _flat(variable for model in models for variable in model.weights),
        "optimizer": _flat(state),
        **{f"history/{name}": np.array(values) for name, values in history.items()},
    }


def _flat(variables: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(np.ravel(one.numpy()).astype(np.float64) for one in variables)])


# --- a loop and fit, side by side


def classifier(*between: Any, optimizer: Any = "adam", **compiling: Any) -> keras.Model:
    """Compiled, so that the same model can be given to fit; loops take its optimizer.

    Args:
        between: make layers, after the seed is set.
    """
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), dense(6), *(make() for make in between), dense(CLASSES)])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compiling)
    return model


def step_of(session: Session, model: keras.Model, mean: Any, **options: Any) -> Any:
    """The documented step."""

    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
            scaled = model.optimizer.scale_loss(session.scale_loss(loss))
        session.apply(model.optimizer, tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        mean.update_state(loss, sample_weight=session.rows())
        return loss

    return session.step(train, **options)


def tester_of(session: Session, model: keras.Model, mean: Any) -> Any:
    @session.step
    def test(x: Any, y: Any) -> None:
        mean.update_state(model.loss(y, model(x, training=False)), sample_weight=session.rows())

    return test


def loop(
    session: Session, model: keras.Model, *data: Any, valid: Any = None, eager: bool = False, **options: Any
) -> Numbers:
    """What a loop of two epochs leaves behind."""
    how = {"batch_size": options.pop("batch_size", BATCH), "shuffle": options.pop("shuffle", False)}
    mean = keras.metrics.Mean("loss")
    train, test = step_of(session, model, mean, run_eagerly=eager), tester_of(session, model, mean)
    own = session.batches(*data, **how)
    others = None if valid is None else session.batches(*valid, **how)
    options = {"epochs": 2, "verbose": 0} | options
    with session.training(model, model.optimizer, own, metrics=mean, **options) as training:
        for _ in training:
            for batch in own:
                train(batch)
            if others is not None:
                training.validate(test, others)
    return numbers_of([model], [model.optimizer], training.history.history)


def fitted(model: keras.Model, *data: Any, valid: Any = None, **options: Any) -> Numbers:
    """The same by fit."""
    options = {"batch_size": BATCH, "shuffle": False, "epochs": 2, "verbose": 0} | options
    history = distfit.fit(model, *data, validation_data=valid, **options)
    return numbers_of([model], [model.optimizer], history.history)


def both(session: Session, make: Callable[[], keras.Model], *data: Any, **options: Any) -> Numbers:
    found = {"loop": loop(session, make(), *data, **options), "fit": fitted(make(), *data, **options)}
    return {f"{way}/{name}": value for way, numbers in found.items() for name, value in numbers.items()}


# --- cases whose loop has the bits of fit on every engine


def bits_of_layers_and_callbacks(session: Session) -> Numbers:
    """BatchNormalization, Dropout, callbacks of every kind; one of them ends the training within its third epoch."""
    found = {}
    for way in (loop, fitted):
        told = Told()
        files = Path(tempfile.mkdtemp())
        model = classifier(layers.BatchNormalization, lambda: layers.Dropout(0.3), metrics=[])
        callbacks = [
            told,
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=0, min_delta=10, factor=0.5),
            keras.callbacks.EarlyStopping("val_loss", patience=9),
            keras.callbacks.ModelCheckpoint(files / "{epoch}.keras"),
            keras.callbacks.CSVLogger(files / "log.csv"),
            keras.callbacks.TensorBoard(files / "logs", write_graph=False),
        ]
        options = {"epochs": 9, "initial_epoch": 1, "callbacks": callbacks, "valid": (X[:13], Y[:13])}
        given = (session, model, X, Y) if way is loop else (model, X, Y)
        numbers = way(*given, **options)
        numbers["told"] = np.array(told.heard)
        numbers["files"] = np.array(_left_behind(files)) if session.is_chief else np.array([])
        found |= {f"{way.__name__.removesuffix('ted')}/{name}": value for name, value in numbers.items()}
    return found


class Told(keras.callbacks.Callback):
    """Hears of every epoch and batch, and wants to stop in the middle of the third epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, int]] = []
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.heard.append((self._epoch, batch))
        if (self._epoch, batch) == (3, 1):
            self.model.stop_training = True


def _left_behind(folder: Path) -> list[str]:
    """Names of files, and what the log of epochs says."""
    names = sorted(path.name for path in folder.iterdir())
    return [*names, (folder / "log.csv").read_text()]


def bits_of_synchronised_moments(session: Session) -> Numbers:
    return both(session, lambda: classifier(layers.BatchNormalization), X, Y, sync_batch_norm=True)


def bits_of_averaged_weights(session: Session) -> Numbers:
    """The optimizer's moving average becomes the model when the training ends."""
    return both(session, lambda: classifier(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)), X, Y)


def bits_of_mixed_precision(session: Session) -> Numbers:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    found = both(session, lambda: classifier(optimizer=scaled()), X, Y)
    return {name: value for name, value in found.items() if "history" not in name}


def scaled() -> Any:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=256.0)


def bits_of_records_in_files(session: Session) -> Numbers:
    """In their shuffled order, another one each epoch."""
    folder = Path(session.from_chief(tempfile.mkdtemp))
    if session.is_chief:
        write_records(str(folder / "rows.tfrecord"), [X[row].tobytes() + bytes([Y[row]]) for row in range(ROWS)])
    session.from_chief(lambda: None)

    def parsed(record: Any) -> Any:
        x = tf.io.decode_raw(tf.strings.substr(record, 0, 32), tf.float64)
        return tf.ensure_shape(x, [4]), tf.cast(
            tf.io.decode_raw(tf.strings.substr(record, 32, 1), tf.uint8)[0], tf.int64
        )

    return both(session, classifier, distfit.TFRecords(folder, transform=parsed), shuffle=True)


def bits_of_data_of_unknown_length(session: Session) -> Numbers:
    data = tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: x[0] > -0.5).batch(BATCH)
    return both(session, classifier, data, batch_size=None)


def bits_of_uneven_ranks(session: Session) -> Numbers:
    """Each rank reads its own rows; the last one has fewer batches."""
    own = np.array_split(np.arange(ROWS), session.size)[session.rank]
    own = own[:5] if session.rank == session.size - 1 and session.size > 1 else own
    data = distfit.local(tf.data.Dataset.from_tensor_slices((X[own], Y[own])).batch(4))
    return both(session, classifier, data, batch_size=None) if session.size > 1 else {}


# --- cases that end as on one device


def own_accumulation_of_keras(session: Session) -> Numbers:
    """The optimizer's own accumulation, in a loop."""
    return both(session, lambda: classifier(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)), X, Y)


def masked_words(session: Session) -> Numbers:
    """Each term has its own divisor: valid words, and none; rows of an Embedding have sparse gradients. Replicas have
    no rows, and rows without a valid word."""

    def make() -> keras.Model:
        keras.utils.set_random_seed(1)
        parts = [layers.Embedding(WORDS, 3, mask_zero=True), dense(CLASSES, kernel_regularizer="l2")]
        model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), *parts])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    model, mean = make(), keras.metrics.Mean("loss")
    of_words = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    @session.step
    def train(x: Any, y: Any, weight: Any) -> None:
        valid = tf.cast(x != 0, tf.float64)
        count = tf.reduce_sum(valid)
        with tf.GradientTape() as tape:
            losses = of_words(y, model(x, training=True)) * valid * weight[:, None]
            loss = tf.math.divide_no_nan(tf.reduce_sum(losses), count)
            scaled = session.scale_loss(loss, count) + session.scale_loss(sum(model.losses))
        session.apply(model.optimizer, tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        mean.update_state(losses, sample_weight=valid)

    data = session.batches(SENTENCES, TAGS, WEIGHT, batch_size=BATCH, shuffle=False)
    with session.training(model, model.optimizer, data, metrics=mean, epochs=2, verbose=0) as training:
        for _ in training:
            for batch in data:
                train(batch)
    found = numbers_of([model], [model.optimizer], training.history.history)
    expected = fitted(make(), SENTENCES, TAGS, sample_weight=np.repeat(WEIGHT[:, None], LENGTH, axis=1))
    return {f"loop/{name}": found[name] for name in ("weights", "optimizer")} | {
        f"fit/{name}": expected[name] for name in ("weights", "optimizer")
    }


def sums_over_the_batch(session: Session) -> Numbers:
    """A penalty on the gradient at the inputs, moments of the global batch, all-gathered rows and their numbers; the
    last batch has one row."""
    model = classifier(lambda: layers.Activation("tanh"), optimizer=keras.optimizers.SGD(0.05))
    total, seen = keras.metrics.Sum("total"), keras.metrics.Mean("seen")
    weights = model.trainable_variables

    @session.step
    def train(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y_pred = model(x, training=True)
            slopes = tf.reduce_sum(inner.gradient(y_pred, x) ** 2, axis=1)
            everybody = session.gather(y_pred)
            rows = session.sum(tf.shape(x)[0])
            mean = session.sum(tf.reduce_sum(y_pred, axis=0)) / tf.cast(rows, tf.float64)
            spread = tf.reduce_mean((y_pred - mean) ** 2)
            near = tf.reduce_mean(tf.matmul(y_pred, everybody, transpose_b=True) ** 2)
            loss = model.loss(y, y_pred) + 0.1 * tf.reduce_mean((slopes - 1.0) ** 2) - 0.1 * spread + 0.01 * near
            scaled = session.scale_loss(loss)
        session.apply(model.optimizer, tape.gradient(scaled, weights), weights)
        numbers = session.first_row() + tf.range(tf.shape(x, tf.int64)[0])
        total.update_state(tf.cast(numbers, tf.float64) ** 2)
        seen.update_state(tf.cast(tf.shape(everybody)[0], tf.float64))

    data = session.batches(X, Y, batch_size=BATCH, shuffle=False)
    with session.training(model, model.optimizer, data, metrics=[total, seen], epochs=2, verbose=0) as training:
        for _ in training:
            for batch in data:
                train(batch)
    return numbers_of([model], [model.optimizer], training.history.history)


def much_in_the_middle(session: Session) -> Numbers:
    """Two steps a batch, other data, two validations, one of them within an epoch, distfit.evaluate and predict in a
    loop and in a callback; a second training of the same model; the model is plain Keras afterwards."""
    model = classifier(metrics=["accuracy"])
    mean, largest = keras.metrics.Mean("loss"), keras.metrics.Mean("largest")
    train, test = step_of(session, model, mean), tester_of(session, model, mean)

    @session.step
    def look(x: Any, y: Any) -> Any:
        outputs = model(x)
        largest.update_state(tf.reduce_max(outputs, axis=1))
        return {"rows": tf.shape(outputs)[0], "nothing": None}

    data = session.batches(X, Y, batch_size=BATCH, shuffle=False)
    some, others = (session.batches(X[a:], Y[a:], batch_size=BATCH, shuffle=False) for a in (20, 30))
    evaluates, found = Evaluates(), []
    for _ in range(2):
        options = {"metrics": [mean, largest], "callbacks": [evaluates], "verbose": 0}
        with session.training(model, model.optimizer, data, **options) as training:
            for _ in training:
                for number, batch in enumerate(data):
                    losses, looked = train(batch), look(batch)
                    assert len(losses) == len(looked) == session.topology.replicas_per_process
                    assert all(np.isfinite(float(loss)) for loss in losses)
                    assert sum(int(one["rows"]) for one in looked) <= BATCH
                    if number == 2:
                        training.validate(test, some, prefix="within_")
                for batch in others:
                    train(batch)
                training.validate(test, others)
                found.append(np.ravel(distfit.predict(model, X, verbose=0)))
        found.extend(training.history.history.values())
    found += evaluates.found
    plain_afterwards(model)
    return numbers_of([model], [model.optimizer], {}) | {"found": np.concatenate([np.ravel(one) for one in found])}


class Evaluates(keras.callbacks.Callback):
    """Another call of distfit inside of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # Once, as each call traces its step.
        if not self.found:
            self.found.append(distfit.evaluate(self.model, X[:15], Y[:15], verbose=0))


def plain_afterwards(model: keras.Model) -> None:
    """Keras trains, saves and loads it."""
    before = model.get_weights()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
    assert all((one == other).all() for one, other in zip(before, loaded.get_weights(), strict=True))
    loaded.fit(X, Y, verbose=0)
    assert not any("assign" in vars(weight) for weight in model.weights)
    assert not any("update_state" in vars(metric) for metric in model.metrics)


def python_instead_of_a_trace(session: Session) -> Numbers:
    numbers = loop(session, classifier(layers.BatchNormalization), X[:25], Y[:25], epochs=1, eager=True)
    traced = loop(session, classifier(layers.BatchNormalization), X[:25], Y[:25], epochs=1)
    return {f"loop/{name}": value for name, value in numbers.items()} | {
        f"fit/{name}": value for name, value in traced.items()
    }


def left_early(session: Session) -> Numbers:
    """A break, on all ranks alike, and the epochs after it."""
    model, mean = classifier(), keras.metrics.Mean("loss")
    train = step_of(session, model, mean)
    data = session.batches(X, Y, batch_size=BATCH, shuffle=False)
    with session.training(model, model.optimizer, data, metrics=mean, epochs=4, verbose=0) as training:
        for epoch in training:
            for number, batch in enumerate(data):
                train(batch)
                if number == epoch:
                    break
            if epoch == 2:
                break
    return numbers_of([model], [model.optimizer], training.history.history)


# --- counted


def counts(session: Session) -> Numbers:
    """What each step sends, how often it is traced, and after which steps numbers come to the host."""
    traced: list[str] = []
    reads = Reads()
    model = classifier(optimizer="sgd")
    with pytest.MonkeyPatch.context() as patch:
        sent = _recorded(patch)
        fitted(model, X, Y)
        of_fit = [[*vars(one).values()] for one in sent.pop("train", [])]
        _trained(session, classifier(optimizer="sgd"), traced, None)
        of_loop = [[*vars(one).values()] for one in sent.pop("train", [])]
        reads.noted(patch)
        read_after = _trained(session, classifier(optimizer="sgd"), [], reads)
    return {
        "fit": np.array(of_fit, str),
        "loop": np.array(of_loop, str),
        "traced": np.array([traced.count("train"), traced.count("test")]),
        "read_after": np.array(sorted(read_after)),
    }


def _recorded(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the wire recorded last of each step."""
    found: dict[str, Any] = {}
    step = Wire.step

    @contextlib.contextmanager
    def recording(wire: Wire, name: str, *data: Any) -> Iterator[Any]:
        with step(wire, name, *data) as transfers:
            yield transfers
        found[name] = transfers

    patch.setattr(Wire, "step", recording)
    return found


def _trained(session: Session, model: Any, traced: list[str], reads: Reads | None) -> set[int]:
    """The steps of the second epoch after which something was read, 40 an epoch; into `traced` what Python ran."""
    mean = keras.metrics.Mean("loss")
    variables = model.trainable_variables

    @session.step
    def train(x: Any, y: Any) -> None:
        traced.append("train")
        with tf.GradientTape() as tape:
            scaled = session.scale_loss(model.loss(y, model(x)))
        session.apply(model.optimizer, tape.gradient(scaled, variables), variables)
        mean.update_state(scaled)

    @session.step
    def test(x: Any, y: Any) -> None:
        traced.append("test")
        mean.update_state(model.loss(y, model(x)))

    x, y = np.tile(X[:40], (6, 1)), np.tile(Y[:40], 6)
    data, valid, more = (session.batches(x[:n], y[:n], batch_size=6, shuffle=False) for n in (240, 20, 10))
    read_after = set()
    with session.training(model, model.optimizer, data, metrics=mean, epochs=2, verbose=0) as training:
        for epoch in training:
            before = 0
            for number, batch in enumerate(data):
                if reads is not None and epoch == 1 and number and len(reads.found) > before:
                    read_after.add(number - 1)
                train(batch)
                before = 0 if reads is None else len(reads.found)
            training.validate(test, valid)
            training.validate(test, more, prefix="more_")
    return read_after


# --- refused


def refusals(session: Session) -> Numbers:
    """By a name, what is said of it."""
    found = {}
    for name, wrong in WRONG.items():
        keras.utils.clear_session(free_memory=False)
        try:
            wrong(session)
            found[name] = ""
        except DistfitError as error:
            found[name] = str(error)
    # The session is as good as new.
    found["afterwards"] = str(loop(session, classifier(), X, Y, epochs=1)["history/loss"].size)
    return {name: np.array(text) for name, text in found.items()}


def _with(session: Session, step: Any = None, batch: Any = None, model: Any = None, **options: Any) -> None:
    """A training in which a step is called, with a batch if it is not given another thing."""
    model = model or classifier()
    data = session.batches(X, Y, batch_size=BATCH)
    given = {"optimizers": getattr(model, "optimizer", None), "data": data, "verbose": 0} | options
    with session.training(model, **given) as training:
        for _ in training:
            for one in data:
                session.step(step)(one if batch is None else batch)


def _in_a_step(session: Session, act: Callable[..., Any], **options: Any) -> None:
    """What a step does with (session, model, its gradients)."""
    model = options.pop("model", None) or classifier()

    def train(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            scaled = session.scale_loss(model.loss(y, model(x)))
        act(session, model, tape.gradient(scaled, model.trainable_variables))

    _with(session, train, model=model, **options)


def _apply(session: Session, model: Any, gradients: Any) -> None:
    session.apply(model.optimizer, gradients, model.trainable_variables)


def _apply_in_a_branch(session: Session, model: Any, gradients: Any) -> None:
    tf.cond(tf.reduce_sum(gradients[0]) > 0, lambda: _apply(session, model, gradients), lambda: None)


def _apply_in_a_loop(session: Session, model: Any, gradients: Any) -> None:
    def body(number: Any) -> Any:
        _apply(session, model, gradients)
        return number + 1

    tf.while_loop(lambda number: number < 1, body, [tf.constant(0)])


def _apply_in_a_function(session: Session, model: Any, gradients: Any) -> None:
    tf.function(lambda: _apply(session, model, gradients), autograph=False)()


def _nested(session: Session) -> None:
    model = classifier()
    data = session.batches(X, Y, batch_size=BATCH)
    with session.training(model, model.optimizer, data, verbose=0):
        _with(session, lambda x, y: None)


def _other_variables(session: Session, change: Callable[[Any], None]) -> None:
    """A step that changes what nobody has named."""
    unnamed = keras.Variable(0.0, name="unnamed")
    _with(session, lambda x, y: change(unnamed))


def _in_a_branch_of(unnamed: Any) -> None:
    tf.cond(tf.random.uniform([]) > 0.5, lambda: [unnamed.value.assign_add(1.0), None][1], lambda: None)


def _unnamed_metric(session: Session) -> None:
    mean = keras.metrics.Mean("forgotten")
    _with(session, lambda x, y: mean.update_state(tf.reduce_mean(x)))


def _unnamed_optimizer(session: Session) -> None:
    other = keras.optimizers.SGD()

    def act(session: Session, model: Any, gradients: Any) -> None:
        session.apply(other, gradients, model.trainable_variables)

    _in_a_step(session, act)


def _scaled(session: Session, *given: Any) -> None:
    _with(session, lambda x, y: session.scale_loss(*(make(x) for make in given)))


def _interrupted(session: Session) -> None:
    """An exception in the loop; the model is plain Keras afterwards, on one process of course."""
    model = classifier()
    for kind in (ZeroDivisionError, KeyboardInterrupt) if session.size == 1 else ():
        with pytest.raises(kind):
            _in_a_step(session, _raising(kind), model=model)
        plain_afterwards(model)


def _raising(kind: type[BaseException]) -> Callable[..., None]:
    def act(session: Session, model: Any, gradients: Any) -> None:
        raise kind

    return act


def _nested_pass(session: Session) -> None:
    model = classifier()
    data = session.batches(X, Y, batch_size=BATCH)
    with session.training(model, model.optimizer, data, verbose=0) as training:
        for _ in training:
            for _ in data:
                for _ in data:
                    raise AssertionError("one pass inside of another")


def _outside_an_epoch(session: Session) -> None:
    model = classifier()
    data = session.batches(X, Y, batch_size=BATCH)
    with session.training(model, model.optimizer, data, verbose=0):
        list(data)


def _validating(session: Session, step: Any, of: Callable[[Any], Any]) -> None:
    model = classifier()
    data = session.batches(X, Y, batch_size=BATCH)
    with session.training(model, model.optimizer, data, verbose=0) as training:
        training.validate(step, of(data))


def _unbuilt(session: Session) -> None:
    model = keras.Sequential([dense(2)])
    model.compile("sgd", "mse")
    _with(session, model=model)


def _means(*names: str) -> list[Any]:
    return [keras.metrics.Mean(name) for name in names]


WRONG: dict[str, Callable[[Session], Any]] = {
    "a step outside of a training": lambda session: session.step(lambda x: x)(1),
    "batches outside of a training": lambda session: list(session.batches(X, Y, batch_size=BATCH)),
    "scale_loss outside of a step": lambda session: session.scale_loss(tf.constant(1.0)),
    "gather outside of a step": lambda session: session.gather(tf.ones([2])),
    "no function": lambda session: session.step(3),
    "a batch that is none": lambda session: _with(session, lambda x, y: None, batch=(X, Y)),
    "data that are none": lambda session: _with(session, data=(X, Y)),
    "a model that is not built": _unbuilt,
    "a model that is none": lambda session: _with(session, model=classifier().layers[0]),
    "no model": lambda session: session.training([], [], session.batches(X, Y)).__enter__(),
    "an optimizer that is not built": lambda session: _with(session, optimizers=[keras.optimizers.SGD() for _ in "ab"]),
    "metrics of one name": lambda session: _with(session, metrics=_means("a", "a")),
    "a training inside of another": _nested,
    "a pass inside of another": _nested_pass,
    "a pass outside of an epoch": _outside_an_epoch,
    "validation by no step": lambda session: _validating(session, print, lambda data: data),
    "validation on what is trained": lambda session: _validating(
        session, session.step(lambda x, y: None), lambda data: data
    ),
    "a vector for a loss": lambda session: _scaled(session, lambda x: x),
    "a vector for a count": lambda session: _scaled(session, tf.reduce_mean, lambda x: x),
    "fewer gradients than variables": lambda session: _in_a_step(
        session, lambda session, model, gradients: _apply(session, model, gradients[1:])
    ),
    "an optimizer that nobody named": _unnamed_optimizer,
    "apply in a tf.cond": lambda session: _in_a_step(session, _apply_in_a_branch),
    "apply in a loop": lambda session: _in_a_step(session, _apply_in_a_loop),
    "apply in a tf.function": lambda session: _in_a_step(session, _apply_in_a_function),
    "a variable that nobody named": lambda session: _other_variables(session, lambda one: one.assign(one + 1.0)),
    "a variable that nobody named, in a branch": lambda session: _other_variables(session, _in_a_branch_of),
    "a metric that nobody named": _unnamed_metric,
    "exceptions in a loop": _interrupted,
}


# --- ranks whose loops differ


def another_batch_size(session: Session) -> None:
    session.batches(X, Y, batch_size=BATCH + session.rank)


def one_step_more(session: Session) -> None:
    _differing(session, twice=session.rank == session.size - 1)


def leaves_early(session: Session) -> None:
    _differing(session, leaves=session.rank == session.size - 1)


def _differing(session: Session, twice: bool = False, leaves: bool = False) -> None:
    model, mean = classifier(), keras.metrics.Mean("loss")
    train = step_of(session, model, mean)
    data = session.batches(X, Y, batch_size=BATCH)
    with session.training(model, model.optimizer, data, metrics=mean, epochs=2, verbose=0) as training:
        for _ in training:
            for number, batch in enumerate(data):
                train(batch)
                if number == 2 and twice:
                    train(batch)
                if number == 2 and leaves:
                    break


FAULTS = {fault.__name__: fault for fault in (one_step_more, leaves_early)}
CASES: tuple[Callable[[Session], Numbers], ...] = (
    bits_of_layers_and_callbacks,
    bits_of_synchronised_moments,
    bits_of_averaged_weights,
    bits_of_mixed_precision,
    bits_of_records_in_files,
    bits_of_data_of_unknown_length,
    bits_of_uneven_ranks,
    own_accumulation_of_keras,
    masked_words,
    sums_over_the_batch,
    much_in_the_middle,
    python_instead_of_a_trace,
    left_early,
    counts,
)
# One process alone can go on after a refusal; several ranks are ended by it.
SETS = {
    "": CASES,
    "and refusals": (*CASES, refusals),
    "page": (),
    "ranks": (bits_of_layers_and_callbacks, bits_of_uneven_ranks, masked_words, sums_over_the_batch, counts),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
