"""The records of a TFRecord file one after another, damage included: what follows it is found again where it can be.

    for found in walk(chunks, size):
        found                      # Payload(number, offset, data), or Damage(number, offset, reason)

A payload that does not match its checksum loses itself alone, as its length is known. A length that does not
match its own loses the way to the next record; that is looked for, byte by byte, in what follows. How many
records lie between nobody can know, so one is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from distfit.data.records import HEADER_BYTES, crc_of_lengths, header_of, masked_crc

# How far to look for a record behind damage; records are seldom longer.
SEARCH_BYTES = 64 * 2**20
_WINDOW_BYTES = 2**20
_LENGTH_BYTES, _CRC_BYTES = 8, 4
# What a record of a file of unknown size may have at most.
_LONGEST = 2**34


class Payload(NamedTuple):
    """A whole record: its number in the file, where its payload begins (bytes), the payload."""

    number: int
    offset: int
    data: bytes


class Damage(NamedTuple):
    """A place that is no whole record.

    Args:
        number: of the record that should be there, from 0.
        offset: where its payload begins or, when its length is what is damaged, that length; bytes.
        reason: what is there instead.
    """

    number: int
    offset: int
    reason: str


def walk(chunks: Iterable[bytes], size: int | None = None) -> Iterator[Payload | Damage]:
    """Every record of a file, in order.

    Args:
        chunks: the file's bytes in pieces of any size, decompressed.
        size: bytes of all of them, where it is known.
    """
    stream = _Ahead(chunks)
    number = 0
    while header := stream.peek(HEADER_BYTES):
        begin = stream.position
        if len(header) < HEADER_BYTES:
            yield Damage(number, begin, _cut_off(f"the {HEADER_BYTES} bytes before a record", header))
            return
        if _is_header(header):
            stream.read(HEADER_BYTES)
            yield _payload(stream, number, _length(header))
        else:
            found = _search(stream, size)
            yield Damage(number, begin, _lost(header, stream.position - begin if found else None))
            if not found:
                return
        number += 1


def _payload(stream: _Ahead, number: int, length: int) -> Payload | Damage:
    offset = stream.position
    data = stream.read(length)
    crc = stream.read(_CRC_BYTES)
    if len(crc) < _CRC_BYTES:
        return Damage(number, offset, _cut_off(f"a record of {length} bytes", data + crc))
    if int.from_bytes(crc, "little") != masked_crc(data):
        return Damage(number, offset, f"{length} bytes that do not match their checksum")
    return Payload(number, offset, data)


def _cut_off(expected: str, rest: bytes) -> str:
    return f"the end of the file after {len(rest)} bytes of {expected}: it is cut off"


def _lost(header: bytes, passed: int | None) -> str:
    if passed is None:
        rest = f"no other record begins in the {SEARCH_BYTES >> 20} MiB behind it, so the rest is not checked"
    else:
        rest = f"the next record was found {passed} bytes on; those between are lost"
    return f"{header!r} where the length of a record and its checksum should be; {rest}"


def _is_header(header: bytes) -> bool:
    return header == header_of(_length(header))


def _length(header: bytes) -> int:
    return int.from_bytes(header[:_LENGTH_BYTES], "little")


def _search(stream: _Ahead, size: int | None) -> bool:
    """Moves to the next header within reach, and says whether there is one."""
    end = stream.position + SEARCH_BYTES
    stream.read(1)
    while stream.position < end:
        window = stream.peek(_WINDOW_BYTES + HEADER_BYTES - 1)
        most = _LONGEST if size is None else size - stream.position
        found = first_header(window, most)
        stream.read(_WINDOW_BYTES if found is None else found)
        if found is not None:
            return True
        if len(window) < HEADER_BYTES:
            return False
    return False


def first_header(window: bytes, most: int) -> int | None:
    """Where in `window` a record of at most `most` bytes may begin: a length with its checksum; None if nowhere.

    >>> first_header(b"damaged" + header_of(3), most=100)
    7
    """
    if len(window) < HEADER_BYTES:
        return None
    at = np.lib.stride_tricks.sliding_window_view(np.frombuffer(window, np.uint8), HEADER_BYTES)
    # Nearly all places fall here already: no length is that large, and no checksum of one is 0 by more than chance.
    places = np.flatnonzero((at[:, 5:_LENGTH_BYTES] == 0).all(axis=1) & (at[:, _LENGTH_BYTES:] != 0).any(axis=1))
    headers = np.ascontiguousarray(at[places])
    lengths = headers[:, :_LENGTH_BYTES].copy().view("<u8").ravel()
    checksums = headers[:, _LENGTH_BYTES:].copy().view("<u4").ravel()
    good = (lengths <= most) & (checksums == crc_of_lengths(lengths))
    return int(places[good.argmax()]) if good.any() else None


class _Ahead:
    """Bytes in pieces of the size that is asked for; `position` is how many were read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.position = 0
        self._chunks = iter(chunks)
        self._held = memoryview(b"")

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end only."""
        data = self.peek(count)
        self._held = self._held[len(data) :]
        self.position += len(data)
        return data

    def peek(self, count: int) -> bytes:
        """What `read` would return; it stays to be read."""
        if len(self._held) < count:
            pieces = [self._held]
            missing = count - len(self._held)
            while missing > 0 and (piece := next(self._chunks, None)) is not None:
                pieces.append(memoryview(piece))
                missing -= len(piece)
            self._held = memoryview(b"".join(pieces))
        return bytes(self._held[:count])
