"""Which launcher starts the job: pure, from facts and what the user asked for.

command = command_for(job, facts)                    # srun in an allocation, else mpirun, else horovodrun with Gloo
command = command_for(job, facts, Wanted.mpirun)
"""

import shutil
from enum import StrEnum

from distfit.errors import InputError
from distfit.launchers import horovodrun, hydra, open_mpi, srun
from distfit.launchers.command import Command
from distfit.launchers.facts import Facts, Mpirun, Slurm
from distfit.launchers.job import Job
from distfit.topology import from_environment


class Wanted(StrEnum):
    """What `--launcher` takes."""

    auto = "auto"
    mpirun = "mpirun"
    horovodrun = "horovodrun"
    srun = "srun"


def command_for(job: Job, facts: Facts, wanted: Wanted = Wanted.auto, *, gloo: bool = False) -> Command:
    """The command that starts the job's ranks.

    Args:
        job: what to start.
        facts: what is here.
        wanted: the launcher; `auto` chooses.
        gloo: let the ranks find each other with Gloo instead of MPI, which only horovodrun does.

    Raises:
        InputError: the launcher is not here, or cannot start this job.
    """
    _refuse_ranks(facts)
    launcher = _chosen(facts, wanted, gloo)
    if launcher is Wanted.srun:
        return srun.command(job, facts, _slurm(facts))
    if launcher is Wanted.horovodrun:
        return horovodrun.command(job, facts, gloo=gloo or (wanted is Wanted.auto))
    mpirun = _mpirun(facts)
    assert mpirun.family is not None, "refused by _mpirun"
    return (open_mpi if mpirun.family.is_open_mpi else hydra).command(job, facts, mpirun)


def refuse_missing_program(job: Job, facts: Facts) -> None:
    """Where all ranks run here, a mistyped program is found before a launcher says so in its own way.

    Raises:
        InputError: there is no such program.
    """
    name = job.program[0]
    elsewhere = job.hosts or facts.allocation
    if not elsewhere and shutil.which(name, path=facts.environment.get("PATH")) is None:
        raise InputError(
            f"Expected a program to start, received {name!r}, which is not on PATH. Correct it; a file of Python needs "
            f"python in front: distfit launch -np {job.ranks} -- python {name}"
        )


def ranks_by_default(facts: Facts, slots: int) -> int:
    """How many ranks without -np: all slots of --hosts, or what the allocation was asked for.

    Raises:
        InputError: neither says.
    """
    tasks = facts.allocation.tasks if facts.allocation else None
    if slots or tasks:
        return slots or tasks or 0
    raise InputError(
        "Expected the number of ranks, -np N, received none, and no --hosts or Slurm allocation (--ntasks) that says "
        "it. For example: distfit launch -np 2 -- python train.py"
    )


def _chosen(facts: Facts, wanted: Wanted, gloo: bool) -> Wanted:
    if gloo and wanted not in (Wanted.auto, Wanted.horovodrun):
        raise InputError(
            f"Expected --gloo with --launcher horovodrun, which alone starts ranks with Gloo, received --launcher "
            f"{wanted}. Leave one of them out."
        )
    if wanted is not Wanted.auto:
        return wanted
    if gloo or not (facts.mpirun and facts.mpirun.family):
        return Wanted.horovodrun if gloo or facts.horovod else Wanted.mpirun
    in_slurm = facts.slurm and facts.allocation and facts.allocation.scheduler == "Slurm"
    # A Slurm without PMIx cannot start Open MPI's ranks; mpirun then starts them in the same allocation.
    return Wanted.srun if in_slurm and srun.protocol(facts.mpirun.family, _slurm(facts)) else Wanted.mpirun


def _refuse_ranks(facts: Facts) -> None:
    """`mpirun distfit launch ...` would start a job from every rank."""
    place = from_environment(facts.inherited)
    if place.size > 1:
        raise InputError(
            f"Expected to be started once, received the environment of rank {place.rank} of {place.size}: another "
            "launcher started distfit launch. Start the program with one of them: distfit launch -np "
            f"{place.size} -- python train.py"
        )


def _mpirun(facts: Facts) -> Mpirun:
    if facts.mpirun is None:
        raise InputError(
            "Expected mpirun on PATH, found none that starts. Type: distfit horovod install, or load the cluster's "
            "MPI (module load openmpi)."
        )
    if facts.mpirun.family is None:
        raise InputError(
            f"Expected an mpirun of Open MPI 4.1 or 5, MPICH or Intel MPI, received one that says "
            f"{facts.mpirun.version!r} ({facts.mpirun.path}). Start the ranks with it yourself, or use --gloo."
        )
    return facts.mpirun


def _slurm(facts: Facts) -> Slurm:
    if facts.slurm is None or facts.allocation is None or facts.allocation.scheduler != "Slurm":
        raise InputError(
            f"Expected a Slurm allocation for srun, found {'none' if facts.slurm else 'no srun that reaches Slurm'}. "
            "Start it inside one: sbatch launch/slurm.sbatch, or salloc --ntasks=2."
        )
    return facts.slurm
