"""A shuffle of what can only be read in order: each item is drawn from those that wait in a window.

    window = Window(512, (seed, epoch, lane))
    list(window.shuffled(iter(records)))
    window.first_left(count=100_000, skip=60_000)     # from where on to read, to go on after 60,000 of them

An item comes at most `size` - 1 places early; how much later is geometric, with a mean of `size`. The order is a pure
function of the size, the entropy and the number of items.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window:
    """How items are shuffled.

    Args:
        size: items that wait, >= 1.
        entropy: whole numbers >= 0 that the draws depend on; None leaves the items in their order.

    >>> sorted(Window(3, (0, 1)).shuffled(iter("abcdef")))
    ['a', 'b', 'c', 'd', 'e', 'f']
    """

    size: int
    entropy: tuple[int, ...] | None

    def shuffled(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items in another order; reads `size` of them before the first one comes."""
        return items if self.entropy is None else _mixed(items, self.size, _numbers(*self.entropy))

    def first_left(self, count: int, skip: int) -> int:
        """Which of `count` items is the first, in reading, that has not come among the first `skip`.

        >>> Window(3, None).first_left(count=10, skip=4), Window(3, (0, 1)).first_left(count=10, skip=10)
        (4, 10)
        """
        return min(itertools.islice(self.shuffled(iter(range(count))), skip, None), default=count)


def _mixed(items: Iterator[Item], size: int, numbers: Iterator[int]) -> Iterator[Item]:
    waiting = list(itertools.islice(items, size))
    for item in items:
        drawn = next(numbers) % len(waiting)
        yield waiting[drawn]
        waiting[drawn] = item
    while waiting:
        drawn = next(numbers) % len(waiting)
        waiting[drawn], waiting[-1] = waiting[-1], waiting[drawn]
        yield waiting.pop()


def _numbers(*entropy: int) -> Iterator[int]:
    """Endless numbers below 2**64 that depend on `entropy` alone; raw, for the reason that `plan.permutation` has."""
    bits = np.random.Philox(np.random.SeedSequence(entropy))
    while True:
        yield from bits.random_raw(1024).tolist()
