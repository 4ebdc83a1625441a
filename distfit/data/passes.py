"""What the next pass over a dataset depends on: how much of the passes before it has to be made again to get its order.

    needs_of(tf.data.Dataset.range(9).batch(2))                    # Needs.NOTHING: each pass is the same
    needs_of(tf.data.Dataset.range(9).shuffle(9, seed=1))          # Needs.BEGINNINGS
    needs_of(tf.data.Dataset.range(9).map(random_number))          # Needs.BATCHES

A `Dataset.shuffle` draws the seed of a pass when the pass begins. So passes need only begin, and nothing of them has to
be read, where the dataset holds nothing else that lasts, and draws once a pass. tf.data itself says whether a dataset
has a state outside of its iterators (`tf.data.experimental.ExternalStatePolicy.FAIL`: variables, random operations,
stateful Python); the operations of its graph say the rest. In doubt the batches are read.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


class Needs(enum.Enum):
    """Of all passes before one, to be made again for it to be what it was."""

    NOTHING = "nothing"
    BEGINNINGS = "beginnings"
    BATCHES = "batches"


# Draw a seed for each iterator that is made of them.
_DRAWS = re.compile(r"(Shuffle|Random|Sampl)\w*Dataset")
# Make iterators of what they are given in the midst of a pass, or keep what a pass has read.
_MAKES_MORE = re.compile(r"(Repeat|Concatenate|Cache|Directed|Choose|Snapshot|Save|Load)\w*Dataset")
# State that tf.data is not told of, or does not look into.
_UNSEEN = re.compile(r"PyFunc|GeneratorDataset")


def needs_of(dataset: tf.data.Dataset) -> Needs:
    """
    Args:
        dataset: that passes are made over; it is not read. Tensors that it holds are copied once for a moment.
    """
    policies = tf.data.experimental.ExternalStatePolicy
    try:
        serialized = dataset._as_serialized_graph(external_state_policy=policies.FAIL)
    except tf.errors.OpError:  # it has a state of its own, or cannot be looked at (more than 2 GB of tensors)
        return Needs.BATCHES
    graph = tf.compat.v1.GraphDef.FromString(serialized.numpy())
    outside = [node.op for node in graph.node]
    inside = [node.op for function in graph.library.function for node in function.node_def]
    if _any(_UNSEEN, [*outside, *inside]) or _any(_DRAWS, inside):
        return Needs.BATCHES
    draws = sum(_any(_DRAWS, [operation]) for operation in outside)
    if not draws:
        return Needs.NOTHING
    # A shuffle begins what it shuffles with its first element only.
    more = draws > 1 or _any(_MAKES_MORE, outside) or any(map(_holds_datasets, graph.node))
    return Needs.BATCHES if more else Needs.BEGINNINGS


def _holds_datasets(node: Any) -> bool:
    """Whether a function of a `map`, `flat_map` or `interleave` was given a dataset from outside."""
    return tf.variant.as_datatype_enum in node.attr["Targuments"].list.type


def _any(pattern: re.Pattern[str], operations: Iterable[str]) -> bool:
    return any(pattern.search(operation) for operation in operations)
