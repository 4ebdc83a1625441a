"""Is the Horovod of this environment right? Two real ranks add numbers under `mpirun`.

    verify(facts, log)      # raises RunError with the first thing that is wrong

Takes about five seconds, most of them TensorFlow's import.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from distfit.errors import RunError
from distfit.install import rank_check, recipe
from distfit.install.facts import Facts
from distfit.install.process import run, tail

_RANKS = 2
_TIMEOUT_S = 180.0  # a cold import of TensorFlow from a network file system takes a minute


def verify(facts: Facts, log: Path) -> None:
    """Run two ranks and judge what they saw.

    Raises:
        RunError: they did not start, or a sum, a transport or the MPI library was wrong.
    """
    assert facts.mpi is not None, "the MPI is chosen before anything is verified"
    with tempfile.TemporaryDirectory(prefix="distfit-verify-") as folder:
        program = [sys.executable, "-P", str(Path(rank_check.__file__)), folder]
        command = recipe.mpirun_command(facts.mpi, _RANKS, program)
        # The check is about MPI: it leaves the GPUs, which another job may hold, alone.
        environment = {**recipe.run_environment(facts, os.environ), "CUDA_VISIBLE_DEVICES": "-1"}
        where = Path(folder)
        status = run(command, environment=environment, log=log, folder=where, timeout_s=_TIMEOUT_S)
        seen = [json.loads(file.read_text()) for file in sorted(where.glob("rank-*.json"))]
    problem = f"`{' '.join(command)}` ended with status {status}" if status else judge(seen)
    if problem:
        raise RunError(
            f"Expected {_RANKS} ranks under mpirun to add numbers with Horovod and mpi4py over one MPI, "
            f"received: {problem}. `distfit horovod install --force` builds it anew. The end of the output "
            f"(all of it: {log}):\n{tail(log)}"
        )


def judge(seen: list[dict]) -> str | None:
    """What is wrong with what the ranks saw, None when all is right.

    >>> judge([])
    'results of 0 ranks instead of 2'
    """
    if len(seen) != _RANKS:
        return f"results of {len(seen)} ranks instead of {_RANKS}"
    expected = _RANKS * (_RANKS + 1) / 2
    for rank in seen:
        for name in ("horovod_sum", "mpi4py_sum"):
            if rank[name] != expected:
                return f"{name} = {rank[name]} instead of {expected} on rank {rank['rank']}"
        for name in ("mpi", "gloo"):
            if not rank[name]:
                return f"a Horovod without {name}"
        if len(rank["libmpi"]) != 1:
            return (
                f"{len(rank['libmpi'])} MPI libraries in one process ({', '.join(rank['libmpi'])}) on rank "
                f"{rank['rank']}, where Horovod and mpi4py must share one"
            )
    return None
