"""What a data set is written from: labelled images, or labelled rows of numbers.

    Source("pets", ("cat", "dog"), ["1.jpg", "2.jpg"], np.array([0, 1]), encoded=read, image_format="jpeg")
    Table("heaps", ("left", "right"), inputs=rows, labels=labels)

Both are `Writable`, which is all that `write_dataset` asks for.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distfit.data.build.split import Labelled
from distfit.errors import InputError


class Writable(Labelled, Protocol):
    """Labelled records in the order of their source.

    Attributes:
        name: what they are, for `dataset.json`.
        classes: names; a label is a position among them.
        labels: one for each record.
        features: name and type of each feature of a record, as `dataset.json` has them.
        image_format, pixels, sizes, given_split: as for `Source`; None where there is nothing to say.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def features(self) -> dict[str, str]: ...
    @property
    def image_format(self) -> str | None: ...
    @property
    def pixels(self) -> str | None: ...

    def record(self, number: int) -> dict[str, Any]:
        """The features of one record without its label; called once for each, from several threads."""
        ...


@dataclass(frozen=True)
class Source:
    """Labelled images, wherever they come from.

    Args:
        name: what they are, for `dataset.json`.
        classes: names; a label is a position in this list.
        filenames: one for each image.
        labels: one for each image, 0 <= label < len(classes).
        encoded: from an image's position to its encoded bytes; called once for each, from several threads, so
            that a source need not hold them all in memory.
        image_format: of the encoded bytes, such as "png", or "mixed".
        pixels: what a pixel's value means; None leaves it to the images.
        sizes: bytes of each encoded image; None where they are small or not known. They choose the number of
            shards and tell whether the disk has room.
        given_split: for each image 0 for training, 1 for validation or 2 for a test, where that is decided
            already; None splits by the seed.

    Raises:
        InputError: names and labels differ in number, or a label is no class.
    """

    name: str
    classes: tuple[str, ...]
    filenames: Sequence[str]
    labels: np.ndarray
    encoded: Callable[[int], bytes]
    image_format: str
    pixels: str | None
    sizes: np.ndarray | None = None
    given_split: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_labels(self.name, self.classes, self.labels, self.filenames, "file names")

    @property
    def features(self) -> dict[str, str]:
        """Name and type of each feature of a record."""
        return {"image": "bytes", "filename": "bytes", "label": "int64"}

    def record(self, number: int) -> dict[str, Any]:
        """The features of one image, without its label."""
        return {"image": self.encoded(number), "filename": os.fsencode(self.filenames[number])}


@dataclass(frozen=True)
class Table:
    """Labelled rows of numbers.

    Args:
        name: what they are, for `dataset.json`.
        classes: names; a label is a position in this list.
        inputs: float32, a row for each label; as they were measured, since a scaling has to be learnt from the
            training split alone, which `keras.layers.Normalization` and BatchNormalization do in the model.
        labels: one for each row, 0 <= label < len(classes).

    Raises:
        InputError: rows and labels differ in number, or a label is no class.
    """

    name: str
    classes: tuple[str, ...]
    inputs: np.ndarray
    labels: np.ndarray
    image_format = pixels = sizes = given_split = None

    def __post_init__(self) -> None:
        _check_labels(self.name, self.classes, self.labels, self.inputs, "rows")

    @property
    def features(self) -> dict[str, str]:
        """Name and type of each feature of a record."""
        return {"inputs": f"float32[{self.inputs.shape[1]}]", "label": "int64"}

    def record(self, number: int) -> dict[str, Any]:
        """The features of one row, without its label."""
        return {"inputs": self.inputs[number]}


def _check_labels(name: str, classes: Sequence[str], labels: np.ndarray, items: Any, what: str) -> None:
    if len(items) != len(labels):
        raise InputError(
            f"Expected a label for each record of {name}, received {len(items)} {what} and {len(labels)} labels."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        item = repr(items[wrong[0]]) if isinstance(items[wrong[0]], str) else f"record {wrong[0]}"
        raise InputError(
            f"Expected labels from 0 to {len(classes) - 1} in {name}, received {labels[wrong[0]]} for {item}."
        )
