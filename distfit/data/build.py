"""Building a data set: labelled images into TFRecord shards with a description beside them.

    build_digits("data/digits")                         # scikit-learn's 1,797 scanned digits
    write_dataset(source, "data/mine", seed=0)          # any other `Source`

The split is stratified and, like the order of the records, a pure function of the source and the seed: two
builds with one seed are the same bytes. The folder appears under its name complete or not at all.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distfit.data import description as described
from distfit.data.description import Description, Shard, Split
from distfit.data.plan import permutation
from distfit.data.records import whole_file, write_records
from distfit.errors import InputError

FEATURES = {"image": "bytes", "filename": "bytes", "label": "int64"}


@dataclass(frozen=True)
class Source:
    """Labelled images, wherever they come from.

    Args:
        name: what they are, for `dataset.json`.
        classes: names; a label is a position in this list.
        filenames: one for each image.
        labels: one for each image, 0 <= label < len(classes).
        encoded: from an image's position to its encoded bytes; called once for each, so that a source need
            not hold them all in memory.
        image_format: of the encoded bytes, such as "png".
        pixels: what a pixel's value means.

    Raises:
        InputError: names and labels differ in number, or a label is no class.
    """

    name: str
    classes: tuple[str, ...]
    filenames: Sequence[str]
    labels: np.ndarray
    encoded: Callable[[int], bytes]
    image_format: str
    pixels: str

    def __post_init__(self) -> None:
        if len(self.filenames) != len(self.labels):
            raise InputError(
                f"Expected a label for each image of {self.name}, received {len(self.filenames)} file names "
                f"and {len(self.labels)} labels."
            )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if wrong.size:
            raise InputError(
                f"Expected labels from 0 to {len(self.classes) - 1} in {self.name}, received "
                f"{self.labels[wrong[0]]} for {self.filenames[wrong[0]]!r}."
            )


def digits_source() -> Source:
    """Scikit-learn's 1,797 scanned digits, 8x8 pixels, as grayscale PNG images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Source(
        name="scikit-learn's digits: 1,797 scans of handwritten digits, 8x8 pixels (UCI Optical Recognition)",
        classes=tuple(str(name) for name in digits.target_names),
        filenames=[f"digits/{number:04d}.png" for number in range(len(digits.target))],
        labels=digits.target.astype(np.int64),
        encoded=lambda number: _png(digits.images[number].astype(np.int64)),
        image_format="png",
        pixels="uint8 gray, the scan's level 0..16 times 255/16, rounded half up; 255 is full ink",
    )


def build_digits(
    out: str | os.PathLike,
    *,
    seed: int = 0,
    shards: int = 8,
    validation_fraction: float = 0.2,
    validation_shards: int = 2,
    force: bool = False,
) -> Description:
    """Builds the digits data set in the folder `out`; the arguments are those of `write_dataset`."""
    return write_dataset(
        digits_source(),
        out,
        seed=seed,
        shards=shards,
        validation_fraction=validation_fraction,
        validation_shards=validation_shards,
        force=force,
    )


def write_dataset(
    source: Source,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    shards: int = 8,
    validation_fraction: float = 0.2,
    validation_shards: int = 2,
    force: bool = False,
) -> Description:
    """Writes TFRecord shards `train-*`, `validation-*` and `dataset.json` into the folder `out`.

    Args:
        source: the labelled images.
        out: a folder that is new or empty; its parents are made.
        seed: of the split and of the order of records, >= 0.
        shards: files of the training split, 1 to its records.
        validation_fraction: share of each class for validation, 0 < fraction < 1; each class gets it to
            within one record, and the whole to rounding.
        validation_shards: files of the validation split, 1 to its records.
        force: replace a data set that is there already.

    Returns:
        The description of what was written.

    Raises:
        InputError: an argument out of its range, or `out` cannot be written or holds something.
    """
    members = stratified_split(source.labels, seed, validation_fraction)
    shard_counts = {"train": shards, "validation": validation_shards}
    for split, numbers in members.items():
        _check_shards(split, len(numbers), shard_counts[split])
    out = os.path.realpath(out)
    with _whole_folder(out, force) as folder:
        description = Description(
            version=described.VERSION,
            source=source.name,
            seed=int(seed),
            validation_fraction=validation_fraction,
            classes=source.classes,
            image_format=source.image_format,
            pixels=source.pixels,
            features=FEATURES,
            splits={
                split: _write_split(source, folder, split, numbers, shard_counts[split])
                for split, numbers in members.items()
            },
        )
        with whole_file(os.path.join(folder, described.NAME)) as file:
            file.write(description.to_json().encode())
    return dataclasses.replace(description, folder=out)


def stratified_split(labels: np.ndarray, seed: int, validation_fraction: float) -> dict[str, np.ndarray]:
    """The images of `train` and of `validation`, each in the order in which they are written.

    Every class gives the fraction of its images, rounded down or up such that the whole is the fraction of
    all images, rounded.

    Args:
        labels: class of each image, int64.
        seed: >= 0; alone decides which images and in which order.
        validation_fraction: 0 < fraction < 1.

    Raises:
        InputError: the fraction or the seed is out of its range.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"Expected a validation fraction between 0 and 1, received {validation_fraction!r}. Try 0.2.")
    order = permutation(len(labels), seed)
    quota = _quota(np.bincount(labels), validation_fraction)
    rank_in_class = np.empty(len(labels), np.int64)
    for label in range(len(quota)):
        of_class = np.flatnonzero(labels[order] == label)
        rank_in_class[of_class] = np.arange(len(of_class))
    validates = rank_in_class < quota[labels[order]]
    return {"train": order[~validates], "validation": order[validates]}


def _quota(per_class: np.ndarray, fraction: float) -> np.ndarray:
    """Largest remainders: whole numbers, each within one of the exact one, that add up to the rounded sum."""
    exact = per_class * fraction
    quota = np.floor(exact).astype(np.int64)
    short = round(float(exact.sum())) - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:short]] += 1
    return quota


def _write_split(source: Source, folder: str, split: str, numbers: np.ndarray, shards: int) -> Split:
    # Dealt like cards: shards differ by one record at most, and each is a random sample of the split.
    written = [
        _write_shard(source, folder, f"{split}-{shard:05d}-of-{shards:05d}.tfrecord", numbers[shard::shards])
        for shard in range(shards)
    ]
    per_class = np.bincount(source.labels[numbers], minlength=len(source.classes))
    return Split(records=len(numbers), per_class=tuple(per_class.tolist()), shards=tuple(written))


def _write_shard(source: Source, folder: str, name: str, numbers: np.ndarray) -> Shard:
    path = os.path.join(folder, name)
    count = write_records(path, (_example(source, number) for number in numbers.tolist()))
    return Shard(name=name, records=count, bytes=os.path.getsize(path))


def _example(source: Source, number: int) -> bytes:
    from tensorflow import train

    def of_bytes(value: bytes) -> train.Feature:
        return train.Feature(bytes_list=train.BytesList(value=[value]))

    features = {
        "image": of_bytes(source.encoded(number)),
        "filename": of_bytes(os.fsencode(source.filenames[number])),
        "label": train.Feature(int64_list=train.Int64List(value=[int(source.labels[number])])),
    }
    example = train.Example(features=train.Features(feature=features))
    # A protobuf map has no order of its own, and two builds must be the same bytes.
    return example.SerializeToString(deterministic=True)


def _png(levels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # In whole numbers, so that no floating point decides about the byte.
    Image.fromarray(((levels * 255 + 8) // 16).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_shards(split: str, records: int, shards: int) -> None:
    if not 1 <= shards <= records:
        raise InputError(f"Expected 1 to {records} shards for the {records} records of {split!r}, received {shards}.")


@contextlib.contextmanager
def _whole_folder(out: str, force: bool) -> Iterator[str]:
    """A folder to fill that takes the name `out` when the block ends, or is removed when it fails."""
    _check_free(out, force)
    parent = os.path.dirname(out)
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out)}.", dir=parent)
    except OSError as error:
        raise InputError(
            f"Expected a folder that can be written at {out!r}, received: {error.strerror}. Choose another."
        ) from error
    try:
        fresh = os.path.join(temporary, "new")
        os.mkdir(fresh)
        yield fresh
        _put_in_place(fresh, out, os.path.join(temporary, "old"))
    finally:
        shutil.rmtree(temporary)


def _put_in_place(fresh: str, out: str, replaced: str) -> None:
    # All three are on one file system, so that each move is one rename and nothing is ever half there.
    if not os.path.isdir(out):
        os.rename(fresh, out)
        return
    os.rename(out, replaced)
    try:
        os.rename(fresh, out)
    except OSError:
        os.rename(replaced, out)
        raise


def _check_free(out: str, force: bool) -> None:
    if os.path.isdir(out):
        entries = os.listdir(out)
        if not entries or (force and described.NAME in entries):
            return
        remedy = "pass --force to replace it" if described.NAME in entries else "empty this one"
        raise InputError(
            f"Expected a new or empty folder to build in, received {out!r} with {len(entries)} entries. "
            f"Choose another folder, or {remedy}."
        )
    if os.path.lexists(out):
        raise InputError(f"Expected a folder to build in, received the file {out!r}. Choose another name.")
