"""One row of the table: a training, what it holds, in which precisions, and how far engines may be apart.

    @case()
    def clipvalue(engine):
        \"\"\"SGD with `clipvalue`\"\"\"
        return engine.fit(classifier(sgd(clipvalue=0.01)), X, LABEL)

The first line of a case's docstring is what the page says that the row holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FLOAT64, FLOAT32 = "float64", "float32"
# Of the weight vector's norm, and of each epoch's loss and metrics.
TOLERANCE = {FLOAT64: 1e-9, FLOAT32: 1e-5}

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training that engines are compared by.

    Args:
        run: takes an engine (tests.cases.engines) and returns numbers by name.
        tolerance: for each precision in which it is run, the largest relative difference (tests.compare).
        saved: the trained model is saved, and loaded in a process without distfit.
    """

    run: Callable[[Any], Result]
    tolerance: dict[str, float] = field(default_factory=lambda: dict(TOLERANCE))
    saved: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def part(self) -> str:
        """The module that it belongs to."""
        return self.run.__module__

    @property
    def holds(self) -> str:
        """What the row holds, in words."""
        return inspect.getdoc(self.run).partition("\n\n")[0].replace("\n", " ")


WRITTEN: dict[str, Case] = {}


def case(tolerance: dict[str, float] | None = None, saved: bool = False) -> Callable[[Any], Any]:
    """Put a function into the table.

    Args:
        tolerance: as in `Case`; by default that of float64 and float32.
        saved: as in `Case`.
    """

    def put(run: Callable[[Any], Result]) -> Callable[[Any], Result]:
        WRITTEN[run.__name__] = Case(run, tolerance or dict(TOLERANCE), saved)
        return run

    return put
