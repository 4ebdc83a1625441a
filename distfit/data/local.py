"""`distfit.local`: data that a script shards by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distfit.errors import InputError


@dataclass(frozen=True)
class InputContext:
    """Who asks for data, for a function that shards it.

    Args:
        rank: this process, 0 <= rank < size.
        size: how many processes share the data.
        batch_size: rows of this process's batch: the global batch over the processes, or None when `fit`
            was given no batch_size.
    """

    rank: int
    size: int
    batch_size: int | None


@dataclass(frozen=True)
class Local:
    """A dataset of this process's own batches; made by `local`."""

    source: Any

    def dataset(self, context: InputContext) -> Any:
        """The dataset of the process that `context` describes.

        Raises:
            InputError: it is no tf.data.Dataset.
        """
        import tensorflow as tf

        dataset = self.source(context) if callable(self.source) else self.source
        if not isinstance(dataset, tf.data.Dataset):
            raise InputError(
                f"Expected distfit.local to get a tf.data.Dataset, or a function of an input context that returns "
                f"one, received {type(dataset).__name__}."
            )
        return dataset


def local(dataset: Any | Callable[[InputContext], Any]) -> Local:
    """Data of which each process brings its own part, instead of a slice of a global batch.

    The batches of all processes at one step make up the global batch, whatever their sizes; a process whose
    data end early takes part with no rows until the last one has finished. Nothing checks that the parts
    are disjoint: that is the script's promise.

    Args:
        dataset: a batched tf.data.Dataset, or a function of an `InputContext` that returns one.

    >>> import tensorflow as tf
    >>> def own_rows(context):
    ...     return tf.data.Dataset.range(10).shard(context.size, context.rank).batch(context.batch_size)
    >>> data = local(own_rows)                      # distfit.fit(model, data, batch_size=8)
    >>> [batch.tolist() for batch in data.dataset(InputContext(rank=1, size=2, batch_size=4)).as_numpy_iterator()]
    [[1, 3, 5, 7], [9]]
    """
    return Local(dataset)
