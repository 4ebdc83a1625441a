"""Which files hold the records, and where each record lies.

    index = build_index(expand("data/digits/train-*"))
    len(index), index.total_bytes
    same = Index.from_bytes(index.to_bytes())     # the chief scans, the others receive

Record number n is the n-th record of the files in their sorted order.
"""

import glob
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distfit.data.records import scan
from distfit.errors import InputError, nearest

_SHARD = re.compile(r"(?P<split>.+)-(?P<shard>\d{5,})-of-(?P<shards>\d{5,})(?P<ending>\.tfrecords?|\.tfrec|)")
_ENDINGS = (".tfrecord", ".tfrecords", ".tfrec")


@dataclass(frozen=True, eq=False)
class Index:
    """Where every record of a set of files lies.

    Args:
        files: paths, in the order in which their records are numbered.
        file_of: for each record its position in `files`, int32, shape [records].
        offsets: for each record where its payload begins in its file, bytes, int64.
        lengths: for each record the length of its payload, bytes, int64.
    """

    files: tuple[str, ...]
    file_of: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def total_bytes(self) -> int:
        """Bytes of all payloads, without the framing."""
        return int(self.lengths.sum())

    def to_bytes(self) -> bytes:
        """The index as bytes that `from_bytes` reads, 20 for each record, no pickle."""
        buffer = io.BytesIO()
        names = np.array([os.fsencode(name).hex() for name in self.files])
        np.savez(buffer, files=names, file_of=self.file_of, offsets=self.offsets, lengths=self.lengths)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Index":
        """The index that `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            names = tuple(os.fsdecode(bytes.fromhex(name)) for name in arrays["files"])
            return Index(names, arrays["file_of"], arrays["offsets"], arrays["lengths"])


def build_index(files: Sequence[str]) -> Index:
    """Scans the files, in the given order.

    Raises:
        InputError: no files, or one that is no whole TFRecord file (see `records.scan`).
    """
    if not files:
        raise InputError("Expected at least one TFRecord file, received none. Name a file or a folder.")
    scanned = [scan(file) for file in files]
    counts = [len(offsets) for offsets, _ in scanned]
    return Index(
        files=tuple(files),
        file_of=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        offsets=np.concatenate([offsets for offsets, _ in scanned]),
        lengths=np.concatenate([lengths for _, lengths in scanned]),
    )


def expand(files: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """The sorted files that a folder, a pattern or a list of files means.

    A folder means the TFRecord files in it, of which there must be one split only. Files that are named as
    shards (`train-00003-of-00008.tfrecord`) must be all there, unless exactly one file is named.

    Raises:
        InputError: nothing there, several splits in a folder, a file twice, or shards missing.
    """
    if isinstance(files, (str, os.PathLike)):
        path = os.fspath(files)
        if os.path.isfile(path):
            return [path]
        found = _in_folder(path) if os.path.isdir(path) else _matching(path)
    else:
        found = [_existing(os.fspath(file)) for file in files]
        _refuse_repeated(found)
    _refuse_missing_shards(found)
    return sorted(found)


def is_record_file(name: str) -> bool:
    """Whether a file in a folder is taken for a TFRecord file, by its name.

    >>> [is_record_file(n) for n in ("a.tfrecord", "train-00000-of-01024", "dataset.json", ".a.tfrecord")]
    [True, True, False, False]
    """
    return not name.startswith(".") and (name.endswith(_ENDINGS) or _SHARD.fullmatch(name) is not None)


def _in_folder(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if is_record_file(name))
    if not names:
        raise InputError(
            f"Expected TFRecord files ({', '.join('*' + ending for ending in _ENDINGS)} or shards named "
            f"NAME-00000-of-00008) in the folder {folder!r}, received {_listing(folder)}. "
            "Name another folder, or a pattern that matches the files."
        )
    splits = sorted({match["split"] for name in names if (match := _SHARD.fullmatch(name))})
    if len(splits) > 1:
        raise InputError(
            f"Expected one split in the folder {folder!r}, received {', '.join(splits)}. Name the one you "
            f"mean by a pattern, as in {os.path.join(folder, splits[0] + '-*')!r}."
        )
    return [os.path.join(folder, name) for name in names]


def _matching(pattern: str) -> list[str]:
    if "://" in pattern:
        raise InputError(
            f"Expected a path of a file system that is mounted here, received {pattern!r}. "
            "Copy the files, or mount the bucket."
        )
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise InputError(f"Expected TFRecord files at {pattern!r}, received none: {_what_is_there(pattern)}")
    return found


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise InputError(f"Expected TFRecord files, received {path!r} in their list: {_what_is_there(path)}")
    return path


def _what_is_there(path: str) -> str:
    """The nearest thing that exists, for somebody who mistyped one part of a path."""
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    here = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    hint = nearest(name, here) if 0 < len(here) <= 5 or _close(name, here) else f"{_listing(folder)}."
    return f"there is no {name!r} in {folder!r}; {hint}"


def _close(name: str, entries: list[str]) -> bool:
    return bool(entries) and nearest(name, entries).startswith("did you mean")


def _listing(folder: str, most: int = 5) -> str:
    here = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    if not here:
        return "an empty folder"
    more = f" and {len(here) - most} more" if len(here) > most else ""
    return f"a folder with {', '.join(here[:most])}{more}"


def _refuse_repeated(files: list[str]) -> None:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise InputError(
                f"Expected each file once, received {file!r} twice: its records would count double. "
                "Remove one of them from the list."
            )
        seen.add(real)


def _refuse_missing_shards(files: list[str]) -> None:
    present: dict[tuple[str, str, str, str], set[int]] = {}
    for file in files:
        folder, name = os.path.split(file)
        if match := _SHARD.fullmatch(name):
            key = (folder, match["split"], match["shards"], match["ending"])
            present.setdefault(key, set()).add(int(match["shard"]))
    for (folder, split, shards, ending), numbers in sorted(present.items()):
        missing = sorted(set(range(int(shards))) - numbers)
        if missing:
            names = [f"{split}-{number:0{len(shards)}d}-of-{shards}{ending}" for number in missing[:5]]
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"Expected all {int(shards)} shards of {os.path.join(folder, split)!r}, received "
                f"{len(numbers)}: missing {', '.join(names)}{more}. Restore them, or, to use only a part of "
                f"the data, link that part under names without '-of-{shards}'."
            )
