"""What `fit`, `evaluate` and `predict` refuse before anything starts, each in one paragraph."""

from __future__ import annotations

import errno
import inspect
import numbers
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from distfit.errors import InputError
from distfit.folders import existing, from_here
from distfit.training.own_step import overrides

if TYPE_CHECKING:
    from distfit.backends.base import Backend
    from distfit.training.step import Choices

# Enough to need blocks of its own on any file system.
_TRIED_BYTES = 2**16


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
    built = model() if is_builder(model) else model
    if not isinstance(built, keras.Model):
        raise InputError(
            "Expected a keras.Model, or a function without arguments that returns one, received "
            f"{_described(model)}{'' if built is model else f', which returns {_described(built)}'}."
        )
    return built


def predictable_model(model: Any, replicas: int) -> keras.Model:
    """As `keras_model`, and one whose batches so many replicas can share."""
    model = keras_model(model)
    if replicas > 1:
        shareable(model, replicas)
    return model


def compiled_model(model: Any, replicas: int) -> keras.Model:
    """As `predictable_model`, and compiled.

    Raises:
        InputError: it is not compiled, or in a way that cannot be run.
    """
    model = keras_model(model)
    if not model.compiled:
        raise InputError(
            f"Expected a compiled model, received {type(model).__name__} without an optimizer and a loss. Call "
            "model.compile(optimizer, loss) first."
        )
    return predictable_model(model, replicas)


def shareable(model: keras.Model, replicas: int) -> None:
    """Refuse what replicas that share a batch would compute wrongly, or could not compute at all.

    Raises:
        InputError: the model's inputs have a fixed number of rows.
    """
    fixed = [tensor.shape[0] for tensor in (getattr(model, "inputs", None) or []) if tensor.shape[0] is not None]
    if fixed:
        raise InputError(
            f"Expected inputs of any number of rows, of which {replicas} replicas each take a part, received a "
            f"{type(model).__name__} built for batches of {fixed[0]}. Build it with keras.Input(shape=...) without "
            "the batch, or train with one replica."
        )


def choices(chosen: Choices, backend: Backend) -> None:
    """What a user chose about how replicas work together.

    Raises:
        InputError: a type of the wire that the engine cannot add.
    """
    if not isinstance(chosen.sync_batch_norm, bool):
        raise InputError(f"Expected sync_batch_norm to be True or False, received {chosen.sync_batch_norm!r}.")
    if chosen.reduction_dtype not in (None, *backend.reduction_dtypes):
        raise InputError(
            f"Expected reduction_dtype to be None or one of {', '.join(backend.reduction_dtypes)}, which "
            f"{backend.title} can add, received {chosen.reduction_dtype!r}. None leaves gradients their own type."
        )
    _whole("bucket_bytes", chosen.bucket_bytes, 1)


def arguments(verbose: Any, **given: Any) -> None:
    """The numbers of keras.Model.fit's signature, by name.

    Raises:
        InputError: one that keras.Model.fit does not take either.
    """
    if verbose not in (0, 1, 2, "auto"):
        raise InputError(f"Expected verbose to be 0, 1, 2 or 'auto', received {verbose!r}.")
    for name in ("epochs", "initial_epoch"):
        _whole(name, given.get(name, 0), 0)
    for name in ("steps", "steps_per_epoch", "validation_steps", "in_sync_steps", "logs_every_steps"):
        _whole(name, 1 if given.get(name) is None else given[name], 1)
    freq, split = given.get("validation_freq", 1), given.get("validation_split", 0)
    if not isinstance(freq, Collection) or isinstance(freq, str):
        _whole("validation_freq", freq, 1)
    if split is not None and (not isinstance(split, numbers.Real) or not 0 <= float(split) < 1):
        raise InputError(
            f"Expected validation_split to be a fraction from 0 to below 1, received {split!r}. Pass the "
            "share of the rows that validates, such as 0.1."
        )


def room(folder: str | os.PathLike | None, variables: Collection[Any]) -> None:
    """Refuse a folder that cannot hold the model: a run should not find that out after its first epoch.

    Args:
        folder: where the model is written, next to the one before; None for nowhere.
        variables: of the model and its optimizer.

    Raises:
        InputError: it is too full.
    """
    if folder is None:
        return
    needed = sum(int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size for variable in variables)
    there = existing(folder)
    free = shutil.disk_usage(there).free
    if free < 2 * needed:
        raise InputError(
            f"Expected room for the model in {folder} twice, as the new one is written beside the one before: "
            f"{_megabytes(2 * needed)} with its optimizer's state, received {_megabytes(free)} free on its file "
            "system. Free some, or choose another folder."
        )


def writable(*folders: str | os.PathLike | None) -> None:
    """Try the folders that a run will write to; nothing is left behind.

    Raises:
        InputError: a file cannot be made there.
    """
    for folder in folders:
        if folder is not None:
            if not isinstance(folder, (str, os.PathLike)):
                raise InputError(f"Expected the path of a folder to write to, received {folder!r}.")
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


def rows_in_order(source: Any) -> None:
    """What a prediction is made for: its rows are told apart by their order alone.

    Raises:
        InputError: rows may be missing or come in another order than the data's.
    """
    if not source.in_order:
        raise InputError(
            "Expected all records in their order to predict on, received distfit.TFRecords that leave out bad records "
            'or read streams. Pass bad_records="raise" and uncompressed files, or a tf.data.Dataset.'
        )


def targets(model: keras.Model, data_spec: Any) -> None:
    """Refuse data without targets for a model that computes its loss from them.

    Args:
        data_spec: tf.TypeSpecs of the data, packed as Keras packs them.

    Raises:
        InputError: y is missing.
    """
    own = any(overrides(model, method) for method in ("compute_loss", "train_step", "test_step"))
    y = data_spec[1] if isinstance(data_spec, tuple) and len(data_spec) > 1 else None
    if model.loss is not None and y is None and not own:
        raise InputError(
            f"Expected targets y for {type(model).__name__}, which was compiled with a loss, received data "
            "without them. Pass y, or data of (x, y)."
        )


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"Expected {name} to be a whole number of at least {least}, received {value!r}.")


def is_builder(model: Any) -> bool:
    """Whether it is to be called for a model: not a layer, which is callable too, and takes no arguments."""
    if isinstance(model, keras.layers.Layer) or not callable(model):
        return False
    try:
        inspect.signature(model).bind()
    except (TypeError, ValueError):
        return False
    return True


def _described(model: Any) -> str:
    """A value's type, or a function's name with its parameters."""
    if inspect.isfunction(model):
        return f"{model.__name__}{inspect.signature(model)}"
    return type(model).__name__


def _is_legacy(model: Any) -> bool:
    return any(base.__module__.startswith(("tf_keras.", "keras.src.legacy")) for base in type(model).__mro__)


def _classes(model: keras.Model) -> int | None:
    sparse = isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy) or model.loss in (
        "sparse_categorical_crossentropy",
        keras.losses.sparse_categorical_crossentropy,
    )
    shape = getattr(model, "output_shape", None) if sparse and model.built and hasattr(model, "outputs") else None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None


def _megabytes(count: int) -> str:
    """
    >>> _megabytes(3_500_000)
    '3.5 MB'
    """
    return f"{count / 1e6:,.1f} MB"


def _try_to_write(folder: Path) -> None:
    there = existing(folder)
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there) as file:
            # A full disk takes a new name and refuses its content.
            file.write(b"\0" * _TRIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        shown = from_here(folder)
        raise InputError(
            f"Expected to be able to write to the folder {shown}, received: "
            f"{error.strerror or error} ({there}). Choose another folder or correct its permissions; `distfit doctor "
            f"--run-dir {shown}` tries it."
        ) from error
