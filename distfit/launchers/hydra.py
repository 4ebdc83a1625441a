"""MPICH's and Intel MPI's `mpirun` (Hydra): from facts and a job to its command."""

from distfit.launchers.command import Command, environment_of, terminal_of
from distfit.launchers.environment import for_ranks
from distfit.launchers.facts import Facts, Family, Mpirun
from distfit.launchers.job import Job, in_words


def command(job: Job, facts: Facts, mpirun: Mpirun) -> Command:
    """The ranks under Hydra.

    `-genvlist` names the variables that travel, without their values. There is nothing to say about yielding:
    MPICH gives way after 1,000 polls (MPIR_CVAR_POLLS_BEFORE_YIELD).
    """
    intel = mpirun.family is Family.intel
    # TensorFlow has its own threads; Intel MPI would bind each rank to a share of the cores.
    environment = environment_of(job, facts, **terminal_of(job), **({"I_MPI_PIN": "0"} if intel else {}))
    argv = [
        *(mpirun.path, "-np", str(job.ranks), *(_hosts_of_intel(job) if intel else _hosts(job))),
        *([] if intel else ["-bind-to", "none"]),
        *(["-iface", job.interface] if job.interface else []),
        *("-genvlist", ",".join(for_ranks(environment, job.passed))),
        *job.program,
    ]
    return Command(tuple(argv), environment)


def _hosts(job: Job) -> list[str]:
    return ["-hosts", in_words(job.hosts)] if job.hosts else []


def _hosts_of_intel(job: Job) -> list[str]:
    """Intel MPI takes names, and one number of ranks for all."""
    if not job.hosts:
        return []
    names, ranks = job.evenly("Intel MPI's mpirun")
    return ["-hosts", names, "-ppn", str(ranks)]
