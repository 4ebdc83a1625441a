"""In place of a hand-written loop's run in a child process: one epoch of a few batches, its numbers kept, then the end.

    CaughtLoop(spec, watch, keep).install()      # `with session.training(...)` ends in keep(numbers, facts)

The loop is the user's own, and so is what its steps do; `session.batches(...)` gives it fewer batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from distfit.checking.caught import Keep, Steps, callbacks_that_decide, facts_of, weights_of
from distfit.checking.rows import RowWatch, put
from distfit.checking.spec import Spec
from distfit.loops import data, training
from distfit.loops.trainee import Trainee
from distfit.session import Session


class CaughtLoop:
    """`session.batches` and `session.training` for `spec.steps` steps.

    Args:
        spec: which run this is.
        watch: of the rows of this process.
        keep: is given the numbers and facts, and ends the process.
    """

    def __init__(self, spec: Spec, watch: RowWatch, keep: Keep) -> None:
        self._spec, self._watch, self._keep = spec, watch, keep

    def install(self) -> None:
        """From now on, for the rest of the process."""
        batches_of: Callable[..., Any] = data.batches_of
        run = training.training

        def fewer(session: Session, *given: Any) -> Any:
            *others, _, seed = given
            return batches_of(session, *others, self._spec.steps, seed)

        @contextmanager
        def short(session: Session, trainee: Trainee, batches: Any, given: training.Run) -> Iterator[Any]:
            steps = Steps()
            chosen, left_out = callbacks_that_decide(given.callbacks)
            left_out += [name for name in ("log_dir", "checkpoint") if getattr(given, name) is not None]
            changed = self._changed(given, [*chosen, steps])
            with run(session, self._watch.switch_off(trainee), batches, changed) as running:
                yield running
            facts = facts_of(session, trainee, changed.choices, steps, self._watch)
            reason = "a hand-written loop validates as it likes, which is among the metrics"
            facts = replace(facts, left_out=tuple(left_out), not_evaluated=reason)
            self._keep(session, {**weights_of(trainee), **steps.numbers()}, facts)

        put(data, batches_of=fewer)
        put(training, training=short)

    def _changed(self, given: training.Run, callbacks: list[Any]) -> training.Run:
        together = given.choices.sync_batch_norm or self._spec.run.variant.sync_batch_norm
        return replace(
            given,
            epochs=given.initial_epoch + 1,
            callbacks=callbacks,
            logs_every_steps=1,  # each step is compared
            verbose=0,
            log_dir=None,
            checkpoint=None,
            choices=replace(given.choices, sync_batch_norm=together),
        )
