import pytest
import tensorflow as tf

from distfit.training.reduction import Slot, plan_buckets, sum_in_buckets


def _slots(*sizes, dtype="float32", itemsize=4):
    return [Slot((size,), dtype, itemsize) for size in sizes]


@pytest.mark.parametrize("limit", [4, 8, 40, 1000])
def test_every_tensor_travels_once_from_last_to_first_within_the_limit(limit):
    slots = _slots(1, 5, 2, 2, 9, 1)
    buckets = plan_buckets(slots, limit)
    assert [index for bucket in buckets for index in bucket] == list(reversed(range(len(slots))))
    for bucket in buckets:
        assert len(bucket) == 1 or sum(slots[index].nbytes for index in bucket) <= limit


def test_types_do_not_mix():
    slots = [*_slots(1), *_slots(1, dtype="float64", itemsize=8), *_slots(1)]
    assert plan_buckets(slots, 1000) == [[2, 0], [1]]


def test_nothing_to_sum_is_no_bucket():
    assert plan_buckets([]) == []


class _Doubling:
    """Two replicas that hold the same."""

    def __init__(self):
        self.calls = []

    def sum(self, tensors, name):
        self.calls.append((name, [tensor.shape.rank for tensor in tensors]))
        return [2 * tensor for tensor in tensors]


def test_tensors_come_back_in_their_place_and_shape():
    backend = _Doubling()
    tensors = [
        tf.reshape(tf.range(6.0), [2, 3]),
        tf.constant(7.0),
        tf.cast(tf.range(4), tf.float64),
        tf.zeros([0]),
    ]
    summed = sum_in_buckets(backend, tensors)
    for tensor, double in zip(tensors, summed, strict=True):
        assert double.dtype == tensor.dtype
        assert double.shape == tensor.shape
        assert (double.numpy() == 2 * tensor.numpy()).all()
    # One flat tensor a collective, one collective a type, named alike on every rank.
    assert backend.calls == [("bucket.0", [1]), ("bucket.1", [1])]
