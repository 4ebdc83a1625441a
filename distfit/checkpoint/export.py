"""From a checkpoint to an artefact of plain Keras: a `.keras` file or a SavedModel.

    build = described(facts) if no_function else own_function
    model = trained(build(), facts, tensors)
    write(model, "model.keras")

The weights come from the checkpoint by name, type and shape, all of them or none; the file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.errors import InputError, RunError
from distfit.experiment.names import one_sentence

# What every SavedModel has, by which a folder that may be replaced is known.
SAVED_MODEL = "saved_model.pb"
_KERAS = ".keras"
_OTHER_FILES = (".h5", ".hdf5", ".onnx", ".tflite", ".safetensors", ".zip")
_MOST_SHOWN = 5


def described(facts: Mapping[str, Any], custom: Mapping[str, Any] | None = None) -> keras.Model:
    """The untrained model that a checkpoint describes, built and not compiled.

    Keras' safe mode is on: a description that holds code is refused, and nothing is imported for it.

    Args:
        facts: of the checkpoint.
        custom: classes and functions of the user, by name.

    Raises:
        InputError: no description, or one that Keras does not understand without the user's code.
    """
    text = facts.get("model")
    if not text:
        raise InputError(
            "Expected a checkpoint that describes its model, received one of a model that Keras cannot describe "
            "without its code. Name the function that builds it: --model module:function."
        )
    description = json.loads(text) if isinstance(text, str) else text
    # The loss and metrics may be the user's own, and say nothing about what the model predicts.
    description = {key: value for key, value in description.items() if key != "compile_config"}
    try:
        model = keras.models.model_from_json(json.dumps(description), custom_objects=dict(custom or {}))
        if not model.built and description.get("build_config"):
            model.build_from_config(description["build_config"])
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"Expected a model that Keras builds from its description, received {type(error).__name__}: "
            f"{one_sentence(_root(error))} Name the function that builds it with --model module:function, or a layer "
            "of your own with --custom module:name."
        ) from error
    return model


def trained(model: keras.Model, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> keras.Model:
    """The model with the weights of a checkpoint: all of them, or none.

    Where both have the same paths, these decide. Else the order does, and the names of layer and weight, type and shape
    have to be the same: in a process that has made other models Keras counts on (`dense_1/kernel`).

    Args:
        model: built, as the one that was trained.
        facts: of the checkpoint.
        tensors: by name.

    Raises:
        InputError: the model has other weights.
    """
    if not isinstance(model, keras.Model):
        raise InputError(f"Expected the function to return a keras.Model, received {type(model).__name__}.")
    if not model.built:
        raise InputError(
            f"Expected a model whose weights are there, received {model.name!r}, which is not built. Let the function "
            "call it once, or give it a keras.Input."
        )
    try:
        saved = [one for one in facts["variables"] if one["kind"] == "weight"]
        values = [tensors[one["tensor"]] for one in saved]
        theirs = [_Weight(one["path"], value.shape, str(value.dtype)) for one, value in zip(saved, values, strict=True)]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"Expected a checkpoint that lists its variables, received one in which {error} is missing. Only what "
            "distfit.fit has saved can be exported."
        ) from error
    for weight, value in zip(_matched(theirs, model), values, strict=True):
        weight.assign(value)
    return model


def check_target(out: str | os.PathLike, force: bool) -> None:
    """Nothing is in the way of what shall be written.

    Args:
        out: a `.keras` file, else the folder of a SavedModel.
        force: what is there may be replaced, if it is such a file or folder.

    Raises:
        InputError: something is there.
    """
    path = Path(out)
    if path.suffix in _OTHER_FILES:
        raise InputError(
            f"Expected --to to name a file that ends with .keras or a folder for a SavedModel, received {str(path)!r}."
        )
    if not os.path.lexists(path):
        return
    own = path.is_file() if path.suffix == _KERAS else (path / SAVED_MODEL).is_file() or _empty(path)
    if not own:
        what = "a .keras file" if path.suffix == _KERAS else "a new or empty folder, or that of a SavedModel,"
        raise InputError(f"Expected {what} at {str(path)!r}, received something else. Choose another name.")
    if not force and not _empty(path):
        raise InputError(f"Expected nothing at {str(path)!r}, received what is there. Pass --force to replace it.")


def write(model: keras.Model, out: str | os.PathLike) -> int:
    """Writes the model and returns its size in bytes.

    Args:
        out: a `.keras` file, else the folder of a SavedModel; what is there is replaced.

    Raises:
        RunError: writing failed; what was there before is there.
    """
    path = Path(os.path.realpath(out))
    with _beside(path) as work:
        fresh = work / path.name
        if path.suffix == _KERAS:
            model.save(fresh)
        else:
            # Keras prints where it writes, which is not where the model will be.
            model.export(fresh, format="tf_saved_model", verbose=False)
        files = [fresh] if fresh.is_file() else sorted(file for file in fresh.rglob("*") if file.is_file())
        for file in files:
            _flush(file)
        size = sum(file.stat().st_size for file in files)
        _put_in_place(fresh, path, work / "replaced")
        _flush(path.parent)
    return size


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden folder on the file system of what will be written; gone afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(
            f"Expected a place that can be written at {str(path)!r}, received: {error.strerror}. Choose another."
        ) from error
    try:
        yield Path(work)
    except (OSError, tf.errors.OpError) as error:
        reason = error.message if isinstance(error, tf.errors.OpError) else error.strerror or error
        raise RunError(
            f"Expected to write {str(path)!r}, received: {reason}. Nothing of it is left. Make room, or choose another "
            "place."
        ) from error
    finally:
        shutil.rmtree(work)


def _put_in_place(fresh: Path, path: Path, replaced: Path) -> None:
    if not path.is_dir():
        os.replace(fresh, path)
        return
    os.rename(path, replaced)
    try:
        os.rename(fresh, path)
    except BaseException:  # Ctrl-C too: what was there goes with the hidden folder
        os.rename(replaced, path)
        raise


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _root(error: Exception) -> Exception:
    """What began it: Keras wraps it in an error for each layer around."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@dataclass(frozen=True)
class _Weight:
    path: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.path} {self.dtype}{list(self.shape)}"

    def is_like(self, other: _Weight) -> bool:
        """The same type, shape and name, the layer's included; which scopes Keras puts before these depends on how the
        model was made, and so do the numbers behind them."""
        ours, theirs = (re.sub(r"_\d+(?=/|$)", "", weight.path).split("/") for weight in (self, other))
        known = min(len(ours), len(theirs), 2)
        return ours[-known:] == theirs[-known:] and (self.shape, self.dtype) == (other.shape, other.dtype)


def _matched(theirs: Sequence[_Weight], model: keras.Model) -> list[Any]:
    """The model's weights in the order of the checkpoint's."""
    weights = list(model.weights)
    by_path = {weight.path: weight for weight in weights}
    paths = [saved.path for saved in theirs]
    if len(by_path) == len(weights) and sorted(by_path) == sorted(paths):
        weights = [by_path[path] for path in paths]
    ours = [_Weight(weight.path, tuple(map(int, weight.shape)), str(weight.dtype)) for weight in weights]
    pairs = [pair for pair in itertools.zip_longest(theirs, ours) if _differ(*pair)]
    if pairs:
        lines = [f"{saved or 'nothing'} where the model has {built or 'nothing'}" for saved, built in pairs]
        more = f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
        raise InputError(
            f"Expected a model with the {len(theirs)} weights of the checkpoint, received one with {len(ours)}: "
            f"{'; '.join(lines[:_MOST_SHOWN])}{more}. Name the function that built the model that was trained."
        )
    return weights


def _differ(saved: _Weight | None, built: _Weight | None) -> bool:
    return saved is None or built is None or not saved.is_like(built)
