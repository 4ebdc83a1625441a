"""The loop: epochs, steps, validation and callbacks, in the order of keras.Model.fit.

    loop = Loop(model, session, step)
    loop.fit(train, callbacks, epochs=3, validation=Validation(valid))

It runs the same on every rank. What ranks decide together (when data end, that a callback wants to stop)
travels with the step and is read one step late, on the same step everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import tensorflow as tf
from keras.src.utils.python_utils import pythonify_logs

from distfit.callbacks.listening import Listening
from distfit.callbacks.logs import Logs
from distfit.checkpoint.not_kept import NotKept
from distfit.checkpoint.place import BEGINNING, Moment, Place
from distfit.data.feed import NOTHING, Batch, Feed
from distfit.training import log_points
from distfit.training.agreement import Agreement, at_epoch_end
from distfit.training.in_sync import EVERY_STEPS, InSync, saves
from distfit.training.interrupt import Interrupt
from distfit.training.memory import explained
from distfit.training.metrics import Counting, GlobalStates
from distfit.training.predicting import Outputs, of_process
from distfit.training.step import Choices, Step
from distfit.training.traced import OfReplicas, traced
from distfit.training.wishes import Wishes

if TYPE_CHECKING:
    from distfit.session import Session

# What a callback sets on the model to end a pass of each of its steps.
_STOPS = {"train_step": "stop_training", "test_step": "stop_evaluating"}
# A step of training/step.py.
OneStep: TypeAlias = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Validation:
    """What to evaluate on after an epoch, and after which: a number n for every nth, or the epochs' numbers."""

    feed: Feed
    freq: int | list[int] | tuple[int, ...] | set[int] = 1


class Loop:
    """Runs steps over feeds for one model.

    Args:
        model: compiled, adopted by the session's engine.
        session: who we are and how we reach the others.
        choices: of the user, about how replicas work together.
        in_sync_steps: from one comparison of the replicas to the next.
        checkpoint: the file of the model that the chief keeps of this run; None for none.
        logs_every_steps: from one global value of a batch to the next; None for the default (log_points.py).
        keeper: saves the training's state; None keeps none.
    """

    def __init__(
        self,
        model: Any,
        session: Session,
        choices: Choices | None = None,
        in_sync_steps: int = EVERY_STEPS,
        checkpoint: Path | None = None,
        logs_every_steps: int | None = None,
        keeper: NotKept | None = None,
    ) -> None:
        self._model = model
        self._session = session
        self._backend = session.backend
        self._step = Step(model, session.backend, choices or Choices())
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._keeper = NotKept(Interrupt(session.watch)) if keeper is None else keeper
        self._interrupt = self._keeper.interrupt
        self._in_sync = InSync(model, session, in_sync_steps, checkpoint)
        self._saves = False
        self._states: GlobalStates | None = None
        self._counting = Counting.of(model)
        self._logs_every_steps = logs_every_steps

    def fit(
        self,
        train: Feed,
        callbacks: Listening,
        epochs: int,
        initial_epoch: int = 0,
        validation: Validation | None = None,
    ) -> keras.callbacks.History:
        """Trains, as keras.Model.fit does from its first epoch to its last."""
        model = self._model
        train.reset()
        self._step.expect(ragged=train.source.uneven)
        model.stop_training = False
        logs: dict = {}
        with self._step.installed():
            place, moment = self._begin(train, callbacks, initial_epoch, validation)
            self._in_sync.at_start()
            while place.epoch < epochs and not self._over:
                logs = self._train_epoch(train, callbacks, place, moment, validation)
                place, moment = self._after_epoch(logs), BEGINNING
            self._keeper.at_end(place)
            if epochs > 0 and isinstance(model.optimizer, keras.optimizers.Optimizer):
                model.optimizer.finalize_variable_values(model.trainable_weights)
            self._in_sync.at_end()
            callbacks.on_train_end(logs=logs)
            train.tell_left_out("training")
            if validation is not None:
                validation.feed.tell_left_out("validation")
        return model.history

    def _begin(
        self, train: Feed, callbacks: Listening, first_epoch: int, validation: Validation | None
    ) -> tuple[Place, Moment]:
        """Callbacks are told; where the training begins, or goes on."""
        model = self._model
        self._log_points = log_points.agreed(self._session, callbacks, self._logs_every_steps)
        place, moment = self._keeper.restored(model, first_epoch)
        stops = model.stop_training
        with self._keeper.beginning(callbacks.callbacks, train):
            callbacks.on_train_begin()
        if not place.total:  # a callback that restores a run says where it stopped, as to keras.Model.fit
            place = Place(model._initial_epoch or first_epoch, 0, 0)
        model.stop_training = model.stop_training or stops
        self._place, self._over, self._states = place, stops and not place.step, None
        if not self._over:
            at = (place.epoch, place.step) if moment.results is None else (place.epoch + 1, 0)
            train.seek(*at, at[0] if self._keeper.began is None else self._keeper.began, self._keeper.ranks)
            self._keeper.arrived()
            if validation is not None and place.validated:
                validation.feed.passed(place.validated)
        self._saves = self._session.transport.broadcast(saves(callbacks.callbacks))
        return place, moment

    def _after_epoch(self, logs: Mapping[str, Any]) -> Place:
        """All ranks stop, if one wants to; where the training goes on."""
        wishes = at_epoch_end(self._session, self._model, self._keeper.wishes(self._model.stop_training))
        self._keeper.agreed(wishes)
        self._place = replace(self._place, epoch=self._place.epoch + 1, step=0)
        self._keeper.after_epoch(self._place, logs)
        self._over = self._model.stop_training
        return self._place

    def evaluate(self, feed: Feed, callbacks: Listening) -> dict[str, Any]:
        """The loss and metrics over a feed, by name, from state summed over all replicas."""
        with self._step.installed(), self._interrupt.heard():
            self._log_points = log_points.agreed(self._session, callbacks, self._logs_every_steps)
            results = self._evaluate(feed, callbacks, "evaluation")
            feed.tell_left_out("evaluation")
        return results

    def predict(self, feed: Feed, callbacks: Listening, outputs: Outputs) -> Any:
        """Runs the model over a feed; what this rank gets of its outputs (training/predicting.py)."""
        feed.reset()
        model = self._model
        model.stop_predicting = False
        callbacks.on_predict_begin()
        with feed.catch_stop_iteration(), self._interrupt.heard():
            for first, last, batches in feed:
                self._interrupt.check()
                callbacks.on_predict_batch_begin(first)
                self._session.watch.position = f"prediction, step {first + 1}"
                results = self._run(feed, _taken(first, last, batches)[0], lambda: self._step.predict)
                callbacks.on_predict_batch_end(last, {"outputs": of_process(results)})
                if outputs.add(results, wish=model.stop_predicting):
                    break
        predicted = outputs.result()
        callbacks.on_predict_end()
        return predicted

    def _train_epoch(
        self, train: Feed, callbacks: Listening, place: Place, moment: Moment, validation: Validation | None
    ) -> dict:
        """One epoch, or the rest of one; what callbacks saw at its end."""
        model, epoch = self._model, place.epoch
        with self._counting:
            if place.step:
                callbacks.on_epoch_resumed(epoch, place.step)
            else:
                model.reset_metrics()
                callbacks.on_epoch_begin(epoch)
            results = moment.results
            if results is None:
                with self._step.accumulation.in_parts():
                    results = self._batches(
                        train,
                        "train_step",
                        self._step.next_training,
                        callbacks.on_train_batch_begin,
                        callbacks.on_train_batch_end,
                        f"epoch {epoch + 1}",
                        moment,
                    )
                results = {**results, **train.left_out()}
        epoch_logs = dict(results)
        if validation is not None and model._should_eval(epoch, validation.freq):
            self._keeper.before_validation(self._place, lambda: Moment({}, results=pythonify_logs(results)))
            results = self._evaluate(validation.feed, callbacks, f"epoch {epoch + 1}, validation")
            self._place = replace(self._place, validated=self._place.validated + 1)
            epoch_logs.update({f"val_{name}": value for name, value in results.items()})
        if self._saves:
            self._in_sync.before_saving()
        callbacks.on_epoch_end(epoch, epoch_logs)
        return epoch_logs

    def _evaluate(self, feed: Feed, callbacks: Listening, where: str) -> dict[str, Any]:
        feed.reset()
        model = self._model
        model.stop_evaluating = False
        callbacks.on_test_begin()
        with self._counting:
            model.reset_metrics()
            results = self._batches(
                feed,
                "test_step",
                lambda: self._step.test,
                callbacks.on_test_batch_begin,
                callbacks.on_test_batch_end,
                where,
            )
        feed.left_out()  # too many end an evaluation as well
        results = pythonify_logs(results)
        callbacks.on_test_end(results)
        return results

    def _batches(
        self,
        feed: Feed,
        method: str,
        next_step: Callable[[], OneStep],
        on_begin: Callable[[int], None],
        on_end: Callable[[int, Any], None],
        where: str,
        moment: Moment = BEGINNING,
    ) -> dict:
        """One pass of steps; what callbacks see at its end.

        Args:
            method: of the model, "train_step" or "test_step".
            moment: from which the pass goes on.
        """
        stop, trains = _STOPS[method], method == "train_step"
        agreement = Agreement(self._session.topology.size, moment.stops)
        logs, shown, ran = dict(moment.logs), moment.shown, moment.ran
        with feed.catch_stop_iteration():
            for first, last, batches in feed:
                self._interrupt.check()
                on_begin(first)
                self._session.watch.position = f"{where}, step {first + 1}"
                taken, count = _taken(first, last, batches)
                if trains:
                    self._place = replace(self._place, step=first + count, total=self._place.total + count)
                if not taken:
                    on_end(last, shown.again())
                    continue
                with self._session.watch.waiting(self._session.watch.position):
                    wishes = self._keeper.wishes(getattr(self._model, stop))
                    results = self._run(feed, taken, next_step, wishes)
                    logs, ran = results[-1][0][0], last
                    shown = self._batch_logs(method, logs, shown, first, last, feed)
                if trains:
                    self._in_sync.after(len(results), [flags for _, flags in results[-1]])
                on_end(last, shown.again())
                flags = [of_replicas[0][1] for of_replicas in results]
                agreed = agreement.says(flags, wishes | Wishes(stop=bool(getattr(self._model, stop))), first)
                if self._between(method, agreed, partial(_moment, shown, ran, agreement)):
                    break
        self._keeper.agreed(agreement.finish())
        # With several replicas the last log point may have been the last step: nobody has to meet once more.
        return self._results(method, logs, shown if shown.step == ran else None)

    def _between(self, method: str, agreed: Wishes, moment: Callable[[], Moment]) -> bool:
        """Between two calls of steps: what all ranks want is done; whether the pass ends."""
        self._keeper.agreed(agreed)
        if agreed.stop:
            setattr(self._model, _STOPS[method], True)
        if method == "test_step":
            self._keeper.in_validation()
        elif (
            not agreed.stop and not self._step.accumulation.in_the_middle()
        ):  # a pass that ends is saved behind its end
            self._keeper.after_step(self._place, moment)
        return agreed.stop

    def _run(
        self, feed: Feed, batches: Sequence[Batch], next_step: Callable[[], OneStep], wishes: Wishes | None = None
    ) -> list[OfReplicas]:
        """One step a batch, in one call; what each gave on the local replicas."""
        with explained(self._session, feed.source.batch_size):
            function = self._function(tuple(next_step() for _ in batches), feed)
            return function(tf.constant((wishes or Wishes()).number, tf.float64), tuple(batches))

    def _function(self, steps: tuple[OneStep, ...], feed: Feed) -> Callable[..., list[OfReplicas]]:
        """These steps, one after the other, as one traced function for this feed."""
        key = (*(step.__name__ for step in steps), id(feed))
        if key not in self._functions:
            each = [self._one(step, feed) for step in steps]

            def in_turn(wish: Any, batches: tuple[Batch, ...]) -> list[OfReplicas]:
                return [one(wish, batch) for one, batch in zip(each, batches, strict=True)]

            # A step alone is a traced function already; each is traced once, however many calls hold it.
            if len(steps) > 1 and not self._model.run_eagerly:
                signature = [tf.TensorSpec([], tf.float64), (feed.element_spec,) * len(steps)]
                in_turn = tf.function(in_turn, input_signature=signature, autograph=False)
            self._functions[key] = in_turn
        return self._functions[key]

    def _one(self, step: OneStep, feed: Feed) -> Callable[[Any, Batch], OfReplicas]:
        """One step on every local replica; traced once for each kind of feed."""
        key = (step.__name__, "one", id(feed))
        if key not in self._functions:
            self._functions[key] = traced(
                self._session,
                feed.made_ready(step, training=step.__name__ in ("train", "accumulate")),
                feed.element_spec,
                lambda: self._step.transfers.get(step.__name__, []),
                run_eagerly=self._model.run_eagerly,
                jit_compile=bool(self._model.jit_compile and self._backend.supports_jit),
            )
        return self._functions[key]

    def _batch_logs(self, method: str, logs: dict, shown: Logs, first: int, last: int, feed: Feed) -> Logs:
        """What callbacks see after these steps."""
        if self._session.num_replicas == 1:
            return Logs(logs, step=last)
        # Where first steps had nothing in them, bad records alone, the next one is the first with values.
        if self._log_points.due(method == "train_step", first if shown.step is not None else 0, last, feed.num_batches):
            return self._global_logs(method, logs, last)
        return shown

    def _results(self, method: str, logs: dict, shown: Logs | None) -> dict:
        """What callbacks see at the end of a pass, in the metric objects, too.

        Args:
            method: "train_step" or "test_step".
            logs: of the last step, as the first replica saw them.
            shown: after the last step, where values were made then; nobody has to meet once more.
        """
        if self._session.num_replicas == 1:
            # A model's own train_step may log what is no metric of the model: Keras shows that instead.
            return self._model._get_metrics_result_or_logs(logs)
        if shown is None or self._counting.disturbed or self._states is None:
            with self._session.watch.waiting("the sum of metrics"):
                shown = self._global_logs(method, logs, None)
        assert self._states is not None, "made where the values were"
        self._counting.settle(self._states)
        return shown

    def _global_logs(self, method: str, logs: dict, last: int | None) -> Logs:
        self._states = states = GlobalStates(self._model, self._backend)
        self._counting.disturbed = False
        return Logs(pythonify_logs(self._step.results(method, logs, states.results())), step=last)


def _taken(first: int, last: int, batches: Iterator[Batch]) -> tuple[list[Batch], int]:
    """The batches of steps `first` to `last`, or as many as there are, without those that have nothing in them; and how
    many these were with them.

    Raises:
        StopIteration: there are none.
    """
    taken = [next(batches)]
    for _ in range(last - first):
        if (batch := next(batches, None)) is not None:
            taken.append(batch)
    return [batch for batch in taken if batch is not NOTHING], len(taken)


def _moment(shown: Logs, ran: int, agreement: Agreement) -> Moment:
    return Moment(dict(shown), shown.step, ran, agreement.unread_stop())
