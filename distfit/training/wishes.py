"""What a rank wants of all others: one number that travels with a step, so that all learn of it at the same step.

Wishes(stop=True).number                 # a float64, which the step sums over the ranks
Wishes.of(total).stop                    # whether some rank wants it
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

# So many ranks and a few more may want the same: four counts of 13 bits are 52, which float64 holds.
_RANKS = 2**13


@dataclass(frozen=True)
class Wishes:
    """Args:
        stop: to end the pass, as a callback says it.
        save: a checkpoint is due.
        preempted, interrupted: to save and leave, by a signal.

    >>> both = Wishes(stop=True).number + Wishes(stop=True, preempted=True).number
    >>> Wishes.of(both)
    Wishes(stop=True, save=False, preempted=True, interrupted=False)
    """

    stop: bool = False
    save: bool = False
    preempted: bool = False
    interrupted: bool = False

    @property
    def number(self) -> float:
        """To be summed over all ranks."""
        return float(sum(bool(wanted) * _RANKS**place for place, wanted in enumerate(astuple(self))))

    @classmethod
    def of(cls, total: float) -> Wishes:
        """What somebody wants, from the sum."""
        counts = (int(total) // _RANKS**place % _RANKS for place in range(len(fields(cls))))
        return cls(*(count > 0 for count in counts))

    @property
    def leave(self) -> bool:
        """Whether the run is to end after a save."""
        return self.preempted or self.interrupted

    def __or__(self, other: Wishes) -> Wishes:
        return Wishes(*(one or another for one, another in zip(astuple(self), astuple(other), strict=True)))
