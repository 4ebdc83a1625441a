"""The program of tests/test_bad_input.py where a process of its own is needed.

mpirun -np 2 python -m tests.bad_input_script refused_by_all OUT
python -m tests.bad_input_script devices_too_late OUT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import distfit
from tests.ranks import show_stacks_when_asked

OUT = Path(sys.argv[2])
X, Y = np.ones((12, 4), np.float32), np.arange(12) % 3


def compiled(**options: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def fit(x: Any = X, y: Any = Y, **arguments: Any) -> None:
    distfit.fit(compiled(), x, y, **({"verbose": 0, "log_dir": OUT / "logs", "checkpoint": OUT} | arguments))


def bad_inputs(rank: int) -> dict[str, Callable[[], None]]:
    """The same on every rank, or, as their names say, on one alone."""
    records = distfit.TFRecords(OUT / "nowhere")
    return {
        "missing data": lambda: fit(records, None),
        "batch smaller than replicas": lambda: fit(batch_size=1),
        "uncompiled model": lambda: distfit.fit(keras.Sequential([keras.layers.Dense(3)]), X, Y),
        "generator": lambda: fit(((X, Y) for _ in range(3)), None),
        "rows of different number": lambda: fit(y=Y[:5]),
        "unwritable folder": lambda: fit(log_dir=Path(__file__) / "logs"),
        "seed": lambda: fit(seed=-1),
        "verbose": lambda: fit(verbose="loud"),
        "unknown strategy": lambda: fit(strategy="horovd"),
        "label on rank 1": lambda: fit(y=Y + rank),
        "epochs on rank 1": lambda: fit(epochs=1 + rank),
        "validation on rank 1": lambda: fit(validation_data=(X, Y) if rank else None),
        "another call on rank 1": lambda: fit() if rank else distfit.evaluate(compiled(), X, Y),
        "steps of a call on rank 1": lambda: distfit.fit(compiled(steps_per_execution=1 + rank), X, Y, verbose=0),
        "callback on rank 1": lambda: fit(callbacks=[print] if rank else None),
    }


def refused_by_all() -> None:
    """Every bad input is survived, which needs all ranks to refuse it together; the last one is not."""
    rank = distfit.init().rank
    refusals = {name: refusal(call) for name, call in bad_inputs(rank).items()}
    (OUT / f"refusals-{rank}.json").write_text(json.dumps(refusals))
    fit(batch_size=1)


def refusal(call: Callable[[], None]) -> str:
    try:
        call()
    except distfit.InputError as error:
        return str(error)
    return "accepted"


def wrong_environment() -> None:
    os.environ["DISTFIT_DEVICES"] = "abc"
    fit()


def devices_too_late() -> None:
    compiled()  # has variables, for which TensorFlow starts
    fit(devices=2)


if __name__ == "__main__":
    show_stacks_when_asked()
    globals()[sys.argv[1]]()
