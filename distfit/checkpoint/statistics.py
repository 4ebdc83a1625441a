"""What the numbers of a tensor are, and how two tensors differ: in blocks, so that no second copy of one is made.

numbers_of(weights).most
difference_of(weights, others).bits        # how many numbers are not the same to the bit
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Numbers of a block: 8 MB as float64, in which they are summed.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Numbers:
    """What is in a tensor; those that are not finite are counted and in none of the others.

    Args:
        count: of numbers.
        least: the smallest; None where no number is finite, as for those below.
        mean: of all.
        most: the largest.
        norm: the root of the sum of squares.
        nan: how many are not a number.
        infinite: how many are infinite.
    """

    count: int
    least: float | None
    mean: float | None
    most: float | None
    norm: float | None
    nan: int = 0
    infinite: int = 0


@dataclass(frozen=True)
class Difference:
    """How two tensors of the same type and shape differ.

    Args:
        count: of numbers in each.
        bits: how many are not the same to the bit.
        absolute: the largest difference of two finite numbers.
        relative: the largest, over the larger of the two.
        finite_in_one: how many are finite in one of them alone, or infinite or not a number in other ways.
    """

    count: int
    bits: int
    absolute: float = 0.0
    relative: float = 0.0
    finite_in_one: int = 0


def numbers_of(tensor: np.ndarray) -> Numbers:
    """Counts and sums in float64.

    >>> numbers_of(np.array([3.0, np.nan, -4.0], "float32"))
    Numbers(count=3, least=-4.0, mean=-0.5, most=3.0, norm=5.0, nan=1, infinite=0)
    """
    parts = [_of_block(_as_floats(block)) for block in _blocks(tensor)]
    finite = sum(part.count - part.nan - part.infinite for part in parts)
    nan, infinite = sum(part.nan for part in parts), sum(part.infinite for part in parts)
    if not finite:
        return Numbers(tensor.size, None, None, None, None, nan, infinite)
    known = [part for part in parts if part.mean is not None]
    total = math.fsum((part.mean or 0.0) * (part.count - part.nan - part.infinite) for part in known)
    return Numbers(
        count=tensor.size,
        least=min(part.least for part in known if part.least is not None),
        mean=total / finite,
        most=max(part.most for part in known if part.most is not None),
        norm=math.hypot(*(part.norm for part in known if part.norm is not None)),
        nan=nan,
        infinite=infinite,
    )


def difference_of(one: np.ndarray, other: np.ndarray) -> Difference:
    """How far two tensors are apart; they have the same type and shape.

    >>> difference_of(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 5.0]))
    Difference(count=3, bits=1, absolute=1.0, relative=0.2, finite_in_one=0)
    """
    parts = [_of_blocks(*blocks) for blocks in zip(_blocks(one), _blocks(other), strict=True)]
    return Difference(
        count=one.size,
        bits=sum(part.bits for part in parts),
        absolute=max((part.absolute for part in parts), default=0.0),
        relative=max((part.relative for part in parts), default=0.0),
        finite_in_one=sum(part.finite_in_one for part in parts),
    )


def _blocks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    flat = tensor.reshape(-1)
    return (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def _as_floats(block: np.ndarray) -> np.ndarray:
    return np.abs(block) if np.iscomplexobj(block) else block.astype(np.float64)


def _of_block(block: np.ndarray) -> Numbers:
    nan, infinite = int(np.isnan(block).sum()), int(np.isinf(block).sum())
    finite = block[np.isfinite(block)] if nan or infinite else block
    if not finite.size:
        return Numbers(block.size, None, None, None, None, nan, infinite)
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(finite))
    return Numbers(block.size, float(finite.min()), float(finite.mean()), float(finite.max()), norm, nan, infinite)


def _of_blocks(one: np.ndarray, other: np.ndarray) -> Difference:
    unequal = _bytes(one) != _bytes(other)
    where = np.flatnonzero(unequal.any(axis=1))
    if not where.size:
        return Difference(one.size, 0)
    exact = np.issubdtype(one.dtype, np.integer)
    ours, theirs = one[where], other[where]
    gaps = _integer_gaps(ours, theirs) if exact else np.abs(_wide(ours) - _wide(theirs))
    sizes = np.maximum(np.abs(_wide(ours)), np.abs(_wide(theirs)))
    finite = np.isfinite(sizes)
    gaps, sizes = gaps[finite], sizes[finite]
    relative = gaps[sizes > 0] / sizes[sizes > 0]
    return Difference(
        one.size,
        int(where.size),
        float(gaps.max(initial=0.0)),
        float(relative.max(initial=0.0)),
        int((~finite).sum()),
    )


def _bytes(block: np.ndarray) -> np.ndarray:
    """A row of bytes for each number: NaN is equal to the same NaN, and 0 is not -0."""
    return np.ascontiguousarray(block).view(np.uint8).reshape(block.size, block.dtype.itemsize)


def _wide(block: np.ndarray) -> np.ndarray:
    return block if np.iscomplexobj(block) else block.astype(np.float64)


def _integer_gaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Exact, also where float64 holds neither of the numbers."""
    unsigned = np.dtype(f"u{one.dtype.itemsize}")
    larger, smaller = np.maximum(one, other), np.minimum(one, other)
    return (larger.astype(unsigned) - smaller.astype(unsigned)).astype(np.float64)
