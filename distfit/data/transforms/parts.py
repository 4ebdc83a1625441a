"""The parts of a transform, in the order in which they are applied: functions and Keras layers.

    check_transform(transform)               # of the right kind; loads nothing
    for part in parts_of(transform):
        value = part.apply(value, seed, training)

A function gets the value as it is. A layer is applied to `x`, as `keras.Model.fit` understands the value, within a
batch of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distfit.errors import InputError

_MIXING = ("CutMix", "MixUp")


def check_transform(transform: Any) -> None:
    """
    Raises:
        InputError: it is none of None, a function, a layer, or a list of functions and layers.
    """
    parts = transform if isinstance(transform, (list, tuple)) else [transform]
    for part in parts if transform is not None else ():
        if not callable(part) or inspect.isclass(part):
            raise InputError(
                "Expected transform to be a function of one record, a Keras preprocessing layer, a list of them, or "
                f"None, received {'the class ' if inspect.isclass(part) else ''}"
                f"{part.__name__ if inspect.isclass(part) else type(part).__name__}. Pass a function or a layer."
            )


def parts_of(transform: Any) -> list[FunctionPart | LayerPart]:
    """The functions and layers of a transform; `keras.Sequential` and `keras.layers.Pipeline` are taken apart, so that
    what comes before their first random layer can be cached.

    Raises:
        InputError: a function that takes something else than a record, or a layer that mixes rows of a batch.
    """
    import keras

    check_transform(transform)
    if transform is None:
        return []
    if isinstance(transform, (list, tuple)):
        return [part for one in transform for part in parts_of(one)]
    # Not a class made of one of them, which may do something else with its layers.
    if type(transform) in (keras.Sequential, keras.layers.Pipeline):
        return [part for layer in transform.layers for part in parts_of(layer)]
    if isinstance(transform, keras.Layer):
        _refuse_mixing(transform)
        return [LayerPart(transform)]
    return [FunctionPart(transform, _options_of(transform), _converted(transform))]


@dataclass(frozen=True)
class FunctionPart:
    """A function of a record.

    Args:
        function: the user's.
        options: which of `seed` and `training` it takes besides the record.
        converted: the function with Python's `if` and `for` on tensors made TensorFlow's, as
            `tf.data.Dataset.map` does.
    """

    function: Callable[..., Any]
    options: frozenset[str]
    converted: Callable[..., Any]

    @property
    def name(self) -> str:
        """For messages."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    @property
    def takes_seed(self) -> bool:
        """Whether its result depends on the record's seed by its own word."""
        return "seed" in self.options

    def apply(self, value: Any, seed: Any, training: bool) -> Any:
        """The function's result."""
        given = {"seed": seed, "training": training}
        return self.converted(value, **{name: given[name] for name in self.options})


@dataclass(frozen=True)
class LayerPart:
    """A Keras layer, applied to `x`: the first of a tuple, or the whole value where it is none.

    It sees a batch of one row, which is what layers are made for; its random numbers are Keras', see `draws`.
    """

    layer: Any
    takes_seed = False

    @property
    def name(self) -> str:
        """For messages."""
        return type(self.layer).__name__

    def apply(self, value: Any, seed: Any, training: bool) -> Any:
        """The value with `x` replaced by what the layer makes of it.

        Raises:
            InputError: the layer cannot take it.
        """
        import tensorflow as tf

        x, *rest = value if isinstance(value, tuple) else (value,)
        self._refuse_strange(x)
        x = tf.nest.map_structure(_as_batch, x, expand_composites=False)
        self._build(x)
        try:
            y = self.layer(x, training=training)
        except tf.errors.OperatorNotAllowedInGraphError as error:
            shapes = tf.nest.map_structure(lambda one: tuple(one.shape[1:]), x)
            raise InputError(
                f"Expected the layer {self.name} to take one record's x of the shape {shapes}, received a decision "
                "that needs the numbers in it. Give x a known shape before it: resize it, or tf.ensure_shape."
            ) from error
        y = tf.nest.map_structure(_as_row, y, expand_composites=False)
        return (y, *rest) if isinstance(value, tuple) else y

    def _build(self, x: Any) -> None:
        # Outside the graph: some layers make constants when they are built, which no other graph could use.
        import keras
        import tensorflow as tf

        if not self.layer.built and type(self.layer).build is not keras.Layer.build:
            with tf.init_scope():
                self.layer.build(tf.nest.map_structure(lambda one: tuple(one.shape), x))

    def _refuse_strange(self, x: Any) -> None:
        import keras

        # What all image layers of Keras have in common; their base class is not public.
        of_images = hasattr(self.layer, "transform_images") and isinstance(self.layer, keras.Layer)
        if of_images and isinstance(x, dict) and "images" not in x:
            raise InputError(
                f"Expected x to be an image, or a dict with 'images', for the layer {self.name}, received a dict of "
                f"{', '.join(map(repr, x))}. Put a function before it: lambda example: "
                "(tf.io.decode_jpeg(example['image']), example['label'])."
            )


def _converted(function: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    return tf.__internal__.autograph.tf_convert(function, tf.__internal__.autograph.control_status_ctx())


def _as_batch(one: Any) -> Any:
    import tensorflow as tf

    return tf.sparse.expand_dims(one, 0) if isinstance(one, tf.SparseTensor) else tf.expand_dims(one, 0)


def _as_row(many: Any) -> Any:
    import tensorflow as tf

    return tf.sparse.reshape(many, many.dense_shape[1:]) if isinstance(many, tf.SparseTensor) else many[0]


def _refuse_mixing(layer: Any) -> None:
    import keras

    mixing = tuple(getattr(keras.layers, name) for name in _MIXING)
    found = [one for one in layer._flatten_layers() if isinstance(one, mixing)]
    if found:
        raise InputError(
            f"Expected layers that work on one record, received {type(found[0]).__name__}, which mixes the rows of a "
            "batch. Pass it as on_device=, where it gets whole batches."
        )


def _options_of(function: Callable[..., Any]) -> frozenset[str]:
    try:
        parameters: Sequence[inspect.Parameter] = list(inspect.signature(function).parameters.values())
    except ValueError:
        return frozenset()
    required = [
        one for one in parameters if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    named = {one.name for one in parameters[1:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    strange = [one.name for one in required[1:] if one.name not in ("seed", "training")]
    first = parameters[0].kind if parameters else inspect.Parameter.KEYWORD_ONLY
    if strange or first in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise InputError(
            "Expected a function of transform to take one record, and `seed` and `training` if it likes, received "
            f"{getattr(function, '__qualname__', function)}({', '.join(one.name for one in parameters)}). Give the "
            "other parameters by functools.partial or a lambda."
        )
    return frozenset(named & {"seed", "training"} if not _is_library(function) else {one.name for one in required[1:]})


def _is_library(function: Any) -> bool:
    # Where TensorFlow's own have a seed with a default, it is a number: tf.image.random_flip_left_right, which the
    # look at the graph then refuses by name.
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("tensorflow", "keras")
