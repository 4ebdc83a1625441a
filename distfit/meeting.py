"""What the processes of a job tell each other when they meet, what is refused then, and what is advised.

    everybody = transport.gather(introduction(host, seen, taken))
    problem(everybody)          # the same answer on every rank
    advice(everybody, ...)

Plain values, as a rank may run another version of distfit than its neighbour: that is found here, before
anything else travels between them. No TensorFlow.
"""

import functools
import hashlib
import importlib.metadata
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distfit.differences import ranks_text, table
from distfit.topology import launched

# What decides about numbers, or about what travels between ranks.
PACKAGES = ("tensorflow", "keras", "horovod", "numpy")

Introduction = Mapping[str, Any]


def introduction(host: str, gpus_seen: Sequence[str], gpus_taken: Sequence[str]) -> Introduction:
    """What a process says of itself: its host, its versions, the GPUs that it sees and those that it takes."""
    return {"host": host, "versions": versions(), "seen": list(gpus_seen), "taken": list(gpus_taken)}


@functools.cache
def versions() -> Mapping[str, str]:
    """What runs in this process, by name; nothing is imported for it.

    distfit's own version is followed by a digest of its source files: two checkouts of one version may differ.
    """
    found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in PACKAGES:
        found[package] = installed(package)
    return {**found, "distfit": f"{installed('distfit')} ({_digest(Path(__file__).parent)})"}


def problem(everybody: Sequence[Introduction]) -> str | None:
    """Why these processes cannot train together, None when they can."""
    differences = table([each["versions"] for each in everybody], [each["host"] for each in everybody])
    if differences:
        return (
            f"Expected the same versions on every rank, received:\n{differences}\nInstall the same packages on every "
            "host, or start all ranks from one environment on a shared file system."
        )
    return _shared_gpu(everybody)


def advice(everybody: Sequence[Introduction], environment: Mapping[str, str], devices_were_chosen: bool) -> list[str]:
    """Warnings about a job that runs, but hardly as its user meant it.

    Args:
        everybody: all ranks' introductions.
        environment: of this process.
        devices_were_chosen: somebody asked for a number of devices, so that others may well stay idle.
    """
    found = [_forgotten_srun(environment, len(everybody))]
    if not devices_were_chosen:
        found.append(_idle_gpus(everybody))
    return [warning for warning in found if warning]


def installed(package: str) -> str:
    """Its version, or that there is none: distfit itself may be a source folder."""
    # Metadata are looked for in one go: a source folder may be on the path twice.
    return next((found.version for found in importlib.metadata.distributions(name=package)), "no package")


def _digest(folder: Path) -> str:
    total = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _shared_gpu(everybody: Sequence[Introduction]) -> str | None:
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, each in enumerate(everybody):
        for gpu in each["taken"]:
            owners.setdefault((each["host"], gpu), []).append(rank)
    for (host, gpu), ranks in owners.items():
        if len(ranks) > 1:
            return (
                f"Expected a GPU of its own for each rank, received {gpu} of host {host} for {ranks_text(ranks)}. "
                "Start at most one rank a GPU on each host (mpirun --map-by ppr:N:node, srun --gpus-per-task=1), let "
                "each rank see its own (CUDA_VISIBLE_DEVICES), or hide them all with CUDA_VISIBLE_DEVICES=''."
            )
    return None


def _idle_gpus(everybody: Sequence[Introduction]) -> str | None:
    seen = {(each["host"], gpu) for each in everybody for gpu in each["seen"]}
    taken = {(each["host"], gpu) for each in everybody for gpu in each["taken"]}
    if not taken or not seen - taken:
        return None
    by_host = Counter(host for host, _ in sorted(seen - taken))
    hosts = ", ".join(f"{count} of {sum(h == host for h, _ in seen)} on {host}" for host, count in by_host.items())
    return (
        f"GPUs stay idle: {hosts}. Start one rank a GPU (distfit launch -np {len(seen)}), or in one process leave "
        "strategy out, which takes all that it sees; devices=N says that fewer are meant."
    )


def _forgotten_srun(environment: Mapping[str, str], size: int) -> str | None:
    tasks = environment.get("SLURM_NTASKS", "")
    if size > 1 or launched(environment) or "SLURM_JOB_ID" not in environment:
        return None
    if not tasks.isdigit() or int(tasks) < 2:
        return None
    return (
        f"Slurm allocated {tasks} tasks, and this process was started as one alone: sbatch runs a script once. "
        "Put srun (or distfit launch) before the command that trains, as launch/slurm.sbatch does."
    )


def same_mpi(launched_size: int, engine_size: int, libraries: Sequence[str]) -> str | None:
    """Why the launcher and the MPI in this process do not belong together, None when they do.

    Args:
        launched_size: ranks that the launcher says it started.
        engine_size: ranks that the engine sees.
        libraries: the MPI libraries loaded in this process.
    """
    if launched_size == engine_size:
        return None
    where = f" ({', '.join(libraries)})" if libraries else ""
    return (
        f"Expected the {launched_size} ranks that the launcher started, received a job of {engine_size}: this "
        f"process's MPI{where} does not belong to the launcher, so that each rank would train a model of its own. "
        "Start it with the mpirun of the MPI that Horovod was built with, or srun --mpi=pmix; `distfit doctor` shows "
        "both."
    )


def several_mpis(libraries: Sequence[str]) -> str | None:
    """Why these MPI libraries cannot live in one process, None when there is one at most."""
    if len({os.path.realpath(library) for library in libraries}) < 2:
        return None
    return (
        f"Expected one MPI library in a process, received {len(libraries)}: {', '.join(libraries)}. Horovod and mpi4py "
        "would crash or wait for each other. Put the bin folder of the environment first on PATH, and build both "
        "against one MPI (distfit horovod install --force); `distfit doctor` shows who loads which."
    )
