"""The state of a training as it was between two steps: one copy in memory, in buffers that are there beforehand.

    snapshot = Snapshot([("weight/0", variable), ...], backend.first_copy)
    snapshot.prepare()                                     # before the first step: room for all of them
    snapshot.take()                                        # between two steps: one copy of each variable
    snapshot.tensors                                       # what was copied, by name, until the next `take`

A training stands still for `take` alone, and `take` costs what copying the state's bytes in memory costs: a variable
is read where it lies. Nothing that it read lives on, as TensorFlow's next update in place of a variable that somebody
still reads would copy it first. Who writes `tensors` out may take his time (writer.py) but has to be done before the
next `take`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from distfit.checkpoint.pace import rest
from distfit.errors import InputError, RunError

# Bytes from which on several threads copy one tensor: below, starting them takes longer than they save.
_WORTH_THREADS = 8 * 2**20
# One thread does not fill a memory bus; a second halved the time of a copy on two cores.
_MOST_THREADS = 4
# Every tensor begins at a multiple of it, so that any type of number may be read there.
_ALIGNED = 16
# Elements that are looked at at a time: 256 KiB of answers, and for less than a millisecond Python's lock, which NumPy
# keeps while it works on the types of ml_dtypes.
_BLOCK = 2**18


def memory_of(variable: tf.Variable | np.ndarray) -> np.ndarray:
    """What a variable holds: its own memory where it lies in the host's, one copy from a GPU. An array is itself.

    It has to be gone before the variable is updated again, or TensorFlow moves the variable to a new place.

    A variable that was ever read by rows, as the table of an Embedding is, is copied by TensorFlow whenever it is read
    as a whole. The switch for that is turned off here; the next lookup turns it on again, without a copy where nobody
    holds what was read ("copy_on_read_mode", tensorflow/core/kernels/training_op_helpers.h).

    >>> variable = tf.Variable([1.0, 2.0])
    >>> memory_of(variable).tolist()
    [1.0, 2.0]
    """
    if isinstance(variable, np.ndarray):
        return variable
    handle = variable.handle
    tf.raw_ops.DisableCopyOnRead(resource=handle)
    # `variable.read_value()` is the same read, and takes twice the time.
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=variable.dtype)
    # Of a single bfloat16 TensorFlow makes no array without a copy.
    return np.asarray(value if variable.shape.rank else value.numpy())


class Snapshot:
    """One copy of named variables in memory.

    Args:
        variables: names, each once, and what they name. Looked at anew by every `take`: what has joined, left or
            changed its shape gets new buffers.
        value_of: of one of them, what holds its value: a tf.Variable or an array. By default it is one itself.

    Attributes:
        tensors: what the last `take` copied, by name: the buffers themselves.

    >>> weights = np.ones(3)
    >>> snapshot = Snapshot([("weights", weights)])
    >>> snapshot.take()
    >>> weights[:] = 0
    >>> snapshot.tensors["weights"].tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(
        self, variables: Sequence[tuple[str, Any]], value_of: Callable[[Any], Any] = lambda variable: variable
    ) -> None:
        self._variables, self._value_of = variables, value_of
        self.tensors: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold; the buffers take some for their alignment beside."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def prepare(self) -> None:
        """Make room for every variable, all of it touched, so that no `take` waits for memory.

        Raises:
            InputError: a name comes twice, or a variable holds no numbers.
        """
        # The old buffers go first: two would be twice the state.
        self.tensors = {}
        forms = [self._form(name, variable) for name, variable in self._variables]
        _once([name for name, _, _ in forms])
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for _, dtype, shape in forms]
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes], dtype=np.int64)
        room = np.empty(int(ends[-1]) if sizes else 0, np.uint8)
        room.fill(0)
        starts = [0, *map(int, ends[:-1])]
        for (name, dtype, shape), start, size in zip(forms, starts, sizes, strict=True):
            self.tensors[name] = room[start : start + size].view(dtype).reshape(shape)

    def take(self) -> None:
        """Copy every variable as it is now.

        Raises:
            InputError: as `prepare`, which is called where the variables are not those of the last time.
            RunError: a variable changes its form while it is copied.
        """
        if self._copied():
            return
        self.prepare()
        if not self._copied():
            raise RunError(
                "Expected variables that stay as they are between two steps, received one that changes its shape or "
                "type while it is copied. Let no other thread change the model."
            )

    def _form(self, name: str, variable: Any) -> tuple[str, np.dtype, tuple[int, ...]]:
        value = memory_of(self._value_of(variable))
        if value.dtype.hasobject:
            raise InputError(
                f"Expected variables that hold numbers, received {name!r} of {value.dtype}, as one of text is. Keep it "
                "out of the variables of the model, its metrics and its optimizer, or train without a checkpoint."
            )
        return name, value.dtype, value.shape

    def _copied(self) -> bool:
        """Whether every variable had a buffer of its own form, and every buffer a variable."""
        if [name for name, _ in self._variables] != list(self.tensors):
            return False
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        worth = threads > 1 and any(tensor.nbytes >= _WORTH_THREADS for tensor in self.tensors.values())
        # The pool's threads end in here: one that idled might still hold what it copied last.
        with ThreadPoolExecutor(threads) if worth else nullcontext() as pool:
            for name, variable in self._variables:
                buffer, value = self.tensors[name], memory_of(self._value_of(variable))
                if (buffer.dtype, buffer.shape) != (value.dtype, value.shape):
                    return False
                _copy(buffer, value, pool, threads)
                del value
        return True


def non_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the tensors that hold NaN or infinity.

    Reads each once, a block at a time: no second tensor in memory.

    >>> half = np.array([1, np.inf, np.nan], "float16")
    >>> non_finite({"a": np.zeros(3), "b": half, "c": np.array([7])})
    ['b']
    """
    return [name for name, tensor in tensors.items() if _may_be_nan(tensor.dtype) and not _all_finite(tensor)]


def _once(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"Expected each variable to have a name of its own, received {name!r} twice. Rename one.")
        seen.add(name)


def _copy(buffer: np.ndarray, value: np.ndarray, pool: ThreadPoolExecutor | None, threads: int) -> None:
    """As bytes: the copy is the same for every type, those of ml_dtypes and every NaN among them."""
    to, from_ = _bytes(buffer), _bytes(np.ascontiguousarray(value))
    if pool is None or buffer.nbytes < _WORTH_THREADS:
        np.copyto(to, from_)
        return
    cuts = [len(to) * part // threads for part in range(threads + 1)]
    parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
    list(pool.map(lambda part: np.copyto(to[part], from_[part]), parts))


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _may_be_nan(dtype: np.dtype) -> bool:
    """
    >>> [_may_be_nan(np.dtype(name)) for name in ("float16", "bfloat16", "float8_e4m3fn", "complex64", "int4", "bool")]
    [True, True, True, True, False, False]
    """
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:  # how it says that a type is none of floats
        return False
    return True


def _all_finite(tensor: np.ndarray) -> bool:
    flat = tensor.reshape(-1)
    finite = np.empty(min(_BLOCK, flat.size), bool)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
    for block in blocks:
        if not np.isfinite(block, out=finite[: block.size]).all():
            return False
        rest()
    return True
