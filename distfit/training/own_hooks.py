"""Where a model's own step meets Keras and TensorFlow: each place asks the replica that is being traced.

    with hooked(model, backend):               # around all steps of a run
        with running(replica):                 # inside of a step, in the thread that traces it
            model.train_step(data)

Outside of `running` everything is as ever. What each hook is for: training/own_step.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import optimizers_of, replaced
from distfit.errors import InputError
from distfit.training import metric_updates, terms
from distfit.training.replica import Replica, is_scalar

if TYPE_CHECKING:
    from distfit.backends.base import Backend


@contextmanager
def hooked(model: Any, backend: Backend, alike: Collection[Any] = ()) -> Iterator[None]:
    """Whatever a step of the model meets asks the replica that is being traced. Undone on the way out.

    Args:
        backend: held around optimizers.
        alike: weights that every replica moves in the same way.
    """
    with ExitStack() as stack:
        stack.enter_context(_class_hooks())
        stack.enter_context(metric_updates.installed(model))
        for metric in model.metrics:
            stack.enter_context(replaced(metric, "result", _telling(metric.result)))
        for optimizer in optimizers_of(model):
            stack.enter_context(replaced(optimizer, "apply", _agreeing(optimizer, backend)))
        for weight in _changeable(model, alike):
            stack.enter_context(replaced(weight, "assign", _noting(weight, weight.assign)))
        yield


@contextmanager
def running(replica: Replica) -> Iterator[None]:
    """This thread traces a step of this replica."""
    _current.replica = replica
    try:
        yield
    finally:
        _current.replica = None


class _Current(threading.local):
    """The replica that this thread traces: replicas of one process are traced in threads."""

    replica: Replica | None = None


_current = _Current()


class _Users:
    """How many runs of this process need the hooks on classes: one inside another, or in threads of their own."""

    lock = threading.Lock()
    count = 0


@contextmanager
def _class_hooks() -> Iterator[None]:
    """`tape.gradient` and the call of a loss. Tapes are made inside the step, and Python looks `__call__` up on the
    class, so no instance can be hooked. Both ask for the replica of their thread, and are as ever where there is
    none."""
    with _Users.lock:
        _Users.count += 1
        if _Users.count == 1:
            tf.GradientTape.gradient, keras.losses.Loss.__call__ = _gradient, _loss
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if _Users.count == 0:
                tf.GradientTape.gradient, keras.losses.Loss.__call__ = _tape_gradient, _keras_loss


_keras_loss = keras.losses.Loss.__call__
_tape_gradient = tf.GradientTape.gradient


def _loss(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    value = _keras_loss(loss, y_true, y_pred, sample_weight)
    replica = _current.replica
    if replica is None or not is_scalar(value):
        return value
    return replica.by_rows(value, terms.normaliser(loss, y_true, y_pred, sample_weight))


def _gradient(
    tape: Any,
    target: Any,
    sources: Any,
    output_gradients: Any = None,
    unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
) -> Any:
    replica, flat = _current.replica, tf.nest.flatten(sources)
    weights = [source for source in flat if isinstance(source, (keras.Variable, tf.Variable))]
    if replica is None or not weights:
        return _tape_gradient(tape, target, sources, output_gradients, unconnected_gradients)
    if len(weights) != len(flat):
        raise InputError(
            "Expected tape.gradient to be asked for gradients of weights, which replicas sum, or of other tensors, "
            "which stay with their rows, received both in one call. Take a persistent tape and ask twice."
        )
    upstream = replica.upstream(target, output_gradients)
    gradients = _tape_gradient(tape, target, flat, upstream, unconnected_gradients)
    return tf.nest.pack_sequence_as(sources, replica.summed(gradients, weights))


def _agreeing(optimizer: Any, backend: Backend) -> Callable[..., None]:
    apply = optimizer.apply

    def agreeing(grads: Any, trainable_variables: Any = None) -> None:
        replica = _current.replica
        # An optimizer that wraps another one has agreed before, and may call it in a branch.
        if replica is None or replica.updating:
            return apply(grads, trainable_variables)
        given = None if trainable_variables is None else list(trainable_variables)
        grads = replica.alike(list(grads), optimizer._trainable_variables if given is None else given)
        replica.updating = True
        try:
            with backend.updating():
                return apply(grads, given)
        finally:
            replica.updating = False

    return agreeing


def _noting(weight: Any, assign: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def noting(value: Any) -> Any:
        if _current.replica is not None:
            _current.replica.note_assigned(weight, value)
        return assign(value)

    return noting


def _telling(result: Callable[[], Any]) -> Callable[[], Any]:
    def telling() -> Any:
        return result() if _current.replica is None else _current.replica.note_result(result())

    return telling


def _changeable(model: Any, alike: Collection[Any]) -> list[Any]:
    """What a step may assign to so that replicas differ: weights, and the state of optimizers (a learning rate)."""
    left_out = {id(weight) for weight in alike}
    states = [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]
    found = {id(weight): weight for weight in [*model.weights, *states] if id(weight) not in left_out}
    return list(found.values())
