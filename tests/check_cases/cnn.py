"""Images in classes, as keras.io's "Simple MNIST convnet" with BatchNormalization: run by `distfit check`."""

import keras
import numpy as np
from keras import layers

import distfit

keras.utils.set_random_seed(1)

num_classes = 10
input_shape = (12, 12, 1)

random = np.random.default_rng(0)
x_train = random.random((256, *input_shape)).astype("float32")
y_train = keras.utils.to_categorical(random.integers(0, num_classes, 256), num_classes)

model = keras.Sequential(
    [
        keras.Input(shape=input_shape),
        layers.Conv2D(8, kernel_size=(3, 3), use_bias=False),
        layers.BatchNormalization(),
        layers.Activation("relu"),
        layers.MaxPooling2D(pool_size=(2, 2)),
        layers.Conv2D(16, kernel_size=(3, 3), activation="relu"),
        layers.Flatten(),
        layers.Dropout(0.5),
        layers.Dense(num_classes, activation="softmax"),
    ]
)
model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])

distfit.fit(
    model,
    x_train,
    y_train,
    batch_size=32,
    epochs=15,
    validation_split=0.1,
    callbacks=[keras.callbacks.ModelCheckpoint("best.keras")],
    log_dir="logs",
)
raise AssertionError("a check ends the script where it calls distfit.fit")
