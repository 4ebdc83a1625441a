"""Which records are for training and which for validation, in which order, in how many files: pure.

    layout = Layout(seed=0, shard_bytes=128 * 2**20)
    members = layout.members(source)                 # {"train": positions, "validation": positions}
    files = layout.files(source, members)            # {"train": 8, "validation": 2}

The split is stratified and, like the order, a function of the labels and the seed alone.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distfit.data.plan import permutation
from distfit.errors import InputError

SPLITS = ("train", "validation", "test")
VALIDATION_FRACTION = 0.2
# The most of a shard: large enough to be read at a disk's speed, small enough to be copied again.
SHARD_BYTES = 128 * 2**20
# Some readers share out whole files; these have something for each of so many.
LEAST_SHARDS = {"train": 8, "validation": 2, "test": 2}
# What a record holds beside its files: framing, names of features, label, name.
OVERHEAD_BYTES = 100


class Labelled(Protocol):
    """What of a source decides about its layout; `sizes` and `given_split` are as for `labelled.Source`."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def sizes(self) -> np.ndarray | None: ...
    @property
    def given_split(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Layout:
    """How records are shared out to splits and files.

    Args:
        seed: of the split and of the order of records, >= 0.
        validation_fraction: share of each class for validation, 0 < fraction < 1, by default 0.2; each class
            gives it to within one record, and the whole to rounding. None for a source that is split already.
        shards: files of the training split, 1 to its records; None is by size.
        validation_shards: the same of the validation split.
        shard_bytes: what a file shall have at most, on average, where its number is by size; None is 128 MiB, and
            at least 8 files for training and 2 for others.

    Raises:
        InputError: `shards` together with `shard_bytes`, which say the same in two ways.
    """

    seed: int = 0
    validation_fraction: float | None = None
    shards: int | None = None
    validation_shards: int | None = None
    shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.shards is not None and self.shard_bytes is not None:
            raise InputError(
                f"Expected the number of shards or their size, received both, {self.shards} shards and "
                f"{self.shard_bytes} bytes. Leave one of them out."
            )
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise InputError(f"Expected a shard of 1 byte or more, received {self.shard_bytes}.")

    def members(self, source: Labelled) -> dict[str, np.ndarray]:
        """Positions of the records of each split, in the order in which they are written.

        Raises:
            InputError: the fraction or the seed is out of its range, or a fraction for a source that is split
                already.
        """
        fraction = self.fraction_of(source)
        if fraction is not None:
            return stratified_split(source.labels, self.seed, fraction)
        if self.validation_fraction is not None:
            raise InputError(
                f"Expected no validation fraction for {source.name}, which is split already, received "
                f"{self.validation_fraction!r}. Leave it out."
            )
        given = source.given_split
        assert given is not None
        order = permutation(len(source.labels), self.seed)
        members = {split: order[given[order] == position] for position, split in enumerate(SPLITS)}
        return {split: numbers for split, numbers in members.items() if len(numbers) or split == SPLITS[0]}

    def fraction_of(self, source: Labelled) -> float | None:
        """The share of each class for validation: the one asked for, or the usual one; None for a source that is
        split already."""
        if source.given_split is not None:
            return None
        return VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction

    def files(self, source: Labelled, members: dict[str, np.ndarray]) -> dict[str, int]:
        """Files of each split: those that were asked for, else by size.

        Raises:
            InputError: a split has no records, or fewer than there shall be files.
        """
        asked = {"train": self.shards, "validation": self.validation_shards}
        return {
            split: self._by_size(source, split, numbers)
            if asked.get(split) is None
            else _checked_shards(split, numbers, asked[split])
            for split, numbers in members.items()
            if _has_records(source, split, numbers)
        }

    def _by_size(self, source: Labelled, split: str, members: np.ndarray) -> int:
        size = 0 if source.sizes is None else int((source.sizes[members] + OVERHEAD_BYTES).sum())
        least = LEAST_SHARDS[split] if self.shard_bytes is None else 1
        return min(len(members), max(least, -(-size // (self.shard_bytes or SHARD_BYTES))))


def stratified_split(labels: np.ndarray, seed: int, validation_fraction: float) -> dict[str, np.ndarray]:
    """The records of `train` and of `validation`, each in the order in which they are written.

    Every class gives the fraction of its records, rounded down or up such that the whole is the fraction of
    all records, rounded; but no class gives its last record.

    Args:
        labels: class of each record, of a type of whole numbers.
        seed: >= 0; alone decides which records and in which order.
        validation_fraction: 0 < fraction < 1.

    Raises:
        InputError: the fraction or the seed is out of its range.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"Expected a validation fraction between 0 and 1, received {validation_fraction!r}. Try 0.2.")
    order = permutation(len(labels), seed)
    per_class = np.bincount(labels)
    by_class = np.argsort(labels[order], kind="stable")
    first = np.cumsum(per_class) - per_class
    rank_in_class = np.empty(len(labels), np.int64)
    rank_in_class[by_class] = np.arange(len(labels)) - np.repeat(first, per_class)
    validates = rank_in_class < _quota(per_class, validation_fraction)[labels[order]]
    return {"train": order[~validates], "validation": order[validates]}


def _quota(per_class: np.ndarray, fraction: float) -> np.ndarray:
    """Largest remainders: whole numbers, each within one of the exact one, that add up to the rounded sum,
    or to less where a class would be left without a record to train on."""
    exact = per_class * fraction
    quota = np.floor(exact).astype(np.int64)
    short = round(float(exact.sum())) - int(quota.sum())
    by_remainder = np.argsort(quota - exact, kind="stable")
    can_give = by_remainder[quota[by_remainder] + 1 < per_class[by_remainder]]
    quota[can_give[:short]] += 1
    return quota


def _has_records(source: Labelled, split: str, members: np.ndarray) -> bool:
    if len(members):
        return True
    if source.given_split is not None:
        raise InputError(f"Expected records for the split {split!r} of {source.name}, received none.")
    raise InputError(
        f"Expected records for the split {split!r} of {source.name}, received none: a class gives only what "
        "it can spare, and its last record is for training. Add records, or ask for a larger validation fraction."
    )


def _checked_shards(split: str, members: np.ndarray, asked: int | None) -> int:
    if asked is None or not 1 <= asked <= len(members):
        raise InputError(
            f"Expected 1 to {len(members)} shards for the {len(members)} records of {split!r}, received {asked}."
        )
    return asked
