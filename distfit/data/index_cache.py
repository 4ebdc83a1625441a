"""The index of a set of files, scanned once: in parallel, kept beside the data, brought up to date by what changed.

    index = load_index(expand("data/digits/train-*"))
    index = load_index(files, fresh=True)              # believes nothing that was kept
    counts = count_records(files)                      # of compressed files too, which have no index

It is kept in `.distfit-index` in the files' folder, for all of the folder's shards. Where they lie in several
folders, in a remote one or in one that cannot be written, it is kept in the user's cache. A shard is scanned again
when its size or its time of change differs. What is kept is verified as a whole; what is damaged is made anew.
That a shard has another content at the same size and time is seen when its records are read (`data.reader`): each
must have the length and the checksum that the index says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from distfit.data import framing
from distfit.data.bad_records import BadRecord
from distfit.data.catalog import Catalog
from distfit.data.index import Index
from distfit.data.index_request import NAME as NAME
from distfit.data.index_request import Request, kept
from distfit.data.index_update import Count, updated
from distfit.data.records import Scan, scan_file
from distfit.errors import InputError
from distfit.monitor.counting import Counting, silent

Damaged: TypeAlias = Literal["raise", "keep"]


def load_index(
    files: Sequence[str],
    *,
    workers: int | None = None,
    count: Counting = silent,
    fresh: bool = False,
    damaged: Damaged = "raise",
) -> Index:
    """Where every record of the files lies.

    Args:
        files: paths, in the order in which their records are to be numbered.
        workers: threads that scan; by default one a core and four more, as they wait for the file system.
        count: shows how far it is.
        fresh: True scans all of them, whatever is kept.
        damaged: "raise" refuses a damaged file; "keep" takes the records before its first damage (behind a
            damaged length, no record can be found), says so in `Index.damaged`, and scans it again the next time.

    Raises:
        InputError: no files, no record, a file that cannot be read or is compressed, or one that is damaged.
    """
    request = Request.of(files, workers, offsets=True)
    old, rows = kept(request, fresh)
    if old is not None and (rows >= 0).all():
        return _index(request, old, rows, {})

    def examine(file: str) -> Scan:
        scan = scan_file(file)
        if scan.damage and (damaged == "raise" or scan.damage.compressed):
            raise scan.damage.error
        return scan

    new, damage = updated(request, old, rows, examine, count)
    return _index(request, new, new.rows(request.names), damage)


def count_records(
    files: Sequence[str], *, workers: int | None = None, count: Counting = silent, fresh: bool = False
) -> list[int]:
    """The number of records of each file; a compressed one is decompressed for it, once.

    Args:
        files, workers, count, fresh: as for `load_index`.

    Raises:
        InputError: no files, or one that cannot be read or is damaged.
    """
    request = Request.of(files, workers, offsets=False)
    old, rows = kept(request, fresh)
    if old is None or (rows < 0).any():
        old, _ = updated(request, old, rows, _counted, count)
        rows = old.rows(request.names)
    return old.shards["records"][rows].tolist()


def cached_counts(files: Sequence[str]) -> list[int] | None:
    """What `count_records` would return, if it had to read no file; else None.

    Raises:
        InputError: no files, or one that cannot be read.
    """
    request = Request.of(files, None, offsets=False)
    old, rows = kept(request)
    return None if old is None or (rows < 0).any() else old.shards["records"][rows].tolist()


def _counted(file: str) -> Scan | Count:
    scan = scan_file(file)
    if scan.damage is None:
        return scan
    if not scan.damage.compressed:
        raise scan.damage.error
    try:
        return Count(*framing.count_records(file))
    except BadRecord as error:
        raise InputError(str(error)) from error


def _index(request: Request, catalog: Catalog, rows: np.ndarray, damaged: dict[str, str]) -> Index:
    shards = catalog.shards[rows]
    starts = np.concatenate([[0], np.cumsum(shards["records"])])
    if not starts[-1]:
        file, reason = next(iter(damaged.items()))
        raise InputError(
            f"Expected whole records in {len(request.files)} TFRecord files, received none, in {file!r} because of "
            f"{reason}. Copy the files again from their source, or rebuild them."
        )
    return Index(
        request.files,
        starts,
        np.ascontiguousarray(shards["end"]),
        np.ascontiguousarray(shards["base"]),
        catalog.begins,
        digest=_digest(request, shards),
        path=catalog.path,
        seal=catalog.seal,
        damaged=damaged,
    )


def _digest(request: Request, shards: np.ndarray) -> str:
    names = request.names if request.folder else [os.path.basename(file) for file in request.files]
    content = hashlib.sha256(os.fsencode("\0".join(names)))
    for field in ("size", "time", "records", "framing"):
        content.update(shards[field].tobytes())
    return content.hexdigest()[:32]
