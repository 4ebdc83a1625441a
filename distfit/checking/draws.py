"""Random numbers that belong to the rows of the global batch, in a process that does nothing else.

drew = set()
install(drew, by_rows=True, alike=True)       # before a model is trained; never undone
with within(Place(indices, total, static=None, whole=False)):
    ...                                       # a replica's step is traced: what it draws is noted, and cut
drew                                          # {"keras.random"}
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import tensorflow as tf
from keras.src import backend as keras_backend

from distfit.backends import hooks

# Of keras.random, whose first argument is the shape; the others draw as well, and are noted alone but for `dropout`.
_SHAPED = ("normal", "uniform", "truncated_normal", "randint", "gamma")
_OTHERS = ("dropout", "categorical", "shuffle", "binomial", "beta")
# Of tf.random: streams of TensorFlow's own, which count the draws of a process; and what draws from none.
_STATEFUL = {
    "normal": ("stateless_normal", ("mean", "stddev", "dtype")),
    "truncated_normal": ("stateless_truncated_normal", ("mean", "stddev", "dtype")),
    "uniform": ("stateless_uniform", ("minval", "maxval", "dtype")),
}
_ANY_SEED = (7, 11)


@dataclass
class Place:
    """Which rows of the global batch a replica has, while its step is traced.

    Args:
        indices: of its rows in the global batch, int64; one where it has none, as it computes one.
        total: rows of the global batch.
        static: how many rows its batch has, if that is known when it is traced.
        whole: what it draws is taken as it is.
        draws: from TensorFlow's own streams, so far.
    """

    indices: Any
    total: Any
    static: int | None
    whole: bool
    draws: int = 0


class _Current(threading.local):
    """The step that this thread traces: replicas of one process are traced in threads."""

    place: Place | None = None


_current = _Current()


@contextmanager
def within(place: Place) -> Iterator[None]:
    """This thread traces a step of a replica."""
    _current.place = place
    try:
        yield
    finally:
        _current.place = None


def install(drew: set[str], by_rows: bool, alike: bool) -> None:
    """Put it in the place of Keras' and TensorFlow's draws.

    Args:
        drew: gets the modules that a step draws from, "keras.random" or "tf.random".
        by_rows: replicas draw for all rows and take their own.
        alike: they draw from one device's streams.
    """
    for name in (*_SHAPED, *_OTHERS):
        own = getattr(keras_backend.random, name)
        setattr(keras_backend.random, name, _noting(own, name, drew, "keras.random", by_rows))
    for name in _STATEFUL:
        own = getattr(tf.random, name)
        setattr(tf.random, name, _noting(_seeded(own, name) if alike else own, name, drew, "tf.random", by_rows))
    if alike:
        hooks._STREAM_STEP = 0


def _noting(draw: Callable[..., Any], name: str, drew: set[str], module: str, by_rows: bool) -> Callable[..., Any]:
    """The same function, that tells whether a step used it."""
    cut = _dropout(draw) if name == "dropout" else _by_rows(draw)
    cutting = by_rows and name in (*_SHAPED, "dropout")

    @wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        if _current.place is None or _initialises(**options):
            return draw(*arguments, **options)
        # A rate of zero draws nothing.
        if name != "dropout" or _rate(*arguments, **options) != 0:
            drew.add(module)
        return (cut if cutting else draw)(*arguments, **options)

    return drawn


def _seeded(draw: Callable[..., Any], name: str) -> Callable[..., Any]:
    """In place of TensorFlow's own stream, numbers that are the same on every replica, and in every step."""
    stateless, names = _STATEFUL[name]

    def drawn(shape: Any, *arguments: Any, **options: Any) -> Any:
        place = _current.place
        if place is None:
            return draw(shape, *arguments, **options)
        place.draws += 1
        given = dict(zip(names, arguments, strict=False)) | {key: options[key] for key in names if key in options}
        return getattr(tf.random, stateless)(shape, seed=(_ANY_SEED[0] + place.draws, _ANY_SEED[1]), **given)

    return drawn


def _by_rows(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A draw of a shape that begins with the rows of a replica, made for all rows, of which it takes its own.

    Several times as many as there are rows are blocks of the batch, one after the other, as two batches that a step
    has put together. Anything else is drawn as it is: it belongs to no row.
    """

    def drawn(shape: Any, *arguments: Any, **options: Any) -> Any:
        place = _current.place
        assert place is not None, "asked for within a step only"
        sizes = _sizes(shape)
        if place.whole or not sizes or not _are_rows(sizes[0], place):
            return draw(shape, *arguments, **options)
        own = tf.size(place.indices, tf.int64)
        blocks = tf.cast(sizes[0], tf.int64) // own
        rest = [tf.cast(size, tf.int64) for size in sizes[1:]]
        everything = draw(tf.stack([blocks * place.total, *rest]), *arguments, **options)
        by_block = tf.reshape(everything, tf.stack([blocks, place.total, *rest]))
        return tf.reshape(tf.gather(by_block, place.indices, axis=1), tf.stack([tf.cast(n, tf.int32) for n in sizes]))

    return drawn


def _dropout(draw: Callable[..., Any]) -> Callable[..., Any]:
    def dropped(inputs: Any, rate: float, noise_shape: Any = None, seed: Any = None) -> Any:
        if rate in (0.0, 1.0):
            return draw(inputs, rate, noise_shape=noise_shape, seed=seed)
        full = _sizes(tf.shape(inputs))
        shape = full if noise_shape is None else [f if n is None else n for f, n in zip(full, noise_shape, strict=True)]
        chance = keras_backend.random.uniform(shape, dtype="float32", seed=seed)
        return tf.where(chance >= rate, inputs / (1 - rate), tf.zeros_like(inputs))

    return dropped


def _initialises(seed: Any = None, **_: Any) -> bool:
    """Whether a draw makes the first value of a variable: Keras' initializers have a number for a seed, as a model has
    that was not built before its first step. Streams that go on from step to step have a SeedGenerator."""
    return isinstance(seed, int)


def _rate(inputs: Any, rate: float, *_: Any, **__: Any) -> float:
    return rate


def _sizes(shape: Any) -> list[Any]:
    """A shape's sizes, as numbers where they are known when it is traced."""
    sizes = tf.unstack(shape) if tf.is_tensor(shape) else list(shape)
    known = [tf.get_static_value(size) if tf.is_tensor(size) else size for size in sizes]
    return [size if number is None else int(number) for size, number in zip(sizes, known, strict=True)]


def _are_rows(size: Any, place: Place) -> bool:
    """Whether a size is that of the batch, or of several: it depends on the data, or is what the data have."""
    if tf.is_tensor(size):
        return True
    return place.static is not None and size > 0 and size % place.static == 0
