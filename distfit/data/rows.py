"""How a record becomes a row: what `distfit.TFRecords` was told about it, as the pipeline takes it.

    rows = rows_of(features, sequence_features, transform, training=True)
    pipeline = Pipeline(rows, tally)
    rows.keep("memory", records=50_000, name="run-7")       # from now on

A ready image recipe decodes the images of a step together; functions and layers take one record at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np

from distfit.data.bad_records import BadRecord
from distfit.data.cache import Field, RowCache, cached, fields_of
from distfit.data.cache_file import Where
from distfit.data.image_examples import fixed, parsed_images
from distfit.data.images import Images
from distfit.data.images.rows import augment_rows, decode_rows
from distfit.data.pipeline import Pipeline, Places
from distfit.data.transforms import RowFunction, row_function
from distfit.errors import InputError


class _Rows(ABC):
    """What makes rows, and what was made before, if it is kept.

    Attributes:
        cache: of what does not change from epoch to epoch.
        pipeline: that calls; it remembers what Python code raises.
    """

    def __init__(self) -> None:
        self.cache: RowCache | None = None
        self.pipeline: Pipeline | None = None

    @abstractmethod
    def fields(self) -> list[Field]:
        """What can be kept of a row.

        Raises:
            InputError: nothing.
        """

    def keep(self, where: Where, records: int, name: str) -> None:
        """Rows that are made from now on are kept.

        Args:
            where: "memory" or "disk".
            records: of the data set.
            name: of this run and data set, the same on every rank.

        Raises:
            InputError: they have no fixed size, or there is no room.
        """
        self.cache = RowCache(records, self.fields(), where, name)

    def forget(self) -> None:
        """Ends the keeping."""
        if self.cache is not None:
            self.cache.close()
        self.cache = None


class OfFunctions(_Rows):
    """Rows by a user's functions and layers: `data.transforms`."""

    def __init__(self, features: Any, sequence_features: Any, transform: Any, training: bool) -> None:
        super().__init__()
        self._arguments, self._training = (features, sequence_features, transform), training

    @cached_property
    def _function(self) -> RowFunction:
        return row_function(*self._arguments, training=self._training)

    def __call__(self, number: Any, record: Any, seed: Any) -> Any:
        """Parsed and transformed, or what was kept of it and the rest."""
        if self.cache is None or self.pipeline is None:
            return self._function(record, seed)
        kept = cached(self._function.steady, self._function.steady_spec, self.cache, self.pipeline.python)
        return self._function.finish(kept(number, record), seed)

    def fields(self) -> list[Field]:
        """What comes before anything random."""
        return fields_of(self._function.steady_spec)


class OfImages(_Rows):
    """Rows by a ready recipe: many images at a time in Python, whose decoders are faster than TensorFlow's."""

    def __init__(self, images: Images, features: Any) -> None:
        super().__init__()
        self._images, self._features = images, dict(features or {})

    @cached_property
    def _target(self) -> Any:
        import tensorflow as tf

        name = self._images.target
        if name is None:
            return None
        found = self._features.get(name, tf.io.FixedLenFeature([], tf.int64))
        if not isinstance(found, tf.io.FixedLenFeature):
            raise InputError(
                f"Expected the target {name!r} of distfit.Images to be a tf.io.FixedLenFeature, received "
                f"{type(found).__name__}. Write a transform of your own, or leave the target to it."
            )
        return found

    @cached_property
    def specs(self) -> list[Any]:
        """Of the pixels and the target."""
        import tensorflow as tf

        pixels = tf.TensorSpec([None, *self._images.shape], tf.uint8)
        target = self._target
        return [pixels] if target is None else [pixels, tf.TensorSpec([None, *target.shape], target.dtype)]

    def made(
        self, pipeline: Pipeline, places: Places, workers: int, numbers: np.ndarray, strings: Any, seeds: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The pixels and targets of a step's records; see `pipeline.AtOnce`."""
        if not len(numbers):
            nothing = [np.zeros((1, *spec.shape[1:]), spec.dtype.as_numpy_dtype) for spec in self.specs]
            return np.zeros(1, bool), [np.zeros((1, 2), np.int32), *nothing]
        target = None if self._target is None else fixed(str(self._images.target), self._target)
        encoded, targets, wrong = parsed_images(strings, self._images.image, target)
        pixels, bad = self._pixels(numbers, encoded, seeds.view(np.uint32), workers)
        good = np.ones(len(numbers), bool)
        for row, reason in sorted((bad | wrong).items()):
            pipeline.tally.note(BadRecord(*places.place_of(int(numbers[row])), reason))
            good[row] = False
        return good, [seeds, pixels] if targets is None else [seeds, pixels, targets]

    def fields(self) -> list[Field]:
        """The pixels before anything random."""
        shape = self._images.cacheable_shape
        if shape is None:
            raise InputError(
                f"Expected images that are the same in every epoch for cache=, received fit={self._images.fit!r}, "
                'which decodes another part of each. Use another fit, "center_crop" say, or leave out cache.'
            )
        return [Field(shape, np.dtype(np.uint8))]

    def _pixels(
        self, numbers: np.ndarray, encoded: Any, seeds: np.ndarray, workers: int
    ) -> tuple[np.ndarray, dict[int, str]]:
        if self.cache is None:
            return decode_rows(self._images, encoded, seeds, workers)
        kept, (rows,) = self.cache.get(numbers)
        missing = np.flatnonzero(~kept)
        made, wrong = decode_rows(self._images, encoded[missing], seeds[missing], workers, augmented=False)
        whole = np.array([row not in wrong for row in range(len(missing))], bool)
        self.cache.put(numbers[missing[whole]], [made[whole]])
        rows[missing] = made
        augment_rows(self._images, rows, seeds, workers)
        return rows, {int(missing[row]): reason for row, reason in wrong.items()}


def rows_of(features: Any, sequence_features: Any, transform: Any, training: bool = True) -> OfFunctions | OfImages:
    """What makes rows of records, by what `distfit.TFRecords` was given.

    Args:
        training: False leaves out what is random by its nature.
    """
    if isinstance(transform, Images):
        return OfImages(transform if training else transform.without_chance(), features)
    return OfFunctions(features, sequence_features, transform, training)
