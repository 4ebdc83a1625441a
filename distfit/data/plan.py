"""The order of records and who gets which: pure arithmetic, numpy only, the same on every rank.

    order = epoch_order(records=1437, seed=0, epoch=3, shuffle=True)
    share = process_share(order, global_batch=64, step=22, rank=1, size=3, replicas_per_process=2)
    share.global_rows, share.origin, share.records

An epoch is `order` cut into global batches; only the last one may be short. A global batch is cut into one
balanced contiguous slice for each replica of the job, and a process takes those of its own replicas, which
lie side by side. So what a step trains on depends on (seed, epoch, step) alone, and every record is seen
exactly once in an epoch whatever the number of processes and replicas.
"""

from dataclasses import dataclass

import numpy as np

from distfit.errors import InputError


def slice_bounds(rows: int, part: int, parts: int) -> tuple[int, int]:
    """The rows [start, stop) of one of `parts` balanced contiguous slices.

    The first `rows % parts` slices have one row more than the others, so with fewer rows than parts the
    last slices are empty.

    Args:
        rows: rows to share out, >= 0.
        part: 0 <= part < parts.
        parts: number of slices, >= 1.

    >>> [slice_bounds(10, part, 4) for part in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    >>> slice_bounds(1, 1, 2)
    (1, 1)
    """
    base, extra = divmod(rows, parts)
    start = part * base + min(part, extra)
    return start, start + base + (part < extra)


def process_bounds(rows: int, rank: int, size: int, replicas_per_process: int = 1) -> tuple[int, int]:
    """The rows [start, stop) of a global batch that the replicas of one process take; it may be empty.

    >>> process_bounds(10, rank=1, size=2, replicas_per_process=2)
    (6, 10)
    """
    first = rank * replicas_per_process
    replicas = size * replicas_per_process
    start, _ = slice_bounds(rows, first, replicas)
    _, stop = slice_bounds(rows, first + replicas_per_process - 1, replicas)
    return start, stop


def steps_per_epoch(records: int, global_batch: int) -> int:
    """Global batches in an epoch; a short last one counts.

    >>> steps_per_epoch(67, 32)
    3
    """
    return -(-records // global_batch)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """The numbers 0..count-1 in an order that depends on `entropy` alone, today and in ten years.

    `Generator.permutation` may change with a version of numpy, which would reorder a resumed run; the raw
    stream of a bit generator may not, so the order is that of raw 64-bit keys.

    Args:
        count: how many numbers, >= 0; the result and its keys take 16 bytes for each.
        entropy: whole numbers >= 0.

    Raises:
        InputError: a negative number in `entropy`, of which the first is the seed.
    """
    if min(entropy) < 0:
        raise InputError(f"Expected a seed of 0 or more, received {entropy[0]}. Choose another seed.")
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def epoch_order(records: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The record numbers of one epoch in the order of training (int64, shape [records]).

    Args:
        records: records of the whole data set.
        seed: the run's seed, >= 0.
        epoch: 0 for the first; each epoch has its own order.
        shuffle: False keeps the order of the files in every epoch.

    >>> epoch_order(4, seed=0, epoch=0, shuffle=False).tolist()
    [0, 1, 2, 3]
    """
    return permutation(records, seed, epoch) if shuffle else np.arange(records, dtype=np.int64)


def batch_positions(records: int, global_batch: int, step: int) -> tuple[int, int]:
    """The positions [start, stop) of the epoch's order that make up one global batch.

    >>> batch_positions(67, 32, step=2)
    (64, 67)
    """
    start = step * global_batch
    return min(start, records), min(start + global_batch, records)


@dataclass(frozen=True)
class Share:
    """What one process reads of one global batch.

    Args:
        global_rows: rows of the whole global batch.
        origin: offset in the global batch of the first of `records`.
        records: record numbers, int64, never empty (see `process_share`).
    """

    global_rows: int
    origin: int
    records: np.ndarray


def process_share(
    order: np.ndarray, global_batch: int, step: int, rank: int, size: int, replicas_per_process: int = 1
) -> Share:
    """What the process `rank` of `size` reads in one step: its replicas' slices of the global batch.

    A process that has no rows of a short last batch gets that batch's first record, with origin 0, so that
    it can compute one row at weight zero: it is not among its replicas' slices, which are empty.

    Args:
        order: the epoch's order, of `epoch_order`.
        global_batch: rows of a full step over all replicas.
        step: 0 <= step < steps_per_epoch(len(order), global_batch).

    >>> process_share(np.arange(67), 32, step=2, rank=1, size=2)
    Share(global_rows=3, origin=2, records=array([66]))
    >>> process_share(np.arange(65), 32, step=2, rank=1, size=2)
    Share(global_rows=1, origin=0, records=array([64]))
    """
    first, last = batch_positions(len(order), global_batch, step)
    start, stop = process_bounds(last - first, rank, size, replicas_per_process)
    if start == stop:
        start, stop = 0, 1
    return Share(global_rows=last - first, origin=start, records=order[first + start : first + stop])
