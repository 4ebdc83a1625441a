"""Lines on MPI: which one each part loads, which mpirun starts the ranks, and what two real ranks did. Pure."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distfit.doctor.facts import Facts, Library
from distfit.doctor.lines import Line, failure, ok, warning

_ONE_MPI = (
    "Let both load one MPI: take the other one off PATH and LD_LIBRARY_PATH (module unload), unset MPI4PY_LIBMPI, "
    "or build for the one on PATH: distfit horovod install"
)
# TensorFlow's own log lines, which say nothing about a failure here.
_NOISE = re.compile(
    r"^(\w\d{4} \d|WARNING: All log messages|\d{4}-\d\d-\d\d .*: [IW] tensorflow|-+$|\[[\w.-]+:\d+\] *(\[|\*\*\*))"
)
# What names a cause, the most telling first.
_TELLING = (
    re.compile(r"^[\w.]*(Error|Exception): "),
    re.compile(r"signal \d+|Segmentation"),
    re.compile(r"[Ee]rror|not found|cannot|[Cc]ould not|unable|[Uu]nknown|unrecogni[sz]ed"),
)


@dataclass(frozen=True)
class Maker:
    """Who made an MPI, and its version: what a library and an mpirun can be compared by."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def maker(says: str) -> Maker:
    """Out of what `mpirun --version` or `MPI_Get_library_version` say.

    >>> maker("mpirun (Open MPI) 4.1.8") == maker("Open MPI v4.1.8, package: Open MPI user@host")
    True
    >>> maker("HYDRA build details: Version:  4.2.1") == maker("MPICH Version:      4.2.1")
    True
    >>> str(maker("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307"))
    'Intel MPI 2021.9'
    """
    kinds = (("Intel", "Intel MPI"), ("Open MPI", "Open MPI"), ("OpenRTE", "Open MPI"), ("HYDRA", "MPICH"))
    name = next((name for word, name in (*kinds, ("MPICH", "MPICH")) if word in says), says.split("\n")[0][:40])
    number = re.search(r"\d+(\.\d+)+", says)
    return Maker(name, number[0] if number else "")


def mpirun(facts: Facts) -> Line:
    """The program that starts ranks, and whether it belongs to the MPI that they load."""
    here = facts.launcher
    if here.mpirun is None:
        return _no_mpirun(facts)
    if here.problem:
        return failure("mpirun", f"{here.mpirun} --version {here.problem}", "Reinstall that MPI, or take it off PATH.")
    mine = maker(here.says)
    found: dict[str, Any] = {"path": here.mpirun, "mpi": str(mine)}
    library = next(iter(_libraries(facts)), None)
    if library and maker(library.version) != mine:
        judged = warning if _worked(facts) else failure
        fine = "; two ranks worked all the same" if _worked(facts) else ""
        return judged(
            "mpirun",
            f"{here.mpirun} is {mine}, and the ranks load {maker(library.version)} ({library.path}){fine}",
            _own_first(facts) or _ONE_MPI,
            **found,
        )
    if here.in_environment and not _same_file(here.mpirun, here.in_environment):
        return warning(
            "mpirun",
            f"{here.mpirun} ({mine}) is in front of this environment's own {here.in_environment} on PATH",
            _own_first(facts) + " If the one on PATH is meant: distfit horovod install builds for it.",
            **found,
        )
    return ok("mpirun", f"{mine} ({here.mpirun})", **found)


def one_mpi(facts: Facts) -> Line:
    """Whether Horovod and mpi4py load the same library: two in one process end in a crash."""
    apart = [*facts.horovod.libraries, *facts.mpi4py.libraries]
    found: dict[str, Any] = {
        "horovod_loads": [library.path for library in facts.horovod.libraries],
        "mpi4py_loads": [library.path for library in facts.mpi4py.libraries],
        "ranks_load": [[library.path for library in rank.libraries] for rank in facts.ranks.seen],
    }
    crowded = [rank for rank in facts.ranks.seen if len(rank.libraries) > 1]
    if crowded:
        named = " and ".join(_told(library) for library in crowded[0].libraries)
        return failure("one-mpi", f"two MPI libraries in one rank: {named}", _ONE_MPI, **found)
    if not (facts.horovod.libraries and facts.mpi4py.libraries):
        return _one_mpi_unknown(facts, found)
    if len({library.path for library in apart}) == 1:
        elsewhere = [
            library for rank in facts.ranks.seen for library in rank.libraries if library.path != apart[0].path
        ]
        if elsewhere:
            text = f"Horovod and mpi4py load {_told(apart[0])}, but under {facts.launcher.mpirun} {_told(elsewhere[0])}"
            return warning("one-mpi", text, _own_first(facts) or _ONE_MPI, **found)
        return ok("one-mpi", f"Horovod and mpi4py load the same MPI: {_told(apart[0])}", **found)
    text = f"Horovod loads {_told(facts.horovod.libraries[0])}, mpi4py by itself {_told(facts.mpi4py.libraries[0])}"
    if _worked(facts):
        both = facts.ranks.seen[0].libraries[0]
        text += f"; in two ranks, Horovod first, both took {both.path}. A script that imports mpi4py first may crash"
        return warning("one-mpi", text, _ONE_MPI, **found)
    return failure("one-mpi", text, _ONE_MPI, **found)


def ranks(facts: Facts) -> Line:
    """Two real ranks: right sums first, and only then how fast."""
    here = facts.ranks
    if not here.asked:
        return ok("ranks", "not tried (--no-ranks)")
    if here.not_started:
        return warning("ranks", f"two ranks were not tried: {here.not_started}", "Mend the lines above first.")
    wrong = [rank for rank in here.seen if rank.right is False]
    if wrong:
        return failure(
            "ranks",
            f"the sum over two ranks is wrong on rank {wrong[0].rank}; a bandwidth would mean nothing",
            "Build Horovod anew: distfit horovod install --force. If it stays wrong, this is a bug worth reporting.",
        )
    if here.seen and all(rank.size == 1 for rank in here.seen):
        return failure("ranks", "each of the two ranks thinks that it is alone", _own_first(facts) or _ONE_MPI)
    if not _worked(facts):
        return failure("ranks", *_broken(facts))
    slowest = max(here.seen, key=lambda rank: rank.seconds or 0.0)
    assert slowest.seconds
    assert slowest.bytes
    speed = slowest.bytes / slowest.seconds
    devices = " and ".join(str(rank.device) for rank in here.seen)
    return ok(
        "ranks",
        f"two ranks on {devices} summed {slowest.bytes / 2**20:.0f} MiB right, in {slowest.seconds * 1e3:.0f} ms: "
        f"{speed / 1e9:.2f} GB/s",
        ranks=len(here.seen),
        bytes=slowest.bytes,
        seconds=slowest.seconds,
        bytes_per_second=speed,
        devices=[rank.device for rank in here.seen],
    )


def _no_mpirun(facts: Facts) -> Line:
    here = facts.launcher
    if not facts.ranks.asked:
        return ok("mpirun", "not needed for one process")
    if here.in_environment:
        return warning("mpirun", f"{here.in_environment} is not on PATH", _own_first(facts))
    if here.srun:
        return warning(
            "mpirun",
            "there is none on PATH; srun, which is, starts ranks only of an MPI that was built for Slurm",
            "Load an MPI (module load openmpi), or type: distfit horovod install",
        )
    return failure(
        "mpirun",
        "there is none on PATH: several ranks cannot be started",
        "Type: distfit horovod install, which brings one; on a cluster: module load openmpi; or --no-ranks.",
    )


def _one_mpi_unknown(facts: Facts, found: dict[str, Any]) -> Line:
    if not facts.ranks.asked:
        return ok("one-mpi", "not needed for one process")
    if facts.horovod.version and not facts.horovod.mpi:
        return ok("one-mpi", "Horovod has no MPI in it", **found)
    loaded = (("Horovod", facts.horovod.libraries), ("mpi4py", facts.mpi4py.libraries))
    absent = " and ".join(name for name, libraries in loaded if not libraries)
    return warning("one-mpi", f"cannot be told: {absent} loaded no MPI library", "Mend the lines above first.", **found)


def _worked(facts: Facts) -> bool:
    seen = facts.ranks.seen
    return (
        facts.ranks.problem is None
        and len(seen) > 1
        and all(rank.right and rank.size == len(seen) and rank.stage == "done" for rank in seen)
    )


def _libraries(facts: Facts) -> list[Library]:
    """Those that the ranks load, or Horovod alone where there were none."""
    in_ranks = [library for rank in facts.ranks.seen for library in rank.libraries]
    return in_ranks or list(facts.horovod.libraries)


def _broken(facts: Facts) -> tuple[str, str]:
    """(what happened, what to do) of two ranks that did not come to the end."""
    here = facts.ranks
    stages = sorted({rank.stage for rank in here.seen if rank.stage != "done"})
    at = f" while {' and '.join(stages)}" if stages else ""
    if here.problem and here.problem.startswith("did not answer"):
        return (
            f"two ranks {here.problem}{at}{_busy(facts)}",
            f"Try again with --limit-s 120. If they still hang: {_LOOK}",
        )
    told = _telling(here.errors)
    text = f"two ranks failed{at}" + (f": {told}" if told else "")
    if facts.tensorflow.gpus is None or facts.horovod.problem:
        return text, "Mend the lines above first."
    return text, _own_first(facts) or _LOOK[0].upper() + _LOOK[1:]


_LOOK = (
    "look at the lines mpirun and one-mpi; then check the shared memory (shm) and the network, and try "
    "OMPI_MCA_btl=self,tcp distfit doctor"
)


def _busy(facts: Facts) -> str:
    here = facts.machine
    return f" (other programs keep its {here.cores} cores busy: load {here.load:.0f})" if here.load > here.cores else ""


def _telling(errors: str) -> str:
    """The line of an error output that says most.

    >>> _telling("Traceback (most recent call last):\\nImportError: no libmpi\\nmpirun: exit status 1")
    'ImportError: no libmpi'
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not _NOISE.match(line.strip())]
    named = (line for pattern in _TELLING for line in lines if pattern.search(line))
    return next(named, lines[-1] if lines else "")


def _own_first(facts: Facts) -> str:
    """What puts this environment's own MPI in front, where it has one and another is there."""
    own, first = facts.launcher.in_environment, facts.launcher.mpirun
    if own is None or (first is not None and _same_file(own, first)):
        return ""
    return f"Put this environment first: export PATH={Path(own).parent}:$PATH (activating it does)."


def _told(library: Library) -> str:
    return f"{maker(library.version)} ({library.path})"


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
