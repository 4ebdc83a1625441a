"""What a model gives to its metrics by itself: scalars are counted by rows, and rows that count for nothing not at all.

Each replica gives a `keras.metrics.Mean` the mean over its own rows, such as a loss. Counted once each, replicas of
few rows would weigh as much as those of many; so a scalar counts by its replica's share of the rows, and a step
counts as one, as on one device (training/metric_updates.py does that).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf


@contextmanager
def kept(variables: Sequence[Any], rows: Any, alike: Collection[int] = ()) -> Iterator[None]:
    """What happens inside has no effect on `variables` where this replica has no rows.

    Args:
        rows: how many this replica has.
        alike: the ids of variables that replicas without rows change like the others; read on the way out.
    """
    before = [tf.identity(variable.value) for variable in variables]
    yield
    for variable, old in zip(variables, before, strict=True):
        if id(variable) not in alike:
            variable.assign(tf.where(rows > 0, variable.value, old))


def counts_scalars(metric: Any) -> bool:
    """Whether it is Keras' own mean, which takes scalars as well as rows.

    >>> counts_scalars(keras.metrics.Mean()), counts_scalars(keras.metrics.MeanSquaredError())
    (True, False)
    """
    return type(metric).update_state is keras.metrics.Mean.update_state


def adds_up(metric: Any) -> bool:
    """Whether it is Keras' own sum."""
    return type(metric).update_state is keras.metrics.Sum.update_state


def depends_on_rows(weight: Any) -> bool:
    """Whether a weight adds up over replicas by itself, such as `tf.shape(x)[0]`; a constant does not."""
    return tf.is_tensor(weight) and (tf.executing_eagerly() or tf.get_static_value(weight) is None)
