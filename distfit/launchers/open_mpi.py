"""Open MPI's `mpirun`, 4.1 and 5: from facts and a job to its command."""

from distfit.errors import InputError
from distfit.launchers.command import Command, environment_of, ranks_outnumber_free_cores, terminal_of
from distfit.launchers.environment import for_ranks
from distfit.launchers.facts import Facts, Family, Mpirun
from distfit.launchers.job import Job, in_words
from distfit.launchers.start import CTRL_C, told_of_ctrl_c

_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def command(job: Job, facts: Facts, mpirun: Mpirun) -> Command:
    """The ranks under Open MPI.

    Threads are not bound: TensorFlow has its own, and Open MPI would bind up to two ranks to one core each.
    `-x` names the variables that travel to other machines, without their values.
    """
    refuse_root(job, facts)
    environment = environment_of(job, facts, **terminal_of(job), **told_of_ctrl_c())
    argv = [
        *(mpirun.path, "-np", str(job.ranks), *_hosts(job, facts)),
        *("--map-by", "slot", "--bind-to", "none"),
        *yielding(job, facts),
        *_interface(job, facts, mpirun),
        *(["--allow-run-as-root"] if job.allow_root else []),
        *(part for name in for_ranks(environment, job.passed) for part in ("-x", name)),
        *job.program,
    ]
    return Command(tuple(argv), environment, deaf=True, ctrl_c=CTRL_C)


def yielding(job: Job, facts: Facts) -> list[str]:
    """Ranks that wait for a message give way to those that compute, where there is no core for both."""
    return ["--mca", "mpi_yield_when_idle", "1"] if ranks_outnumber_free_cores(job, facts) else []


def refuse_root(job: Job, facts: Facts) -> None:
    """Open MPI does not start as root unless it is told to, and so distfit tells before anything is started."""
    told = all(facts.environment.get(name) == "1" for name in _ROOT)
    if facts.root and not job.allow_root and not told:
        raise InputError(
            "Expected a user other than root, as whom Open MPI refuses to start ranks: one mistake of a program may "
            "then damage the system. Log in as another user; in a container of your own, where root is common, pass "
            f"--allow-run-as-root, or set {_ROOT[0]}=1 and {_ROOT[1]}=1 in its image."
        )


def _hosts(job: Job, facts: Facts) -> list[str]:
    if job.hosts:
        return ["-H", in_words(job.hosts)]
    # Open MPI counts a slot for each core and refuses more ranks; an allocation has its own hosts and slots.
    return [] if facts.allocation else ["-H", f"localhost:{job.ranks}"]


def _interface(job: Job, facts: Facts, mpirun: Mpirun) -> list[str]:
    """For the ranks' messages, and for the launcher's own connections, which 5 has in another project."""
    if job.interface is None:
        return []
    messages = ["--mca", "btl_tcp_if_include", job.interface]
    if not job.hosts and facts.allocation is None:  # on one machine, where 5 refuses loopback for its own
        return messages
    own = {Family.open_mpi_4: ["--mca", "oob_tcp_if_include"], Family.open_mpi_5: ["--prtemca", "prte_if_include"]}
    assert mpirun.family is not None, "only a known mpirun is asked for a command"
    return [*messages, *own[mpirun.family], job.interface]
