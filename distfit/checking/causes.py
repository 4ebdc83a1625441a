"""Why rows differ, in sentences: from what made them equal, and from what is known of the model. Pure.

causes(rows, facts)      # ["BatchNormalization is a cause: weights differ 4e-2 ...; with sync_batch_norm=True 3e-8."]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distfit.checking.plan import ALONE, AS_WRITTEN, Engine, Run, Variant, variants_of
from distfit.checking.report import Cell, Row, short
from distfit.checking.spec import Facts, Failure, Outcome

_TAIL_LINES = 25


@dataclass(frozen=True)
class Evidence:
    """Rows by run, and what is known of the model.

    Args:
        rows: of all runs but those of one device.
        facts: of one device, as the training is written.
    """

    rows: Mapping[Run, Row]
    facts: Facts

    @property
    def variants(self) -> list[Variant]:
        """What can be tried on this model; the last changes all that can be."""
        return variants_of(self.facts.batch_norm, bool(self.facts.random))

    @property
    def engines(self) -> list[Engine]:
        """Those that train the script as it is written."""
        return [run.engine for run in self.rows if run.variant == AS_WRITTEN and not run.engine.permuted]

    def row(self, engine: Engine, variant: Variant) -> Row | None:
        return self.rows.get(Run(engine, variant))

    @property
    def differing(self) -> list[Engine]:
        """Engines that came to another result."""
        found = [self.rows[Run(engine)] for engine in self.engines]
        return [row.run.engine for row in found if row.failure is None and not row.same]

    @property
    def unexplained(self) -> list[Row]:
        """Of the engines that differ, the row that still does when all that can be changed is; the row as it is written
        where nothing can."""
        last = [(engine, self.variants[-1] if self.variants else AS_WRITTEN) for engine in self.differing]
        rows = [self.row(*each) or self.rows[Run(each[0])] for each in last]
        return [row for row in rows if not row.same]

    @property
    def failed(self) -> list[Row]:
        """Rows without numbers."""
        return [row for row in self.rows.values() if row.failure is not None]


def causes(found: Evidence) -> list[str]:
    """A sentence for each cause of a difference, as the experiments showed it."""
    sentences = [_failure(row) for row in found.failed]
    if not found.differing:
        return sentences
    engine = found.differing[0]
    random, batch_norm = bool(found.facts.random), found.facts.batch_norm
    if batch_norm:
        left = found.row(engine, Variant(random_off=random))
        without = found.row(engine, Variant(sync_batch_norm=True, random_off=random))
        who = "BatchNormalization", "each replica normalises with the moments of its own rows"
        sentences += _cause(who, "with sync_batch_norm=True", left, without)
    if random:
        left = found.row(engine, Variant(sync_batch_norm=batch_norm))
        without = found.row(engine, Variant(sync_batch_norm=batch_norm, random_off=True))
        who = f"Random numbers ({', '.join(found.facts.random)})", "each replica draws its own"
        sentences += _cause(who, "with random layers off", left, without)
    return [*sentences, *_left(found)]


def _cause(who: tuple[str, str], how: str, left: Row | None, without: Row | None) -> list[str]:
    """What one cause does, from the row in which it alone is left, and that in which nothing is."""
    if left is None or without is None or left.worst is None or without.worst is None:
        return []
    name, what = who
    if left.same:
        return [f"{name}: no cause; {left.run} is equal with it."]
    where = f", most in {left.worst.where}" if left.worst.where else ""
    rest = "equal to the bit" if without.worst.difference == 0 else short(without.worst.difference)
    end = f"{how} {rest}" if without.same else f"{how} {rest} is left"
    return [f"{name}: a cause of {short(left.worst.difference)} ({left.run}{where}): {what}; {end}."]


def _left(found: Evidence) -> list[str]:
    """What no experiment explains."""
    cells = [(row, row.worst) for row in found.unexplained if row.worst is not None]
    if not cells:
        return []
    what = "; ".join(f"{row.run}: {_differs(row, cell)}" for row, cell in cells)
    if found.facts.notes:
        return [
            f"What is left ({what}) fits what distfit says of this model when it starts, and is for you to judge: "
            + " ".join(found.facts.notes)
        ]
    return [
        f"Not explained ({what}): distfit knows of nothing in this model that several replicas do otherwise. Please "
        "report it with this table and the model."
    ]


def _differs(row: Row, cell: Cell) -> str:
    column = next(name for name, one in row.cells.items() if one is cell)
    return f"{column} {cell}" + (f", most in {cell.where}" if cell.where else "")


def _failure(row: Row) -> str:
    if row.failure is Failure.refused:
        return f"{row.run}: distfit refuses it. {row.problem}"
    printed = "\n".join(f"    {line}" for line in row.details.splitlines()[-_TAIL_LINES:])
    return f"{row.run}: failed, {row.problem}" + (f"\n{printed}" if printed else "")


def other_data(outcomes: Mapping[Run, Outcome]) -> list[str]:
    """Where runs did not train on the same data, or from the same weights, so that nothing can be compared."""
    sentences = []
    for run, outcome in outcomes.items():
        truth = outcomes.get(run.truth)
        if run.engine == ALONE or truth is None or outcome.failure is not None or truth.failure is not None:
            continue
        step = _first_difference(truth.facts.digests, outcome.facts.digests)
        if step is not None:
            sentences.append(
                f"{run}: trained on other data than one device, from step {step} on, so that nothing can be compared. "
                "Seed what the script draws (np.random.default_rng(seed), shuffle(..., seed=...)), let batch_size not "
                "depend on the number of replicas, and check again."
            )
        elif None not in (truth.facts.initial, outcome.facts.initial) and truth.facts.initial != outcome.facts.initial:
            sentences.append(
                f"{run}: began with other weights than one device, so that nothing can be compared. Build the model "
                "from the same seed in every run: keras.utils.set_random_seed(seed) at the top of the script."
            )
    return sentences


def _first_difference(expected: Sequence[int], received: Sequence[int]) -> int | None:
    """The number of the first batch that differs, counted from 1.

    >>> _first_difference([3, 4, 5], [3, 9, 5]), _first_difference([3], [3])
    (2, None)
    """
    pairs = zip(expected, received, strict=False)
    return next((step for step, (own, other) in enumerate(pairs, 1) if own != other), None)


def notes(asked: int, facts: Facts, clear: bool) -> list[str]:
    """What else is to be known.

    Args:
        asked: how many steps were asked for.
        clear: float64 would not tell more.
    """
    found = []
    if facts.steps < asked:
        found.append(f"The data gave {facts.steps} steps, not {asked}.")
    if facts.left_out:
        found.append(
            f"Not used, as a check writes nothing and compares with one device: {', '.join(facts.left_out)}. What they "
            "change in a training was not compared."
        )
    if facts.not_evaluated:
        found.append(f"No evaluation: {facts.not_evaluated}.")
    if not clear:
        found.append(f"{facts.dtype} does not tell rounding from a small difference here; --float64 does.")
    return found
