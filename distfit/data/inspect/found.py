"""Which files somebody means who names a data set, by split, and what is said about them.

data = find_data(["data/digits"])             # a folder, with dataset.json or without
data = find_data(["data/digits/train-*"])     # a pattern, or files
data.splits["train"], data.description
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distfit.data import description as described
from distfit.data import storage
from distfit.data.description import Description
from distfit.data.files import expand, is_record_file, missing_shards, refusing_what_cannot_be_asked, split_of

# What files without a split in their name are called.
UNNAMED = "records"


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        name: as it was named.
        splits: its files by split, in the order in which their records are numbered.
        description: from `dataset.json`; None without one. Its splits are those of `splits`.
    """

    name: str
    splits: Mapping[str, tuple[str, ...]]
    description: Description | None


def find_data(names: Sequence[str], *, whole: bool = True) -> Data:
    """What is meant by a folder, a pattern or files.

    A `dataset.json` counts for its folder, and for a pattern or a list that means all files of its splits.

    Args:
        names: one folder, or patterns and files.
        whole: refuse a data set of which files are missing or have another size than `dataset.json` says; False
            takes the missing ones for its files too.

    Raises:
        InputError: nothing is there, or it is not whole.
    """
    with refusing_what_cannot_be_asked():
        return _found(names, whole)


def _found(names: Sequence[str], whole: bool) -> Data:
    name = " ".join(names)
    if len(names) == 1 and storage.is_folder(names[0]):
        if description := _described(names[0], whole):
            return Data(name, _files_of(description), description)
        return Data(name, _by_split(_in_folder(names[0]), whole), None)
    if len(names) == 1 and storage.is_file(names[0]):  # one shard named alone is taken
        splits: Mapping[str, tuple[str, ...]] = {_split_of(names[0]): (names[0],)}
    else:
        splits = _by_split([path for one in names for path in _named(one, whole)], whole)
    return Data(name, splits, _described_in_part(splits, whole))


def _named(name: str, whole: bool) -> Sequence[str]:
    """The files of a pattern, or a file; of a pattern that matches none, the error that says what is there."""
    return expand(name) if whole else (storage.matching(name) or expand(name))


def _described(folder: str, whole: bool) -> Description | None:
    # Descriptions are read from local folders only.
    if storage.is_remote(folder) or not storage.is_file(os.path.join(folder, described.NAME)):
        return None
    return described.load(folder) if whole else read_description(folder)


def _files_of(description: Description) -> Mapping[str, tuple[str, ...]]:
    return {split: tuple(description.files(split)) for split in description.splits}


def _described_in_part(splits: Mapping[str, tuple[str, ...]], whole: bool) -> Description | None:
    """What is said about splits of which all files were named."""
    folders = {os.path.dirname(path) or "." for files in splits.values() for path in files}
    description = _described(folders.pop(), whole) if len(folders) == 1 else None
    if description is None:
        return None
    said = {split: {shard.name for shard in one.shards} for split, one in description.splits.items()}
    if any({os.path.basename(path) for path in files} != said.get(split) for split, files in splits.items()):
        return None
    return dataclasses.replace(description, splits={split: description.splits[split] for split in splits})


def _in_folder(folder: str) -> list[str]:
    names = [name for name in storage.names_in(folder) if is_record_file(name)]
    return [os.path.join(folder, name) for name in names] or expand(folder)  # which says what is there instead


def _by_split(paths: Sequence[str], whole: bool) -> Mapping[str, tuple[str, ...]]:
    """The files of each split, in order; shards that are missing are refused, or put among them."""
    splits: dict[str, list[str]] = {}
    for path in paths:
        splits.setdefault(_split_of(path), []).append(path)
    return {
        split: tuple(expand(files) if whole else sorted({*files, *missing_shards(files)}))
        for split, files in splits.items()
    }


def _split_of(path: str) -> str:
    return split_of(os.path.basename(path)) or UNNAMED


def read_description(folder: str) -> Description:
    """What is said of a data set, without holding its files against it."""
    found = dataclasses.replace(described._parse(described._path_in(folder)), folder=folder)
    for text in found.features.values():
        described.parse_feature(text)
    return found
