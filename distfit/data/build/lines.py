"""Records that are lines of a file: names, classes and splits gathered from them, each once and known.

    gathered = gather(rows, classes=None)
    gathered.names, gathered.labels, gathered.classes, gathered.given_split, gathered.numbers, gathered.wrong

Without a file of classes, those of the training records are taken: sorted by their bytes, or by value where all
of them are whole numbers, so that labels 0 to 9 stay what they are.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from distfit.data.build.listing import Wrong
from distfit.data.build.names import Names
from distfit.errors import InputError, nearest

_POSITIONS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("validation", "valid", "val"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
_NONE = -1


@dataclass(frozen=True)
class Row:
    """One line.

    Args:
        line: its number, from 1.
        name: of the record.
        label: the name of its class.
        split: what it says of its split; None where no line says anything.
        numbers: what else is to be kept of it.
    """

    line: int
    name: str
    label: str
    split: str | None
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Gathered:
    """Rows in arrays; the fields are those of `Listing`, and `numbers` [rows, 1 + len(row.numbers)], int64, the
    line first."""

    classes: tuple[str, ...]
    names: Names
    labels: np.ndarray
    given_split: np.ndarray | None
    numbers: np.ndarray
    wrong: list[Wrong]


def gather(rows: Iterable[Row | Wrong], classes: tuple[str, ...] | None, file: str) -> Gathered:
    """Reads all rows.

    Args:
        rows: those of the file, and what was met instead.
        classes: known ones; None takes those of the training rows.
        file: their file's name, for messages.

    Raises:
        InputError: there is no row that can be used.
    """
    wrong: list[Wrong] = []
    codes: dict[str, int] = {}
    labels, splits, numbers = array("i"), array("b"), array("q")

    def names() -> Iterator[str]:
        for row in rows:
            if isinstance(row, Wrong):
                wrong.append(row)
            elif row.split is not None and row.split.lower() not in _POSITIONS:
                wrong.append(
                    _wrong(file, row.line, row.name, f"in the split {row.split!r}; {_known_splits(row.split)}")
                )
            else:
                labels.append(codes.setdefault(row.label, len(codes)))
                splits.append(_NONE if row.split is None else _POSITIONS[row.split.lower()])
                numbers.extend((row.line, *row.numbers))
                yield row.name

    found = Names.of(names())
    if not len(found):
        reason = f": {wrong[0].where} is {wrong[0].reason}" if wrong else ""
        raise InputError(f"Expected records in {file!r}, received none that can be used{reason}. Correct the file.")
    table = np.array(numbers, np.int64).reshape(len(found), -1)
    given = None if splits[0] == _NONE else np.array(splits, np.int8)
    return _known_once(Gathered(tuple(codes), found, np.array(labels, np.int32), given, table, wrong), classes, file)


def class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The lines of a file, each the name of a class.

    Raises:
        InputError: it cannot be read, or has a class twice, or none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.rstrip("\r\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise InputError(f"Expected the names of classes in {os.fspath(path)!r}, received: {reason}.") from error
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice or not names:
        received = f"{twice[0]!r} twice" if twice else "an empty file"
        raise InputError(f"Expected each class on a line of its own in {os.fspath(path)!r}, received {received}.")
    return tuple(names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """
    >>> in_order(["10", "9", "0"]), in_order(["10", "9", "zero"])
    (('0', '9', '10'), ('10', '9', 'zero'))
    """
    names = list(names)
    if all(re.fullmatch(r"0|[1-9][0-9]*", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names, key=os.fsencode))


def line_of(file: str, line: int, name: str) -> str:
    """How a message names a line."""
    return f"line {line} of {file!r} ({name!r})"


def _wrong(file: str, line: int, name: str, reason: str) -> Wrong:
    return Wrong(line_of(file, line, name), reason)


def _known_splits(split: str) -> str:
    return nearest(split, list(_POSITIONS)) if split else "it needs one, as others have"


def _known_once(rows: Gathered, classes: tuple[str, ...] | None, file: str) -> Gathered:
    """Leaves out what comes twice or has an unknown class, and gives the labels their final numbers."""
    keeps, wrong = np.ones(len(rows.names), bool), list(rows.wrong)
    lines = rows.numbers[:, 0]
    for first, again in rows.names.repeated():
        keeps[again] = False
        wrong.append(_wrong(file, lines[again], rows.names[again], f"there already, in line {lines[first]}"))
    if classes is None:
        trained = rows.labels if rows.given_split is None else rows.labels[rows.given_split == 0]
        classes = in_order(rows.classes[code] for code in np.unique(trained))
    position = {name: label for label, name in enumerate(classes)}
    labels = np.array([position.get(name, -1) for name in rows.classes], np.int32)[rows.labels]
    for number in np.flatnonzero(keeps & (labels < 0)).tolist():
        name = rows.classes[rows.labels[number]]
        reason = f"of the class {name!r}, which no training record has" if name else "without a class"
        known = f"of the unknown class {name!r}; {nearest(name, list(classes)[:1000])}"
        wrong.append(_wrong(file, lines[number], rows.names[number], reason if rows.given_split is not None else known))
    keeps &= labels >= 0
    given = None if rows.given_split is None else rows.given_split[keeps]
    return Gathered(classes, rows.names.only(keeps), labels[keeps], given, rows.numbers[keeps], wrong)
