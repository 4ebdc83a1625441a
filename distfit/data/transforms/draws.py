"""Random draws that are functions of one record's seed: what Keras' generators answer while a row is traced.

    key = derived(seed, 1, 0)                # a seed of its own for each use, from the record's
    with repeatable(seed, place=0) as draws:
        image = keras.layers.RandomFlip()(image)
    draws.count                              # 1

Keras keeps a random stream in a variable that moves with each draw, so that a row would depend on who came before
it. Here a draw depends on the record's seed, on where in the transform it happens, and on nothing else: any number of
ranks and threads draws the same in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from distfit.errors import InputError

# What a key is for; the same numbers after another purpose give another key.
_OF_FUNCTION, _OF_STREAM, _OF_SEEDED_STREAM = range(3)

_current: ContextVar[Draws | None] = ContextVar("draws of the row that is being traced", default=None)
# The class of Keras' generators is changed for the time of a trace: one trace at a time.
_tracing = threading.RLock()


def derived(seed: Any, *purpose: int) -> Any:
    """Another seed (int32, shape [2]) that depends on `seed` and on the numbers after it, in the graph.

    The numbers are hashed into 64 bits, which flip bits of the seed; one Philox block then mixes all of them, so that
    neighbouring purposes have nothing in common.
    """
    import tensorflow as tf

    # Two words for each number, whatever its size: (1, 2**32) is not (1, 0, 1).
    words = np.array([number % 2**64 for number in purpose], "<u8").view("<u4")
    mask = np.random.SeedSequence(words).generate_state(2, np.uint32).view(np.int32)
    key = tf.bitwise.bitwise_xor(seed, mask)
    # Philox by name: "auto_select" would choose by the device.
    return tf.random.stateless_uniform([2], key, minval=None, maxval=None, dtype=tf.int32, alg="philox")


def seed_of_function(seed: Any, place: int) -> Any:
    """What the function at a place of the transform gets: the record's own seed at the first, others further on."""
    return derived(seed, _OF_FUNCTION, place) if place else seed


class Draws:
    """The draws of one part of the transform.

    A generator that was given a seed has the stream of that seed, wherever it stands: two layers with one seed do
    the same, which is how an image and its mask are flipped alike. Others have a stream each, by their order.

    Attributes:
        count: draws so far.
        refusal: the error of a draw that cannot be.
    """

    def __init__(self, seed: Any, place: int, graph: Any) -> None:
        self.count = 0
        self.refusal: InputError | None = None
        self._seed, self._place, self._graph = seed, place, graph
        # The generators themselves are kept: the address of one that is gone may be another's.
        self._streams: dict[int, tuple[Any, int, int]] = {}

    def draw(self, generator: Any) -> Any:
        """The next seed of a generator's stream, int32 [2].

        Raises:
            InputError: within a loop, all turns of which would draw the same.
        """
        self._refuse_loops()
        _, order, drawn = self._streams.get(id(generator), (generator, len(self._streams), 0))
        self._streams[id(generator)] = generator, order, drawn + 1
        self.count += 1
        own = generator.get_config()["seed"]
        purpose = (_OF_STREAM, self._place, order) if own is None else (_OF_SEEDED_STREAM, own)
        return derived(self._seed, *purpose, drawn)

    def _refuse_loops(self) -> None:
        import tensorflow as tf
        from tensorflow.python.ops.control_flow_v2_func_graphs import CondBranchFuncGraph

        graph = tf.compat.v1.get_default_graph()
        while isinstance(graph, CondBranchFuncGraph):
            graph = graph.outer_graph
        if graph is not self._graph:
            self.refusal = InputError(
                "Expected the transform to draw Keras' random numbers outside loops and functions of their own "
                f"(tf.map_fn, tf.while_loop, tf.function), received a draw within {graph.name!r}, where every turn "
                "would draw the same. Draw as many numbers as there are turns before it, or take the record's `seed` "
                "and pass tf.random.fold_in(seed, turn) to tf.random.stateless_*."
            )
            raise self.refusal


class _GlobalStream:
    """Stands for Keras' global generator, which `keras.random.*` without a seed draws from."""

    def get_config(self) -> dict[str, Any]:
        return {"seed": None}

    def next(self, ordered: bool = True) -> Any:
        draws = _current.get()
        assert draws is not None
        return draws.draw(self)


@contextmanager
def repeatable(seed: Any, place: int) -> Iterator[Draws]:
    """While a part of the transform is traced, in the graph that is open now, all of Keras' draws are the record's.

    Args:
        seed: of the record, int32 [2], a tensor of this graph.
        place: of the part in the transform.
    """
    import tensorflow as tf
    from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
    from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

    draws = Draws(seed, place, tf.compat.v1.get_default_graph())
    with _tracing, _replaced_next():
        before = get_global_attribute(GLOBAL_SEED_GENERATOR)
        token = _current.set(draws)
        set_global_attribute(GLOBAL_SEED_GENERATOR, _GlobalStream())
        try:
            yield draws
        except Exception:
            # Code that TensorFlow has converted raises an error of another class, with our words in the middle.
            if draws.refusal is None:
                raise
            raise draws.refusal from None
        finally:
            set_global_attribute(GLOBAL_SEED_GENERATOR, before)
            _current.reset(token)


@contextmanager
def _replaced_next() -> Iterator[None]:
    import keras

    original = keras.random.SeedGenerator.next

    def next_of_record(generator: Any, ordered: bool = True) -> Any:
        draws = _current.get()
        # Other threads trace models meanwhile.
        return original(generator, ordered) if draws is None else draws.draw(generator)

    keras.random.SeedGenerator.next = next_of_record
    try:
        yield
    finally:
        keras.random.SeedGenerator.next = original
