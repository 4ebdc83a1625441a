"""Data sets that distfit builds: from folders of images, and those of scikit-learn to try things on.

    build_images("256_ObjectCategories", "data/caltech256")
    build_digits("data/digits")                         # scikit-learn's 1,797 scanned digits
    build_table("wine", "data/wine")                    # rows of numbers instead of images

`data.build.writer.write_dataset` writes any other source in the same form.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distfit.data.build.image_folder import Checked, Found, check_images, find_images, labels_among
from distfit.data.build.labelled import Source, Table
from distfit.data.build.split import shard_count, split_members
from distfit.data.build.whole_folder import check_free
from distfit.data.build.writer import write_dataset
from distfit.data.description import NAME, Description
from distfit.errors import InputError
from distfit.monitor.counting import Counting, silent

MOST_LISTED = 20


def build_images(
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    validation_images: str | os.PathLike | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    shards: int | None = None,
    validation_fraction: float | None = None,
    validation_shards: int | None = None,
    force: bool = False,
    count: Counting = silent,
) -> Description:
    """Builds a data set from a folder of class folders; the bytes of an image are stored as they are.

    Args:
        images: holds a folder for each class.
        out: the folder to make, and what follows, as for `write_dataset`.
        validation_images: a folder of the same form with the images for validation, where they are apart
            already; None takes a share of `images`.
        skip_bad: leave out what is no whole image and list it on standard error, instead of refusing it.
        seed, shards, validation_fraction, validation_shards, force, count: as for `write_dataset`.

    Raises:
        InputError: something is no whole image, a class has none, or `write_dataset` refuses an argument.
        RunError: an image changed while the data set was built, or writing failed; nothing is left of it.
    """
    check_free(os.path.realpath(out), NAME, force)
    folders = [os.fspath(folder) for folder in (images, validation_images) if folder is not None]
    _check_apart(folders, out)
    found = [find_images(folder, least) for folder, least in zip(folders, (2, 1), strict=False)]
    _check_arguments(_source(found), seed, validation_fraction, shards, validation_shards)
    checked = [check_images(one, count) for one in found]
    _check_wrong(checked, skip_bad)
    return write_dataset(
        _checked_source(checked),
        out,
        seed=seed,
        shards=shards,
        validation_fraction=validation_fraction,
        validation_shards=validation_shards,
        force=force,
        count=count,
    )


def build_digits(out: str | os.PathLike, **arguments: Any) -> Description:
    """Builds the digits data set in the folder `out`; the arguments are those of `write_dataset`."""
    return write_dataset(digits_source(), out, **arguments)


def build_table(name: str, out: str | os.PathLike, **arguments: Any) -> Description:
    """Builds a data set of rows, one of `TABLES`, in the folder `out`; the arguments are those of `write_dataset`."""
    return write_dataset(table_source(name), out, **arguments)


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


# Scikit-learn's name of each, and what it is.
TABLES = {
    "wine": ("load_wine", "scikit-learn's wine: 13 measures of each of 178 wines of three growers (UCI Wine)"),
    "breast-cancer": (
        "load_breast_cancer",
        "scikit-learn's breast cancer: 30 measures of each of 569 tumours (UCI Breast Cancer Wisconsin, Diagnostic)",
    ),
}


def table_source(name: str) -> Table:
    """One of `TABLES`, its values as they were measured."""
    from sklearn import datasets

    loader, words = TABLES[name]
    table = getattr(datasets, loader)()
    return Table(
        name=words,
        classes=tuple(str(name) for name in table.target_names),
        inputs=table.data.astype(np.float32),
        labels=table.target.astype(np.int64),
    )


def _source(found: Sequence[Found]) -> Source:
    """The files of one folder, or of one for training and one for validation, before any is read."""
    train, *validation = found
    source = Source(
        name=f"images of {' and of '.join(repr(_base(one)) for one in found)}",
        classes=train.classes,
        filenames=[name for one in found for name in _names(one, len(found))],
        labels=np.concatenate([train.labels, *(labels_among(train.classes, one) for one in validation)]),
        encoded=_not_read,
        image_format="",
        pixels=None,
        validates=np.repeat([False, True], [len(one.names) for one in found]) if validation else None,
    )
    _check_classes(train)
    return source


def _checked_source(checked: Sequence[Checked]) -> Source:
    """The whole images of `_source`, ready to be written."""
    formats = {one.image_format for one in checked if len(one.sizes)}
    train = len(checked[0].sizes)

    def encoded(number: int) -> bytes:
        return checked[0].read(number) if number < train else checked[1].read(number - train)

    return dataclasses.replace(
        _source([one.found for one in checked]),
        encoded=encoded,
        image_format=formats.pop() if len(formats) == 1 else "mixed",
        sizes=np.concatenate([one.sizes for one in checked]),
    )


def _not_read(number: int) -> bytes:
    raise AssertionError(f"image {number} was asked for before it was checked")


def _names(found: Found, folders: int) -> list[str]:
    """Names for the records; with two folders, which may hold the same ones, the folder's before them."""
    return found.names if folders == 1 else [f"{_base(found)}/{name}" for name in found.names]


def _base(found: Found) -> str:
    return os.path.basename(os.path.realpath(found.folder))


def _check_apart(folders: Sequence[str], out: str | os.PathLike) -> None:
    place = os.path.realpath(out)
    for folder in folders:
        if os.path.commonpath([place, os.path.realpath(folder)]) == os.path.realpath(folder):
            raise InputError(
                f"Expected a folder outside of the images to build in, received {os.fspath(out)!r}, which lies in "
                f"{folder!r} and would count as a class there. Choose another."
            )
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise InputError(
            f"Expected other images for validation than for training, received {folders[0]!r} for both. Leave "
            "--validation-images out, which takes a share of each class."
        )


def _check_arguments(
    source: Source, seed: int, fraction: float | None, shards: int | None, validation_shards: int | None
) -> None:
    """Refuses before hours of reading what `write_dataset` would refuse after them."""
    members = split_members(source, seed, fraction)
    shard_count(source, "train", members["train"], shards)
    shard_count(source, "validation", members["validation"], validation_shards)


def _check_classes(train: Found) -> None:
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if empty.size:
        name = train.classes[empty[0]]
        reason = "".join(f", which is {bad.reason}" for bad in train.wrong if bad.name == name)
        raise InputError(
            f"Expected an image in every class folder of {train.folder!r}, received none in {name!r}{reason} "
            f"({empty.size} of {len(train.classes)} folders). Add images, or remove the folder."
        )


def _check_wrong(checked: Sequence[Checked], skip_bad: bool) -> None:
    wrong = [
        f"\n  {os.path.join(one.found.folder, bad.name)!r} is {bad.reason}"
        for one in checked
        for bad in one.found.wrong
    ]
    whole = sum(len(one.sizes) for one in checked)
    if skip_bad and wrong:
        print(f"distfit: left out {len(wrong)}, kept {whole:,} images:{''.join(wrong)}", file=sys.stderr, flush=True)
    elif wrong:
        more = f"\n  and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise InputError(
            f"Expected nothing but whole images that TensorFlow decodes, received {len(wrong)} of another kind beside "
            f"{whole:,} images:{''.join(wrong[:MOST_LISTED])}{more}\nRemove or replace them, or pass --skip-bad to "
            "leave them out."
        )


def _png(levels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # In whole numbers, so that no floating point decides about the byte.
    Image.fromarray(((levels * 255 + 8) // 16).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
