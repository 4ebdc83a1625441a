"""Records out of a stream of bytes: for files that are compressed, or of which only the next bytes can be had.

    for item in read_shard("train-00003.tfrecord.gz"):      # bytes, or a BadRecord in place of each that is damaged
        ...

A damaged payload costs one record. Where the framing or the compression is damaged nobody knows where the next record
begins: the last item is then a `Lost`. What cannot be read for other reasons (a disk or a network that fails) is no
bad record, and raises.

The form of compression is that of `tf.io.TFRecordOptions`: GZIP (RFC 1952, also of several members) or ZLIB (RFC 1950)
around the whole file. A file is held neither compressed nor expanded: at most `PIECE` bytes of each, and one record.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import google_crc32c

from distfit.data.bad_records import BadRecord
from distfit.data.records import HEADER_BYTES, compression_of, header_of, masked_crc
from distfit.data.storage import chunks, open_file, unreadable
from distfit.errors import RunError

Compression: TypeAlias = Literal["auto", "GZIP", "ZLIB"] | None
COMPRESSIONS = ("auto", "GZIP", "ZLIB", None)

# Bytes that are read at a time, and that a decompressor may make of them at a time: a kilobyte of zeros that were
# compressed well becomes a megabyte.
PIECE = 2**20

_LENGTH_BYTES, _CRC_BYTES = 8, 4
# What zlib calls the form of a stream, with the largest window.
_FORMS = {"GZIP": 16 + zlib.MAX_WBITS, "ZLIB": zlib.MAX_WBITS}


class Lost(BadRecord):
    """A record that cannot be read, nor can what comes after it in its file."""


class Damaged(Exception):
    """Why a stream cannot be read on, in words that follow "received"."""


def read_shard(file: str, compression: Compression = "auto") -> Iterator[bytes | BadRecord]:
    """The records of a file, one after the other, each verified.

    Args:
        file: a path, or an address of a file system that TensorFlow has (`gs://...`).
        compression: "auto" looks at the first bytes of the file.

    Raises:
        RunError: the file cannot be read; that it is not there or empty is a `Lost` instead.
    """
    try:
        yield from _shard(file, chunks(file, PIECE), compression)
    except FileNotFoundError:
        yield Lost(file, None, None, "nothing: the file is not there")
    except OSError as error:
        raise RunError(
            f"Expected to read {file!r}, received: {error.strerror or error}. Check the storage and its permissions."
        ) from error


def count_records(file: str, compression: Compression = "auto") -> tuple[int, int]:
    """The records of a file, and the CRC-32C of their headers, one after the other; the file is read to its end.

    Raises:
        BadRecord: one of them is damaged.
        RunError: the file cannot be read.
    """
    count, headers = 0, 0
    for item in read_shard(file, compression):
        if isinstance(item, BadRecord):
            raise item
        headers = google_crc32c.extend(headers, header_of(len(item)))
        count += 1
    return count, headers


def is_compressed(file: str) -> bool:
    """Whether a file has to be read as a stream because of its form.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return compression_of(open_file(file).read_at(0, HEADER_BYTES)) is not None
    except OSError as error:
        raise unreadable(file, error) from error


def expanded(pieces: Iterator[bytes], form: str) -> Iterator[bytes]:
    """What comes out of compressed pieces, at most `PIECE` bytes at a time.

    Args:
        pieces: of the whole file, of any length.
        form: "GZIP" or "ZLIB".

    Raises:
        Damaged: the compression is damaged or cut off.
    """
    try:
        inflate = zlib.decompressobj(_FORMS[form])
        for piece in pieces:
            while piece:
                if inflate.eof and form == "GZIP":  # files put one after the other are one
                    inflate = zlib.decompressobj(_FORMS[form])
                elif inflate.eof:
                    raise Damaged("bytes after the end of the compressed stream")
                yield inflate.decompress(piece, PIECE)
                piece = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        yield inflate.flush()
    except zlib.error as error:
        raise Damaged(f"bytes that are not {form} ({error})") from error
    if not inflate.eof:
        raise Damaged(f"the end of the file within its {form} stream")


def _shard(file: str, pieces: Iterator[bytes], compression: Compression) -> Iterator[bytes | BadRecord]:
    first = next(pieces, b"")
    if not first:
        yield Lost(file, None, None, "an empty file (0 bytes)")
        return
    pieces = itertools.chain([first], pieces)
    form = compression_of(first) if compression == "auto" else compression
    yield from _records(file, _Bytes(pieces if form is None else expanded(pieces, form)))


def _records(file: str, stream: _Bytes) -> Iterator[bytes | BadRecord]:
    number, begin = 0, 0
    try:
        while header := stream.read(HEADER_BYTES):
            payload, crc = _payload(stream, header, number)
            if crc == masked_crc(payload).to_bytes(_CRC_BYTES, "little"):
                yield payload
            else:
                yield BadRecord(file, number, begin + HEADER_BYTES, "bytes that do not match their checksum")
            number, begin = number + 1, stream.offset
    except Damaged as damage:
        what = f"{damage}: what comes after the first {number} records of this file is lost"
        yield Lost(file, number, begin + HEADER_BYTES, what)


def _payload(stream: _Bytes, header: bytes, number: int) -> tuple[bytes, bytes]:
    """The payload behind a header, and its checksum."""
    length = _length_in(header)
    if length is None:
        raise Damaged(_no_length(header, number))
    payload, crc = stream.read(length), stream.read(_CRC_BYTES)
    if len(crc) < _CRC_BYTES:
        raise Damaged("the end of the file")
    return payload, crc


def _length_in(header: bytes) -> int | None:
    """The length of the payload that follows, None if it does not match its checksum."""
    length = int.from_bytes(header[:_LENGTH_BYTES], "little")
    return length if header == header_of(length) else None


def _no_length(header: bytes, number: int) -> str:
    if number == 0:
        form = compression_of(header)
        what = f"is compressed ({form})" if form else "is no TFRecord file"
        return f"{header!r}, with which no TFRecord begins (this file {what})"
    if len(header) < HEADER_BYTES:
        return "the end of the file"
    return f"{header!r}, a length that does not match its checksum"


class _Bytes:
    """Pieces of any length, read in other lengths.

    Attributes:
        offset: bytes that were read.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.offset = 0
        self._pieces = pieces
        self._held = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next bytes; fewer only at the end."""
        if self._at + size > len(self._held):
            self._fetch(size)
        data = self._held[self._at : self._at + size]
        self._at += len(data)
        self.offset += len(data)
        return data

    def _fetch(self, size: int) -> None:
        # Joined once: a record of many pieces that grew by one after the other would be copied as many times.
        parts = [self._held[self._at :]]
        held = len(parts[0])
        while held < size and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            held += len(piece)
        self._held, self._at = b"".join(parts), 0
