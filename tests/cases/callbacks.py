"""Keras' callbacks, unmodified: the same decisions on the same epoch, the same files with the same contents, each
written once, whatever the number of ranks.

What a case writes lies in a folder of its own. `Watched` asks the kernel which files were closed after writing, by any
process and any library; a second rank that writes the same would be seen even where it leaves the same bytes. What each
rank decides is gathered and compared.
"""

from __future__ import annotations

import csv
import ctypes
import os
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.errors import RunError, on_every_rank
from tests.cases.engines import dataset
from tests.cases.models import LABEL, X, adam, classifier, sgd
from tests.cases.table import FLOAT64, TOLERANCE, Result, case
from tests.compare import flat

# What callbacks decide does not depend on the precision; how a sum is rounded is the other cases' matter.
DECISIONS = {FLOAT64: TOLERANCE[FLOAT64]}
# Rows that are not trained on.
VALIDATION = X[40:], LABEL[40:]
_IN_CLOSE_WRITE = 0x8


# --- what ranks do together --------------------------------------------------------------------------------


def by_rank(engine: Any, value: Any) -> list[Any]:
    """The value of every rank. Collective; Keras is alone."""
    return [value] if engine.keras else engine.session().transport.gather(value)


def alike(engine: Any, value: Any) -> Any:
    """The value, which is the same on every rank."""
    values = by_rank(engine, repr(value))
    assert len(set(values)) == 1, f"ranks decided differently: {values}"
    return value


def rank_of(engine: Any) -> tuple[int, int]:
    """Rank and size."""
    return (0, 1) if engine.keras else (engine.session().rank, engine.session().size)


def every_step(engine: Any) -> dict[str, int]:
    """Arguments of `fit` with which callbacks see new values after each batch, as Keras shows them."""
    return {} if engine.keras else {"logs_every_steps": 1}


def fitted(engine: Any, model: Any, callbacks: list[Any], **arguments: Any) -> Result:
    """A training of three epochs, of three batches each."""
    return engine.fit(model, X[:40], LABEL[:40], callbacks=callbacks, **({"batch_size": 16} | arguments))


# --- what is written ---------------------------------------------------------------------------------------


class Watched:
    """A folder of a case, empty at first, and how often each file in it is closed after writing, by whomever.

        with Watched(engine, "csv_logger", "train") as watched: ...
        watched.written                              # {"log.csv": 1, "train/events": 1}, on the chief

    Args:
        folders: in it that are watched, too; they are there at the beginning.
    """

    def __init__(self, engine: Any, case: str, *folders: str) -> None:
        self._engine = engine
        self._folders = ["", *folders]
        self.path = engine.folder / "written" / engine.file / case
        self.written: Counter[str] = Counter()

    def __enter__(self) -> Watched:
        if self._engine.is_chief:
            shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._folders:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        by_rank(self._engine, None)  # nobody writes before somebody looks
        self._inotify = ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK)
        self._watches = {self._watch(self.path / folder): folder for folder in self._folders}
        by_rank(self._engine, None)
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            by_rank(self._engine, None)  # everybody has closed its files
            self.written.update(self._events())
        os.close(self._inotify)

    def tree(self) -> list[str]:
        """The files that are there in the end."""
        return sorted(_name(str(path.relative_to(self.path))) for path in self.path.rglob("*") if path.is_file())

    def result(self) -> Result:
        """As numbers: how often each file was written, and how many files of each name are there."""
        written = {f"written/{name}": np.array(times) for name, times in self.written.items()}
        return written | {f"there/{name}": np.array(times) for name, times in Counter(self.tree()).items()}

    def _watch(self, folder: Path) -> int:
        found = ctypes.CDLL(None).inotify_add_watch(self._inotify, bytes(folder), _IN_CLOSE_WRITE)
        assert found >= 0, f"cannot watch {folder}"
        return found

    def _events(self) -> list[str]:
        """man 7 inotify: each event is four numbers, the last of which is the length of the name behind them."""
        names = []
        data = os.read(self._inotify, 2**20)
        while data:
            watch, kind, _, length = struct.unpack_from("iIII", data)
            name, data = data[16 : 16 + length].rstrip(b"\0").decode(), data[16 + length :]
            if kind == _IN_CLOSE_WRITE:  # not that a folder has gone
                names.append(_name(os.path.join(self._watches[watch], name)))
        return names


def _name(path: str) -> str:
    """A file's name without what differs from run to run.

    >>> _name("train/events.out.tfevents.1732.host.77.0.v2")
    'train/events'
    """
    return re.sub(r"events\.out\.tfevents\..*", "events", path)


def read_weights(engine: Any, file: Path, build: Any) -> Result:
    """What a file of the chief holds: a model, or weights for one."""
    if not engine.is_chief:
        return {}
    if file.suffix == ".keras":
        model = keras.saving.load_model(file)
    else:
        model = build()
        model.build_from_config(model.get_build_config())
        model.optimizer.build(model.trainable_variables)
        model.load_weights(file)
    return {f"file/{file.name}": flat([*model.weights, *model.optimizer.variables])}


def read_csv(file: Path) -> Result:
    """Each column of a file."""
    if not file.exists():
        return {}
    rows = list(csv.DictReader(file.open()))
    return {f"history/csv/{name}": np.array([float(row[name]) for row in rows]) for name in rows[0]}


def read_events(folder: Path) -> Result:
    """The steps of each tag in a folder of TensorBoard's, and the values of those that measure no time."""
    points: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                name = f"events/{file.parent.relative_to(folder)}/{value.tag}"
                numbers = tf.make_ndarray(value.tensor)
                number = float(numbers) if numbers.ndim == 0 and numbers.dtype.kind == "f" else 0.0
                points.setdefault(name, []).append((event.step, 0.0 if "per_second" in name else number))
    return {name: np.array(found) for name, found in points.items()}


# --- deciders ----------------------------------------------------------------------------------------------


@case(DECISIONS)
def early_stopping(engine) -> Result:
    """`EarlyStopping(restore_best_weights=True)`: the same epoch, the weights of the best one on every rank"""
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    model = classifier(sgd(learning_rate=2.0))
    result = fitted(engine, model, [stopping], epochs=8, validation_data=VALIDATION)
    epochs = alike(engine, (stopping.stopped_epoch, stopping.best_epoch, len(result["history/loss"])))
    assert 0 < epochs[0] < 7, "it stopped"
    kept = np.concatenate([weights.ravel() for weights in stopping.best_weights])
    np.testing.assert_array_equal(flat(model.weights), kept)
    alike(engine, flat(model.weights).tobytes())
    return result | {"epochs": np.array(epochs)}


@case(DECISIONS)
def reduce_lr_on_plateau(engine) -> Result:
    """`ReduceLROnPlateau`: the same rates in the same epochs"""
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.05)
    result = fitted(engine, classifier(sgd(learning_rate=0.2)), [plateau], epochs=5)
    rates = alike(engine, result["history/learning_rate"].tolist())
    assert len(set(rates)) > 1, "it was reduced"
    return result


@case(DECISIONS)
def learning_rate_scheduler(engine) -> Result:
    """`LearningRateScheduler`: the same rate in each epoch"""
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch))
    result = fitted(engine, classifier(adam()), [scheduler])
    alike(engine, result["history/learning_rate"].tolist())
    return result


@case(DECISIONS)
def terminate_on_nan(engine) -> Result:
    """`TerminateOnNaN`: a loss that is no number in step 30 of the second epoch's 42 ends the training there"""
    x = np.resize(X, (84, 4))
    x[42 + 29] = np.nan
    data = dataset(x, np.resize(LABEL, 84)).batch(1)
    noticed = keras.callbacks.TerminateOnNaN()
    result = engine.fit(classifier(sgd()), data, batch_size=None, steps_per_epoch=42, epochs=3, callbacks=[noticed])
    assert alike(engine, len(result["history/loss"])) == 2
    # A wish travels with the step after it, which is read when one more has begun: on the same step everywhere.
    assert 0 <= result.pop("updates") - (42 + 30) <= 2
    return result


@case(DECISIONS)
def swap_ema_weights(engine) -> Result:
    """`SwapEMAWeights`: validation with the averages of weights, the training's own afterwards"""
    model = classifier(adam(use_ema=True, ema_momentum=0.5))
    result = fitted(engine, model, [keras.callbacks.SwapEMAWeights()], validation_data=VALIDATION)
    alike(engine, flat([*model.weights, *model.optimizer.variables]).tobytes())
    return result


@case(DECISIONS)
def swap_ema_weights_and_a_checkpoint(engine) -> Result:
    """`SwapEMAWeights(swap_on_epoch=True)`, then `ModelCheckpoint`; `LossScaleOptimizer`: the file has the averages"""

    def build() -> keras.Model:
        own = adam(use_ema=True, ema_momentum=0.5)
        return classifier(keras.optimizers.LossScaleOptimizer(own, initial_scale=8.0))

    with Watched(engine, "swap_ema") as watched:
        file = watched.path / "ema.weights.h5"
        saver = keras.callbacks.ModelCheckpoint(file, save_weights_only=True)
        result = fitted(engine, build(), [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), saver])
    return result | watched.result() | read_weights(engine, file, build)


class Noting(keras.callbacks.Callback):
    """Every hook of a training with its logs, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, float]]] = []
        for name in hooks():
            setattr(self, name, self.noting(name))

    def noting(self, name: str) -> Any:
        """What stands in place of a hook."""

        def note(*place: Any, **by_name: Any) -> None:
            # Keras gives logs by their name for batches, by their place otherwise, and always last.
            *number, logs = (*place, *by_name.values())
            self.seen.append((f"{name}{number}", dict(logs or {})))

        return note


def hooks() -> list[str]:
    """The names of the hooks of a training."""
    return [name for name in dir(keras.callbacks.Callback) if re.fullmatch("on_(train|test|epoch)_.*", name)]


@case(DECISIONS)
def logs_of_every_hook(engine) -> Result:
    """`LambdaCallback`; first and last in the list, the logs of every hook and batch are those of one process"""
    first, last = Noting(), Noting()
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=10.0)
    functions = {name: last.noting(name) for name in hooks()}
    given = [first, plateau, keras.callbacks.LambdaCallback(**functions)]
    fitted(engine, classifier(sgd(), metrics=["accuracy"]), given, validation_data=VALIDATION, **every_step(engine))
    assert [name for name, _ in first.seen] == [name for name, _ in last.seen]
    for (name, before), (_, after) in zip(first.seen, last.seen, strict=True):
        rate = {"learning_rate"} if name.startswith("on_epoch_end") else set()  # which stands there from then on
        assert before == {key: value for key, value in after.items() if key not in rate}
    found: dict[str, list[float]] = {}
    for name, logs in alike(engine, last.seen):
        for key, value in logs.items():
            found.setdefault(f"history/{name.partition('[')[0]}/{key}", []).append(value)
    return {name: np.array(values) for name, values in found.items()} | {"hooks": np.array(len(last.seen))}


class Stops(keras.callbacks.Callback):
    """The last rank alone wants to stop, when the second epoch ends."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        rank, size = rank_of(engine)
        self._has_a_say = rank == size - 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = self._has_a_say and epoch == 1


@case(DECISIONS)
def a_rank_that_wants_to_stop(engine) -> Result:
    """A callback that sets `stop_training` on one rank alone: the training ends with that epoch on all"""
    result = fitted(engine, classifier(sgd()), [Stops(engine)], epochs=4)
    assert alike(engine, len(result["history/loss"])) == 2
    return result


# --- writers -----------------------------------------------------------------------------------------------


@case(DECISIONS)
def model_checkpoints(engine) -> Result:
    """`ModelCheckpoint`: the best model, weights of each epoch, every two batches: once each, with the same contents"""

    def build() -> keras.Model:
        return classifier(sgd(learning_rate=2.0))

    with Watched(engine, "model_checkpoints") as watched:
        names = "best.keras", "{epoch}.weights.h5", "{epoch}-{batch}.weights.h5"
        best, epochs, batches = (watched.path / name for name in names)
        savers = [
            keras.callbacks.ModelCheckpoint(best, "loss", save_best_only=True),
            keras.callbacks.ModelCheckpoint(epochs, save_weights_only=True),
            keras.callbacks.ModelCheckpoint(batches, save_weights_only=True, save_freq=2),
        ]
        result = fitted(engine, build(), savers)
    files = [file for file in sorted(watched.path.iterdir()) if engine.is_chief]
    contents = {name: value for file in files for name, value in read_weights(engine, file, build).items()}
    return result | watched.result() | contents


@case(DECISIONS)
def csv_logger_and_tensorboard(engine) -> Result:
    """`CSVLogger`, `TensorBoard` with batches and histograms: files opened once each, the numbers of one process"""
    with Watched(engine, "logs", "board/train", "board/validation") as watched:
        log, board = watched.path / "log.csv", watched.path / "board"
        writers = [
            keras.callbacks.CSVLogger(log),
            keras.callbacks.TensorBoard(board, histogram_freq=1, update_freq=1),
        ]
        fitted(engine, classifier(sgd()), writers, validation_data=VALIDATION, **every_step(engine))
    return watched.result() | read_csv(log) | read_events(board)


# --- restorers ---------------------------------------------------------------------------------------------


class Ends(keras.callbacks.Callback):
    """Ends the run with an error of all ranks, in the middle of the second epoch."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.model.optimizer.iterations == 4:
            raise on_every_rank(RunError("the run was ended"))


@case(DECISIONS)
def backup_and_restore(engine) -> Result:
    """`BackupAndRestore`: a run that an error ends in its second epoch goes on with that epoch, to the same weights"""

    def build() -> keras.Model:
        return classifier(adam(use_ema=True))

    with Watched(engine, "backup_and_restore", "backup") as watched:
        folder = watched.path / "backup"
        try:
            fitted(engine, build(), [keras.callbacks.BackupAndRestore(folder), Ends()])
        except RunError:
            left = alike(engine, sorted(file.name for file in folder.iterdir()))
        model, restored = build(), Noting()
        result = fitted(engine, model, [keras.callbacks.BackupAndRestore(folder), restored])
    assert alike(engine, model._initial_epoch) == 1
    alike(engine, [name for name, _ in restored.seen])
    assert not folder.exists()
    if engine.keras:  # all others are compared with it
        np.testing.assert_array_equal(result["weights"], fitted(engine, build(), [])["weights"])
    return result | watched.result() | {"left": np.array(len(left)), "hooks": np.array(len(restored.seen))}
