"""Small data sets of scikit-learn's, to try things on: scanned digits, and tables of measures.

build_digits("data/digits")
build_table("wine", "data/wine")
"""

import io
import os
from typing import Any

import numpy as np

from distfit.data.build.labelled import Source, Table
from distfit.data.build.writer import write_dataset
from distfit.data.description import Description


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


def _png(levels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # In whole numbers, so that no floating point decides about the byte.
    Image.fromarray(((levels * 255 + 8) // 16).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
