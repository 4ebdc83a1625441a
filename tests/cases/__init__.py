"""Trainings that every engine must end with the same numbers: the rows of docs/same-training.md.

    from tests.cases import CASES
    CASES["global_clipnorm"].holds              # what the row holds, in words
    CASES["global_clipnorm"].run(engine)        # its numbers by name, on one of tests.cases.engines

Every module of this package is one part of the table, but for table.py (what a row is), models.py, engines.py,
jobs.py (launches) and __main__.py (`python -m tests.cases`). `tests/compare.py` says how far two engines' numbers are
apart, and `tests/test_engines.py` holds the limits.
"""

from tests.cases import (
    batch_norm,
    batches,
    callbacks,
    execution,
    layers,
    losses,
    metrics,
    optimizers,
    own_steps,
    precision,
    sources,
    together,
)
from tests.cases.table import WRITTEN, Case

PARTS = {
    "Batches": batches,
    "Losses": losses,
    "Metrics": metrics,
    "A model's own steps": own_steps,
    "Optimizers": optimizers,
    "Precision": precision,
    "Layers": layers,
    "BatchNormalization": batch_norm,
    "Execution": execution,
    "Sources of data, and calls": sources,
    "Callbacks": callbacks,
    "Combinations": together,
}
# In the table's order.
CASES: dict[str, Case] = {
    name: case for part in PARTS.values() for name, case in WRITTEN.items() if case.part == part.__name__
}

__all__ = ["CASES", "PARTS", "Case"]
