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
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from distfit.backends.hooks import replaced


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


def _noting(weight: Any, assign: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def noting(value: Any) -> Any:
        if _current.moved is not None:
            _current.moved[id(weight)] = weight
        return assign(value)

    return noting
