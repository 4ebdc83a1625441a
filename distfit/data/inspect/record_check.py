"""What is wrong with one record: its features against those of `dataset.json`, its label, its images.

expected = Expected(features={"label": Feature("int64", ())}, images=("image",), classes=10)
list(faults(serialized, expected))          # [] for a good one
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from distfit.data.build.image_check import NotAnImage, checked_image
from distfit.data.description import Feature
from distfit.data.example import Values
from distfit.data.inspect.image_header import read_header

# As `distfit data build` names them.
IMAGE, LABEL = "image", "label"


@dataclass(frozen=True)
class Expected:
    """What every record of a split has to be.

    Args:
        features: type of each by name; empty where nothing says what they are.
        images: names of the features whose values are encoded images.
        classes: how many; None where labels are not looked at.
        decode: whether to decode every image, instead of reading its header.
        examples: whether they are tf.train.Examples at all; where not, there is nothing to expect of a record.
    """

    features: Mapping[str, Feature] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    classes: int | None = None
    decode: bool = False
    examples: bool = True


def faults(features: Mapping[str, Values], expected: Expected) -> Iterator[str]:
    """What is wrong with the features of a record, one reason after the other.

    >>> list(faults({"label": Values("int64", [7])}, Expected({"label": Feature("int64", ())}, classes=5)))
    ['label 7, where classes go from 0 to 4']
    """
    for name, feature in expected.features.items():
        yield from _type_faults(name, feature, features.get(name))
    if expected.classes is not None:
        yield from _label_faults(label_of(features), expected.classes)
    for name in expected.images:
        yield from _image_faults(name, features.get(name), expected.decode)


def label_of(features: Mapping[str, Values]) -> int | None:
    """The label of a record; None where it has none that is one int64."""
    values = features.get(LABEL)
    return values.values[0] if values and values.kind == "int64" and len(values.values) == 1 else None


def _type_faults(name: str, feature: Feature, values: Values | None) -> Iterator[str]:
    if values is None:
        yield f"no feature {name!r}"
    elif values.kind != feature.kind:
        yield f"{values.kind} in the feature {name!r}, where {feature.kind} was expected"
    elif not _fits(len(values.values), feature.shape):
        yield f"{len(values.values)} values in the feature {name!r}, where its shape is {list(feature.shape)}"


def _fits(count: int, shape: tuple[int | None, ...]) -> bool:
    known = [side for side in shape if side is not None]
    return len(known) < len(shape) or count == math.prod(known)


def _label_faults(label: int | None, classes: int) -> Iterator[str]:
    if label is not None and not 0 <= label < classes:
        yield f"{LABEL} {label}, where classes go from 0 to {classes - 1}"


def _image_faults(name: str, values: Values | None, decode: bool) -> Iterator[str]:
    if values is None or values.kind != "bytes":
        return  # said already where a description asks for it, and else not every record needs to have one
    for value in values.values:
        try:
            read_header(value)
            if decode:
                checked_image(value)
        except NotAnImage as reason:
            yield f"the feature {name!r} is {reason}"
