"""Folders of a run: what of their paths is there already, and how they are shown."""

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


def from_here(path: str | os.PathLike) -> str:
    """A path as people read it: from the current folder, where it lies in it.

    >>> from_here(os.path.abspath("runs/a")), from_here("/no/such/folder")
    ('runs/a', '/no/such/folder')
    """
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.split(os.sep)[0] in (os.pardir, os.curdir) else relative
