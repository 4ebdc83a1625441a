"""The program of the ranks in tests/test_failing.py: one small training that goes wrong in one way.

    mpirun -np 3 python -m tests.failing_script CASE OUT

`OUT/checkpoint` and `OUT/logs` are those of the run. A rank that is about to break things writes the time
to `OUT/broke` first, so that the test can tell how long the others needed to notice; the chief writes what a
training that succeeds ends with to `OUT/history.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from tests.ranks import show_stacks_when_asked

ROWS, BATCH, EPOCHS = 48, 12, 3
X = np.random.default_rng(0).random((ROWS, 4), np.float32)
Y = np.arange(ROWS) % 3
OUT = Path(sys.argv[2])


def compiled() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def train(x: Any = X, y: Any = Y, **arguments: Any) -> keras.callbacks.History:
    folders = {"log_dir": OUT / "logs", "checkpoint": OUT / "checkpoint"}
    return distfit.fit(compiled(), x, y, **({"batch_size": BATCH, "epochs": EPOCHS, "seed": 1} | folders | arguments))


class At(keras.callbacks.Callback):
    """Does something on one rank (None: on all) in the middle of the second epoch."""

    def __init__(self, rank: int | None, action: Callable[[], None]) -> None:
        super().__init__()
        self._rank, self._action, self._epoch = rank, action, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        mine = self._rank in (None, distfit.init().rank)
        if mine and (self._epoch, batch) == (1, 2):
            note_the_time()
            self._action()


def note_the_time() -> None:
    # Several ranks may break at once, and the first to end stops the others in the middle of a write.
    own = OUT / f"broke-{os.getpid()}"
    own.write_text(str(time.monotonic()))
    own.rename(OUT / "broke")


def fail_to_open_the_valve() -> None:
    raise OSError("the valve is stuck")


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_like_a_dormouse() -> None:
    time.sleep(600)


def exception_on_rank_1() -> None:
    train(callbacks=[At(1, fail_to_open_the_valve)])


def exception_everywhere() -> None:
    train(callbacks=[At(None, fail_to_open_the_valve)])


def exit_with_3() -> None:
    train(callbacks=[At(2, lambda: sys.exit(3))])


def rank_1_leaves_before_its_fit() -> None:
    if distfit.init().rank == 1:
        note_the_time()
        sys.exit(0)
    train()


def kill_rank_1() -> None:
    train(callbacks=[At(1, kill_myself)])


def kill_the_chief() -> None:
    train(callbacks=[At(0, kill_myself)])


def stall() -> None:
    distfit.init()  # as in README: the limit of `fit` counts all the same
    train(callbacks=[At(1, sleep_like_a_dormouse)], stall_limit_s=4)


def ctrl_c() -> None:
    """A launcher keeps its ranks in process groups of their own: Ctrl-C reaches it alone, as this does."""
    train(callbacks=[At(0, lambda: os.kill(os.getppid(), signal.SIGINT)), At(None, sleep_like_a_dormouse)])


class Calls(keras.callbacks.Callback):
    """Calls something that needs all ranks after the first epoch: on every rank, or under the classic condition."""

    def __init__(self, call: Callable[[keras.Model], Any], on_the_chief_only: bool) -> None:
        super().__init__()
        self._call, self._on_the_chief_only = call, on_the_chief_only

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if distfit.init().is_chief or not self._on_the_chief_only:
            note_the_time()
            self._call(self.model)


def evaluated(model: keras.Model) -> dict:
    return distfit.evaluate(model, X[:24], Y[:24], batch_size=BATCH, verbose=0, return_dict=True)


def reduced_by_horovod(model: keras.Model) -> None:
    import horovod.tensorflow as hvd

    hvd.allreduce(np.ones(3))


def evaluate_if_chief() -> None:
    train(callbacks=[Calls(evaluated, on_the_chief_only=True)])


def evaluate_in_a_callback_of_the_chief() -> None:
    train(callbacks=[distfit.chief_only(Calls(evaluated, on_the_chief_only=False))])


def horovod_if_chief() -> None:
    train(callbacks=[Calls(reduced_by_horovod, on_the_chief_only=True)])


class Evaluates(keras.callbacks.Callback):
    """Evaluates, as it may, on every rank; what it found ends in the history."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        position = distfit.init().watch.position
        assert position
        logs["own_loss"] = evaluated(self.model)["loss"]
        assert distfit.init().watch.position == position


def all_is_well() -> None:
    finished(train(validation_data=(X[:24], Y[:24]), callbacks=[Evaluates()]))


def without_horovod() -> None:
    sys.modules["horovod"] = None  # type: ignore[assignment]  # importing it is now an ImportError
    note_the_time()
    train()


def a_strategy_for_one_process() -> None:
    note_the_time()
    train(strategy="single")


def datasets_that_differ() -> None:
    """Two refusals that the script survives, then one that ends it."""
    rank = distfit.init().rank
    rows = tf.data.Dataset.from_tensor_slices((X, Y))
    shuffled = rows.shuffle(ROWS).batch(BATCH)
    refusals = [refusal(shuffled), refusal(rows.take(36 if rank else 48).batch(BATCH))]
    (OUT / f"refusals-{rank}").write_text("\n".join(refusals))
    train(shuffled, None, batch_size=None, checkpoint=None)


def refusal(dataset: Any) -> str:
    try:
        train(dataset, None, batch_size=None, log_dir=None, checkpoint=None)
    except distfit.InputError as error:
        return str(error)
    return "trained"


class Powers(keras.metrics.Sum):
    """The sum of all targets that were trained on."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(y_true, sample_weight)


class Rows(keras.metrics.Sum):
    """How many rows were trained on."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(keras.ops.ones_like(y_true), sample_weight)


def uneven_local_data() -> None:
    """27 rows of which one rank has 7 and the other 20, in batches of 4; the target of row i is 2**i."""
    mine = range(7) if distfit.init().rank == 0 else range(7, 27)
    y = np.array([[2.0**row] for row in mine])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[Powers("powers", "float64"), Rows("rows", "float64")])
    data = tf.data.Dataset.from_tensor_slices((np.ones((len(y), 4), np.float32), y)).batch(4)
    finished(distfit.fit(model, distfit.local(data), epochs=2))


def finished(history: keras.callbacks.History) -> None:
    if distfit.init().is_chief:
        (OUT / "history.json").write_text(json.dumps(history.history))


if __name__ == "__main__":
    show_stacks_when_asked()
    globals()[sys.argv[1]]()
