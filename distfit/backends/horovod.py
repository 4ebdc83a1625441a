"""Many processes, on one host or many: Horovod's all-reduce. The only file that imports Horovod.

Horovod's Keras layer does not work with Keras 3 (its DistributedOptimizer reduces nothing), so only its
low-level ops are used, on tensors that the step has packed itself. Host values travel by mpi4py when the
ranks were started under MPI, else by Horovod's own functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distfit.backends.base import Backend
from distfit.backends.devices import pin_gpu
from distfit.backends.transport import MPI, Transport
from distfit.errors import InputError
from distfit.install.rank_check import loaded_libmpi
from distfit.meeting import same_mpi, several_mpis
from distfit.topology import Topology

# Read by Horovod when it starts. The step packs its own buckets; fusing them again in order of readiness
# gives another order of additions, so another bit pattern, in every run on three ranks or more. The failure
# watch has its own limit for a rank that stays away, and says more than Horovod's stall check.
_ENVIRONMENT = {"HOROVOD_FUSION_THRESHOLD": "0", "HOROVOD_AUTOTUNE": "0", "HOROVOD_STALL_CHECK_DISABLE": "1"}

# What Horovod's broadcast, allgather and alltoall take (horovod/tensorflow/mpi_ops.cc).
_KNOWN = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


def missing() -> str | None:
    """Why Horovod cannot be used here, or None when it can."""
    try:
        import horovod.tensorflow as hvd  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


class Horovod(Backend):
    """One replica in each of several processes."""

    title = "horovod (one replica a rank)"

    def __init__(self, topology: Topology, devices: int | None = None) -> None:
        if devices not in (None, 1):
            raise InputError(
                f"Expected one device for each rank, received devices={devices}. Leave devices out and start one "
                "rank a GPU."
            )
        self.topology = topology

    def start(self) -> None:
        self.devices = pin_gpu(self.topology.local_rank)
        os.environ.update(_ENVIRONMENT)
        # A rank that is killed is the watch's to report; Horovod's own words would come before it.
        os.environ.setdefault("HOROVOD_LOG_LEVEL", "fatal")
        import horovod.tensorflow as hvd

        # Before Horovod, which would end MPI for all ranks as soon as the first one leaves.
        mpi = _start_mpi() if _by_mpi(hvd) else None
        libraries = loaded_libmpi(Path("/proc/self/maps").read_text())
        _refuse(several_mpis(libraries) if mpi else None)
        hvd.init()
        _refuse(same_mpi(self.topology.size, hvd.size(), libraries))
        self._hvd = hvd
        self.topology = Topology(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        self.transport: Transport = mpi or _HorovodObjects(hvd, self.topology.is_chief)

    def stop(self) -> None:
        self._hvd.shutdown()

    def build(self, model: Any, data_spec: Any, targets: bool = True) -> None:
        from distfit.backends.hooks import build

        build(model, data_spec, targets)

    @contextmanager
    def adopted(self, model: Any) -> Iterator[None]:
        from distfit.backends.hooks import everything_shared, hooked

        with everything_shared(model) as variables:
            for number, variable in enumerate(variables):
                variable._value.assign(self._from_chief(variable.value, f"distfit.start.{number}"))
            with hooked(model, self):
                yield

    def _from_chief(self, value: Any, name: str) -> Any:
        """The chief's tensor on every rank; types that Horovod does not know travel as bytes."""
        import tensorflow as tf

        known = value.dtype.name in _KNOWN
        received = self._hvd.broadcast(value if known else tf.bitcast(value, tf.uint8), root_rank=0, name=name)
        return received if known else tf.bitcast(received, value.dtype)

    def run(self, function: Callable[..., Any], shards: Sequence[Sequence[Any]]) -> list[Any]:
        return [function(*shards[0])]

    def failed_elsewhere(self, error: BaseException) -> bool:
        return "Horovod has been shut down" in str(error) or type(error).__name__ == "HorovodInternalError"

    def replica(self) -> int:
        return self.topology.rank

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return [self._sum(tensor, f"distfit.{name}.{number}") for number, tensor in enumerate(tensors)]

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        with _in_no_scope():
            return [self._gather(tensor, f"distfit.{name}.{number}") for number, tensor in enumerate(tensors)]

    def _sum(self, tensor: Any, name: str) -> Any:
        import tensorflow as tf

        with _in_no_scope():
            if tensor.dtype == tf.bfloat16:
                return self._sum_in_parts(tensor, name)
            return self._hvd.allreduce(_never_folded(tensor), op=self._hvd.Sum, name=name)

    def _sum_in_parts(self, tensor: Any, name: str) -> Any:
        """The sum of a type that Horovod's all-reduce cannot add: each rank adds up one part, in float32 and in the
        order of the ranks, rounds it once, and all gather the parts. As many bytes as a ring all-reduce sends, and the
        same bits on every rank."""
        import tensorflow as tf

        # Not the static size: how many rows an Embedding's gradient has is known when it runs.
        size, elements = self.topology.size, tf.size(tensor)
        length = -(-elements // size)
        padded = tf.pad(tf.reshape(tensor, [-1]), [[0, length * size - elements]])
        sent = _never_folded(tf.bitcast(padded, tf.uint16))
        received = tf.bitcast(self._hvd.alltoall(sent, name=f"{name}.parts"), tensor.dtype)
        addends = tf.unstack(tf.cast(tf.reshape(received, [size, length]), tf.float32))
        total = functools.reduce(tf.add, addends)  # tf.add_n promises no order
        parts = self._gather(tf.cast(total, tensor.dtype), f"{name}.total")
        return tf.ensure_shape(tf.reshape(parts[:elements], tf.shape(tensor)), tensor.shape)

    def _gather(self, tensor: Any, name: str) -> Any:
        import tensorflow as tf

        # Types that Horovod does not know are all of two bytes: bfloat16.
        known = tensor.dtype.name in _KNOWN
        sent = tensor if known else tf.bitcast(tensor, tf.uint16)
        received = self._hvd.allgather(_never_folded(sent), name=name)
        return received if known else tf.bitcast(received, tensor.dtype)


def _in_no_scope() -> Any:
    """Horovod pairs collectives up by the names of their nodes, and a layer's name is part of those made in its scope.
    A rank that has built another model before has other names of layers."""
    import tensorflow as tf

    return tf.name_scope("")


def _never_folded(tensor: Any) -> Any:
    """The same tensor for a collective, which TensorFlow may not run while it optimises the graph.

    Horovod's ops are not marked stateful: with constant inputs one would run once more, and the ranks' collectives
    would pair up one step apart from then on. A placeholder with a default is never folded.
    """
    import tensorflow as tf

    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=tensor.shape)


def _by_mpi(hvd: Any) -> bool:
    """Whether Horovod will talk by MPI: horovodrun names the controller, mpirun leaves it to Horovod's build."""
    return hvd.mpi_built() and os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "mpi"


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise InputError(reason)


def _start_mpi() -> MPI:
    """MPI, also where its own mpirun did not start this process.

    PyPI's Open MPI, which lies elsewhere than it was compiled for, then looks for its daemon in the old place and ends
    the process before `same_mpi` can say that the launcher belongs to another MPI. So it is told where it lies.
    """
    libraries = loaded_libmpi(Path("/proc/self/maps").read_text())
    if len(libraries) == 1 and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        prefix = Path(libraries[0]).parent.parent
        if (prefix / "bin" / "orted").exists():
            os.environ.setdefault("OPAL_PREFIX", str(prefix))
    return MPI()


class _HorovodObjects:
    """Host values by Horovod's own functions, for ranks that were not started under MPI."""

    def __init__(self, hvd: Any, is_chief: bool) -> None:
        self._hvd, self._is_chief = hvd, is_chief

    def broadcast(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0, name="distfit.object")

    def gather(self, value: Any) -> list[Any]:
        return self._hvd.allgather_object(value, name="distfit.objects")

    def collect(self, value: Any) -> list[Any] | None:
        # Horovod has no gathering at one rank: the others get everything too, and let go of it.
        gathered = self.gather(value)
        return gathered if self._is_chief else None

    def sum(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self._hvd.allgather_object(array, name="distfit.arrays"), axis=0)
