"""All facts, gathered at the same time and within one limit.

    facts = gather("runs/a", limit_s=17, ranks=True)

What is slow (importing TensorFlow, two ranks, a driver that does not answer) runs in child programs, side by
side, each ended at the limit with all that it started. A part that does not answer leaves its `problem` in the
facts; nothing is waited for any longer.
"""

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import distfit
from distfit import keras_backend
from distfit.doctor import answers, asking, machine
from distfit.doctor.asking import Answer, ask, parse
from distfit.doctor.facts import (
    Facts,
    Folder,
    Job,
    Launcher,
    Network,
    Python,
    Ranks,
)
from distfit.errors import InputError
from distfit.install import recipe
from distfit.install.facts import Mpi, search_path
from distfit.launchers.facts import allocation_of
from distfit.topology import from_environment, launched

# Read by TensorFlow, Keras, Horovod, MPI, NCCL or distfit, and worth knowing; nothing else of the environment
# is read into a report, which people paste into issues.
SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "DISTFIT_DEVICES",
    "DISTFIT_STRATEGY",
    "KERAS_BACKEND",
    "KERAS_HOME",
    "LD_LIBRARY_PATH",
    "MPI4PY_LIBMPI",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OPAL_PREFIX",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_USE_LEGACY_KERAS",
    "HOROVOD_CONTROLLER",
    "HOROVOD_ENABLE_XLA_OPS",
    "SLURM_JOB_ID",
)
RANKS = 2
# What launchers leave in the environment of a rank; a job inside a job would take itself for part of the outer one.
# A user's own OMPI_MCA_btl and the like stay.
_LAUNCHERS_OWN = (
    *("OMPI_APP", "OMPI_ARGV", "OMPI_COMM", "OMPI_FILE", "OMPI_FIRST", "OMPI_NUM", "OMPI_TOOL", "OMPI_UNIVERSE"),
    *("OMPI_VERSION", "OMPI_WORLD", "OMPI_LIBDIR", "OMPI_MCA_ess", "OMPI_MCA_orte_", "OMPI_MCA_pmix", "OMPI_MCA_num"),
    *("OMPI_MCA_initial", "OMPI_MCA_shmem", "OPAL_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "SLURM_", "HOROVOD_"),
    # An allocation of other schedulers: mpirun would put the second rank on another of its hosts.
    *("HYDRA_HOST_FILE", "I_MPI_HYDRA_HOST_FILE", "LSB_", "PBS_", "PE_HOSTFILE"),
)
GRACE_S = asking.FAREWELL_S + 0.5  # between the limit of the programs and giving up on the thread that asked


@dataclass(frozen=True)
class Parts:
    """What was asked for side by side; a part that was asked and is not given did not answer."""

    given: Mapping[str, Any]
    asked: frozenset[str]
    limit_s: float

    def answer(self, name: str) -> Answer:
        """A child program's answer."""
        return self.given.get(name) or Answer(problem=f"did not answer within {self.limit_s:.0f} s")


def gather(
    run_dir: str | os.PathLike[str],
    limit_s: float,
    ranks: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> Facts:
    """Look at this machine and this environment.

    Args:
        run_dir: the folder that a run would write to.
        limit_s: when all parts are ended; the whole takes up to two seconds longer.
        ranks: whether to start two ranks.
        environment: the process's.
    """
    launcher = _launcher(environment)
    parts = _side_by_side(_questions(run_dir, limit_s, ranks, launcher, environment), limit_s)
    build = parts.answer("build")
    return Facts(
        python=_python(),
        tensorflow=answers.tensorflow(parts.answer("tensorflow")),
        horovod=answers.horovod(parts.answer("tensorflow"), build),
        mpi4py=answers.mpi4py(parts.answer("mpi4py")),
        launcher=_version(launcher, parts),
        cuda=answers.cuda(parts.answer("nvidia-smi") if "nvidia-smi" in parts.asked else None, build),
        ranks=parts.given.get("ranks") or Ranks(asked=ranks, problem=parts.answer("ranks").problem),
        machine=machine.machine(),
        network=parts.given.get("network") or Network(platform.node(), (), (), problem=parts.answer("network").problem),
        folder=parts.given.get("folder") or _unanswered(run_dir, parts),
        job=_job(environment),
        settings={name: environment[name] for name in SETTINGS if name in environment},
        keras_file=keras_backend.from_file(environment),
    )


def _questions(
    run_dir: str | os.PathLike[str], limit_s: float, ranks: bool, launcher: Launcher, environment: Mapping[str, str]
) -> dict[str, Callable[[], Any]]:
    """What takes time, by name."""
    child = _child_environment(environment)

    def probe(part: str) -> Callable[[], Answer]:
        command = [sys.executable, "-P", "-m", "distfit.doctor.probe", part]
        return lambda: ask(command, child, limit_s)

    questions: dict[str, Callable[[], Any]] = {part: probe(part) for part in ("tensorflow", "mpi4py", "build")}
    questions["folder"] = lambda: machine.folder(run_dir)
    questions["network"] = machine.network
    questions["ranks"] = lambda: two_ranks(launcher, child, limit_s) if ranks else Ranks(asked=False)
    if launcher.mpirun:
        questions["mpirun"] = lambda: ask([str(launcher.mpirun), "--version"], child, limit_s)
    smi = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if smi:
        questions["nvidia-smi"] = lambda: ask([smi, "-q", "-x"], child, limit_s)
    return questions


def _side_by_side(questions: Mapping[str, Callable[[], Any]], limit_s: float) -> Parts:
    """Ask all at once. Threads, not a pool: a pool's threads are waited for when the process ends."""
    given: dict[str, Any] = {}

    def ask_one(name: str, question: Callable[[], Any]) -> None:
        given[name] = question()

    threads = [threading.Thread(target=ask_one, args=item, daemon=True) for item in questions.items()]
    deadline = time.monotonic() + limit_s + GRACE_S
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        asking.end_all()
    return Parts(dict(given), frozenset(questions), limit_s)


def two_ranks(launcher: Launcher, environment: Mapping[str, str], limit_s: float) -> Ranks:
    """Two ranks under the mpirun that a user would get, else the environment's own."""
    mpirun = launcher.mpirun or launcher.in_environment
    missing = [name for name in ("horovod", "mpi4py") if name not in _packages()]
    if missing or mpirun is None:
        return Ranks(not_started=f"{' and '.join(missing)} missing" if missing else "there is no mpirun")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distfit-doctor-") as scratch:
        told = ask([mpirun, "--version"], environment, limit_s)
        mpi = Mpi(bin=Path(mpirun).parent, version=answers.named(told), from_pypi=False)
        program = [sys.executable, "-P", "-m", "distfit.doctor.rank_probe", scratch]
        command = [mpirun, *recipe.mpirun_command(mpi, RANKS, program)[1:]]
        left_s = max(0.0, limit_s - (time.monotonic() - started))
        answer = ask(command, _rank_environment(environment), left_s)
        seen = tuple(answers.rank(parse(file.read_text())[0]) for file in sorted(Path(scratch).glob("*.jsonl")))
    return Ranks(seen=seen, problem=answer.problem, errors=answer.errors or answer.output)


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's own, as a training would get it; only this distfit is found, and nobody is in a job."""
    inside = launched(environment) or allocation_of(environment) is not None
    theirs = _LAUNCHERS_OWN if inside else ()
    clean = {name: value for name, value in environment.items() if not name.startswith(theirs)}
    # Behind what is there: in front it would change which packages the user's PYTHONPATH hides.
    source = str(Path(str(distfit.__file__)).parent.parent)
    path = os.pathsep.join(part for part in (environment.get("PYTHONPATH", ""), source) if part)
    return {**clean, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def _rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    # Two ranks on fewer cores would otherwise wait by turning in circles, and measure that. At the limit mpirun
    # has a second to end its ranks and to remove their files.
    ours = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_odls_base_sigkill_timeout": "0"}
    return {**environment, **root, **ours}


def _launcher(environment: Mapping[str, str]) -> Launcher:
    path = environment.get("PATH", "")
    own = Path(sys.executable).parent
    return Launcher(
        mpirun=shutil.which("mpirun", path=path),
        in_environment=shutil.which("mpirun", path=str(own)),
        srun=shutil.which("srun", path=path) is not None,
        horovodrun=shutil.which("horovodrun", path=search_path(own, {"PATH": path})) is not None,
    )


def _version(launcher: Launcher, parts: Parts) -> Launcher:
    if launcher.mpirun is None:
        return launcher
    answer = parts.answer("mpirun")
    return replace(launcher, says=answers.named(answer), problem=answer.problem)


def _python() -> Python:
    """Metadata only: also right where nothing can be imported."""
    found = next(iter(metadata.distributions(name="distfit")), None)
    return Python(
        version=platform.python_version(),
        executable=sys.executable,
        prefix=sys.prefix,
        requires_python=str(found.metadata["Requires-Python"]) if found else "",
        packages=_packages(),
        requirements=tuple(found.requires or ()) if found else (),
    )


def _packages() -> dict[str, str]:
    names = ((found.metadata["Name"], found.version) for found in metadata.distributions())
    # The first one on the path is the one that is imported.
    return {name.lower().replace("_", "-"): version for name, version in reversed(list(names)) if name}


def _unanswered(run_dir: str | os.PathLike[str], parts: Parts) -> Folder:
    return Folder(str(run_dir), str(run_dir), problem=parts.answer("folder").problem)


def _job(environment: Mapping[str, str]) -> Job:
    try:
        place = from_environment(environment)
    except InputError as error:
        return Job(launched=True, problem=str(error))
    return Job(launched(environment), place.rank, place.size, place.local_rank, place.local_size)
