"""How host values (objects, counts, fingerprints) travel between the processes of a job.

Tensors of a step never come this way: they travel by the engine's own ops. Every call is collective: all
processes make it, in the same order.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from distfit.errors import InputError


class Transport(Protocol):
    """Collective calls for host values.

    `broadcast` returns the chief's object everywhere, `gather` every process's object in rank order, `collect` the
    same on the chief alone and None elsewhere, `sum` the element-wise sum of one float64 array of the same shape from
    each process.
    """

    def broadcast(self, value: Any) -> Any: ...

    def gather(self, value: Any) -> list[Any]: ...

    def collect(self, value: Any) -> list[Any] | None: ...

    def sum(self, array: np.ndarray) -> np.ndarray: ...


class Alone:
    """One process: nothing has to travel.

    >>> Alone().gather("here")
    ['here']
    """

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def collect(self, value: Any) -> list[Any] | None:
        return [value]

    def sum(self, array: np.ndarray) -> np.ndarray:
        return array


class MPI:
    """mpi4py, on a communicator of our own, so that no message meets another library's.

    Starts MPI, unless it has been started, and ends it when the process exits. Made before the engine starts:
    a library that finds MPI running leaves it running.

    Raises:
        InputError: mpi4py is not installed, or finds no MPI.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI as mpi
        except (ImportError, RuntimeError) as error:  # absent, or present without an MPI library that loads
            raise InputError(
                "The ranks were started under MPI, which needs mpi4py for values outside the step, and "
                f"mpi4py cannot be imported ({error}). Type: pip install 'distfit[mpi]' (or, against a cluster's own "
                "MPI, pip install --no-binary mpi4py mpi4py). Run `distfit doctor` to see which MPI it finds."
            ) from error
        self._communicator = mpi.COMM_WORLD.Dup()

    def broadcast(self, value: Any) -> Any:
        return self._communicator.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        return self._communicator.allgather(value)

    def collect(self, value: Any) -> list[Any] | None:
        return self._communicator.gather(value)

    def sum(self, array: np.ndarray) -> np.ndarray:
        total = np.empty_like(array)
        self._communicator.Allreduce(array, total)
        return total
