"""The whole examination: gather the facts, make the lines, in the order in which they are read.

report = examine("runs/a")
print(report.as_text()); sys.exit(report.exit_code)
"""

import os
import time
from collections.abc import Callable

from distfit.doctor import bugs, hardware, mpi, software
from distfit.doctor.facts import Facts
from distfit.doctor.gather import gather
from distfit.doctor.lines import Line, Report

LIMIT_S = 17.0

CHECKS: tuple[Callable[[Facts], Line], ...] = (
    software.python,
    software.packages,
    software.tensorflow,
    software.keras,
    software.horovod,
    software.mpi4py,
    software.settings,
    mpi.mpirun,
    mpi.one_mpi,
    hardware.cuda,
    hardware.nccl,
    hardware.devices,
    hardware.cores,
    hardware.threads,
    hardware.memory,
    hardware.shm,
    hardware.run_folder,
    hardware.network,
    hardware.job,
    mpi.ranks,
)


def examine(run_dir: str | os.PathLike[str], ranks: bool = True, limit_s: float = LIMIT_S) -> Report:
    """Look at everything, start two ranks, and say what was found.

    Args:
        run_dir: the folder that a run would write to; it need not exist, and nothing is left in it.
        ranks: False for a machine that runs one process only: what ranks alone need is then not missed.
        limit_s: seconds after which a part that does not answer is a failure; parts run side by side.
    """
    started = time.monotonic()
    lines = judge(gather(run_dir, limit_s, ranks))
    return Report(lines, time.monotonic() - started)


def judge(facts: Facts) -> tuple[Line, ...]:
    """Every line, from facts alone."""
    return (*(check(facts) for check in CHECKS), *bugs.lines(facts))
