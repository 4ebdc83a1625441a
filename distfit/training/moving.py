"""Which weights a forward pass moves without a gradient: the moving statistics of BatchNormalization, say.

Replicas see different rows, so they move them differently; the step averages what was moved, by rows,
within its one reduction. As a moving average is linear, that is the same as averaging them later.

    with moving.installed(model):
        with moving.noted() as moved:
            model(x, training=True)
        moved                            # the weights that were assigned
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from distfit.backends.hooks import replaced

if TYPE_CHECKING:
    from distfit.training.wire import Wire


class _Current(threading.local):
    """What the replica that is being traced has moved: replicas are traced in threads."""

    moved: dict[int, Any] | None = None


_current = _Current()


@contextmanager
def installed(model: Any, alike: Collection[Any] = ()) -> Iterator[None]:
    """Every floating-point weight without a gradient tells when it is assigned. Undone on the way out.

    Args:
        alike: weights that every replica moves in the same way, so that there is nothing to average.
    """
    left_out = {id(weight) for weight in alike}
    moved = [weight for weight in model.non_trainable_weights if "float" in weight.dtype]
    weights = [weight for weight in moved if id(weight) not in left_out]
    with ExitStack() as stack:
        for weight in weights:
            stack.enter_context(replaced(weight, "assign", _noting(weight, weight.assign)))
        yield


@contextmanager
def noted() -> Iterator[list[Any]]:
    """Collects what this thread moves inside; complete on the way out."""
    moved: list[Any] = []
    _current.moved = {}
    try:
        yield moved
        moved.extend(_current.moved.values())
    finally:
        _current.moved = None


def averaged(wire: Wire, moved: Sequence[Any], rows: Any, all_rows: Any) -> list[Any]:
    """What was moved, as the mean over the replicas, weighted by rows: a collective of its own, if there is any.

    Args:
        rows: of this replica, a float64 scalar.
        all_rows: of the global batch.
    """
    if not moved:
        return []
    (total,) = wire.sum([tf.concat(times(rows, moved), axis=0)], name="statistics")
    return cut(total / all_rows, moved)


def times(weight: Any, moved: Sequence[Any]) -> list[Any]:
    """Flat, in float64. What a replica without rows computed counts for nothing, not even when it is not finite."""
    flat = [tf.cast(tf.reshape(variable.value, [-1]), tf.float64) for variable in moved]
    return [tf.math.multiply_no_nan(values, weight) for values in flat]


def cut(packed: Any, moved: Sequence[Any]) -> list[Any]:
    """From one flat tensor to a value for each variable that was moved."""
    parts = tf.split(packed, [prod(variable.shape) for variable in moved]) if moved else []
    return [
        tf.cast(tf.reshape(part, variable.shape), variable.dtype) for part, variable in zip(parts, moved, strict=True)
    ]


def _noting(weight: Any, assign: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def noting(value: Any) -> Any:
        if _current.moved is not None:
            _current.moved[id(weight)] = weight
        return assign(value)

    return noting
