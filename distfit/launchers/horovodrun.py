"""`horovodrun`, with MPI or with Gloo: from facts and a job to its command.

Gloo needs no MPI. horovodrun writes the values of its whole environment on the command lines of Gloo's ranks,
where every user of the machines can read them: it is started with the allow-list alone, and a variable that looks
like a secret is refused.
"""

import shlex
from pathlib import Path

from distfit.errors import InputError
from distfit.launchers import open_mpi
from distfit.launchers.command import Command, environment_of
from distfit.launchers.environment import looks_secret
from distfit.launchers.facts import Facts, Family
from distfit.launchers.job import Job, in_words
from distfit.launchers.start import CTRL_C, told_of_ctrl_c

_MODULE = "distfit.launchers.horovodrun_program"


def command(job: Job, facts: Facts, *, gloo: bool) -> Command:
    """The ranks under horovodrun."""
    refuse(job, facts, gloo=gloo)
    argv = [
        *(facts.python, "-P", "-m", _MODULE),
        *("-np", str(job.ranks), "-H", in_words(job.hosts) if job.hosts else f"localhost:{job.ranks}"),
        # On one machine horovodrun takes loopback, and no other interface.
        *(["--network-interfaces", job.interface] if job.interface and job.hosts else []),
        *(["--gloo"] if gloo else ["--mpi", *_mpi_arguments(job, facts)]),
        *job.program,
    ]
    return Command(tuple(argv), environment_of(job, facts, **told_of_ctrl_c()), ctrl_c=CTRL_C)


def refuse(job: Job, facts: Facts, *, gloo: bool) -> None:
    """Stop where horovodrun would fail with something unreadable, or show what should not be seen.

    Raises:
        InputError: what stands in the way.
    """
    family = facts.mpirun.family if facts.mpirun else None
    if facts.horovod is None:
        raise InputError(
            f"Expected Horovod in the environment of {facts.python}, found none. Type: distfit horovod install"
        )
    if facts.allocation and facts.allocation.hosts > 1 and not job.hosts:
        raise InputError(
            f"Expected --hosts for horovodrun, which does not ask {facts.allocation.scheduler} for the "
            f"{facts.allocation.hosts} hosts of this job and would start all ranks on this one. Name them: --hosts "
            "h1:4,h2:4"
        )
    if gloo and (secret := [name for name in job.passed if looks_secret(name)]):
        raise InputError(
            f"Expected no secret among the variables for horovodrun, received --env {secret[0]}: horovodrun writes "
            "values on the command lines of the ranks, where every user of the machine can read them. Use --launcher "
            "mpirun, or put the secret into a file that the program reads."
        )
    if job.hosts and shlex.quote(facts.folder) != facts.folder:
        raise InputError(
            f"Expected a working folder without spaces and special characters, which horovodrun passes on unquoted, "
            f"received {facts.folder!r}. Start from another folder, or use --launcher mpirun."
        )
    if gloo:
        return
    if family is None or family is Family.open_mpi_5:
        raise InputError(
            f"Expected Open MPI 4.1, MPICH or Intel MPI for horovodrun, received {family or 'no known mpirun'}"
            f"{', whose options horovodrun does not know' if family else ''}. Use --gloo"
            f"{', or --launcher mpirun' if family else ''}."
        )
    if family.is_open_mpi:
        # horovodrun passes --allow-run-as-root by itself.
        open_mpi.refuse_root(job, facts)


def _mpi_arguments(job: Job, facts: Facts) -> list[str]:
    mpirun = facts.mpirun
    if mpirun is None or mpirun.family is None or not mpirun.family.is_open_mpi:
        return []
    options = open_mpi.yielding(job, facts)
    # horovodrun calls mpirun by its name, and that one then looks for its daemon on the other machines' PATH.
    options += ["--prefix", str(Path(mpirun.path).parent.parent)] if job.hosts else []
    return [f"--mpi-args={shlex.join(options)}"] if options else []
