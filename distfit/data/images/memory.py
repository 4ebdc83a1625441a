"""Memory for rows of pixels that is used again: fresh pages cost a tenth of what decoding into them costs.

    pixels = rows((32, 224, 224, 3))        # uint8; their values are undefined
    del pixels                              # the last reference, of a view or of a tensor too, gives the memory back

Arrays begin at a multiple of 64 bytes, so that TensorFlow takes them over without a copy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

_ALIGNED_BYTES = 64
# The steps of a pipeline that are made and waiting are fewer; what comes back beyond is freed.
_MOST_KEPT = 8
_MOST_KEPT_BYTES = 128 * 2**20  # of a block
# Its operations are single steps of the interpreter: no lock, which a fork could leave locked.
_kept: deque[np.ndarray] = deque(maxlen=_MOST_KEPT)


def rows(shape: tuple[int, ...]) -> np.ndarray:
    """An array of uint8."""
    return np.asarray(_Lent(shape))


class _Lent:
    """What an array of rows is a view of: when the last view is gone, the block goes back."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._block = _block(math.prod(shape))
        self.__array_interface__: dict[str, Any] = self._block.__array_interface__ | {"shape": shape}

    # Bound here, as a module's names may be gone when the interpreter ends.
    def __del__(self, keep: Callable[[np.ndarray], None] = _kept.append, most: int = _MOST_KEPT_BYTES) -> None:
        if len(self._block) <= most:
            keep(self._block)


def _block(count: int) -> np.ndarray:
    """At least `count` bytes: one that came back, or a new one."""
    while _kept:
        try:
            block = _kept.pop()
        except IndexError:  # another thread took the last one
            break
        if len(block) >= count:  # smaller ones are of batches that have become larger
            return block
    block = np.empty(count + _ALIGNED_BYTES, np.uint8)
    start = -block.ctypes.data % _ALIGNED_BYTES
    return block[start : start + count]
