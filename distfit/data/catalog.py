"""The file that keeps an index between runs: where each record of each shard begins, 8 bytes a record.

    with whole_file(path) as file:
        writer = Writer(file)
        writer.add("train-00000-of-00008", Stamp(size, time_ns), scan_file(...))
        writer.finish()
    catalog = load(path)                       # None: no such file; ValueError: damaged, or something else

The file is: 16 bytes that name the format and its version, the offsets (int64), a row for each shard, their names,
and a footer with the sizes and checksums of all that. The offsets come first so that they can be written while the
shards are scanned, and mapped into memory, so that an index of 10^9 records takes no more of it than one of 10^3.
"""

from __future__ import annotations

import functools
import hashlib
import io
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from distfit.data.records import Scan

_MAGIC = b"distfit-index-1\n"
# Offsets, shards, bytes of the names; CRC-32C of the offsets, of the shards and names, and of the footer up to here.
_FOOTER = struct.Struct("<QQQIII16s")
# Which part of the footer its own checksum covers.
_COVERED = struct.calcsize("<QQQII")
_SHARDS = np.dtype(
    [("size", "<i8"), ("time", "<i8"), ("records", "<i8"), ("base", "<i8"), ("end", "<i8"), ("framing", "<u4")]
)
# Fewer offsets than this are read into memory: a mapping that its file system loses later ends the process.
MOST_IN_MEMORY = 64 << 20
_PIECE = 8 << 20
NO_OFFSETS = -1
NEVER = -1


class Stamp(NamedTuple):
    """By what a shard is known to be the one that was scanned: its bytes, and when it was changed, in ns."""

    size: int
    time: int


@dataclass(frozen=True, eq=False)
class Catalog:
    """What such a file holds.

    Args:
        path: of the file; "" if it is in memory only.
        names: of the shards.
        shards: for each its `size`, `time`, `records`, `base` (the position of its first record in `begins`, or
            NO_OFFSETS where records were only counted), `end` of the last record and `framing`.
        begins: where each record begins in its shard, bytes, int64.
        seal: of the whole file; another content has another.
    """

    path: str
    names: list[str]
    shards: np.ndarray
    begins: np.ndarray
    seal: str

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def rows(self, names: Sequence[str], stamps: np.ndarray | None = None, offsets: bool = False) -> np.ndarray:
        """For each shard its row here, -1 where it is not here.

        Args:
            names: of the shards.
            stamps: what they must be like, one `Stamp` a row, shape [shards, 2]; None does not ask.
            offsets: whether they must be here with their offsets.
        """
        row_of = self._row_of
        rows = np.fromiter((row_of.get(name, -1) for name in names), np.int64, len(names))
        if stamps is None or not row_of:
            return rows
        found = self.shards[rows]
        same = (found["size"] == stamps[:, 0]) & (found["time"] == stamps[:, 1])
        return np.where(same & ((found["base"] != NO_OFFSETS) | (not offsets)), rows, -1)

    def stamp(self, row: int) -> Stamp:
        """What a shard was like when it was scanned."""
        return Stamp(int(self.shards["size"][row]), int(self.shards["time"][row]))

    def pieces(self, row: int) -> Iterator[np.ndarray]:
        """The offsets of a shard, a piece at a time."""
        shard, step = self.shards[row], _PIECE // 8
        end = int(shard["base"] + shard["records"])
        for start in range(int(shard["base"]), end, step):
            yield self.begins[start : min(start + step, end)]


class Writer:
    """Writes a catalog into an empty file, shard by shard."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._names: list[str] = []
        self._shards: list[tuple[int, ...]] = []
        self._offsets, self._crc = 0, 0
        file.write(_MAGIC)

    def add(self, name: str, stamp: Stamp, scan: Scan) -> None:
        """A shard that was scanned; one that is damaged is never taken for whole again."""
        time = NEVER if scan.damage else stamp.time
        self._row(name, (stamp.size, time, len(scan.begins), self._offsets, scan.end, scan.framing))
        self._write(scan.begins)

    def add_count(self, name: str, stamp: Stamp, records: int, framing: int) -> None:
        """A shard whose records were only counted."""
        self._row(name, (*stamp, records, NO_OFFSETS, stamp.size, framing))

    def copy(self, old: Catalog, row: int) -> None:
        """A shard as another catalog has it."""
        shard = old.shards[row].copy()
        if shard["base"] != NO_OFFSETS:
            shard["base"] = self._offsets
            for piece in old.pieces(row):
                self._write(piece)
        self._row(old.names[row], shard.item())

    def finish(self) -> None:
        """Writes what comes after the offsets."""
        table = np.array(self._shards, _SHARDS).tobytes()
        names = os.fsencode("\0".join(self._names))
        checks = self._crc, google_crc32c.value(table + names)
        covered = struct.pack("<QQQII", self._offsets, len(self._shards), len(names), *checks)
        footer = covered + struct.pack("<I16s", google_crc32c.value(covered), _MAGIC)
        self._file.write(table + names + footer)
        self._file.flush()

    def _row(self, name: str, row: tuple[int, ...]) -> None:
        self._names.append(name)
        self._shards.append(row)

    def _write(self, begins: np.ndarray) -> None:
        data = begins.astype("<i8", copy=False).tobytes()
        self._file.write(data)
        self._crc = google_crc32c.extend(self._crc, data)
        self._offsets += len(begins)


def load(path: str) -> Catalog | None:
    """The catalog in a file; None if there is no such file.

    Raises:
        ValueError: it is damaged, or no catalog of this version; its text is what was found.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return read(file, path)
    except FileNotFoundError:
        return None


def read(file: BinaryIO, path: str) -> Catalog:
    """The catalog in an open file, every byte verified.

    Raises:
        ValueError: as for `load`.
    """
    size, raw, (offsets, shards, name_bytes, *checks) = _ends(file)
    table_at = len(_MAGIC) + 8 * offsets
    if table_at + _SHARDS.itemsize * shards + name_bytes + _FOOTER.size != size:
        raise ValueError("sizes that do not add up")
    if _crc_of(file, len(_MAGIC), table_at) != checks[0]:
        raise ValueError("offsets that do not match their checksum")
    file.seek(table_at)
    rest = file.read(size - table_at - _FOOTER.size)
    if google_crc32c.value(rest) != checks[1]:
        raise ValueError("names that do not match their checksum")
    table, names = rest[: len(rest) - name_bytes], rest[len(rest) - name_bytes :]
    return Catalog(
        path,
        os.fsdecode(names).split("\0") if shards else [],
        np.frombuffer(table, _SHARDS),
        _offsets_in(file, offsets),
        _seal(raw),
    )


def begins_in(path: str, seal: str) -> np.ndarray:
    """The offsets of the catalog with this seal, not verified again: its other end has done it.

    Raises:
        ValueError: there is another one now.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        _, raw, (offsets, *_) = _ends(file)
        if _seal(raw) != seal:
            raise ValueError("another index, written since")
        return _offsets_in(file, offsets)


def _ends(file: BinaryIO) -> tuple[int, bytes, tuple[int, ...]]:
    """The file's size, its footer, and what stands in it."""
    size = file.seek(0, os.SEEK_END)
    if size < len(_MAGIC) + _FOOTER.size:
        raise ValueError(f"{size} bytes")
    file.seek(0)
    magic = file.read(len(_MAGIC))
    file.seek(size - _FOOTER.size)
    raw = file.read(_FOOTER.size)
    *numbers, own, end = _FOOTER.unpack(raw)
    if magic != _MAGIC:
        raise ValueError(f"a file that begins with {magic!r}")
    if end != _MAGIC or own != google_crc32c.value(raw[:_COVERED]):
        raise ValueError("a footer that does not match its checksum")
    return size, raw, tuple(numbers)


def _crc_of(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    crc = 0
    while start < end and (data := file.read(min(_PIECE, end - start))):
        crc = google_crc32c.extend(crc, data)
        start += len(data)
    return crc


def _offsets_in(file: BinaryIO, count: int) -> np.ndarray:
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getbuffer(), "<i8", count, len(_MAGIC))
    if 8 * count <= MOST_IN_MEMORY:
        file.seek(len(_MAGIC))
        return np.frombuffer(file.read(8 * count), "<i8")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Records are looked up in a random order, of which reading ahead would be a waste.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, "<i8", count, len(_MAGIC))


def _seal(footer: bytes) -> str:
    return hashlib.sha256(footer).hexdigest()[:32]
