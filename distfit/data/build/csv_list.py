"""Images listed in a CSV file, a line each: its path, its class, and perhaps its split.

image,label,split
birds/1.jpg,robin,train

listing = csv_listing("labels.csv", "pictures")
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from distfit.data.build.lines import Gathered, Row, class_names, gather, line_of
from distfit.data.build.listing import Listing, Wrong, without_record
from distfit.errors import InputError

DELIMITERS = ",;\t|"
# As people type it.
_TAB = {"tab": "\t", "\\t": "\t"}


@dataclass(frozen=True)
class Columns:
    """Names of columns in the header.

    Args:
        image: paths of images.
        label: names of classes.
        split: train, validation or test; None takes the column `split` if there is one.
    """

    image: str = "image"
    label: str = "label"
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Columns":
        """
        >>> Columns.parse("file,species")
        Columns(image='file', label='species', split=None)

        Raises:
            InputError: it names fewer than two or more than three.
        """
        names = text.split(",")
        if not 2 <= len(names) <= 3 or "" in names:
            raise InputError(
                f"Expected the names of two or three columns, IMAGE,LABEL or IMAGE,LABEL,SPLIT, received {text!r}."
            )
        return cls(*names)


@dataclass(frozen=True, eq=False)
class Listed(Listing):
    """Records that are lines of a file.

    Args:
        file: its path.
        root: what paths in it are relative to.
        closed: whether classes were named, so that one may be without a record.
        lines: the line of each record.
    """

    file: str
    root: str
    closed: bool
    lines: np.ndarray

    expected = "whole images that TensorFlow decodes, each once and of a known class"

    def paths(self, number: int) -> list[str]:
        return [os.path.join(self.root, self.names[number])]

    def where(self, number: int, path: str) -> str:
        return line_of(self.file, int(self.lines[number]), path)

    def check_classes(self) -> None:
        trained = self if self.given_split is None else self.only(self.given_split == 0)
        empty = without_record(trained)
        if empty.size and not self.closed:
            raise InputError(
                f"Expected a training record of every class in {self.file!r}, received none of "
                f"{self.classes[empty[0]]!r} ({empty.size} of {len(self.classes)}). Correct the file, or name all "
                "classes with --classes."
            )


def csv_listing(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    columns: Columns = Columns(),
    delimiter: str | None = None,
    classes: str | os.PathLike | None = None,
) -> Listed:
    """The images that a CSV file lists; the arguments are those of `build_csv`.

    Raises:
        InputError: the file cannot be read, has no such columns, or no line that can be used.
    """
    file, known = os.fspath(path), None if classes is None else class_names(classes)
    delimiter = _TAB.get(delimiter or "", delimiter)
    if delimiter is not None and len(delimiter) != 1:
        raise InputError(f"Expected one sign between columns, or tab, received {delimiter!r}.")
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            gathered = gather(_rows(file, text, columns, delimiter), known, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"Expected a CSV file in UTF-8 in {file!r}, received: {reason}. Correct it.") from error
    return Listed(
        name=f"images of {os.path.basename(file)!r}",
        **listed_fields(gathered, file, image_root, closed=known is not None),
    )


def listed_fields(gathered: Gathered, file: str, image_root: str | os.PathLike | None, closed: bool) -> dict[str, Any]:
    """The fields of a `Listed` that every list of lines has, by name."""
    return {
        "classes": gathered.classes,
        "names": gathered.names,
        "labels": gathered.labels,
        "given_split": gathered.given_split,
        "wrong": gathered.wrong,
        "file": file,
        "root": os.path.dirname(file) if image_root is None else os.fspath(image_root),
        "closed": closed,
        "lines": gathered.numbers[:, 0],
    }


def _rows(file: str, text: TextIO, columns: Columns, delimiter: str | None) -> Iterator[Row | Wrong]:
    header = text.readline()
    delimiter = delimiter or _delimiter(header, columns)
    names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
    image, label, split = _positions(file, names, columns)
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    for fields in reader:
        line = reader.line_num + 1  # behind the header
        if not fields:
            continue
        if len(fields) != len(names):
            yield Wrong(f"line {line} of {file!r}", f"of {len(fields)} columns, where the first has {len(names)}")
        elif not fields[image] or not fields[label]:
            yield Wrong(f"line {line} of {file!r}", f"without {'an image' if not fields[image] else 'a label'}")
        else:
            yield Row(line, fields[image], fields[label], None if split is None else fields[split])


def _delimiter(header: str, columns: Columns) -> str:
    """The one with which the header has the columns; else the one it has most of, for the message."""
    fits = [one for one in DELIMITERS if {columns.image, columns.label} <= set(_split(header, one))]
    return fits[0] if fits else max(DELIMITERS, key=header.count)


def _split(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])


def _positions(file: str, names: list[str], columns: Columns) -> tuple[int, int, int | None]:
    wanted = [columns.image, columns.label, *([columns.split] if columns.split else [])]
    wrong = [name for name in wanted if names.count(name) != 1]
    if wrong:
        raise InputError(
            f"Expected the column {wrong[0]!r} once in the first line of {file!r}, received the columns "
            f"{', '.join(map(repr, names)) or 'of an empty line'}. Name them with --columns IMAGE,LABEL, or the sign "
            "between them with --delimiter."
        )
    split = columns.split or ("split" if "split" in names else None)
    return names.index(columns.image), names.index(columns.label), None if split is None else names.index(split)
