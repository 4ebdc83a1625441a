"""Bad records under `bad_records="skip"`: left out of their batch and counted, and never a step more or less."""

from __future__ import annotations

import io

import keras
import numpy as np
import pytest
import tensorflow as tf

import distfit
from distfit import thread_ranks
from distfit.data import bad_records, plan
from distfit.data.reading import Asked
from distfit.data.records import write_records
from distfit.data.tfrecords import TFRecords
from distfit.errors import RunError
from tests.pictures import picture

RECORDS, BATCH = 30, 8
IN_FILES = plan.Order(RECORDS, shuffle=False)


def record(number, damaged=False):
    feature = {} if damaged else {"id": tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def jpeg(seed):
    data = io.BytesIO()
    picture(np.random.default_rng(seed), 0, 3, 24).save(data, "JPEG")
    return data.getvalue()


def write(folder, without_id=(), flipped=()):
    """30 records in two files; some without their feature, some whose payload differs from its checksum."""
    for shard, numbers in enumerate((range(12), range(12, RECORDS))):
        path = folder / f"train-{shard:05d}-of-00002.tfrecord"
        write_records(path, [record(number, number in without_id) for number in numbers])
        data = bytearray(path.read_bytes())
        at = 0
        for number in numbers:
            length = int.from_bytes(data[at : at + 8], "little")
            if number in flipped:
                data[at + 12 + length - 1] ^= 1
            at += 16 + length
        path.write_bytes(data)
    return folder


def source_of(folder, transform=lambda example: example["id"], **options):
    features = {"id": tf.io.FixedLenFeature([], tf.int64)}
    return TFRecords(folder, features, transform, **{"bad_records": "skip", "most_bad": 0.5, **options})


def steps_of(source, size=1, rank=0):
    """For each step the rows that count; and that there is one more row where none does."""
    steps = []
    for rows, origin, ids in source.batches(Asked(0, 0, False, BATCH, (rank, size, 1))):
        assert int(origin) == 0
        assert len(ids) == max(1, int(rows))
        steps.append(ids.numpy().tolist()[: int(rows)])
    return steps


def batches_without(*bad):
    return [[number for number in range(at, min(at + BATCH, RECORDS)) if number not in bad] for at in (0, 8, 16, 24)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bad_records_of_any_kind_leave_the_other_rows_where_they_are(tmp_path, size):
    def transform(example):
        tf.debugging.assert_none_equal(example["id"], tf.constant(20, tf.int64))
        return example["id"]

    folder = write(tmp_path, without_id=[3, 13], flipped=[4])
    sources = [source_of(folder, transform) for _ in range(size)]
    of_ranks = [steps_of(source, size, rank) for rank, source in enumerate(sources)]
    together = [[number for part in step for number in part] for step in zip(*of_ranks, strict=True)]
    assert together == batches_without(3, 4, 13, 20)
    counts = {name: sum(source.tally(True).by_file.get(str(folder / name), 0) for source in sources) for name in NAMES}
    assert counts == {NAMES[0]: 2, NAMES[1]: 2}


NAMES = [f"train-{shard:05d}-of-00002.tfrecord" for shard in range(2)]


def test_a_step_of_bad_records_alone_is_a_step_of_no_rows(tmp_path):
    folder = write(tmp_path, without_id=range(8, 12), flipped=range(12, 16))
    assert steps_of(source_of(folder)) == [[*range(8)], [], [*range(16, 24)], [*range(24, 30)]]


def test_the_rest_of_a_file_that_is_cut_off_is_left_out_and_said(tmp_path):
    folder = write(tmp_path)
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes()[:-3])
    source = source_of(folder)
    source.begin(is_chief=True, training=True)
    assert [number for step in steps_of(source) for number in step] == list(range(RECORDS - 1))
    assert source.tally(True).by_file == {str(path): 1}


def test_too_many_end_the_run(tmp_path):
    source = source_of(write(tmp_path, without_id=[1, 2, 3, 20]), most_bad=0.1)
    with pytest.raises(tf.errors.OpError) as caught:
        steps_of(source)
    error = source.explain(caught.value)
    assert isinstance(error, RunError)
    assert str(error).startswith("Expected at most 10.00% of 30 records to be bad, received 4 in one process.")
    assert any(name in str(error) for name in NAMES)


def test_one_bad_record_of_a_few_is_not_too_many(tmp_path):
    assert len(steps_of(source_of(write(tmp_path, flipped=[29]), most_bad=0.01))) == 4


def test_each_pass_counts_anew(tmp_path):
    source = source_of(write(tmp_path, flipped=[2, 15]), most_bad=0.1)
    for _ in range(3):
        source.begin(is_chief=True, training=True)
        steps_of(source)
    assert source.tally(True).skipped == 6
    assert sum(source.tally(True).by_file.values()) == 2


@pytest.mark.parametrize("kind", ["flipped", "without_id"])
def test_by_default_the_first_one_ends_the_run_and_is_named(tmp_path, kind):
    source = source_of(write(tmp_path, **{kind: [15]}), bad_records="raise")
    with pytest.raises(tf.errors.OpError) as caught:
        list(source.batches(Asked(0, 0, False, BATCH)))
    error = source.explain(caught.value)
    assert isinstance(error, RunError)
    assert (NAMES[1] if kind == "flipped" else "Feature: id") in str(error)


def test_images_that_are_none_are_left_out(tmp_path):
    def example(number):
        image = jpeg(number) if number not in (5, 9) else b"\xff\xd8\xff cut off"
        values = {"image": tf.train.BytesList(value=[image])}
        feature = {name: tf.train.Feature(bytes_list=value) for name, value in values.items()}
        feature["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    write_records(tmp_path / "a.tfrecord", [example(number) for number in range(RECORDS)])
    source = TFRecords(tmp_path, transform=distfit.Images((8, 8)), bad_records="skip", most_bad=0.1)
    steps = [(int(rows), data) for rows, _, data in source.batches(Asked(0, 0, False, BATCH))]
    assert [labels.numpy().tolist()[:rows] for rows, (_, labels) in steps] == batches_without(5, 9)
    assert all(pixels.shape == (rows, 8, 8, 3) for rows, (pixels, _) in steps)
    assert source.tally(True).by_file == {str(tmp_path / "a.tfrecord"): 2}


def test_a_training_reports_them_in_its_metrics_and_at_its_end(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(bad_records, "say", told.append)
    folder = write(tmp_path, flipped=[3, 17])
    data = source_of(folder, lambda example: (tf.cast(example["id"], tf.float32)[None] / 30, 1.0))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    history = distfit.fit(model, data, validation_data=data, batch_size=BATCH, epochs=2, verbose=0, seed=1)
    assert history.history["skipped_records"] == [2.0, 2.0]
    training, validation = told
    assert f"training data left out 2 bad records: 1 of {folder / NAMES[0]}, 1 of {folder / NAMES[1]}" in training
    assert "validation data left out 2 bad records" in validation


def test_a_prediction_needs_all_rows(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    with pytest.raises(distfit.InputError, match="all records in their order to predict on"):
        distfit.predict(model, source_of(write(tmp_path)), verbose=0)


def test_the_weights_are_those_of_the_good_records_alone(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "all").mkdir()
    write(tmp_path / "some", flipped=[0, 8, 16, 24])
    good = [number for number in range(RECORDS) if number % 8]
    write_records(tmp_path / "all" / "a.tfrecord", [record(number) for number in good])

    def weights(folder, batch):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        data = source_of(folder, lambda example: (tf.cast(example["id"], tf.float32)[None] / 30, 1.0))
        distfit.fit(model, data, batch_size=batch, shuffle=False, verbose=0)
        return np.concatenate([one.ravel() for one in model.get_weights()])

    np.testing.assert_allclose(weights(tmp_path / "some", 8), weights(tmp_path / "all", 7), rtol=1e-6)


def weights_and_logs(folder, batch, moments, **options):
    """Of a model with moving statistics, trained two epochs in the order of the files."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(2), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    data = source_of(folder, lambda example: (tf.cast(example["id"], tf.float32)[None] / 30, 1.0), **options)
    kept = distfit.fit(
        model, data, validation_data=data, batch_size=batch, epochs=2, shuffle=False, verbose=0, sync_batch_norm=moments
    )
    return np.concatenate([one.ravel() for one in model.get_weights()]), kept.history


@pytest.mark.slow
def test_a_step_of_bad_records_alone_is_not_run_on_any_number_of_ranks(tmp_path):
    folder = write(tmp_path, without_id=range(8, 12), flipped=range(12, 16))
    found = [
        result
        for ranks in (1, 2)
        for result in thread_ranks.run(lambda: weights_and_logs(folder, 8, True), ranks=ranks)
    ]
    for weights, history in found:
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights, found[0][0], atol=1e-5)
        assert history["skipped_records"] == [8.0, 8.0]
        np.testing.assert_allclose(history["val_loss"], found[0][1]["val_loss"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_too_many_of_all_ranks_end_the_run_on_all(tmp_path, ranks):
    folder = write(tmp_path, without_id=range(2, 30, 3))
    with pytest.raises(RunError, match=r"Expected at most 20.00% of 30 records to be bad, received "):
        thread_ranks.run(lambda: weights_and_logs(folder, 8, False, most_bad=0.2), ranks=ranks)


def test_a_second_training_counts_anew(tmp_path):
    folder = write(tmp_path, flipped=[3])
    data = source_of(folder, lambda example: (tf.cast(example["id"], tf.float32)[None] / 30, 1.0))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for _ in range(2):
        history = distfit.fit(model, data, batch_size=BATCH, epochs=2, verbose=0).history
        assert history["skipped_records"] == [1.0, 1.0]
