"""What `fit`, `evaluate` and `predict` refuse before anything starts, each in one paragraph."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distfit.errors import InputError
from distfit.training.step import overrides


def keras_model(model: Any) -> keras.Model:
    """The Keras 3 model that was passed, or that a function returns.

    Raises:
        InputError: it is neither, or Keras runs on another backend than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"Expected Keras to run on TensorFlow, received the backend {keras.backend.backend()!r}. Set "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        )
    if not isinstance(model, keras.Model) and _is_legacy(model):
        raise InputError(
            "Expected a Keras 3 model, received one of the legacy tf_keras. Build it with `import keras` (3.15 or "
            "later) and unset TF_USE_LEGACY_KERAS."
        )
    built = model() if callable(model) and not isinstance(model, keras.Model) else model
    if not isinstance(built, keras.Model):
        raise InputError(
            f"Expected a keras.Model, or a function without arguments that returns one, received {type(built).__name__}."
        )
    return built


def compiled_model(model: Any) -> keras.Model:
    """As `keras_model`, and compiled.

    Raises:
        InputError: it is not compiled, or with steps_per_execution.
    """
    model = keras_model(model)
    if not model.compiled:
        raise InputError(
            f"Expected a compiled model, received {type(model).__name__} without an optimizer and a loss. Call "
            "model.compile(optimizer, loss) first."
        )
    if model.steps_per_execution != 1:
        raise InputError(
            f"Expected a model compiled with steps_per_execution=1, received {model.steps_per_execution}: distfit does "
            "not run several steps in one call yet. Leave it out of model.compile."
        )
    return model


def shareable(model: keras.Model, method: str, replicas: int) -> None:
    """Refuse a model whose own `train_step` or `test_step` several replicas cannot share yet.

    Raises:
        InputError: it overrides `method` and there are several replicas.
    """
    if overrides(model, method) and replicas > 1:
        raise InputError(
            f"{type(model).__name__} overrides {method}, which distfit can run with one replica only so far, and this "
            f"job has {replicas}. Override compute_loss or compute_metrics instead, or train with one replica."
        )


def epochs(epochs: Any, initial_epoch: Any) -> None:
    """
    Raises:
        InputError: either is no whole number of at least 0.
    """
    for name, value in (("epochs", epochs), ("initial_epoch", initial_epoch)):
        if not isinstance(value, int) or value < 0:
            raise InputError(f"Expected {name} to be a whole number of at least 0, received {value!r}.")


def writable(*folders: str | os.PathLike | None) -> None:
    """Try the folders that a run will write to; nothing is left behind.

    Raises:
        InputError: a file cannot be made there.
    """
    for folder in folders:
        if folder is not None:
            _try_to_write(Path(folder))


def labels(model: keras.Model, y: Any) -> None:
    """Refuse class numbers that the model has no output for: on a GPU they would give NaN or garbage.

    Looks only at arrays of whole numbers for a model of one output with a sparse categorical cross-entropy.

    Raises:
        InputError: a label lies outside the classes.
    """
    classes = _classes(model)
    if classes is None or not isinstance(y, np.ndarray) or y.dtype.kind not in "iu" or not y.size:
        return
    lowest, highest = int(y.min()), int(y.max())
    ignored = getattr(model.loss, "ignore_class", None)
    if ignored is None and (lowest < 0 or highest >= classes):
        row = int(np.argmax(y.reshape(len(y), -1).max(axis=1) >= classes) if highest >= classes else y.argmin())
        raise InputError(
            f"Expected labels from 0 to {classes - 1}, one for each output of {type(model).__name__}, received labels "
            f"from {lowest} to {highest} (row {row}). Correct the labels or the number of outputs."
        )


def _is_legacy(model: Any) -> bool:
    return any(base.__module__.startswith(("tf_keras.", "keras.src.legacy")) for base in type(model).__mro__)


def _classes(model: keras.Model) -> int | None:
    sparse = isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy) or model.loss in (
        "sparse_categorical_crossentropy",
        keras.losses.sparse_categorical_crossentropy,
    )
    shape = getattr(model, "output_shape", None) if sparse and model.built and hasattr(model, "outputs") else None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None


def _try_to_write(folder: Path) -> None:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise InputError(
            f"Expected to be able to write to the folder {folder}, received: {error}. Choose another folder or correct "
            "its permissions."
        ) from error
