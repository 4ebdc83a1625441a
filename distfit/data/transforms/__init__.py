"""What is done to one record: parsed, then transformed by functions and Keras layers with a seed of its own.

    row = row_function(features, None, transform=[decode, keras.layers.RandomFlip("horizontal")])
    rows = tf.data.Dataset.zip((serialized, seeds)).map(row)
    row.steady(serialized), row.finish(value, seed)      # the same in two halves; the first can be kept

A row is a function of its record and its seed. It is traced once, and while it is, Keras' random layers draw from the
record's seed (`draws`), and what would draw from elsewhere is refused (`purity`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distfit.data.transforms.draws import repeatable, seed_of_function
from distfit.data.transforms.parts import FunctionPart, LayerPart, check_transform, parts_of
from distfit.data.transforms.purity import contents, python_random_state, refuse_impure
from distfit.errors import InputError

__all__ = ["RowFunction", "check_transform", "row_function"]


def row_function(
    features: Mapping[str, Any] | None = None,
    sequence_features: Mapping[str, Any] | None = None,
    transform: Any = None,
    *,
    training: bool = True,
) -> RowFunction:
    """Traces what is done to one record.

    Args:
        features: what to parse, as for `tf.io.parse_single_example`; with sequence_features, the context's. None hands
            the serialized record on.
        sequence_features: of a `tf.train.SequenceExample`: as for `tf.io.parse_single_sequence_example`. Context and
            sequences become one dict.
        transform: None, or parts in their order: a function of the value, with `seed` (int32, shape [2], the
            record's) and `training` (a Python bool) if it names them; a Keras layer, applied to `x`, the first of a
            tuple.
        training: what layers are called with: random layers do nothing without it.

    Raises:
        InputError: features or parts that cannot be, a part that draws random numbers from elsewhere than the seed, or
            one that changes a variable.
    """
    _refuse_equal_names(features or {}, sequence_features or {})
    import tensorflow as tf

    # Whoever asks may be within a graph of tf.data: of one epoch, while these are for all.
    with tf.init_scope():
        parse = _parsing(features, sequence_features)
        traced = [_Traced.of(parse, tf.TensorSpec([], tf.string), 0, training, "features")]
        for place, part in enumerate(parts_of(transform)):
            who = f"the transform's part {place + 1}, {part.name!r},"
            traced.append(_Traced.of(part, traced[-1].spec, place, training, who))
    return RowFunction(tuple(traced))


@dataclass(frozen=True, eq=False)
class RowFunction:
    """A record's way into the batch, for `tf.data.Dataset.map`: a serialized record and its seed (32-bit, shape [2])
    to the data of one row.

    Args:
        parts: parsing and the parts of the transform, traced.
    """

    parts: tuple[_Traced, ...]

    def __call__(self, serialized: Any, seed: Any) -> Any:
        return self.finish(self.steady(serialized), seed)

    def steady(self, serialized: Any) -> Any:
        """What comes before the first part that draws: the same in every epoch."""
        import tensorflow as tf

        value, no_seed = serialized, tf.zeros([2], tf.int32)
        for part in self.parts[: self._steady_parts]:
            value = part(value, no_seed)
        return value

    def finish(self, value: Any, seed: Any) -> Any:
        """The rest, from what `steady` gives."""
        import tensorflow as tf

        seed = seed if seed.dtype == tf.int32 else tf.bitcast(seed, tf.int32)
        for part in self.parts[self._steady_parts :]:
            value = part(value, seed)
        return value

    @property
    def draws(self) -> bool:
        """Whether anything depends on the seed."""
        return self._steady_parts < len(self.parts)

    @property
    def steady_spec(self) -> Any:
        """The `tf.TypeSpec`s of what `steady` gives."""
        return self.parts[self._steady_parts - 1].spec

    @property
    def _steady_parts(self) -> int:
        drawing = [number for number, part in enumerate(self.parts) if part.draws]
        return drawing[0] if drawing else len(self.parts)


@dataclass(frozen=True, eq=False)
class _Traced:
    """One part as a function of TensorFlow's, traced once for all epochs.

    Args:
        function: (value, seed) -> value.
        spec: `tf.TypeSpec`s of its result.
        draws: whether the result depends on the seed.
    """

    function: Callable[[Any, Any], Any]
    spec: Any
    draws: bool

    def __call__(self, value: Any, seed: Any) -> Any:
        return self.function(value, seed)

    @staticmethod
    def of(part: FunctionPart | LayerPart, spec: Any, place: int, training: bool, who: str) -> _Traced:
        trace = functools.partial(_trace, part, spec, place, training, who)
        before = python_random_state()
        function, drawn = trace()
        # Other threads may have drawn meanwhile; twice in a row it is the part.
        if python_random_state() != before:
            before = python_random_state()
            function, drawn = trace()
            if python_random_state() != before:
                raise _drawn_while_traced(who)
        if isinstance(part, FunctionPart) and not _is_traced_alike(function, trace):
            raise _drawn_while_traced(who)
        refuse_impure(function.graph, who)
        import tensorflow as tf

        out = tf.nest.map_structure(tf.type_spec_from_value, function.structured_outputs)
        return _Traced(function, out, bool(drawn) or part.takes_seed)


def _trace(part: FunctionPart | LayerPart, spec: Any, place: int, training: bool, who: str) -> tuple[Any, int]:
    """A part's concrete function, and how often it draws from Keras' generators.

    Raises:
        InputError: it makes variables each time that it is called.
    """
    import tensorflow as tf

    counts = []

    def apply(value: Any, seed: Any) -> Any:
        # Beside an accelerator, too, rows are made on the host.
        with tf.device("CPU:0"), repeatable(seed, place) as draws:
            result = part.apply(value, seed_of_function(seed, place) if part.takes_seed else seed, training)
        counts.append(draws.count)
        return result

    seed = tf.TensorSpec([2], tf.int32)
    try:
        return tf.function(apply, autograph=False).get_concrete_function(spec, seed), counts[-1]
    except ValueError as error:
        if "singleton tf.Variable" not in str(error):
            raise
        raise InputError(
            f"Expected {who} to use layers and variables that were made before it, received one that makes them in "
            "each call, as a random layer does for its seed. Make them outside the function, or give the layer itself "
            "as a part of the transform."
        ) from error


def _is_traced_alike(function: Any, trace: Callable[[], tuple[Any, int]]) -> bool:
    """Whether a user's function makes the same graph each time; `numpy.random.default_rng()` leaves no other trace."""
    found = contents(function.graph)
    for _ in range(2):  # the first time it may have built layers that it keeps
        before, found = found, contents(trace()[0].graph)
        if found == before:
            return True
    return False


def _drawn_while_traced(who: str) -> InputError:
    return InputError(
        f"Expected {who} to draw random numbers in TensorFlow or Keras, received draws from Python's `random`, "
        "`numpy.random` or the like: it runs once, when it is traced, so that all records would get the same numbers, "
        "and each rank others. Use the record's `seed` or keras.random, and make layers outside the function."
    )


def _parsing(features: Mapping[str, Any] | None, sequence_features: Mapping[str, Any] | None) -> FunctionPart:
    import tensorflow as tf

    def parse(serialized: Any) -> Any:
        if sequence_features is not None:
            context, sequences = tf.io.parse_single_sequence_example(
                serialized, dict(features or {}), dict(sequence_features)
            )
            return {**context, **sequences}
        # One record at a time: parsed as a batch, a record of varying length would be padded to the longest of its
        # neighbours, who are others on every rank.
        return serialized if features is None else tf.io.parse_single_example(serialized, dict(features))

    return FunctionPart(parse, frozenset(), converted=parse)


def _refuse_equal_names(context: Mapping[str, Any], sequences: Mapping[str, Any]) -> None:
    both = sorted(set(context) & set(sequences))
    if both:
        raise InputError(
            "Expected features and sequence_features to have names of their own, as both go into one dict, received "
            f"{', '.join(map(repr, both))} in both. Leave out one of them."
        )
