"""KerasTuner over distfit: `HyperModel.fit` is the one place that changes.

    python docs/examples/search_keras_tuner.py
    DISTFIT_DEVICES=2 python docs/examples/search_keras_tuner.py

Needs `pip install keras-tuner`. Every trial trains on all devices of the process, one trial after the other.
"""

import keras
import keras_tuner
from sklearn.datasets import load_digits

import distfit


class Digits(keras_tuner.HyperModel):
    """What is searched: the units, the learning rate and the global batch."""

    def build(self, hp):
        units, rate = hp.Int("units", 16, 64, step=16), hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")
        layers = keras.layers
        model = keras.Sequential([keras.Input((64,)), layers.Dense(units, "tanh"), layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
        return model

    def fit(self, hp, model, *args, **kwargs):
        return distfit.fit(model, *args, batch_size=hp.Choice("batch_size", [32, 64]), **kwargs)


def main(trials: int = 6, epochs: int = 4) -> dict:
    """The best values after so many trials."""
    distfit.init()  # before the first tensor or model: it takes the devices
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    tuner = keras_tuner.RandomSearch(
        Digits(), objective="val_accuracy", max_trials=trials, seed=1, directory="runs/tuner", overwrite=True
    )
    tuner.search(x / 16, y, validation_split=0.2, epochs=epochs, verbose=0)
    best = tuner.oracle.get_best_trials()[0]
    return {**best.hyperparameters.values, "val_accuracy": best.score}


if __name__ == "__main__":
    print(main())
