import pytest
import tensorflow as tf

from distfit.training.reduction import Packing, Slot, plan_buckets, sum_in_buckets, summed


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
    """The wire between two replicas that hold the same."""

    def __init__(self):
        self.calls = []
        self.witnessed = []

    def alike(self, tensor):
        return False

    def witness(self, own, total):
        self.witnessed.append((own.numpy().tolist(), total.numpy().tolist()))

    def gather(self, tensors, name):
        self.calls.append((name, [tensor.shape.rank for tensor in tensors]))
        return [tf.concat([tensor, tensor], axis=0) for tensor in tensors]

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
    doubled = sum_in_buckets(backend, tensors, [tensor.shape for tensor in tensors])
    for tensor, double in zip(tensors, doubled, strict=True):
        assert double.dtype == tensor.dtype
        assert double.shape == tensor.shape
        assert (double.numpy() == 2 * tensor.numpy()).all()
    # One flat tensor a collective, one collective a type, named alike on every rank.
    assert backend.calls == [("bucket.0", [1]), ("bucket.1", [1])]


def test_floats_travel_in_the_type_of_the_wire_and_come_back_in_their_own():
    sent = []

    class Noting(_Doubling):
        def sum(self, tensors, name):
            sent.extend(tensor.dtype for tensor in tensors)
            return super().sum(tensors, name)

    tensors = [tf.constant([1.0, 2.0]), tf.constant([3], tf.int64)]
    doubled = sum_in_buckets(Noting(), tensors, [tensor.shape for tensor in tensors], Packing("float16"))
    assert sorted(dtype.name for dtype in sent) == ["float16", "int64"]
    assert [tensor.dtype for tensor in doubled] == [tf.float32, tf.int64]
    assert doubled[0].numpy().tolist() == [2.0, 4.0]


def test_a_sparse_gradient_keeps_the_rows_of_all_replicas():
    """Added up, two occurrences of a word would be one, whose square Keras' Adam does not take."""
    wire = _Doubling()
    sparse = tf.IndexedSlices(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([4, 4]), tf.constant([9, 2]))
    dense = tf.ones([3])
    first, gathered = summed(wire, [dense, sparse], [(3,), (9, 2)])
    assert first.numpy().tolist() == [2.0] * 3
    assert wire.witnessed == [([1.0] * 3, [2.0] * 3)]
    assert isinstance(gathered, tf.IndexedSlices)
    assert gathered.indices.numpy().tolist() == [4] * 4
    assert gathered.values.numpy().tolist() == [[1.0, 2.0], [3.0, 4.0]] * 2
    assert tf.convert_to_tensor(gathered).shape == (9, 2)
    assert wire.calls == [("bucket.0", [1]), ("rows", [2]), ("indices", [1])]


def test_a_sparse_gradient_of_the_same_indices_everywhere_is_added_up():
    """Of the positions in a sentence, say, one device has each index once."""

    class Knowing(_Doubling):
        def alike(self, tensor):
            return True

    sparse = tf.IndexedSlices(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([0, 1]), tf.constant([9, 2]))
    (total,) = summed(Knowing(), [sparse], [(9, 2)])
    assert total.values.numpy().tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert total.indices.numpy().tolist() == [0, 1]
