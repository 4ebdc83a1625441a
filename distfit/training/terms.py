"""The normaliser of each loss term: what its local value was divided by.

A mean over a batch is not the mean of the means of its parts: each term of a loss (one an output, say) has
its own divisor, the number of its elements, of its valid ones, or the sum of their weights, and reductions
"sum" and None have none. A step first *measures* every term's local normaliser, sums them over all
replicas, and then *weighs* each term by local / global. Weighting gradients afterwards is not enough: two
masked terms under one weight give a gradient that is 84 to 91 % off (FACTS of the project).

    with terms.installed(model):
        measured = terms.measure(model, y, y_pred, sample_weight)    # None for a sum
        loss = terms.weigh(compute_loss, factors)                    # one factor a term
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank

# What a term without a divisor says when it is measured.
NO_NORMALISER = None


class _Current(threading.local):
    """What the replica that is being traced does with its terms: replicas are traced in threads."""

    collect: list[Any] | None = None
    factors: Iterator[Any] | None = None


_current = _Current()


class _Term:
    """A compiled loss whose value a step can measure and weigh."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self.name = loss.name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if _current.collect is not None:
            _current.collect.append(normaliser(self._loss, y_true, y_pred, sample_weight))
        value = self._loss(y_true, y_pred, sample_weight)
        if _current.factors is not None:
            # A replica without rows has factor 0, and may have computed what is not finite.
            value = tf.math.multiply_no_nan(value, tf.cast(next(_current.factors), value.dtype))
        return value


@contextmanager
def installed(model: Any) -> Iterator[None]:
    """The model's compiled losses as terms; its CompileLoss must be built. Undone on the way out."""
    compiled = model._compile_loss
    # A model's own step may leave its compiled loss unused, and unbuilt.
    if compiled is None or not compiled.built:
        yield
        return
    own = compiled._flat_losses
    # Inside another run of the same model (an evaluation by a callback) they are terms already.
    compiled._flat_losses = [
        entry if isinstance(entry.loss, _Term) else entry._replace(loss=_Term(entry.loss)) for entry in own
    ]
    try:
        yield
    finally:
        compiled._flat_losses = own


def measure(model: Any, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
    """The local normaliser of every compiled loss of the model, in its order.

    It runs in a stateless scope: what it updates (the trackers of several outputs) is not kept, and its
    value is thrown away, so that TensorFlow prunes all but the normalisers.
    """
    if model._compile_loss is None:
        return []
    collected: list[Any] = []
    _current.collect = collected
    try:
        with keras.StatelessScope():
            model._compile_loss(y, y_pred, sample_weight)
    finally:
        _current.collect = None
    return collected


def weigh(compute_loss: Callable[[], Any], factors: Sequence[Any]) -> Any:
    """The loss with every term times its factor, in the order in which they were measured."""
    _current.factors = iter(factors)
    try:
        return compute_loss()
    finally:
        _current.factors = None


def normaliser(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any) -> Any:
    """What Keras divides this term's sum by on this replica, as a float64 scalar; None for a sum.

    Follows keras.losses.Loss.__call__ up to its reduction. A loss that overrides `__call__`, or whose
    `call` returns a scalar, has reduced in its own way and counts as a mean over rows.
    """
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        return _rows(y_pred)
    if loss.reduction in ("sum", "none", None):
        return NO_NORMALISER
    mask = keras.src.backend.get_keras_mask(y_pred)
    y_true, y_pred = keras.tree.map_structure(
        lambda tensor: keras.ops.convert_to_tensor(tensor, dtype=loss.dtype), (y_true, y_pred)
    )
    values = loss.call(y_true, y_pred)
    if values.shape.rank == 0:
        return _rows(y_pred)
    own_mask = keras.src.backend.get_keras_mask(values)
    if own_mask is not None:
        mask = own_mask if mask is None else tf.logical_and(mask, own_mask)
    return _divisor(values, sample_weight, mask, loss.reduction)


def _divisor(values: tf.Tensor, sample_weight: Any, mask: Any, reduction: str) -> tf.Tensor:
    if reduction == "mean_with_sample_weight" and (sample_weight is not None or mask is not None):
        if sample_weight is not None:
            sample_weight = keras.ops.convert_to_tensor(sample_weight, dtype=values.dtype)
        weights = apply_mask(sample_weight, mask, dtype=values.dtype, reduction=reduction)
        _, weights = squeeze_or_expand_to_same_rank(values, weights)
        return tf.reduce_sum(tf.cast(weights, tf.float64))
    elements = tf.cast(tf.size(values), tf.float64)
    if mask is None:
        return elements
    valid = tf.reduce_sum(tf.cast(mask, tf.float64))
    return elements * valid / tf.cast(tf.size(mask), tf.float64)


def _rows(y_pred: Any) -> tf.Tensor:
    return tf.cast(tf.shape(keras.tree.flatten(y_pred)[0])[0], tf.float64)
