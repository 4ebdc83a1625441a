"""Runs in processes of their own: started, shown while they run, ended with all that they started.

    with Children(target, steps=5, float64=False, limit_s=300) as children:
        outcomes = children.run([Run(ALONE), Run(engine)])        # side by side; those of several ranks one by one

All of them compute on CPUs, whatever the machine has: rounding is then the same from run to run, and a GPU that
another job needs is left alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from distfit.backends import ranks_have_an_engine
from distfit.checking.plan import Engine, Run
from distfit.checking.spec import Outcome, Spec, read
from distfit.checking.target import Target
from distfit.doctor.asking import ask, end_all
from distfit.errors import InputError
from distfit.launchers import facts as machine
from distfit.launchers.choice import Wanted, command_for
from distfit.launchers.job import Job

# Each imports TensorFlow and traces a model: two keep a small machine busy.
_AT_A_TIME = 2
_LOOK_EVERY_S = 0.1
# Of a child's time; then distfit itself says where a rank stands, and ends the run.
_STALL_SHARE = 0.5
# What a script or an outer launcher may have set, and what a check decides.
_DECIDED = {
    "DISTFIT_STRATEGY": "auto",
    "CUDA_VISIBLE_DEVICES": "-1",
    "PYTHONUNBUFFERED": "1",
}

# Given the name of a run, and how it ended; None when it begins.
Show: TypeAlias = Callable[[str, str | None], None]


class Children:
    """Runs of one target.

    Args:
        target: what is started.
        steps: of each.
        float64: compute in float64.
        limit_s: seconds after which a run has hung, > 0.
        allow_root: let root start ranks with Open MPI.
        show: is told what has begun and ended, from several threads.
    """

    def __init__(
        self,
        target: Target,
        steps: int,
        float64: bool,
        limit_s: float,
        allow_root: bool = False,
        show: Show | None = None,
    ) -> None:
        self._target, self._steps, self._float64, self._limit_s = target, steps, float64, limit_s
        self._allow_root = allow_root
        self._show = show or _say_nothing
        self._folder = tempfile.TemporaryDirectory(prefix="distfit-check-")

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *of: object) -> None:
        self._folder.cleanup()

    def run(self, runs: Sequence[Run]) -> dict[Run, Outcome]:
        """The outcome of each; Ctrl-C ends them all."""
        together = [run for run in runs if run.engine.ranks == 1]
        found = self._side_by_side(together)
        for run in runs:
            if run.engine.ranks > 1:
                found |= self._side_by_side([run])
        return found

    def _side_by_side(self, runs: Sequence[Run]) -> dict[Run, Outcome]:
        pool = ThreadPoolExecutor(_AT_A_TIME)
        futures: dict[Future[Outcome], Run] = {pool.submit(self._one, run): run for run in runs}
        try:
            return {futures[done]: done.result() for done in as_completed(futures)}
        except BaseException:
            self._show = _say_nothing
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            # After Ctrl-C, also of one that is being started at this moment.
            while any(future.running() for future in futures):
                end_all()
                time.sleep(_LOOK_EVERY_S)

    def _one(self, run: Run) -> Outcome:
        self._show(str(run), None)
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        paths = tuple(path for path in sys.path if path)
        spec = Spec(self._target, run, self._steps, self._float64, self._limit_s * _STALL_SHARE, paths)
        spec.write(folder)
        argv, environment = self._command(run.engine, folder)
        answer = ask(argv, environment, self._limit_s)
        seconds = time.monotonic() - started
        outcome = read(folder, answer.problem, answer.errors, seconds)
        self._show(str(run), f"{seconds:.0f} s" if outcome.failure is None else str(outcome.failure))
        return outcome

    def _command(self, engine: Engine, folder: Path) -> tuple[Sequence[str], Mapping[str, str]]:
        own = {**_DECIDED, "DISTFIT_DEVICES": str(engine.devices)}
        program = (sys.executable, "-m", "distfit.checking.child", str(folder))
        if engine.ranks == 1:
            return program, {**os.environ, **own}
        argv, environment = ranks_command(engine.ranks, program, self._allow_root)
        return argv, {**environment, **own}


def _say_nothing(run: str, ended: str | None) -> None:
    """Nobody listens, or nobody wants to hear more."""


@dataclass(frozen=True)
class Missing:
    """An engine that cannot be tried here, and why."""

    engine: Engine
    why: str


def available(engines: Sequence[Engine], allow_root: bool = False) -> tuple[list[Engine], list[Missing]]:
    """The engines that can be tried here, and the others."""
    reason = why_no_ranks(allow_root) if any(engine.ranks > 1 for engine in engines) else None
    here = [engine for engine in engines if engine.ranks == 1 or reason is None]
    return here, [Missing(engine, reason) for engine in engines if engine not in here and reason is not None]


def why_no_ranks(allow_root: bool = False) -> str | None:
    """Why no ranks can be started on this machine, None if they can."""
    if not ranks_have_an_engine():
        return "there is no Horovod in this environment; type: distfit horovod install"
    try:
        ranks_command(2, ("python",), allow_root)
    except InputError as error:
        return str(error)
    return None


def ranks_command(ranks: int, program: Sequence[str], allow_root: bool) -> tuple[Sequence[str], Mapping[str, str]]:
    """The command and the environment that start ranks of a program on this machine.

    Raises:
        InputError: there is no launcher here, or this process is a rank itself.
    """
    facts = machine.gather()
    job = Job(ranks=ranks, program=tuple(program), allow_root=allow_root)
    if not (facts.mpirun and facts.mpirun.family):
        command = command_for(job, facts)
        return command.argv, command.environment
    # A batch scheduler's own would start them on several machines, which do not share this one's folders.
    command = command_for(job, facts, Wanted.mpirun)
    # Under mpirun ranks of this machine see what one process sees; other launchers show it to every user.
    return command.argv, {**facts.environment, **command.environment}
