"""The run around hand-written steps: epochs, callbacks under their policies, validation, agreement, in the order of
`distfit.fit`, so that a documented loop ends with the same bits.

    with training(session, Trainee(...), train, Run(epochs=3)) as run:
        for epoch in run:
            for batch in train:
                step(batch)
            run.validate(test, valid)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import tensorflow as tf
from keras.src.utils.python_utils import pythonify_logs

from distfit import checks, prepare
from distfit.backends.hooks import optimizers_of, variables_of
from distfit.callbacks.logs import Logs
from distfit.callbacks.policy import Policy, all_of, policy_of
from distfit.callbacks.saver import ModelSaver, model_file
from distfit.data.feed import NOTHING
from distfit.errors import InputError
from distfit.loops.batches import Batches, GlobalBatch, HandStep, Pass
from distfit.monitor.announce import announce
from distfit.training import log_points
from distfit.training.agreement import at_epoch_end
from distfit.training.by_hand import ByHand
from distfit.training.in_sync import EVERY_STEPS, InSync, saves
from distfit.training.interrupt import Interrupt
from distfit.training.memory import explained
from distfit.training.metrics import Counting, GlobalStates
from distfit.training.step import Choices
from distfit.training.traced import traced
from distfit.training.wishes import Wishes

if TYPE_CHECKING:
    from distfit.data.feed import Feed
    from distfit.loops.trainee import Trainee
    from distfit.session import Session

Folder = str | os.PathLike | None
# Of the beginning of a step, and of its end with logs.
Told: TypeAlias = tuple[Callable[..., None], Callable[..., None]]


@dataclass(frozen=True)
class Run:
    """What a user chose about a hand-written training; the fields are arguments of `distfit.fit`."""

    epochs: int = 1
    initial_epoch: int = 0
    callbacks: Any = None
    verbose: str | int = "auto"
    log_dir: Folder = None
    checkpoint: Folder = None
    in_sync_steps: int = EVERY_STEPS
    logs_every_steps: int | None = None
    choices: Choices = field(default_factory=Choices)


@contextmanager
def training(session: Session, trainee: Trainee, data: Batches, run: Run) -> Iterator[Training]:
    """The models in the hands of the session's engine, with callbacks told of beginning and end. Collective.

    Raises:
        InputError: something cannot be run, or ranks differ; on every rank.
    """
    model, feed = trainee.first, data.feed
    session.from_chief(lambda: checks.writable(run.log_dir, run.checkpoint))
    prepare.same_compilation(session, trainee)
    prepare.same_signature(session, trainee, feed)
    with explained(session, feed.source.batch_size), session.backend.adopted(trainee):
        by_hand = session.agree(lambda: ByHand(trainee, session.backend, run.choices))
        session.from_chief(lambda: checks.room(run.checkpoint, variables_of(trainee)))
        prepare.same_restorers(session, run.callbacks)
        session.agree(lambda: _check_restored(trainee, run.callbacks))
        facts = prepare.run_facts(session, feed, data.seed)
        saver = None if run.checkpoint is None else ModelSaver(run.checkpoint)
        own = session.agree(lambda: prepare.callbacks(session, run.callbacks, run.log_dir, saver, facts))
        to = run.log_dir, run.checkpoint, run.verbose
        announce(session, trainee, feed, data.seed, run.choices, *to, callbacks=run.callbacks)
        with (
            _with_an_optimizer(model),
            prepare.listening(session, model, own, feed, run.epochs, run.verbose, history=True) as callbacks,
            by_hand.installed(),
        ):
            loop = Training(session, trainee, data, run, callbacks, by_hand)
            with loop.running():
                yield loop


class Training:
    """A hand-written training that has begun; `Session.training` gives one.

    Iterate it for the numbers of its epochs; between two of them metrics are reset, callbacks told, and every rank
    asked whether it wants to stop.

    Attributes:
        history: keras.callbacks.History, with global numbers.
    """

    def __init__(
        self, session: Session, trainee: Trainee, data: Batches, run: Run, callbacks: Any, by_hand: ByHand
    ) -> None:
        self._session = session
        self._trainee = trainee
        self._data = data
        self._run = run
        self._callbacks = callbacks
        self._by_hand = by_hand
        self._in_sync = InSync(trainee, session, run.in_sync_steps, model_file(run.checkpoint))
        self._saves = session.transport.broadcast(saves(callbacks.callbacks))
        self._interrupt = Interrupt()
        # Metrics of the loop may be the model's own, which an evaluation in a callback counts in as well.
        self._counting = Counting.of(trainee.first)
        self._functions: dict[tuple[HandStep, Feed, bool], Callable[..., Any]] = {}
        self._passes: list[Pass] = []
        self._first_epoch = self._epoch = run.initial_epoch
        self._in_epoch = False
        self._logs: dict[str, Any] = {}
        self._validated: dict[str, Any] = {}

    @property
    def history(self) -> keras.callbacks.History:
        return self._trainee.first.history

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self._first_epoch, self._run.epochs):
            self._begin(epoch)
            yield epoch
            self._end(epoch)
            model = self._trainee.first
            if at_epoch_end(self._session, model, Wishes(stop=bool(model.stop_training))).stop:
                break

    @contextmanager
    def running(self) -> Iterator[None]:
        """From the beginning of the training to its end."""
        model = self._trainee.first
        self._data.feed.reset()
        model.stop_training = False
        with self._interrupt.heard():
            self._log_points = log_points.agreed(self._session, self._callbacks, self._run.logs_every_steps)
            self._callbacks.on_train_begin()
            # A callback that restores a run says where it stopped, as to keras.Model.fit.
            self._first_epoch = self._epoch = model._initial_epoch or self._run.initial_epoch
            self._data.feed.start_at(self._first_epoch)
            self._in_sync.at_start()
            with self._counted():
                yield
            if self._in_epoch:  # which a `break` has left
                self._end(self._epoch)
            self._finish_passes()
            self._by_hand.finalize()
            self._in_sync.at_end()
            self._callbacks.on_train_end(logs=self._logs)
            self._data.feed.tell_left_out("training")

    def passing(self, data: Batches) -> Iterator[GlobalBatch]:
        """One pass over data; of those that are trained on, callbacks hear of every step.

        Raises:
            InputError: they are trained on, and this is no epoch.
        """
        model = self._trainee.first
        if data is not self._data:
            return self._pass(data, "other data", None, lambda: False)
        if not self._in_epoch:
            raise InputError(
                "Expected the data that are trained on to be iterated within an epoch, where metrics and callbacks "
                "know of them, received a pass outside. Write `for epoch in training:` around it."
            )
        told = self._callbacks.on_train_batch_begin, self._callbacks.on_train_batch_end
        return self._pass(data, f"epoch {self._epoch + 1}", told, lambda: bool(model.stop_training))

    def validate(self, step: HandStep, data: Batches, prefix: str = "val_") -> dict[str, float]:
        """One pass of a step over validation data. The epoch's own metrics go on afterwards, where they were.

        Args:
            step: a `@session.step` that updates metrics and no weights.
            data: of `Session.batches`, others than those that are trained on.
            prefix: of the names; a second set of data needs another one.

        Returns:
            The metrics of the training over these data, global, by the names `val_*`; the epoch's logs have them, too.

        Raises:
            InputError: it is no step, or these are no such data.
        """
        self._check_validation(step, data)
        callbacks, model = self._callbacks, self._trainee.first
        data.feed.reset()
        model.stop_evaluating = False
        with self._metrics_kept():
            callbacks.on_test_begin()
            self._trainee.reset_metrics()
            told = callbacks.on_test_batch_begin, callbacks.on_test_batch_end
            where = f"epoch {self._epoch + 1}, validation"
            for batch in self._pass(data, where, told, lambda: bool(model.stop_evaluating), trains=False):
                step(batch)
            data.feed.left_out()  # too many end a validation as well
            found = self._results(ends=True)
            callbacks.on_test_end(found)
        validated = {f"{prefix}{name}": value for name, value in found.items()}
        self._validated.update(validated)
        return validated

    def run(self, step: HandStep, batch: GlobalBatch) -> list[Any]:
        """A step on every replica; what it returned on those of this process."""
        session, feed = self._session, batch.of.feed
        with explained(session, feed.source.batch_size), session.watch.waiting(session.watch.position):
            function = self._function(step, feed, batch.of.trains)
            of_replicas = function(tf.constant(float(batch.of.wish()), tf.float64), batch.tensors)
        batch.of.ran([flags for _, flags in of_replicas])
        return [result for result, _ in of_replicas]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Around the user's loop: what ends it within an epoch ends the counting of its metrics, too."""
        try:
            yield
        except BaseException:
            if self._in_epoch:
                self._counting.end()
            raise

    def _begin(self, epoch: int) -> None:
        self._epoch, self._in_epoch = epoch, True
        self._validated = {}
        self._counting.begin()
        self._trainee.reset_metrics()
        self._callbacks.on_epoch_begin(epoch)

    def _end(self, epoch: int) -> None:
        self._in_epoch = False
        self._finish_passes()
        results = self._results(ends=True)
        self._counting.end()
        self._logs = {**results, **self._data.feed.left_out(), **self._validated}
        if self._saves:
            self._in_sync.before_saving()
        self._callbacks.on_epoch_end(epoch, self._logs)

    def _finish_passes(self) -> None:
        """Those that were left before their end."""
        for one in self._passes:
            if one.trains and one.flags:
                self._in_sync.after(1, one.flags)
            one.finish()
        self._passes = []

    def _pass(
        self, data: Batches, where: str, told: Told | None, wish: Callable[[], bool], trains: bool = True
    ) -> Iterator[GlobalBatch]:
        """One pass; between two batches, what `distfit.fit` does there.

        Args:
            told: of each batch's beginning and end; None where no callback hears of them.
            wish: whether a callback wants this pass to end.
            trains: its steps may update weights.
        """
        (begin, end), feed = told or (_nobody, _nobody), data.feed
        own = self._new_pass(feed, wish, trains)
        shown = Logs()
        with feed.catch_stop_iteration(), own.going_on():
            for first, last, batches in feed:
                self._interrupt.check()
                begin(first)
                position = self._session.watch.position = f"{where}, step {first + 1}"
                own.begin(first)
                if (batch := next(batches)) is NOTHING:
                    end(last, shown.again())
                    continue
                yield GlobalBatch(own, batch)
                self._session.watch.position = position  # a validation within the batch had its own
                since = first if shown.step is not None else 0
                if told is not None and self._log_points.due(data is self._data, since, last, feed.num_batches):
                    shown = Logs(self._shown(), step=last)
                if trains:
                    self._in_sync.after(1, own.flags)
                end(last, shown.again())
                if own.agreed_to_stop():
                    break
        own.finish()
        self._passes.remove(own)

    def _new_pass(self, feed: Feed, wish: Callable[[], bool], trains: bool) -> Pass:
        if any(one.goes_on and one.feed is feed for one in self._passes):
            raise InputError(
                "Expected one pass over the same data at a time, received one inside of another. Make other batches of "
                "them: session.batches(...)."
            )
        self._passes.append(Pass(feed, self._session.size, wish, trains))
        return self._passes[-1]

    def _check_validation(self, step: HandStep, data: Batches) -> None:
        if not isinstance(step, HandStep):
            raise InputError(
                f"Expected training.validate to be given a @session.step, received {type(step).__name__}. Write "
                "@session.step over a function of what a batch holds: def test(x, y)."
            )
        if not isinstance(data, Batches) or data is self._data:
            received = "those that are trained on" if data is self._data else type(data).__name__
            raise InputError(
                f"Expected data of their own to validate on, received {received}. Write "
                "valid = session.batches(x_valid, y_valid, batch_size=64, shuffle=False)."
            )

    @contextmanager
    def _metrics_kept(self) -> Iterator[None]:
        """The metrics' states come back afterwards, each replica's own."""
        states = [variable for metric in self._trainee.metrics for variable in metric.variables]
        backend = self._session.backend

        def restore(*values: Any) -> None:
            for variable, value in zip(states, values, strict=True):
                variable.assign(value)

        replicas = [()] * self._session.topology.replicas_per_process
        before = backend.run(lambda: [tf.identity(variable.value) for variable in states], replicas)
        yield
        backend.run(restore, before)

    def _function(self, step: HandStep, feed: Feed, trains: bool) -> Callable[..., Any]:
        key = (step, feed, trains)
        if key not in self._functions:
            self._functions[key] = self._traced(step, feed, trains)
        return self._functions[key]

    def _traced(self, step: HandStep, feed: Feed, trains: bool) -> Callable[..., Any]:
        @wraps(step.function, updated=())
        def on_replica(rows: Any, flags: Any, data: Any) -> tuple[Any, Any]:
            return self._by_hand.run(step.name, step.function, rows, flags, data)

        transfers, session = self._by_hand.transfers, self._session
        self._by_hand.expect(ragged=feed.source.uneven)
        function = traced(
            session,
            feed.made_ready(on_replica, training=trains),
            feed.element_spec,
            lambda: transfers.get(step.name, []),
            step.run_eagerly,
        )
        if not step.run_eagerly:
            session.agree(lambda: self._by_hand.check_changes(step.name, function.get_concrete_function().graph))
        return function

    def _shown(self) -> dict[str, Any]:
        """As `_results`; of one replica tensors, which cost no wait where no callback reads them."""
        if self._session.num_replicas > 1:
            return self._results()
        # Converted here: a result that is the variable itself would be read later, with another value.
        return keras.tree.map_structure(tf.convert_to_tensor, self._trainee.get_metrics_result())

    def _results(self, ends: bool = False) -> dict[str, Any]:
        """The metrics since their last reset, over all replicas.

        Args:
            ends: nothing more comes before the next reset, so that the metric objects get it, too.
        """
        if self._session.num_replicas == 1:
            return pythonify_logs(self._trainee.get_metrics_result())
        with self._session.watch.waiting("the sum of metrics"):
            states = GlobalStates(self._trainee, self._session.backend)
            if ends:
                self._counting.settle(states)
            return pythonify_logs(states.results())


def _check_restored(trainee: Trainee, callbacks: Any) -> None:
    """
    Raises:
        InputError: a callback would restore a part of what is trained.
    """
    restorers = [callback for callback in all_of(callbacks) if policy_of(callback) is Policy.RESTORER]
    kept = {id(optimizer) for optimizer in optimizers_of(trainee.first)}
    if restorers and (len(trainee.models) > 1 or any(id(optimizer) not in kept for optimizer in trainee.optimizers)):
        name = type(restorers[0]).__name__
        raise InputError(
            f"Expected a hand-written training of one model with its own optimizer for {name}, which keeps what "
            "belongs to the model and nothing else, received several models, or an optimizer that the model was not "
            f"compiled with. Write model.compile(optimizer=optimizer), or leave {name} out."
        )


@contextmanager
def _with_an_optimizer(model: Any) -> Iterator[None]:
    """TensorBoard (log_dir) asks every model for its optimizer; one that is not compiled answers None meanwhile."""
    if hasattr(model, "optimizer"):
        yield
        return
    model.optimizer = None
    try:
        yield
    finally:
        if model.optimizer is None:
            del model.optimizer


def _nobody(step: int, logs: Any = None) -> None:
    """Of data beside those that are trained on no callback hears."""
