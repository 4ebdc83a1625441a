"""A row is a function of its record and its seed: whatever a user gives as transform, or it is refused."""

import functools
import inspect
import logging
import random

import numpy as np
import pytest

from distfit.data.plan import record_seeds
from distfit.data.transforms import check_transform, row_function
from distfit.errors import InputError

RECORDS = 24
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
RECORD = PICTURE.tobytes()


def seeds_of(epoch=0, records=RECORDS):
    return record_seeds(seed=0, epoch=epoch, records=np.arange(records))


def picture(serialized):
    import tensorflow as tf

    return tf.reshape(tf.io.decode_raw(serialized, tf.uint8), PICTURE.shape)


def rows_of(row, seeds, order=None, at_a_time=1, record=RECORD):
    """The rows in the order of their seeds, made in another order and several at a time."""
    import tensorflow as tf

    order = np.arange(len(seeds)) if order is None else order
    made = tf.data.Dataset.from_tensor_slices(seeds[order]).map(
        lambda seed: row(tf.constant(record), seed), num_parallel_calls=at_a_time
    )
    rows = list(made.as_numpy_iterator())
    return [rows[position] for position in np.argsort(order)]


def assert_equal(left, right):
    import tensorflow as tf

    for one, other in zip(tf.nest.flatten(left), tf.nest.flatten(right), strict=True):
        np.testing.assert_array_equal(one, other)


def distinct(rows):
    return len({np.asarray(row).tobytes() for row in rows})


# What it cannot be made without, and what would let most rows pass unchanged.
ARGUMENTS = {
    "AlphaDropout": {"rate": 0.5},
    "Dropout": {"rate": 0.5},
    "GaussianDropout": {"rate": 0.5},
    "GaussianNoise": {"stddev": 1.0},
    "RandomBrightness": {"factor": 0.5},
    "RandomColorDegeneration": {"factor": 0.5},
    "RandomColorJitter": {"brightness_factor": 0.5, "hue_factor": 0.5},
    "RandomContrast": {"factor": 0.5},
    "RandomCrop": {"height": 6, "width": 6},
    "RandomHue": {"factor": 0.5},
    "RandomPosterization": {"factor": 4},
    "RandomRotation": {"factor": 0.5},
    "RandomSaturation": {"factor": 0.5},
    "RandomSharpness": {"factor": 0.5},
    "RandomShear": {"x_factor": 0.5, "y_factor": 0.5},
    "RandomTranslation": {"height_factor": 0.5, "width_factor": 0.5},
    "RandomZoom": {"height_factor": 0.5},
    "Solarization": {"addition_factor": 0.5, "threshold_factor": 0.5},
    "SpatialDropout1D": {"rate": 0.5},
    "SpatialDropout2D": {"rate": 0.5},
    "SpatialDropout3D": {"rate": 0.5},
}
REFUSED = {"AugMix": "Python's `random`", "CutMix": "on_device=", "MixUp": "on_device="}
SHAPES = {"SpatialDropout1D": (36, 12), "SpatialDropout3D": (6, 6, 4, 3)}


def random_layers():
    """Every layer of Keras that draws random numbers and learns nothing, by the rooms of Keras' source it is in."""
    import keras

    classes = {name: thing for name, thing in vars(keras.layers).items() if inspect.isclass(thing)}
    return sorted(
        name
        for name, one in classes.items()
        if (".preprocessing." in one.__module__ or ".regularization." in one.__module__)
        and "seed" in inspect.signature(one.__init__).parameters
    )


def layer_of(name):
    import keras

    return getattr(keras.layers, name)(**ARGUMENTS.get(name, {}))


def pictures_of(name):
    """A function that makes what the layer takes."""
    import tensorflow as tf

    shape = SHAPES.get(name, PICTURE.shape)
    return lambda serialized: tf.cast(tf.reshape(picture(serialized), shape), tf.float32)


@pytest.mark.parametrize("name", random_layers())
def test_every_random_layer_of_keras_repeats_or_is_refused_by_name(name):
    if name in REFUSED:
        with pytest.raises(InputError, match=f"{name}.*{REFUSED[name]}"):
            row_function(transform=[pictures_of(name), layer_of(name)])
        return
    seeds = seeds_of(records=16)
    rows = rows_of(row_function(transform=[pictures_of(name), layer_of(name)]), seeds)
    # Another process has layers with other random streams, and makes the rows in another order.
    elsewhere = row_function(transform=[pictures_of(name), layer_of(name)])
    order = np.random.default_rng(1).permutation(len(seeds))
    assert_equal(rows, rows_of(elsewhere, seeds, order, at_a_time=4))
    assert distinct(rows) > 1


def test_the_random_layers_are_found():
    assert {"RandomFlip", "RandAugment", "MixUp", "Dropout", "Solarization"} <= set(random_layers())
    assert set(REFUSED) | set(ARGUMENTS) <= set(random_layers())


@pytest.mark.parametrize("name", ["Dropout", "RandAugment", "RandomColorDegeneration", "RandomFlip"])
def test_random_layers_do_nothing_in_an_evaluation(name):
    make = pictures_of(name)
    row = row_function(transform=[make, layer_of(name)], training=False)
    assert_equal(rows_of(row, seeds_of(records=2)), [make(RECORD).numpy()] * 2)


def augmentations():
    """Layers and functions that draw, of several kinds."""
    import keras
    import tensorflow as tf

    def noisy(example, seed):
        shift = tf.random.stateless_uniform([], seed, -9.0, 9.0)
        return example + shift, tf.cond(shift > 0, lambda: keras.random.uniform([]), lambda: -keras.random.normal([]))

    crop = keras.Sequential([keras.layers.RandomCrop(8, 8), keras.layers.RandomContrast(0.5)])
    return [picture, keras.layers.Pipeline([keras.layers.Rescaling(1 / 255), crop]), noisy]


def test_rows_do_not_depend_on_order_batches_or_threads():
    import tensorflow as tf

    row, seeds = row_function(transform=augmentations()), seeds_of()
    rows = rows_of(row, seeds)
    assert_equal(rows, rows_of(row, seeds, np.random.default_rng(2).permutation(RECORDS), at_a_time=4))
    # Two ranks, each with a graph of its own and a part of the records.
    for rank in range(2):
        own = row_function(transform=augmentations())
        assert_equal(rows[rank::2], rows_of(own, seeds[rank::2], at_a_time=2))
    whole = tf.data.Dataset.from_tensor_slices(seeds).map(lambda seed: row(RECORD, seed)).batch(7)
    parts = [tf.nest.map_structure(lambda one: one.numpy(), batch) for batch in whole]
    assert_equal([image for image, _ in rows], [image for images, _ in parts for image in images])


def test_records_and_epochs_draw_differently():
    row = row_function(transform=augmentations())
    rows = [number for epoch in range(2) for _, number in rows_of(row, seeds_of(epoch))]
    assert distinct(rows) == 2 * RECORDS


def test_parts_draw_independently_and_evenly():
    import keras
    import tensorflow as tf

    def flipped(image, seed):
        return tf.image.stateless_random_flip_left_right(image, seed)

    marked = np.zeros((12, 12, 3), np.uint8)
    marked[0, 0] = 1
    # Two flips: where the mark ends says what each has drawn; the function flips left and right, the layer up and down.
    row = row_function(transform=[picture, flipped, keras.layers.RandomFlip("vertical")])
    rows = rows_of(row, seeds_of(records=400), record=marked.tobytes())
    corners = [np.argwhere(image[..., 0] > 0)[0].tolist() for image in rows]
    counts = [corners.count(corner) for corner in ([0, 0], [0, 11], [11, 0], [11, 11])]
    # Chi-squared with 3 degrees of freedom, 0.1 %.
    assert sum((count - 100) ** 2 / 100 for count in counts) < 16.3


def test_draws_in_keras_are_evenly_spread():
    import keras

    row = row_function(transform=lambda _: (keras.random.uniform([]), keras.random.uniform([])))
    pairs = np.array(rows_of(row, seeds_of(records=2000)))
    cells = np.histogram2d(*pairs.T, bins=4, range=[[0, 1], [0, 1]])[0]
    # Chi-squared with 15 degrees of freedom, 0.1 %.
    assert ((cells - 125) ** 2 / 125).sum() < 37.7


def test_a_function_gets_the_seed_of_its_record():
    row = row_function(transform=lambda _, seed: seed)
    assert_equal(rows_of(row, seeds_of()), list(seeds_of().view(np.int32)))


@pytest.mark.parametrize("training", [True, False])
def test_a_function_may_ask_whether_it_is_a_training(training):
    import tensorflow as tf

    row = row_function(transform=lambda _, *, training: tf.constant(training), training=training)
    assert rows_of(row, seeds_of(records=1)) == [training]
    assert not row.draws


def test_layers_with_one_seed_do_the_same():
    """An image and its mask are flipped alike in Keras' own tutorial by two layers of one seed."""
    import keras
    import tensorflow as tf

    flips = [keras.layers.RandomFlip("horizontal", seed=7) for _ in range(2)]
    other = keras.layers.RandomFlip("horizontal", seed=8)

    def both(image):
        image = tf.cast(image, tf.float32)
        return flips[0](image), flips[1](image), other(image)

    rows = rows_of(row_function(transform=[picture, both]), seeds_of())
    assert_equal([one for one, _, _ in rows], [two for _, two, _ in rows])
    assert distinct([one - three for one, _, three in rows]) > 1


def test_an_image_and_its_mask_are_augmented_alike():
    import keras
    import tensorflow as tf

    def with_mask(serialized):
        image = picture(serialized)
        return {"images": image, "segmentation_masks": image[..., :1]}

    layers = [
        keras.layers.RandomFlip("horizontal_and_vertical"),
        keras.layers.RandomRotation(0.5, "reflect", "nearest"),
    ]
    back = [lambda both: (both["images"], tf.cast(both["segmentation_masks"], tf.uint8))]
    rows = rows_of(row_function(transform=[with_mask, *layers, *back]), seeds_of())
    assert_equal([image[..., :1] for image, _ in rows], [mask for _, mask in rows])
    assert distinct([mask for _, mask in rows]) > 2


def test_a_layer_is_applied_to_x_alone():
    import keras
    import tensorflow as tf

    def three(serialized):
        return picture(serialized), tf.constant(255.0), tf.constant(0.5)

    row = row_function(transform=[three, keras.layers.Rescaling(1 / 255)])
    x, y, weight = rows_of(row, seeds_of(records=1))[0]
    np.testing.assert_allclose(x, PICTURE / 255, rtol=1e-6)
    assert (y, weight) == (255.0, 0.5)


def test_layers_that_make_constants_serve_training_and_evaluation():
    """In the graph that builds it, Keras' Normalization makes tensors that the next graph cannot use."""
    import keras

    layer = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])
    for training in (True, False):
        row = row_function(transform=[picture, layer], training=training)
        np.testing.assert_allclose(
            rows_of(row, seeds_of(records=1))[0], (PICTURE - [1.0, 2.0, 3.0]) / [1.0, 2.0, 3.0], rtol=1e-5
        )


def test_what_comes_before_the_first_draw_is_steady():
    import keras
    import tensorflow as tf

    pipeline = keras.layers.Pipeline(
        [keras.layers.Resizing(4, 4), keras.layers.RandomFlip(), keras.layers.Rescaling(2)]
    )
    row = row_function(transform=[picture, pipeline])
    assert row.draws
    assert row.steady_spec == tf.TensorSpec([4, 4, 3], tf.float32)
    kept, seeds = row.steady(RECORD), seeds_of()
    assert_equal([row.finish(kept, seed).numpy() for seed in seeds], rows_of(row, seeds))
    nothing_drawn = row_function(transform=[picture, keras.layers.Resizing(4, 4)])
    assert not nothing_drawn.draws
    assert nothing_drawn.steady_spec == row.steady_spec


def test_python_conditions_on_tensors_work_as_in_a_map():
    def brighter(serialized):
        image = picture(serialized)
        if image[0, 0, 0] == 0:  # it is not, but only TensorFlow knows
            image += 1
        return image

    assert_equal(rows_of(row_function(transform=brighter), seeds_of(records=1)), [PICTURE])


def test_a_row_function_may_be_made_where_it_is_first_needed():
    """Within one epoch's graph of tf.data; the next epoch's uses the same."""
    import keras
    import tensorflow as tf

    def brighter(serialized):
        image = picture(serialized)
        if image[0, 0, 0] == 0:
            image += 1
        return image

    layers = [keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0]), keras.layers.RandomFlip()]
    made = functools.cache(lambda: row_function(transform=[brighter, *layers]))

    def row(seed):
        return made()(tf.constant(RECORD), seed)

    first, second = (list(tf.data.Dataset.from_tensor_slices(seeds_of()).map(row)) for _ in range(2))
    assert_equal(first, second)
    assert_equal(first, rows_of(row_function(transform=[brighter, *layers]), seeds_of()))


def test_without_transform_the_record_comes_as_it_is():
    assert rows_of(row_function(), seeds_of(records=1), record=b"as it is") == [b"as it is"]


def stateful(tf, keras):
    """What a row must not do, by a name: the operation that is to be named, and a function that does it."""
    generator = tf.random.Generator.from_seed(1)
    variable = tf.Variable(0.0)
    table = tf.lookup.experimental.MutableHashTable(tf.int32, tf.int32, 0)
    learning = keras.layers.BatchNormalization()
    learning.build((1, 12, 12, 3))
    some = tf.random.normal
    some_numbers = lambda draw: tf.data.Dataset.range(1).map(draw).get_single_element()  # noqa: E731
    return {
        "at once": ("RandomUniform", lambda image: tf.random.uniform([])),
        "branch": ("RandomStandardNormal", lambda image: tf.cond(tf.size(image) > 0, lambda: some([]), lambda: 0.0)),
        "map": ("TruncatedNormal", lambda image: tf.map_fn(lambda x: tf.random.truncated_normal([]), tf.zeros([3]))),
        "loop": ("RandomGamma", lambda image: tf.while_loop(lambda x: x < 1, lambda x: tf.random.gamma([], 1), [0.0])),
        "function": ("RandomUniform", tf.function(lambda image: tf.image.random_flip_left_right(image))),
        "dataset": ("RandomUniform", lambda image: some_numbers(lambda _: tf.random.uniform([]))),
        "generator": ("RngReadAndSkip", lambda image: generator.uniform([])),
        "shuffle": ("RandomShuffle", lambda image: tf.random.shuffle(image)),
        "categorical": ("Multinomial", lambda image: tf.random.categorical([[0.0, 1.0]], 1)),
        "TensorFlow's own": ("RandomUniform", tf.image.random_flip_left_right),
        "seeded": ("SampleDistortedBoundingBox", lambda image: tf.image.sample_distorted_bounding_box(
            [12, 12, 3], tf.zeros([1, 1, 4]), seed=1)[0]),
        "counter": ("AssignAddVariableOp", lambda image: variable.assign_add(1.0)),
        "table": ("LookupTableInsertV2", lambda image: (table.insert([1], [1]), image)[1]),
        "moving mean": ("AssignVariableOp", lambda image: learning(tf.cast(image, tf.float32)[None], training=True)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "what",
    ["at once", "branch", "map", "loop", "function", "dataset", "generator", "shuffle", "categorical"]
    + ["TensorFlow's own", "seeded", "counter", "table", "moving mean"],
)
def test_what_depends_on_other_records_is_refused_by_operation_and_line(what):
    import keras
    import tensorflow as tf

    cases = stateful(tf, keras)
    assert what in cases
    operation, function = cases[what]
    with pytest.raises(InputError, match=f"received the operation {operation}.*test_transform.py, line"):
        row_function(transform=[picture, function])


def test_every_stateful_random_operation_of_tensorflow_is_known():
    """All that take a seed as an attribute, or are of a generator; lookups, queues and datasets are none."""
    import tensorflow as tf
    from tensorflow.python.framework import op_def_registry

    from distfit.data.transforms.purity import is_stateful_random

    definitions = filter(None, map(op_def_registry.get, dir(tf.raw_ops)))
    found = {one.name for one in definitions if is_stateful_random(one)}
    assert {"RandomUniform", "Multinomial", "RngReadAndSkip", "StatefulStandardNormalV2"} <= found
    assert {"UniformCandidateSampler", "RandomShuffle", "StatefulRandomBinomial", "NonDeterministicInts"} <= found
    # What is asked for by name alone, without a seed, has no other kin.
    assert {
        name for name in found if not any(word in name for word in ("Random", "Stateful", "Sampl", "Rng", "CudnnRNN"))
    } == {
        "Multinomial",
        "NonDeterministicInts",
        "ParameterizedTruncatedNormal",
        "TruncatedNormal",
    }
    assert not {"LookupTableFindV2", "PyFunc", "StatelessRandomUniformV2", "ReadVariableOp"} & found


def test_tables_are_no_random_numbers():
    import keras

    row = row_function(transform=[keras.layers.StringLookup(vocabulary=["yes", "no"])])
    assert rows_of(row, seeds_of(records=1), record=b"no") == [2]


@pytest.mark.parametrize("loop", ["tf.map_fn", "for", "tf.function"])
def test_draws_in_a_loop_would_be_the_same_and_are_refused(loop):
    import keras
    import tensorflow as tf

    def in_map(image):
        return tf.map_fn(lambda x: x + keras.random.uniform([]), tf.zeros([3]))

    def in_for(image):
        total = 0.0
        for _ in tf.range(3):
            total += keras.random.uniform([])
        return total

    transform = {"tf.map_fn": in_map, "for": in_for, "tf.function": tf.function(lambda image: keras.random.normal([]))}
    with pytest.raises(InputError, match="every turn would draw the same"):
        row_function(transform=[picture, transform[loop]])


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: np.random.default_rng().uniform()], ids=["random", "numpy", "own"]
)
def test_pythons_own_random_numbers_are_refused(draw):
    with pytest.raises(InputError, match=r"part 2, .*runs once, when it is traced"):
        row_function(transform=[picture, lambda image: image * int(9 * draw())])


def test_layers_that_are_made_in_each_call_are_refused_in_words():
    import keras

    with pytest.raises(InputError, match=r"part 2, .*layers and variables that were made before it"):
        row_function(transform=[picture, lambda image: keras.layers.RandomFlip()(image)])


def test_a_function_may_build_its_layers_when_it_is_first_called():
    import keras
    import tensorflow as tf

    made = []

    def embedded(image):
        if not made:
            made.append(keras.layers.Dense(3, kernel_initializer="ones"))
        return made[0](tf.cast(image[None], tf.float32))[0]

    (row,) = rows_of(row_function(transform=[picture, embedded]), seeds_of(records=1))
    np.testing.assert_allclose(row[..., 0], PICTURE.sum(-1))


def test_python_in_a_row_is_said_once(caplog):
    import tensorflow as tf

    def doubled(image):
        return tf.ensure_shape(tf.numpy_function(lambda one: 2 * one, [image], tf.uint8), image.shape)

    with caplog.at_level(logging.WARNING, "distfit"):
        for _ in range(2):
            row = row_function(transform=[picture, doubled])
    assert [record.message.count("calls Python (PyFunc") for record in caplog.records] == [1]
    assert_equal(rows_of(row, seeds_of(records=1)), [2 * PICTURE])


def test_tracing_leaves_keras_as_it_was():
    import keras

    keras.utils.set_random_seed(3)
    expected = [float(keras.random.uniform([])), random.random(), float(keras.random.uniform([]))]
    keras.utils.set_random_seed(3)
    layer = keras.layers.RandomContrast(0.5, seed=1)
    before = layer.generator.state.numpy()
    first = float(keras.random.uniform([]))
    row_function(transform=[picture, layer, lambda image: keras.random.dropout(image, 0.5)])
    assert [first, random.random(), float(keras.random.uniform([]))] == expected
    np.testing.assert_array_equal(layer.generator.state.numpy(), before)
    assert keras.random.SeedGenerator.next.__module__.startswith("keras.")


@pytest.mark.parametrize(
    ("transform", "received"),
    [
        (3, "int"),
        ("flip", "str"),
        ([len, None], "NoneType"),
        (dict, "the class dict"),
    ],
)
def test_what_is_no_transform_is_refused_before_tensorflow_starts(transform, received):
    with pytest.raises(InputError, match=f"a Keras preprocessing layer, a list of them, or None, received {received}"):
        check_transform(transform)


@pytest.mark.parametrize("function", [lambda: 1, lambda image, label: 1, lambda *, seed: 1, lambda **more: 1])
def test_functions_of_something_else_are_refused(function):
    with pytest.raises(InputError, match=r"to take one record.*received .*lambda"):
        row_function(transform=function)


def test_functions_with_other_parameters_given_are_taken():
    import tensorflow as tf

    def scaled(image, by, seed, offset=1):
        return tf.cast(image, tf.int32) * by + offset + 0 * seed[0]

    row = row_function(transform=[picture, functools.partial(scaled, by=2)])
    assert_equal(rows_of(row, seeds_of(records=1)), [2 * PICTURE.astype(int) + 1])


def test_a_dict_without_images_is_refused_for_image_layers():
    import keras
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    with pytest.raises(InputError, match=r"a dict of 'image'\. Put a function before it"):
        row_function(features, transform=keras.layers.RandomFlip())


def test_a_layer_that_needs_a_known_size_says_so():
    import keras
    import tensorflow as tf

    def unsized(serialized):
        return tf.io.decode_png(serialized, channels=3)

    with pytest.raises(InputError, match=r"RandomCrop.*shape \(None, None, 3\).*known shape before it"):
        row_function(transform=[unsized, keras.layers.RandomCrop(4, 4)])


def test_equal_names_of_context_and_sequences_are_refused():
    import tensorflow as tf

    one, many = tf.io.FixedLenFeature([], tf.int64), tf.io.FixedLenSequenceFeature([], tf.int64)
    with pytest.raises(InputError, match="received 'a', 'c' in both"):
        row_function({"a": one, "b": one, "c": one}, {"c": many, "a": many})


def example_of(**values):
    import tensorflow as tf

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=np.ravel(value)))

    features = tf.train.Features(feature={name: feature(value) for name, value in values.items()})
    return tf.train.Example(features=features)


def only_row(row, record):
    return rows_of(row, seeds_of(records=1), record=record.SerializeToString())[0]


def test_numbers():
    import keras
    import tensorflow as tf

    row = row_function(
        {"inputs": tf.io.FixedLenFeature([3], tf.float32), "quality": tf.io.FixedLenFeature([], tf.float32)},
        transform=[
            lambda example: (example["inputs"], example["quality"]),
            keras.layers.Normalization(mean=5.0, variance=4.0),
        ],
    )
    inputs, quality = only_row(row, example_of(inputs=[5.0, 7.0, 3.0], quality=0.5))
    np.testing.assert_allclose(inputs, [0, 1, -1])
    assert quality == 0.5


def test_text():
    import keras
    import tensorflow as tf

    row = row_function(
        {"text": tf.io.FixedLenFeature([], tf.string), "stars": tf.io.FixedLenFeature([], tf.int64)},
        transform=[
            lambda example: (example["text"], example["stars"]),
            keras.layers.TextVectorization(vocabulary=["good", "bad", "film"], output_sequence_length=4),
        ],
    )
    words, stars = only_row(row, example_of(text=b"A good film!", stars=5))
    # 0 pads, 1 is a word that is not in the vocabulary.
    assert words.tolist() == [1, 2, 4, 0]
    assert stars == 5


@pytest.mark.parametrize("length", [0, 3, 9])
def test_sequences_padded_to_one_length_with_a_mask(length):
    import tensorflow as tf

    def padded(example, length=5):
        steps = example["steps"][:length]
        mask = tf.range(length) < tf.shape(steps)[0]
        steps = tf.pad(steps, [[0, length - tf.shape(steps)[0]], [0, 0]])
        return {"steps": tf.ensure_shape(steps, [length, 2]), "mask": mask}, example["label"]

    steps = np.random.default_rng(0).normal(size=(length, 2)).astype(np.float32)
    lists = {"steps": tf.train.FeatureList(feature=[example_of(x=step).features.feature["x"] for step in steps])}
    record = tf.train.SequenceExample(
        context=example_of(label=1).features, feature_lists=tf.train.FeatureLists(feature_list=lists)
    )
    row = row_function(
        {"label": tf.io.FixedLenFeature([], tf.int64)},
        {"steps": tf.io.FixedLenSequenceFeature([2], tf.float32, allow_missing=True)},
        padded,
    )
    x, label = only_row(row, record)
    kept = min(length, 5)
    np.testing.assert_array_equal(x["steps"], np.concatenate([steps[:5], np.zeros((5 - kept, 2), np.float32)]))
    assert x["mask"].tolist() == [True] * kept + [False] * (5 - kept)
    assert label == 1


def test_sparse_features_pass_through_layers():
    import keras
    import tensorflow as tf

    row = row_function(
        {"words": tf.io.VarLenFeature(tf.string)},
        transform=[
            lambda example: tf.sparse.to_dense(example["words"]),
            keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="multi_hot"),
        ],
    )
    assert only_row(row, example_of(words=b"b")).tolist() == [0, 0, 1]


def test_assertions_are_no_random_numbers():
    import tensorflow as tf

    def checked(example):
        tf.debugging.assert_none_equal(example["id"], tf.constant(20, tf.int64))
        tf.debugging.assert_less(example["id"], tf.constant(50, tf.int64), message="too large")
        return example["id"]

    features = {"id": tf.io.FixedLenFeature([], tf.int64)}
    for _ in range(5):
        assert row_function(features, None, checked).steady_spec.dtype == tf.int64
