"""Which checkpoints of a run may go, and their end: nothing goes before what stays has been read and found whole.

plan = planned(Checkpoints("runs/a"), keep=2, best=("val_loss", "min"))
delete(Checkpoints("runs/a"), plan)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distfit.checkpoint.folder import FACTS_FILE, MOST_FACTS, Checkpoints, Damaged, Entry
from distfit.checkpoint.retention import superseded
from distfit.checkpoint.tensors import BAD_JSON, read_small
from distfit.data.build.whole_folder import format_bytes
from distfit.errors import InputError, nearest
from distfit.monitor.counting import Counting, silent


@dataclass(frozen=True)
class Plan:
    """What becomes of each checkpoint.

    Args:
        gone: steps of those that may go, the oldest first.
        kept: steps of those that stay, all of them read and whole.
        damaged: what is wrong with the others, by step; they stay, too.
        freed: bytes.
    """

    gone: tuple[int, ...]
    kept: tuple[int, ...]
    damaged: Mapping[int, str]
    freed: int


def planned(
    checkpoints: Checkpoints,
    keep: int,
    best: tuple[str, str] | None = None,
    every_hours: float | None = None,
    count: Counting = silent,
) -> Plan:
    """What may go: as a run with these options would decide, had it made them all.

    One that is damaged takes nobody's place: the newest that is whole always stays.

    Args:
        keep: so many of the newest stay, at least 1.
        best: name of a metric of which the best stays, and "min" or "max"; None for the run's own, if it has one.
        every_hours: of each span of so many hours one stays.
        count: shows how far reading is.

    Raises:
        InputError: no checkpoint has this metric.
    """
    entries = checkpoints.entries()
    damaged = {entry.step: entry.damage for entry in entries if entry.damage}
    _check_metric(entries, best)
    best = best or best_by(entries)
    whole: set[int] = set()
    with count("Verifying", len(entries), "checkpoints") as done:
        while True:
            sound = [entry for entry in entries if entry.step not in damaged]
            gone = set(superseded(sound, keep, best, every_hours))
            unread = [entry for entry in sound if entry.step not in gone | whole]
            if not unread:
                break
            for entry in unread:
                if why := damage_of(checkpoints, entry.step):
                    damaged[entry.step] = why
                else:
                    whole.add(entry.step)
                done(folder_size(entry.path))
    kept = tuple(entry.step for entry in sound if entry.step not in gone)
    freed = sum(folder_size(entry.path) for entry in sound if entry.step in gone)
    return Plan(tuple(sorted(gone)), kept, damaged, freed)


def delete(checkpoints: Checkpoints, plan: Plan) -> None:
    """Deletes what may go, the oldest first."""
    for step in plan.gone:
        checkpoints.delete(step)


def facts_in(entry: Entry) -> Mapping[str, Any]:
    """The facts of a checkpoint, not verified; none where they cannot be read."""
    if entry.damage:
        return {}
    try:
        facts = json.loads(read_small(entry.path / FACTS_FILE, MOST_FACTS))
    except (OSError, *BAD_JSON):
        return {}
    return facts if isinstance(facts, dict) else {}


def best_by(entries: Sequence[Entry]) -> tuple[str, str] | None:
    """The metric by which the run itself keeps its best, and "min" or "max"; None where it keeps none."""
    for entry in reversed(entries):
        if facts := facts_in(entry):
            match facts.get("best_by"):
                case [str(metric), ("min" | "max") as mode]:
                    return metric, mode
            return None
    return None


def damage_of(checkpoints: Checkpoints, step: int) -> str:
    """What is wrong with a checkpoint, every byte read; "" for nothing."""
    try:
        checkpoints.verify(step)
    except Damaged as damaged:
        return damaged.why
    return ""


def folder_size(folder: Path) -> int:
    """Bytes of its files; 0 for what is no folder."""
    if folder.is_symlink() or not folder.is_dir():
        return 0
    return sum(file.lstat().st_size for file in folder.iterdir())


def _check_metric(entries: Sequence[Entry], best: tuple[str, str] | None) -> None:
    known = sorted({name for entry in entries if entry.manifest for name in entry.manifest.metrics})
    if best is not None and best[0] not in known:
        hint = nearest(best[0], known) if known else "they have none."
        raise InputError(f"Expected --best to name a metric of the checkpoints, received {best[0]!r}; {hint}")


def plan_text(plan: Plan, dry_run: bool) -> str:
    """What `distfit checkpoint prune` prints.

    >>> print(plan_text(Plan((10, 20), (30,), {40: "tensors.safetensors is cut off"}, 5_000_000), dry_run=True))
    would delete steps 10, 20: 5.0 MB
    stays: step 30, whole
    damaged, left to you: step 40: tensors.safetensors is cut off
    """
    verb = "would delete" if dry_run else "deleted"
    gone = f"{verb} {_steps(plan.gone)}: {format_bytes(plan.freed)}" if plan.gone else "nothing to delete"
    kept = f"{'stays' if len(plan.kept) == 1 else 'stay'}: {_steps(plan.kept)}, whole" if plan.kept else "none is whole"
    damaged = [f"damaged, left to you: step {step:,}: {why}" for step, why in plan.damaged.items()]
    return "\n".join([gone, kept, *damaged])


def _steps(steps: Sequence[int]) -> str:
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(f'{step:,}' for step in steps)}"
