"""Where in a training a checkpoint was made, and what the loop has in hand there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distfit.callbacks.logs import Logs


@dataclass(frozen=True)
class Place:
    """
    Args:
        epoch: that goes on, from 0.
        step: of its steps that have run; 0 where it has not begun.
        total: steps that the training has run since its beginning.
        validated: passes over the validation data that were made.

    >>> str(Place(epoch=2, step=17, total=217))
    'epoch 3, step 17 (step 217 of the run)'
    """

    epoch: int
    step: int
    total: int
    validated: int = 0

    def __str__(self) -> str:
        where = f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"the beginning of epoch {self.epoch + 1}"
        return f"{where} (step {self.total} of the run)"

    @property
    def behind(self) -> str:
        """Where a run has ended.

        >>> Place(epoch=4, step=0, total=36).behind
        'after epoch 4 (step 36 of the run)'
        """
        return f"after epoch {self.epoch} (step {self.total} of the run)"

    def plain(self) -> dict[str, int]:
        """For the facts of a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Moment:
    """What the loop goes on from, within an epoch.

    Args:
        logs: that callbacks saw after the last step.
        of_step: the step that they are of; None before there were any.
        ran: the last step with rows in it.
        stops: a wish to stop has travelled with the last step.
        results: of the epoch's training, where it has ended; None before.
    """

    logs: Mapping[str, Any]
    of_step: int | None = None
    ran: int = -1
    stops: bool = False
    results: Mapping[str, Any] | None = None

    @property
    def shown(self) -> Logs:
        return Logs(self.logs, step=self.of_step)

    def plain(self) -> dict[str, Any]:
        """Values for `checkpoint.plain.packed`."""
        results = None if self.results is None else dict(self.results)
        return {**vars(self), "logs": dict(self.logs), "results": results}


BEGINNING = Moment({})
