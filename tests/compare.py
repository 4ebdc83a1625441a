"""How far two engines' numbers of one training are apart. NumPy alone, so that scripts, tests and a process
without distfit share it.

>>> from numpy import array
>>> apart({"weights": array([3.0, 4.0])}, {"weights": array([3.0, 4.5])})
{'weights': 0.1}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

HISTORY = "history/"
# What a case's numbers have beside those of its training: what it raised instead, CPU seconds, what its file holds.
ERROR, SECONDS, SAVED = "error", "seconds", "saved"


def difference(name: str, expected: np.ndarray, received: np.ndarray) -> float:
    """The relative difference of two arrays of one name.

    Weights and outputs: the norm of the difference over the norm of what is expected. Histories: the largest
    relative difference of an epoch. NaN equals NaN; other shapes are infinitely far apart.

    >>> difference("history/loss", np.array([2.0, 4.0]), np.array([2.0, 4.4])).__format__(".1g")
    '0.1'
    >>> difference("weights", np.zeros(2), np.zeros(3))
    inf
    """
    expected, received = np.asarray(expected, np.float64), np.asarray(received, np.float64)
    if expected.shape != received.shape:
        return float("inf")
    both = np.isnan(expected) & np.isnan(received)
    gap = np.where((expected == received) | both, 0.0, np.abs(received - expected))
    size = np.where(both, 0.0, np.abs(expected))
    if not name.startswith(HISTORY):
        gap, size = np.linalg.norm(gap), np.linalg.norm(size)
    ratio = np.divide(gap, size, out=np.where(gap == 0, 0.0, np.inf), where=size > 0)
    return float(np.nan_to_num(np.max(ratio, initial=0.0), nan=np.inf, posinf=np.inf))


def apart(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The difference of each number that is expected; what was not received is infinitely far away."""
    return {
        name: difference(name, value, received[name]) if name in received else float("inf")
        for name, value in expected.items()
    }


def largest(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> float:
    """The figure of a row: the largest difference of its numbers."""
    return max(apart(expected, received).values())


def of_case(numbers: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """The numbers of one case among those of a run, whose names are CASE//NAME."""
    return {key.partition("//")[2]: value for key, value in numbers.items() if key.startswith(f"{case}//")}


def flat(variables: Iterable[Any]) -> np.ndarray:
    """The numbers of Keras variables as one vector."""
    return np.concatenate([np.zeros(0), *(np.ravel(variable.numpy()).astype(np.float64) for variable in variables)])
