"""What a user chooses about checkpoints: `checkpoint="runs/a"`, or `checkpoint=distfit.Checkpoint("runs/a", ...)`."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distfit.errors import InputError

# What a killed run loses at most by default. A save holds a training up for one copy of its state in memory.
EVERY_SECONDS = 300.0
KEEP = 3
# Words in the name of a metric of which more is better, as keras.callbacks.ModelCheckpoint takes them and some more.
_MORE_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "r2")
_LESS_IS_BETTER = ("loss", "error", "mse", "mae", "rmse", "crossentropy", "divergence")
_MODELS = ("end", "epoch", None)


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, how often, and which states stay.

    Args:
        folder: of this run alone; made absolute here.
        every_steps: save after every so many steps, which a run on any number of ranks does at the same ones.
        every_seconds: save when so many seconds have passed since the last save. Default: 300, without `every_steps`.
            A save that comes while the one before is still being written waits for the step after it.
        keep: so many of the newest stay.
        best: name of a metric of the epoch's logs, such as "val_loss"; the best epoch's state is saved, and stays.
        mode: "min" or "max" of it; "auto" goes by its name, as keras.callbacks.ModelCheckpoint does.
        every_hours: of each span of so many hours one stays for good. None: none does.
        allow_nan: save states that hold NaN or infinity as well; by default such a state is never saved, and said.
        model: when `model.keras`, plain Keras, is written: "end" at the training's end, "epoch" after each epoch as
            well, for which all ranks wait; None never. `distfit checkpoint export` makes it of any checkpoint.

    Raises:
        InputError: a number that cannot be meant.

    >>> Checkpoint("runs/a", every_steps=1000, best="val_accuracy").best_mode
    'max'
    """

    folder: str | os.PathLike
    every_steps: int | None = None
    every_seconds: float | None = None
    keep: int = KEEP
    best: str | None = None
    mode: str = "auto"
    every_hours: float | None = None
    allow_nan: bool = False
    model: str | None = "end"

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise InputError(f"Expected the path of a folder to write to, received {self.folder!r}.")
        if not os.fspath(self.folder):
            raise InputError("Expected the path of a folder to write to, received ''. The current folder is '.'.")
        # Where a relative path leads now, whatever the script does meanwhile.
        object.__setattr__(self, "folder", os.path.abspath(os.fspath(self.folder)))
        for name, least in (("every_steps", 1), ("keep", 1)):
            value = getattr(self, name)
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise InputError(f"Expected {name} to be a whole number of at least {least}, received {value!r}.")
        for name in ("every_seconds", "every_hours"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0
            ):
                raise InputError(f"Expected {name} to be a number above 0, or None, received {value!r}.")
        if self.model not in _MODELS:
            raise InputError(f"Expected model to be 'end', 'epoch' or None, received {self.model!r}.")
        if self.best is not None:
            _ = self.best_mode

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def seconds(self) -> float | None:
        """From one save to the next; None for no such saves."""
        return EVERY_SECONDS if self.every_seconds is None and self.every_steps is None else self.every_seconds

    @property
    def best_mode(self) -> str:
        """ "min" or "max"."""
        if self.mode in ("min", "max"):
            return self.mode
        name = str(self.best)
        if self.mode == "auto" and any(word in name for word in _LESS_IS_BETTER):
            return "min"
        if self.mode == "auto" and any(word in name for word in _MORE_IS_BETTER):
            return "max"
        received = f"mode={self.mode!r}" + (f", and {name!r} does not say it" if self.mode == "auto" else "")
        raise InputError(
            f"Expected mode to say whether less of {name!r} is better ('min') or more ('max'), received {received}."
        )


def settled(checkpoint: Any) -> Checkpoint | None:
    """What was given as `checkpoint=`: a folder, all of it, or None.

    >>> settled("runs/a").keep, settled(None)
    (3, None)
    """
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    return Checkpoint(checkpoint)
