"""One run of a user's training, in a process of its own or as one rank of several.

    python -m distfit.checking.child FOLDER       # FOLDER/spec.json says what; numbers.npz and answer.json come back

The training is started as the user starts it, with `distfit.fit` and `session.training` replaced: there it trains for a
few steps, what it did is written down, and the script ends; what follows the call does not run, but for its `finally`
blocks.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np

from distfit import fitting
from distfit.checking.caught import Caught
from distfit.checking.caught_loop import CaughtLoop
from distfit.checking.rows import RowWatch
from distfit.checking.spec import Facts, Failure, Spec, write, write_failure
from distfit.checking.target import Kind, Target
from distfit.errors import DistfitError, InputError
from distfit.session import Session, init
from distfit.topology import from_environment

# Of a script that sets none: the same for every run.
SEED = 20


class _Done(BaseException):
    """Ends the script, through handlers of exceptions too; ranks then leave their job in order."""

    agreed = True  # all ranks raise it: nothing is to be reported


def main(folder: Path) -> None:
    """Run what the folder's spec says; the chief tells what went wrong, if something does."""
    spec = Spec.read(folder)
    is_chief = from_environment(os.environ).is_chief

    def fail(failure: Failure, problem: str, code: int) -> NoReturn:
        if is_chief:
            write_failure(folder, failure, problem, _traceback(spec.target))
        traceback.print_exc()
        raise SystemExit(code)

    try:
        _start(spec, folder)
    except DistfitError as error:
        fail(Failure.refused, str(error), error.exit_code)
    except _Done:
        return
    except SystemExit as error:
        if error.code not in (None, 0):
            fail(Failure.script, f"the script ended with exit code {error.code} before distfit.fit", 1)
    except Exception as error:
        fail(Failure.script, f"{type(error).__name__}: {error}", 1)
    if is_chief:
        write_failure(folder, Failure.no_fit, "it ended without a call of distfit.fit, and without a hand-written loop")


def _start(spec: Spec, folder: Path) -> None:
    variant, engine = spec.run.variant, spec.run.engine
    # Before the script makes its first tensor: TensorFlow's devices are settled by then.
    init(stall_limit_s=spec.stall_limit_s)
    keras.utils.set_random_seed(SEED)
    if spec.float64:
        keras.config.set_floatx("float64")
    watch = RowWatch(permuted=engine.permuted, random_off=variant.random_off)
    watch.install()

    def keep(session: Session, numbers: dict[str, np.ndarray], facts: Facts) -> NoReturn:
        if session.is_chief:
            write(folder, numbers, facts)
        raise _Done

    fitting.fit = Caught(spec, watch, keep)
    CaughtLoop(spec, watch, keep).install()
    sys.path[:0] = spec.paths
    _run(spec.target, spec.float64)


def _run(target: Target, float64: bool) -> None:
    if target.kind is Kind.script:
        sys.argv = [target.name, *target.arguments]
        sys.path.insert(0, str(Path(target.name).resolve().parent))
        runpy.run_path(target.name, run_name="__main__")
    elif target.kind is Kind.configuration:
        from distfit import config, experiment

        experiment.train(config.load(target.name, [*target.arguments, *(["dtype=float64"] if float64 else [])]))
    else:
        fitting.fit(**_arguments(target.name))


def _traceback(target: Target) -> str:
    """Of the exception that is being handled, from the script's own first line on."""
    kind, error, at = sys.exc_info()
    start = at
    while start is not None and start.tb_frame.f_code.co_filename != target.name:
        start = start.tb_next
    return "".join(traceback.format_exception(kind, error, start or at))


def _arguments(path: str) -> dict[str, Any]:
    from distfit.experiment.names import named

    given = named("the target", path)()
    if not isinstance(given, dict) or "model" not in given:
        raise InputError(
            f"Expected {path} to return a dict of distfit.fit's arguments, `model` and `x` among them, received "
            f"{type(given).__name__}. Return dict(model=model, x=x, y=y, batch_size=64), say."
        )
    return given


if __name__ == "__main__":
    main(Path(sys.argv[1]))
