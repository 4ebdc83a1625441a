"""Slurm's `srun`, inside an allocation: from facts and a job to its command."""

from distfit.errors import InputError
from distfit.launchers.command import Command, environment_of, ranks_outnumber_free_cores
from distfit.launchers.environment import for_ranks, of_mpi, of_the_session
from distfit.launchers.facts import Allocation, Facts, Family, Slurm
from distfit.launchers.job import Job

# How ranks of an MPI find each other under srun, the preferred first. Open MPI 5 knows PMIx alone, and Open MPI 4
# as PyPI has it.
_PROTOCOLS = {
    Family.open_mpi_4: ("pmix",),
    Family.open_mpi_5: ("pmix",),
    Family.mpich: ("pmi2",),
    Family.intel: ("pmi2",),
}


def protocol(family: Family | None, slurm: Slurm) -> str | None:
    """What `--mpi` has to be, None when this Slurm was built without what this MPI needs.

    >>> protocol(Family.mpich, Slurm("/usr/bin/srun", "22.05.8", ("pmix", "none", "pmi2")))
    'pmi2'
    """
    wanted = _PROTOCOLS[family] if family else ()
    return next((name for name in wanted if name in slurm.mpi_types), None)


def command(job: Job, facts: Facts, slurm: Slurm) -> Command:
    """The ranks as a step of the allocation.

    srun binds each task to the cores that were asked for it, so `--cpus-per-task` is repeated: since Slurm 22.05
    it does not take it from sbatch. `--export` names the variables, without their values; HOME and its kind are
    among them, as no login takes place. One rank that fails ends all, and Ctrl-C ends them at once. The step of an
    interactive shell holds the cores, so without `--overlap` srun would wait for them forever.
    """
    family = facts.mpirun.family if facts.mpirun else None
    found = protocol(family, slurm)
    if found is None:
        raise InputError(
            f"Expected a Slurm that starts ranks of {family or 'an MPI that is on PATH'} "
            f"({' or '.join(_PROTOCOLS[family]) if family else 'none is'}), received one that knows "
            f"{', '.join(slurm.mpi_types) or 'no MPI'}. Use --launcher mpirun, which starts its ranks in the same "
            "allocation."
        )
    yields = family.is_open_mpi and ranks_outnumber_free_cores(job, facts) if family else False
    environment = environment_of(job, facts, **({"OMPI_MCA_mpi_yield_when_idle": "1"} if yields else {}))
    exported = {*of_the_session(environment), *of_mpi(environment), *for_ranks(environment, job.passed)}
    given = facts.allocation or Allocation("Slurm")
    argv = [
        *(slurm.srun, f"--ntasks={job.ranks}", *_hosts(job), f"--mpi={found}"),
        *([f"--cpus-per-task={given.cores_per_task}"] if given.cores_per_task else []),
        *(["--overlap"] if given.in_step else []),
        *("--kill-on-bad-exit=1", "--disable-status"),
        f"--export={','.join(sorted(exported))}",
        *job.program,
    ]
    return Command(tuple(argv), environment)


def _hosts(job: Job) -> list[str]:
    if not job.hosts:
        return []
    names, ranks = job.evenly("srun")
    return [f"--nodes={names.count(',') + 1}", f"--nodelist={names}", f"--ntasks-per-node={ranks}"]
