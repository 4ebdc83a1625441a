"""How far two runs are apart, and whether rounding explains it. Pure NumPy.

    found = apart(alone, received)                       # {"weights": Apart(4e-2, "conv/kernel"), ...}
    verdict(found["weights"].size, control=2e-8, dtype="float32")

Numbers are named COLUMN/NAME: "weights/3:conv/kernel", "losses/loss", "metrics/accuracy", "evaluation/loss".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

COLUMNS = ("weights", "losses", "metrics", "evaluation")
Numbers = Mapping[str, np.ndarray]

# One control is one sample of what rounding does; the next one may be some times as large.
TIMES_CONTROL = 10
# Below this a difference is rounding whatever the control was, which may be zero: eight units in the last place.
# float64 has digits to spare, so that no cause is as small, and sums of a long training may round more often.
FLOORS = {"float64": 1e-12, "float32": 1e-6, "float16": 8e-3, "bfloat16": 6e-2}
# A control above the square root of the type's precision: the training blows rounding up until it hides everything.
BLURS = {"float64": 1.5e-8, "float32": 3.5e-4, "float16": 3e-2, "bfloat16": 9e-2}


class Verdict(StrEnum):
    """What a difference says."""

    equal = "equal"
    rounding = "to rounding"
    differs = "differs"
    unclear = "unclear"

    @property
    def same(self) -> bool:
        """Whether two runs are the same training."""
        return self in (Verdict.equal, Verdict.rounding)


@dataclass(frozen=True)
class Apart:
    """A relative difference.

    Args:
        size: 0 when equal to the bit, inf when there is nothing to compare.
        where: the name of what differs most.
    """

    size: float
    where: str = ""


def limit(control: float, dtype: str) -> float:
    """The largest difference that is taken for rounding: ten times the control's, at least a few units in the last
    place of `dtype`.

    >>> limit(2e-8, "float32"), limit(1e-4, "float32")
    (1e-06, 0.001)
    """
    return max(FLOORS[dtype], TIMES_CONTROL * control)


def verdict(difference: float, control: float, dtype: str) -> Verdict:
    """What a difference says, given what rounding alone did.

    Args:
        difference: relative, >= 0.
        control: the same between one device and one device with rows permuted.
        dtype: in which the model computes: "float32", "float64", "float16" or "bfloat16".

    >>> verdict(0.0, 2e-8, "float32"), verdict(3e-8, 2e-8, "float32"), verdict(4e-2, 2e-8, "float32")
    (<Verdict.equal: 'equal'>, <Verdict.rounding: 'to rounding'>, <Verdict.differs: 'differs'>)
    >>> verdict(4e-2, 3e-2, "float32")
    <Verdict.unclear: 'unclear'>
    """
    if difference == 0:
        return Verdict.equal
    if difference > limit(control, dtype):
        return Verdict.differs
    return Verdict.rounding if control <= BLURS[dtype] else Verdict.unclear


def is_sharp(difference: float, control: float, dtype: str) -> bool:
    """Whether more digits would not tell more: float64, or far on one side.

    >>> is_sharp(4e-2, 2e-8, "float32"), is_sharp(5e-6, 2e-8, "float32"), is_sharp(5e-6, 2e-8, "float64")
    (True, False, True)
    """
    found = verdict(difference, control, dtype)
    near = found is Verdict.unclear or (found is Verdict.differs and difference <= BLURS[dtype])
    return dtype == "float64" or not near


def apart(expected: Numbers, received: Numbers) -> dict[str, Apart]:
    """The difference of each column that is expected. Weights: the norm of the difference over the norm of all
    weights. Losses and metrics: the largest difference of one name's numbers over the largest of them.

    >>> from numpy import array
    >>> apart({"weights/0:kernel": array([3.0, 4.0])}, {"weights/0:kernel": array([3.0, 4.5])})
    {'weights': Apart(size=0.1, where='kernel')}
    """
    found = {}
    for column in COLUMNS:
        own = {name.partition("/")[2]: value for name, value in expected.items() if name.startswith(f"{column}/")}
        other = {name.partition("/")[2]: value for name, value in received.items() if name.startswith(f"{column}/")}
        if own:
            found[column] = _weights(own, other) if column == COLUMNS[0] else _series(own, other)
    return found


def _weights(expected: Numbers, received: Numbers) -> Apart:
    if {name: value.shape for name, value in expected.items()} != {n: v.shape for n, v in received.items()}:
        return Apart(math.inf, "other variables")
    gaps = {name: _norm(_gap(value, received[name])) for name, value in expected.items()}
    whole = _norm(np.array([_norm(value) for value in expected.values()]))
    return _largest(_ratio(_norm(np.array(list(gaps.values()))), whole), gaps)


def _series(expected: Numbers, received: Numbers) -> Apart:
    found = {}
    for name, value in expected.items():
        if name not in received or received[name].shape != value.shape:
            return Apart(math.inf, name)
        gap = np.max(np.abs(_gap(value, received[name])), initial=0.0)
        found[name] = _ratio(float(gap), float(np.max(np.abs(np.nan_to_num(value)), initial=0.0)))
    return _largest(max(found.values()), found)


def _gap(expected: np.ndarray, received: np.ndarray) -> np.ndarray:
    """NaN equals NaN, and inf the same inf."""
    expected, received = np.asarray(expected, np.float64), np.asarray(received, np.float64)
    same = (expected == received) | (np.isnan(expected) & np.isnan(received))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(received - expected, nan=np.inf))


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(values, np.float64)))


def _ratio(gap: float, size: float) -> float:
    if gap == 0:
        return 0.0
    found = gap / size if size > 0 and math.isfinite(size) else math.inf
    return math.inf if math.isnan(found) else found


def _largest(size: float, by_name: Mapping[str, float]) -> Apart:
    if size == 0:
        return Apart(0.0)
    where = max(by_name, key=lambda name: by_name[name])
    # Variables are numbered, as two may have one path.
    return Apart(size, where.partition(":")[2] or where)
