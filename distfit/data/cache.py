"""Rows kept between epochs, shared by the ranks of a host: what was decoded once is read, not decoded again.

    cache = RowCache(records=50_000, fields=fields_of(row.steady_spec), where="memory", name=run)
    hits, arrays = cache.get(numbers)        # bool [n], and for each field an array [n, ...], zeros where it missed
    cache.put(numbers[~hits], arrays_made)
    cache.close()

One file of equal slots, a slot for each record, in /dev/shm or in a folder on a disk. It is sparse: a slot takes space
when it is written. Every process of the host that asks for the same name, records and fields has the same file.

**Never half a row.** A slot begins with a stamp, a sum of the row's 64-bit words that depends on the record too, and
is 0 in a slot that was never written. A reader takes slot and stamp in one read and sums again: a row that another
process is writing, or that a killed one left half written, does not add up and counts as missing. Two that write the
same row write the same bytes. Slots are read and written by system calls and not through mapped memory, so that a full
disk is an error and not a signal that kills the process.

**Nothing left behind.** The file is removed at `close`, when Python ends, or when the cache is forgotten; after a crash
by the next run in the same folder (`cache_file`).
"""

from __future__ import annotations

import errno
import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distfit import log
from distfit.data.cache_file import SharedFile, Where, place_for
from distfit.errors import InputError, RunError

_WORD = 8
# Any odd number with bits all over: neighbouring records get stamps that have nothing in common.
_SCATTER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Field:
    """One array of a row.

    Args:
        shape: without a batch dimension, all of it known.
        dtype: of numpy, of a fixed size.

    >>> Field((2, 3), np.dtype("float32")).bytes
    24
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


def fields_of(spec: Any) -> list[Field]:
    """The fields of rows with these `tf.TensorSpec`s (any structure), in the order of `tf.nest.flatten`.

    Raises:
        InputError: a row without a fixed size: strings, unknown shapes, sparse or ragged tensors.
    """
    import keras
    import tensorflow as tf

    fields = []
    for path, one in keras.tree.flatten_with_path(spec):
        if not isinstance(one, tf.TensorSpec) or one.dtype == tf.string or not one.shape.is_fully_defined():
            name = repr("/".join(map(str, path))) if path else "the row"
            raise InputError(
                f"Expected rows of fixed size for cache=, received {name} as {_in_words(one)}. Put decoding and "
                "resizing before the first random part of transform, tf.ensure_shape behind them, or leave out cache."
            )
        fields.append(Field(tuple(one.shape), np.dtype(one.dtype.as_numpy_dtype)))
    return fields


def _in_words(spec: Any) -> str:
    kind = getattr(getattr(spec, "dtype", None), "name", "")
    return f"{kind or type(spec).__name__} of shape {getattr(spec, 'shape', 'unknown')}"


class RowCache:
    """The rows of one source.

    Args:
        records: of the source; numbers are 0 to records - 1.
        fields: of a row.
        where: "memory" is /dev/shm, or the temporary folder if that has no room; "disk" is a folder of the user's.
        name: of this run and source, the same on every rank and in no other run; letters, digits, "-" and "_".
        folder: for "disk"; None is the user's cache folder ($XDG_CACHE_HOME or ~/.cache). Best on a disk of this host.

    Raises:
        InputError: no such place, a folder that cannot be written, or too little room for all rows.
    """

    def __init__(
        self,
        records: int,
        fields: Sequence[Field],
        where: Where,
        name: str,
        folder: str | os.PathLike | None = None,
    ) -> None:
        check_place(where)
        self.records, self.fields = records, tuple(fields)
        self._row = sum(field.bytes for field in self.fields)
        # Whole words, which a stamp can sum.
        self._stride = _WORD + -(-self._row // _WORD) * _WORD
        try:
            self.path = place_for(where, folder, f"{name}-{records}x{self._stride}", self.bytes)
            self._file: SharedFile | None = SharedFile(self.path, self.bytes)
        except OSError as error:
            raise InputError(
                f"Expected a folder for cache={where!r} that can be written and locked, received {error.filename!r}: "
                f"{error.strerror}. Name another one, or leave out cache."
            ) from error
        self._full = False
        self._finalizer = weakref.finalize(self, self._file.remove)

    @property
    def bytes(self) -> int:
        """What the rows of all records take, bytes."""
        return self.records * self._stride

    def get(self, numbers: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The rows that are there; several threads may ask at a time.

        Args:
            numbers: of records, int64 [n].

        Returns:
            Which are there, bool [n], and for each field an array [n, *shape], zeros for a row that is not there.
        """
        slots = np.zeros((len(numbers), self._stride), np.uint8)
        # A reader that is ahead may come after `close`; then nothing is there any more.
        if (file := self._file) is not None:
            for slot, number in zip(slots, np.asarray(numbers).tolist(), strict=True):
                self._read(file, slot, number)
        words = slots.view(np.uint64)
        hits = (words[:, 0] != 0) & (words[:, 0] == _stamps(words[:, 1:], numbers))
        slots[~hits] = 0
        return hits, self._split(slots)

    def put(self, numbers: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Keeps rows.

        Where a disk has filled up since the start it says so once and keeps no more.

        Args:
            numbers: of records, int64 [n].
            rows: for each field an array [n, *shape].

        Raises:
            RunError: the file cannot be written.
        """
        if not len(numbers):
            return
        file = self._file
        if self._full or file is None:
            return
        slots = np.zeros((len(numbers), self._stride), np.uint8)
        start = _WORD
        for field, values in zip(self.fields, rows, strict=True):
            flat = np.ascontiguousarray(values, field.dtype).reshape(len(numbers), -1)
            slots[:, start : start + field.bytes] = flat.view(np.uint8).reshape(len(numbers), -1)
            start += field.bytes
        words = slots.view(np.uint64)
        words[:, 0] = _stamps(words[:, 1:], numbers)
        for slot, number in zip(slots, np.asarray(numbers).tolist(), strict=True):
            self._write(file, slot, number)

    def close(self) -> None:
        """Removes the file; other processes that have it open keep it. From here on nothing is found or kept."""
        self._finalizer()
        self._file = None

    def _read(self, file: SharedFile, slot: np.ndarray, number: int) -> None:
        if os.preadv(file.fd, [slot.data], number * self._stride) != self._stride:
            raise RunError(
                f"Expected a cache of {self.bytes:,} bytes in {self.path!r}, received one that was cut off meanwhile. "
                "Leave files of a running training alone, and run again."
            )

    def _write(self, file: SharedFile, slot: np.ndarray, number: int) -> None:
        try:
            written = os.pwritev(file.fd, [slot.data], number * self._stride)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    f"Expected to write the cache {self.path!r}, received: {error.strerror}. Choose another folder, or "
                    "leave out cache."
                ) from error
            written = 0
        # The beginning of a row that found no room does not add up, and is none.
        if written != self._stride:
            self._full = True
            log.warn_once(
                f"{os.path.dirname(self.path)!r} has filled up: from here on rows are made again in every epoch that "
                "are not in the cache yet. Free some space, or leave out cache."
            )

    def _split(self, slots: np.ndarray) -> list[np.ndarray]:
        arrays, start = [], _WORD
        for field in self.fields:
            part = np.ascontiguousarray(slots[:, start : start + field.bytes])
            arrays.append(part.view(field.dtype).reshape(len(slots), *field.shape))
            start += field.bytes
        return arrays


# A Python function as one of TensorFlow's: (function, types of its results) -> operation of the same arguments.
Python: TypeAlias = Callable[[Callable[..., tuple], Sequence[Any]], Callable[..., Sequence[Any]]]


def cached(steady: Callable[[Any], Any], spec: Any, cache: RowCache, python: Python) -> Callable[[Any, Any], Any]:
    """A row function that does its work once for each record, in the graph of tf.data.

    Args:
        steady: from a serialized record to a value that depends on it alone.
        spec: the `tf.TensorSpec`s of that value.
        cache: with the fields of `spec`.
        python: wraps the cache's methods, as `pipeline.Pipeline.python` does.

    Returns:
        From a record's number (int64 scalar) and the serialized record to the value.
    """
    import tensorflow as tf

    specs = tf.nest.flatten(spec)
    types = [one.dtype for one in specs]

    def load(number: np.ndarray) -> tuple[np.ndarray, ...]:
        hits, rows = cache.get(np.array([number]))
        return hits[0], *(row[0] for row in rows)

    def store(number: np.ndarray, *row: np.ndarray) -> tuple[np.ndarray, ...]:
        cache.put(np.array([number]), [one[None] for one in row])
        # Handed through: TensorFlow leaves out a stateless operation that nobody takes a result from.
        return row

    def value_of(number: Any, serialized: Any) -> Any:
        hit, *found = python(load, [tf.bool, *types])(number)
        row = tf.cond(
            tf.ensure_shape(hit, []),
            lambda: found,
            lambda: list(python(store, types)(number, *tf.nest.flatten(steady(serialized)))),
        )
        row = [tf.ensure_shape(one, each.shape) for one, each in zip(row, specs, strict=True)]
        return tf.nest.pack_sequence_as(spec, row)

    return tf.autograph.experimental.do_not_convert(value_of)


def check_place(where: str | None) -> None:
    """
    Raises:
        InputError: rows cannot be kept there.
    """
    if where not in (None, "memory", "disk"):
        raise InputError(f'Expected cache to be "memory", "disk" or None, received {where!r}.')


def _stamps(words: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A number for each row that is never 0; words that were not written are zeros and miss in the sum."""
    sums = words.sum(axis=1, dtype=np.uint64)
    scattered = (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * np.uint64(_SCATTER)
    stamps = sums + scattered
    return np.where(stamps == 0, np.uint64(1), stamps)
