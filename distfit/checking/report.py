"""What a check found: a table, and sentences that say why. Pure.

report = check("train.py")
report.equal, report.explained, report.exit_code
print(report)
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distfit.checking.compare import COLUMNS, Apart, Verdict, apart, is_sharp, verdict
from distfit.checking.plan import AS_WRITTEN, PERMUTED, Run, Variant
from distfit.checking.spec import Failure, Outcome
from distfit.errors import RUN_EXIT_CODE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Where nobody says how wide a line may be: room for every cell.
WIDTH = 130
_STYLES = {
    Verdict.equal: "green",
    Verdict.rounding: "green",
    Verdict.differs: "red",
    Verdict.unclear: "yellow",
}


@dataclass(frozen=True)
class Cell:
    """One number of a row.

    Args:
        verdict: what the difference says.
        difference: from one device, relative.
        control: the same between one device and one device with rows permuted; None in the control's own row.
        where: the variable, loss or metric that differs most.
    """

    verdict: Verdict
    difference: float
    control: float | None = None
    where: str = ""

    def __str__(self) -> str:
        """
        >>> str(Cell(Verdict.rounding, 3e-8, 2e-8)), str(Cell(Verdict.differs, 4e-2, 0.0))
        ('to rounding (3e-8; control 2e-8)', 'differs 4e-2 (control 0)')
        """
        if self.verdict is Verdict.equal:
            return str(self.verdict)
        if self.control is None:
            return short(self.difference)
        control = f"control {short(self.control)}"
        if self.verdict is Verdict.differs:
            return f"{self.verdict} {short(self.difference)} ({control})"
        return f"{self.verdict} ({short(self.difference)}; {control})"

    @property
    def brief(self) -> str:
        """For the table, whose first line says what is in brackets.

        >>> Cell(Verdict.rounding, 3e-8, 2e-8).brief
        'to rounding 3e-8 (2e-8)'
        """
        if self.verdict is Verdict.equal or self.control is None:
            return str(self)
        return f"{self.verdict} {short(self.difference)} ({short(self.control)})"


@dataclass(frozen=True)
class Row:
    """One run, compared with one device.

    Args:
        run: engine and variant.
        cells: by column; none where the run failed.
        failure: None when it came to its end.
        problem: why it failed, or why the engine was left out.
        details: a traceback, or the end of what it printed.
    """

    run: Run
    cells: Mapping[str, Cell]
    failure: Failure | None = None
    problem: str = ""
    details: str = ""

    @property
    def same(self) -> bool:
        """Whether it is the same training as on one device, to rounding."""
        return bool(self.cells) and all(cell.verdict.same for cell in self.cells.values())

    @property
    def worst(self) -> Cell | None:
        """The cell that says most, weights first; None where the run failed."""
        ranked = [Verdict.differs, Verdict.unclear, Verdict.rounding, Verdict.equal]
        return min(self.cells.values(), key=lambda cell: ranked.index(cell.verdict), default=None)


@dataclass(frozen=True)
class Report:
    """What `distfit.check` found.

    Args:
        target: what was checked.
        steps: of each run.
        dtype: in which the model computes.
        rows: one for each engine and variant.
        left_out: engines that could not be tried here, with the reason.
        causes: why rows differ, a sentence each.
        notes: what else is to be known, a sentence each.
        equal: every engine is one device, to rounding, as the training is written.
        explained: what differs does so only for what cannot be equal: BatchNormalization with the moments of each
            replica, random layers; shown by making it equal without them.
        strict: `explained` is not enough.
    """

    target: str
    steps: int
    dtype: str
    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str], ...]
    causes: tuple[str, ...]
    notes: tuple[str, ...]
    equal: bool
    explained: bool
    strict: bool = False

    @property
    def exit_code(self) -> int:
        """0 for the same training everywhere, 1 otherwise."""
        return 0 if self.equal or (self.explained and not self.strict) else RUN_EXIT_CODE

    @property
    def conclusion(self) -> str:
        """The last line."""
        if self.equal:
            return "The same training on every engine."
        if self.explained:
            return "The same training on every engine, but for what cannot be equal: see the causes above."
        return "Not shown to be the same training on every engine."

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        self.print(Console(file=file, width=WIDTH, color_system=None))
        return file.getvalue().rstrip()

    def print(self, console: Console) -> None:
        """Write the table and the sentences to a rich.console.Console."""

        def write(line: str) -> None:
            # Lines that are too long are the terminal's to break, where they can still be copied whole.
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        write(f"{self.target}: {self.steps} steps in {self.dtype}")
        write("how far from one device alone (in brackets: how far rounding alone takes one device)")
        console.print(self.table(), highlight=False)
        for name, why in self.left_out:
            write(f"{name}: left out; {why}")
        for sentence in (*self.causes, *self.notes, self.conclusion):
            write(f"- {sentence}" if sentence is not self.conclusion else sentence)

    def table(self) -> Table:
        """The rows for rich, the columns of those numbers that there are."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Column, Table

        columns = [name for name in COLUMNS if any(name in row.cells for row in self.rows)] or ["result"]
        table = Table(Column(no_wrap=True), *columns, box=SIMPLE_HEAD, pad_edge=False)
        before = AS_WRITTEN
        for row in self.rows:
            if row.run.variant != before:
                before = row.run.variant
                table.add_row(before.title)
            table.add_row(f"  {row.run.engine.name}", *_shown(row, columns))
        return table


def _shown(row: Row, columns: Sequence[str]) -> list[Text]:
    from rich.text import Text

    if row.failure is not None:
        return [Text(str(row.failure), "red")]
    found = [row.cells.get(name) for name in columns]
    return [Text(cell.brief, _STYLES[cell.verdict]) if cell else Text("") for cell in found]


def short(number: float) -> str:
    """A difference in one digit.

    >>> short(0.0412), short(3e-8), short(0.0), short(float("inf"))
    ('4e-2', '3e-8', '0', 'inf')
    """
    if number == 0 or math.isinf(number):
        return f"{number:.0f}"
    digit, exponent = f"{number:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def compared(outcomes: Mapping[Run, Outcome], run: Run, dtype: str, random: bool) -> Row:
    """A row: the numbers of a run against those of one device.

    Args:
        dtype: in which the model computes.
        random: it draws random numbers. They belong to a place in the batch, so that the control of the training as it
            is written would be another training: that without random layers says what rounding does.
    """
    outcome, truth = outcomes[run], outcomes[run.truth]
    failed = outcome if outcome.failure is not None else truth
    if failed.failure is not None:
        return Row(run, {}, failed.failure, failed.problem, failed.details)
    controls = None if run.engine.permuted else _controls(outcomes, run, random)
    return Row(run, {column: _cell(column, found, controls, dtype) for column, found in _apart(truth, outcome).items()})


def _cell(column: str, found: Apart, controls: Mapping[str, Apart] | None, dtype: str) -> Cell:
    if controls is None:
        # What rounding did is the measure, as long as it is small.
        return Cell(verdict(found.size, found.size, dtype), found.size, None, found.where)
    control = controls[column].size if column in controls else 0.0
    return Cell(verdict(found.size, control, dtype), found.size, control, found.where)


def _controls(outcomes: Mapping[Run, Outcome], run: Run, random: bool) -> Mapping[str, Apart]:
    measured = Run(PERMUTED, Variant(random_off=True)) if random else run.control
    pair = [outcomes.get(each) for each in (measured.truth, measured)]
    if any(each is None or each.failure is not None for each in pair):
        return {}
    return _apart(*pair)


def _apart(truth: Any, outcome: Any) -> dict[str, Apart]:
    return apart(truth.numbers, outcome.numbers)


def is_clear(row: Row, dtype: str) -> bool:
    """Whether float64 would not tell more about a row."""
    return all(is_sharp(cell.difference, cell.control or 0.0, dtype) for cell in row.cells.values())
