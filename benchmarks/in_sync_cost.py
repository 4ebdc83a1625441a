"""What it costs that replicas compare themselves: one comparison against one step, and the share of a training.

    python -m benchmarks.in_sync_cost                 two replicas on two devices of this machine
    mpirun -np 2 python -m benchmarks.in_sync_cost    two ranks
    python -m benchmarks.in_sync_cost --models mlp,cnn

Each model is trained by distfit.fit with Adam on random data; a step is the median over epochs of an epoch's time by
its steps, a comparison the median of several, made after the last one. `docs/guides/in_sync.md` shows the figures of
one machine. Exit code 1: some comparison costs more than 0.1 % of the training at the default of `in_sync_steps`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import keras
import numpy as np
from keras import layers

import distfit
from distfit.session import Session, init
from distfit.topology import from_environment
from distfit.training.in_sync import EVERY_STEPS, InSync

EPOCHS, COMPARISONS = 4, 15
MOST_SHARE = 0.001
HEADER = ("model", "parameters", "step", "comparison", "comparison / step", f"share at {EVERY_STEPS}")


@dataclass(frozen=True)
class Model:
    """What is trained: `make` returns it, from rows of `shape`, `batch` of them a step, `steps` steps an epoch."""

    make: Callable[[], keras.Model]
    shape: tuple[int, ...]
    batch: int
    steps: int


def mlp() -> keras.Model:
    return keras.Sequential([keras.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10)])


def cnn() -> keras.Model:
    parts = [(layers.Conv2D(width, 3, activation="relu"), layers.MaxPooling2D()) for width in (32, 64, 128)]
    flat = [part for pair in parts for part in pair]
    return keras.Sequential([keras.Input((32, 32, 3)), *flat, layers.Flatten(), layers.Dense(10)])


def dense() -> keras.Model:
    """Few operations a weight, so that a comparison, which reads the weights, is dear beside a step."""
    hidden = [layers.Dense(2900, "relu") for _ in range(3)]
    return keras.Sequential([keras.Input((2048,)), *hidden, layers.Dense(1000)])


MODELS = {
    "mlp": Model(mlp, (784,), 64, 200),
    "cnn": Model(cnn, (32, 32, 3), 64, 10),
    "dense": Model(dense, (2048,), 32, 5),
}


class Clock(keras.callbacks.Callback):
    """Times of epochs, and of comparisons after the last one."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self.epochs: list[float] = []
        self.comparisons: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        if epoch == EPOCHS - 1:
            in_sync = InSync(self.model, self._session)
            in_sync.at_start()  # traced here
            for _ in range(COMPARISONS):
                began = time.perf_counter()
                in_sync.at_end()
                self.comparisons.append(time.perf_counter() - began)


def measured(session: Session, name: str) -> tuple[str, float]:
    """A line of the table, and the share of a training."""
    chosen = MODELS[name]
    keras.utils.set_random_seed(1)
    model = chosen.make()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rows = chosen.batch * chosen.steps
    rng = np.random.default_rng(0)
    x, y = rng.random((rows, *chosen.shape), np.float32), rng.integers(0, 10, rows)
    clock = Clock(session)
    distfit.fit(model, x, y, batch_size=chosen.batch, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=[clock])
    step, comparison = median(clock.epochs[1:]) / chosen.steps, median(clock.comparisons)
    share = comparison / (EVERY_STEPS * step)
    cells = (name, f"{model.count_params():,}", _ms(step), _ms(comparison), f"{comparison / step:.2f}", f"{share:.3%}")
    return _line(cells), share


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of mlp, cnn, dense; by default all")
    names = parser.parse_args(arguments).models.split(",")
    launched = from_environment(os.environ).size > 1
    session = init() if launched else init("mirrored", 2)
    found = []
    for name in names:
        found.append(measured(session, name))
        if session.is_chief:
            head = [_line(HEADER), _line(["---"] * len(HEADER))] if len(found) == 1 else []
            print(*head, found[-1][0], sep="\n", flush=True)
    return int(max(share for _, share in found) > MOST_SHARE)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
