"""Where a tensor of a step comes from: is it the same on every replica, or does it depend on this one's rows?

    origins = Origins(rows=[*data])         # in the graph of a step
    origins.same([total])                   # a sum over the replicas
    origins.of(total / 2)                   # Origin.SAME
    origins.of(total + data[0])             # Origin.ROWS

What a model's own step gives to an optimizer or assigns to a weight changes replicas alike only if it is the same on
all of them. The graph that the step is traced into says so; what it leaves open, and everything that is computed
eagerly, counts as a replica's own, which costs a reduction more and changes no result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import keras
import tensorflow as tf


class Origin(IntEnum):
    """What a value depends on; the first of ROWS, METRICS, SAME that holds."""

    SAME = 0
    METRICS = 1
    ROWS = 2


# Each replica draws from a stream of its own.
_RANDOM = (
    "RandomStandardNormal RandomUniform RandomUniformInt RandomGamma RandomPoissonV2 RandomShuffle TruncatedNormal "
    "Multinomial ParameterizedTruncatedNormal StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform "
    "StatelessRandomUniformV2 StatelessRandomUniformInt StatelessRandomUniformIntV2 StatelessRandomUniformFullInt "
    "StatelessRandomUniformFullIntV2 StatelessRandomBinomial StatelessRandomGammaV2 StatelessRandomGammaV3 "
    "StatelessRandomPoisson StatelessTruncatedNormal StatelessTruncatedNormalV2 StatelessMultinomial StatelessShuffle "
    "StatelessParameterizedTruncatedNormal StatefulStandardNormalV2 StatefulUniform StatefulUniformInt"
)
# What goes on inside of them is not looked at.
_OPAQUE = (
    "If StatelessIf Case StatelessCase While StatelessWhile PartitionedCall StatefulPartitionedCall PyFunc EagerPyFunc"
)
_OWN_OPS = frozenset(f"{_RANDOM} {_OPAQUE}".split())
_GATHERS = ("GatherV2", "ResourceGather")
# What they answer is as long as what they are given, but for the rows; a gather as its indices.
_KEEP_LENGTHS = ("Identity", "Cast", "AddV2", "Add", "Sub", "Mul", "RealDiv", "Less", "SelectV2", *_GATHERS)
_OF_ONE_SIZE = ("Const", "ReadVariableOp")


class Origins:
    """What is known of the tensors of one replica's step.

    Args:
        rows: tensors that only this replica has.
        same_lengths: but for the number of rows, they have the same shapes on every replica.
    """

    def __init__(self, rows: Iterable[Any], same_lengths: bool = False) -> None:
        self._eager = tf.executing_eagerly()
        self._same_lengths = same_lengths
        self._known: dict[tuple[int, str], Origin] = {}
        self._mark(rows, Origin.ROWS)

    def same(self, tensors: Iterable[Any]) -> None:
        """These are the same on every replica."""
        self._mark(tensors, Origin.SAME)

    def of_metrics(self, tensors: Iterable[Any]) -> None:
        """These are results of metrics, of which each replica holds its own part."""
        self._mark(tensors, Origin.METRICS)

    def of(self, value: Any) -> Origin:
        """What a value (a tensor, a structure of them, a number) depends on."""
        tensors = [leaf for leaf in tf.nest.flatten(value, expand_composites=True) if _is_tensor(leaf)]
        if self._eager:
            return Origin.ROWS if tensors else Origin.SAME
        return max(self._reached(tensors), default=Origin.SAME)

    def _mark(self, tensors: Iterable[Any], origin: Origin) -> None:
        for tensor in tf.nest.flatten(list(tensors), expand_composites=True):
            if _is_symbolic(tensor):
                self._known[_key(tensor)] = origin

    def _reached(self, tensors: list[Any]) -> Iterator[Origin]:
        """What is found on the way back from the tensors to where they come from."""
        pending, seen = list(tensors), set()
        while pending:
            tensor = pending.pop()
            if not _is_symbolic(tensor) or _key(tensor) in seen:
                continue
            seen.add(_key(tensor))
            if self._same_lengths and _is_length(tensor) and self._keeps_lengths(tensor.op.inputs[0].op.inputs[0]):
                continue
            outside = _outside(tensor)
            # A placeholder that stands for nothing outside is an argument: of the step, or of a loop's body.
            own = tensor.op.type in _OWN_OPS or (tensor.op.type == "Placeholder" and not outside)
            origin = self._known.get(_key(tensor), Origin.ROWS if own else None)
            if origin is not None:
                yield origin
                continue
            pending.extend([*tensor.op.inputs, *outside])

    def _keeps_lengths(self, tensor: Any) -> bool:
        """Whether a tensor is as long as the data are; what is cut at a length that a replica's rows tell is not."""
        pending = [tensor]
        while pending:
            one = pending.pop()
            outside = _outside(one)
            if _key(one) in self._known or one.op.type in _OF_ONE_SIZE or one.shape.rank == 0:
                continue
            if not outside and one.op.type not in _KEEP_LENGTHS:
                return False
            pending.extend(outside or (one.op.inputs[1:2] if one.op.type in _GATHERS else one.op.inputs))
        return True


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor; a variable is the same on every replica."""
    return tf.is_tensor(value) and not isinstance(value, (keras.Variable, tf.Variable))


def _is_symbolic(value: Any) -> bool:
    return _is_tensor(value) and not isinstance(value, tf.__internal__.EagerTensor)


def _key(tensor: Any) -> tuple[int, str]:
    return id(tensor.graph), tensor.name


def _is_length(tensor: Any) -> bool:
    """Whether it is the size of one axis that is not that of the rows: `tf.shape(x)[1]`."""
    if tensor.op.type != "StridedSlice" or tensor.op.inputs[0].op.type != "Shape" or tensor.shape.rank != 0:
        return False
    axis, rank = tf.get_static_value(tensor.op.inputs[1]), tensor.op.inputs[0].op.inputs[0].shape.rank
    return axis is not None and rank is not None and int(axis[0]) % rank != 0


def _outside(tensor: Any) -> list[Any]:
    """What a branch or a function got from outside under the name of this tensor."""
    if tensor.op.type != "Placeholder":
        return []
    return [outer for outer, inner in getattr(tensor.graph, "captures", []) if inner.name == tensor.name]
