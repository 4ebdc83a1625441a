"""What the features of a set of records have in common: their types, which records lack one, how many values vary.

seen = Seen()
for serialized in payloads:
    seen.add(serialized)
seen.features()                       # (Feature("image", "bytes", records=1437, ...), ...)
seen.labels, seen.images()
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from distfit.data.build.image_check import NotAnImage
from distfit.data.example import NotAnExample, Values, parse_sequence
from distfit.data.inspect.image_header import looks_like_an_image, read_header
from distfit.data.inspect.record_check import label_of


@dataclass(frozen=True)
class Feature:
    """One feature, as the records that were read have it.

    Args:
        name: of the feature, or of the feature list of sequence examples.
        kind: "bytes", "int64" or "float32"; several of them, joined by " or ", where records differ.
        records: how many of those read have it.
        shortest, longest: values of a record; of a step in a feature list.
        steps: of a feature list, (fewest, most) of a record; None for a feature.
        bytes: (fewest, most) bytes of a value; None for numbers.
    """

    name: str
    kind: str
    records: int
    shortest: int
    longest: int
    steps: tuple[int, int] | None
    bytes: tuple[int, int] | None

    @property
    def type(self) -> str:
        """As in `dataset.json` where all records have as many values, with the range where they vary.

        >>> Feature("x", "float32", 9, 13, 13, None, None).type, Feature("y", "int64", 9, 1, 1, None, None).type
        ('float32[13]', 'int64')
        >>> Feature("z", "int64", 9, 0, 4, None, None).type, Feature("s", "int64", 9, 1, 1, (2, 7), None).type
        ('int64[0 to 4]', 'int64, 2 to 7 steps')
        """
        shape = "" if self.shortest == self.longest == 1 else f"[{span(self.shortest, self.longest)}]"
        return f"{self.kind}{shape}" + ("" if self.steps is None else f", {span(*self.steps)} steps")


@dataclass(frozen=True)
class Images:
    """The images of one feature.

    Args:
        feature: its name.
        formats: how many there are of each format, most first.
        widths, heights: (least, median, most) in pixels.
        unreadable: values whose header could not be read.
    """

    feature: str
    formats: dict[str, int]
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    unreadable: int


def span(least: int, most: int) -> str:
    """
    >>> span(3, 3), span(1, 12000)
    ('3', '1 to 12,000')
    """
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


class Seen:
    """Gathers facts, record by record.

    Attributes:
        records: how many were added.
        others: how many of them are no tf.train.Example.
        labels: how often each value of the feature `label` came, where it is one int64.
    """

    def __init__(self) -> None:
        self.records = self.others = 0
        self.labels: Counter[int] = Counter()
        self._features: dict[str, _Gathered] = {}
        self._lists: dict[str, _Gathered] = {}
        self._images: dict[str, _Headers] = {}

    def add(self, serialized: bytes) -> None:
        """Takes one record into account."""
        self.records += 1
        try:
            context, lists = parse_sequence(serialized)
        except NotAnExample:
            self.others += 1
            return
        for name, values in context.items():
            self._features.setdefault(name, _Gathered()).add([values])
            self._add_image(name, values)
        for name, steps in lists.items():
            self._lists.setdefault(name, _Gathered()).add(steps)
        if (label := label_of(context)) is not None:
            self.labels[label] += 1

    def features(self) -> tuple[Feature, ...]:
        """All that were met, by name; the feature lists behind the features."""
        found = [one.feature(name, is_list=False) for name, one in sorted(self._features.items())]
        return (*found, *(one.feature(name, is_list=True) for name, one in sorted(self._lists.items())))

    def images(self) -> tuple[Images, ...]:
        """Of each feature most of whose values begin as an image does."""
        return tuple(
            one.images(name)
            for name, one in sorted(self._images.items())
            if 2 * one.values > self._features[name].records
        )

    def _add_image(self, name: str, values: Values) -> None:
        if values.kind == "bytes" and len(values.values) == 1 and looks_like_an_image(values.values[0]):
            self._images.setdefault(name, _Headers()).add(values.values[0])


class _Gathered:
    """What is known so far of a feature, or of a feature list."""

    def __init__(self) -> None:
        self.records = 0
        self._kinds: set[str] = set()
        self._lengths, self._steps, self._bytes = _Range(), _Range(), _Range()

    def add(self, steps: list[Values]) -> None:
        self.records += 1
        self._steps.add(len(steps))
        for kind, values in steps:
            self._kinds.add(kind)
            self._lengths.add(len(values))
            if kind == "bytes":
                for value in values:
                    self._bytes.add(len(value))

    def feature(self, name: str, is_list: bool) -> Feature:
        shortest, longest = self._lengths.ends() or (0, 0)
        steps = self._steps.ends() if is_list else None
        kind = " or ".join(sorted(self._kinds)) or "nothing"
        return Feature(name, kind, self.records, shortest, longest, steps, self._bytes.ends())


class _Range:
    """The least and the most of what was added."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None

    def add(self, value: int) -> None:
        low, high = self._ends or (value, value)
        self._ends = (value if value < low else low, value if value > high else high)

    def ends(self) -> tuple[int, int] | None:
        return self._ends


class _Headers:
    """Headers of the images of a feature."""

    def __init__(self) -> None:
        self.values = self._unreadable = 0
        self._formats: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []

    def add(self, data: bytes) -> None:
        self.values += 1
        try:
            header = read_header(data)
        except NotAnImage:
            self._unreadable += 1
            return
        self._formats[header.format] += 1
        self._sizes.append((header.width, header.height))

    def images(self, name: str) -> Images:
        sizes = np.array(self._sizes or [(0, 0)])
        ends = np.quantile(sizes, [0, 0.5, 1], axis=0, method="lower").T.tolist()
        widths, heights = ((int(low), int(middle), int(high)) for low, middle, high in ends)
        return Images(name, dict(self._formats.most_common()), widths, heights, self._unreadable)
