"""Training and evaluating what a configuration describes: on every rank, with the same configuration.

history = train(config)
evaluate(config).metrics["accuracy"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from distfit import checks
from distfit.callbacks.policy import chief_only
from distfit.callbacks.saver import MODEL_FILE
from distfit.checkpoint.options import Checkpoint
from distfit.config import RunConfig, save, values
from distfit.data.description import check_labels, load
from distfit.data.plan import steps_per_epoch
from distfit.data.records import whole_file
from distfit.errors import InputError, RunError
from distfit.experiment.job import Job, prepare
from distfit.fitting import evaluate as evaluate_model
from distfit.fitting import fit
from distfit.session import Session, init

_SAME_DATA = (
    "Give all ranks one folder on a shared file system, or copies of one: each would read its part of another order of "
    "records."
)
_SAME_FILE = "Start all ranks with the same file and the same overrides; a file on a shared file system is the same."


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        model: path of the file.
        split: of the data set.
        records: that were evaluated.
        metrics: by name, the loss first; from state summed over all replicas.
    """

    model: str
    split: str
    records: int
    metrics: dict[str, float]

    def to_json(self) -> str:
        """One line; a metric that is not finite is null.

        >>> Evaluation("a.keras", "test", 36, {"loss": float("nan"), "accuracy": 0.5}).to_json()
        '{"model": "a.keras", "split": "test", "records": 36, "metrics": {"loss": null, "accuracy": 0.5}}'
        """
        metrics = {name: _finite(value) for name, value in self.metrics.items()}
        return json.dumps(dataclasses.asdict(self) | {"metrics": metrics}, allow_nan=False)


def train(
    config: RunConfig, callbacks: Sequence[keras.callbacks.Callback] = (), only_steps: int | None = None
) -> keras.callbacks.History:
    """Runs one training.

    Args:
        callbacks: of Keras, beside those that write the run folder.
        only_steps: end after so many steps and so many of validation; the learning rate is that of the first
            steps of the whole run. None trains to the end.

    Returns:
        The history of `distfit.fit`: global metrics, the same on every rank.

    Raises:
        InputError: the configuration, the data or the run folder cannot work; before training starts,
            nothing written.
        RunError: the run folder no longer takes its files, or the run ended as `distfit.fit` says.
    """
    session = init(config.strategy, config.devices, stall_limit_s=config.stall_limit_s)
    run_dir = Path(config.run_dir)
    with dtype_policy(config.dtype):
        job = ready(session, config, config.data.train, config.data.validation)
        with session.running("preparing"):
            session.from_chief(lambda: checks.writable(run_dir))
            job = job.knowing(session.from_chief(job.measured))
        history = fit(
            job.build,
            job.records(config.data.train),
            validation_data=None if config.data.validation is None else job.records(config.data.validation),
            epochs=1 if only_steps else config.epochs,
            batch_size=config.batch_size,
            steps_per_epoch=only_steps or config.steps_per_epoch,
            validation_steps=_validation_steps(config, job, only_steps or config.validation_steps),
            callbacks=[*callbacks, _saves_config(config, run_dir / "config.yaml")],
            verbose=config.verbose,
            seed=config.seed,
            strategy=config.strategy,
            devices=config.devices,
            sync_batch_norm=config.sync_batch_norm,
            reduction_dtype=config.reduction_dtype,
            in_sync_steps=config.in_sync_steps,
            logs_every_steps=1 if only_steps else None,  # a trial times each step by its values
            learning_rate_scaling=config.optimizer.learning_rate_scaling,
            log_dir=run_dir / "logs",
            checkpoint=Checkpoint(run_dir / "checkpoint", **dict(config.checkpoint)),
            resume=config.resume,
            allow=config.allow,
        )
    with session.running("writing the history"):
        session.from_chief(lambda: _save_history(history, run_dir / "history.json"))
    return history


def evaluate(
    config: RunConfig, split: str | None = None, model: str | os.PathLike | None = None, verbose: str | int = "auto"
) -> Evaluation:
    """The loss and metrics of a trained model over a split, as training's own validation computes them.

    Args:
        split: of the data set; None is the one that the configuration validates on.
        model: a `.keras` file; None is the one in the run folder.
        verbose: 0 shows no progress.

    Raises:
        InputError: no model there, or it does not fit the data.
    """
    session = init(config.strategy, config.devices, stall_limit_s=config.stall_limit_s)
    path = model_path(config) if model is None else Path(model)
    with dtype_policy(config.dtype):
        split = _chosen(session, split or config.data.validation)
        job = ready(session, config, split)
        with session.running("preparing"):
            trained = loaded(session, job, path)
        # As a training with this setting does after each epoch, so that both give the same number.
        steps = _validation_steps(config, job, config.validation_steps) if split == config.data.validation else None
        records = job.reader.data.split(split).records
        results = evaluate_model(
            trained,
            job.records(split),
            batch_size=config.batch_size,
            verbose=verbose,
            steps=steps,
            return_dict=True,
            strategy=config.strategy,
            devices=config.devices,
        )
    seen = records if steps is None else min(records, steps * config.batch_size)
    loss_first = sorted(results, key=lambda name: name != "loss")
    return Evaluation(str(path), split, seen, {name: float(results[name]) for name in loss_first})


def ready(session: Session, config: RunConfig, *splits: str | None) -> Job:
    """The job of a configuration, its data held against it. Collective.

    Args:
        splits: whose labels are read, None for none.

    Raises:
        InputError: something that is named is not there or does not fit; on every rank.
    """
    with session.running("preparing"):
        session.same("the same configuration", _SAME_FILE, **dict(values(config)))
        data = session.agree(lambda: load(config.data.path))
        session.same("the same data set", _SAME_DATA, **json.loads(data.to_json()))
        job = session.agree(lambda: prepare(config, data))
        session.from_chief(lambda: [check_labels(data, split) for split in splits if split is not None])
    return job


def loaded(session: Session, job: Job, path: Path) -> keras.Model:
    """`Job.load` on every rank; hosts that do not see the chief's file get a copy for the moment. Collective.

    Raises:
        InputError: as `Job.load`; on every rank.
    """
    seen = session.transport.gather(path.is_file())
    if all(seen) or not seen[0]:
        return session.agree(lambda: job.load(path))
    content = session.transport.broadcast(path.read_bytes() if session.is_chief else None)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        return session.agree(lambda: job.load(path if session.is_chief else copy))


def model_path(config: RunConfig) -> Path:
    """Where a training leaves its model."""
    return Path(config.run_dir) / "checkpoint" / MODEL_FILE


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Keras' dtype policy and, for a plain one, the type of losses and metrics; both are given back."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    if not name.startswith("mixed"):
        # Losses and metrics follow floatx, not the policy.
        keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])


def _chosen(session: Session, split: str | None) -> str:
    def check() -> str:
        if split is None:
            raise InputError(
                "Expected the name of a split to evaluate on, received none, and data.validation is null. Name one "
                "with --split."
            )
        return split

    with session.running("preparing"):
        return session.agree(check)


def _validation_steps(config: RunConfig, job: Job, wanted: int | None) -> int | None:
    """No more than the split has, as no record is validated on twice; None for all of it."""
    if wanted is None or config.data.validation is None:
        return None
    return min(wanted, steps_per_epoch(job.reader.data.split(config.data.validation).records, config.batch_size))


def _saves_config(config: RunConfig, path: Path) -> keras.callbacks.Callback:
    """Writes the configuration when training starts: not sooner, as refused input leaves nothing behind."""

    def write(logs: Any) -> None:
        with _written(path):
            os.makedirs(path.parent, exist_ok=True)
            save(config, path, header=f"distfit train {path}\nThe configuration of this run, resolved.")

    return chief_only(keras.callbacks.LambdaCallback(on_train_begin=write))


def _save_history(history: keras.callbacks.History, path: Path) -> None:
    values = {name: [_finite(value) for value in by_epoch] for name, by_epoch in history.history.items()}
    text = json.dumps(
        {"history": values, "final": {name: each[-1] for name, each in values.items()}}, indent=2, allow_nan=False
    )
    with _written(path), whole_file(path) as file:
        file.write(f"{text}\n".encode())


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Expected to write {path}, received: {error.strerror or error}. Make room or correct the folder's "
            "permissions; what the run had left there before is whole."
        ) from error


def _finite(value: Any) -> float | None:
    """JSON has no word for other numbers, and readers other than Python's refuse its NaN."""
    return float(value) if math.isfinite(value) else None
