"""When a training saves its state, and what it goes on from.

    with kept(session, checkpoint, resume=True, allow=()) as keeper:
        keeper.compare(fields)                        # refuses a run that is another one
        ...
        place, moment = keeper.restored(model)        # on every replica
        wishes = keeper.wishes(stop)                  # travel with a step
        keeper.after_step(place, moment)              # saves where one is due; leaves where a signal says so

A save is a copy of the state in memory at a step boundary; what is written is written behind the training's back, by
the chief. What must be common, such as when to save, travels with the steps, so that all ranks do it at the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras

from distfit.backends.hooks import seed_generators_of
from distfit.callbacks.saver import ModelSaver
from distfit.checkpoint import fields
from distfit.checkpoint.callback_states import CallbackStates, flushed, prepared
from distfit.checkpoint.facts import Facts, number_of
from distfit.checkpoint.manifest import number
from distfit.checkpoint.not_kept import NotKept
from distfit.checkpoint.opened import Opened, opened
from distfit.checkpoint.options import Checkpoint, settled
from distfit.checkpoint.place import BEGINNING, Moment, Place
from distfit.checkpoint.publishing import Publishing
from distfit.checkpoint.random_streams import host_streams, restore_host_streams
from distfit.checkpoint.snapshot import Snapshot
from distfit.checkpoint.state import State
from distfit.checkpoint.writer import Writer
from distfit.errors import InputError, on_every_rank
from distfit.folders import from_here
from distfit.log import say
from distfit.training.interrupt import Interrupt, Wanted, ended
from distfit.training.wishes import Wishes

if TYPE_CHECKING:
    from distfit.session import Session

# A save may hold the training up for a hundredth of the time between two.
_SHARE = 100
_RATE = "learning_rate"
Job = Callable[[], None]


@contextmanager
def kept(session: Session, checkpoint: Any, resume: bool, allow: Sequence[str]) -> Iterator[NotKept]:
    """The keeper of a training. Collective.

    Args:
        checkpoint: a folder, a `Checkpoint`, or None.

    Raises:
        InputError: the folder cannot be used; on every rank.
    """
    options = session.agree(lambda: settled(checkpoint))
    session.agree(lambda: fields.check_allowed(allow))
    if options is None:
        yield NotKept(Interrupt(session.watch))
        return
    with opened(session, options, resume) as run, Writer(options.path) as writer:
        yield Keeper(session, options, run, writer, allow)


class Keeper(NotKept):
    """Of a training that keeps its state in a folder. All methods are collective, but for `wishes` and `agreed`.

    Args:
        session: who we are and how we reach the others.
        options: of the user.
        run: its folder, opened.
        writer: has nothing to do but on the chief.
        allow: names of what may have changed.
    """

    def __init__(
        self, session: Session, options: Checkpoint, run: Opened, writer: Writer, allow: Sequence[str]
    ) -> None:
        super().__init__(Interrupt(session.watch, keeps=True))
        self._session, self._options, self._allow = session, options, allow
        self._run, self._writer = run, writer
        self._then = None if run.found is None else Facts(run.found.facts)
        self.seed = None if self._then is None else self._then.seed
        self.folder = options.path
        self.saver = None if options.model is None else ModelSaver(options.path, options.model)
        self._now: dict[str, Any] = {}
        self._wanted = Wishes()
        self._new_rate = self._other_callbacks = self._asked = self._late = False
        self._saved_at, self._saved_total, self._held_up_s = time.monotonic(), 0, 0.0
        self._best: float | None = None
        self._logs: Mapping[str, Any] = {}
        self._in_hand: tuple[Place, Job | None] | None = None
        if session.is_chief:
            self._publishing = Publishing(run.checkpoints, options)

    # --- going on ---------------------------------------------------------------------------------------------

    def compare(self, now: Callable[[], Mapping[str, Any]]) -> None:
        """Refuse a run that is another one; also remembers what this one is.

        Args:
            now: facts of this run that a checkpoint keeps; its "fields" have to be the same.

        Raises:
            InputError: something that was not allowed has changed; on every rank.
        """
        self._now = dict(self._session.from_chief(now))
        self._session.agree(self._check_best)
        if self._then is None:
            return
        then, own, folder = self._then.fields, self._now["fields"], from_here(self._options.path)
        within = bool(self._then.place.step)
        accepted = self._session.from_chief(lambda: fields.refuse_changes(then, own, self._allow, folder, within))
        # A new rate that was accepted is the one to train with, not the one of the checkpoint.
        self._new_rate = any(_RATE in line for line in accepted)
        # Who had stopped it may not be there any more.
        self._other_callbacks = any(line.startswith("callbacks") for line in accepted)
        for line in accepted:
            say(f"distfit: accepted {line}")

    def _check_best(self) -> None:
        best, fields = self._options.best, self._now["fields"]
        if best is not None and best.startswith("val_") and not any(name.startswith("validation") for name in fields):
            raise InputError(
                f"Expected validation_data for the best {best!r}, received none. Pass some, or name a metric of the "
                "training."
            )

    def restored(self, model: Any, first_epoch: int) -> tuple[Place, Moment]:
        """Every replica as it was at the checkpoint, and where that is; the beginning of a training that begins.

        Raises:
            InputError: the checkpoint has other variables; on every rank.
        """
        self._run.begin()
        self._model, self._state = model, State(model, self._session)
        if self._session.is_chief:
            common = [(held.tensor, held.variable) for held in self._state.common]
            self._snapshot = Snapshot(common, self._session.backend.first_copy)
            self._snapshot.prepare()
        if self._then is None:
            self.began = first_epoch
            return Place(first_epoch, 0, 0), BEGINNING
        described, place = self._then.variables, self._then.place
        self._session.agree(lambda: self._state.check(described))
        self._state.restore(self._run.tensors, described, leave=_RATE if self._new_rate else "")
        moment = Moment(**self._part("moment"))
        model.stop_training = self._then.stop_training and not self._other_callbacks
        self._saved_total = place.total
        self._logs = {} if place.step else self._then.metrics
        self._best = self._then.best if self._then.best_by == self._best_by() else None
        self.began, self.ranks = self._then.began, self._then.ranks
        over = not place.step and place.epoch >= int(self._now["fields"]["epochs"])
        say(self._run.sentence(place, over, model.stop_training and not place.step))
        if self._then.replicas != self._session.num_replicas:
            say(_moved(self._then.replicas, self._session.num_replicas, model))
        return place, moment

    @contextmanager
    def beginning(self, callbacks: Sequence[Any], data: Any) -> Iterator[None]:
        """Around `on_train_begin`: afterwards callbacks have the state that they had."""
        self._callbacks, self._states, self._data = callbacks, CallbackStates(callbacks), data
        with nullcontext() if self._then is None else prepared(callbacks):
            yield
        if self._then is not None:
            states, place = self._part("callbacks"), self._then.place
            self._session.agree(lambda: self._states.restore(states, place))
            restore_host_streams(self._part("streams"))
            self._run.forget()

    def arrived(self) -> None:
        """The data are where the training goes on: are they those of the run?

        Raises:
            InputError: the last batch before this place is another one; on every rank.
        """
        then = None if self._then is None else self._then.fingerprint
        if then is not None:
            self._session.agree(lambda: _same_batch(then, self._data.fingerprint()))

    def _part(self, name: str) -> Any:
        """Facts that have arrays, which lie among the chief's tensors."""
        then, tensors = self._then, self._run.tensors
        assert then is not None
        return self._session.from_chief(lambda: then.part(name, tensors))

    # --- agreeing ---------------------------------------------------------------------------------------------

    def wishes(self, stop: bool) -> Wishes:
        """What this rank wants: what its callbacks and signals say, and the chief's clock."""
        pending = self.interrupt.pending
        save = self._session.is_chief and not self._asked and self._is_time()
        self._asked = self._asked or save
        return Wishes(bool(stop), save, pending is Wanted.PREEMPTED, pending is Wanted.INTERRUPTED)

    def _is_time(self) -> bool:
        if self._writer.busy:
            return False
        seconds, since = self._options.seconds, time.monotonic() - self._saved_at
        return self._late or (seconds is not None and since >= max(seconds, _SHARE * self._held_up_s))

    def agreed(self, wishes: Wishes) -> None:
        """What all want, as a step has said it."""
        self._wanted |= wishes

    # --- saving -----------------------------------------------------------------------------------------------

    def after_step(self, place: Place, moment: Callable[[], Moment]) -> None:
        """Between two steps at which no gradients wait to be applied: save what is due, and leave if that is wanted."""
        self._arrive(place)
        if self._wanted.leave:
            self._save(place, moment(), wait=True)
            self._leave(place)
        elif self._is_due(place.total):
            self._save(place, moment())

    def before_validation(self, place: Place, moment: Callable[[], Moment]) -> None:
        """As `after_step`. The state is copied in any case, for a signal that comes while callbacks may have put other
        weights into the model (SwapEMAWeights)."""
        self.after_step(place, moment)
        self._in_hand = place, self._copied(place, moment())

    def in_validation(self) -> None:
        """Between two steps of a validation: leave if that is wanted, with what was copied before it."""
        if self._wanted.leave and self._in_hand is not None:
            place, job = self._in_hand
            if job is not None:
                self._writer.start(job)
            self._leave(place)

    def after_epoch(self, place: Place, logs: Mapping[str, Any]) -> None:
        """As `after_step`, at the beginning of the next epoch; also saves the best epoch so far.

        Args:
            logs: of the epoch, the same on all ranks.
        """
        self._in_hand, self._logs = None, logs
        if self._is_better(logs):
            self._arrive(place)
            self._save(place, BEGINNING, wait=True)
        self.after_step(place, lambda: BEGINNING)

    def at_end(self, place: Place) -> None:
        """The last state of the training; on disk when this returns."""
        if self._then is not None and self._then.finished and self._then.place == place:
            return  # it is there
        self._save(place, BEGINNING, finished=True, wait=True)
        self._session.from_chief(self._written)

    def _arrive(self, place: Place) -> None:
        if self._session.is_chief:
            self._writer.check()
            self._run.at(place.total)

    def _is_due(self, total: int) -> bool:
        every = self._options.every_steps
        return self._wanted.save or (every is not None and total // every > self._saved_total // every)

    def _best_by(self) -> list[str] | None:
        return None if self._options.best is None else [self._options.best, self._options.best_mode]

    def _is_better(self, logs: Mapping[str, Any]) -> bool:
        if self._options.best is None:
            return False
        try:
            value = number_of(logs, self._options.best)
        except InputError as error:  # all ranks have the same logs
            raise on_every_rank(error) from None
        sign = 1 if self._options.best_mode == "max" else -1
        better = value == value and (self._best is None or sign * value > sign * self._best)
        self._best = value if better else self._best
        return better

    def _save(self, place: Place, moment: Moment, finished: bool = False, wait: bool = False) -> None:
        """
        Args:
            wait: for what is being written; otherwise a save that meets one is made at a later step.
        """
        began = time.monotonic()
        if wait and self._session.is_chief:
            self._writer.wait(None)
            self._writer.check()
        job = self._copied(place, moment, finished)
        self._late = job is None
        if job is not None:
            self._writer.start(job)
        self._wanted, self._asked, self._saved_total = Wishes(), False, place.total
        self._saved_at = time.monotonic()
        if not wait:
            self._held_up_s = self._saved_at - began

    def _copied(self, place: Place, moment: Moment, finished: bool = False) -> Job | None:
        """The state in the chief's memory, and what writes it; None where the memory is being written."""
        parts = self._state.parts()
        parts |= self._state.whole(parts)
        if not self._session.is_chief or self._writer.busy:
            return None
        flushed(self._callbacks)
        self._snapshot.take()
        facts = Facts.of(
            self._now,
            place,
            variables=self._state.described(),
            began=self.began,
            fingerprint=self._data.fingerprint(),
            best=None if self._best is None else number(self._best),
            best_by=self._best_by(),
            finished=finished,
            stop_training=bool(self._model.stop_training),
            parts={"moment": moment.plain(), "callbacks": self._states.state(), "streams": host_streams()},
        )
        tensors = {**self._snapshot.tensors, **parts, **facts.tensors}
        saved = facts.saved({} if place.step else self._logs)
        return lambda: self._publishing.publish(place.total, tensors, saved)

    def _leave(self, place: Place) -> None:
        """End on every rank, when what was saved is on disk."""
        newest = self._session.from_chief(self._written)
        before = place.total - int(newest.rpartition("-")[2]) if newest else 0
        late = f", {before} steps before" if before else ""
        saved = (
            f"checkpoint {from_here(self._options.path / newest)} is saved{late}"
            if newest
            else "nothing could be saved"
        )
        raise ended(self._session, self.interrupt, str(place), saved)

    def _written(self) -> str:
        self._writer.wait(None)
        self._writer.check()
        return self._publishing.newest


def _moved(then: int, now: int, model: Any) -> str:
    """What cannot be the same on another number of replicas."""
    layers = model._flatten_layers(include_self=False)
    others = [
        *(["random layers draw other numbers"] if seed_generators_of(model) else []),
        *(
            ["BatchNormalization without sync_batch_norm=True has the moments of other rows"]
            if any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
            else []
        ),
    ]
    return (
        f"distfit: {then} replicas before, {now} now: the same records in each step, and the same numbers to the "
        f"rounding of sums{'; but ' if others else ''}{', and '.join(others)}."
    )


def _same_batch(then: int, found: int | None) -> None:
    if found not in (None, then):
        raise InputError(
            "Expected the data to give the batches that they gave before the checkpoint, received others: the last "
            "batch that was trained on has another content now. Give shuffle(..., seed=...) a seed, and the same "
            "files; or begin anew with resume=False."
        )
