"""Trainings of tests/test_tensorboard.py: the same lines for Keras, distfit, and a process of two devices.

python -m tests.tensorboard_script FOLDER      # two logical devices
"""

from __future__ import annotations

import sys

import keras
import numpy as np

import distfit

ROWS = np.random.default_rng(0).normal(size=(44, 4))  # batches of 8: the last is of 4
TARGETS = ROWS.sum(axis=1, keepdims=True)
STEPS = 6
DATA = {"x": ROWS, "y": TARGETS, "validation_data": (ROWS[:10], TARGETS[:10]), "batch_size": 8, "verbose": 0}


def model(optimizer=None, **compiled):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="rows")
    hidden = keras.layers.Dense(3, "tanh", name="hidden")(inputs)
    made = keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden), name="small")
    made.compile(optimizer or keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **compiled)
    return made


def train(folder, update_freq="epoch", epochs=3, trained=None, callbacks=(), **arguments):
    """distfit.fit, with everything that TensorBoard writes."""
    board = distfit.TensorBoard(folder, histogram_freq=1, write_steps_per_second=True, update_freq=update_freq)
    trained = trained or model()
    return distfit.fit(trained, **DATA, epochs=epochs, callbacks=[board, *callbacks], **arguments)


if __name__ == "__main__":
    distfit.init("mirrored", devices=2)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    train(sys.argv[1], update_freq=1, logs_every_steps=1)
