"""A hand-written loop around tf.GradientTape, with BatchNormalization: run by `distfit check`."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import distfit

session = distfit.init()
keras.utils.set_random_seed(6)

random = np.random.default_rng(0)
x, y = random.normal(size=(150, 6)).astype("float32"), random.integers(0, 3, 150)

model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(3)])
optimizer = keras.optimizers.Adam(0.01)
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
mean_loss = keras.metrics.Mean("loss")


@session.step
def train(x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
        scaled = session.scale_loss(loss)
    gradients = tape.gradient(scaled, model.trainable_variables)
    session.apply(optimizer, gradients, model.trainable_variables)
    mean_loss.update_state(loss, sample_weight=session.rows())


@session.step
def test(x, y):
    mean_loss.update_state(loss_of(y, model(x, training=False)), sample_weight=session.rows())


data = session.batches(x, y, batch_size=28)
valid = session.batches(x[:50], y[:50], batch_size=28, shuffle=False)

with session.training(model, optimizer, data, metrics=[mean_loss], epochs=9, checkpoint="runs/loop") as training:
    for _ in training:
        for batch in data:
            train(batch)
        training.validate(test, valid)
model.save("trained.keras")
