"""Which checkpoints a run has, and which of them are whole: `distfit checkpoint list` and `verify`.

print(listing_text(listed(Checkpoints("runs/a")), now=time.time()))
print(verdict_text(verified(Checkpoints("runs/a"))))
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from distfit.checkpoint.folder import GOING, LATEST, PARTIAL, Checkpoints, Entry
from distfit.checkpoint.pruning import best_by, damage_of, facts_in, folder_size
from distfit.checkpoint.tables import metrics_text, place_text, when
from distfit.checkpoint.tensors import Unreadable, read_small
from distfit.data.build.whole_folder import format_bytes
from distfit.data.inspect.text import aligned
from distfit.monitor.counting import Counting, silent

_MOST_NAME = 256


@dataclass(frozen=True)
class Row:
    """A checkpoint in a list.

    Args:
        name: of its folder.
        step: batches that the run had trained.
        written: seconds since 1970; None where it is not known.
        size: bytes of its files.
        place: epoch (from 0), step of the epoch and step of the run; empty where that is not known.
        metrics: of the run at that step, global ones.
        marks: "latest", "best val_loss", "finished", "holds NaN or infinity".
        damage: what is wrong with it, as far as that is seen without reading all; "" for nothing.
    """

    name: str
    step: int
    written: float | None
    size: int
    place: Mapping[str, int]
    metrics: Mapping[str, float]
    marks: tuple[str, ...]
    damage: str = ""


@dataclass(frozen=True)
class Listing:
    """What is in a run's folder.

    Args:
        folder: its path.
        rows: the oldest first.
        partial: names and bytes of what is being written or deleted, or was left when that was killed.
    """

    folder: str
    rows: tuple[Row, ...]
    partial: Mapping[str, int]


@dataclass(frozen=True)
class Verdict:
    """What reading every byte has shown.

    Args:
        whole: steps of the checkpoints that are as they were written.
        damaged: what is wrong with the others, by the names of their folders.
        bytes: that were read.
        seconds: that it took.
    """

    whole: tuple[int, ...]
    damaged: Mapping[str, str]
    bytes: int
    seconds: float


def listed(checkpoints: Checkpoints) -> Listing:
    """What is there, without reading any tensor."""
    entries = checkpoints.entries()
    marks = _marks(checkpoints, entries)
    rows = [_row_of(entry, marks.get(entry.step, ())) for entry in entries]
    partial = {
        path.name: folder_size(path)
        for path in sorted(checkpoints.folder.glob(".*"))
        if path.name.startswith((PARTIAL, GOING)) and path.is_dir()
    }
    return Listing(str(checkpoints.folder), tuple(rows), partial)


def verified(checkpoints: Checkpoints, steps: Collection[int] | None = None, count: Counting = silent) -> Verdict:
    """Reads every byte.

    Args:
        steps: of these alone; None for all.
        count: shows how far it is.
    """
    start = time.monotonic()
    entries = [entry for entry in checkpoints.entries() if steps is None or entry.step in steps]
    whole: list[int] = []
    damaged: dict[str, str] = {}
    with count("Verifying", len(entries), "checkpoints") as done:
        for entry in entries:
            if why := damage_of(checkpoints, entry.step):
                damaged[entry.path.name] = why
            else:
                whole.append(entry.step)
            done(folder_size(entry.path))
    return Verdict(tuple(whole), damaged, sum(folder_size(entry.path) for entry in entries), time.monotonic() - start)


def listing_text(listing: Listing, now: float) -> str:
    """What `distfit checkpoint list` prints.

    Args:
        listing: of it.
        now: seconds since 1970.
    """
    total = format_bytes(sum(row.size for row in listing.rows))
    count = f"{len(listing.rows)} checkpoint{'' if len(listing.rows) == 1 else 's'}, {total}"
    heads = ("step", "place", "written", "size", "metrics", "")
    partial = [
        (name, "", "", format_bytes(size), "", "not finished: being written or deleted, or left by a kill")
        for name, size in listing.partial.items()
    ]
    lines = aligned([heads, *(_row(row, now) for row in listing.rows), *partial], "  ")
    return "\n".join([f"{listing.folder}: {count}", *(lines if listing.rows or partial else [])])


def verdict_text(verdict: Verdict) -> str:
    """What `distfit checkpoint verify` prints."""
    lines = [f"{name}: damaged: {why}" for name, why in verdict.damaged.items()]
    count = len(verdict.whole) + len(verdict.damaged)
    checkpoints = f"{count} checkpoint{'' if count == 1 else 's'}"
    read = f"{format_bytes(verdict.bytes)} read in {verdict.seconds:.1f} s"
    return "\n".join([*lines, f"{checkpoints}, {len(verdict.damaged) or 'none'} of them damaged; {read}"])


def _marks(checkpoints: Checkpoints, entries: Sequence[Entry]) -> dict[int | None, list[str]]:
    """What is said of a step, beside its damage."""
    marks: dict[int | None, list[str]] = {}
    try:
        latest = read_small(checkpoints.folder / LATEST, _MOST_NAME).decode(errors="replace").strip()
    except (OSError, Unreadable):  # none, or something that is no such file
        latest = ""
    for entry in entries:
        if entry.path.name == latest:
            marks.setdefault(entry.step, []).append("latest")
        if facts_in(entry).get("finished"):
            marks.setdefault(entry.step, []).append("finished")
        if entry.manifest is not None and entry.manifest.nan:
            marks.setdefault(entry.step, []).append("holds NaN or infinity")
    if best := best_by(entries):
        marks.setdefault(_best_step(entries, *best), []).append(f"best {best[0]}")
    return marks


def _best_step(entries: Sequence[Entry], metric: str, mode: str) -> int | None:
    """As checkpoint/retention.py decides: of equal ones the older, and none that holds NaN."""
    whole = [entry for entry in entries if entry.manifest is not None and not entry.manifest.nan]
    metrics = {entry.step: entry.manifest.metrics for entry in whole if entry.manifest is not None}
    values = {step: of_step[metric] for step, of_step in metrics.items() if metric in of_step}
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    return (min if mode == "min" else max)(values, key=lambda step: values[step], default=None)


def _row_of(entry: Entry, marks: Sequence[str]) -> Row:
    place = facts_in(entry).get("place")
    return Row(
        name=entry.path.name,
        step=entry.step,
        written=None if entry.manifest is None else entry.manifest.created,
        size=folder_size(entry.path),
        place=place if isinstance(place, dict) else {},
        metrics={} if entry.manifest is None else entry.manifest.metrics,
        marks=tuple(marks),
        damage=entry.damage or _other_sizes(entry),
    )


def _other_sizes(entry: Entry) -> str:
    """Damage that shows without reading: a file that is missing, cut off, or longer."""
    for name, fact in entry.manifest.files.items() if entry.manifest else ():
        path = entry.path / name
        size = path.lstat().st_size if os.path.lexists(path) else None
        if size != fact.size:
            return f"{name} {'is missing' if size is None else f'has {size:,} bytes of {fact.size:,}'}"
    return ""


def _row(row: Row, now: float) -> tuple[str, ...]:
    written = "" if row.written is None else when(row.written, now)
    marks = ", ".join([*row.marks, *([f"damaged: {row.damage}"] if row.damage else [])])
    return f"{row.step:,}", place_text(row.place), written, format_bytes(row.size), metrics_text(row.metrics), marks
