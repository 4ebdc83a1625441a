"""Folders that a run will make: what of their paths is there already."""

import os
from pathlib import Path


def existing(path: str | os.PathLike) -> Path:
    """The folder, or the nearest one above it that is there.

    >>> str(existing("/no/such/folder"))
    '/'
    """
    there = Path(os.path.abspath(path))
    while not there.exists() and there != there.parent:
        there = there.parent
    return there
