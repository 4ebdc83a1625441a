"""What a model gives to its metrics by itself: scalars are counted by rows, and rows that count for nothing not at all.

Each replica gives a `keras.metrics.Mean` the mean over its own rows, such as a loss. Counted once each, replicas of
few rows would weigh as much as those of many; so a scalar counts by its replica's share of the rows, and a step
counts as one, as on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import tensorflow as tf

from distfit.backends.hooks import replaced


@contextmanager
def counted_by_rows(model: Any, row_share: Any) -> Iterator[None]:
    """Inside, a `keras.metrics.Mean` of the model that is given a scalar counts it by rows.

    Args:
        row_share: this replica's rows over all rows of the step; 0 where it has none.
    """
    with ExitStack() as stack:
        for metric in _means_of(model):
            stack.enter_context(replaced(metric, "update_state", _by_rows(metric, lambda sample_weight: row_share)))
        yield


@contextmanager
def functions_by_rows(model: Any, row_share: Any) -> Iterator[None]:
    """Inside, a compiled metric that is a function answering one number for a batch counts it by rows.

    Args:
        row_share: as of `counted_by_rows`.
    """
    compiled = model._compile_metrics
    with ExitStack() as stack:
        for metric in [] if compiled is None else compiled.metrics:
            if type(metric) is keras.metrics.MeanMetricWrapper:
                stack.enter_context(replaced(metric, "update_state", _function_by_rows(metric, row_share)))
        yield


@contextmanager
def installed(model: Any, share: Callable[[Any], Any]) -> Iterator[None]:
    """As `counted_by_rows`, for as long as steps are traced.

    Args:
        share: given the metric's sample_weight (None without), what to multiply it with on the replica that asks; None
            where it counts as it is.
    """
    with ExitStack() as stack:
        for metric in _means_of(model):
            # Inside another run of the same model (an evaluation by a callback) it counts by rows already.
            if "update_state" not in vars(metric):
                stack.enter_context(replaced(metric, "update_state", _by_rows(metric, share)))
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


def _means_of(model: Any) -> list[Any]:
    return [metric for metric in model.metrics if counts_scalars(metric)]


def counts_scalars(metric: Any) -> bool:
    """Whether it is Keras' own mean, which takes scalars as well as rows."""
    return type(metric) is keras.metrics.Mean


def _function_by_rows(metric: Any, row_share: Any) -> Callable[..., Any]:
    update = metric.update_state

    def updating(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        value = metric._fn(y_true, y_pred, **metric._fn_kwargs)
        if sample_weight is not None or keras.ops.ndim(value):
            return update(y_true, y_pred, sample_weight)
        return keras.metrics.Mean.update_state(metric, value, sample_weight=tf.cast(row_share, metric.dtype))

    return updating


def _by_rows(metric: Any, share: Callable[[Any], Any]) -> Callable[..., Any]:
    update = metric.update_state

    def updating(values: Any, sample_weight: Any = None) -> Any:
        own = share(sample_weight) if keras.ops.ndim(values) == 0 else None
        if own is not None:
            own = tf.cast(own, metric.dtype)
            sample_weight = own if sample_weight is None else own * tf.cast(sample_weight, metric.dtype)
        return update(values, sample_weight=sample_weight)

    return updating
