"""After which steps callbacks see new values of a batch: where replicas meet to add up their metrics.

    points = agreed(session, callbacks, every_steps=None)       # one exchange, when a run begins
    points.due(training=True, first=7, last=7, steps=782)

The sum waits for the device and for the other ranks, so it is not made after every step, and not at all where no
callback of any rank reads the values of batches. Callbacks see those of the last such step in between, and their number
(`distfit.callbacks.logs.Logs.step`). In `fit` with one replica every step has its own values, and nobody waits for
them; in a hand-written loop, where they are computed outside of the step, there are log points with one replica, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distfit.callbacks.listening import Listening
    from distfit.session import Session

# What a sum takes benchmarks/batch_logs_cost.py measures: one in so many steps of 25 ms is less than 0.5 % of them. A
# shorter epoch has two, of its first and its last step.
LEAST_STEPS = 50
# Of long epochs callbacks see this many.
POINTS_PER_EPOCH = 20


@dataclass(frozen=True)
class LogPoints:
    """The same on all ranks.

    Args:
        every_steps: from one to the next; None for the default.
        training: whether a callback of some rank reads the values of batches that are trained on.
        testing: the same, of validations and evaluations.
    """

    every_steps: int | None
    training: bool
    testing: bool

    def due(self, training: bool, first: int, last: int, steps: int | None) -> bool:
        """Whether values are made anew after these steps of a pass: the first, every so many, and the last.

        Args:
            training: the pass trains.
            first: number of the first step since this was asked before, from 0.
            last: number of the last one, which has just run; beyond the pass where its last call has room left.
            steps: of the pass; None when unknown.

        >>> points = LogPoints(10, training=True, testing=False)
        >>> [step for step in range(25) if points.due(True, step, step, 25)]
        [0, 10, 20, 24]
        >>> points.due(False, 0, 0, 25)
        False
        """
        if not (self.training if training else self.testing):
            return False
        return -first % self.distance(steps) <= last - first or (steps is not None and last + 1 >= steps)

    def distance(self, steps: int | None) -> int:
        """Steps from one to the next.

        >>> LogPoints(None, training=True, testing=True).distance(6000)
        300
        """
        return self.every_steps or max(LEAST_STEPS, (steps or 0) // POINTS_PER_EPOCH)


def agreed(session: Session, callbacks: Listening, every_steps: int | None) -> LogPoints:
    """What the callbacks of all ranks need. Collective.

    Args:
        every_steps: as the user chose; a callback that decides on each batch, such as TerminateOnNaN, overrides it.
    """
    own = callbacks.reads_batches(True), callbacks.reads_batches(False), callbacks.demands_every_step()
    training, testing, each = (any(answers) for answers in zip(*session.transport.gather(own), strict=True))
    return LogPoints(1 if each else every_steps, training, testing)
