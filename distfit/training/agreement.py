"""What ranks agree on while steps run: that they meet in the same collectives, that their batches are the same, and
that somebody wants to stop. The last two travel with each step and are read one step late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from distfit.data.feed import FLAGS, check_same_batches
from distfit.errors import RunError, on_every_rank
from distfit.training.wishes import Wishes

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


def at_epoch_end(session: Session, model: Any, own: Wishes) -> Wishes:
    """What some rank wants; `model.stop_training` is then set on all. Collective."""
    with session.watch.waiting("the end of an epoch"):
        (total,) = session.transport.sum(np.array([own.number], np.float64))
    wishes = Wishes.of(total)
    model.stop_training = wishes.stop
    return wishes


class Agreement:
    """What the ranks agreed on in the call before: read late, so that the device is never waited for.

    Args:
        size: ranks.
        stops: the last call of a run that goes on had carried a wish to stop, which nobody had read.
    """

    def __init__(self, size: int, stops: bool = False) -> None:
        self._size = size
        # A batch that all had alike.
        self._pending: tuple[Sequence[Any], int] | None = ([[Wishes(stop=True).number, 0.0, 0.0]], 0) if stops else None

    def says(self, flags: Sequence[Any], own: Wishes, first: int) -> Wishes:
        """What all ranks do after these steps. One process follows its own wishes at once, as Keras does.

        Args:
            flags: of each step of a call, of which `first` is the first's number.
        """
        if self._size == 1:
            return own
        before, self._pending = self._pending, (flags, first)
        return Wishes() if before is None else self._read(*before)

    def says_stop(self, flags: Sequence[Any], own_wish: bool, first: int) -> bool:
        """As `says`, of the wish to stop."""
        return self.says(flags, Wishes(stop=own_wish), first).stop

    def unread_stop(self) -> bool:
        """Whether the last call carried a wish to stop, which is read after the next one; waits for the device."""
        return self._pending is not None and Wishes.of(float(np.asarray(self._pending[0])[-1][0])).stop

    def finish(self) -> Wishes:
        """Read what the last steps said; a wish to stop no longer matters, different data do."""
        return Wishes() if self._pending is None else self._read(*self._pending)

    def _read(self, flags: Sequence[Any], first: int) -> Wishes:
        values = np.asarray(flags)
        for number, of_step in enumerate(values):
            check_same_batches(of_step[:FLAGS], self._size, first + number + 1)
        return Wishes.of(values[-1][0])
