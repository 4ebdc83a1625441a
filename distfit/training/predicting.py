"""What a prediction gives: rows that come in the data's order, and go to memory or to disk as they come.

    with outputs(session, model, uneven=False, gather="chief", to=None) as predicted:
        for ...:
            results = ...                            # of the steps of one call, on the local replicas
            if predicted.add(results, wish=stop):    # True: all ranks end here
                break
        predicted.result()                           # on this rank

Ranks keep what they have computed for a chunk of steps, of some 16 MiB over all ranks, and then exchange it: one sum
(do ranks see the same batches, does one want to stop, how large is a step) and one gathering, on every rank or on the
chief. Which step ends a chunk follows from those sums, so that it is the same step everywhere. A wish to stop counts
from the step in which it came up; what was computed after that is dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import potentially_ragged_concat

from distfit.data.feed import FLAGS, check_same_batches
from distfit.errors import InputError, on_every_rank
from distfit.training.array_folder import ArrayFolder
from distfit.training.traced import OfReplicas

if TYPE_CHECKING:
    from distfit.session import Session

# Of all ranks' outputs, between two exchanges: an exchange of host values costs less than a millisecond, and a pickle
# of more than 2 GiB travels nowhere. A step alone may have more.
CHUNK_BYTES = 16 * 2**20
# Ranks hear of a wish to stop at the end of a chunk.
CHUNK_STEPS = 256

# One process's steps, of each the outputs of its replicas: structures of arrays.
Steps: TypeAlias = list[list[Any]]


class Sink(Protocol):
    """What takes the rows on one rank."""

    def begin(self) -> None:
        """Before the first step."""

    def take(self, pieces: Sequence[Any]) -> None:
        """The next rows, as structures of arrays in the data's order."""

    def finish(self) -> Any:
        """After the last row: what the rank's `predict` returns."""

    def discard(self) -> None:
        """Take away what is not finished."""


class Memory:
    """All rows, kept in this process and joined at the end."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []

    def begin(self) -> None:
        self._pieces = []

    def take(self, pieces: Sequence[Any]) -> None:
        self._pieces.extend(pieces)

    def finish(self) -> Any:
        return keras.tree.map_structure(lambda *parts: _joined(parts), *self._pieces)

    def discard(self) -> None:
        self._pieces = []


class Elsewhere:
    """Another rank has them."""

    def begin(self) -> None:
        return None

    def take(self, pieces: Sequence[Any]) -> None:
        return None

    def finish(self) -> None:
        return None

    def discard(self) -> None:
        return None


class Disk:
    """A file for each output, in a folder that appears when all rows are there.

    Args:
        folder: as `array_folder.ArrayFolder` takes it.
        output_names: of a model whose output is a list; None without.
    """

    def __init__(self, folder: str | os.PathLike, output_names: Sequence[str] | None) -> None:
        self._arrays = ArrayFolder(folder)
        self._output_names = output_names
        self._names: list[str] = []
        self._structure: Any = None

    def begin(self) -> None:
        self._arrays.begin()

    def take(self, pieces: Sequence[Any]) -> None:
        if not self._names:
            self._names, self._structure = names_of(pieces[0], self._output_names), pieces[0]
        for piece in pieces:
            leaves = [np.atleast_1d(leaf) for leaf in keras.tree.flatten(piece)]
            self._arrays.append(dict(zip(self._names, leaves, strict=True)))

    def finish(self) -> Any:
        maps = self._arrays.publish()
        return keras.tree.pack_sequence_as(self._structure, [maps[name] for name in self._names])

    def discard(self) -> None:
        self._arrays.discard()


class Outputs:
    """The outputs of one prediction, on their way from the replicas of all ranks to this rank's sink.

    Args:
        session: who we are and how we reach the others.
        travel: a chunk's exchange: from this process's steps to those of all ranks, or None where they do not come.
            Collective.
        sink: of this rank.

    Attributes:
        most_rows: the most that were on their way in this process at any time, of the first output.
    """

    def __init__(self, session: Session, travel: Callable[[Steps], list[Steps] | None], sink: Sink) -> None:
        self._session = session
        self._travel = travel
        self._sink = sink
        self._waiting: list[OfReplicas] = []
        self._wishes: list[bool] = []
        self._steps = 0
        self._chunk_steps = 1
        self.most_rows = 0

    def add(self, results: Sequence[OfReplicas], wish: bool) -> bool:
        """What the steps of one call gave, the same number on every rank. Collective.

        Args:
            wish: this rank wants to stop after them.

        Returns:
            Whether the prediction ends here, the same on every rank.

        Raises:
            InputError: ranks see other batches, or outputs have no rows that could be joined; on every rank.
        """
        self._waiting.extend(results)
        self._wishes.extend([False] * (len(results) - 1) + [wish])
        at_once = wish and self._session.size == 1
        return (at_once or len(self._waiting) >= self._chunk_steps) and self._exchange()

    def result(self) -> Any:
        """All rows, as this rank gets them. Collective.

        Raises:
            InputError: there are none; on every rank.
            RunError: they cannot be written; on every rank.
        """
        if self._waiting:
            self._exchange()
        if not self._steps:
            raise on_every_rank(InputError("Expected data with at least one batch to predict on, received none."))
        return self._session.agree(self._sink.finish)

    def _exchange(self) -> bool:
        """Empty the chunk; whether all end here."""
        own = [[_on_host(outputs) for outputs, _ in of_replicas] for of_replicas in self._waiting]
        facts = self._facts(own)
        for number, fact in enumerate(facts, start=self._steps + 1):
            check_same_batches(fact[:FLAGS], self._session.size, number)
        wished = np.flatnonzero(facts[:, 0])
        last = int(wished[0]) + 1 if wished.size else len(own)
        by_rank = self._travel(own[:last])
        self.most_rows = max(self.most_rows, _rows([own]), _rows(by_rank or []))
        if by_rank is not None:
            self._sink.take(in_order(by_rank))
        self._steps += last
        self._waiting, self._wishes = [], []
        self._chunk_steps = chunk_steps(facts[:, FLAGS].max())
        return bool(wished.size)

    def _facts(self, own: Steps) -> np.ndarray:
        """Of each step, over all ranks: its flags and the bytes of its outputs."""
        flags = np.array([np.asarray(of_replicas[0][1]) for of_replicas in self._waiting], np.float64)
        sizes = [sum(leaf.nbytes for leaf in keras.tree.flatten(replicas)) for replicas in own]
        return self._session.transport.sum(np.column_stack([self._wishes, flags[:, 1:], sizes]).astype(np.float64))


@contextmanager
def outputs(
    session: Session,
    model: Any,
    uneven: bool,
    gather: str | None = None,
    to: str | os.PathLike | None = None,
) -> Iterator[Outputs]:
    """Where the outputs of a prediction go; what is not finished inside is taken away. Collective.

    Args:
        uneven: ranks predict on data of their own (distfit.local), whose outputs they keep.
        gather: "all", "chief", or None for what goes with `to`.
        to: a folder for the chief to write; None for memory.

    Raises:
        InputError: these do not go together, or the folder cannot be written; on every rank.
    """
    gather = session.agree(lambda: _gathering(session.size > 1, gather, to, uneven))
    names = getattr(model, "output_names", None)
    sink: Sink = Memory()
    if gather == "chief" and not session.is_chief:
        sink = Elsewhere()
    elif to is not None:
        sink = Disk(to, names)
    transport = session.transport
    travel = transport.collect if gather == "chief" else transport.gather
    session.agree(sink.begin)
    try:
        yield Outputs(session, (lambda own: [own]) if uneven else travel, sink)
    finally:
        sink.discard()


def chunk_steps(bytes_of_step: float) -> int:
    """How many steps go into a chunk.

    Args:
        bytes_of_step: of the largest one so far, over all ranks.

    >>> chunk_steps(2**20), chunk_steps(2**30), chunk_steps(4)
    (16, 1, 256)
    """
    return int(np.clip(CHUNK_BYTES // max(bytes_of_step, 1), 1, CHUNK_STEPS))


def in_order(by_rank: Sequence[Steps]) -> list[Any]:
    """Outputs of [rank][step][local replica] in the data's order: of each step those of all ranks.

    >>> in_order([[["a"], ["c"]], [["b"], ["d"]]])
    ['a', 'b', 'c', 'd']
    """
    return [piece for of_ranks in zip(*by_rank, strict=True) for of_rank in of_ranks for piece in of_rank]


def of_process(results: Sequence[OfReplicas]) -> Any:
    """What callbacks see of a call: the outputs for this process's rows, tensors as in Keras."""
    pieces = [output for of_replicas in results for output, _ in of_replicas]
    return keras.tree.map_structure(lambda *parts: potentially_ragged_concat(_with_rows(parts)), *pieces)


def names_of(structure: Any, output_names: Sequence[str] | None = None) -> list[str]:
    """Names of a model's outputs, for files: keys of dictionaries, names of layers, places in lists.

    >>> names_of(0), names_of([0, 0], ["digits", "size"]), names_of({"a": 0, "b": [0, 0]})
    (['output'], ['digits', 'size'], ['a', 'b.0', 'b.1'])
    """
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    if isinstance(structure, (list, tuple)) and all(len(path) == 1 for path in paths):
        named = output_names is not None and len(output_names) == len(paths)
        paths = [(name,) for name in output_names] if named and output_names else paths
    names: list[str] = []
    for path in paths:
        name = re.sub(r"[^\w.-]", "_", ".".join(map(str, path))).lstrip(".") or "output"
        names.append(f"{name}.{len(names)}" if name in names else name)
    return names


def _gathering(several: bool, gather: str | None, to: Any, uneven: bool) -> str:
    """
    Raises:
        InputError: there is no such way, or it does not go with the data.
    """
    if gather not in (None, "all", "chief"):
        raise InputError(f"Expected gather to be 'all' or 'chief', received {gather!r}.")
    if to is not None and not isinstance(to, (str, os.PathLike)):
        raise InputError(f"Expected `to` to be the path of a folder to write to, received {to!r}.")
    if to is not None and gather == "all":
        raise InputError(
            "Expected gather='chief', or none, beside to=..., whose files the chief alone opens, received 'all'. Open "
            "them with numpy.load(..., mmap_mode='r') on the other ranks, where these see the folder."
        )
    if several and uneven and (to is not None or gather == "chief"):
        raise InputError(
            "Expected data that all ranks share, whose rows have one order, to collect predictions on the chief, "
            "received distfit.local(...), of which each rank predicts its own. Leave gather and to out: each rank then "
            "gets the outputs of its own data."
        )
    return gather or ("all" if to is None else "chief")


def _on_host(structure: Any) -> Any:
    """
    Raises:
        InputError: an output is no dense tensor; every rank's model has the same.
    """
    for leaf in keras.tree.flatten(structure):
        if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
            raise on_every_rank(
                InputError(
                    f"Expected outputs that are dense tensors to predict, received a {type(leaf).__name__}. Let the "
                    "model end with its to_tensor() (ragged) or tf.sparse.to_dense."
                )
            )
    return keras.tree.map_structure(np.asarray, structure)


def _joined(parts: Sequence[np.ndarray]) -> Any:
    """The rows of all parts; as in Keras, a tf.RaggedTensor where batches have rows of several shapes."""
    rows = [np.atleast_1d(part) for part in parts]
    if len({part.shape[1:] for part in rows}) == 1:
        return np.concatenate(rows)
    return potentially_ragged_concat([tf.constant(part) for part in _with_rows(rows)])


def _with_rows(parts: Sequence[Any]) -> list[Any]:
    """Those that are not empty; one that is, if all are."""
    return [part for part in parts if len(part.shape) == 0 or part.shape[0]] or list(parts[:1])


def _rows(by_rank: Sequence[Steps]) -> int:
    """Rows of the first output."""
    return sum(
        np.atleast_1d(keras.tree.flatten(piece)[0]).shape[0] for steps in by_rank for step in steps for piece in step
    )
