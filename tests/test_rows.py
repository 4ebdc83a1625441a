"""Recipes, per-record seeds, caches and what is done on the device, through `distfit.TFRecords` into a training."""

from __future__ import annotations

import io

import keras
import numpy as np
import pytest
import tensorflow as tf

import distfit
from distfit import thread_ranks
from distfit.data import pipeline, plan
from distfit.data.images import decode_rows
from distfit.data.reading import Asked
from distfit.data.records import write_records
from distfit.data.tfrecords import TFRecords
from distfit.monitor import announce
from tests.pictures import picture

RECORDS, BATCH, SIZE = 23, 8, (16, 16)
RANDOM = distfit.Images(SIZE, fit="random_crop", flip="horizontal", jitter=distfit.Jitter())
STEADY = distfit.Images(SIZE, flip="horizontal")


@pytest.fixture(scope="module")
def encoded():
    images = []
    for seed in range(RECORDS):
        data = io.BytesIO()
        picture(np.random.default_rng(seed), seed % 3, 3, 40).save(data, "JPEG")
        images.append(data.getvalue())
    return images


@pytest.fixture(scope="module")
def folder(encoded, tmp_path_factory):
    def example(number):
        feature = {
            "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded[number]])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
        }
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    folder = tmp_path_factory.mktemp("images")
    for shard, numbers in enumerate((range(9), range(9, RECORDS))):
        write_records(folder / f"train-{shard:05d}-of-00002.tfrecord", [example(number) for number in numbers])
    return folder


def rows_of(source, *, epoch=0, size=1, training=True, batch=BATCH):
    """From a record's number to its row, of all ranks."""
    found = {}
    for rank in range(size):
        for rows, _, (pixels, labels) in source.batches(
            Asked(3, epoch, True, batch, (rank, size, 1), first_step=0, training=training)
        ):
            start, stop = plan.process_bounds(int(rows), rank, size)
            found |= dict(zip(labels.numpy()[: stop - start].tolist(), pixels.numpy(), strict=False))
    assert sorted(found) == list(range(RECORDS))
    return found


def same(left, right):
    return all(np.array_equal(left[number], right[number]) for number in range(RECORDS))


@pytest.mark.parametrize("recipe", [RANDOM, STEADY], ids=["random crop", "padded"])
def test_a_record_is_augmented_alike_for_any_ranks_batches_and_workers(folder, encoded, recipe):
    seeds = plan.record_seeds(3, 1, np.arange(RECORDS))
    expected = dict(enumerate(decode_rows(recipe, encoded, seeds, 1)[0]))
    assert same(rows_of(TFRecords(folder, transform=recipe), epoch=1), expected)
    assert same(rows_of(TFRecords(folder, transform=recipe, workers=3), epoch=1, size=3, batch=5), expected)
    assert not same(rows_of(TFRecords(folder, transform=recipe), epoch=2), expected)


def test_images_in_streams_are_those_by_an_index(folder, encoded, tmp_path):
    for path in sorted(folder.glob("*.tfrecord")):
        with tf.io.TFRecordWriter(str(tmp_path / f"{path.name}.gz"), "GZIP") as file:
            for record in tf.data.TFRecordDataset(str(path)):
                file.write(record.numpy())
    recipe = distfit.Images(SIZE, fit="stretch")
    expected = dict(enumerate(decode_rows(recipe, encoded, None, 1)[0]))
    found = {}
    for rows, _, (pixels, labels) in TFRecords(tmp_path, transform=recipe).batches(Asked(3, 0, True, BATCH)):
        assert int(rows) == len(pixels)
        found |= dict(zip(labels.numpy().tolist(), pixels.numpy(), strict=True))
    assert same(found, expected)


def test_a_target_of_varying_length_is_refused(folder):
    features = {"label": tf.io.VarLenFeature(tf.int64)}
    with pytest.raises(distfit.InputError, match=r"target 'label' of distfit\.Images to be a tf\.io\.FixedLenFeature"):
        _ = TFRecords(folder, features, STEADY).element_spec


def test_nothing_is_random_outside_of_training(folder, encoded):
    source = TFRecords(folder, transform=RANDOM)
    centre = distfit.Images(SIZE, fit="center_crop")
    expected = dict(enumerate(decode_rows(centre, encoded, None, 1)[0]))
    assert same(rows_of(source, training=False), expected)
    assert not same(rows_of(source, training=True), expected)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_cached_is_decoded_once_and_has_the_same_bits(folder, where, monkeypatch, tmp_path):
    from distfit.data import rows

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoded = []
    monkeypatch.setattr(
        rows,
        "decode_rows",
        lambda images, some, *rest, **more: (decoded.append(len(some)), decode_rows(images, some, *rest, **more))[1],
    )
    source, plain = TFRecords(folder, transform=STEADY, cache=where), TFRecords(folder, transform=STEADY)
    for epoch in range(3):
        before = sum(decoded)
        cached = rows_of(source, epoch=epoch)
        assert sum(decoded) - before == (RECORDS if epoch == 0 else 0)
        assert same(cached, rows_of(plain, epoch=epoch))
        del decoded[:]
    source.close()
    assert not list(tmp_path.rglob("*distfit-rows*"))


def test_functions_and_layers_share_the_cache_up_to_the_first_random_one(folder, monkeypatch):
    made = []

    def pixels(example):
        tf.py_function(lambda number: made.append(int(number)), [example["label"]], [])
        image = tf.io.decode_jpeg(example["image"], channels=3)
        return tf.image.resize(image, SIZE), example["label"]

    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    transform = [pixels, keras.layers.RandomFlip("horizontal")]
    first, second = (
        rows_of(source, epoch=1) for source in [TFRecords(folder, features, transform, cache="memory")] * 2
    )
    assert sorted(made) == list(range(RECORDS))
    assert same(first, second)
    assert same(first, rows_of(TFRecords(folder, features, transform), epoch=1))


@pytest.mark.slow
def test_ranks_share_a_cache_of_what_is_trained_and_validated_on(folder):
    def losses():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        options = {"standardize": "scale", "flip": "horizontal"}
        data = TFRecords(folder, transform=distfit.Images(SIZE, **options), on_device=of_three_classes, cache="memory")
        runs = [distfit.fit(model, data, validation_data=data, batch_size=BATCH, seed=1, verbose=0) for _ in range(2)]
        data.close()
        return [run.history[name][0] for run in runs for name in ("loss", "val_loss")]

    (one,) = thread_ranks.run(losses, ranks=1)
    for of_rank in thread_ranks.run(losses, ranks=3):
        np.testing.assert_allclose(of_rank, one, rtol=1e-5)


@pytest.mark.parametrize("other", [{"seed": 2}, {"bad_records": "skip"}, {"shuffle_window": 8}])
def test_ranks_that_ask_for_other_records_are_refused(folder, other):
    def train():
        model = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        chosen = {"seed": 1} | (other if distfit.init().rank else {})
        distfit.fit(model, TFRecords(folder, transform=STEADY, **chosen), batch_size=BATCH, verbose=0)

    with pytest.raises(distfit.InputError, match=rf"(?s)the same arguments of distfit.TFRecords.*{next(iter(other))}"):
        thread_ranks.run(train, ranks=2)


def test_an_order_of_your_own_needs_an_index(folder):
    source = TFRecords(folder, transform=STEADY, streaming=True)
    with pytest.raises(distfit.InputError, match="Expected records by an index for an order of your own"):
        source.process_batches(order=plan.Order(RECORDS), global_batch=BATCH)


def test_a_cache_of_random_crops_is_refused(folder):
    with pytest.raises(distfit.InputError, match="the same in every epoch for cache="):
        rows_of(TFRecords(folder, transform=RANDOM, cache="memory"))


def test_no_more_steps_are_read_ahead_than_the_page_says(tmp_path):
    write_records(tmp_path / "many.tfrecord", [b"%d" % number for number in range(400)])
    source = TFRecords(tmp_path, transform=lambda record: tf.strings.to_number(record, tf.int64), workers=4)
    way, read = source._open_way(), []
    original = way.read_each
    way.read_each = lambda numbers: (read.append(len(numbers)), original(numbers))[1]
    batches = iter(source.batches(Asked(0, 0, True, 4)))
    next(batches)
    before = -1
    while before != len(read):  # nobody asks for more: it stops by itself
        before = len(read)
        tf.py_function(lambda: __import__("time").sleep(0.3), [], [])
    assert len(read) <= 1 + pipeline.AHEAD


def model_of(seen):
    class Seeing(keras.layers.Layer):
        """Keeps what the model got."""

        def call(self, x):
            tf.py_function(lambda one: seen.append(one.numpy()), [x], [])
            return x

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((*SIZE, 3)), Seeing(), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=False)
    return model


def of_three_classes(pixels, labels):
    return pixels, labels % 3


def test_pixels_become_numbers_on_the_device_in_training_evaluation_and_prediction(folder, encoded):
    seen = []
    recipe = distfit.Images(SIZE, standardize="scale")
    data = TFRecords(folder, transform=recipe, on_device=of_three_classes)
    assert data.element_spec[0][0].dtype == tf.uint8
    model = model_of(seen)
    expected = decode_rows(recipe, encoded, None, 1)[0] / np.float32(255)
    for call in (distfit.fit, distfit.evaluate, distfit.predict):
        seen.clear()
        call(model, data, batch_size=BATCH, verbose=0, **({"shuffle": False} if call is distfit.fit else {}))
        np.testing.assert_allclose(np.concatenate(seen), expected, rtol=1e-6)


def test_rows_are_mixed_on_the_device_in_training_only(folder):
    seen = []

    def one_hot(pixels, labels):
        return tf.cast(pixels, tf.float32), tf.one_hot(labels % 3, 3)

    data = TFRecords(folder, transform=distfit.Images(SIZE), on_device=[one_hot, keras.layers.MixUp(alpha=1.0)])
    model = model_of(seen)
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    runs = []
    for seed in (1, 1, 2):
        seen.clear()
        distfit.fit(model, data, batch_size=BATCH, shuffle=False, seed=seed, verbose=0)
        runs.append(np.concatenate(seen))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    seen.clear()
    distfit.evaluate(model, data, batch_size=BATCH, verbose=0)
    plain = np.concatenate(seen)
    assert np.array_equal(plain, np.round(plain))
    assert not np.array_equal(runs[0], np.round(runs[0]))


@pytest.mark.slow
def test_a_training_with_augmentation_ends_alike_on_any_number_of_ranks(folder):
    def weights():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((*SIZE, 3))
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        recipe = distfit.Images(SIZE, fit="random_crop", flip="both", standardize="image")
        data = TFRecords(folder, transform=recipe, on_device=of_three_classes)
        distfit.fit(model, data, batch_size=BATCH, epochs=2, seed=4, verbose=0)
        return np.concatenate([one.ravel() for one in model.get_weights()])

    (one,) = thread_ranks.run(weights, ranks=1)
    for of_rank in thread_ranks.run(weights, ranks=3):
        np.testing.assert_allclose(of_rank, one, atol=1e-5)


def test_a_block_shuffle_asks_for_whole_blocks_ahead_and_once(tmp_path, monkeypatch):
    write_records(tmp_path / "many.tfrecord", [b"%d" % number for number in range(400)])
    source = TFRecords(tmp_path, transform=lambda record: tf.strings.to_number(record, tf.int64), shuffle_window=64)
    asked = []
    monkeypatch.setattr(source._open_way()._reader, "will_need", lambda numbers: asked.append(numbers.tolist()))
    read = [number for _, _, numbers in source.batches(Asked(0, 0, True, 16)) for number in numbers.numpy().tolist()]
    order = plan.Order(400, window=64, block=4)
    assert read == order.positions(0, 400).tolist()
    assert sorted(number for window in asked for number in window) == list(range(400))
    assert asked[0] == order.window_of(0).tolist()


@pytest.mark.parametrize(("mixing", "said"), [(keras.layers.MixUp(), True), (keras.layers.Rescaling(1.0), False)])
def test_the_start_of_a_run_says_what_replicas_draw_on_the_device(folder, mixing, said, monkeypatch):
    told = []
    monkeypatch.setattr(announce, "say", told.append)

    def train():
        def one_hot(pixels, labels):
            return tf.cast(pixels, tf.float32), tf.one_hot(labels % 3, 3)

        model = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
        data = TFRecords(folder, transform=distfit.Images(SIZE), on_device=[one_hot, mixing], bad_records="skip")
        distfit.fit(model, data, batch_size=BATCH, verbose=2)

    thread_ranks.run(train, ranks=2)
    assert ("on_device: what is random there" in " ".join(told[0].split())) == said
    assert "Bad records are left out, up to 1.00% of all." in " ".join(told[0].split())
