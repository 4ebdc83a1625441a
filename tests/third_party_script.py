"""A rank of tests/test_third_party.py: loggers of other packages and a search by KerasTuner, as in a user's script."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import keras
import keras_tuner
import mlflow
import mlflow.keras
import numpy as np
import wandb
from tensorboard.plugins.hparams import api as hparams
from tqdm.keras import TqdmCallback
from wandb.integration.keras import WandbMetricsLogger, WandbModelCheckpoint

import distfit

# Rows that two ranks do not share equally.
X = np.random.default_rng(0).normal(size=(25, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


def build(rate=0.1):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate), "mse", metrics=["mae"])
    return model


def loggers(folder, is_chief):
    """Unmodified; each rank makes its own. What the constructors begin, a rank that is not the chief must not show."""
    return [
        WandbMetricsLogger(),
        WandbModelCheckpoint(folder / "best.keras", save_best_only=True, monitor="val_loss"),
        mlflow.keras.MlflowCallback(),
        hparams.KerasCallback(str(folder / "hparams"), {"rate": 0.1}),
        TqdmCallback(verbose=0, disable=not is_chief),
    ]


def logged(session, folder):
    """A training that all of them listen to; what it returned."""
    run = wandb.init(project="distfit", dir=folder, mode="offline" if session.is_chief else "disabled")
    callbacks = loggers(folder, session.is_chief)
    history = distfit.fit(build(), X, Y, batch_size=8, epochs=2, validation_data=(X, Y), callbacks=callbacks, verbose=0)
    told = [type(callback).__name__ for callback in callbacks if getattr(callback, "_model", None) is not None]
    numbers = dict(run.summary) if session.is_chief else {}
    run.finish()
    return {"history": history.history, "told": told, "wandb": {name: numbers[name] for name in numbers if "/" in name}}


class Rate(keras_tuner.HyperModel):
    """Searches the learning rate."""

    def build(self, hp):
        return build(hp.Float("rate", 1e-3, 1e-1, sampling="log"))

    def fit(self, hp, model, *args, **kwargs):
        return distfit.fit(model, *args, **kwargs)


def searched(folder):
    """The rates that were tried, with their scores, the best first."""
    # KerasTuner 1.4 takes a seed of 0 for none (engine/oracle.py).
    objective = keras_tuner.Objective("loss", "min")
    tuner = keras_tuner.RandomSearch(Rate(), objective, max_trials=2, seed=1, directory=folder, overwrite=True)
    tuner.search(X, Y, batch_size=8, epochs=1, verbose=0)
    best = tuner.oracle.get_best_trials(2)
    return [[trial.hyperparameters.get("rate"), trial.score] for trial in best]


def main(folder):
    session = distfit.init()
    folder = Path(folder)
    found = logged(session, folder)
    with tempfile.TemporaryDirectory() as scratch:
        own = folder / "tuner" if session.is_chief else Path(scratch)
        found["search"] = searched(own)
        found["saved"] = [path.name for path in own.glob("*/trial_*/*.h5")]
    (folder / f"rank-{session.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
