"""Folders of images as a data set: a class for each folder, a label for each file, and what is wrong with them.

    found = find_images("256_ObjectCategories")      # 001.ak47/001_0001.jpg ..., every file below a class folder
    checked = check_images(found)                    # reads and decodes each
    checked.wrong                                    # [Wrong("198.spider/RENAME2", "no image"), ...]

Classes are the folders' names, sorted; a label is a position among them. A class folder may hold further
folders. What systems leave in folders is passed over: names that begin with a dot, and those in `BY_CATCH`.
"""

import dataclasses
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import google_crc32c
import numpy as np

from distfit.data.build.ahead import ahead
from distfit.data.build.image_check import FORMATS, NotAnImage, image_format, refuse_other
from distfit.errors import InputError, RunError, nearest
from distfit.monitor.counting import Counting, silent

BY_CATCH = {"thumbs.db", "desktop.ini", "__macosx", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
TRAINING, VALIDATION = {"train", "training"}, {"val", "valid", "validation"}


@dataclass(frozen=True)
class Wrong:
    """A file that cannot be a record: its path below the folder, and why, after "it is"."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """The files below the class folders of `folder`.

    Args:
        folder: what the names are relative to.
        classes: the class folders, sorted.
        names: of the files, `class/.../file`, sorted within each class, in the order of the classes.
        labels: position of each file's class, int64.
        wrong: what was met beside files: a folder that cannot be read, a file in no class.
    """

    folder: str
    classes: tuple[str, ...]
    names: list[str]
    labels: np.ndarray
    wrong: list[Wrong]


@dataclass(frozen=True)
class Checked:
    """Images that are whole, and what was none.

    Args:
        found: the images alone, with all that is wrong.
        formats: position in `image_check.FORMATS` of each.
        sizes: bytes of each.
        checksums: CRC-32C of each, by which `read` notices a change.
    """

    found: Found
    formats: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray

    @property
    def image_format(self) -> str:
        """The one format of all images, or "mixed"."""
        names = {FORMATS[code] for code in np.unique(self.formats)}
        return names.pop() if len(names) == 1 else "mixed"

    def read(self, number: int) -> bytes:
        """The bytes of an image, as they were checked.

        Raises:
            RunError: they have changed since.
        """
        path = os.path.join(self.found.folder, self.found.names[number])
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise _changed(path, f"{error.strerror}") from error
        if google_crc32c.value(data) != self.checksums[number]:
            raise _changed(path, "other bytes")
        return data


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
    names: list[str] = []
    per_class = []
    for name in classes:
        before = len(names)
        for entry in _walk(folder, name, above):
            wrong.append(entry) if isinstance(entry, Wrong) else names.append(entry)
        per_class.append(len(names) - before)
    return Found(folder, tuple(classes), names, np.repeat(np.arange(len(classes)), per_class), wrong)


def check_images(found: Found, count: Counting = silent) -> Checked:
    """Reads and decodes every file, several at a time.

    Args:
        found: the files.
        count: shows how far it is.

    Returns:
        The whole images; the others are in `found.wrong` of it.
    """
    files = len(found.names)
    keeps, formats = np.zeros(files, bool), np.zeros(files, np.uint8)
    sizes, checksums = np.zeros(files, np.int64), np.zeros(files, np.uint32)
    wrong = list(found.wrong)
    paths = (os.path.join(found.folder, name) for name in found.names)
    with count("Checking", files, "images") as done, closing(ahead(_check, paths)) as results, _quiet():
        for number, result in enumerate(results):
            if isinstance(result, str):
                wrong.append(Wrong(found.names[number], result))
            else:
                keeps[number] = True
                formats[number], sizes[number], checksums[number] = result
            done()
    names = [found.names[number] for number in np.flatnonzero(keeps)]
    kept = dataclasses.replace(found, names=names, labels=found.labels[keeps], wrong=wrong)
    return Checked(kept, formats[keeps], sizes[keeps], checksums[keeps])


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
    return np.array([position[name] for name in found.classes], np.int64)[found.labels]


def _class_folders(folder: str) -> tuple[list[str], list[Wrong]]:
    classes, wrong = [], []
    try:
        for entry in _entries(folder):
            if _is_folder(entry):
                classes.append(entry.name)
            else:
                wrong.append(Wrong(entry.name, "in no class folder"))
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
            yield Wrong(name, "a link to a folder that it lies in")
            return
        entries = _entries(path)
    except OSError as error:
        yield Wrong(name, f"a folder that cannot be read ({error.strerror})")
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


def _check(path: str) -> tuple[int, int, int] | str:
    """Format, size and checksum of an image, or why it is none."""
    try:
        # A pipe would be waited for, a device never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no regular file"
        with open(path, "rb") as file:
            refuse_other(file)
            data = file.read()
        return FORMATS.index(image_format(data)), len(data), google_crc32c.value(data)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    except NotAnImage as reason:
        return str(reason)


def _quiet() -> warnings.catch_warnings:
    """Pillow warns of large images and of odd metadata, neither of which keeps TensorFlow from decoding them."""
    return warnings.catch_warnings(action="ignore")


def _changed(path: str, received: str) -> RunError:
    return RunError(
        f"Expected {path!r} as it was when it was checked, received {received}: it has changed while the data set "
        "was built. Build it again when nobody writes to the folder."
    )
