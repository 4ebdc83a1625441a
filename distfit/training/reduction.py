"""Gradients over the wire: fixed buckets, each one tensor, one collective, in one order on every rank.

The buckets are cut when the step is traced, from the last variable to the first, as the backward pass
finishes them, so that a bucket can travel while earlier layers still compute. Every bucket is packed into
one flat tensor here rather than fused by the engine when tensors happen to be ready: that gives the same
additions in the same order in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from distfit.training.wire import Wire

# Measured (benchmarks/bucket_size.py, docs/guides/communication.md): larger ones begin to travel late, and their copies
# leave the caches; smaller ones are more collectives, which a slow link between hosts makes dear.
BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Packing:
    """How tensors are packed for the wire.

    Args:
        dtype: floats travel and are added in this type; None leaves each as it is.
        bucket_bytes: what travels together, at most.
    """

    dtype: str | None = None
    bucket_bytes: int = BUCKET_BYTES


AS_THEY_ARE = Packing()


@dataclass(frozen=True)
class Slot:
    """One tensor on the wire: what it is, so that buckets can be planned without it."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


def plan_buckets(slots: Sequence[Slot], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Which tensors travel together: indices from last to first, one type a bucket, at most `limit` bytes.

    A tensor larger than the limit travels alone.

    >>> plan_buckets([Slot((2,), "float32", 4), Slot((3,), "float32", 4), Slot((1,), "float64", 8)], limit=12)
    [[2], [1], [0]]
    """
    buckets: list[list[int]] = []
    open_bucket: dict[str, int] = {}
    filled: list[int] = []
    for index in reversed(range(len(slots))):
        slot = slots[index]
        bucket = open_bucket.get(slot.dtype)
        if bucket is None or filled[bucket] + slot.nbytes > limit:
            bucket = open_bucket[slot.dtype] = len(buckets)
            buckets.append([])
            filled.append(0)
        buckets[bucket].append(index)
        filled[bucket] += slot.nbytes
    return buckets


def summed(wire: Wire, gradients: Sequence[Any], shapes: Sequence[Any], packing: Packing = AS_THEY_ARE) -> list[Any]:
    """Inside a step: every gradient summed over all replicas.

    A sparse one (tf.IndexedSlices, of an Embedding) stays sparse: the rows of all replicas, put together. A dense sum
    would be another training than one device's, as Keras' optimizers square each of the rows that an index has
    (keras 3.15, optimizers/adam.py: the second moment of a word is the sum of the squares of its occurrences), and for
    a large table it would send mostly zeros. But where the indices are the same on every replica, as those of the
    positions in a sentence are, one device has each of them once, with the sum of all rows as its gradient: then the
    values are added up.

    Args:
        shapes: the static one of each gradient.
    """
    sparse = {index for index, gradient in enumerate(gradients) if isinstance(gradient, tf.IndexedSlices)}
    dense = [index for index in range(len(gradients)) if index not in sparse]
    totals = sum_in_buckets(
        wire, [gradients[index] for index in dense], [shapes[index] for index in dense], packing, witnessed=True
    )
    by_index = dict(zip(dense, totals, strict=True))
    return [
        _sparse(wire, gradient, shapes[index], packing.dtype) if index in sparse else by_index[index]
        for index, gradient in enumerate(gradients)
    ]


def _sparse(wire: Wire, gradient: tf.IndexedSlices, shape: Any, dtype: str | None) -> tf.IndexedSlices:
    values = tf.ensure_shape(gradient.values, [None, *shape[1:]])
    sent = tf.cast(values, dtype) if dtype else values
    indices = gradient.indices
    if wire.alike(indices):
        (rows,) = wire.sum([sent], "values")
    else:
        (rows,) = wire.gather([sent], "rows")
        (indices,) = wire.gather([indices], "indices")
    return tf.IndexedSlices(tf.cast(rows, values.dtype), indices, tf.constant(list(shape), indices.dtype))


def sum_in_buckets(
    wire: Wire,
    tensors: Sequence[Any],
    shapes: Sequence[Any],
    packing: Packing = AS_THEY_ARE,
    witnessed: bool = False,
) -> list[tf.Tensor]:
    """Inside a step: every dense tensor summed over all replicas. Arguments as of `summed`.

    Args:
        witnessed: leave evidence of the sums on the wire.
    """
    fixed = [tf.ensure_shape(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    sent = [tf.cast(tensor, packing.dtype or tensor.dtype) if tensor.dtype.is_floating else tensor for tensor in fixed]
    slots = [Slot(tuple(tensor.shape), tensor.dtype.name, tensor.dtype.size) for tensor in sent]
    totals: list[Any] = [None] * len(sent)
    for number, bucket in enumerate(plan_buckets(slots, packing.bucket_bytes)):
        flat = tf.concat([tf.reshape(sent[index], [-1]) for index in bucket], axis=0)
        (total,) = wire.sum([flat], name=f"bucket.{number}")
        if witnessed:
            wire.witness(flat, total)
        parts = tf.split(total, [prod(slots[index].shape) for index in bucket])
        for index, part in zip(bucket, parts, strict=True):
            totals[index] = tf.cast(tf.reshape(part, slots[index].shape), fixed[index].dtype)
    return totals


def counted(value: Any, weight: Any) -> Any:
    """A tensor, or the rows of a sparse gradient, times a weight; where that is 0, not even NaN is left."""
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(counted(value.values, weight), value.indices, value.dense_shape)
    return tf.math.multiply_no_nan(value, tf.cast(weight, value.dtype))
