"""What the kernel says of this machine: cores, limits, shared memory, addresses, the run folder. Takes milliseconds.

The run folder is the exception: a network file system that hangs is its owner's to limit.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from distfit import cgroups
from distfit.doctor.facts import Folder, Machine, Network
from distfit.folders import existing
from distfit.watch import addresses

_SHM = Path("/dev/shm")
# A model of 50 million weights with Adam's state; large enough for the disk to notice.
_TRIAL_BYTES = 8 * 2**20


def machine(cgroup: Path = cgroups.MOUNTED, mine: Path = cgroups.MINE, shm: Path = _SHM) -> Machine:
    """Cores and memory, with the limits of a container or a batch job (control groups, version 2 and 1).

    Args:
        cgroup: where the control groups are mounted; a test gives its own.
        mine: the file that says which of them this process is in.
        shm: the folder of shared memory.
    """
    groups = cgroups.of_this_process(cgroup, mine)
    memory = psutil.virtual_memory()
    limit, left = cgroups.memory_limit(groups), cgroups.memory_left(groups)
    room = shutil.disk_usage(shm) if shm.is_dir() else None
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        all_cores=os.cpu_count() or 1,
        quota=cgroups.core_quota(groups),
        memory=memory.total if limit is None else min(memory.total, limit),
        available=memory.available if left is None else min(memory.available, left),
        shm=room.total if room else None,
        shm_free=room.free if room else None,
        load=os.getloadavg()[0],
    )


def network(environment: Mapping[str, str] = os.environ) -> Network:
    """This host's name and addresses."""
    host = socket.gethostname()
    try:
        found = tuple(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}))
    except OSError:  # it does not resolve, which the line says
        found = ()
    return Network(host, found, tuple(addresses.offered()), environment.get(addresses.VARIABLE, ""))


def folder(path: str | os.PathLike[str]) -> Folder:
    """Write, flush and rename a file in the run folder, or in the nearest folder above it; nothing is left behind."""
    there = existing(path)
    if not there.is_dir():
        return Folder(str(path), str(there), problem=f"{there} is not a folder")
    try:
        free, seconds = shutil.disk_usage(there).free, _try(there)
    except OSError as error:
        return Folder(str(path), str(there), _filesystem(there), problem=f"{error.strerror or error} ({there})")
    return Folder(str(path), str(there), _filesystem(there), free, seconds)


def _try(there: Path) -> float:
    """Seconds of what every checkpoint does: a temporary name, fsync, rename over a file that is there."""
    with tempfile.TemporaryDirectory(prefix=".distfit-doctor-", dir=there) as scratch:
        target, temporary = Path(scratch) / "model", Path(scratch) / "model.temporary"
        target.write_bytes(b"old")
        started = time.perf_counter()
        with temporary.open("wb") as file:
            file.write(os.urandom(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if target.stat().st_size != _TRIAL_BYTES:
            raise OSError(f"{_TRIAL_BYTES} bytes were written and {target.stat().st_size} are there")
        return time.perf_counter() - started


def _filesystem(there: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if there.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
