"""The program of the ranks in tests/test_preemption.py: a small training that is asked to end while it runs.

    mpirun -np 2 python -m tests.preemption_script OUT CASE

`OUT/run` is the run's folder. What a training that ends by itself leaves with, its weights and its history, is in
`OUT/CASE.npz` and `OUT/CASE.json`, written by the chief.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil

import distfit
from distfit.errors import Preempted

EPOCHS, STEPS, BATCH = 5, 8, 4
ROWS = STEPS * BATCH
X = np.random.default_rng(0).random((ROWS, 4), np.float32)
Y = np.arange(ROWS) % 3


def compiled() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dropout(0.2), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


class Asked(keras.callbacks.Callback):
    """Does something at a batch of training or validation, or when an epoch ends (batch None)."""

    def __init__(self, action: Callable[[], Any], epoch: int, batch: int | None = 2, method: str = "train") -> None:
        super().__init__()
        self._action, self._at, self._method = action, (epoch, batch), method
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._perhaps("train", batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._perhaps("test", batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._perhaps("train", None)

    def _perhaps(self, method: str, batch: int | None) -> None:
        if (method, (self._epoch, batch)) == (self._method, self._at):
            self._action()


def train(checkpoint: Path | None, asked: Asked | None = None) -> keras.callbacks.History:
    return distfit.fit(
        compiled(),
        X,
        Y,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(X[:12], Y[:12]),
        validation_batch_size=BATCH,
        seed=1,
        verbose=0,
        callbacks=[asked or Asked(lambda: None, -1)],
        checkpoint=checkpoint,
    )


def ended(history: keras.callbacks.History, out: Path, case: str) -> None:
    """Keep what the training has come to."""
    if distfit.init().is_chief:
        weights = history.model.get_weights()
        np.savez(out / f"{case}.npz", **{str(number): value for number, value in enumerate(weights)})
        (out / f"{case}.json").write_text(json.dumps(history.history))


def tell(number: int, pid: int | None = None) -> Callable[[], Any]:
    return lambda: os.kill(pid or os.getpid(), number)


def on_rank(rank: int, action: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: action() if distfit.init().rank == rank else None


def reference_and_two_requests(out: Path) -> None:
    """A training that nobody disturbs; one where SIGTERM reaches rank 1 alone, which the script survives; and the same
    again, where mpirun passes SIGUSR1 on."""
    ended(train(None), out, "reference")
    with suppress(Preempted):
        train(out / "run", Asked(on_rank(1, tell(signal.SIGTERM)), epoch=1))
    atexit.register(lambda: (out / f"exit-{distfit.init().rank}").touch())
    train(out / "run", Asked(on_rank(0, tell(signal.SIGUSR1, os.getppid())), epoch=2))


def ctrl_c_at_distfit_launch(out: Path) -> None:
    launch = psutil.Process(os.getppid()).ppid()
    train(out / "run", Asked(on_rank(0, tell(signal.SIGINT, launch)), epoch=3))


def to_the_end(out: Path) -> None:
    ended(train(out / "run"), out, "resumed")


def told_twice(out: Path) -> None:
    """The second time while it hangs in a callback, and the other rank waits for it."""

    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(1.0, tell(signal.SIGTERM)).start()
        (out / "told").write_text(str(time.monotonic() + 1.0))
        time.sleep(120)

    train(out / "run", Asked(on_rank(1, hang), epoch=1))


def sigterm_alone(out: Path) -> None:
    """One process; hooks of the script run, and another signal meanwhile kills nobody."""
    atexit.register(lambda: (out / "exit").touch())
    train(out / "run", Asked(tell(signal.SIGTERM), epoch=1))


def ctrl_c_alone(out: Path) -> None:
    train(out / "run", Asked(tell(signal.SIGINT), epoch=2))


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]))
