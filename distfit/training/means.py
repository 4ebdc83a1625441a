"""What a model gives to its metrics by itself: scalars are counted by rows, and rows that count for nothing not at all.

Each replica gives a `keras.metrics.Mean` the mean over its own rows, such as a loss. Counted once each, replicas of
few rows would weigh as much as those of many; so a scalar counts by its replica's share of the rows, and a step
counts as one, as on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from distfit.backends.hooks import replaced

# Given a metric's sample_weight (None without), what to multiply it with here; None where it counts as it is.
Share: TypeAlias = Callable[[Any], Any]


@contextmanager
def counted_by_rows(model: Any, row_share: Any) -> Iterator[None]:
    """Inside, a scalar counts by rows: that a `keras.metrics.Mean` of the model is given, or that a compiled metric
    answers which is a function.

    Args:
        row_share: this replica's rows over all rows of the step; 0 where it has none.
    """
    with ExitStack() as stack:
        for metric, update in _updates(model, lambda weight: None if depends_on_rows(weight) else row_share):
            stack.enter_context(replaced(metric, "update_state", update))
        yield


@contextmanager
def installed(model: Any, share: Share) -> Iterator[None]:
    """As `counted_by_rows`, for as long as steps are traced."""
    with ExitStack() as stack:
        for metric, update in _updates(model, share):
            # Inside another run of the same model (an evaluation by a callback) it counts by rows already.
            if "update_state" not in vars(metric):
                stack.enter_context(replaced(metric, "update_state", update))
        yield


@contextmanager
def kept(variables: Sequence[Any], rows: Any) -> Iterator[None]:
    """What happens inside has no effect on `variables` where this replica has no rows.

    Args:
        rows: how many this replica has.
    """
    before = [tf.identity(variable.value) for variable in variables]
    yield
    for variable, old in zip(variables, before, strict=True):
        variable.assign(tf.where(rows > 0, variable.value, old))


def counts_scalars(metric: Any) -> bool:
    """Whether it is Keras' own mean, which takes scalars as well as rows."""
    return type(metric) is keras.metrics.Mean


def _updates(model: Any, share: Share) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Every metric that may meet a scalar, with its `update_state` for one replica of several."""
    compiled = [] if model._compile_metrics is None else model._compile_metrics.metrics
    for metric in model.metrics:
        if counts_scalars(metric):
            yield metric, _by_rows(metric, share)
    for metric in [*compiled, *model.metrics]:
        if type(metric) is keras.metrics.MeanMetricWrapper:
            yield metric, _function_by_rows(metric, share)


def _by_rows(metric: Any, share: Share) -> Callable[..., Any]:
    update = metric.update_state

    def updating(values: Any, sample_weight: Any = None) -> Any:
        own = share(sample_weight) if keras.ops.ndim(values) == 0 else None
        if own is not None:
            own = tf.cast(own, metric.dtype)
            sample_weight = own if sample_weight is None else own * tf.cast(sample_weight, metric.dtype)
        return update(values, sample_weight=sample_weight)

    return updating


def _function_by_rows(metric: Any, share: Share) -> Callable[..., Any]:
    update = metric.update_state

    def updating(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        value, own = metric._fn(y_true, y_pred, **metric._fn_kwargs), share(None)
        if own is None or sample_weight is not None or keras.ops.ndim(value):
            return update(y_true, y_pred, sample_weight)
        return keras.metrics.Mean.update_state(metric, value, sample_weight=tf.cast(own, metric.dtype))

    return updating


def depends_on_rows(weight: Any) -> bool:
    """Whether a weight adds up over replicas by itself, such as `tf.shape(x)[0]`; a constant does not."""
    return tf.is_tensor(weight) and (tf.executing_eagerly() or tf.get_static_value(weight) is None)
