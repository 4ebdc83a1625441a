"""Many strings in little memory: their bytes, and a position for each.

    names = Names.of(["a/1.jpg", "a/2.jpg"])
    names[1], len(names), names.only(np.array([False, True]))

A list of 300,000 paths takes 30 MB; here each takes its own bytes and eight more.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """Strings that cannot be changed; they may be names of files that are no UTF-8, as `os` gives them.

    Args:
        text: all of them, as `os.fsencode` encodes them, one behind the other.
        ends: where each ends in `text`, int64.
    """

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """
        >>> list(Names.of(["cat", "", "dog"]))
        ['cat', '', 'dog']
        """
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return cls(bytes(text), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return os.fsdecode(self.encoded(number))

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self._text == other._text and np.array_equal(self._ends, other._ends)

    def encoded(self, number: int) -> bytes:
        """The bytes of one."""
        number = range(len(self))[number]  # refuses what is out of range, and counts from the end
        return self._text[self._ends[number - 1] if number else 0 : self._ends[number]]

    def only(self, keeps: np.ndarray) -> "Names":
        """Those for which `keeps`, bool, is true."""
        return self if keeps.all() else Names.of(self[number] for number in np.flatnonzero(keeps).tolist())

    def repeated(self) -> list[tuple[int, int]]:
        """Pairs of positions (first, again) of strings that come more than once, by the second.

        Takes 24 bytes for each meanwhile.

        >>> Names.of(["b", "a", "b", "b"]).repeated()
        [(0, 2), (0, 3)]
        """
        keys = np.fromiter((self._key(number) for number in range(len(self))), np.uint64, len(self))
        order = np.argsort(keys, kind="stable")
        pairs, first = [], -1
        for before, after in zip(order.tolist(), order[1:].tolist(), strict=False):
            first = before if first < 0 or keys[first] != keys[before] else first
            if keys[first] == keys[after] and self.encoded(first) == self.encoded(after):
                pairs.append((first, after))
        return sorted(pairs, key=lambda pair: pair[1])

    def update(self, digest: hashlib.blake2b) -> None:
        """Feeds all of them to a digest."""
        digest.update(self._ends.tobytes())
        digest.update(self._text)

    def _key(self, number: int) -> int:
        return int.from_bytes(hashlib.blake2b(self.encoded(number), digest_size=8).digest(), "little")
