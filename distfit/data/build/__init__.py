"""Data sets that distfit builds: from images and lists of them, and those of scikit-learn to try things on.

    build_images("256_ObjectCategories", "data/caltech256")
    build_csv("labels.csv", "data/birds", image_root="pictures", max_side=512)
    build_manifest("records.jsonl", "data/faces")       # several files a record, numbers and texts
    build_digits("data/digits")                         # scikit-learn's 1,797 scanned digits
    build_table("wine", "data/wine")                    # rows of numbers instead of images

`data.build.writer.write_dataset` writes any other source in the same form.
"""

import os
from typing import Any

from distfit.data.build.csv_list import Columns, csv_listing
from distfit.data.build.image_folder import folder_listing
from distfit.data.build.labelled import Source, Table
from distfit.data.build.listed import build_listed
from distfit.data.build.manifest import manifest_listing
from distfit.data.build.samples import TABLES, build_digits, build_table, digits_source, table_source
from distfit.data.build.writer import write_dataset
from distfit.data.description import Description
from distfit.errors import InputError

__all__ = [
    "TABLES",
    "Columns",
    "Source",
    "Table",
    "build_csv",
    "build_digits",
    "build_images",
    "build_manifest",
    "build_table",
    "digits_source",
    "table_source",
    "write_dataset",
]


def build_images(
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    validation_images: str | os.PathLike | None = None,
    **options: Any,
) -> Description:
    """Builds a data set from a folder of class folders.

    Args:
        images: holds a folder for each class.
        out: the folder to make.
        validation_images: a folder of the same form with the images for validation, where they are apart
            already; None takes a share of `images`.
        options: those of `build_listed`.

    Raises:
        InputError: something is no whole image, a class has none, or an option is out of its range.
        RunError: an image changed while the data set was built, or writing failed; nothing is left of it.
    """
    folders = [os.fspath(folder) for folder in (images, validation_images) if folder is not None]
    _check_apart(folders, out)
    return build_listed(lambda: folder_listing(images, validation_images), out, **options)


def build_csv(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    columns: Columns | None = None,
    delimiter: str | None = None,
    classes: str | os.PathLike | None = None,
    **options: Any,
) -> Description:
    """Builds a data set from a CSV file with a line for each image.

    Args:
        path: of the file, UTF-8 with a header.
        out: the folder to make.
        image_root: the folder that the paths of images are relative to; None is the file's own.
        columns: their names; by default `image`, `label` and, where there is one, `split`.
        delimiter: between columns; None takes the one that the header has: a comma, semicolon, tab or bar.
        classes: a file with the name of a class on each line, whose order the labels have; None takes those of
            the training records, sorted.
        options: those of `build_listed`.

    Raises:
        InputError: a line names no whole image, comes twice, has no or an unknown label or split, or as for
            `build_images`.
        RunError: as for `build_images`.
    """
    return build_listed(lambda: csv_listing(path, image_root, columns or Columns(), delimiter, classes), out, **options)


def build_manifest(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    classes: str | os.PathLike | None = None,
    **options: Any,
) -> Description:
    """Builds a data set from a file of JSON lines, one object a record; see `data.build.manifest`.

    Args:
        path: of the file.
        out: the folder to make.
        image_root, classes: as for `build_csv`.
        options: those of `build_listed`.

    Raises:
        InputError: as for `build_csv`, or a feature has not the type it has in the first record.
        RunError: as for `build_images`.
    """
    return build_listed(lambda: manifest_listing(path, image_root, classes), out, **options)


def _check_apart(folders: list[str], out: str | os.PathLike) -> None:
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
