"""What ranks agree on while steps run: that they meet in the same collectives, that their batches are the same, and
that somebody wants to stop. The last two travel with each step and are read one step late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from distfit.data.feed import FLAGS, check_same_batches
from distfit.errors import RunError, on_every_rank

if TYPE_CHECKING:
    from distfit.session import Session
    from distfit.training.wire import Transfer


def same_collectives(session: Session, step: str, transfers: Sequence[Transfer]) -> None:
    """Compare what a step sends, before it runs: ranks whose collectives differ, or come in another order, would wait
    for each other for ever. Collective.

    Args:
        step: its name, for the message.
        transfers: as this rank traced them.

    Raises:
        RunError: they differ; on all ranks.
    """
    by_rank = session.transport.gather(list(transfers))
    for rank, theirs in enumerate(by_rank):
        pairs = zip_longest(by_rank[0], theirs, fillvalue="none")
        different = next((f"{first} against {other}" for first, other in pairs if first != other), None)
        if different is not None:
            raise on_every_rank(
                RunError(
                    f"Expected every rank to sum the same tensors in the same order in each {step} step, received "
                    f"{different} on rank 0 and rank {rank} of {session.size}. The model behaves differently "
                    "on them: let what it computes not depend on the rank, its clock or its random state."
                )
            )


def anybody_wants_to_stop(session: Session, model: Any) -> bool:
    """Whether a callback of some rank has set `model.stop_training`; it is then set on all. Collective."""
    with session.watch.waiting("the end of an epoch"):
        wishes = session.transport.sum(np.array([bool(model.stop_training)], np.float64))
    model.stop_training = bool(wishes[0])
    return model.stop_training


class Agreement:
    """What the ranks agreed on in the call before: read late, so that the device is never waited for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pending: tuple[Sequence[Any], int] | None = None

    def says_stop(self, flags: Sequence[Any], own_wish: bool, first: int) -> bool:
        """Whether all ranks stop after these steps. One process follows its own wish at once, as Keras does.

        Args:
            flags: of each step of a call, of which `first` is the first's number.
        """
        if self._size == 1:
            return own_wish
        before, self._pending = self._pending, (flags, first)
        return before is not None and self._read(*before)

    def finish(self) -> None:
        """Read what the last steps said; a wish to stop no longer matters, different data do."""
        if self._pending is not None:
            self._read(*self._pending)

    def _read(self, flags: Sequence[Any], first: int) -> bool:
        values = np.asarray(flags)
        for number, of_step in enumerate(values):
            check_same_batches(of_step[:FLAGS], self._size, first + number + 1)
        return bool(values[-1][0] > 0)
