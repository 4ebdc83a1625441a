"""Optuna over distfit, with trials that are given up when they fall behind.

    python docs/examples/search_optuna.py
    DISTFIT_DEVICES=2 python docs/examples/search_optuna.py

Needs `pip install optuna`. Every trial trains on all devices of the process, one trial after the other.
"""

import keras
import optuna
from sklearn.datasets import load_digits

import distfit


class GiveUpWhenBehind(keras.callbacks.Callback):
    """Tells Optuna how a trial goes; the exception ends the training, which distfit passes on."""

    def __init__(self, trial, monitor="val_accuracy"):
        super().__init__()
        self.trial, self.monitor = trial, monitor

    def on_epoch_end(self, epoch, logs=None):
        self.trial.report(logs[self.monitor], step=epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"behind after epoch {epoch + 1}")


def build(units, learning_rate):
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(units, "tanh"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


def search(trials: int = 8, epochs: int = 4) -> optuna.Study:
    """A study of so many trials."""
    distfit.init()  # before the first tensor or model: it takes the devices
    x, y = load_digits(return_X_y=True)

    def objective(trial):
        keras.utils.set_random_seed(0)
        model = build(
            trial.suggest_int("units", 16, 64, step=16), trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        )
        history = distfit.fit(
            model,
            x / 16,
            y,
            validation_split=0.2,
            batch_size=64,
            epochs=epochs,
            verbose=0,
            callbacks=[GiveUpWhenBehind(trial)],
        )
        return history.history["val_accuracy"][-1]

    sampler, pruner = optuna.samplers.TPESampler(seed=0), optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    study = search()
    print(study.best_params, study.best_value)
