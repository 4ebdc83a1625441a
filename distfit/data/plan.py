"""The order of records and who gets which: pure arithmetic, numpy only, the same on every rank.

    order = Order(records=1437, seed=0, epoch=3)
    order.positions(1408, 1437)                                 # the records of the epoch's last batch
    share = process_share(order, global_batch=64, step=22, rank=1, size=3, replicas_per_process=2)
    share.global_rows, share.origin, share.records
    record_seeds(seed=0, epoch=3, records=share.records)        # for what is drawn at random for a record

An epoch is `order` cut into global batches; only the last one may be short. A global batch is cut into one
balanced contiguous slice for each replica of the job, and a process takes those of its own replicas, which
lie side by side. So what a step trains on depends on (seed, epoch, step) alone, and every record is seen
exactly once in an epoch whatever the number of processes and replicas.

Nothing here grows with the number of records beyond `EXACT`, and any position is reached without those before it.
"""

import functools
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
    _check_seed(min(entropy))
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


# Up to so many records the order is one of all n! with equal odds, of 8 MiB; beyond, a keyed bijection that is
# computed where it is asked for.
EXACT = 2**20
# Four is the least that looks random to a distinguisher with few queries (Luby and Rackoff 1988); half of them act
# on either half here.
_ROUNDS = 8
# So that what is drawn for one purpose says nothing about another.
_BLOCKS, _TAIL, _WITHIN, _SEEDS = 1, 2, 3, 4


@dataclass(frozen=True)
class Order:
    """The record numbers of one epoch in the order of training.

    Args:
        records: of the whole data set.
        seed: the run's, >= 0.
        epoch: 0 for the first; each epoch has its own order.
        shuffle: False keeps the order of the files in every epoch.
        window: None shuffles over all records. A number shuffles among so many records at a time, those of
            `window // block` blocks from all over the data: for storage on which random reads are slow, at the
            price that records of one block are seen within one window.
        block: records that lie side by side in the files and are read in one go; with a window only.

    Raises:
        InputError: a negative seed, or a window that is no multiple of its block.

    >>> len(Order(5, seed=0, epoch=0)), Order(5, shuffle=False).positions(1, 4).tolist()
    (5, [1, 2, 3])
    >>> sorted(Order(10, seed=1, window=4, block=2).positions(0, 10).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    records: int
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    window: int | None = None
    block: int = 1

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if self.window is not None and (self.block < 1 or self.window < self.block or self.window % self.block):
            raise InputError(
                f"Expected a shuffle window of whole blocks, received {self.window} records in blocks of {self.block}. "
                "Choose a multiple of the block."
            )

    def __len__(self) -> int:
        return self.records

    def positions(self, start: int, stop: int) -> np.ndarray:
        """The records at the positions start to stop - 1 of the epoch, int64, shape [stop - start].

        Args:
            start, stop: 0 <= start <= stop <= records.
        """
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if self.window is not None:
            return self._by_windows(start, stop)
        return _shuffled(self.records, np.arange(start, stop, dtype=np.int64), self.seed, self.epoch)

    def _by_windows(self, start: int, stop: int) -> np.ndarray:
        parts, at = [], start
        while at < stop:
            first, window = self._window_at(at)
            parts.append(window[at - first : stop - first])
            at += len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def window_of(self, position: int) -> np.ndarray:
        """The records among which the one at a position was shuffled, in the order of training."""
        return self._window_at(position)[1]

    def _window_at(self, position: int) -> tuple[int, np.ndarray]:
        blocks = _Blocks(self)
        number = blocks.at(position) // (self.window // self.block)  # type: ignore[operator]
        return blocks.start(number * (self.window // self.block)), _window(self, number)  # type: ignore[operator]


class _Blocks:
    """The blocks of an order, one after the other as they are read.

    The last records of the data may be less than a block; where they come is drawn like everything else.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._size = order.block
        self._whole, self._rest = divmod(order.records, order.block)
        key = (_keys(1, order.seed, order.epoch, _TAIL)[0] >> np.uint64(32)) * np.uint64(self._whole + 1)
        self._rest_at = int(key >> np.uint64(32)) if self._rest else self._whole

    def at(self, position: int) -> int:
        """Which block of the sequence holds a position."""
        before = self._rest_at * self._size
        if position < before + self._rest:
            return position // self._size if position < before else self._rest_at
        return (position + self._size - self._rest) // self._size if self._rest else position // self._size

    def start(self, number: int) -> int:
        """The position at which a block of the sequence begins; for one past the last, the number of records."""
        missing = self._size - self._rest if self._rest and number > self._rest_at else 0
        return min(number * self._size - missing, self._order.records)

    def records(self, first: int, stop: int) -> np.ndarray:
        """The records of blocks of the sequence, each block in the order of the files."""
        order, numbers = self._order, np.arange(first, stop, dtype=np.int64)
        whole = numbers - (numbers > self._rest_at) if self._rest else numbers
        blocks = np.full(len(numbers), self._whole, np.int64)
        is_whole = numbers != self._rest_at if self._rest else np.ones(len(numbers), bool)
        blocks[is_whole] = _shuffled(self._whole, whole[is_whole], order.seed, order.epoch, _BLOCKS)
        records = (blocks[:, None] * self._size + np.arange(self._size)).ravel()
        return records[records < order.records]


@functools.lru_cache(maxsize=8)
def _window(order: Order, number: int) -> np.ndarray:
    """The records of one window in the order of training; one is in use, and the next while it is read ahead."""
    assert order.window is not None
    blocks, each = _Blocks(order), order.window // order.block
    last = -(-order.records // order.block)
    records = blocks.records(number * each, min((number + 1) * each, last))
    return records[permutation(len(records), order.seed, order.epoch, _WITHIN, number)]


def record_seeds(seed: int, epoch: int, records: np.ndarray) -> np.ndarray:
    """Two numbers for whatever is drawn at random for each record in an epoch, uint32, shape [len(records), 2].

    They depend on (seed, epoch, record) alone, so that an augmentation is the same on any number of ranks and after
    a resume.

    >>> record_seeds(seed=0, epoch=0, records=np.array([5, 6])).shape
    (2, 2)
    """
    _check_seed(seed)
    keys = _keys(2, seed, epoch, _SEEDS)
    numbers = np.asarray(records).astype(np.uint64)
    return np.stack([(_mixed(numbers, key) >> np.uint64(32)).astype(np.uint32) for key in keys], axis=-1)


def _shuffled(count: int, positions: np.ndarray, *entropy: int) -> np.ndarray:
    """What stands at some positions of a permutation of 0..count-1."""
    if count <= EXACT:
        return _exact(count, *entropy)[positions]
    return _bijection(count, positions, _keys(_ROUNDS, *entropy))


# The pass that is read and the one that is read ahead, of training and of validation.
@functools.lru_cache(maxsize=4)
def _exact(count: int, *entropy: int) -> np.ndarray:
    return permutation(count, *entropy)


def _bijection(count: int, positions: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Positions to numbers below `count`, one to one, by a keyed network.

    A generalised Feistel network on [0, a) x [0, b) with a * b >= count (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002): each round moves one half by a function of the other. What lands beyond `count`, one
    number in about sqrt(count), goes through again until it does not.
    """
    left_size = int(np.ceil(np.sqrt(count)))
    right_size = -(-count // left_size)
    numbers = np.array(positions, dtype=np.uint64)
    todo = np.arange(len(numbers))
    while len(todo):
        left, right = np.divmod(numbers[todo], np.uint64(right_size))
        for even, odd in zip(keys[0::2], keys[1::2], strict=True):
            left = _moved(left, right, left_size, even)
            right = _moved(right, left, right_size, odd)
        numbers[todo] = left * np.uint64(right_size) + right
        todo = todo[numbers[todo] >= count]
    return numbers.astype(np.int64)


def _moved(half: np.ndarray, by: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    # The upper half of a product instead of a remainder: no division, and no bias worth speaking of below 2**31.
    half = half + (((_mixed(by, key) >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))
    return np.where(half >= size, half - np.uint64(size), half)


def _mixed(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), keyed; wraps round at 2**64."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _keys(count: int, *entropy: int) -> np.ndarray:
    """So many uint64 that depend on whole numbers >= 0; the same with every version of numpy."""
    return np.random.SeedSequence(entropy).generate_state(count, np.uint64)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"Expected a seed of 0 or more, received {seed}. Choose another seed.")


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
    order: Order, global_batch: int, step: int, rank: int, size: int, replicas_per_process: int = 1
) -> Share:
    """What the process `rank` of `size` reads in one step: its replicas' slices of the global batch.

    A process that has no rows of a short last batch gets that batch's first record, with origin 0, so that
    it can compute one row at weight zero: it is not among its replicas' slices, which are empty.

    Args:
        order: of the epoch.
        global_batch: rows of a full step over all replicas.
        step: 0 <= step < steps_per_epoch(len(order), global_batch).

    >>> process_share(Order(67, shuffle=False), 32, step=2, rank=1, size=2)
    Share(global_rows=3, origin=2, records=array([66]))
    >>> process_share(Order(65, shuffle=False), 32, step=2, rank=1, size=2)
    Share(global_rows=1, origin=0, records=array([64]))
    """
    first, last = batch_positions(len(order), global_batch, step)
    start, stop = process_bounds(last - first, rank, size, replicas_per_process)
    if start == stop:
        start, stop = 0, 1
    return Share(global_rows=last - first, origin=start, records=order.positions(first + start, first + stop))
