"""Images and targets out of serialized Examples, as TensorFlow parses them, and what is wrong by row."""

import numpy as np
import pytest
import tensorflow as tf

from distfit.data.image_examples import fixed, parsed_images


def example(**features):
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def image(value=b"pixels"):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def wholes(*values):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def floats(*values):
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        (tf.io.FixedLenFeature([], tf.int64), [wholes(3), wholes(-1)]),
        (tf.io.FixedLenFeature([2, 2], tf.float32), [floats(1, 2, 3, 4), floats(0.1, 0, 0, 5)]),
        (tf.io.FixedLenFeature([], tf.string), [image(b"cat"), image(b"a longer word")]),
        (tf.io.FixedLenFeature([], tf.int64, default_value=7), [wholes(3), None]),
        (tf.io.FixedLenFeature([3], tf.int64, default_value=[1, 2, 3]), [None, wholes(4, 5, 6)]),
    ],
)
def test_targets_are_those_of_tensorflow(spec, features):
    strings = [example(image=image(), **({} if one is None else {"y": one})) for one in features]
    encoded, targets, wrong = parsed_images(strings, "image", fixed("y", spec))
    assert encoded.tolist() == [b"pixels", b"pixels"]
    assert np.array_equal(targets, tf.io.parse_example(strings, {"y": spec})["y"].numpy())
    assert wrong == {}


def test_what_is_wrong_is_told_by_row():
    strings = [
        example(image=image(), y=wholes(5)),
        b"\xff no example",
        example(y=wholes(5)),
        example(image=image()),
        example(image=image(), y=floats(5)),
        example(image=image(), y=wholes(5, 6)),
        example(image=wholes(1), y=wholes(5)),
    ]
    spec = fixed("y", tf.io.FixedLenFeature([], tf.int64))
    encoded, targets, wrong = parsed_images(strings, "image", spec)
    assert (encoded[0], targets[0]) == (b"pixels", 5)
    assert list(wrong) == [1, 2, 3, 4, 5, 6]
    assert "without a feature 'image'" in wrong[2]
    assert "without a feature 'y'" in wrong[3]
    assert "1 values of float32, not 1 of int64" in wrong[4]
    assert "2 values of int64, not 1" in wrong[5]


def test_without_a_target_there_is_none():
    assert parsed_images([example(image=image())], "image", None)[1] is None
