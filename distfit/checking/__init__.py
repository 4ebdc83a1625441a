"""`distfit check`: is a user's own training the same on one device, on several, and on ranks? By experiment.

    report = check("train.py", devices=(2, 3), ranks=(2,))
    assert report.exit_code == 0, report

target (what is started), plan (which runs there are), children (processes), child (one of them), caught and caught_loop
(distfit.fit and a hand-written loop for a few steps), rows (permuted, and random numbers by rows), spec (what is told
and what comes back), compare (how far apart, and is it rounding), report (the table), causes (why), examine (the
experiment).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distfit.errors import InputError

if TYPE_CHECKING:
    from distfit.checking.report import Report

LIMIT_S = 300.0


def check(
    target: str | os.PathLike | Callable,
    arguments: Sequence[str] = (),
    *,
    steps: int = 5,
    devices: Sequence[int] = (2,),
    ranks: Sequence[int] = (2,),
    float64: bool = False,
    strict: bool = False,
    limit_s: float = LIMIT_S,
    allow_run_as_root: bool = False,
    show: Callable[[str, str | None], None] | None = None,
) -> Report:
    """Train what a script trains for a few steps alone, on logical devices and on ranks, and compare.

    Every run is a process of its own on this machine's CPUs. Where an engine comes to another result, the runs are
    repeated without what cannot be equal (BatchNormalization with each replica's moments, random layers), so that the
    report says how much each of them does and whether something else is left.

    Args:
        target: a script that calls `distfit.fit` or has a loop of its own (`session.training`), a configuration
            (.yaml), `"package.module:function"`, or a function of a module; a function returns a dict of distfit.fit's
            arguments. What a script does before its training happens in every run; what follows does not happen.
        arguments: the script's own, or `key=value` that replace fields of a configuration.
        steps: of training, and of evaluation, in each run; >= 1.
        devices, ranks: how many to compare with one device, each >= 2. Ranks are left out, with the reason, where
            they cannot be started.
        float64: compute in float64, whose digits tell rounding from a difference.
        strict: random layers and BatchNormalization are no excuse.
        limit_s: seconds after which a run has hung and is ended; > 0.
        allow_run_as_root: let root start ranks with Open MPI, say in a container.
        show: is called with the name of a run and None when it begins, with its name and how it ended when it ends.

    Returns:
        A report: `equal`, `explained`, `exit_code`, `rows`, `causes`; `str(report)` is the table.

    Raises:
        InputError: an argument cannot work, there is no such target, or it does not call `distfit.fit`.
        RunError: the target fails on one device; its traceback is part of the message.
    """
    from distfit.checking.children import Children, available
    from distfit.checking.examine import examine
    from distfit.checking.plan import engines_of
    from distfit.checking.target import target_of

    named = target_of(target, arguments)
    _check_numbers(steps, limit_s)
    engines, missing = available(engines_of(devices, ranks), allow_run_as_root)
    left_out = [(each.engine.name, each.why) for each in missing]
    if not engines:
        raise InputError(f"Expected an engine to compare with one device, received ranks alone, and {left_out[0][1]}")
    with Children(named, steps, float64, limit_s, allow_run_as_root, show) as children:
        return examine(children.run, named, engines, steps, left_out, strict)


def _check_numbers(steps: int, limit_s: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"Expected steps to be a whole number of at least 1, received {steps!r}.")
    if not limit_s > 0:
        raise InputError(f"Expected limit_s to be a number of seconds above 0, received {limit_s!r}.")
