"""Random numbers of one record: a pure function of its seed, the same bits on any machine.

    draws = Draws(seed, "crop")             # seed: two whole numbers below 2**32
    draws.uniform(0.08, 1.0), draws.below(10)

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) in whole numbers: a record
needs some five draws, which cost 2 microseconds; making a numpy generator alone would cost 9 to 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

# Of a record: two whole numbers below 2**32.
Seed: TypeAlias = Sequence[int] | np.ndarray

_STEP = 0x9E3779B97F4A7C15
_ALL = 2**64 - 1
# Each use has a stream of its own: a flip does not depend on how often the crop had to draw.
_USES = {"crop": 1, "augment": 2}


class Draws:
    """
    Args:
        seed: of the record, from (seed, epoch, record): two whole numbers below 2**32.
        use: "crop" or "augment".

    >>> draws = Draws((1, 2), "crop")
    >>> draws.below(1000), round(draws.uniform(), 6)
    (344, 0.405304)
    """

    def __init__(self, seed: Seed, use: str) -> None:
        self._state = _mixed(_mixed(int(seed[0]) << 32 | int(seed[1])) + _USES[use])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float from `low` to `high`, with 53 random bits."""
        self._state = (self._state + _STEP) & _ALL
        return low + (high - low) * ((_mixed(self._state) >> 11) * 2.0**-53)

    def below(self, count: int) -> int:
        """A whole number from 0 to `count - 1`."""
        return int(self.uniform() * count)


def _mixed(number: int) -> int:
    number = (number + _STEP) & _ALL
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _ALL
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _ALL
    return number ^ number >> 31
