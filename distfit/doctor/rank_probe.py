"""What one of the doctor's two ranks does: start as a training does, reduce, check, and only then measure.

    mpirun -np 2 python -P -m distfit.doctor.rank_probe FOLDER     # each rank writes FOLDER/<pid>.jsonl

The order is that of `distfit.backends.horovod`: the device, Horovod, mpi4py (which starts MPI), `hvd.init`.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from distfit.backends.devices import pin_gpu
from distfit.doctor.probe import libmpi
from distfit.topology import from_environment

ELEMENTS = 16 * 2**20  # of float32: 64 MiB, as two of the step's buckets
REPEATS = 3


def main(folder: Path) -> None:
    """Check this rank; each stage is on the disk before the next one starts."""
    with (folder / f"{os.getpid()}.jsonl").open("w") as file:

        def say(**found: Any) -> None:
            print(json.dumps(found), file=file, flush=True)

        _check(say)


def _check(say: Any) -> None:
    say(stage="importing TensorFlow")
    import tensorflow as tf

    say(stage="taking its device")
    device = _take_device(tf)
    say(device=device, stage="importing Horovod")
    import horovod.tensorflow as hvd

    say(stage="starting MPI through mpi4py")
    from mpi4py import MPI

    say(libmpi=libmpi(), stage="starting Horovod")
    hvd.init()
    say(rank=hvd.rank(), size=hvd.size(), local_rank=hvd.local_rank(), stage="adding through mpi4py")
    say(mpi4py_sum=MPI.COMM_WORLD.allreduce(hvd.rank() + 1), stage="adding through Horovod")
    right, seconds = _reduce(tf, hvd)
    say(right=right, seconds=seconds, bytes=ELEMENTS * 4, stage="leaving")
    hvd.shutdown()
    say(stage="done")


def _take_device(tf: Any) -> str:
    """The GPU that a real rank would take, where every rank has one; else the CPU."""
    place = from_environment(os.environ)
    if len(tf.config.list_physical_devices("GPU")) >= place.local_size:
        return pin_gpu(place.local_rank)[0]
    tf.config.set_visible_devices([], "GPU")
    return "CPU:0"


def _reduce(tf: Any, hvd: Any) -> tuple[bool, float]:
    """Whether every element of every sum is right, and the median seconds of one all-reduce."""
    # Whole numbers below 2**24 are exact in float32, so the sum is compared to the bit.
    pattern = tf.cast(tf.range(ELEMENTS) % 4096, tf.float32)
    mine, expected = pattern * (hvd.rank() + 1), pattern * (hvd.size() * (hvd.size() + 1) // 2)
    right, seconds = True, []
    for number in range(1 + REPEATS):
        started = time.perf_counter()
        total = hvd.allreduce(mine, op=hvd.Sum, name=f"distfit.doctor.{number}")
        total[0].numpy()  # waits for the device
        seconds.append(time.perf_counter() - started)
        right = right and bool(tf.reduce_all(total == expected).numpy())
    return right, statistics.median(seconds[1:])  # the first one makes the connections


if __name__ == "__main__":
    main(Path(sys.argv[1]))
