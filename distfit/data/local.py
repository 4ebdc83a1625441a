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

    ```python
    def files_of(context):
        files = tf.data.Dataset.list_files("images/*.png", shuffle=False)
        return files.shard(context.size, context.rank).map(decode).batch(context.batch_size)

    distfit.fit(model, distfit.local(files_of), batch_size=64)
    ```
    """
    return Local(dataset)
