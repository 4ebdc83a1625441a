"""Which records are for training and which for validation, in which order, in how many files: pure.

    members = split_members(source, seed=0, validation_fraction=None)
    shard_count(source, "train", members["train"], asked=None)

The split is stratified and, like the order, a function of the labels and the seed alone.
"""

import numpy as np

from distfit.data.build.labelled import Source, Table
from distfit.data.plan import permutation
from distfit.errors import InputError

VALIDATION_FRACTION = 0.2
# The most of a shard: large enough to be read at a disk's speed, small enough to be copied again.
SHARD_BYTES = 128 * 2**20
# Some readers share out whole files; these have something for each of so many.
LEAST_SHARDS = {"train": 8, "validation": 2}


def split_members(source: Source | Table, seed: int, validation_fraction: float | None) -> dict[str, np.ndarray]:
    """Positions of `train` and of `validation`, each in the order in which they are written.

    Raises:
        InputError: the fraction or the seed is out of its range, or a fraction for a source that is split
            already.
    """
    fraction = fraction_of(source, validation_fraction)
    if fraction is not None:
        return stratified_split(source.labels, seed, fraction)
    if validation_fraction is not None:
        raise InputError(
            f"Expected no validation fraction for {source.name}, which is split already, received "
            f"{validation_fraction!r}. Leave it out."
        )
    order = permutation(len(source.labels), seed)
    assert source.validates is not None
    return {"train": order[~source.validates[order]], "validation": order[source.validates[order]]}


def fraction_of(source: Source | Table, asked: float | None) -> float | None:
    """The share of each class for validation: the one asked for, or the usual one; None for a source that is
    split already."""
    if source.validates is not None:
        return None
    return VALIDATION_FRACTION if asked is None else asked


def stratified_split(labels: np.ndarray, seed: int, validation_fraction: float) -> dict[str, np.ndarray]:
    """The records of `train` and of `validation`, each in the order in which they are written.

    Every class gives the fraction of its records, rounded down or up such that the whole is the fraction of
    all records, rounded; but no class gives its last record.

    Args:
        labels: class of each record, int64.
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


def shard_count(source: Source | Table, split: str, members: np.ndarray, asked: int | None) -> int:
    """Files of a split: those that were asked for, else by size.

    Raises:
        InputError: the split has no records, or fewer than there shall be files.
    """
    if not len(members):
        raise InputError(
            f"Expected records for the split {split!r} of {source.name}, received none: a class gives only what "
            "it can spare, and its last record is for training. Add images, or ask for a larger validation fraction."
        )
    if asked is None:
        size = 0 if source.sizes is None else int(source.sizes[members].sum())
        return min(len(members), max(LEAST_SHARDS[split], -(-size // SHARD_BYTES)))
    if not 1 <= asked <= len(members):
        raise InputError(
            f"Expected 1 to {len(members)} shards for the {len(members)} records of {split!r}, received {asked}."
        )
    return asked
