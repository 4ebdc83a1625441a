"""Trains with checkpoints, may be killed on the way, and says what it has trained on; on any engine and any ranks.

    python -m tests.resume_script OUT RUN ENGINE[:DEVICES] [KILL...]

A KILL is PLACE@NUMBER[/RANK]: "step@17" ends that rank by SIGKILL before step 17 of the run, "validation@2" within the
validation of the second epoch, "epoch@1" at the end of the first one before it is saved. RANK is 0 by default.

OUT/RUN holds the checkpoints. A run that ends writes OUT/RUN.npz: weights, optimizer state, history, and for each epoch
in which step every record was trained on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import distfit
from distfit.data.records import write_records
from tests.ranks import show_stacks_when_asked

RECORDS, VALIDATED, BATCH, EPOCHS, CLASSES = 67, 17, 8, 4, 3
STEPS = -(-RECORDS // BATCH)


def write_data(out: Path) -> None:
    """`out`/train and `out`/valid: four numbers, a class and its own number a record."""
    rng = np.random.default_rng(0)
    for name, records, shards in (("train", RECORDS, (30, 1, 36)), ("valid", VALIDATED, (17,))):
        rows = np.concatenate(
            [rng.normal(size=(records, 4)), rng.integers(0, CLASSES, (records, 1)), np.arange(records)[:, None]], axis=1
        ).astype("<f4")
        (out / name).mkdir(parents=True, exist_ok=True)
        first = 0
        for number, count in enumerate(shards):
            path = out / name / f"part-{number:05d}-of-{len(shards):05d}.tfrecord"
            write_records(path, [row.tobytes() for row in rows[first : first + count]])
            first += count


def row_of(record):
    row = tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [6])
    return row[:4], row[4:]


def loss_of(y, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y[:, 0], y_pred, from_logits=True)


class Ledger(keras.metrics.Metric):
    """In which step of the run each record was trained on, from 1."""

    def __init__(self, optimizer):
        super().__init__(name="ledger")
        self.optimizer = optimizer
        self.steps = self.add_variable((RECORDS,), "zeros", name="steps")

    def update_state(self, y, y_pred, sample_weight=None):
        ones = ops.one_hot(ops.cast(y[:, 1], "int32"), RECORDS)
        self.steps.assign_add(ops.sum(ones, axis=0) * ops.cast(self.optimizer.iterations, "float32"))

    def result(self):
        return ops.sum(self.steps)


class Kept(keras.callbacks.Callback):
    """The ledgers of all epochs: state that a resume has to bring back."""

    def __init__(self, metric):
        super().__init__()
        self.ledger = metric
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = epoch

    def on_test_begin(self, logs=None):  # before the metric counts what is validated on
        self.epochs.append(self.ledger.steps.numpy().tolist())


class Killed(keras.callbacks.Callback):
    """Ends this process where it is told to."""

    def __init__(self, kills, rank):
        super().__init__()
        self._kills, self._rank = kills, rank
        self._validations = 0

    def _at(self, place, number):
        if f"{place}@{number}/{self._rank}" in self._kills:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_begin(self, batch, logs=None):
        self._at("step", int(self.model.optimizer.iterations.numpy()) + 1)

    def on_test_batch_begin(self, batch, logs=None):
        if batch == 1:
            self._at("validation", round(int(self.model.optimizer.iterations.numpy()) / STEPS))

    def on_epoch_end(self, epoch, logs=None):
        self._at("epoch", epoch + 1)


def model_of():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(CLASSES)])
    optimizer = keras.optimizers.Adam(0.02, use_ema=True)
    model.compile(optimizer, loss_of, metrics=[distfit.reduced(Ledger(optimizer), "sum")])
    return model, model._compile_metrics._user_metrics[0]


def records(out: Path, name: str):
    return distfit.TFRecords(str(out / name), transform=row_of)


def main(out, run, engine, *kills):
    show_stacks_when_asked()
    out, (strategy, _, devices) = Path(out), engine.partition(":")
    session = distfit.init(strategy, int(devices) if devices else None)
    keras.utils.set_random_seed(3)
    model, ledger = model_of()
    kept = Kept(ledger)
    kills = [kill if "/" in kill else f"{kill}/0" for kill in kills]
    history = distfit.fit(
        model,
        records(out, "train"),
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=records(out, "valid"),
        callbacks=[
            Killed(kills, session.rank),
            kept,
            keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5),
            keras.callbacks.CSVLogger(str(out / f"{run}.csv")),
        ],
        checkpoint=distfit.Checkpoint(out / run, every_steps=3, keep=2, best="val_loss"),
        log_dir=out / f"{run}-logs",
        verbose=2,
    )
    if session.is_chief:
        values = {f"history/{name}": np.array(numbers) for name, numbers in history.history.items()}
        weights = np.concatenate([np.ravel(weight) for weight in model.get_weights()])
        state = np.concatenate([np.ravel(variable.numpy()) for variable in model.optimizer.variables])
        np.savez(out / f"{run}.npz", weights=weights, optimizer=state, ledger=np.array(kept.epochs), **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
