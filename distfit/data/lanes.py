"""Which records a step takes from files that are read from their beginnings: pure arithmetic, the same on every rank.

    deal = Deal.of(files=12, lanes=4, seed=0, epoch=3, shuffle=True, counts=None)
    deal.files[2]                          # the files that lane 2 reads, one after the other
    deal.taken(position=640)               # of each lane, how many records are among the first 640 of the epoch
    part = deal.part(rank=1, size=3)       # the lanes that a process reads, and which rows of each are its own
    part.of_step(start=640, stop=704)

The records are dealt to a number of *lanes* that does not depend on the number of processes. A step takes rows from
every lane; in lane order they are its global batch. Each process owns a contiguous part of the lanes, so that the
processes' rows, in rank order, are the same list for any number of them.

Where the lanes are no multiple of the processes, one of them falls to two processes (with fewer lanes than processes,
to more): all of these read it and each takes its rows. So any number of processes works and has its share; what it
costs is that such a lane is read more than once. `lanes` of at least the number of processes, and a multiple of it,
avoids that.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from distfit.data import plan

# What is drawn for one purpose says nothing about another: `plan` has 0 (no further number) to 4.
_SHARDS = 5
# A process's part may begin so much of a lane (or of a part, if that is less) beside its place where this saves two
# processes the reading of the same lane.
_NEAR = Fraction(1, 8)


@dataclass(frozen=True)
class Deal:
    """The files of an epoch, dealt to lanes.

    Args:
        files: for each lane the positions of its files, in the order of reading.
        totals: for each lane the records of its files; None while that is unknown.

    >>> deal = Deal.of(files=5, lanes=2, seed=0, epoch=0, shuffle=False)
    >>> deal.files, deal.taken(7)
    (((0, 2, 4), (1, 3)), [4, 3])
    """

    files: tuple[tuple[int, ...], ...]
    totals: tuple[int, ...] | None = None

    @staticmethod
    def of(files: int, lanes: int, seed: int, epoch: int, shuffle: bool, counts: Sequence[int] | None = None) -> Deal:
        """Deals files like cards, in their order or shuffled.

        Args:
            files: how many there are, >= 1.
            lanes: at most; each lane has a file.
            seed, epoch: of the shuffle.
            counts: records of each file, where they are known.
        """
        order = plan.permutation(files, seed, epoch, _SHARDS).tolist() if shuffle else list(range(files))
        lanes = min(lanes, files)
        dealt: list[tuple[int, ...]] = [()] * lanes
        for turn, lane in enumerate(_turns(lanes)):
            dealt[lane] = tuple(order[turn::lanes])
        totals = None if counts is None else tuple(sum(counts[file] for file in own) for own in dealt)
        return Deal(tuple(dealt), totals)

    def taken(self, position: int) -> list[int]:
        """How many records of each lane are among the first `position` of the epoch.

        Where the totals are known, record j of a lane of n has the place (j + 1/2) / n in the epoch, and places are
        merged: lanes of any lengths go through the whole epoch and end with it (Webster's method of apportionment).
        While they are unknown the lanes take turns, and one that ends leaves its turns empty.
        """
        lanes = len(self.files)
        turns = np.empty(lanes, np.int64)
        turns[_turns(lanes)] = np.arange(lanes)
        if self.totals is None:
            return ((position + lanes - 1 - turns) // lanes).tolist()
        return _merged(position, self.totals, turns).tolist()

    def part(self, rank: int, size: int) -> Part:
        """What a process reads.

        Args:
            rank: 0 <= rank < size.
        """
        first, last = self._cut(rank, size), self._cut(rank + 1, size)
        shares = {
            lane: (max(first - lane, Fraction(0)), min(last - lane, Fraction(1)))
            for lane in range(int(first), -int(-last // 1))
        }
        return Part(self, shares)

    def _cut(self, edge: int, parts: int) -> Fraction:
        """Where one of equal parts begins, in lanes: 2.5 is the middle of lane 2."""
        lanes = len(self.files)
        if edge == parts:  # with lanes at the end that have no records
            return Fraction(lanes)
        weights = self.totals if self.totals and sum(self.totals) else [1] * lanes
        ends = [0, *itertools.accumulate(weights)]
        before = Fraction(edge * ends[-1], parts)
        nearest = min(range(lanes + 1), key=lambda lane: abs(ends[lane] - before))
        if abs(ends[nearest] - before) <= _NEAR * ends[-1] / max(lanes, parts):
            return Fraction(nearest)
        lane = bisect.bisect_right(ends, before) - 1
        return lane + (before - ends[lane]) / weights[lane]


@dataclass(frozen=True)
class Part:
    """What one process reads of a deal.

    Args:
        deal: of the epoch.
        shares: for each lane that it reads, from where to where of a step's rows of that lane are its own, 0 to 1.
    """

    deal: Deal
    shares: dict[int, tuple[Fraction, Fraction]]

    def of_step(self, start: int, stop: int) -> list[tuple[int, int, slice]]:
        """What to take for the positions start to stop - 1 of the epoch: (lane, records, which of them are its own)."""
        before, after = self.deal.taken(start), self.deal.taken(stop)
        return [
            (lane, rows, slice(int(first * rows), int(last * rows)))
            for lane, (first, last) in self.shares.items()
            for rows in [after[lane] - before[lane]]
        ]


def _turns(lanes: int) -> list[int]:
    """The lanes in the order in which they take turns, those that follow each other far apart.

    Where the last round does not go all the way round, no process's neighbouring lanes get it all.

    >>> _turns(8)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = lanes.bit_length()
    return sorted(range(lanes), key=lambda lane: f"{lane:0{bits}b}"[::-1])


def _merged(position: int, totals: Sequence[int], turns: np.ndarray) -> np.ndarray:
    """Records of each lane among the first `position` by their places, of which equal ones go by turns."""
    lanes, records = len(totals), sum(totals)
    # A lane is never further from its proportional share than half a record for each lane, and one.
    least = np.array([max(0, position * total // max(records, 1) - lanes) for total in totals], np.int64)
    numbers = least[:, None] + np.arange(2 * lanes + 2)
    sizes = np.array(totals, np.float64)[:, None]
    # Equal fractions of whole numbers below 2**52 are equal floats: division is rounded correctly everywhere.
    places = np.where(numbers < sizes, (numbers + 0.5) / np.maximum(sizes, 1), np.inf)
    lane_of = np.repeat(np.arange(lanes), numbers.shape[1])
    first = np.lexsort((turns[lane_of], places.ravel()))[: position - int(least.sum())]
    return least + np.bincount(lane_of[first], minlength=lanes)
