"""What a data set shall be made of, before any file of it is read: one row a record, in compact arrays.

    listing = folder_listing("pictures")            # or csv_listing, manifest_listing
    listing.paths(7), listing.where(7), listing.labels[7]
    listing.only(keeps)                             # without the rows that are none

A row takes its name and some 20 bytes; what a source knows beside that it reads again when the record is written.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from distfit.data.build.names import Names

IMAGE = "image"


@dataclass(frozen=True)
class Wrong:
    """What cannot be a record: where it was met, such as "'pictures/a.txt'", and why, after "it is"."""

    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class Listing(ABC):
    """The records of a source; each kind of source fills in how a row is read.

    Args:
        name: what they are, for `dataset.json`.
        classes: names; a label is a position among them.
        names: one for each record, each once.
        labels: one for each record, int32.
        given_split: for each record a position in `split.SPLITS`, int8; None splits by the seed.
        wrong: what was met that can be no record.
    """

    name: str
    classes: tuple[str, ...]
    names: Names
    labels: np.ndarray
    given_split: np.ndarray | None
    wrong: list[Wrong]

    # How a message says what was expected of all that is listed.
    expected: ClassVar[str] = "nothing but whole images that TensorFlow decodes"
    # Not known before the files are read.
    sizes: ClassVar[np.ndarray | None] = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def file_features(self) -> tuple[str, ...]:
        """The features that are files, all of them images."""
        return (IMAGE,)

    @property
    def unit(self) -> str:
        """What a row is called."""
        return "images" if self.file_features == (IMAGE,) else "records"

    @property
    def features(self) -> dict[str, str]:
        """Name and type of each feature of a record."""
        return {IMAGE: "bytes", "filename": "bytes", "label": "int64"}

    @abstractmethod
    def paths(self, number: int) -> list[str]:
        """The files of a record, one for each of `file_features`."""

    def where(self, number: int, path: str) -> str:
        """How a message names one of a record's files."""
        return repr(path)

    def rest(self, number: int) -> dict[str, Any]:
        """The features of a record that are neither files nor its label."""
        return {"filename": self.names.encoded(number)}

    @property
    def notes(self) -> list[str]:
        """Sentences that whoever builds should read."""
        return []

    @abstractmethod
    def check_classes(self) -> None:
        """
        Raises:
            InputError: a class has no record, and labels would shift when it went.
        """

    def only(self, keeps: np.ndarray, wrong: Iterable[Wrong] = ()) -> Self:
        """The records for which `keeps`, bool, is true; what is wrong is added to what was."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: value.only(keeps) for name, value in fields.items() if isinstance(value, Names)}
        kept |= {name: value[keeps] for name, value in fields.items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **{**fields, **kept, "wrong": [*self.wrong, *wrong]})

    def digest(self) -> hashlib.blake2b:
        """Of all that is listed; the files' sizes and times can be added."""
        digest = hashlib.blake2b()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Names):
                value.update(digest)
            else:
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        return digest


def without_record(listing: Listing) -> np.ndarray:
    """Labels of the classes that no record has."""
    return np.flatnonzero(np.bincount(listing.labels, minlength=len(listing.classes)) == 0)
