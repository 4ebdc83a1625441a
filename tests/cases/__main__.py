"""`python -m tests.cases OUT CASE,CASE... ENGINE[:DEVICES][/PRECISION]...` runs cases on each engine named.

Writes OUT/ENGINE-DEVICES-PRECISION.npz: for each case its numbers (tests.cases.table), or the first line of
what it raised; and for each of distfit's engines that every check of tests.conformance passed. Under a
launcher, the chief writes. OUT/digits holds the record files.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distfit.session import init
from tests.cases import CASES, Case
from tests.cases.engines import Engine, engine_of, precision
from tests.cases.table import FLOAT64
from tests.compare import ERROR, SECONDS
from tests.conformance import CHECKS
from tests.ranks import collect_less_garbage, show_stacks_when_asked

# How lines begin in which Keras and TensorFlow say where, not what.
NO_WORDS = ("Exception encountered", "Graph execution error", "Detected at", "File ", "<stack", "Stack trace")


def main(out: str, cases: str, *labels: str) -> None:
    """Run the cases on each engine, one engine after the other."""
    show_stacks_when_asked()
    collect_less_garbage()
    devices = [int(label.partition("/")[0].partition(":")[2]) for label in labels if label.startswith("mirrored:")]
    if devices:
        init("mirrored", max(devices))  # first of all: logical ones can only be made before TensorFlow starts
    for label in labels:
        engine = engine_of(label, Path(out))
        numbers = {
            f"{name}//{key}": value for name in cases.split(",") for key, value in _attempt(CASES[name], engine).items()
        }
        numbers |= {f"{check}//passed": np.array(True) for check in _conform(engine)}
        if engine.is_chief:
            np.savez(Path(out) / f"{engine.file}.npz", **numbers)


def _attempt(case: Case, engine: Engine) -> dict[str, Any]:
    """A case's numbers; the error of one that fails takes their place, so that the others are still run."""
    if engine.precision not in case.tolerance:
        return {}
    # TensorFlow's graph optimizer adds in the order of names, which count on from case to case.
    keras.utils.clear_session(free_memory=False)
    began = time.process_time()  # whatever else the machine does
    engine.save_as = case.name if case.saved else None
    try:
        with precision(engine.precision), engine.scope():
            numbers = case.run(engine)
    except Exception as error:
        traceback.print_exc()
        numbers = {ERROR: np.array(f"{type(error).__name__}: {first_words(str(error))}")}
    return numbers | {SECONDS: np.array(time.process_time() - began)}


def first_words(message: str) -> str:
    """The first line of an error that says something.

    >>> first_words("Exception encountered when calling Cond.call().\\n\\nmerge_call called while defining a new graph")
    'merge_call called while defining a new graph'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)  # Keras writes in bold
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(NO_WORDS)), lines[0] if lines else "")


def _conform(engine: Engine) -> list[str]:
    """The checks that distfit's engine passed: all, or this raises; once, in the precision that they are made for."""
    if engine.keras or engine.precision != FLOAT64:
        return []
    with precision(FLOAT64):
        for run_check in CHECKS.values():
            run_check(engine.session())
    return list(CHECKS)


if __name__ == "__main__":
    main(*sys.argv[1:])
