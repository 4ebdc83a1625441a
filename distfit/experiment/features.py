"""From stored records to what the model gets: decoded images or numbers, and labels.

    reader = Reader.of(config.data, description)
    reader.input_shape                      # without the batch: (224, 224, 3), (13,), or a tree of them
    train = reader.records("train")         # distfit.TFRecords

What a record holds decides: a feature of bytes is an encoded image, any other is taken as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.config import Data, Image
from distfit.data.description import Description, parse_feature
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError, nearest
from distfit.experiment.names import named, running

LABEL = "label"
_TYPES = {"bytes": tf.string, "int64": tf.int64, "float32": tf.float32}

Transform = Callable[..., Any]


@dataclass(frozen=True)
class Reader:
    """How the records of one data set become what the model gets.

    Args:
        data: what the data set says about itself.
        features: what is parsed from a record.
        transform: from a parsed record to (input, label), in TensorFlow operations.
        settings: of the configuration.
    """

    data: Description
    features: dict[str, Any]
    transform: Transform
    settings: Data

    @classmethod
    def of(cls, settings: Data, data: Description) -> Reader:
        """What the configuration asks of this data set.

        Raises:
            InputError: the data have no such feature, their first image cannot be decoded, or the user's
                transform cannot be found.
        """
        features = {name: _spec(name, data) for name in (settings.inputs, LABEL)}
        inputs = _image(settings, data) if features[settings.inputs].dtype == tf.string else _numbers(settings)
        labels = _one_hot(len(data.classes)) if settings.one_hot else _as_stored
        own = _as_stored if settings.transform is None else named("data.transform", settings.transform)

        def transform(example: dict[str, Any]) -> Any:
            return own(inputs(example[settings.inputs]), labels(example[LABEL]))

        return cls(data, features, transform, settings)

    def records(self, split: str) -> TFRecords:
        """A split's records as training data."""
        return TFRecords(self.data.files(split), self.features, self.transform)

    @cached_property
    def specs(self) -> tuple[Any, Any]:
        """The tf.TensorSpecs of (input, label) of one record.

        Raises:
            InputError: the user's transform raises, or returns something else than such a pair.
        """
        stored = {name: tf.TensorSpec(spec.shape, spec.dtype) for name, spec in self.features.items()}
        with running("data.transform", self.settings.transform or self.transform.__module__):
            specs = tf.function(self.transform).get_concrete_function(stored).structured_outputs
        if not isinstance(specs, tuple) or len(specs) != 2:
            raise InputError(
                f"Expected {self.settings.transform} that data.transform names to return (input, label), received "
                f"{type(specs).__name__}. Return a tuple of both."
            )
        return specs

    @property
    def input_shape(self) -> Any:
        """The shape of one input without the batch, or a dict or list of shapes if a transform returns several."""
        return keras.tree.map_structure(lambda spec: tuple(spec.shape), self.specs[0])

    def moments(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each column of the numbers that are stored, over a split, in float64.

        Reads all of it.

        Raises:
            InputError: what is stored are no columns of numbers.
        """
        if self.features[self.settings.inputs].dtype == tf.string:
            raise InputError(
                f"Expected numbers for a model that asks for their mean and variance, received encoded images in "
                f"{self.settings.inputs!r} of {self.data.folder!r}. Give the model's function both in model_options."
            )
        from sklearn.preprocessing import StandardScaler

        rows = tf.data.TFRecordDataset(self.data.files(split)).batch(1024)
        parsed = rows.map(lambda batch: tf.io.parse_example(batch, self.features)[self.settings.inputs])
        columns = StandardScaler()
        for batch in parsed:
            columns.partial_fit(np.asarray(batch, np.float64).reshape(len(batch), -1))
        shape = self.features[self.settings.inputs].shape
        return columns.mean_.reshape(shape), columns.var_.reshape(shape)


def _spec(name: str, data: Description) -> tf.io.FixedLenFeature:
    if name not in data.features:
        field = "data.inputs" if name != LABEL else "the label"
        raise InputError(
            f"Expected {field} to be a feature of the data set in {data.folder!r}, received {name!r}; "
            f"{nearest(name, sorted(data.features))}"
        )
    feature = parse_feature(data.features[name])
    if None in feature.shape:
        raise InputError(
            f"Expected a feature with the same number of values in all records, received {name!r}, "
            f"{data.features[name]}, whose records differ in it. Train on it in a script, with distfit.TFRecords and a "
            "transform that pads it."
        )
    return tf.io.FixedLenFeature(feature.shape, _TYPES[feature.kind])


def _as_stored(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


def _one_hot(classes: int) -> Transform:
    dtype = keras.config.floatx()
    return lambda label: tf.one_hot(label, classes, dtype=dtype)


def _numbers(settings: Data) -> Transform:
    """Real numbers in Keras' type; whole ones stay what they are, as numbers of words or categories."""
    if settings.image != Image():
        raise InputError(
            f"Expected no data.image for the feature {settings.inputs!r}, which is no image, received "
            f"{settings.image}. Leave data.image out, or set data.inputs."
        )
    dtype = keras.config.floatx()
    return lambda values: tf.cast(values, dtype) if values.dtype.is_floating else values


def _image(settings: Data, data: Description) -> Transform:
    """From encoded bytes to pixels of one shape: that of the configuration, or of the first stored image."""
    image, dtype = settings.image, keras.config.floatx()
    shape = _stored_shape(settings, data) if image.size is None else (*image.size, image.channels)

    def pixels(encoded: Any) -> Any:
        decoded = _decode(encoded, image.channels)
        if image.size is not None:
            decoded.set_shape([None, None, image.channels])
            decoded = _FITS[image.fit](decoded, image.size)
        values = tf.cast(tf.ensure_shape(decoded, shape), dtype)
        return tf.cast(tf.image.per_image_standardization(values), dtype) if image.standardise else values / 255

    return pixels


def _crop(pixels: Any, size: tuple[int, int]) -> Any:
    return keras.preprocessing.image.smart_resize(pixels, size)


def _pad(pixels: Any, size: tuple[int, int]) -> Any:
    return tf.image.resize_with_pad(pixels, *size)


_FITS: dict[str, Transform] = {"stretch": tf.image.resize, "pad": _pad, "crop": _crop}


def _decode(encoded: Any, channels: int) -> Any:
    return tf.io.decode_image(encoded, channels=channels, expand_animations=False)


def _stored_shape(settings: Data, data: Description) -> tuple[int, int, int]:
    """(height, width, channels) of the first stored image."""
    split = data.split(settings.train)
    if not split.records:
        raise InputError(f"Expected records in the split {settings.train!r} of {data.folder!r}, received none.")
    files = data.files(settings.train)
    first = next(file for file, shard in zip(files, split.shards, strict=True) if shard.records)
    try:
        record = next(iter(tf.data.TFRecordDataset(first).take(1)))
        features = {settings.inputs: tf.io.FixedLenFeature([], tf.string)}
        encoded = tf.io.parse_single_example(record, features)[settings.inputs]
        height, width, channels = _decode(encoded, settings.image.channels).shape
    except tf.errors.OpError as error:
        raise InputError(
            f"Expected an encoded image in the first record of {first!r}, received: "
            f"{error.message.splitlines()[0]}. Build the data set again."
        ) from error
    return height, width, channels
