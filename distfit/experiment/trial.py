"""A smoke test of a configuration: two steps of everything, in a folder that is removed again, and a verdict.

    verdict = smoke(config)
    print(verdict.text()); verdict.passed

Training, validation, logs, checkpoint and prediction are those of the real run, with its engine, ranks, data
and global batch, on its file system; only the number of steps is another.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from distfit import checks
from distfit.config import RunConfig
from distfit.errors import InputError
from distfit.experiment.run import dtype_policy, loaded, model_path, ready, train
from distfit.fitting import predict
from distfit.folders import existing
from distfit.session import Session, init

STEPS = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a smoke test found, the same on every rank."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether the configuration is ready for a whole training."""
        return all(finding.passed for finding in self.findings)

    def text(self) -> str:
        """A line for each finding and one for all.

        >>> print(Verdict((Finding("losses", True, "finite"), Finding("logs", False, "none"))).text())
        ok      losses      finite
        FAILED  logs        none
        smoke test failed
        """
        lines = [f"{'ok' if each.passed else 'FAILED':<8}{each.what:<12}{each.text}" for each in self.findings]
        return "\n".join([*lines, f"smoke test {'passed' if self.passed else 'failed'}"])


def smoke(config: RunConfig) -> Verdict:
    """Runs two steps of everything that `train` does.

    Args:
        config: of the real run; what its run folder holds is not touched.

    Raises:
        InputError: as `train`.
    """
    session = init(config.strategy, config.devices, stall_limit_s=config.stall_limit_s)
    with _folder_there(session, Path(config.run_dir)) as folder:
        here = config.model_copy(update={"run_dir": str(folder)})
        watch = _StepTimes()
        history = train(here, [watch], only_steps=STEPS)
        findings = [*_losses(history), _step_times(watch)]
        findings.append(_checkpoint(session, here, history.model))
        with session.running("reading the logs"):
            findings.append(session.from_chief(lambda: _logs(folder / "logs", history)))
    return Verdict(tuple(findings))


@contextmanager
def _folder_there(session: Session, run_dir: Path) -> Iterator[Path]:
    """A new folder in the run folder, or in the nearest one above it that is there; gone afterwards. Collective."""

    def make() -> str:
        checks.writable(run_dir)
        return tempfile.mkdtemp(prefix=".smoke-", dir=existing(run_dir))

    with session.running("preparing"):
        folder = Path(session.from_chief(make))
    try:
        yield folder
    finally:
        if session.is_chief:
            shutil.rmtree(folder)


class _StepTimes(keras.callbacks.Callback):
    """Seconds of each step, the device included."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Reading a number waits for the device.
        float((logs or {})["loss"])
        self.seconds.append(time.monotonic() - self._begin)


def _losses(history: keras.callbacks.History) -> list[Finding]:
    last = {name: float(values[-1]) for name, values in history.history.items()}
    findings = [_loss("training", {name: last[name] for name in last if not name.startswith("val_")}, "")]
    validation = {name: last[name] for name in last if name.startswith("val_")}
    if validation:
        findings.append(_loss("validation", validation, _young_averages(history.model)))
    return findings


def _loss(what: str, values: dict[str, float], excuse: str) -> Finding:
    shown = ", ".join(f"{name} {values[name]:.4g}" for name in sorted(values, key=lambda name: "loss" not in name))
    if all(map(math.isfinite, values.values())):
        return Finding(what, True, shown)
    return Finding(what, bool(excuse), f"{shown}{excuse or ': not finite'}")


def _young_averages(model: keras.Model) -> str:
    """Why a deep network with BatchNormalization may overflow after two steps and be healthy."""
    layers = model._flatten_layers(include_self=False)
    normalises = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    return f": says nothing yet, as BatchNormalization's averages have seen {STEPS} steps" if normalises else ""


def _step_times(watch: _StepTimes) -> Finding:
    first, *rest = watch.seconds
    text = f"the first took {first:.2f} s, which traces it"
    return Finding("steps", len(watch.seconds) == STEPS, text + "".join(f", the next {each:.3f} s" for each in rest))


def _checkpoint(session: Session, config: RunConfig, trained: keras.Model) -> Finding:
    """Whether the model that was left behind is the one that was trained. Collective."""
    path = model_path(config)
    with dtype_policy(config.dtype):
        job = ready(session, config)
        try:
            with session.running("loading the checkpoint"):
                again = loaded(session, job, path)
                size = session.from_chief(lambda: path.stat().st_size)
        except InputError as error:
            return Finding("checkpoint", False, str(error))
        records = job.records(config.data.train)
        own, read = (predict(model, records, config.batch_size, 0, steps=1) for model in (trained, again))
    pairs = zip(trained.get_weights(), again.get_weights(), strict=True)
    same = all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)
    same = same and _close(own, read, trained.compute_dtype)
    text = f"{path.name}, {size / 1e6:.1f} MB, loads and predicts {'the same' if same else 'otherwise'}"
    return Finding("checkpoint", same, text)


def _close(own: Any, read: Any, dtype: str) -> bool:
    """Equal but for what the type of the layers lets two runs of one computation differ on a GPU."""
    allowed = math.sqrt(float(ml_dtypes.finfo(tf.as_dtype(dtype).as_numpy_dtype).eps))
    pairs = zip(keras.tree.flatten(own), keras.tree.flatten(read), strict=True)
    return all(np.allclose(one, other, rtol=allowed, atol=allowed, equal_nan=True) for one, other in pairs)


def _logs(folder: Path, history: keras.callbacks.History) -> Finding:
    """Whether TensorBoard's own reader finds the curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = {"train": "loss"} | ({"validation": "val_loss"} if "val_loss" in history.history else {})
    found = {
        name: EventAccumulator(str(folder / name)).Reload().Tags().get("tensors", [])
        for name in expected
        if (folder / name).is_dir()
    }
    missing = [name for name in expected if "epoch_loss" not in found.get(name, [])]
    text = f"no epoch_loss of {', '.join(missing)}" if missing else f"epoch_loss of {' and '.join(expected)} readable"
    return Finding("logs", not missing, f"{text} in TensorBoard's events")
