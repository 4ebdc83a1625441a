"""TFRecord files without TensorFlow: write them whole, find every record, read any one and verify it.

    count = write_records("train-00000-of-00008.tfrecord", payloads)
    offsets, lengths = scan("train-00000-of-00008.tfrecord")
    payload = read_at(fd, int(offsets[5]), int(lengths[5]), name)

A record is a little-endian uint64 length, the masked CRC-32C of those eight bytes, the payload, and the
masked CRC-32C of the payload. Nothing is taken on trust: `scan` verifies every length and the end of the
file, `read_at` every payload.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import google_crc32c
import numpy as np

from distfit.errors import InputError, RunError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
# First bytes of gzip and of zlib streams, TFRecord's two compressed forms.
_COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")


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
        with os.fdopen(fd, "wb") as file:
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
            length = _LENGTH.pack(len(payload))
            file.write(length + _FOOTER.pack(masked_crc(length)))
            file.write(payload)
            file.write(_FOOTER.pack(masked_crc(payload)))
            count += 1
    return count


def scan(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Where the payloads of a TFRecord file lie: (offsets, lengths) in bytes, both int64.

    Reads 12 bytes for each record, not the payloads.

    Raises:
        InputError: the file cannot be read, is empty, is no TFRecord file, is compressed, or is cut off.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb", buffering=0) as file:
            return _scan(path, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InputError(
            f"Expected a TFRecord file that can be read, received {path!r}: {error.strerror}. "
            "Check the path and its permissions."
        ) from error


def read_at(fd: int, offset: int, length: int, name: str) -> bytes:
    """One payload, verified; safe to call from several threads.

    Args:
        fd: an open file descriptor; its position is neither used nor moved.
        offset: where the payload begins, bytes, from `scan`.
        length: its length, bytes, from `scan`.
        name: the file's name, for the message.

    Raises:
        RunError: the payload is cut off or differs from its checksum.
    """
    data = os.pread(fd, length + _FOOTER.size, offset)
    payload = data[:length]
    if len(data) < length + _FOOTER.size or _FOOTER.unpack_from(data, length)[0] != masked_crc(payload):
        raise RunError(
            f"Expected a record of {length} bytes at byte {offset} of {name!r}, received {len(payload)} "
            "that do not match their checksum: the file is damaged or has changed since it was indexed. "
            "Copy it again from its source, or rebuild the data set."
        )
    return payload


def _scan(path: str, fd: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    if size == 0:
        raise InputError(
            f"Expected at least one record in {path!r}, received an empty file (0 bytes). Rebuild it, or leave it out."
        )
    offsets, lengths, at = [], [], 0
    while at < size:
        length = _length_at(path, fd, at, size)
        offsets.append(at + _HEADER.size)
        lengths.append(length)
        at += _HEADER.size + length + _FOOTER.size
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def _length_at(path: str, fd: int, at: int, size: int) -> int:
    header = os.pread(fd, _HEADER.size, at)
    if len(header) == _HEADER.size:
        length, crc = _HEADER.unpack(header)
        if crc != masked_crc(header[: _LENGTH.size]):
            raise _not_a_record(path, at, header)
        if at + _HEADER.size + length + _FOOTER.size <= size:
            return length
        expected = f"a record of {length} bytes"
    elif at == 0:
        raise _not_a_record(path, at, header)
    else:
        expected = "the header of a record (12 bytes)"
    raise InputError(
        f"Expected {expected} at byte {at} of {path!r}, received the end of the file at byte {size}: "
        "the file is cut off. Copy it again from its source, or rebuild it."
    )


def _not_a_record(path: str, at: int, header: bytes) -> InputError:
    # A good record can begin with these bytes too, so they only explain a checksum that failed.
    if at == 0 and header[:2] in _COMPRESSED:
        return InputError(
            f"Expected an uncompressed TFRecord file, received {path!r}, which is compressed: records must "
            "be uncompressed, to be read in any order. Decompress it, or write it without compression."
        )
    what = "this is no TFRecord file" if at == 0 else "the file is damaged there"
    return InputError(
        f"Expected the length of a TFRecord and its checksum at byte {at} of {path!r}, received {header!r}, "
        f"which do not match: {what}. Check the path, copy the file again, or rebuild it."
    )


def _umask() -> int:
    # Linux tells it without setting it, which would race with other threads.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
