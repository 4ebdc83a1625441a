"""Which launchers this machine has, told apart by what they print of themselves; its cores, its allocation.

    facts = gather()
    facts.mpirun.family, facts.allocation, facts.cores

Nothing is changed. The launchers of the running Python's virtual environment come first, activated or not.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from distfit import cgroups
from distfit.install.facts import output_of, search_path, version_of
from distfit.monitor.terminal import TERMINAL

# Variables that name a file of hosts, which mpirun reads by itself; the last four without a scheduler, as Kubernetes'
# MPI Operator sets them.
_HOSTFILES = {
    "PBS_NODEFILE": "PBS",
    "LSB_DJOB_HOSTFILE": "LSF",
    "PE_HOSTFILE": "Grid Engine",
    "OMPI_MCA_orte_default_hostfile": "a hostfile",
    "PRTE_MCA_prte_default_hostfile": "a hostfile",
    "HYDRA_HOST_FILE": "a hostfile",
    "I_MPI_HYDRA_HOST_FILE": "a hostfile",
}


class Family(StrEnum):
    """Kinds of `mpirun` whose options differ."""

    open_mpi_4 = "Open MPI 4"
    open_mpi_5 = "Open MPI 5"
    mpich = "MPICH"
    intel = "Intel MPI"

    @property
    def is_open_mpi(self) -> bool:
        """Whether it is one of Open MPI's."""
        return self in (Family.open_mpi_4, Family.open_mpi_5)


@dataclass(frozen=True)
class Mpirun:
    """An `mpirun` that starts.

    Args:
        path: where it is, absolute.
        family: whose options it takes; None when it says nothing that is known here.
        version: e.g. "4.1.8"; its first line when the family is not known.
    """

    path: str
    family: Family | None
    version: str


@dataclass(frozen=True)
class Slurm:
    """A Slurm whose `srun` reaches its controller.

    Args:
        srun: where it is, absolute.
        version: e.g. "22.05.8".
        mpi_types: what `--mpi` takes.
    """

    srun: str
    version: str
    mpi_types: tuple[str, ...]


@dataclass(frozen=True)
class Allocation:
    """The machines that were given to the job that this process belongs to.

    Args:
        scheduler: who gave them, e.g. "Slurm".
        tasks: ranks that it was asked for, None when that was left open.
        hosts: machines in it; 1 when it does not say.
        cores: of each machine, None when it does not say.
        cores_per_task: as asked for, None when that was left open.
        in_step: whether this process was itself started by srun, as an interactive shell is.
    """

    scheduler: str
    tasks: int | None = None
    hosts: int = 1
    cores: int | None = None
    cores_per_task: int | None = None
    in_step: bool = False


@dataclass(frozen=True)
class Facts:
    """All that decides how a job is launched from here.

    Args:
        mpirun: None when there is none.
        slurm: None when there is no Slurm here.
        horovod: its version in this environment, None when absent.
        allocation: None outside of a batch scheduler's job.
        cores: those that this process may use, a container's limit included, >= 1.
        root: whether this process is root.
        folder: where the program will run.
        python: the interpreter whose environment holds distfit.
        environment: the variables of this process, PATH beginning with that environment's own programs, without
            what an outer launcher said of its terminal.
        inherited: the variables as they were found.
    """

    mpirun: Mpirun | None
    slurm: Slurm | None
    horovod: str | None
    allocation: Allocation | None
    cores: int
    root: bool
    folder: str
    python: str
    # Not in repr: a traceback must not show values.
    environment: Mapping[str, str] = field(repr=False)
    inherited: Mapping[str, str] = field(repr=False)


def gather(environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at this machine, in about a tenth of a second."""
    # Not resolved: a virtual environment's python is a link into the Python it was made from.
    python = os.path.abspath(sys.executable)
    path = path_with(str(Path(python).parent), environment, virtual=sys.prefix != sys.base_prefix)
    return Facts(
        mpirun=_find_mpirun(path),
        slurm=_find_slurm(path),
        horovod=version_of("horovod"),
        allocation=allocation_of(environment),
        cores=_usable_cores(),
        root=os.geteuid() == 0,
        folder=os.getcwd(),
        python=python,
        environment={**{name: value for name, value in environment.items() if name != TERMINAL}, "PATH": path},
        inherited=dict(environment),
    )


def path_with(own_bin: str, environment: Mapping[str, str], *, virtual: bool) -> str:
    """PATH with the programs that lie beside the running Python.

    Args:
        own_bin: their folder.
        environment: has PATH.
        virtual: whether they are those of a virtual environment, which come first. A system's folder stays where
            it is on PATH, behind the MPI of a loaded module.

    >>> path_with("/env/bin", {"PATH": "/env/bin:/usr/bin"}, virtual=True)
    '/env/bin:/usr/bin'
    >>> path_with("/env/bin", {"PATH": "/usr/bin"}, virtual=True)
    '/env/bin:/usr/bin'
    >>> path_with("/usr/bin", {"PATH": "/opt/mpi/bin:/usr/bin"}, virtual=False)
    '/opt/mpi/bin:/usr/bin'
    """
    folders = environment.get("PATH", "").split(os.pathsep)
    there = folders[0] == own_bin or (own_bin in folders and not virtual)
    return environment["PATH"] if there else search_path(Path(own_bin), environment)


def mpirun_of(path: str, printed: str) -> Mpirun | None:
    """What an mpirun is, from what `mpirun --version` printed; None when it printed nothing, as a broken link.

    >>> mpirun_of("/usr/bin/mpirun", "mpirun (Open MPI) 4.1.8").family
    <Family.open_mpi_4: 'Open MPI 4'>
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if not lines:
        return None
    if found := re.search(r"\((?:Open MPI|OpenRTE)\) (\d+)(\S*)", printed):
        family = {"4": Family.open_mpi_4, "5": Family.open_mpi_5}.get(found[1])
        return Mpirun(path, family, found[1] + found[2] if family else lines[0])
    if found := re.search(r"Intel\(R\) MPI Library.* Version (\S+)", printed):
        return Mpirun(path, Family.intel, found[1])
    if found := re.search(r"HYDRA build details:\s+Version:\s+(\S+)", printed):
        return Mpirun(path, Family.mpich, found[1])
    return Mpirun(path, None, lines[0])


def slurm_of(path: str, printed: str, types_printed: str) -> Slurm | None:
    """Slurm, from what `srun --version` and `srun --mpi=list` printed; None when srun reaches no controller.

    >>> slurm_of("/usr/bin/srun", "slurm-wlm 22.05.8", "MPI plugin types are...\\n\\tpmix\\n\\tnone").mpi_types
    ('pmix', 'none')
    """
    found = re.match(r"slurm\S* (\S+)", printed)
    types = re.findall(r"^(?:srun: )?\s*(\w+)$", types_printed, re.MULTILINE)
    return Slurm(path, found[1], tuple(types)) if found else None


def allocation_of(environment: Mapping[str, str]) -> Allocation | None:
    """What the batch scheduler says of the job that this process belongs to.

    >>> allocation_of({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}).tasks
    8
    >>> allocation_of({})
    """

    def number(name: str) -> int | None:
        # Slurm writes "4(x2)" for four on each of two nodes.
        found = re.match(r"\d+", environment.get(name, ""))
        return int(found[0]) if found else None

    if "SLURM_JOB_ID" in environment:
        return Allocation(
            "Slurm",
            tasks=number("SLURM_NTASKS"),
            hosts=number("SLURM_JOB_NUM_NODES") or 1,
            cores=number("SLURM_JOB_CPUS_PER_NODE"),
            cores_per_task=number("SLURM_CPUS_PER_TASK"),
            in_step="SLURM_STEP_ID" in environment,
        )
    given = [(name, environment[file]) for file, name in _HOSTFILES.items() if file in environment]
    return Allocation(given[0][0], hosts=_hosts_in(Path(given[0][1]))) if given else None


def _hosts_in(file: Path) -> int:
    """How many hosts a file names, one at the start of each line, perhaps several times."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return len({line.split()[0].partition(":")[0] for line in lines if line.strip() and not line.startswith("#")}) or 1


def _usable_cores() -> int:
    quota = cgroups.core_quota(cgroups.of_this_process())
    return min(len(os.sched_getaffinity(0)), max(1, int(quota)) if quota is not None else sys.maxsize)


def _find_mpirun(path: str) -> Mpirun | None:
    found = shutil.which("mpirun", path=path)
    return mpirun_of(os.path.abspath(found), output_of(found, "--version", path=path)) if found else None


def _find_slurm(path: str) -> Slurm | None:
    srun = shutil.which("srun", path=path)
    if srun is None:
        return None
    return slurm_of(os.path.abspath(srun), output_of(srun, "--version"), output_of(srun, "--mpi=list"))
