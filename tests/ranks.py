"""Starting real ranks in a test, and never leaving one behind.

    job = launch(["-m", "tests.cases", "out"], ranks=2)
    assert job.code == 0, job.report()

Every job runs as `distfit.testing` runs it: in a session of its own with a limit in seconds. One that passes its limit
is asked for the Python stacks of all its ranks (here SIGQUIT, see `show_stacks_when_asked`), then killed, and fails the
test with everything that was printed.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from distfit.errors import RunError
from distfit.testing import Result, finished

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
Job = Result
# Rank and size that an outer launcher may have left in the environment would be taken for the job's.
_FOREIGN = ("OMPI_", "PMI", "HOROVOD_", "SLURM_", "DISTFIT_")


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
) -> Result:
    """Run this Python with `arguments` on so many ranks; fails the test when the limit passes.

    Args:
        launcher: "none", "mpirun", "gloo" or "horovodrun-mpi"; by default mpirun for several ranks.
        interrupt_after_s: press Ctrl-C after so many seconds.
    """
    launcher = launcher or ("mpirun" if ranks > 1 else "none")
    require(launcher)

    def interrupt(process: subprocess.Popen[str]) -> None:
        if interrupt_after_s is not None:
            time.sleep(interrupt_after_s)
            os.killpg(process.pid, signal.SIGINT)

    argv = command(arguments, ranks, launcher)
    try:
        return finished(argv, environment(**(env or {})), limit_s, cwd or ROOT, interrupt)
    except RunError as hung:
        pytest.fail(str(hung), pytrace=False)


def require(launcher: str) -> None:
    """Skip a test whose launcher or engine is not installed; `make test` installs both."""
    if launcher == "none":
        return
    program = "mpirun" if launcher == "mpirun" else "horovodrun"
    if shutil.which(program, path=environment()["PATH"]) is None:
        pytest.skip(f"{program} is not installed: type distfit horovod install")


def collect_less_garbage() -> None:
    """After TensorFlow was imported: a tenth of the time went into looking through its modules for garbage."""
    gc.freeze()
    gc.set_threshold(50_000)


def show_stacks_when_asked() -> None:
    """In a rank: print the stacks of all threads when the test asks (SIGQUIT)."""
    import faulthandler

    faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
