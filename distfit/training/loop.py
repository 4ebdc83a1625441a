"""The loop: epochs, steps, validation and callbacks, in the order of keras.Model.fit.

    loop = Loop(model, session, step)
    loop.fit(train, callbacks, epochs=3, validation=Validation(valid))

It runs the same on every rank. What ranks decide together (when data end, that a callback wants to stop)
travels with the step and is read one step late, on the same step everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.python_utils import pythonify_logs

from distfit.data.feed import Batch, Feed, check_same_batches, flags_of
from distfit.log import warn_once
from distfit.training.interrupt import Interrupt
from distfit.training.memory import explained
from distfit.training.metrics import global_results, leave_global
from distfit.training.step import Step

if TYPE_CHECKING:
    from distfit.session import Session

# Where replicas have to sum their metrics, batch logs are made anew this often in an epoch: a collective and
# a wait for the device each time. Between two of these points callbacks see the last ones.
LOG_POINTS_PER_EPOCH = 20
LOG_EVERY_STEPS_OF_UNKNOWN = 10


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
    """

    def __init__(self, model: Any, session: Session) -> None:
        self._model = model
        self._session = session
        self._backend = session.backend
        self._step = Step(model, session.backend)
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._interrupt = Interrupt()

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
        model.stop_training = False
        logs: dict = {}
        with self._step.installed(), self._interrupt.heard():
            callbacks.on_train_begin()
            initial_epoch = model._initial_epoch or initial_epoch
            train.start_at(initial_epoch)
            for epoch in range(initial_epoch, epochs):
                logs = self._train_epoch(train, callbacks, epoch, validation)
                if self._any_wants_to_stop():
                    break
            if epochs > 0:
                model.optimizer.finalize_variable_values(model.trainable_weights)
            callbacks.on_train_end(logs=logs)
        self._leave_global()
        return model.history

    def evaluate(self, feed: Feed, callbacks: keras.callbacks.CallbackList) -> dict[str, Any]:
        """The loss and metrics over a feed, by name, from state summed over all replicas."""
        with self._step.installed(), self._interrupt.heard():
            results = self._evaluate(feed, callbacks, "evaluation")
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
                outputs, flags = self._run(self._step.predict, feed, next(batches), every_replica=True)
                seen.append(flags)
                collected.append([keras.tree.map_structure(np.asarray, output) for output in outputs])
                callbacks.on_predict_batch_end(last, {"outputs": collected[-1][0]})
                if self._session.size == 1 and self._model.stop_predicting:
                    break
        # No step of a prediction waits for another rank, so what they saw is compared here, once for all.
        for step, flags in enumerate(self._session.transport.sum(np.array(seen, np.float64).reshape(-1, 3))):
            check_same_batches(flags, self._session.size, step + 1)
        callbacks.on_predict_end()
        return collected

    def _train_epoch(
        self, train: Feed, callbacks: keras.callbacks.CallbackList, epoch: int, validation: Validation | None
    ) -> dict:
        model = self._model
        model.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        logs = self._batches(
            train,
            self._step.train,
            callbacks.on_train_batch_begin,
            callbacks.on_train_batch_end,
            "stop_training",
            f"epoch {epoch + 1}",
        )
        epoch_logs = dict(self._results(logs))
        if validation is not None and model._should_eval(epoch, validation.freq):
            results = self._evaluate(validation.feed, callbacks, f"epoch {epoch + 1}, validation")
            epoch_logs.update({f"val_{name}": value for name, value in results.items()})
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
            self._step.test,
            callbacks.on_test_batch_begin,
            callbacks.on_test_batch_end,
            "stop_evaluating",
            where,
        )
        results = pythonify_logs(self._results(logs))
        callbacks.on_test_end(results)
        return results

    def _batches(
        self,
        feed: Feed,
        step: Callable[..., Any],
        on_begin: Callable[[int], None],
        on_end: Callable[[int, Any], None],
        stop: str,
        where: str,
    ) -> dict:
        """One pass of steps; the logs of the last one, as the first replica saw them."""
        agreement = _Agreement(self._session.topology.size)
        logs: dict = {}
        shown: dict = {}
        with feed.catch_stop_iteration():
            for first, last, batches in feed:
                self._interrupt.check()
                on_begin(first)
                self._session.watch.position = f"{where}, step {first + 1}"
                batch = next(batches)
                with self._session.watch.waiting(self._session.watch.position):
                    logs, flags = self._run(step, feed, batch, wish=getattr(self._model, stop))
                    shown = self._batch_logs(logs, shown, first, feed)
                on_end(last, shown)
                if agreement.says_stop(flags, getattr(self._model, stop), first):
                    setattr(self._model, stop, True)
                    break
        agreement.finish()
        return logs

    def _run(
        self,
        step: Callable[..., Any],
        feed: Feed,
        batch: Batch,
        wish: bool = False,
        every_replica: bool = False,
    ) -> tuple[Any, Any]:
        with explained(self._session, feed.source.batch_size):
            results = self._function(step, feed)(tf.constant(float(wish), tf.float64), batch)
        if every_replica:
            return [output for output, _ in results], results[0][1]
        return results[0]

    def _function(self, step: Callable[..., Any], feed: Feed) -> Callable[..., Any]:
        """The step on every local replica as one traced function; traced once for each kind of feed."""
        key = (step.__name__, id(feed))
        if key not in self._functions:
            self._functions[key] = self._traced(step, feed.element_spec)
        return self._functions[key]

    def _traced(self, step: Callable[..., Any], element_spec: Any) -> Callable[..., Any]:
        def on_all(wish: Any, batch: Batch) -> list[Any]:
            fingerprint, shards = batch
            own = flags_of(fingerprint, wish)
            # One voice a process: its further replicas add nothing to the flags.
            flags = [own] + [tf.zeros_like(own)] * (len(shards) - 1)
            arguments = [(rows, flag, data) for (rows, data), flag in zip(shards, flags, strict=True)]
            return self._backend.run(step, arguments)

        if self._model.run_eagerly:
            return on_all
        return tf.function(
            tf.autograph.experimental.do_not_convert(on_all),
            input_signature=[tf.TensorSpec([], tf.float64), element_spec],
            jit_compile=bool(self._model.jit_compile and self._backend.supports_jit) or None,
        )

    def _batch_logs(self, logs: dict, shown: dict, step: int, feed: Feed) -> dict:
        if self._session.topology.num_replicas == 1:
            return logs
        steps = feed.num_batches
        every = max(1, steps // LOG_POINTS_PER_EPOCH) if steps else LOG_EVERY_STEPS_OF_UNKNOWN
        return global_results(self._model, self._backend) if step % every == 0 else shown

    def _results(self, logs: dict) -> dict:
        if self._session.topology.num_replicas == 1:
            # A model's own train_step may log what is no metric of the model: Keras shows that instead.
            return self._model._get_metrics_result_or_logs(logs)
        with self._session.watch.waiting("the sum of metrics"):
            results = global_results(self._model, self._backend)
        unknown = sorted(set(logs) - set(results))
        if unknown:
            warn_once(
                f"{', '.join(unknown)} in what compute_metrics returns is no metric of the model, so that replicas "
                "cannot add it up: left out. Make it a keras.metrics.Metric of the model."
            )
        return results

    def _leave_global(self) -> None:
        if self._session.topology.num_replicas > 1:
            leave_global(self._model, self._backend)

    def _any_wants_to_stop(self) -> bool:
        with self._session.watch.waiting("the end of an epoch"):
            wishes = self._session.transport.sum(np.array([bool(self._model.stop_training)], np.float64))
        self._model.stop_training = bool(wishes[0])
        return self._model.stop_training


class _Agreement:
    """What the ranks agreed on in the step before: read late, so that the device is never waited for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pending: tuple[Any, int] | None = None

    def says_stop(self, flags: Any, own_wish: bool, step: int) -> bool:
        """Whether all ranks stop after this step. One process follows its own wish at once, as Keras does."""
        if self._size == 1:
            return own_wish
        before, self._pending = self._pending, (flags, step)
        return before is not None and self._read(*before)

    def finish(self) -> None:
        """Read what the last step said; a wish to stop no longer matters, different data do."""
        if self._pending is not None:
            self._read(*self._pending)

    def _read(self, flags: Any, step: int) -> bool:
        values = np.asarray(flags)
        check_same_batches(values, self._size, step + 1)
        return values[0] > 0
