"""Starting real ranks in a test, and never leaving one behind.

    job = launch(["-m", "tests.cases", "out"], ranks=2)
    assert job.code == 0, job.report()

Every job runs in a process group of its own with a limit in seconds. One that passes its limit is asked
for the Python stacks of all its ranks (SIGUSR1, `faulthandler`, see `show_stacks_when_asked`), then killed,
and fails the test with everything that was printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Rank and size that an outer launcher may have left in the environment would be taken for the job's.
_FOREIGN = ("OMPI_", "PMI", "HOROVOD_", "SLURM_", "DISTFIT_")

# How the kernel's names of mpirun (PyPI's is a wrapper) and of its daemons begin.
_FORWARDING = ("mpirun", "orterun", "orted", "prte")


@dataclass(frozen=True)
class Job:
    """What became of one launch."""

    argv: list[str]
    code: int
    output: str
    errors: str
    seconds: float

    def report(self) -> str:
        return (
            f"{' '.join(self.argv)}\nexit code {self.code} after {self.seconds:.1f} s"
            f"\n--- stdout\n{self.output}\n--- stderr\n{self.errors}"
        )


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a job: the package and its tools found, TensorFlow quiet, one thread a rank."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    ours = {
        "PATH": f"{BIN}{os.pathsep}{clean.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return clean | ours | more


def command(arguments: Sequence[str], ranks: int, launcher: str) -> list[str]:
    """The command line of a job: this Python under no launcher, mpirun, or horovodrun with Gloo or MPI."""
    program = [sys.executable, *arguments]
    if launcher == "none":
        return program
    if launcher == "mpirun":
        # Ranks outnumber the cores here: an idle one has to yield (docs of Open MPI: mpi_yield_when_idle).
        flags = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return ["mpirun", "-np", str(ranks), *flags, *program]
    controller = {"gloo": "--gloo", "horovodrun-mpi": "--mpi"}[launcher]
    return ["horovodrun", "-np", str(ranks), "-H", f"localhost:{ranks}", controller, *program]


def launch(
    arguments: Sequence[str],
    ranks: int = 1,
    launcher: str | None = None,
    limit_s: float = 150,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    interrupt_after_s: float | None = None,
) -> Job:
    """Run this Python with `arguments` on so many ranks; fails the test when the limit passes.

    Args:
        launcher: "none", "mpirun", "gloo" or "horovodrun-mpi"; by default mpirun for several ranks.
        interrupt_after_s: press Ctrl-C after so many seconds.
    """
    launcher = launcher or ("mpirun" if ranks > 1 else "none")
    require(launcher)
    argv = command(arguments, ranks, launcher)
    started = time.monotonic()
    process = subprocess.Popen(
        argv,
        cwd=cwd or ROOT,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if interrupt_after_s is not None:
        time.sleep(interrupt_after_s)
        os.killpg(process.pid, signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        output, errors = _stacks_then_kill(process)
        job = Job(argv, -1, output, errors, time.monotonic() - started)
        pytest.fail(f"The job hung: killed after {limit_s} s.\n{job.report()}", pytrace=False)
    finally:
        _kill(process)
    return Job(argv, process.returncode, output, errors, time.monotonic() - started)


def require(launcher: str) -> None:
    """Skip a test whose launcher or engine is not installed; `make test` installs both."""
    if launcher == "none":
        return
    program = "mpirun" if launcher == "mpirun" else "horovodrun"
    if shutil.which(program, path=environment()["PATH"]) is None:
        pytest.skip(f"{program} is not installed: type distfit horovod install")


def show_stacks_when_asked() -> None:
    """In a rank: print the stacks of all threads when the test asks (SIGUSR1)."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def _stacks_then_kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    for pid in _group(process.pid):
        if _prints_stacks(pid):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(2)
    _kill(process)
    output, errors = process.communicate(timeout=10)
    return output, errors


def _kill(process: subprocess.Popen[str]) -> None:
    """End everything that the job started, and nothing else: its process group and its descendants."""
    import psutil

    members = _group(process.pid)
    for pid in members:
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue


def _group(leader: int) -> list[int]:
    """Processes of the session that `leader` opened, in which mpirun's ranks have groups of their own, and
    its descendants: horovodrun's ranks have sessions of their own."""
    import psutil

    found = _descendants(leader)
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.pid not in found:
                found.append(process.pid)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def _descendants(pid: int) -> list[int]:
    import psutil

    try:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _prints_stacks(pid: int) -> bool:
    """Whether SIGUSR1 makes it print its stacks: a shell would die of it, mpirun would pass it on."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines())
    caught = int(fields["SigCgt"], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1) and not fields["Name"].strip().startswith(_FORWARDING)
