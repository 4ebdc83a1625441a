"""What an index is wanted of, where it may be kept, and what is kept there already.

request = Request.of(files, workers=None, offsets=True)
catalog, rows = kept(request)          # rows[k] < 0: the k-th file has to be scanned
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distfit.data import storage
from distfit.data.ahead import ahead
from distfit.data.catalog import Catalog, Stamp, load
from distfit.errors import InputError
from distfit.install.cache import cache_root
from distfit.log import warn_once

NAME = ".distfit-index"
_STAMPS_AT_A_TIME = 256


@dataclass(frozen=True)
class Request:
    """The files as they are now.

    Args:
        files: their paths.
        folder: that all of them lie in; "" if there are several.
        names: under which they are kept: those in the folder, else paths.
        stamps: their sizes and times (`catalog.Stamp`), int64, shape [files, 2].
        places: where their index may be kept, the best first.
        workers: threads to use.
        offsets: whether it has to be known where their records lie, or only how many they are.
    """

    files: tuple[str, ...]
    folder: str
    names: list[str]
    stamps: np.ndarray
    places: list[str]
    workers: int | None
    offsets: bool

    @staticmethod
    def of(files: Sequence[str], workers: int | None, offsets: bool) -> Request:
        """
        Raises:
            InputError: no files, or one that cannot be found.
        """
        if not files:
            raise InputError("Expected at least one TFRecord file, received none. Name a file or a folder.")
        paths = [file if storage.is_remote(file) else os.path.abspath(file) for file in files]
        folders = sorted({os.path.dirname(path) for path in paths})
        folder = folders[0] if len(folders) == 1 else ""
        names = [os.path.basename(path) for path in paths] if folder else paths
        return Request(tuple(files), folder, names, _stamps(paths, workers), _places(folders), workers, offsets)


def _stamps(paths: list[str], workers: int | None) -> np.ndarray:
    # A hundred or so at a time: on a network file system each takes a while, on a disk hardly any time at all.
    parts = [paths[start : start + _STAMPS_AT_A_TIME] for start in range(0, len(paths), _STAMPS_AT_A_TIME)]
    return np.concatenate(list(ahead(_stamps_of, parts, workers)))


def _stamps_of(paths: list[str]) -> np.ndarray:
    return np.array([_stamp(path) for path in paths], np.int64)


def _stamp(path: str) -> Stamp:
    try:
        return Stamp(*storage.size_and_time(path))
    except OSError as error:
        raise storage.unreadable(path, error) from error


def _places(folders: list[str]) -> list[str]:
    beside = [os.path.join(folders[0], NAME)] if len(folders) == 1 and not storage.is_remote(folders[0]) else []
    key = hashlib.sha256(os.fsencode("\0".join(folders))).hexdigest()[:32]
    try:
        return [*beside, str(cache_root(os.environ) / "index" / key)]
    except RuntimeError:  # a user without a home
        return beside


def kept(request: Request, fresh: bool = False) -> tuple[Catalog | None, np.ndarray]:
    """Of what is kept, that which has most of the files; and for each its row there, -1 where it has to be scanned."""
    nothing = np.full(len(request.files), -1)
    best, rows = None, nothing
    for place in request.places:
        catalog = _load(place)
        if catalog is None:
            continue
        found = catalog.rows(request.names, request.stamps, request.offsets)
        if best is None or (found >= 0).sum() > (rows >= 0).sum():
            best, rows = catalog, found
    return best, nothing if fresh else rows


def _load(place: str) -> Catalog | None:
    try:
        return load(place)
    except ValueError as error:
        received = f"{error}"
    except OSError as error:
        received = f"{error.strerror}"
    warn_once(f"Expected an index of TFRecord files in {place!r}, received {received}. It is made anew.")
    return None
