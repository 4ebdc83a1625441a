"""What a child process is told, and what it leaves behind: files in one folder. No TensorFlow.

spec.write(folder)                     # the parent
spec = Spec.read(folder)               # the child, and every rank
write(folder, numbers, facts)          # the chief
outcome = read(folder)                 # the parent
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from distfit.checking.plan import Engine, Run, Variant
from distfit.checking.target import Kind, Target

_SPEC, _NUMBERS, _ANSWER = "spec.json", "numbers.npz", "answer.json"


@dataclass(frozen=True)
class Spec:
    """One run, for a process that does nothing else.

    Args:
        target: what is started.
        run: on which engine, how changed.
        steps: of training, and of evaluation, >= 1.
        float64: compute in float64.
        stall_limit_s: as of `distfit.init`.
        paths: where Python finds modules, as in the parent.
    """

    target: Target
    run: Run
    steps: int
    float64: bool
    stall_limit_s: float
    paths: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        (folder / _SPEC).write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(folder: Path) -> Spec:
        read = json.loads((folder / _SPEC).read_text())
        target, run = read["target"], read["run"]
        return Spec(
            Target(Kind(target["kind"]), target["name"], tuple(target["arguments"])),
            Run(Engine(**run["engine"]), Variant(**run["variant"])),
            read["steps"],
            read["float64"],
            read["stall_limit_s"],
            tuple(read["paths"]),
        )


class Failure(StrEnum):
    """Why there are no numbers."""

    refused = "refused"  # by distfit, before or while it trained
    script = "failed"  # an exception of the script, or of its model
    no_fit = "no training"  # the script ended without having called distfit.fit
    lost = "lost"  # the process was killed, or reached its limit


@dataclass(frozen=True)
class Facts:
    """What a run says about the training, beside its numbers.

    Args:
        steps: that it took; the data may have had fewer than were asked for.
        dtype: in which the model computes, the shortest of its layers.
        batch_norm: each replica normalises with the moments of its own rows.
        random: who draws random numbers in a step: classes of layers, or "keras.random", "tf.random".
        notes: of distfit, about what several replicas do otherwise than one device.
        left_out: callbacks and arguments of the script that were not used.
        not_evaluated: why there is no evaluation, "" where there is one.
        digests: of the batches, over all ranks.
        initial: of the weights before the first step; None for a model that was not built by then.
    """

    steps: int = 0
    dtype: str = "float32"
    batch_norm: bool = False
    random: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    not_evaluated: str = ""
    digests: tuple[int, ...] = ()
    initial: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        numbers: as `checking.compare` names them; empty when it failed.
        facts: of the training.
        failure: None when it came to its end.
        problem: a sentence about the failure.
        details: a traceback, or the end of what the process printed.
        seconds: that it took.
    """

    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    failure: Failure | None = None
    problem: str = ""
    details: str = ""
    seconds: float = 0.0


def write(folder: Path, numbers: Mapping[str, Any], facts: Facts) -> None:
    """Leave a result behind; the answer comes last, so that it is whole when it is there."""
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in numbers.items()}
    np.savez(folder / _NUMBERS, **arrays)
    (folder / _ANSWER).write_text(json.dumps({"facts": dataclasses.asdict(facts)}))


def write_failure(folder: Path, failure: Failure, problem: str, details: str = "") -> None:
    """Leave behind why there is no result."""
    (folder / _ANSWER).write_text(json.dumps({"failure": failure, "problem": problem, "details": details}))


def read(folder: Path, ended: str | None, printed: str, seconds: float) -> Outcome:
    """What a run has left behind.

    Args:
        ended: how its process ended, None when well.
        printed: the end of its standard error.
        seconds: that it took.
    """
    answer = folder / _ANSWER
    if not answer.exists():
        problem = f"it {ended}" if ended and ended.startswith(("did", "was")) else ended or "it left no result"
        return Outcome(failure=Failure.lost, problem=problem, details=printed, seconds=seconds)
    said = json.loads(answer.read_text())
    if "failure" in said:
        return Outcome(
            failure=Failure(said["failure"]), problem=said["problem"], details=said["details"], seconds=seconds
        )
    facts: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in said["facts"].items()
    }
    with np.load(folder / _NUMBERS) as numbers:
        return Outcome(dict(numbers), Facts(**facts), seconds=seconds)
