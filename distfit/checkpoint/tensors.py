"""Tensors in a file: safetensors (https://github.com/huggingface/safetensors), which holds numbers and no code.

    fact = write_tensors("tensors.safetensors", {"weight/0": array})
    read_tensors("tensors.safetensors", fact)["weight/0"]

The file is eight bytes with the length of a header, the header as JSON, and the arrays one after the other. The library
judges whether a file is of the format. The arrays themselves are written and read here, straight from and to where
they lie in memory: the library makes a second copy of each. Nothing is read through a link, or from what is no file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 and float8 by it)
import numpy as np
import safetensors

from distfit.checkpoint.pace import rest

# Names of the format for NumPy's types.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_TYPES = {name: np.dtype(kind) for kind, name in _NAMES.items()}
# What is hashed and written at a time.
_BLOCK = 2**20
# Longer headers are refused before they are read: the library's own limit.
_MOST_HEADER = 100_000_000
_LENGTH_BYTES = 8
_METADATA = "__metadata__"  # strings that other tools may put into the header
# What JSON from a stranger can make Python raise: nesting and numbers have their limits.
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


class Unreadable(ValueError):
    """A file is not what was written; the message says in what."""


@dataclass(frozen=True)
class FileFact:
    """What a file has to be.

    Args:
        size: in bytes.
        sha256: of its content, in hexadecimal.
    """

    size: int
    sha256: str


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> FileFact:
    """Write arrays, from where they lie in memory, and see them on disk.

    Args:
        tensors: little-endian, of the types of the format.

    Raises:
        OSError: they cannot be written.
        ValueError: a type that the format has not.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    header = _header(arrays)
    return write_blocks(path, _blocks(header, arrays))


def write_blocks(path: str | os.PathLike, blocks: Iterator[bytes | memoryview]) -> FileFact:
    """A new file of these bytes, flushed to disk."""
    size, digest = 0, hashlib.sha256()
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for block in blocks:
            digest.update(block)
            _write_all(number, memoryview(block))
            size += len(block)
            rest()
        os.fsync(number)
    finally:
        os.close(number)
    return FileFact(size, digest.hexdigest())


def open_plain(path: str | os.PathLike) -> BinaryIO:
    """A file to read, if it is one: a link could lead out of the folder, and a pipe would be waited for.

    Raises:
        Unreadable: it is none.
        OSError: it cannot be read, or is a link.
    """
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise Unreadable(f"{os.path.basename(path)} is no file")
    return open(number, "rb", buffering=0)


def check_file(path: str | os.PathLike, fact: FileFact) -> None:
    """Read every byte, holding a block of them.

    Raises:
        Unreadable: the size or the content is another one.
        OSError: it cannot be read, or is a link.
    """
    with open_plain(path) as file:
        reading = _Reading(file, os.path.basename(path))
        reading.check_size(fact)
        block = memoryview(bytearray(min(_BLOCK, reading.size)))
        while reading.left:
            reading.fill(block[: min(_BLOCK, reading.left)])
            rest()
        reading.check_content(fact)


def read_small(path: str | os.PathLike, most: int, fact: FileFact | None = None) -> bytes:
    """A file as a whole.

    Args:
        most: bytes; longer ones are refused.
        fact: what the file has to be; None believes it.

    Raises:
        Unreadable: it is longer, or not that.
        OSError: it cannot be read, or is a link.
    """
    with open_plain(path) as file:
        reading = _Reading(file, os.path.basename(path))
        if fact is not None:
            reading.check_size(fact)
        if reading.size > most:
            raise Unreadable(f"{reading.name} is longer than {most:,} bytes")
        content = reading.take(reading.size)
        if fact is not None:
            reading.check_content(fact)
    return content


def read_tensors(path: str | os.PathLike, fact: FileFact | None = None) -> dict[str, np.ndarray]:
    """All arrays of a file, read once, each into its own memory.

    Args:
        fact: what the file has to be; None believes it.

    Raises:
        Unreadable: it is not that, or not of the format.
        OSError: it cannot be read, or is a link.
    """
    with open_plain(path) as file:
        reading = _Reading(file, os.path.basename(path))
        if fact is not None:
            reading.check_size(fact)
        if reading.size > _memory_of_host():
            raise Unreadable(f"{reading.name} has {reading.size:,} bytes, more than this host has memory")
        arrays = {name: np.empty(shape, _TYPES[kind]) for name, kind, shape in _layout(reading)}
        for array in arrays.values():
            for block in _blocks_of(array):
                reading.fill(block)
        if fact is not None:
            reading.check_content(fact)
    return arrays


def specs_of(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type (as the format names it) and shape of each array, from the header alone.

    Raises:
        Unreadable: it is no such header.
        OSError: it cannot be read, or is a link.
    """
    with open_plain(path) as file:
        return {name: (kind, shape) for name, kind, shape in _layout(_Reading(file, os.path.basename(path)))}


class _Reading:
    """A file read from its beginning to its end, with the checksum of what has been read."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.size = self.left = os.fstat(file.fileno()).st_size
        self._digest = hashlib.sha256()

    def check_size(self, fact: FileFact) -> None:
        if self.size != fact.size:
            raise Unreadable(f"{self.name} has {self.size:,} bytes of {fact.size:,}")

    def check_content(self, fact: FileFact) -> None:
        if self._digest.hexdigest() != fact.sha256:
            raise Unreadable(f"the checksum of {self.name} is another one: its content has changed")

    def take(self, count: int) -> bytes:
        content = bytearray(count)
        self.fill(memoryview(content))
        return bytes(content)

    def fill(self, block: memoryview) -> None:
        at = 0
        while at < len(block):
            count = self.file.readinto(block[at:])  # type: ignore[attr-defined]  # raw files have it
            if not count:
                raise Unreadable(f"{self.name} ends {len(block) - at:,} bytes early")
            at += count
        self._digest.update(block)
        self.left -= at


def _memory_of_host() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _layout(reading: _Reading) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each array in the order in which they fill the file, every offset checked."""
    if reading.size < _LENGTH_BYTES:
        raise Unreadable(f"{reading.name} has no header")
    length = int.from_bytes(reading.take(_LENGTH_BYTES), "little")
    if not 2 <= length <= min(_MOST_HEADER, reading.left):
        raise Unreadable(f"its header cannot be {length:,} bytes long")
    text = reading.take(length)
    _check_format(reading)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != _METADATA}
        return _in_order(entries, reading.left)
    except BAD_JSON as error:
        raise Unreadable(f"its header is damaged: {error}") from error


def _check_format(reading: _Reading) -> None:
    """Whether the library takes it for a file of the format: the one that is open, whatever its name leads to now."""
    try:
        with safetensors.safe_open(f"/proc/self/fd/{reading.file.fileno()}", framework="numpy"):
            return
    except (safetensors.SafetensorError, OSError) as error:
        raise Unreadable(f"it is no safetensors file: {error}") from error


def _in_order(entries: Mapping[str, Any], size: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """
    >>> _in_order({"b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
    ...            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 6)
    [('a', 'F32', ()), ('b', 'U8', (2,))]
    """
    found, at = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind not in _TYPES:
            raise Unreadable(f"{name!r} has the type {kind!r}, which is none of {', '.join(_TYPES)}")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise Unreadable(f"{name!r} has the shape {shape!r}")
        end = at + math.prod(shape) * _TYPES[kind].itemsize
        if entry["data_offsets"] != [at, end]:
            raise Unreadable(f"{name!r} lies at {entry['data_offsets']} and not at {[at, end]}")
        found.append((name, kind, shape))
        at = end
    if at != size:
        raise Unreadable(f"its arrays have {at:,} bytes of {size:,}")
    return found


def _header(arrays: Mapping[str, np.ndarray]) -> bytes:
    entries: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        if name == _METADATA:
            raise ValueError(f"{name} is no name for an array: safetensors uses it for itself")
        if array.dtype.name not in _NAMES or array.dtype.byteorder == ">":
            raise ValueError(f"{name} has the type {array.dtype}, which safetensors has no name for")
        entries[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that arrays begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    yield header
    for array in arrays.values():
        yield from _blocks_of(np.ascontiguousarray(array))


def _blocks_of(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array where they lie, a block at a time."""
    if array.size:
        content = memoryview(array.reshape(-1).view(np.uint8).data)
        for start in range(0, len(content), _BLOCK):
            yield content[start : start + _BLOCK]


def _write_all(number: int, block: memoryview) -> None:
    while len(block):
        block = block[os.write(number, block) :]
