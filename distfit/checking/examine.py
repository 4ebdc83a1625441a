"""The experiment: which runs are made, in which order, and what follows from them. Knows no process.

report = examine(children.run, target, engines, steps=5)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from distfit.checking.causes import Evidence, causes, notes, other_data
from distfit.checking.plan import ALONE, AS_WRITTEN, PERMUTED, Engine, Run, Variant
from distfit.checking.report import Report, Row, compared, is_clear
from distfit.checking.spec import Failure, Outcome
from distfit.checking.target import Target
from distfit.errors import InputError, RunError

Outcomes: TypeAlias = dict[Run, Outcome]
RunAll: TypeAlias = Callable[[Sequence[Run]], Outcomes]


def examine(
    run_all: RunAll,
    target: Target,
    engines: Sequence[Engine],
    steps: int,
    left_out: Sequence[tuple[str, str]] = (),
    strict: bool = False,
) -> Report:
    """Compare every engine with one device; where one differs, find out why.

    Args:
        run_all: makes runs.
        target: what is run, for messages.
        engines: at least one, the cheapest first.
        steps: that were asked for.
        left_out: names of engines that cannot be tried here, and why.
        strict: as in `Report`.

    Raises:
        InputError: the target does not call distfit.fit, or distfit refuses it on one device.
        RunError: it fails on one device.
    """
    outcomes = run_all([Run(ALONE), *map(Run, engines[:1])])
    alone = outcomes[Run(ALONE)]
    _refuse(target, alone)
    # Random numbers belong to a place in the batch: rows in another order would be another training.
    permuted = [] if alone.facts.random else [Run(PERMUTED)]
    outcomes |= run_all([*permuted, *map(Run, engines[1:])])
    found = evidence(outcomes)
    confused = other_data(outcomes)
    if found.differing and found.variants and not confused:
        outcomes |= run_all(tried(found.differing, found.variants))
        found = evidence(outcomes)
    return _report(target, steps, found, confused, left_out, strict)


def tried(differing: Sequence[Engine], variants: Sequence[Variant]) -> list[Run]:
    """Each change on the first engine that differs; all of them at once on the others; what both are compared with."""
    baselines = dict.fromkeys(variant.alone for variant in variants if variant.alone != AS_WRITTEN)
    runs = [Run(engine, variant) for variant in baselines for engine in (ALONE, PERMUTED)]
    runs += [Run(differing[0], variant) for variant in variants]
    return runs + [Run(engine, variants[-1]) for engine in differing[1:]]


def evidence(outcomes: Mapping[Run, Outcome]) -> Evidence:
    """Every run compared with one device, in the order of the table."""
    facts = outcomes[Run(ALONE)].facts
    rows = [
        compared(outcomes, run, facts.dtype, bool(facts.random))
        for run in outcomes
        if run.engine != ALONE and run.truth in outcomes
    ]
    ordered = sorted(rows, key=lambda row: _place(row.run))
    return Evidence({row.run: row for row in ordered}, facts)


def _place(run: Run) -> tuple:
    variant, engine = run.variant, run.engine
    return variant.sync_batch_norm + 2 * variant.random_off, not engine.permuted, engine.ranks, engine.devices


def _report(
    target: Target,
    steps: int,
    found: Evidence,
    confused: Sequence[str],
    left_out: Sequence[tuple[str, str]],
    strict: bool,
) -> Report:
    rows: tuple[Row, ...] = tuple(found.rows.values())
    failed = bool(found.failed) or bool(confused)
    clear = bool(confused) or all(is_clear(row, found.facts.dtype) for row in rows if row in _that_decide(found))
    return Report(
        target=str(target),
        steps=found.facts.steps,
        dtype=found.facts.dtype,
        rows=rows,
        left_out=tuple(left_out),
        causes=tuple(confused or causes(found)),
        notes=tuple(notes(steps, found.facts, clear)),
        equal=not failed and not found.differing,
        explained=not failed and not found.unexplained,
        strict=strict,
    )


def _that_decide(found: Evidence) -> list[Row]:
    """The rows on which the conclusion rests: those as written that are the same, and the last variant's."""
    last = found.variants[-1] if found.variants else AS_WRITTEN
    return [row for run, row in found.rows.items() if not run.engine.permuted and (row.same or run.variant == last)]


def _refuse(target: Target, alone: Outcome) -> None:
    if alone.failure is None:
        return
    if alone.failure is Failure.no_fit:
        raise InputError(
            f"Expected {target} to train with distfit.fit or session.training, which is what a check compares, and it "
            "ended without. Let it call distfit.fit(model, ...) in place of model.fit(...)."
        )
    if alone.failure is Failure.refused:
        raise InputError(f"Expected {target} to train on one device, and distfit refuses it there: {alone.problem}")
    raise RunError(
        f"Expected {target} to train on one device for the comparison, and it fails there: {alone.problem}\n"
        f"{alone.details.rstrip()}"
    )
