"""Launches of `python -m tests.cases`: one job runs many cases on a few engines.

numbers = Job("mpirun", 3, ("horovod", "horovod/float32")).run(folder, CASES)
numbers["horovod/float32"]["global_clipnorm//weights"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distfit.data.build import build_digits
from tests.cases.engines import file_of
from tests.ranks import launch

# Some six minutes on a slow machine whose two cores do nothing else; the whole suite runs beside it.
LIMIT_S = 1500


@dataclass(frozen=True)
class Job:
    """One launch.

    Args:
        launcher, ranks: as in tests.ranks.launch.
        engines: names as on the command line of tests.cases, run one after the other.
    """

    launcher: str
    ranks: int
    engines: tuple[str, ...]

    def run(self, folder: Path, cases: Iterable[str], limit_s: float = LIMIT_S) -> dict[str, dict[str, np.ndarray]]:
        """The numbers of every engine; `folder` keeps what the job wrote.

        Fails the running test when the job does.
        """
        build_digits(folder / "digits")
        arguments = ["-m", "tests.cases", str(folder), ",".join(cases), *self.engines]
        job = launch(arguments, self.ranks, self.launcher, limit_s=limit_s)
        assert job.code == 0, job.report()
        return self.numbers(folder)

    def numbers(self, folder: Path) -> dict[str, dict[str, np.ndarray]]:
        """What a run has left in its folder; nothing when it did not end."""
        files = {engine: folder / f"{file_of(engine)}.npz" for engine in self.engines}
        if not all(file.exists() for file in files.values()):
            return {}
        return {engine: dict(np.load(file)) for engine, file in files.items()}

    def keep(self, folder: Path, numbers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write numbers where `numbers` finds them."""
        for engine, own in numbers.items():
            np.savez(folder / f"{file_of(engine)}.npz", **own)
