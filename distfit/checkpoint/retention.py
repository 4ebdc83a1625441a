"""Which checkpoints nobody wants any more: pure.

superseded(entries, keep=3, best=("val_loss", "min"), every_hours=24)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from distfit.checkpoint.folder import Entry

_HOUR_S = 3600.0


def superseded(
    entries: Sequence[Entry], keep: int, best: tuple[str, str] | None = None, every_hours: float | None = None
) -> list[int]:
    """Steps of those that may go; the newest whole one never does.

    Args:
        entries: of one run.
        keep: so many of the newest stay.
        best: a metric, and "min" or "max": of those that have it (and no NaN), the best stays; of equal ones the older.
        every_hours: of each span of so many hours, the first stays.

    >>> from distfit.checkpoint.manifest import Manifest
    >>> def entry(step, loss):
    ...     return Entry(step, None, Manifest(step, {}, 600.0 * step, {"loss": loss}, False, ""))
    >>> entries = [entry(1, 0.5), entry(2, 0.1), entry(3, 0.2), entry(4, 0.3)]
    >>> superseded(entries, keep=1), superseded(entries, keep=1, best=("loss", "min"))
    ([1, 2, 3], [1, 3])
    """
    whole = sorted((entry for entry in entries if entry.manifest is not None), key=lambda entry: entry.step)
    stay = {entry.step for entry in whole[-max(1, keep) :]}
    if best is not None:
        stay |= _best(whole, *best)
    if every_hours is not None:
        stay |= _first_of_each(whole, every_hours * _HOUR_S)
    # One without a manifest says nothing of itself: it is named when somebody looks, and goes when it is old.
    oldest = min(stay, default=0)
    return [entry.step for entry in entries if entry.step not in stay and (entry.manifest or entry.step < oldest)]


def _best(whole: Sequence[Entry], metric: str, mode: str) -> set[int]:
    sign = 1.0 if mode == "min" else -1.0
    found = [
        (sign * entry.manifest.metrics[metric], entry.step)
        for entry in whole
        if entry.manifest is not None
        and not entry.manifest.nan
        and not math.isnan(entry.manifest.metrics.get(metric, math.nan))
    ]
    return {min(found)[1]} if found else set()


def _first_of_each(whole: Sequence[Entry], span_s: float) -> set[int]:
    first: dict[int, int] = {}
    for entry in whole:
        assert entry.manifest is not None
        first.setdefault(int(entry.manifest.created // span_s), entry.step)
    return set(first.values())
