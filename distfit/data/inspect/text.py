"""A summary and a verdict as text for people, the same on a screen and in a log file, and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from distfit.data.build.whole_folder import format_bytes
from distfit.data.inspect.features import Feature, Images, span
from distfit.data.inspect.summary import Class, Share, SplitSummary, Summary
from distfit.data.inspect.verify import Verdict

# Longer tables are put in one line; JSON has all of them.
MOST_CLASSES, MOST_RANKS = 20, 16
_FEW = 3
MOST_BAD = 20
# Raised when a field of the JSON changes its name or meaning, or goes.
JSON_VERSION = 1


def summary_text(summary: Summary) -> str:
    """What `distfit data inspect` prints."""
    source = f": {summary.source}" if summary.source else ""
    parts = [_printable(f"{summary.data}{source}"), *(_split_text(split, summary) for split in summary.splits)]
    return "\n\n".join(parts)


def verdict_text(verdict: Verdict, most: int | None = MOST_BAD) -> str:
    """What `distfit data verify` prints.

    Args:
        verdict: of it.
        most: lines of what is bad; None for all.
    """
    shown = verdict.bad if most is None else verdict.bad[:most]
    lines = [_printable(str(bad)) for bad in shown]
    if len(shown) < len(verdict.bad):
        lines.append(f"and {len(verdict.bad) - len(shown):,} more; --all lists them")
    images = f" and {verdict.images:,} images" if verdict.images else ""
    what = f"{verdict.records:,} whole records{images} in {_files(verdict.files, verdict.bytes)}"
    return "\n".join([*lines, *verdict.notes, f"{_many(len(verdict.bad), 'fault')}; {what} ({verdict.seconds:.1f} s)"])


def as_json(found: Summary | Verdict, **more: object) -> str:
    """All fields by their names, `more` beside them."""
    fields = {"version": JSON_VERSION, **dataclasses.asdict(found), **more}
    return json.dumps(fields, indent=1)


def aligned(rows: Sequence[Sequence[str]], indent: str = "    ") -> list[str]:
    """Columns that are as wide as their longest cell.

    >>> aligned([("rank", "rows"), ("0", "22")], "")
    ['rank  rows', '0     22']
    """
    shown = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown]
    return [(indent + line).rstrip() for line in lines]


def _printable(text: str) -> str:
    """Names come out of files, and must not steer the terminal.

    >>> _printable("Größe\\x1b[2J")
    'Größe\\\\x1b[2J'
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _split_text(split: SplitSummary, summary: Summary) -> str:
    lines = [f"{_printable(split.name)}: {_size(split)}", *_features(split), *_classes(split), *_plan(split, summary)]
    return "\n".join(lines)


def _size(split: SplitSummary) -> str:
    files = _files(split.files, split.bytes)
    if split.streamed:
        counted = "an unknown number of" if split.records is None else f"{split.records:,}"
        remedy = "; `distfit data index` counts them" if split.records is None else ""
        return f"{counted} records in {files}, compressed, so they are read as streams{remedy}"
    mean, longest = format_bytes(round(split.mean or 0)), format_bytes(split.longest or 0)
    return f"{split.records:,} records in {files}; a record has {mean} on average, {longest} at most"


def _files(count: int, size: int) -> str:
    return f"{_many(count, 'file')}, {format_bytes(size)}"


def _many(count: int, what: str) -> str:
    """
    >>> _many(1, "file"), _many(0, "fault"), _many(1200, "step")
    ('1 file', 'no faults', '1,200 steps')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}" if count else f"no {what}s"


def _features(split: SplitSummary) -> list[str]:
    if split.others == split.read:
        return [f"  no tf.train.Example among {_read(split)}"]
    rows = [("feature", "type", "in", ""), *(_feature_row(one, split) for one in split.features)]
    others = [f"    and {_many(split.others, 'record')} of another kind, no tf.train.Example"] if split.others else []
    return [f"  features of {_read(split)}", *aligned(rows), *others, *map(_images, split.images)]


def _read(split: SplitSummary) -> str:
    """Which records were read."""
    if split.read == split.records:
        return "all records"
    return f"{'the first' if split.streamed else 'a sample of'} {split.read:,} records"


def _feature_row(feature: Feature, split: SplitSummary) -> tuple[str, str, str, str]:
    share = "all" if feature.records == split.read else f"{feature.records:,} of {split.read:,}"
    sizes = "" if feature.bytes is None else f"{span(*feature.bytes)} bytes"
    return feature.name, feature.type, share, sizes


def _images(images: Images) -> str:
    formats = ", ".join(f"{count:,} {name}" for name, count in images.formats.items())
    bad = f", {images.unreadable:,} with a bad header" if images.unreadable else ""
    sides = f"{_side('width', *images.widths)}, {_side('height', *images.heights)}"
    return f"  images in {images.feature!r}: {formats}{bad}; {sides} pixels"


def _side(name: str, low: int, middle: int, high: int) -> str:
    """
    >>> _side("width", 8, 8, 8), _side("height", 121, 208, 1349)
    ('width 8', 'height 121 to 1,349 (median 208)')
    """
    return f"{name} {span(low, high)}" + ("" if low == high else f" (median {middle:,})")


def _classes(split: SplitSummary) -> list[str]:
    if not split.classes:
        return []
    heading = f"  {len(split.classes):,} classes (from {split.classes_from})"
    if len(split.classes) <= MOST_CLASSES:
        rows = [(str(one.label), one.name, f"{one.records:,}") for one in split.classes]
        return [heading, *aligned([("label", "class", "records"), *rows])]
    ordered = sorted(split.classes, key=lambda one: one.records)
    few, many = ordered[:_FEW], ordered[-_FEW:][::-1]
    most, fewest = f"    most: {_listed(many)}", f"    fewest: {_listed(few)}"
    return [f"{heading} of {span(few[0].records, many[0].records)} records", most, fewest]


def _listed(classes: Sequence[Class]) -> str:
    return ", ".join(f"{_printable(one.name)} {one.records:,}" for one in classes)


def _plan(split: SplitSummary, summary: Summary) -> list[str]:
    if split.steps is None or not split.records:
        return []
    last = "" if split.last_batch == summary.batch_size else f", the last one of {split.last_batch:,} records"
    heading = f"  {_many(split.steps, 'step')} an epoch with batches of {summary.batch_size:,}{last}"
    if summary.ranks == 1:
        return [heading]
    if split.streamed:
        return [heading, f"    files are dealt to {summary.ranks:,} ranks as streams; see the guide on data"]
    rows = [("rank", "rows of a batch", "of the last", "records an epoch", "share")]
    if summary.ranks <= MOST_RANKS:
        rows += [_share_row(str(one.rank), [one]) for one in split.shares]
    else:
        rows += [_share_row(span(alike[0].rank, alike[-1].rank), alike) for alike in _alike(split.shares)]
    return [heading, *aligned(rows)]


def _share_row(name: str, shares: Sequence[Share]) -> tuple[str, str, str, str, str]:
    first, last = shares[0], shares[-1]
    each = "" if len(shares) == 1 else " each"
    return (
        name,
        _rows(first.rows[0], last.rows[1], first.rows[1] - first.rows[0], len(shares)),
        _rows(first.last_rows[0], last.last_rows[1], first.last_rows[1] - first.last_rows[0], len(shares)),
        f"{first.records:,}{each}",
        f"{first.fraction:.2%}",
    )


def _rows(start: int, stop: int, each: int, ranks: int) -> str:
    """
    >>> _rows(0, 22, 22, 1), _rows(0, 64, 16, 4), _rows(3, 3, 0, 1)
    ('0 to 21 (22)', '0 to 63 (16 each)', 'none')
    """
    if start == stop:
        return "none"
    return f"{span(start, stop - 1)} ({each:,}{' each' if ranks > 1 else ''})"


def _alike(shares: Sequence[Share]) -> list[list[Share]]:
    """Runs of ranks that take as many rows as each other."""
    groups: list[list[Share]] = []
    for share in shares:
        if groups and _counts(groups[-1][-1]) == _counts(share):
            groups[-1].append(share)
        else:
            groups.append([share])
    return groups


def _counts(share: Share) -> tuple[int, int]:
    return share.rows[1] - share.rows[0], share.last_rows[1] - share.last_rows[0]
