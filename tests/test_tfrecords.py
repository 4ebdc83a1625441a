"""TFRecords as training data: the rows of each process, whatever reads them."""

import gc
import os
import re

import numpy as np
import pytest

from distfit.data import plan, records
from distfit.data.files import expand
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError, RunError

RECORDS = 23
IN_FILES = plan.Order(RECORDS, shuffle=False)


def example_of(number):
    import tensorflow as tf

    feature = {
        "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
        "some": tf.train.Feature(float_list=tf.train.FloatList(value=[number] * (number % 4))),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


@pytest.fixture
def folder(tmp_path):
    """23 records in three files of unequal length; record n has id n and n % 4 values."""
    for shard, numbers in enumerate((range(0, 4), range(4, 15), range(15, RECORDS))):
        name = tmp_path / f"train-{shard:05d}-of-00003.tfrecord"
        records.write_records(name, [example_of(number) for number in numbers])
    return tmp_path


def features():
    import tensorflow as tf

    return {"id": tf.io.FixedLenFeature([], tf.int64), "some": tf.io.VarLenFeature(tf.float32)}


def id_and_length(example):
    """The length of the dense row shows whether a record sees its neighbours."""
    import tensorflow as tf

    return example["id"], tf.size(tf.sparse.to_dense(example["some"]))


def source_of(folder, **arguments):
    return TFRecords(folder, features(), id_and_length, **arguments)


def steps_of(source, order, global_batch, **place):
    return [
        (int(rows), int(origin), data)
        for rows, origin, data in source.process_batches(order=order, global_batch=global_batch, **place)
    ]


@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (2, 1), (3, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("global_batch", [4, 11, 22, 64])
def test_the_processes_together_read_every_record_once_in_order(folder, size, replicas, global_batch):
    order = plan.Order(RECORDS, seed=1, epoch=0)
    source = source_of(folder)
    read = [
        steps_of(source, order, global_batch, rank=rank, size=size, replicas_per_process=replicas)
        for rank in range(size)
    ]
    seen = []
    for shares in zip(*read, strict=True):
        for rank, (rows, origin, (ids, lengths)) in enumerate(shares):
            start, stop = plan.process_bounds(rows, rank, size, replicas)
            assert len(ids) == max(1, stop - start)
            assert origin == (start if stop > start else 0)
            np.testing.assert_array_equal(lengths, ids % 4)
            seen += ids.numpy().tolist()[: stop - start]
    assert seen == order.positions(0, RECORDS).tolist()


def test_the_number_of_workers_changes_nothing(folder):
    order = plan.Order(RECORDS, seed=2, epoch=0)
    one, many = (
        [data[0].numpy().tolist() for _, _, data in steps_of(source_of(folder, workers=workers), order, 5)]
        for workers in (1, 8)
    )
    assert one == many


def test_the_cores_are_divided_among_the_processes_of_a_host(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    source = TFRecords("nowhere")
    assert [source.workers_of(processes) for processes in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert TFRecords("nowhere", workers=5).workers_of(8) == 5


def test_steps_can_be_left_out_and_the_rest_is_the_same(folder):
    order = plan.Order(RECORDS, seed=2, epoch=0)
    source = source_of(folder)
    whole = [data[0].numpy().tolist() for _, _, data in steps_of(source, order, 5)]
    for first_step in (1, 3, 4):
        rest = [data[0].numpy().tolist() for _, _, data in steps_of(source, order, 5, first_step=first_step)]
        assert rest == whole[first_step:]


def test_a_first_step_behind_the_end_is_refused(folder):
    with pytest.raises(InputError, match="below the epoch's 5 steps, received 5"):
        source_of(folder).process_batches(order=IN_FILES, global_batch=5, first_step=5)


def test_the_spec_is_that_of_the_batches_and_reads_nothing(folder):
    source = source_of(folder)
    dataset = source.process_batches(order=IN_FILES, global_batch=4)
    rows, origin, data = dataset.element_spec
    assert (rows.shape, rows.dtype, origin.shape, origin.dtype) == ((), "int64", (), "int64")
    assert data == source.element_spec
    assert [spec.shape.as_list() for spec in data] == [[None], [None]]
    assert TFRecords("nowhere", features(), id_and_length).element_spec == data


def test_without_a_transform_the_parsed_dict_is_x(folder):
    import tensorflow as tf

    source = TFRecords(folder, {"id": tf.io.FixedLenFeature([], tf.int64)})
    (_, _, data), *_ = steps_of(source, IN_FILES, 3)
    assert data["id"].numpy().tolist() == [0, 1, 2]


def test_without_features_the_transform_gets_the_record(folder):
    import tensorflow as tf

    source = TFRecords(folder, transform=lambda record: (record, tf.strings.length(record), 1.0))
    (_, _, (record, length, weight)), *_ = steps_of(source, IN_FILES, 2)
    assert record.numpy().tolist() == [example_of(0), example_of(1)]
    assert length.numpy().tolist() == [len(example_of(0)), len(example_of(1))]
    assert weight.numpy().tolist() == [1.0, 1.0]


def test_what_another_process_found_is_used_instead_of_a_look_at_the_files(folder):
    found = source_of(folder).find()
    source = TFRecords("nowhere", features(), id_and_length)
    source.use(found)
    assert source.find() is found
    assert source.records == RECORDS
    assert len(steps_of(source, IN_FILES, 5)) == 5


def test_making_one_reads_nothing_and_the_first_use_does():
    source = TFRecords("nowhere/train-*", features(), id_and_length, batch_size=4, seed=3)
    assert (source.batch_size, source.seed) == (4, 3)
    with pytest.raises(InputError, match="nowhere"):
        source.find()


def open_files():
    gc.collect()
    return [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]


def test_each_file_is_open_once_over_epochs_and_closed_at_the_end(folder):
    source = source_of(folder)
    for epoch in range(4):
        order = plan.Order(RECORDS, seed=0, epoch=epoch)
        assert len(steps_of(source, order, 5)) == 5
        held = [name for name in open_files() if name.startswith(str(folder))]
        assert sorted(held) == expand(folder)
    source.close()
    assert not [name for name in open_files() if name.startswith(str(folder))]


def test_the_files_close_with_the_source(folder):
    source = source_of(folder)
    steps_of(source, IN_FILES, 5)
    del source
    assert not [name for name in open_files() if name.startswith(str(folder))]


def test_a_dataset_may_outlive_its_source(folder):
    dataset = source_of(folder).process_batches(order=IN_FILES, global_batch=5)
    gc.collect()
    assert [int(rows) for rows, _, _ in dataset] == [5, 5, 5, 5, 3]


def test_few_orders_are_kept_however_many_epochs(folder):
    source = source_of(folder)
    for epoch in range(6):
        steps_of(source, plan.Order(RECORDS, epoch=epoch), 5)
    assert plan._exact.cache_info().currsize <= 4


def damage(folder):
    path = folder / "train-00001-of-00003.tfrecord"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def failure_of(source):
    import tensorflow as tf

    with pytest.raises(tf.errors.OpError) as caught:
        steps_of(source, IN_FILES, 5)
    return source.explain(caught.value)


def test_a_damaged_record_is_an_error_that_names_its_file(folder):
    damage(folder)
    error = failure_of(source_of(folder))
    assert isinstance(error, RunError)
    assert str(error).startswith("Expected a whole record 10 at byte ")
    assert "train-00001-of-00003.tfrecord" in str(error)


def test_a_file_that_another_host_lacks_is_an_error_that_names_it(folder):
    source = source_of(folder)
    source.find()
    (folder / "train-00002-of-00003.tfrecord").unlink()
    error = failure_of(source)
    assert isinstance(error, RunError)
    assert "train-00002-of-00003.tfrecord" in str(error)
    assert "all hosts" in str(error)


def test_a_missing_feature_is_an_error_in_one_paragraph(folder):
    import tensorflow as tf

    error = failure_of(TFRecords(folder, {"label": tf.io.FixedLenFeature([], tf.int64)}))
    assert isinstance(error, RunError)
    assert "Feature: label" in str(error)
    # Two steps are made at a time, and either may be the one that is told of.
    assert re.search(r"received of record \d+ at byte \d+ of '.*/train-0000\d-of-00003.tfrecord': ", str(error))
    assert "\n" not in str(error)


def test_other_errors_are_not_explained_away(folder):
    error = KeyError("mine")
    assert source_of(folder).explain(error) is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": 7}, "files to be .* received int"),
        ({"features": ["id"]}, "features to be a dict .* received list"),
        ({"transform": "decode"}, "transform to be a function .* received str"),
        ({"batch_size": 0}, "batch_size to be a whole number of 1 or more, received 0"),
        ({"batch_size": 2.5}, "batch_size to be .* received 2.5"),
        ({"batch_size": True}, "batch_size to be .* received True"),
        ({"seed": -1}, "seed to be a whole number of 0 or more, received -1"),
        ({"workers": 0}, "workers to be .* received 0"),
        ({"shuffle_window": 1}, "shuffle_window to be .* received 1"),
        ({"bad_records": "ignore"}, 'bad_records to be "raise" or "skip", received .ignore'),
        ({"most_bad": 2}, "most_bad to be a share from 0 to 1, received 2"),
        ({"cache": "gpu"}, 'cache to be "memory", "disk" or None, received .gpu'),
        ({"on_device": "scale"}, "on_device to be Keras layers and functions, received str"),
        ({"sequence_features": ["id"]}, "sequence_features to be a dict .* received list"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        TFRecords(**{"files": "data", **arguments})


def test_a_transform_that_returns_too_much_is_refused(folder):
    source = TFRecords(folder, transform=lambda record: (record, record, record, record))
    with pytest.raises(InputError, match="tuple of 4"):
        source.process_batches(order=IN_FILES, global_batch=5)
