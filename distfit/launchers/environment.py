"""Which environment variables go where: an allow-list, so that a secret in a shell does not reach other machines.

    for_ranks(os.environ, ["WANDB_MODE"])     # names that every rank gets
    for_launcher(os.environ, [...])           # what mpirun, horovodrun or srun is started with

Ranks on the launcher's own machine inherit what it has, whatever is on its command line, so the launcher gets no
more than it needs itself. A name that looks like a secret's is passed only when the user names it.
"""

import re
from collections.abc import Iterable, Mapping

from distfit.errors import InputError

_EXACT = {"PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"}
_PREFIXES = (
    "PYTHON",
    *("DISTFIT_", "HOROVOD_", "KERAS_", "TF_", "XLA_"),
    *("CUDA_", "NCCL_", "NVIDIA_"),
    *("GOMP_", "KMP_", "MKL_", "OMP_", "OPENBLAS_"),
    *("FI_", "GLOO_", "I_MPI_", "MPI4PY_", "MPICH_", "MPIR_CVAR_", "UCX_"),
)
_NOT_MEANT = re.compile(
    # What a launcher told the rank that this process may be; another job's ranks must not believe it.
    r"HOROVOD_(RANK|SIZE|HOSTNAME|(LOCAL|CROSS|GLOO_RENDEZVOUS)_\w+)"
    # Terraform's, which shares TensorFlow's prefix and keeps what it manages in them.
    r"|TF_(CLI|HTTP|VAR)_\w+"
)

# The person's own, which an ssh connection sets up anew on another machine.
_SESSION = {"HOME", "LANG", "LOGNAME", "SHELL", "TERM", "TZ", "USER"}
_SESSION_PREFIXES = ("LC_",)

# Settings of an MPI, which mpirun hands on to its ranks by itself and srun does not.
_MPI = {"OPAL_PREFIX"}
_MPI_PREFIXES = ("OMPI_MCA_", "PMIX_MCA_")

# What launchers themselves read: their settings, the batch scheduler's allocation, and ssh's agent.
_LAUNCHER = {
    *("KRB5CCNAME", "PWD", "SSH_AUTH_SOCK", "TMPDIR"),
    *("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"),
    *("JOB_ID", "NSLOTS", "PE_HOSTFILE"),
}
_LAUNCHER_PREFIXES = ("HYDRA_", "LSB_", "PBS_", "PRTE_MCA_", "SLURM_", "SRUN_")

# NCCL_IB_PKEY and UCX_IB_PKEY are numbers of InfiniBand's partitions, without which there is no connection.
_SECRET = re.compile(r"CREDENTIAL|JWT|(?<!_IB_P)KEY|PASSPHRASE|PASSW|SECRET|TOKEN|_PWD")


def looks_secret(name: str) -> bool:
    """Whether a variable of this name probably holds a secret.

    >>> looks_secret("HOROVOD_API_KEY"), looks_secret("KERAS_HOME"), looks_secret("NCCL_IB_PKEY")
    (True, False, False)
    """
    return bool(_SECRET.search(name.upper()))


def for_ranks(environment: Mapping[str, str], passed: Iterable[str] = ()) -> list[str]:
    """The names that every rank gets, on every machine, in order.

    Args:
        environment: what there is.
        passed: further names that the user asked for.

    Raises:
        InputError: one of these is not set.

    >>> for_ranks({"PATH": "/bin", "TF_X": "1", "TF_TOKEN": "s3cr3t", "AWS_X": "2", "MINE": "3"}, ["MINE"])
    ['MINE', 'PATH', 'TF_X']
    """
    wanted = set(passed)
    if missing := sorted(wanted - environment.keys()):
        raise InputError(
            f"Expected variables of the environment for --env, and {', '.join(missing)} is not set. Export it, or "
            "leave the option out."
        )
    listed = _listed(environment, _EXACT, _PREFIXES)
    return sorted(wanted | {name for name in listed if not _NOT_MEANT.fullmatch(name)})


def of_the_session(environment: Mapping[str, str]) -> list[str]:
    """The names that describe the person and the terminal, the same on machines that share their users."""
    return sorted(_listed(environment, _SESSION, _SESSION_PREFIXES))


def of_mpi(environment: Mapping[str, str]) -> list[str]:
    """The names of an MPI's settings, which ranks need where no mpirun hands them on."""
    return sorted(_listed(environment, _MPI, _MPI_PREFIXES))


def for_launcher(environment: Mapping[str, str], passed: Iterable[str] = ()) -> dict[str, str]:
    """The whole environment of the launcher: the ranks', the person's, and its own settings."""
    own = _listed(environment, _LAUNCHER, _LAUNCHER_PREFIXES)
    names = {*for_ranks(environment, passed), *of_the_session(environment), *of_mpi(environment), *own}
    return {name: environment[name] for name in sorted(names)}


def _listed(environment: Mapping[str, str], exact: set[str], prefixes: tuple[str, ...]) -> set[str]:
    return {name for name in environment if (name in exact or name.startswith(prefixes)) and not looks_secret(name)}
