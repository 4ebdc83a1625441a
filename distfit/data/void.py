"""Rows that stand in for rows that are not there: a step has its shape on every rank, also on one without data."""

from __future__ import annotations

from typing import Any


def zeros(spec: Any) -> Any:
    """Zeros of a structure of `tf.TensorSpec`s; what is unknown of a shape is 1, the number of rows among it.

    >>> import tensorflow as tf
    >>> zeros(tf.TensorSpec([None, 2], tf.int64)).numpy().tolist()
    [[0, 0]]
    """
    import tensorflow as tf

    return tf.nest.map_structure(_zeros, spec, expand_composites=True)


def _zeros(spec: Any) -> Any:
    import tensorflow as tf

    shape = [1 if size is None else size for size in spec.shape]
    return tf.fill(shape, "") if spec.dtype == tf.string else tf.zeros(shape, spec.dtype)
