"""What a hand-written loop iterates: this process's part of each global batch, for steps alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from distfit.errors import InputError
from distfit.training.agreement import Agreement

if TYPE_CHECKING:
    from distfit.data.feed import Batch, Feed
    from distfit.session import Session


class Pass:
    """One pass over data: what its steps said, and whether ranks agreed to end it.

    Args:
        feed: of the data.
        size: processes of the job.
        wish: whether a callback of this process wants the pass to end.
        trains: its steps may update weights.

    Attributes:
        goes_on: a loop is within it.
    """

    def __init__(self, feed: Feed, size: int, wish: Callable[[], bool], trains: bool) -> None:
        self.feed = feed
        self.wish = wish
        self.trains = trains
        self.goes_on = False
        self._size = size
        self._agreement = Agreement(size)
        self._first = 0
        self._flags: list[Sequence[Any]] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Around all of it, however a loop leaves it."""
        self.goes_on = True
        try:
            yield
        finally:
            self.goes_on = False

    def begin(self, first: int) -> None:
        """The batch of this number comes."""
        self._first, self._flags = first, []

    def ran(self, flags: Sequence[Any]) -> None:
        """A step ran; what it summed over all replicas, for each local one (`ByHand.run`)."""
        self._flags.append(flags)

    @property
    def flags(self) -> list[Any]:
        """Of all steps of the batch together, for each local replica: any of them may have ended an update."""
        return [
            of_steps[0] if len(of_steps) == 1 else tf.add_n(of_steps) for of_steps in zip(*self._flags, strict=True)
        ]

    def agreed_to_stop(self) -> bool:
        """Whether the pass ends with this batch."""
        if not self._flags:
            return self._size == 1 and self.wish()  # without a step ranks did not meet
        # The first replica of a process has its voice. All steps of a batch say the same about it.
        own, self._flags = self._flags[-1][0], []
        return self._agreement.says_stop([own], self.wish(), self._first)

    def finish(self) -> None:
        """Compare what ranks saw last; also of a loop that was left within a batch."""
        if self._flags:
            self.agreed_to_stop()
        self._agreement.finish()


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """One global batch, of which this process has a part; what `session.step` takes.

    Args:
        of: the pass that it belongs to.
        tensors: this process's part, cut for its replicas.
    """

    of: Pass
    tensors: Batch


class _UnknownLength(InputError, TypeError):
    """Also what `list` and tqdm take for an answer."""


class Batches:
    """Data that a hand-written loop passes over, once an epoch: made by `Session.batches`.

    Iterating them gives one opaque object a step, on every rank the same number of them. `len` is that number, where
    it is known.

    Attributes:
        feed: where they come from.
        seed: of the order of records.
    """

    def __init__(self, session: Session, feed: Feed, seed: int) -> None:
        self._session = session
        self.feed = feed
        self.seed = seed

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self._session.in_training().passing(self)

    def __len__(self) -> int:
        if self.feed.num_batches is None:
            raise _UnknownLength(
                "Expected data of a known number of batches, received data that only their end tells. Count the steps "
                "in the loop, or pass steps=... to session.batches."
            )
        return self.feed.num_batches


class HandStep:
    """A function of one replica's rows, made by `Session.step`; called with a batch, it runs on every replica.

    Attributes:
        function: the user's.
        name: of the function.
        run_eagerly: Python runs it at each step.
    """

    def __init__(self, session: Session, function: Callable[..., Any], run_eagerly: bool) -> None:
        if not callable(function):
            raise InputError(
                f"Expected session.step to be given a function, received {type(function).__name__}. Write "
                "@session.step over a function of what a batch holds: def train(x, y)."
            )
        self._session = session
        self.function = function
        # Collectives are named after it, in which TensorFlow takes no "<lambda>".
        self.name = re.sub(r"\W", "_", getattr(function, "__name__", type(function).__name__))
        self.run_eagerly = run_eagerly

    def __call__(self, batch: GlobalBatch) -> list[Any]:
        """Run it on every replica; what it returned on each of this process's."""
        if not isinstance(batch, GlobalBatch):
            raise InputError(
                f"Expected {self.name}, which is a @session.step, to be called with a batch of session.batches(...), "
                f"received {type(batch).__name__}. Iterate what session.batches returns and pass on what it gives."
            )
        return self._session.in_training().run(self, batch)
