"""Runs every case of tests/cases on every engine and in plain Keras, and writes the table of docs/same-training.md.

    python -m benchmarks.same_training                      all rows; writes the page; 10 minutes on two cores
    python -m benchmarks.same_training --cases lion,text    a few rows, printed
    python -m benchmarks.same_training --folder FOLDER      keeps what jobs write; runs none that is there already
    python -m benchmarks.same_training --folder FOLDER --again lion   but for these rows
    python -m benchmarks.same_training --missing            the rows that the page has not; the others stay as they are
    python -m benchmarks.same_training --check              does the page show the cases that there are? runs nothing

Run it in the root of a checkout, in an environment with `pip install -e .[dev]` and `distfit horovod install`. Exit
code 1: a figure of distfit is above its limit, or the page misses a case. tests/test_engines.py holds the same limits.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from tests.cases import CASES, PARTS, Case
from tests.cases.engines import parsed as parsed_label
from tests.cases.jobs import Job
from tests.cases.table import FLOAT32, FLOAT64
from tests.compare import ERROR, SAVED, SECONDS, largest, of_case
from tests.ranks import ROOT

PAGE = "docs/same-training.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
LIMIT_S = 3600
BOTH = (FLOAT64, FLOAT32)
# A column of distfit: its job, and the engine in it.
COLUMNS = {
    "mirrored 2": ("mirrored", "mirrored:2"),
    "mirrored 3": ("mirrored", "mirrored:3"),
    "mpirun 2": ("mpirun 2", "horovod"),
    "mpirun 3": ("mpirun 3", "horovod"),
}
PLAIN = "plain:2"
JOBS = {
    "one device": Job(
        "none", 1, tuple(f"{engine}/{kind}" for engine in ("keras", "single", "permuted") for kind in BOTH)
    ),
    "mirrored": Job("none", 1, tuple(f"mirrored:{size}/{kind}" for size in (3, 2) for kind in BOTH)),
    "mpirun 2": Job("mpirun", 2, tuple(f"horovod/{kind}" for kind in BOTH)),
    "mpirun 3": Job("mpirun", 3, tuple(f"horovod/{kind}" for kind in BOTH)),
    "plain": Job("none", 1, tuple(f"{PLAIN}/{kind}" for kind in BOTH)),
}
# job -> engine -> CASE//NAME -> numbers
Numbers = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class Figure:
    """One difference of a row in one precision.

    Args:
        value: relative, see tests.compare; None when there is nothing to compare with.
        limit: above it, it is no rounding.
        error: the first line of what was raised instead.
    """

    value: float | None
    limit: float
    error: str = ""

    @property
    def kept(self) -> bool:
        return not self.error and (self.value is None or self.value <= self.limit)

    def __str__(self) -> str:
        """
        >>> str(Figure(2.2e-16, 1e-9)), str(Figure(0.024, 1e-9)), str(Figure(0.0, 1e-9)), str(Figure(None, 1e-9))
        ('2e-16', '**2e-02**', '0', '-')
        """
        if self.error:
            return f"**error**: {shortened(self.error)}"
        if self.value is None:
            return "-"
        text = "0" if self.value == 0 else f"{self.value:.0e}"
        return text if self.kept else f"**{text}**"


@dataclass(frozen=True)
class Row:
    """What the table says of one case.

    Args:
        same_bits: one device of distfit is Keras to the bit, in every precision; None where Keras cannot run it.
        control, columns: by precision; plain is the first precision's.
    """

    case: Case
    same_bits: bool | None
    control: list[Figure]
    columns: dict[str, list[Figure]]
    plain: Figure

    @property
    def kept(self) -> bool:
        figures = [*self.control, *(figure for column in self.columns.values() for figure in column)]
        return self.same_bits is not False and all(figure.kept for figure in figures)


def main(argv: Sequence[str]) -> int:
    """See the module."""
    options = parsed(argv)
    page = (ROOT / PAGE).read_text()
    if options.check:
        return check(page)
    there = lines_of(page) if options.missing else {}
    names = options.cases.split(",") if options.cases else [name for name in CASES if name not in there]
    with tempfile.TemporaryDirectory() as scratch:
        numbers = measured(Path(options.folder or scratch), names, options.again.split(","))
    rows = [row_of(CASES[name], numbers) for name in names]
    text = figures(there | {row.case.name: line_of(row) for row in rows})
    print(text)
    if not options.cases:
        (ROOT / PAGE).write_text(replaced(page, text))
    return report([row.case.name for row in rows if not row.kept], "above their limits")


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="rows to run, by name, with commas; the page is left as it is")
    parser.add_argument("--folder", help="keeps what the jobs wrote")
    parser.add_argument("--again", default="", help="rows to run although FOLDER has them, with commas")
    parser.add_argument("--missing", action="store_true", help="run the rows that the page has not, and add them")
    parser.add_argument("--check", action="store_true", help="compare the page's rows with the cases")
    return parser.parse_args(argv)


def measured(folder: Path, cases: Sequence[str], again: Sequence[str] = ()) -> Numbers:
    """Every job's numbers; two jobs at a time, as most keep one core busy."""
    with ThreadPoolExecutor(2) as pool:
        started = {name: pool.submit(numbers_of, name, folder / name.replace(" ", "-"), cases, again) for name in JOBS}
        return {name: future.result() for name, future in started.items()}


def numbers_of(
    name: str, folder: Path, cases: Sequence[str], again: Sequence[str]
) -> Mapping[str, Mapping[str, np.ndarray]]:
    """A job's numbers; the cases that `folder` has are run again if they are named."""
    job = JOBS[name]
    known = job.numbers(folder)
    missing = [case for case in cases if case in again or lacks(known, case, job.engines)]
    if missing:
        print(f"{name}: {len(missing)} cases on {', '.join(job.engines)}", file=sys.stderr, flush=True)
        new = job.run(folder / "latest", missing, LIMIT_S)
        known = {engine: dict(known.get(engine, {})) | dict(new[engine]) for engine in job.engines}
        job.keep(folder, known)
    return known


def lacks(known: Mapping[str, Mapping[str, np.ndarray]], case: str, engines: Iterable[str]) -> bool:
    """Whether a case was not run on one of these engines in a precision that it is run in.

    >>> lacks({"keras/float64": {"lion//seconds": 1}}, "lion", ["keras/float64"])
    False
    """
    own = [engine for engine in engines if parsed_label(engine)[2] in CASES[case].tolerance]
    return any(f"{case}//{SECONDS}" not in known.get(engine, {}) for engine in own)


def row_of(case: Case, numbers: Numbers) -> Row:
    """Compare one case's numbers."""
    kinds = list(case.tolerance)
    alone = numbers["one device"]

    def figure(kind: str, engine: str, job: str, expected: str = "single") -> Figure:
        return compared(
            of_case(alone[f"{expected}/{kind}"], case.name),
            of_case(numbers[job][f"{engine}/{kind}"], case.name),
            case.tolerance[kind],
        )

    bits = [figure(kind, "single", "one device", "keras") for kind in kinds]
    return Row(
        case,
        None if all(one.value is None and not one.error for one in bits) else all(one.value == 0 for one in bits),
        [figure(kind, "permuted", "one device", "keras") for kind in kinds],
        {name: [figure(kind, engine, job) for kind in kinds] for name, (job, engine) in COLUMNS.items()},
        figure(kinds[0], PLAIN, "plain", "keras"),
    )


def compared(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray], limit: float) -> Figure:
    """The figure of two runs of a case.

    >>> run = {"weights": np.ones(2), "seconds": np.array(3.0)}
    >>> compared(run, run | {"seconds": np.array(4.0)}, limit=1e-9).value
    0.0
    """
    for numbers in (expected, received):
        if ERROR in numbers:
            return Figure(None, limit, str(numbers[ERROR]))
    trained = {name: value for name, value in expected.items() if name not in (SECONDS, SAVED)}
    return Figure(largest(trained, received) if trained else None, limit)


def figures(lines: Mapping[str, str]) -> str:
    """The generated part of the page, from its lines by the names of cases."""
    head = ["row", "holds", "control", "one device", *COLUMNS, "plain Keras 2"]
    top = [in_cells(head), in_cells(["---"] * len(head))]
    parts = [BEGIN, machine()]
    for title, module in PARTS.items():
        own = [lines[name] for name, case in CASES.items() if case.part == module.__name__ and name in lines]
        if own:
            parts.append("\n".join([f"### {title}\n", *top, *own]))
    return "\n\n".join([*parts, END])


def line_of(row: Row) -> str:
    """A row as Markdown."""
    return in_cells(cells(row))


def in_cells(texts: Sequence[str]) -> str:
    """
    >>> in_cells(["a", "b"])
    '| a | b |'
    """
    return f"| {' | '.join(texts)} |"


def cells(row: Row) -> list[str]:
    """A row's cells."""
    bits = {None: "-", True: "same bits", False: "**differs**"}[row.same_bits]
    columns = (pair(figures) for figures in row.columns.values())
    return [f"`{row.case.name}`", row.case.holds, pair(row.control), bits, *columns, str(row.plain)]


def pair(figures: Sequence[Figure]) -> str:
    """
    >>> pair([Figure(2e-16, 1e-9), Figure(1e-7, 1e-5)]), pair([Figure(None, 1e-9)] * 2)
    ('2e-16, 1e-07', '-')
    """
    texts = list(dict.fromkeys(str(figure) for figure in figures))
    return ", ".join(texts if texts in (["-"], ["0"]) else map(str, figures))


def shortened(text: str, longest: int = 100) -> str:
    """One line of an error that fits into a cell; where on this machine it was raised is left out.

    >>> shortened("ValueError: a|b")
    'ValueError: a\\\\|b'
    >>> shortened("ValueError: of w (defined @ /somewhere/layer.py:3) no more")
    'ValueError: of w no more'
    """
    text = re.sub(r" \(defined @ [^)]*\)?", "", text)
    line = re.sub(r"([|*_<`])", r"\\\1", text if len(text) <= longest else text[: longest - 3] + "...")
    return line.replace("{{", "{ {")


def machine() -> str:
    """Where the figures come from."""
    return (
        f"Figures of `python -m benchmarks.same_training` on {processor()}, Python {platform.python_version()}, "
        f"TensorFlow {version_of('tensorflow', 'tensorflow-cpu')}, Keras {version_of('keras')}, "
        f"Horovod {version_of('horovod')}, Open MPI through mpi4py {version_of('mpi4py')}."
    )


def processor() -> str:
    """Its name and how many cores this process may use."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def version_of(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(none)"


def replaced(page: str, text: str) -> str:
    """The page with another generated part.

    >>> replaced(f"words {BEGIN} old {END} more", f"{BEGIN} new {END}")
    'words <!-- figures --> new <!-- end of figures --> more'
    """
    before, _, rest = page.partition(BEGIN)
    return before + text + rest.partition(END)[2]


def rows_of(page: str) -> list[str]:
    """The cases whose rows a page shows, in its order.

    >>> rows_of("| `lion` | Lion |")
    ['lion']
    """
    return list(lines_of(page))


def lines_of(page: str) -> dict[str, str]:
    """The rows that a page shows, by their cases.

    >>> lines_of("| `lion` | Lion |")
    {'lion': '| `lion` | Lion |'}
    """
    return {line.split("`")[1]: line for line in re.findall(r"^\| `\w+` \|.*$", page, re.MULTILINE)}


def controls_of(page: str) -> dict[str, list[float]]:
    """Each row's control, by precision.

    >>> controls_of("| `lion` | Lion | 8e-17, 1e-07 | same bits |")
    {'lion': [8e-17, 1e-07]}
    """
    cells = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", page, re.MULTILINE)
    return {name: [float(one) for one in text.split(", ") if one != "-"] for name, text in cells}


def check(page: str) -> int:
    """1 when the page's rows are not the cases."""
    shown = rows_of(page)
    differing = sorted(set(shown) ^ set(CASES))
    return report(differing, f"in the cases or in {PAGE}, not in both")


def report(names: Iterable[str], what: str) -> int:
    """1 and a sentence when there are any."""
    names = list(names)
    if names:
        print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
