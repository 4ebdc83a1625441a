"""A launcher's command line and environment, and what both mean on each machine: threads, yielding.

command.argv, command.environment      # what `start` executes
shown(command, facts.inherited)        # the same for a person, to be pasted into a shell
"""

import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from distfit.launchers.environment import for_launcher
from distfit.launchers.facts import Facts
from distfit.launchers.job import Job
from distfit.monitor.terminal import TERMINAL

# One operation may wait, for data say, without holding up the others.
_LEAST_BETWEEN_OPERATIONS = 2


@dataclass(frozen=True)
class Command:
    """What is executed.

    Args:
        argv: program and arguments; the program's path is absolute.
        environment: all of its environment.
        deaf: it is started with SIGINT and SIGTERM blocked, and stays in the session of the terminal; it unblocks them
            in its ranks. Any other gets a session of its own, where Ctrl-C does not reach it.
        ctrl_c: the signal by which the launcher passes Ctrl-C on.
    """

    argv: tuple[str, ...]
    # Not in repr: a traceback must not show values.
    environment: Mapping[str, str] = field(repr=False)
    deaf: bool = False
    ctrl_c: signal.Signals = signal.SIGINT


def ranks_per_host(job: Job, facts: Facts) -> int:
    """The most ranks that one machine gets."""
    if job.hosts:
        return max(job.ranks_on_hosts)
    return -(-job.ranks // (facts.allocation.hosts if facts.allocation else 1))


def threads_per_rank(job: Job, facts: Facts) -> int:
    """How many threads a rank computes with: its share of the cores, at least one.

    Machines of a job are taken to be alike: those of `--hosts` to have as many cores as this one.
    """
    given = facts.allocation
    if given and given.cores_per_task:
        return given.cores_per_task
    return max(1, cores_of_a_host(facts) // ranks_per_host(job, facts))


def cores_of_a_host(facts: Facts) -> int:
    """The cores of a machine that runs ranks; a login node is none."""
    return facts.allocation.cores if facts.allocation and facts.allocation.cores else facts.cores


def ranks_outnumber_free_cores(job: Job, facts: Facts) -> bool:
    """Whether ranks that wait should give way.

    A rank computes in one thread at least and communicates in another, and one that waits for a message polls, which
    takes its core from those that compute.
    """
    return 2 * ranks_per_host(job, facts) > cores_of_a_host(facts)


def environment_of(job: Job, facts: Facts, **more: str) -> dict[str, str]:
    """What the launcher is started with: the allow-list, and what is not set yet of thread counts and `more`."""
    threads = threads_per_rank(job, facts)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": str(max(_LEAST_BETWEEN_OPERATIONS, threads)),
        **({"NCCL_SOCKET_IFNAME": job.interface} if job.interface else {}),
        **more,
    }
    return {**defaults, **for_launcher(facts.environment, job.passed)}


def terminal_of(job: Job) -> dict[str, str]:
    """What tells ranks that a line may be redrawn; for launchers that pass on bytes as they come."""
    return {TERMINAL: str(job.columns)} if job.columns else {}


def shown(command: Command, inherited: Mapping[str, str]) -> str:
    """The command as it can be pasted into the shell that `inherited` comes from.

    `env -u` takes away what is not passed: no value of the environment is shown.

    >>> print(shown(Command(("/bin/mpirun", "-np", "2"), {"A": "1", "N": "2"}), {"A": "1", "TOKEN": "s3cr3t"}))
    env -u TOKEN \\
        N=2 \\
        /bin/mpirun -np 2
    """
    left_out = sorted(inherited.keys() - command.environment.keys())
    changed = [f"{name}={value}" for name, value in command.environment.items() if inherited.get(name) != value]
    unset = ["env", *(part for name in left_out for part in ("-u", name))]
    return " \\\n    ".join(shlex.join(line) for line in (unset, sorted(changed), command.argv) if line)
