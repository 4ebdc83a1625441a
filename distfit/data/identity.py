"""What data are recognised by: the same files elsewhere, the same arrays in another process.

    of_arrays([x, y])          # {"arrays": "float32[60000,28,28], int64[60000]", "content": "blake2b 5f0e... of ..."}
    of_files(names, sizes)     # {"files": 16, "bytes": ..., "names and sizes": "blake2b ..."}

Values are plain, and short enough to be shown to a person where they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

# Of arrays: read in a third of a second. Beyond, blocks from all over them stand for the rest.
MOST_BYTES = 256 * 2**20
_BLOCK = 2**20
_DIGEST_BYTES = 8


def of_arrays(arrays: Sequence[Any], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Arrays by their types, shapes and content.

    Args:
        arrays: NumPy arrays, or what `np.asarray` makes one of.
        most_bytes: that are read. Of more, blocks of rows at equal distances are, and the value says so: a change
            between them is not seen.

    >>> of_arrays([np.zeros((3, 2), np.float32)])
    {'arrays': 'float32[3,2]', 'content': 'blake2b 6486575c0a237587 of 24 bytes'}
    """
    kept = [np.asarray(array) for array in arrays]
    total = sum(array.nbytes for array in kept)
    digest, read = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
    for array in kept:
        digest.update(f"{array.dtype}{array.shape}".encode())
        share = array.nbytes if total <= most_bytes else int(most_bytes * array.nbytes / total)
        for block in _blocks(array, share):
            digest.update(block)
            read += len(block)
    what = f"{read:,} bytes" if total <= most_bytes else f"blocks of {read:,} of {total:,} bytes"
    shapes = ", ".join(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in kept)
    return {"arrays": shapes, "content": f"blake2b {digest.hexdigest()} of {what}"}


def _blocks(array: np.ndarray, most_bytes: int) -> Iterator[bytes]:
    """All rows, or blocks of rows at equal distances with about so many bytes, and the first and last rows."""
    if not array.size:
        return
    array = np.atleast_1d(array)
    row_bytes = max(1, array.nbytes // len(array))
    rows = max(1, _BLOCK // row_bytes)
    starts = np.arange(0, len(array), rows)
    if most_bytes < array.nbytes:
        count = max(2, most_bytes // (rows * row_bytes))
        starts = np.unique(np.linspace(0, max(0, len(array) - rows), count).astype(np.int64))
    for start in starts.tolist():
        yield _octets(array[start : start + rows])


def _octets(rows: np.ndarray) -> bytes:
    # Of Python objects NumPy holds addresses.
    return "\0".join(map(str, rows.ravel())).encode() if rows.dtype.hasobject else rows.tobytes()


def of_files(names: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """Files by their names, without folders, and sizes in bytes, so that a copy is the same data.

    >>> of_files(["/here/a-00000-of-00002", "/here/a-00001-of-00002"], [10, 20])
    {'files': 2, 'bytes': 30, 'names and sizes': 'blake2b ddf67f69fa4e2dba'}
    """
    lines = "\n".join(f"{size} {PurePath(name).name}" for name, size in zip(names, sizes, strict=True))
    digest = hashlib.blake2b(lines.encode(errors="surrogateescape"), digest_size=_DIGEST_BYTES)
    return {"files": len(names), "bytes": sum(sizes), "names and sizes": f"blake2b {digest.hexdigest()}"}
