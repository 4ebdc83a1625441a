"""What a built data set says about itself: `dataset.json`, read and checked, no TensorFlow.

    digits = load("data/digits")
    digits.classes, digits.splits["train"].records, digits.files("train")
    check_labels(digits, "train")

`dataset.json` is written last, so its presence means that the folder is whole; `load` holds the files against
it. The paths of a `Description` are those of the folder it was loaded from, so a data set can be moved.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass

from distfit.data.example import NotAnExample, parse_example
from distfit.data.records import read_at, scan
from distfit.errors import InputError, nearest

NAME = "dataset.json"
VERSION = 1
LABELS_MOST_BYTES = 256 * 2**20
# Of a record in a TFRecord file: its length and two checksums.
FRAMING_BYTES = 16


@dataclass(frozen=True)
class Feature:
    """The type of one feature of a record.

    Args:
        kind: "bytes", "int64" or "float32": which of TensorFlow's three lists holds the values.
        shape: of the values, in C order; () is one value, (None,) as many as each record has.
    """

    kind: str
    shape: tuple[int | None, ...]


def parse_feature(text: str) -> Feature:
    """The type that a description names.

    >>> parse_feature("bytes")
    Feature(kind='bytes', shape=())
    >>> parse_feature("float32[28,28]")
    Feature(kind='float32', shape=(28, 28))
    >>> parse_feature("int64[?]")
    Feature(kind='int64', shape=(None,))

    Raises:
        InputError: it is no type that records have.
    """
    found = re.fullmatch(r"(bytes|int64|float32)(?:\[(\?|\d+(?:, ?\d+)*)\])?", text)
    if not found:
        raise InputError(
            "Expected the type of a feature, bytes, int64 or float32, with a shape in brackets where it has several "
            f"values, such as float32[13], or int64[?] where their number differs, received {text!r}. Correct it in "
            f"{NAME}."
        )
    if found[2] == "?":
        return Feature(found[1], (None,))
    return Feature(found[1], tuple(int(side) for side in (found[2] or "").split(",") if side))


@dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name in the folder, its records, its size in bytes.

    `longest` is the bytes of its longest record, without the framing; None where nobody has written it down.
    """

    name: str
    records: int
    bytes: int
    longest: int | None = None


@dataclass(frozen=True)
class Split:
    """One part of the data, such as `train`.

    Args:
        records: records of all shards.
        per_class: records of each class, in the order of the classes.
        shards: the files, in the order in which their records are numbered.
    """

    records: int
    per_class: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def longest_record(self) -> int | None:
        """Bytes of the longest record; None where it is not known."""
        known = [shard.longest for shard in self.shards if shard.longest is not None]
        return max(known) if len(known) == len(self.shards) > 0 else None

    @property
    def mean_record(self) -> float:
        """Bytes of a record on average, without the framing."""
        return sum(shard.bytes for shard in self.shards) / self.records - FRAMING_BYTES


@dataclass(frozen=True)
class Description:
    """A data set of labelled records in TFRecord shards.

    Args:
        version: of this format.
        source: where the records came from, for people.
        seed: what the split and the order of records were drawn from.
        validation_fraction: the share of each class that was asked for in the split `validation`; None where
            the source was split already.
        classes: names; a label is a position in this list.
        image_format: of the feature `image`, such as "png", "mixed" when there are several; None without images.
        pixels: what a pixel's value means, for people; None when the images themselves say it, or without them.
        features: name and type of each feature of a record; `parse_feature` reads a type.
        splits: by name.
        max_side: pixels that the longer side of an image was shrunk to where it had more; None where images
            are stored as they were.
        quality: of the JPEGs that came out of that.
        folder: where it was loaded from; not part of the file.
    """

    version: int
    source: str
    seed: int
    validation_fraction: float | None
    classes: tuple[str, ...]
    image_format: str | None
    pixels: str | None
    features: dict[str, str]
    splits: dict[str, Split]
    max_side: int | None = None
    quality: int | None = None
    folder: str = ""

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            InputError: there is no such split.
        """
        if name not in self.splits:
            raise InputError(
                f"Expected a split of the data set in {self.folder!r}, received {name!r}; "
                f"{nearest(name, sorted(self.splits))}"
            )
        return self.splits[name]

    def files(self, split: str) -> list[str]:
        """Paths of a split's shards, in the order in which their records are numbered."""
        return [os.path.join(self.folder, shard.name) for shard in self.split(split).shards]

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return json.dumps(fields, indent=2) + "\n"


def load(folder: str | os.PathLike) -> Description:
    """The description of the data set in `folder`, its files held against it.

    Raises:
        InputError: no such folder, no or a damaged `dataset.json`, one of another version, or files that are
            missing or of another size.
    """
    folder = os.fspath(folder)
    description = dataclasses.replace(_parse(_path_in(folder)), folder=folder)
    for text in description.features.values():
        parse_feature(text)
    for name in description.splits:
        for path, shard in zip(description.files(name), description.splits[name].shards, strict=True):
            _check_size(path, shard)
    return description


def check_labels(description: Description, split: str) -> bool:
    """Reads every record of a split and refuses a label that is no class.

    Args:
        description: of the data set.
        split: name of the split.

    Returns:
        Whether it was done: a split of more than 256 MiB is not read.

    Raises:
        InputError: a label outside the classes, or a record without a label.
        RunError: a damaged record.
    """
    if sum(shard.bytes for shard in description.split(split).shards) > LABELS_MOST_BYTES:
        return False
    for path in description.files(split):
        _check_labels_of(path, len(description.classes))
    return True


def _path_in(folder: str) -> str:
    path = os.path.join(folder, NAME)
    if not os.path.isdir(folder):
        raise InputError(
            f"Expected the folder of a data set, received {folder!r}, which is "
            f"{'a file' if os.path.exists(folder) else 'not there'}. Build one with "
            "`distfit data build`, or correct the path."
        )
    if not os.path.isfile(path):
        raise InputError(
            f"Expected {NAME} in the folder {folder!r}, received a folder without it: no data set, or one "
            "whose building was cut off. Build it with `distfit data build`."
        )
    return path


def _parse(path: str) -> Description:
    # Pydantic takes a tenth of a second to load, which a script that brings its own files need not pay.
    import pydantic

    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        version = fields.get("version") if isinstance(fields, dict) else None
        if version is not None and version != VERSION:
            raise InputError(
                f"Expected version {VERSION} of the format in {path!r}, received version {version!r}. "
                "Build the data set again with this version of distfit."
            )
        return pydantic.TypeAdapter(Description).validate_python(fields)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"text that is no JSON ({error})") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise _damaged(path, f"{where}: {first['msg']}") from error
    except OSError as error:
        raise _damaged(path, f"{error.strerror}") from error


def _damaged(path: str, received: str) -> InputError:
    return InputError(
        f"Expected the description of a data set in {path!r}, received {received}. "
        "Copy the file again from its source, or build the data set again."
    )


def _check_size(path: str, shard: Shard) -> None:
    size = os.path.getsize(path) if os.path.isfile(path) else None
    if size != shard.bytes:
        received = "no such file" if size is None else f"{size} bytes"
        raise InputError(
            f"Expected {path!r} with {shard.bytes} bytes, as {NAME} beside it says, received {received}. "
            "Copy the file again from its source, or build the data set again."
        )


def _check_labels_of(path: str, classes: int) -> None:
    offsets, lengths = scan(path)
    with open(path, "rb") as file:
        for record, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
            label = _label(read_at(file.fileno(), offset, length, path))
            if label is None or not 0 <= label < classes:
                raise InputError(
                    f"Expected a label from 0 to {classes - 1}, one for each of {classes} classes, received "
                    f"{'no int64 label' if label is None else label} in record {record} of {path!r}. "
                    f"Correct the record, or add its class to {NAME}."
                )


def _label(serialized: bytes) -> int | None:
    try:
        label = parse_example(serialized).get("label")
    except NotAnExample:
        return None
    return label.values[0] if label is not None and label.kind == "int64" and len(label.values) == 1 else None
