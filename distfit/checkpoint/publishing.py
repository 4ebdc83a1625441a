"""From a state in memory to a checkpoint on disk, and which older ones go; in the background, on the chief."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distfit.checkpoint.folder import Checkpoints
from distfit.checkpoint.options import Checkpoint
from distfit.checkpoint.retention import superseded
from distfit.checkpoint.snapshot import non_finite
from distfit.checkpoint.state import OPTIMIZER, WEIGHT
from distfit.log import warn_once

_TRAINED = (f"{WEIGHT}/", f"{OPTIMIZER}/")


class Publishing:
    """
    Args:
        checkpoints: the run's folder.
        options: of the user.

    Attributes:
        newest: name of the newest checkpoint of this run; "" before there was one.
    """

    def __init__(self, checkpoints: Checkpoints, options: Checkpoint) -> None:
        self._checkpoints, self._options = checkpoints, options
        self.newest = ""

    def publish(self, step: int, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write one, whole or not at all; then delete those that nobody wants any more.

        Raises:
            RunError: it cannot be written.
        """
        # What callbacks and metrics keep may be infinite before there is a number.
        bad = non_finite({name: tensor for name, tensor in tensors.items() if name.startswith(_TRAINED)})
        if bad and not self._options.allow_nan:
            warn_once(
                f"the state at step {step} is not saved: {bad[0]} holds NaN or infinity"
                f"{f', and so do {len(bad) - 1} more tensors' if len(bad) > 1 else ''}. The checkpoint before it stays "
                "the newest. distfit.Checkpoint(..., allow_nan=True) saves such states too."
            )
            return
        self.newest = self._checkpoints.publish(step, tensors, {**facts, "nan": bool(bad)}).path.name
        self._checkpoints.verify(step)  # nothing is deleted before a newer one is known to be whole
        options = self._options
        best = None if options.best is None else (options.best, options.best_mode)
        for old in superseded(self._checkpoints.entries(), options.keep, best, options.every_hours):
            self._checkpoints.delete(old)
