"""Folders of images as a data set: a class for each folder, a label for each file.

    listing = folder_listing("256_ObjectCategories")      # 001.ak47/001_0001.jpg ..., every file below a class folder

Classes are the folders' names, sorted; a label is a position among them. A class folder may hold further
folders. What systems leave in folders is passed over: names that begin with a dot, and those in `BY_CATCH`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distfit.data.build.listing import Listing, Wrong, without_record
from distfit.data.build.names import Names
from distfit.errors import InputError, nearest

BY_CATCH = {"thumbs.db", "desktop.ini", "__macosx", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
TRAINING, VALIDATION = {"train", "training"}, {"val", "valid", "validation"}


@dataclass(frozen=True, eq=False)
class Folders(Listing):
    """Images of one folder, or of one for training and one for validation.

    Args:
        folders: as they were named.
        prefixes: what the names of each folder's images begin with beside their path in it.
    """

    folders: tuple[str, ...]
    prefixes: tuple[str, ...]

    def paths(self, number: int) -> list[str]:
        part = 0 if self.given_split is None else int(self.given_split[number])
        return [os.path.join(self.folders[part], self.names[number][len(self.prefixes[part]) :])]

    def check_classes(self) -> None:
        trained = self if self.given_split is None else self.only(self.given_split == 0)
        empty = without_record(trained)
        if empty.size:
            name, folder = self.classes[empty[0]], self.folders[0]
            reason = "".join(f", which is {bad.reason}" for bad in self.wrong if bad.where == _where(folder, name))
            raise InputError(
                f"Expected an image in every class folder of {folder!r}, received none in {name!r}{reason} "
                f"({empty.size} of {len(self.classes)} folders). Add images, or remove the folder."
            )
        if self.given_split is not None and not self.given_split.any():
            raise InputError(f"Expected images for validation in {self.folders[1]!r}, received none. Add some.")


@dataclass(frozen=True)
class Found:
    """The files below the class folders of `folder`.

    Args:
        folder: what the names are relative to.
        classes: the class folders, sorted.
        names: of the files, `class/.../file`, sorted within each class, in the order of the classes.
        labels: position of each file's class, int32.
        wrong: what was met beside files: a folder that cannot be read, a file in no class.
    """

    folder: str
    classes: tuple[str, ...]
    names: Names
    labels: np.ndarray
    wrong: list[Wrong]


def folder_listing(images: str | os.PathLike, validation_images: str | os.PathLike | None = None) -> Folders:
    """The images of a folder; with another one for validation, both, the folder's name before each file's.

    Raises:
        InputError: there is no such folder, it does not hold enough class folders, or the one for validation has
            a class that the other has not.
    """
    train = find_images(images)
    if validation_images is None:
        return Folders(
            f"images of {_base(train)!r}",
            *(train.classes, train.names, train.labels, None, train.wrong),
            folders=(train.folder,),
            prefixes=("",),
        )
    both = [train, find_images(validation_images, least_classes=1)]
    prefixes = tuple(f"{_base(one)}/" for one in both)
    return Folders(
        name=f"images of {' and of '.join(repr(_base(one)) for one in both)}",
        classes=train.classes,
        names=Names.of(prefix + name for prefix, one in zip(prefixes, both, strict=True) for name in one.names),
        labels=np.concatenate([train.labels, labels_among(train.classes, both[1])]),
        given_split=np.repeat(np.arange(2, dtype=np.int8), [len(one.names) for one in both]),
        wrong=[bad for one in both for bad in one.wrong],
        folders=tuple(one.folder for one in both),
        prefixes=prefixes,
    )


def find_images(folder: str | os.PathLike, least_classes: int = 2) -> Found:
    """The files of a folder of class folders; opens none of them.

    Args:
        folder: holds the class folders.
        least_classes: how many there have to be.

    Raises:
        InputError: there is no such folder, or it does not hold enough class folders.
    """
    folder = os.fspath(folder)
    classes, wrong = _class_folders(folder)
    _check_layout(folder, classes, wrong, least_classes)
    above = [_identity(folder)]
    per_class = np.zeros(len(classes), np.int64)

    def names() -> Iterator[str]:
        for label, name in enumerate(classes):
            for entry in _walk(folder, name, above):
                if isinstance(entry, Wrong):
                    wrong.append(entry)
                else:
                    per_class[label] += 1
                    yield entry

    found = Names.of(names())
    return Found(folder, tuple(classes), found, np.repeat(np.arange(len(classes), dtype=np.int32), per_class), wrong)


def labels_among(classes: tuple[str, ...], found: Found) -> np.ndarray:
    """Labels of files found in another folder, whose classes have to be among these.

    Raises:
        InputError: a class of the other folder is none of these.
    """
    position = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in found.classes if name not in position]
    if unknown:
        raise InputError(
            f"Expected class folders of the training images in {found.folder!r}, received {unknown[0]!r} "
            f"({len(unknown)} of {len(found.classes)} are not among them); {nearest(unknown[0], list(classes)[:10])}"
        )
    return np.array([position[name] for name in found.classes], np.int32)[found.labels]


def _class_folders(folder: str) -> tuple[list[str], list[Wrong]]:
    classes, wrong = [], []
    try:
        for entry in _entries(folder):
            if _is_folder(entry):
                classes.append(entry.name)
            else:
                wrong.append(Wrong(_where(folder, entry.name), "in no class folder"))
    except OSError as error:
        raise InputError(
            f"Expected a folder that holds a folder of images for each class, received {folder!r}: "
            f"{error.strerror}. Correct the path."
        ) from error
    return classes, wrong


def _check_layout(folder: str, classes: list[str], wrong: list[Wrong], least: int) -> None:
    lower = {name.lower(): name for name in classes}
    if TRAINING & lower.keys() and lower.keys() <= SPLITS:
        raise InputError(
            f"Expected a folder for each class in {folder!r}, received the splits {', '.join(classes)}. "
            f"Pass them as {_split_options(folder, lower)}."
        )
    if len(classes) >= least:
        return
    inner = os.path.join(folder, classes[0]) if classes else ""
    if classes and (folders := _class_folders(inner)[0]):
        remedy = f"It holds {len(folders)} folders itself: pass --images {inner}, if they are the classes."
    else:
        remedy = "Put the images of each class into a folder of its own, named as the class."
    raise InputError(
        f"Expected {least} class folders or more in {folder!r}, received {len(classes)} and {len(wrong)} other "
        f"files. {remedy}"
    )


def _split_options(folder: str, names: dict[str, str]) -> str:
    """What to type for folders that are splits already."""
    train = next(name for lower, name in names.items() if lower in TRAINING)
    validation = [name for lower, name in names.items() if lower in VALIDATION]
    options = f"--images {os.path.join(folder, train)}"
    return options + (f" --validation-images {os.path.join(folder, validation[0])}" if validation else "")


def _walk(root: str, name: str, above: list[tuple[int, int]]) -> Iterator[str | Wrong]:
    """Names of all files below a folder, and what cannot be followed. Links are followed, but not in a circle."""
    path = os.path.join(root, name)
    try:
        here = _identity(path)
        if here in above:
            yield Wrong(_where(root, name), "a link to a folder that it lies in")
            return
        entries = _entries(path)
    except OSError as error:
        yield Wrong(_where(root, name), f"a folder that cannot be read ({error.strerror})")
        return
    for entry in entries:
        inner = f"{name}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(root, inner, [*above, here])
        else:
            yield inner


def _identity(path: str) -> tuple[int, int]:
    """What a folder is called by whatever links lead to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Of a link that leads to itself, the entry's own method raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _entries(path: str) -> list[os.DirEntry[str]]:
    """What a folder holds, without by-catch, in an order that no locale and no file system changes."""
    with os.scandir(path) as entries:
        own = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in BY_CATCH]
    return sorted(own, key=lambda entry: os.fsencode(entry.name))


def _base(found: Found) -> str:
    return os.path.basename(os.path.realpath(found.folder))


def _where(folder: str, name: str) -> str:
    return repr(os.path.join(folder, name))
