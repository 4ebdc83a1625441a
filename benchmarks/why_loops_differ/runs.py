"""Trains, measures and keeps: what results.json holds. No TensorFlow until something is trained.

results = all_runs(["digits"], ["double_softmax"], seeds=[0])
results.runs["digits"]["double_softmax"]        # a Run: numbers of every seed and epoch
save(results); load()
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).parent / "results.json"
# What the causes are compared with: fit and the right loop, under both optimizers.
BASELINES = {f"{kind}_{optimizer}": optimizer for kind in ("fit", "loop") for optimizer in ("adam", "sgd")}
NUMBERS = ("loss", "accuracy", "true_loss", "true_accuracy")
LAST_EPOCHS = 3
SHORT_EPOCHS = 2
# How far a short run may be from the stored one: roundings of another processor grow within its hundred updates.
LOSS_WITHIN, ACCURACY_WITHIN = 0.05, 0.03


@dataclass(frozen=True)
class Run:
    """One training with each seed.

    Args:
        weights: a digest of the weights at the end, by seed.
        numbers: each of NUMBERS (see loop.Epoch) as one list a seed, of one number an epoch; None is not a number.
    """

    weights: list[str]
    numbers: dict[str, list[list[float | None]]]

    def curve(self, name: str) -> np.ndarray:
        """A number by seed and epoch."""
        return np.array(self.numbers[name], np.float64)

    def final(self, name: str) -> np.ndarray:
        """A number at the end, by seed: the mean of the last epochs, as the moving statistics tremble."""
        return self.curve(name)[:, -LAST_EPOCHS:].mean(1)


@dataclass(frozen=True)
class Results:
    """All of it.

    Args:
        machine: processor, versions.
        minutes: that the runs took.
        seeds: in the order of every list by seed.
        sizes: of each data set: records to train on and to validate with, classes, epochs.
        runs: data set -> cause or baseline -> Run.
    """

    machine: str
    minutes: float
    seeds: list[int]
    sizes: dict[str, list[int]]
    runs: dict[str, dict[str, Run]]


def all_runs(
    data: Iterable[str],
    causes: Iterable[str],
    seeds: Sequence[int],
    epochs: int | None = None,
    tell: Callable[[str], None] = print,
) -> Results:
    """Trains every baseline and these causes on these data sets.

    Args:
        data: names of tasks.TASKS.
        causes: names of causes.CAUSES.
        seeds: each is another training.
        epochs: instead of the data set's own.
        tell: hears a line after each cause.
    """
    from benchmarks.why_loops_differ.tasks import TASKS

    started = time.monotonic()
    names, sizes, runs = [*BASELINES, *causes], {}, {}
    for name in data:
        task = TASKS[name]() if epochs is None else TASKS[name](epochs=epochs)
        sizes[name] = [len(task.train_y), len(task.valid_y), task.classes, task.epochs]
        runs[name] = {which: run_of(task, which, seeds, tell) for which in names}
    return Results(machine(), round((time.monotonic() - started) / 60), list(seeds), sizes, runs)


def run_of(task: Any, which: str, seeds: Iterable[int], tell: Callable[[str], None] = print) -> Run:
    """A cause or a baseline, with every seed."""
    import keras

    weights, epochs = [], []
    for seed in seeds:
        keras.backend.clear_session()
        training = training_of(which, task, seed)
        epochs.append(training.run(task.epochs))
        weights.append(hashlib.sha256(training.weights().tobytes()).hexdigest()[:16])
    run = Run(weights, {name: [[kept(getattr(one, name)) for one in seed] for seed in epochs] for name in NUMBERS})
    tell(f"{task.name} {which}: {summary(run)}")
    return run


def kept(value: float) -> float | None:
    """Five digits of a number, which is what results.json holds.

    >>> kept(0.1234567), kept(float("nan"))
    (0.12346, None)
    """
    return float(f"{value:.5g}") if math.isfinite(value) else None


def training_of(which: str, task: Any, seed: int) -> Any:
    """The training of a name, ready to run."""
    from benchmarks.why_loops_differ.causes import CAUSES
    from benchmarks.why_loops_differ.loop import Fit, Loop

    if which in BASELINES:
        return (Fit if which.startswith("fit") else Loop)(task, seed, BASELINES[which])
    return CAUSES[which].loop(task, seed, CAUSES[which].optimizer)


def summary(run: Run) -> str:
    """The end, for whoever watches."""
    names = ("true_loss", "true_accuracy", "loss", "accuracy")
    return ", ".join(f"{name} {' '.join(f'{value:.4g}' for value in run.final(name))}" for name in names)


def save(results: Results, path: Path = STORED) -> None:
    """Writes a line for every seed, so that what changes can be read in a comparison of versions."""
    text = json.dumps(asdict(results), indent=1)
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda lines: " ".join(lines[0].split()), text) + "\n")


def load(path: Path = STORED) -> Results:
    """What `save` wrote."""
    stored = json.loads(path.read_text())
    runs = {data: {which: Run(**run) for which, run in own.items()} for data, own in stored.pop("runs").items()}
    return Results(**stored, runs=runs)


def differing(stored: Results, short: Results) -> list[str]:
    """What a short run of the first seed has that is not in the stored results, each as a sentence."""
    limits = {"true_loss": LOSS_WITHIN, "true_accuracy": ACCURACY_WITHIN}
    found = []
    for data, runs in short.runs.items():
        for which, run in runs.items():
            for name, limit in limits.items():
                new = run.curve(name)[0]
                old = stored.runs[data][which].curve(name)[0, : len(new)]
                within = limit * (np.maximum(old, 1.0) if name == "true_loss" else 1.0)
                if not (abs(new - old) <= within).all():
                    found.append(f"{data} {which}: {name} {new.tolist()}, stored {old.tolist()}")
    return found


def machine() -> str:
    """Where the figures come from."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, Python "
        f"{platform.python_version()}, TensorFlow {tensorflow()}, Keras {version('keras')}"
    )


def tensorflow() -> str:
    """Its version; the package has several names."""
    import tensorflow as tf

    return tf.__version__
