"""The loop: epochs, steps, validation and callbacks, in the order of keras.Model.fit.

    loop = Loop(model, session, step)
    loop.fit(train, callbacks, epochs=3, validation=Validation(valid))

It runs the same on every rank. What ranks decide together (when data end, that a callback wants to stop)
travels with the step and is read one step late, on the same step everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.python_utils import pythonify_logs

from distfit.data.feed import FLAGS, NOTHING, Batch, Feed, check_same_batches
from distfit.training.agreement import Agreement, anybody_wants_to_stop
from distfit.training.in_sync import EVERY_STEPS, InSync, saves
from distfit.training.interrupt import Interrupt
from distfit.training.memory import explained
from distfit.training.metrics import global_results, leave_global
from distfit.training.step import Choices, Step
from distfit.training.traced import OfReplicas, traced

if TYPE_CHECKING:
    from distfit.session import Session

# Where replicas have to sum their metrics, batch logs are made anew this often in an epoch: a collective and
# a wait for the device each time. Between two of these points callbacks see the last ones.
LOG_POINTS_PER_EPOCH = 20
LOG_EVERY_STEPS_OF_UNKNOWN = 10


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
    """

    def __init__(
        self,
        model: Any,
        session: Session,
        choices: Choices | None = None,
        in_sync_steps: int = EVERY_STEPS,
        checkpoint: Path | None = None,
    ) -> None:
        self._model = model
        self._session = session
        self._backend = session.backend
        self._step = Step(model, session.backend, choices or Choices())
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._interrupt = Interrupt()
        self._in_sync = InSync(model, session, in_sync_steps, checkpoint)
        self._saves = False

    def fit(
        self,
        train: Feed,
        callbacks: keras.callbacks.CallbackList,
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
        with self._step.installed(), self._interrupt.heard():
            callbacks.on_train_begin()
            initial_epoch = model._initial_epoch or initial_epoch
            train.start_at(initial_epoch)
            self._saves = self._session.transport.broadcast(saves(callbacks.callbacks))
            self._in_sync.at_start()
            for epoch in range(initial_epoch, epochs):
                logs = self._train_epoch(train, callbacks, epoch, validation)
                if anybody_wants_to_stop(self._session, self._model):
                    break
            if epochs > 0 and isinstance(model.optimizer, keras.optimizers.Optimizer):
                model.optimizer.finalize_variable_values(model.trainable_weights)
            self._in_sync.at_end()
            callbacks.on_train_end(logs=logs)
            train.tell_left_out("training")
            if validation is not None:
                validation.feed.tell_left_out("validation")
        self._leave_global()
        return model.history

    def evaluate(self, feed: Feed, callbacks: keras.callbacks.CallbackList) -> dict[str, Any]:
        """The loss and metrics over a feed, by name, from state summed over all replicas."""
        with self._step.installed(), self._interrupt.heard():
            results = self._evaluate(feed, callbacks, "evaluation")
            feed.tell_left_out("evaluation")
        self._leave_global()
        return results

    def predict(self, feed: Feed, callbacks: keras.callbacks.CallbackList) -> list[list[Any]]:
        """This process's outputs: for each step, one structure of NumPy arrays a local replica."""
        feed.reset()
        self._model.stop_predicting = False
        callbacks.on_predict_begin()
        collected: list[list[Any]] = []
        seen: list[Any] = []
        with feed.catch_stop_iteration(), self._interrupt.heard():
            for first, last, batches in feed:
                self._interrupt.check()
                callbacks.on_predict_batch_begin(first)
                for results in self._run(feed, _taken(first, last, batches), lambda: self._step.predict):
                    seen.append(results[0][1])
                    collected.append([keras.tree.map_structure(np.asarray, output) for output, _ in results])
                callbacks.on_predict_batch_end(last, {"outputs": collected[-1][0]})
                if self._session.size == 1 and self._model.stop_predicting:
                    break
        # No step of a prediction waits for another rank, so what they saw is compared here, once for all.
        for step, flags in enumerate(self._session.transport.sum(np.array(seen, np.float64).reshape(-1, FLAGS))):
            check_same_batches(flags, self._session.size, step + 1)
        callbacks.on_predict_end()
        return collected

    def _train_epoch(
        self, train: Feed, callbacks: keras.callbacks.CallbackList, epoch: int, validation: Validation | None
    ) -> dict:
        model = self._model
        model.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        with self._step.accumulation.in_parts():
            logs = self._batches(
                train,
                "train_step",
                self._step.next_training,
                callbacks.on_train_batch_begin,
                callbacks.on_train_batch_end,
                f"epoch {epoch + 1}",
            )
        epoch_logs = {**self._results("train_step", logs), **train.left_out()}
        if validation is not None and model._should_eval(epoch, validation.freq):
            results = self._evaluate(validation.feed, callbacks, f"epoch {epoch + 1}, validation")
            epoch_logs.update({f"val_{name}": value for name, value in results.items()})
        if self._saves:
            self._in_sync.before_saving()
        callbacks.on_epoch_end(epoch, epoch_logs)
        return epoch_logs

    def _evaluate(self, feed: Feed, callbacks: keras.callbacks.CallbackList, where: str) -> dict[str, Any]:
        feed.reset()
        model = self._model
        model.stop_evaluating = False
        callbacks.on_test_begin()
        model.reset_metrics()
        logs = self._batches(
            feed,
            "test_step",
            lambda: self._step.test,
            callbacks.on_test_batch_begin,
            callbacks.on_test_batch_end,
            where,
        )
        feed.left_out()  # too many end an evaluation as well
        results = pythonify_logs(self._results("test_step", logs))
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
    ) -> dict:
        """One pass of steps; the logs of the last one, as the first replica saw them.

        Args:
            method: of the model, "train_step" or "test_step".
        """
        stop = _STOPS[method]
        agreement = Agreement(self._session.topology.size)
        logs: dict = {}
        shown: dict = {}
        with feed.catch_stop_iteration():
            for first, last, batches in feed:
                self._interrupt.check()
                on_begin(first)
                self._session.watch.position = f"{where}, step {first + 1}"
                taken = _taken(first, last, batches)
                if not taken:
                    on_end(last, shown)
                    continue
                with self._session.watch.waiting(self._session.watch.position):
                    results = self._run(feed, taken, next_step, wish=getattr(self._model, stop))
                    logs = results[-1][0][0]
                    shown = self._batch_logs(method, logs, shown, first, last, feed)
                if method == "train_step":
                    self._in_sync.after(len(results), [flags for _, flags in results[-1]])
                on_end(last, shown)
                flags = [of_replicas[0][1] for of_replicas in results]
                if agreement.says_stop(flags, getattr(self._model, stop), first):
                    setattr(self._model, stop, True)
                    break
        agreement.finish()
        return logs

    def _run(
        self, feed: Feed, batches: Sequence[Batch], next_step: Callable[[], OneStep], wish: bool = False
    ) -> list[OfReplicas]:
        """One step a batch, in one call; what each gave on the local replicas."""
        with explained(self._session, feed.source.batch_size):
            function = self._function(tuple(next_step() for _ in batches), feed)
            return function(tf.constant(float(wish), tf.float64), tuple(batches))

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

    def _batch_logs(self, method: str, logs: dict, shown: dict, first: int, last: int, feed: Feed) -> dict:
        if self._session.topology.num_replicas == 1:
            return logs
        if not is_log_point(first, last, feed.num_batches):
            return shown
        # Python's numbers: Keras would ask a tensor for its value on every batch, for each callback that reads it.
        return pythonify_logs(self._global_logs(method, logs))

    def _global_logs(self, method: str, logs: dict) -> dict:
        return self._step.results(method, logs, global_results(self._model, self._backend))

    def _results(self, method: str, logs: dict) -> dict:
        """What callbacks see at the end of a pass.

        Args:
            method: "train_step" or "test_step".
            logs: of the last step, as the first replica saw them.
        """
        if self._session.topology.num_replicas == 1:
            # A model's own train_step may log what is no metric of the model: Keras shows that instead.
            return self._model._get_metrics_result_or_logs(logs)
        with self._session.watch.waiting("the sum of metrics"):
            return self._global_logs(method, logs)

    def _leave_global(self) -> None:
        if self._session.topology.num_replicas > 1:
            leave_global(self._model, self._backend)


def is_log_point(first: int, last: int, steps: int | None) -> bool:
    """Whether batch logs are made anew after these steps of an epoch, of which `first` is the first's number.

    >>> [step for step in range(100) if is_log_point(step, step, 60)][:4]
    [0, 3, 6, 9]
    """
    every = max(1, steps // LOG_POINTS_PER_EPOCH) if steps else LOG_EVERY_STEPS_OF_UNKNOWN
    return -first % every <= last - first


def _taken(first: int, last: int, batches: Iterator[Batch]) -> list[Batch]:
    """The batches of steps `first` to `last`, or as many as there are, without those that have nothing in them.

    Raises:
        StopIteration: there are none.
    """
    taken = [next(batches)]
    for _ in range(last - first):
        if (batch := next(batches, None)) is not None:
            taken.append(batch)
    return [batch for batch in taken if batch is not NOTHING]
