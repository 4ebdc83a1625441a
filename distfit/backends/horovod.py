"""Many processes, on one host or many: Horovod's all-reduce. The only file that imports Horovod.

Horovod's Keras layer does not work with Keras 3 (its DistributedOptimizer reduces nothing), so only its
low-level ops are used, on tensors that the step has packed itself. Host values travel by mpi4py when the
ranks were started under MPI, else by Horovod's own functions.
"""

from __future__ import annotations

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

# What Horovod's broadcast takes (horovod/tensorflow/mpi_ops.cc).
_BROADCAST = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


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
    reduction_dtypes = ("float32", "float16")

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
        self.transport: Transport = mpi or _HorovodObjects(hvd)

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

        known = value.dtype.name in _BROADCAST
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
            return [
                self._hvd.allgather(_never_folded(tensor), name=f"distfit.{name}.{number}")
                for number, tensor in enumerate(tensors)
            ]

    def _sum(self, tensor: Any, name: str) -> Any:
        import tensorflow as tf

        # Horovod adds no bfloat16; float32 holds them exactly, and rounds their sum less.
        own = tensor.dtype
        sent = tf.cast(tensor, tf.float32) if own == tf.bfloat16 else tensor
        with _in_no_scope():
            return tf.cast(self._hvd.allreduce(_never_folded(sent), op=self._hvd.Sum, name=name), own)


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

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd

    def broadcast(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0, name="distfit.object")

    def gather(self, value: Any) -> list[Any]:
        return self._hvd.allgather_object(value, name="distfit.objects")

    def sum(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self._hvd.allgather_object(array, name="distfit.arrays"), axis=0)
