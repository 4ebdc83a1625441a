"""What is trained: the data, sorted by class as class folders are, and the network.

task = digits()                       # or folder("/tmp/pictures")
model = task.network()                # uncompiled, logits
task.train_x, task.valid_y            # NumPy arrays
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.why_loops_differ.pictures import make_folder

BATCH = 32
# 37 full batches and 5 pictures: four in the last batch of the training, one in the last of the validation, as with
# the 1,797 digits. Averages of averages differ most where a batch is short.
PICTURES = 37 * BATCH + 5
PIXELS = 64
PENALTY = 5e-4


@dataclass(frozen=True)
class Task:
    """One data set and the network for it.

    Args:
        name: "digits" or "folder".
        train_x, train_y, valid_x, valid_y: float32 images and int64 labels, in the order of their labels.
        classes: how many.
        filters: of the network's convolutions.
        strides: of the same.
        epochs: of a run.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray
    classes: int
    filters: tuple[int, ...]
    strides: tuple[int, ...]
    epochs: int

    def network(self) -> Any:
        """Convolutions with BatchNormalization, dropout, a dense layer of logits; an L2 penalty on every kernel.

        No bias before a BatchNormalization, which takes it away again: Adam would divide a gradient that is nothing
        but rounding by its own size.
        """
        from keras import Input, Model, layers, regularizers

        penalty = regularizers.L2(PENALTY)
        inputs = x = Input(self.train_x.shape[1:])
        for filters, strides in zip(self.filters, self.strides, strict=True):
            x = layers.Conv2D(filters, 3, strides, "same", use_bias=False, kernel_regularizer=penalty)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(x))
        return Model(inputs, layers.Dense(self.classes, kernel_regularizer=penalty)(x))


def digits(epochs: int = 10) -> Task:
    """scikit-learn's 1,797 scanned digits, 8x8 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images / 16).astype(np.float32)[..., None]
    return Task("digits", *split(x, data.target.astype(np.int64)), 10, (16, 32, 32), (1, 2, 1), epochs)


def folder(path: str | Path | None = None, epochs: int = 14) -> Task:
    """A folder of class folders with JPEGs, read by Keras; made in a temporary one if none is named."""
    if path is None:
        with tempfile.TemporaryDirectory() as made:
            return folder(make_folder(made, PICTURES), epochs)
    import keras

    dataset = keras.utils.image_dataset_from_directory(
        path, image_size=(PIXELS, PIXELS), batch_size=None, shuffle=False, verbose=False
    )
    pairs = [(image.astype(np.float32) / 255, int(label)) for image, label in dataset.as_numpy_iterator()]
    x, y = np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs], np.int64)
    return Task("folder", *split(x, y), int(y.max()) + 1, (12, 24, 48, 48), (2, 2, 2, 2), epochs)


def split(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and validation images and labels, sorted by label; every class in both in the same proportion.

    >>> parts = split(np.arange(165), np.zeros(165))
    >>> [len(part) for part in parts]
    [132, 132, 33, 33]
    """
    order = np.argsort(y, kind="stable")
    batches = round(len(y) / 5 / BATCH)
    chosen = np.linspace(0, len(y) - 1, batches * BATCH + 1).astype(int)
    rest = np.setdiff1d(np.arange(len(y)), chosen)
    train, valid = order[rest], order[chosen]
    return x[train], y[train], x[valid], y[valid]


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "folder": folder}
