"""Records listed in a file of JSON lines, an object each: files, numbers and texts under one key.

    {"key": "7", "label": "cat", "split": "train", "files": {"image": "a.jpg", "mask": "a_mask.png"},
     "features": {"age": 3.0, "words": [1, 2, 3], "caption": "a cat"}}              (all on one line)

    listing = manifest_listing("records.jsonl", "pictures")

`key` and `label` have to be there. The first record says which files and features all have, and of what type: a
number with a point is float32, a whole one int64, a text bytes in UTF-8; a list has several of one kind, and a list
of lists a shape. A flat list may have another length in each record. Files are images.

Of a line its place in the file is kept, and it is read again when it is needed, held against its checksum.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from distfit.data.build.csv_list import Listed, listed_fields
from distfit.data.build.lines import Row, class_names, gather
from distfit.data.build.listing import Wrong
from distfit.data.build.values import NotAValue, Type, stored, type_of
from distfit.errors import InputError, RunError, nearest

_FIELDS = ("key", "label", "split", "files", "features")
_OWN = ("key", "label")


@dataclass(frozen=True, eq=False)
class Manifest(Listed):
    """Records of a manifest.

    Args:
        files: features that are files.
        types: of the other features.
        places: for each record where its line begins, its length and its CRC-32C, int64 [records, 3].
    """

    files: tuple[str, ...]
    types: dict[str, Type]
    places: np.ndarray

    expected = "records with whole images, each once, of a known class and like the first"

    @property
    def file_features(self) -> tuple[str, ...]:
        return self.files

    @property
    def features(self) -> dict[str, str]:
        own = {"key": "bytes", "label": "int64"}
        return dict.fromkeys(self.files, "bytes") | {name: str(of) for name, of in self.types.items()} | own

    @property
    def notes(self) -> list[str]:
        varying = [name for name, of in self.types.items() if of.shape is None]
        return [f"{name!r} has another length in some records; it is stored as {self.types[name]}." for name in varying]

    def paths(self, number: int) -> list[str]:
        if not self.files:
            return []
        files = self._record(number)["files"]
        return [os.path.join(self.root, files[feature]) for feature in self.files]

    def rest(self, number: int) -> dict[str, Any]:
        values = self._record(number)["features"] if self.types else {}
        return {name: stored(values[name], of) for name, of in self.types.items()} | {"key": self.names.encoded(number)}

    def _record(self, number: int) -> dict[str, Any]:
        start, length, checksum = self.places[number].tolist()
        with open(self.file, "rb") as file:
            file.seek(start)
            line = file.read(length)
        if google_crc32c.value(line) != checksum:
            raise RunError(
                f"Expected line {self.lines[number]} of {self.file!r} as it was when the build began, received "
                "another one. Build again when nobody writes to the file."
            )
        return json.loads(line)


def manifest_listing(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None, classes: str | os.PathLike | None = None
) -> Manifest:
    """The records of a manifest; the arguments are those of `build_manifest`.

    Raises:
        InputError: the file cannot be read, its first record says no types, or no line can be used.
    """
    file, known = os.fspath(path), None if classes is None else class_names(classes)
    form = _Form(file)
    try:
        with open(file, "rb") as lines:
            gathered = gather(_rows(lines, form), known, file)
    except OSError as error:
        raise InputError(f"Expected a manifest in {file!r}, received: {error.strerror}. Correct the path.") from error
    return Manifest(
        name=f"records of {os.path.basename(file)!r}",
        **listed_fields(gathered, file, image_root, closed=known is not None),
        files=form.files,
        types=form.types,
        places=gathered.numbers[:, 1:],
    )


def _rows(lines: BinaryIO, form: "_Form") -> Iterator[Row | Wrong]:
    at = 0
    for number, line in enumerate(lines, 1):
        start, at = at, at + len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_constant)
            form.check(record)
        except (_NotARecord, NotAValue) as reason:
            if not form.known:
                raise InputError(
                    f"Expected a record in line {number} of {form.file!r}, the first, which says what all have, "
                    f"received one that is {reason}. Correct it."
                ) from reason
            yield Wrong(f"line {number} of {form.file!r}", str(reason))
        except ValueError as error:  # of JSON, and of text that is no UTF-8
            if not form.known:
                raise InputError(f"Expected JSON in line {number} of {form.file!r}, received: {error}.") from error
            yield Wrong(f"line {number} of {form.file!r}", f"no JSON ({error})")
        else:
            place = (start, len(line), google_crc32c.value(line))
            yield Row(number, record["key"], str(record["label"]), record.get("split"), place)


class _NotARecord(Exception):
    """An object that cannot be a record; the text says why, after "it is"."""


@dataclass
class _Form:
    """What the first record has, and so have to have all."""

    file: str
    files: tuple[str, ...] = ()
    types: dict[str, Type] = field(default_factory=dict)
    split: bool = False
    known: bool = False

    def check(self, record: Any) -> None:
        """
        Raises:
            _NotARecord: it is none, or has other parts than the first.
            NotAValue: a feature has another type.
        """
        _check_fields(record)
        files, features = record.get("files", {}), record.get("features", {})
        if not self.known:
            _check_names([*files, *features])
            self.types = {name: type_of(name, value) for name, value in features.items()}
            self.files, self.split, self.known = tuple(files), "split" in record, True
            return
        if self.split != ("split" in record):
            raise _NotARecord(f"an object {'without' if self.split else 'with'} a split, other than the first record")
        _check_same("the file", self.files, files)
        _check_same("the feature", self.types, features)
        self.types |= {name: self.types[name].also(name, value) for name, value in features.items()}


def _check_fields(record: Any) -> None:
    if not isinstance(record, dict):
        raise _NotARecord("no object")
    unknown = [name for name in record if name not in _FIELDS]
    if unknown:
        raise _NotARecord(f"an object with {unknown[0]!r}; {nearest(unknown[0], list(_FIELDS))}")
    if not isinstance(record.get("key"), str) or not record["key"]:
        raise _NotARecord(f"an object whose key is no text, but {record.get('key')!r}")
    if not isinstance(record.get("label"), str | int) or isinstance(record["label"], bool) or record["label"] == "":
        raise _NotARecord(f"an object whose label is no name of a class, but {record.get('label')!r}")
    if not isinstance(record.get("split", ""), str):
        raise _NotARecord(f"an object whose split is no text, but {record['split']!r}")
    for part in ("files", "features"):
        if not isinstance(record.get(part, {}), dict):
            raise _NotARecord(f"an object whose {part} are no object, but {record[part]!r}")
    for name, path in record.get("files", {}).items():
        if not isinstance(path, str) or not path:
            raise _NotARecord(f"an object whose file {name!r} is no path, but {path!r}")


def _check_names(names: list[str]) -> None:
    for position, name in enumerate(names):
        if name in _OWN or name in names[:position] or not name:
            raise _NotARecord(f"an object that uses the name {name!r} twice, or for a part of its own")


def _check_same(what: str, first: Any, here: Any) -> None:
    missing = [name for name in first if name not in here]
    more = [name for name in here if name not in first]
    if missing or more:
        name, word = (missing[0], "without") if missing else (more[0], "with")
        raise _NotARecord(f"an object {word} {what} {name!r}, other than the first record")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number in JSON")
