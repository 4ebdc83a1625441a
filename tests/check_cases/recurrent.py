"""Sequences of different lengths, as keras.io's "Masking and padding": a mask, an LSTM, weights of rows, a tf.data
pipeline with a seeded shuffle. Run by `distfit check`."""

import argparse

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from distfit import fit

parser = argparse.ArgumentParser()
parser.add_argument("--units", type=int, default=8)
arguments = parser.parse_args()

keras.utils.set_random_seed(3)

raw_inputs = [list(range(1, 3 + (7 * row) % 10)) for row in range(150)]
padded_inputs = keras.utils.pad_sequences(raw_inputs, padding="post")
labels = np.array([[len(row) % 2] for row in raw_inputs], "float32")
sample_weight = np.linspace(0.1, 2.0, len(labels)).astype("float32")
train = tf.data.Dataset.from_tensor_slices((padded_inputs, labels, sample_weight)).shuffle(150, seed=4).batch(28)

model = keras.Sequential(
    [
        layers.Embedding(input_dim=32, output_dim=8, mask_zero=True),
        layers.LSTM(arguments.units, return_sequences=True),
        layers.LSTM(arguments.units),
        layers.Dense(1, activation="sigmoid"),
    ]
)
model.compile(
    optimizer=keras.optimizers.RMSprop(0.01),
    loss="binary_crossentropy",
    metrics=[keras.metrics.AUC()],
    weighted_metrics=["mae"],
)

if __name__ == "__main__":
    fit(model, train, epochs=3)
