"""TFRecord files without TensorFlow: write them whole, find every record, read any one and verify it.

    count = write_records("train-00000-of-00008.tfrecord", payloads)
    offsets, lengths = scan("train-00000-of-00008.tfrecord")
    payload = read_at(fd, int(offsets[5]), int(lengths[5]), name)

A record is a little-endian uint64 length, the masked CRC-32C of those eight bytes, the payload, and the
masked CRC-32C of the payload. Nothing is taken on trust: scanning verifies every length and the end of the
file, reading every payload.
"""

import contextlib
import functools
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import google_crc32c
import numpy as np

from distfit.data import storage
from distfit.errors import InputError, RunError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_HEADERS = np.dtype([("length", "<u8"), ("crc", "<u4")])
HEADER_BYTES = _HEADER.size
FRAME_BYTES = _HEADER.size + _FOOTER.size
# Up to this mean length it is faster to read records as a whole than each header by itself: on a warm page cache 3.2
# against 0.9 million a second at 100 bytes, the same at 8 KiB, half at 16 KiB.
_SMALL = 8 << 10
_WINDOW = 1 << 20
# Headers are verified so many at a time, in numpy.
_BATCH = 4096


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated and shifted so that a checksum of checksums stays strong.

    >>> hex(masked_crc(b""))
    '0xa282ead8'
    """
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` complete and on disk when the block ends, or not at all."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(fd, "w+b") as file:
            yield file
            file.flush()
            # mkstemp makes a file that only its owner can read; give it what `open` would have given.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_records(path: str | os.PathLike, payloads: Iterable[bytes]) -> int:
    """Writes a TFRecord file, whole or not at all, and returns the number of its records."""
    count = 0
    with whole_file(path) as file:
        for payload in payloads:
            file.write(header_of(len(payload)))
            file.write(payload)
            file.write(_FOOTER.pack(masked_crc(payload)))
            count += 1
    return count


def header_of(length: int) -> bytes:
    """The 12 bytes before a payload of this length.

    >>> header_of(5).hex()
    '0500000000000000eab2043e'
    """
    packed = _LENGTH.pack(length)
    return packed + _FOOTER.pack(masked_crc(packed))


def crc_of_lengths(lengths: np.ndarray) -> np.ndarray:
    """What `header_of` has behind each length; the checksum is linear, so each byte has its share of it.

    >>> crc_of_lengths(np.array([5, 3, 0])).astype("<u4")[:1].tobytes() == header_of(5)[8:]
    True
    """
    octets = np.ascontiguousarray(lengths, "<u8").view(np.uint8).reshape(-1, _LENGTH.size)
    crc = np.bitwise_xor.reduce(_shares_of_octets()[np.arange(_LENGTH.size), octets], axis=1)
    return (crc >> np.uint32(15) | crc << np.uint32(17)) + np.uint32(0xA282EAD8)


def unframed(framed: bytes, length: int) -> bytes | None:
    """The payload of a record, verified; None if these bytes are not a record of this length.

    Args:
        framed: header, payload and footer, or less where the file ended.
        length: of the payload, bytes, as it is known from an index.
    """
    if len(framed) != length + FRAME_BYTES or framed[:HEADER_BYTES] != header_of(length):
        return None
    payload = framed[HEADER_BYTES:-4]
    return payload if _FOOTER.unpack_from(framed, HEADER_BYTES + length)[0] == masked_crc(payload) else None


def what_is_wrong(framed: bytes, length: int) -> str:
    """Why `unframed` took these bytes for no record, in words."""
    header = framed[:HEADER_BYTES]
    if not framed:
        return "the end of the file before it: the file is cut off"
    if len(header) == HEADER_BYTES and header != header_of(length):
        if _is_header(header):
            found = _LENGTH.unpack_from(header)[0]
            return f"one of {found} bytes instead of {length}: the file has changed since it was indexed"
        return f"the header {header!r} instead of a length of {length} and its checksum"
    if len(framed) < length + FRAME_BYTES:
        return f"{len(framed)} of its {length + FRAME_BYTES} bytes: the file is cut off"
    return f"a payload of {length} bytes that does not match its checksum"


@dataclass(frozen=True)
class Damage:
    """What ends a file before its time.

    Args:
        path: of the file.
        expected, received: what should be there and what is, in words.
        remedy: what to do, a sentence.
        compressed: that it is a compressed file, which may be whole in itself.
    """

    path: str
    expected: str
    received: str
    remedy: str
    compressed: bool = False

    @property
    def error(self) -> InputError:
        """It as an error."""
        return InputError(f"Expected {self.expected} of {self.path!r}, received {self.received}. {self.remedy}")


@dataclass(frozen=True, eq=False)
class Scan:
    """The records of a file.

    Args:
        begins: where each record begins (with its header), bytes, int64.
        end: where the last one ends, bytes; the file's size if nothing is damaged.
        framing: CRC-32C of all headers, one after the other.
        damage: what comes after the last record, if it is not the end of the file.
    """

    begins: np.ndarray
    end: int
    framing: int
    damage: Damage | None


def scan(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Where the payloads of a TFRecord file lie: (offsets, lengths) in bytes, both int64.

    Raises:
        InputError: the file cannot be read, is empty, is no TFRecord file, is compressed, or is cut off.
    """
    found = scan_file(os.fspath(path))
    if found.damage:
        raise found.damage.error
    lengths = np.diff(found.begins, append=found.end) - FRAME_BYTES
    return found.begins + HEADER_BYTES, lengths


def scan_file(path: str) -> Scan:
    """The records up to the file's end, or up to its first damage.

    Reads 12 bytes for each record, or everything where records are short.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        file = storage.open_file(path)
        return _scan(file, file.size())
    except OSError as error:
        raise storage.unreadable(path, error) from error


def compression_of(head: bytes) -> Literal["GZIP", "ZLIB"] | None:
    """How a file is compressed, by its first 12 bytes; None where it is not, or where it is no TFRecord file.

    The length of a record may begin as a compressed file does, so its checksum is looked at first.

    >>> compression_of(bytes.fromhex("1f8b0800000000000003")), compression_of(bytes.fromhex("789c63e0"))
    ('GZIP', 'ZLIB')
    >>> compression_of(header_of(0x8B1F))
    """
    if _is_header(head[:HEADER_BYTES]):
        return None
    if head[:2] == b"\x1f\x8b":
        return "GZIP"
    # Deflate with any window and level; the two bytes are a multiple of 31 (RFC 1950, 2.2).
    if len(head) >= 2 and head[0] & 0x0F == 8 and head[0] >> 4 <= 7 and int.from_bytes(head[:2], "big") % 31 == 0:
        return "ZLIB"
    return None


def read_at(fd: int, offset: int, length: int, name: str) -> bytes:
    """One payload, verified; safe to call from several threads.

    Args:
        fd: an open file descriptor; its position is neither used nor moved.
        offset: where the payload begins, bytes, from `scan`.
        length: its length, bytes, from `scan`.
        name: the file's name, for the message.

    Raises:
        RunError: the payload is not there in full or does not match its checksum.
    """
    framed = os.pread(fd, length + FRAME_BYTES, offset - HEADER_BYTES)
    payload = unframed(framed, length)
    if payload is None:
        raise RunError(
            f"Expected a record of {length} bytes at byte {offset} of {name!r}, received "
            f"{what_is_wrong(framed, length)}. Copy it again from its source, or rebuild the data set."
        )
    return payload


def _scan(file: storage.OpenFile, size: int) -> Scan:
    parts, framing, at, window = [np.empty(0, np.int64)], 0, 0, _WINDOW
    damage = None if size else _empty(file.path)
    while at < size and damage is None:
        begins, headers, after, window = _batch(file, at, size, window)
        whole = _leading_whole(headers, after <= size)
        parts.append(begins[:whole])
        framing = google_crc32c.extend(framing, headers[: whole * HEADER_BYTES])
        if whole < len(begins) or after == at:
            after = int(begins[whole]) if whole < len(begins) else at
            damage = _damage(file, after, size)
        at = after
    return Scan(np.concatenate(parts), at, framing, damage)


def _batch(file: storage.OpenFile, at: int, size: int, window: int) -> tuple[np.ndarray, bytes, int, int]:
    """The next records, not yet verified: where they begin, their headers, where they end, how much to read next."""
    begins, headers = array("q"), bytearray()
    while at < size and len(begins) < _BATCH:
        data = file.read_at(at, window)
        place, last, found = 0, len(data) - HEADER_BYTES, len(begins)
        while place <= last:
            begins.append(at + place)
            headers += data[place : place + HEADER_BYTES]
            place += _LENGTH.unpack_from(data, place)[0] + FRAME_BYTES
        if place == 0:
            break  # less than a header is left
        at += place
        window = _WINDOW if place <= _SMALL * (len(begins) - found) else HEADER_BYTES
    return np.frombuffer(begins, np.int64), bytes(headers), at, window


def _leading_whole(headers: bytes, last_fits: bool) -> int:
    """How many records there are before the first whose length is damaged, or which is longer than the file."""
    table = np.frombuffer(headers, _HEADERS)
    right = crc_of_lengths(table["length"]) == table["crc"]
    return len(right) - (not last_fits) if right.all() else int(np.argmin(right))


@functools.cache
def _shares_of_octets() -> np.ndarray:
    """What each value of each of a length's eight bytes adds to its CRC-32C; shape [8, 256]."""
    nothing = google_crc32c.value(_LENGTH.pack(0))
    shares = [
        [google_crc32c.value(_LENGTH.pack(value << 8 * place)) ^ nothing for value in range(256)] for place in range(8)
    ]
    table = np.array(shares, np.uint32)
    table[0] ^= np.uint32(nothing)
    return table


def _is_header(header: bytes) -> bool:
    return len(header) == HEADER_BYTES and header == header_of(_LENGTH.unpack_from(header)[0])


def _damage(file: storage.OpenFile, at: int, size: int) -> Damage:
    header = file.read_at(at, HEADER_BYTES)
    if _is_header(header):
        return _cut_off(file.path, f"a record of {_LENGTH.unpack_from(header)[0]} bytes", at, size)
    if at == 0 or len(header) == HEADER_BYTES:
        return _not_a_record(file.path, at, header)
    return _cut_off(file.path, "the header of a record (12 bytes)", at, size)


def _empty(path: str) -> Damage:
    return Damage(path, "at least one record", "an empty file (0 bytes)", "Rebuild it, or leave it out.")


def _cut_off(path: str, expected: str, at: int, size: int) -> Damage:
    return Damage(
        path,
        f"{expected} at byte {at}",
        f"the end of the file at byte {size}: the file is cut off",
        "Copy it again from its source, or rebuild it.",
    )


def _not_a_record(path: str, at: int, header: bytes) -> Damage:
    if at == 0 and (form := compression_of(header)):
        return Damage(
            path,
            "the uncompressed records",
            f"a compressed file ({form}), of which no record can be read by itself",
            "Decompress it, write it without compression, or read it as a stream.",
            compressed=True,
        )
    what = "this is no TFRecord file" if at == 0 else "the file is damaged there"
    return Damage(
        path,
        f"the length of a TFRecord and its checksum at byte {at}",
        f"{header!r}, which do not match: {what}",
        "Check the path, copy the file again, or rebuild it.",
    )


def _umask() -> int:
    # Linux tells it without setting it, which would race with other threads.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
