"""What one rank of the verification does: add numbers over all ranks, tell which libmpi is loaded.

    mpirun -np 2 python -P rank_check.py FOLDER      # each rank leaves FOLDER/rank-<n>.json

Started as a file, so that nothing but Horovod and mpi4py themselves must be importable.
"""

import json
import re
import sys
from pathlib import Path

# Open MPI's, MPICH's and the vendors' names; not the Fortran and C++ bindings beside them.
_LIBMPI = re.compile(r"\s(/\S*/libmpi(?:ch)?(?:_(?:gnu|intel|cray|aocc)\w*)?\.so\S*)$")


def loaded_libmpi(maps: str) -> list[str]:
    """The paths of the MPI libraries among a process's memory maps.

    >>> loaded_libmpi("7f00-7f10 r-xp 0 08:01 11 /opt/mpi/lib/libmpi.so.40.30.8")
    ['/opt/mpi/lib/libmpi.so.40.30.8']
    """
    return sorted({found[1] for line in maps.splitlines() if (found := _LIBMPI.search(line))})


def main(folder: Path) -> None:
    """Check this rank and write what was seen."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()  # first: mpi4py then joins the MPI that Horovod started
    from mpi4py import MPI

    mine = float(hvd.rank() + 1)
    seen = {
        "rank": hvd.rank(),
        "size": hvd.size(),
        "horovod_sum": float(hvd.allreduce(tf.constant(mine), op=hvd.Sum, name="distfit.check").numpy()),
        "mpi4py_sum": MPI.COMM_WORLD.allreduce(mine),
        "mpi": bool(hvd.mpi_built()),
        "gloo": bool(hvd.gloo_built()),
        "libmpi": loaded_libmpi(Path("/proc/self/maps").read_text()),
    }
    (folder / f"rank-{hvd.rank()}.json").write_text(json.dumps(seen))
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
