"""What a global value of a batch costs: of training steps of 25 ms, with and without one after every step.

    python -m benchmarks.batch_logs_cost                 two replicas on two devices of this machine
    mpirun -np 2 python -m benchmarks.batch_logs_cost    two ranks

The steps sleep, as a GPU leaves the processor free, and each run is an epoch of them, with a callback that reads every
batch and with one that does not, in turns. What one value costs is the difference of their median times by the steps
between; the share is that of a training at the default of `logs_every_steps`. Exit code 1: more than 0.5 %.
"""

from __future__ import annotations

import os
import sys
import time
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit.session import Session, init
from distfit.topology import from_environment
from distfit.training.log_points import LEAST_STEPS

STEPS, BATCH, ROUNDS = 80, 16, 6
STEP_S = 0.025
MOST_SHARE = 0.005
METRICS = ("accuracy", "auc", "precision", "recall")


class Sleeping(keras.layers.Layer):
    """Gives on what it gets, later."""

    def call(self, x: Any) -> Any:
        def late(rows: np.ndarray) -> np.ndarray:
            time.sleep(STEP_S)
            return rows

        @tf.custom_gradient
        def slept(rows: Any) -> Any:
            waited = tf.ensure_shape(tf.numpy_function(late, [rows], rows.dtype), rows.shape)
            return waited, lambda upstream: upstream

        return slept(x)

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)


class Clock(keras.callbacks.Callback):
    """Times epochs, of which every other one ends with a value of each batch."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads_batch_logs = reads
        self.epochs: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert not self.reads_batch_logs or logs["loss"] >= 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(time.perf_counter() - self._began)


def measured(session: Session) -> tuple[float, float]:
    """Seconds of a step without a value, and of a value."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), Sleeping(), keras.layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=list(METRICS))
    rng = np.random.default_rng(0)
    rows = rng.random((STEPS * BATCH, 8), np.float32), rng.integers(0, 2, (STEPS * BATCH, 1))
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for reads in times:
            clock = Clock(reads)
            distfit.fit(model, *rows, batch_size=BATCH, epochs=2, verbose=0, callbacks=[clock], logs_every_steps=1)
            times[reads].append(clock.epochs[1])  # the first one traces
    return median(times[False]) / STEPS, (median(times[True]) - median(times[False])) / STEPS


def main() -> int:
    launched = from_environment(os.environ).size > 1
    session = init() if launched else init("mirrored", 2)
    step, value = measured(session)
    share = value / (LEAST_STEPS * step)
    if session.is_chief:
        print(f"a step {1000 * step:.1f} ms, a global value {1000 * value:.2f} ms, share at {LEAST_STEPS}: {share:.3%}")
    return int(share > MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
