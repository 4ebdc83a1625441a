"""What the doctor says: lines, each with a status and a remedy, and the report that they make.

>>> report = Report((Line("python", OK, "Python 3.11.7"), failure("mpirun", "no mpirun", "Type: apt install x")), 1.5)
>>> report.verdict, report.exit_code
('failure', 1)
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distfit.errors import RUN_EXIT_CODE

OK, WARNING, FAILURE = "ok", "warning", "failure"
_WORST_FIRST = (FAILURE, WARNING, OK)
# Raised when a field of the JSON report changes its name or meaning, or goes.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Line:
    """One finding.

    Args:
        id: its stable name, in JSON and in the guide.
        status: "ok", "warning" (works, but not as well or not everywhere) or "failure" (does not work).
        text: what was found, one sentence or two.
        remedy: what to do; empty where there is nothing to do.
        facts: the figures behind the text, for machines.
    """

    id: str
    status: str
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.status in _WORST_FIRST, self.status
        assert bool(self.remedy) or self.status == OK, f"{self.id}: what is not ok needs a remedy"


def ok(id: str, text: str, remedy: str = "", **facts: Any) -> Line:
    """A line that nothing is wrong with; a remedy is then a hint."""
    return Line(id, OK, text, remedy, facts)


def warning(id: str, text: str, remedy: str, **facts: Any) -> Line:
    """Works, but not as well as it could or not everywhere."""
    return Line(id, WARNING, text, remedy, facts)


def failure(id: str, text: str, remedy: str, **facts: Any) -> Line:
    """Does not work."""
    return Line(id, FAILURE, text, remedy, facts)


@dataclass(frozen=True)
class Report:
    """All lines.

    Args:
        lines: in the order in which they are read.
        seconds: how long it took.
    """

    lines: tuple[Line, ...]
    seconds: float

    @property
    def verdict(self) -> str:
        """The worst status among the lines."""
        return next(
            status for status in _WORST_FIRST if any(line.status == status for line in self.lines) or status == OK
        )

    @property
    def exit_code(self) -> int:
        """0 without failures; warnings do not count."""
        return RUN_EXIT_CODE if self.verdict == FAILURE else 0

    def count(self, status: str) -> int:
        """How many lines have this status."""
        return sum(line.status == status for line in self.lines)

    def as_text(self, columns: int = 100) -> str:
        """For people: a line a finding, its remedy below it, the counts at the end.

        Args:
            columns: where to break lines; at least 60.
        """
        under = 1 + max((len(line.id) for line in self.lines), default=0)
        shown = [part for line in self.lines for part in _shown(line, under, max(columns, 60))]
        return "\n".join([*shown, "", self.summary()])

    def summary(self) -> str:
        """The counts, and how long it took."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in _WORST_FIRST)
        return f"{counts} ({self.seconds:.1f} s)"

    def as_json(self) -> str:
        """For machines; `docs/guides/doctor.md` describes the fields."""
        lines = [
            {"id": line.id, "status": line.status, "text": line.text, "remedy": line.remedy, "facts": dict(line.facts)}
            for line in self.lines
        ]
        content = {
            "version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 2),
            "lines": lines,
        }
        return json.dumps(content, indent=1)


def _shown(line: Line, id_width: int, columns: int) -> list[str]:
    head = f"{line.status:8}{line.id:{id_width}}"
    under = " " * len(head)
    # Not inside words: a path or a command is copied from here.
    wrap = textwrap.TextWrapper(columns, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)
    wrap.initial_indent = head
    text = wrap.wrap(line.text)
    wrap.initial_indent = under + "-> "
    wrap.subsequent_indent = under + "   "
    return text + (wrap.wrap(line.remedy) if line.remedy else [])
