"""The program of tests/test_accidents.py: common accidents of a job, each on real ranks.

    mpirun -np 3 python -m tests.accidents_script together OUT
    mpirun -np 2 python -m tests.accidents_script other_versions OUT
    mpirun -np 2 python -m tests.accidents_script out_of_memory OUT
    python -m tests.accidents_script foreign_launcher OUT
    python -m tests.accidents_script disk_fills_up OUT

"together" holds those that ranks survive; each rank writes what it saw to OUT/seen-<rank>.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit import meeting
from tests.ranks import show_stacks_when_asked

OUT = Path(sys.argv[2])
WEIGHTS = bytes(range(256)) * 4096


def append(text: str) -> None:
    with open(OUT / "order", "a") as file:
        file.write(f"{text}\n")


def fetch(name: str) -> bool:
    """Whether this rank got the whole file."""
    path = keras.utils.get_file(name, origin=(OUT / "weights.h5").as_uri(), cache_dir=OUT / "cache")
    return Path(path).read_bytes() == WEIGHTS


def build() -> keras.Model:
    """A builder function: downloads, as one with pretrained weights does."""
    append(f"builds {distfit.init().rank}")
    assert fetch("pretrained.h5")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def refused(call: Any) -> str:
    try:
        call()
    except distfit.DistfitError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def fails_on_the_chief() -> None:
    session = distfit.init()
    with session.chief_first():
        if session.is_chief:
            raise distfit.InputError("the chief's disk is full")
        append("must not be reached")


def together() -> None:
    session = distfit.init()
    if session.is_chief:
        (OUT / "weights.h5").write_bytes(WEIGHTS)
        (OUT / "cache").mkdir()  # Keras takes another folder when it is not there
    session.transport.gather(None)
    with session.chief_first():
        append(f"first {session.rank}")
        cached = fetch("in-turn.h5")
    seen = {
        "fails on the chief": refused(fails_on_the_chief),
        "in turn": cached,
        "at the same time": fetch("at-once.h5"),
        "history": distfit.fit(build, np.ones((12, 4)), np.ones((12, 3)), batch_size=6, verbose=0).history,
        "configurations": refused(lambda: session.same("the same configuration", "Copy it.", epochs=session.rank // 2)),
        "left over": sorted(path.name for path in (OUT / "cache" / "datasets").iterdir()),
    }
    (OUT / f"seen-{session.rank}.json").write_text(json.dumps(seen))


def other_versions() -> None:
    found = dict(meeting.versions())
    if not _is_rank_0():
        found["keras"] = "3.15.2"
    meeting.versions = lambda: found
    distfit.init()
    append("must not be reached")


def _is_rank_0() -> bool:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank == 0


class Hungry(keras.layers.Layer):
    """Asks for more memory than any machine has."""

    def call(self, inputs: Any) -> Any:
        rows = tf.shape(inputs, out_type=tf.int64)[0]
        return inputs + tf.reduce_sum(tf.random.uniform([rows, 2**38]), axis=1, keepdims=True)


def out_of_memory() -> None:
    model = keras.Sequential([keras.Input((4,)), Hungry(), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    distfit.fit(model, np.ones((16, 4)), np.ones((16, 3)), batch_size=8, verbose=0)


def disk_fills_up() -> None:
    """OUT is a small disk, which somebody else fills."""

    def fill(epoch: int, logs: Any) -> None:
        with open(OUT / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_begin=fill)]
    rows = np.ones((8, 4)), np.ones((8, 3))
    distfit.fit(model, *rows, epochs=300, verbose=0, callbacks=callbacks, log_dir=OUT / "logs")


def foreign_launcher() -> None:
    """As under srun without --mpi=pmix: Slurm started two ranks, and MPI knows one."""
    os.environ.update(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="2")
    distfit.init()
    append("must not be reached")


if __name__ == "__main__":
    show_stacks_when_asked()
    programs = (together, other_versions, out_of_memory, foreign_launcher, disk_fills_up)
    {program.__name__: program for program in programs}[sys.argv[1]]()
