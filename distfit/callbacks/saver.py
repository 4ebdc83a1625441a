"""Leaves the trained model behind, whole: one file, replaced after every epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras

from distfit.errors import RunError

MODEL_FILE = "model.keras"


def model_file(folder: str | os.PathLike | None) -> Path | None:
    """Where a run keeps its model; None for a run that keeps none."""
    return None if folder is None else Path(os.path.abspath(folder)) / MODEL_FILE


class ModelSaver(keras.callbacks.Callback):
    """Writes `folder/model.keras` when the training ends, and after every epoch; a kill leaves the epoch's before.

    keras.callbacks.ModelCheckpoint truncates the good file first. The file is plain Keras and loads where
    distfit is not installed.

    Args:
        folder: made if it is not there.
        when: "epoch", or "end" for that of the training alone.
    """

    async_safe = True

    def __init__(self, folder: str | os.PathLike, when: str = "epoch") -> None:
        super().__init__()
        self._path = Path(os.path.abspath(folder)) / MODEL_FILE
        self._when = when
        self._epoch = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        if self._when == "epoch":
            self._save(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        # Averages of weights have taken their place by now, and a callback may have restored the best.
        self._save(self._epoch)

    def _save(self, epoch: int) -> None:
        # Keras chooses its format by the ending.
        partial = self._path.with_name(f".partial-{os.getpid()}.keras")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.model.save(partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        except OSError as error:
            there = "that of the epoch before is there, whole" if self._path.exists() else "there is none yet"
            raise RunError(
                f"Expected to write the model of epoch {epoch + 1} to {self._path}, received: "
                f"{error.strerror or error}; {there}. Make room or correct the folder's permissions; the run ends, as "
                "its result could not be kept."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
