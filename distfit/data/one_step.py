"""The records of one step as they travel through tf.data: numbers, bytes and seeds, and the order that they follow.

numbers, records, seeds = step_of(numbers, [b"...", b"..."], seed=0, epoch=3)
order = unpacked(packed(order))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from distfit.data import plan
from distfit.data.void import zeros

# Numbers, records and seeds of one step.
Step: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def step_of(numbers: np.ndarray, records: Sequence[bytes], seed: int, epoch: int) -> Step:
    """Numbers, records and seeds of a step, as TensorFlow takes them."""
    strings = np.empty(len(records), dtype=object)
    strings[:] = records
    # The bits count: TensorFlow's stateless operations take int32 or int64.
    return numbers, strings, plan.record_seeds(seed, epoch, numbers).view(np.int32)


def specs() -> tuple[Any, Any, Any]:
    """Their `tf.TensorSpec`s."""
    import tensorflow as tf

    return tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.string), tf.TensorSpec([None, 2], tf.int32)


def shaped(step: Sequence[Any]) -> Any:
    """What Python code gave, with the shapes that are known of it."""
    import tensorflow as tf

    return tuple(tf.ensure_shape(tensor, spec.shape) for tensor, spec in zip(step, specs(), strict=True))


def void(spec: Any) -> Any:
    """A step of no numbers, with one row that does not count: (numbers, data, seeds).

    Args:
        spec: of (numbers, data, seeds) of a step.
    """
    import tensorflow as tf

    _, data, seeds = zeros(spec)
    return tf.zeros([0], tf.int64), data, seeds


def packed(order: plan.Order) -> tuple[int, ...]:
    """An order as whole numbers, which travel as data.

    >>> order = plan.Order(9, seed=1, epoch=2, window=4, block=2)
    >>> unpacked(packed(order)) == order
    True
    """
    window = -1 if order.window is None else order.window
    return order.records, order.seed, order.epoch, int(order.shuffle), window, order.block


def unpacked(numbers: Sequence[int]) -> plan.Order:
    """The order that `packed` was given."""
    records, seed, epoch, shuffle, window, block = numbers
    return plan.Order(records, seed, epoch, bool(shuffle), None if window < 0 else window, block)
