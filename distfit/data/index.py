"""Where each record of a set of files lies.

    index = load_index(expand("data/digits/train-*"))     # data.index_cache
    len(index), index.total_bytes
    file_of, offsets, lengths = index.locate(np.array([17, 3, 99_000]))
    same = Index.from_bytes(index.to_bytes())             # the chief scans, the others receive

Record number n is the n-th record of the files in their sorted order. An index takes 8 bytes a record: in memory
where that is little, else in a file that is mapped into it, so that what a process holds grows with the number of
files only.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distfit.data import catalog
from distfit.data.records import FRAME_BYTES, HEADER_BYTES
from distfit.errors import RunError

_ARRAYS = ("starts", "ends", "bases")


@dataclass(frozen=True, eq=False)
class Index:
    """Where every record of a set of files lies; made by `index_cache.load_index`.

    Args:
        files: paths, in the order in which their records are numbered.
        starts: the number of each file's first record, and the number of all records; int64, shape [files + 1].
        ends: where the last record of each file ends, bytes, int64, shape [files].
        bases: the position of each file's first record in `begins`, int64, shape [files].
        begins: where each record begins in its file, header included, bytes, int64; other files' may be among them.
        digest: of the files' names (without folders), sizes, times of change, and all lengths of records: another
            data set has another one.
        path, seal: the file that `begins` is kept in, and what that file must still be; "" when in memory only.
        damaged: for each file of which only the records before its damage are here, what is wrong with it.
    """

    files: tuple[str, ...]
    starts: np.ndarray
    ends: np.ndarray
    bases: np.ndarray
    begins: np.ndarray
    digest: str
    path: str = ""
    seal: str = ""
    damaged: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def total_bytes(self) -> int:
        """Bytes of all payloads, without the framing."""
        return int(self.ends.sum()) - FRAME_BYTES * len(self)

    def locate(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where records lie, in any order: (file_of, offsets, lengths), int64.

        Args:
            records: their numbers, from 0.

        Returns:
            The position of each one's file in `files`, and where its payload begins and how long it is, bytes.

        Raises:
            IndexError: there is no such record.
        """
        records = np.asarray(records, np.int64)
        if len(records) and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"records {records.min()} to {records.max()} of {len(self)}")
        file_of = np.searchsorted(self.starts, records, side="right") - 1
        place = self.bases[file_of] + records - self.starts[file_of]
        begins = self.begins[place]
        last = records + 1 == self.starts[file_of + 1]
        ends = np.where(last, self.ends[file_of], self.begins[np.where(last, place, place + 1)])
        return file_of, begins + HEADER_BYTES, ends - begins - FRAME_BYTES

    def of_file(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the payloads of one file begin, and their lengths, bytes, int64: (offsets, lengths)."""
        begins = self._begins_of(number)
        return begins + HEADER_BYTES, np.diff(begins, append=self.ends[number]) - FRAME_BYTES

    def to_bytes(self, most: int = catalog.MOST_IN_MEMORY) -> bytes:
        """The index as bytes that `from_bytes` reads, no pickle.

        Args:
            most: up to so many bytes of offsets travel along, 8 for each record. Beyond, the other side maps the
                file that they are kept in.
        """
        facts = {"digest": self.digest, "path": self.path, "seal": self.seal, "damaged": dict(self.damaged)}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if not self.path or 8 * len(self) <= most:
            arrays["bases"] = self.starts[:-1]
            arrays["begins"] = np.concatenate([self._begins_of(number) for number in range(len(self.files))])
        arrays["names"] = _octets(os.fsencode("\0".join(self.files)))
        buffer = io.BytesIO()
        np.savez(buffer, facts=_octets(json.dumps(facts).encode()), **arrays)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Index:
        """The index that `to_bytes` wrote.

        Raises:
            RunError: its offsets stayed in a file that is not to be had here.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            names = tuple(os.fsdecode(arrays["names"].tobytes()).split("\0"))
            kept = {name: arrays[name] for name in _ARRAYS}
            if "begins" in arrays:
                begins, facts["path"], facts["seal"] = arrays["begins"], "", ""
            else:
                begins = _mapped(facts["path"], facts["seal"])
        return Index(names, **kept, begins=begins, **facts)

    def _begins_of(self, number: int) -> np.ndarray:
        count = self.starts[number + 1] - self.starts[number]
        return self.begins[self.bases[number] : self.bases[number] + count]


def _octets(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _mapped(path: str, seal: str) -> np.ndarray:
    try:
        return catalog.begins_in(path, seal)
    except (OSError, ValueError) as error:
        raise RunError(
            f"Expected every process to find the index of the records that the chief uses, in {path!r}, received: "
            f"{error}. Put the data, or the user's cache (XDG_CACHE_HOME), on a file system that all hosts see under "
            "the same path, and let nobody rebuild the index while a run starts."
        ) from error
