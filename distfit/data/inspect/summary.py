"""What a data set holds and how a job will read it: the plan one can read.

summary = summarize(find_data(["data/digits"]), ranks=3, batch_size=64)
summary.splits[0].classes, summary.splits[0].steps, summary.splits[0].shares
"""

from __future__ import annotations

from dataclasses import dataclass

from distfit.data.description import Description
from distfit.data.inspect.features import Feature, Images, Seen
from distfit.data.inspect.found import Data
from distfit.data.inspect.records_of import Records, records_of
from distfit.data.plan import process_bounds, steps_per_epoch
from distfit.errors import InputError
from distfit.monitor.counting import Counting, silent


@dataclass(frozen=True)
class Class:
    """A class: its label, its name (the label where nobody named it), how many records have it."""

    label: int
    name: str
    records: int


@dataclass(frozen=True)
class Share:
    """What one rank takes of an epoch.

    Args:
        rank: which.
        rows: [start, stop) of a full global batch.
        last_rows: [start, stop) of the last one, where it is short; else as `rows`.
        records: of the epoch.
        fraction: of all records.
    """

    rank: int
    rows: tuple[int, int]
    last_rows: tuple[int, int]
    records: int
    fraction: float


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    Args:
        name: of the split.
        files, bytes: how many, and their size.
        streamed: whether they are compressed, so that they are read from their beginnings only.
        records: how many; None where they are streamed and nobody has counted them.
        longest, mean: bytes of a record; None where they are streamed.
        read: how many records were read for what follows.
        others: how many of those are no tf.train.Example.
        features, images: of those.
        classes: by label; empty without labels.
        classes_from: "dataset.json", "all records", or "N records" of a sample.
        steps: of an epoch; None while the number of records is unknown.
        last_batch: records of an epoch's last step.
        shares: of each rank; empty where files are streamed, as these are dealt to the ranks whole.
    """

    name: str
    files: int
    bytes: int
    streamed: bool
    records: int | None
    longest: int | None
    mean: float | None
    read: int
    others: int
    features: tuple[Feature, ...]
    images: tuple[Images, ...]
    classes: tuple[Class, ...]
    classes_from: str
    steps: int | None
    last_batch: int | None
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Summary:
    """A data set.

    Args:
        data: as it was named.
        source: where it came from, as its `dataset.json` says; None without one.
        batch_size: records of a step over all ranks.
        ranks: how many share them.
        splits: in the order of their names, `train` first.
    """

    data: str
    source: str | None
    batch_size: int
    ranks: int
    splits: tuple[SplitSummary, ...]


def summarize(data: Data, *, ranks: int = 1, batch_size: int = 32, count: Counting = silent) -> Summary:
    """Looks at a data set; of a large one, at a sample of its records.

    Args:
        data: the files.
        ranks: processes to share an epoch among, >= 1.
        batch_size: rows of a global batch, >= 1.
        count: shows how far it is.

    Raises:
        InputError: a file is damaged, or an argument out of its range.
        RunError: a damaged record.
    """
    for name, value in (("ranks", ranks), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"Expected {name} to be 1 or more, received {value}.")
    splits = tuple(
        _split(name, records_of(files, count), data.description, ranks, batch_size, count)
        for name, files in in_order(data).items()
    )
    source = data.description.source if data.description else None
    return Summary(data.name, source, batch_size, ranks, splits)


def in_order(data: Data) -> dict[str, tuple[str, ...]]:
    """The splits, `train` first."""
    return dict(sorted(data.splits.items(), key=lambda item: (item[0] != "train", item[0])))


def _split(
    name: str, records: Records, description: Description | None, ranks: int, batch_size: int, count: Counting
) -> SplitSummary:
    seen = _seen(name, records, count)
    longest, mean = records.lengths() or (None, None)
    classes, classes_from = _classes(name, records, description, seen)
    total = records.count
    return SplitSummary(
        name=name,
        files=len(records.files),
        bytes=records.size,
        streamed=records.streamed,
        records=total,
        longest=longest,
        mean=mean,
        read=seen.records,
        others=seen.others,
        features=seen.features(),
        images=seen.images(),
        classes=classes,
        classes_from=classes_from,
        steps=None if total is None else steps_per_epoch(total, batch_size),
        last_batch=None if total is None else _last_batch(total, batch_size),
        shares=() if total is None or records.streamed else shares(total, batch_size, ranks),
    )


def _seen(name: str, records: Records, count: Counting) -> Seen:
    seen = Seen()
    most = records.to_read()
    with count(f"Reading {name}", most, "records") as done:
        for _, serialized in records.sample(most):
            seen.add(serialized)
            done(len(serialized))
    return seen


def _classes(
    split: str, records: Records, description: Description | None, seen: Seen
) -> tuple[tuple[Class, ...], str]:
    """The classes, and from what they are known."""
    if description is not None:
        named = zip(description.classes, description.splits[split].per_class, strict=True)
        return tuple(Class(label, name, found) for label, (name, found) in enumerate(named)), "dataset.json"
    classes = tuple(Class(label, str(label), found) for label, found in sorted(seen.labels.items()))
    known = "all records" if seen.records == records.count else f"{seen.records:,} records"
    return classes, known if classes else ""


def _last_batch(records: int, batch_size: int) -> int:
    """
    >>> _last_batch(67, 32), _last_batch(64, 32)
    (3, 32)
    """
    return records - (steps_per_epoch(records, batch_size) - 1) * batch_size if records else 0


def shares(records: int, batch_size: int, ranks: int) -> tuple[Share, ...]:
    """What each rank takes of an epoch.

    >>> [(share.rows, share.last_rows, share.records) for share in shares(67, 32, 2)]
    [((0, 16), (0, 2), 34), ((16, 32), (2, 3), 33)]
    """
    full, rest = divmod(records, batch_size)
    return tuple(_share(full, rest, batch_size, rank, ranks) for rank in range(ranks))


def _share(full: int, rest: int, batch_size: int, rank: int, ranks: int) -> Share:
    rows = process_bounds(batch_size, rank, ranks)
    last_rows = process_bounds(rest, rank, ranks) if rest else rows
    records = full * (rows[1] - rows[0]) + (last_rows[1] - last_rows[0] if rest else 0)
    return Share(rank, rows, last_rows, records, records / max(1, full * batch_size + rest))
