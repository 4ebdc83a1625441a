"""Which files hold the records.

    expand("data/digits")                   # the TFRecord files of a folder
    expand("gs://bucket/digits/train-*")    # of a pattern, wherever TensorFlow can read
    expand(["a.tfrecord", "b.tfrecord"])    # of a list

Records are numbered in the sorted order of their files.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator

from distfit.data import storage
from distfit.errors import InputError, nearest

_SHARD = re.compile(
    r"(?P<split>.+)-(?P<shard>\d{5,})-of-(?P<shards>\d{5,})(?P<ending>(\.tfrecords?|\.tfrec|)(\.gz|\.zz|))"
)
_ENDINGS = tuple(name + form for name in (".tfrecord", ".tfrecords", ".tfrec") for form in ("", ".gz", ".zz"))


def expand(files: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """The sorted files that a folder, a pattern or a list of files means.

    A folder means the TFRecord files in it, of which there must be one split only. Files that are named as
    shards (`train-00003-of-00008.tfrecord`) must be all there, unless exactly one file is named.

    Raises:
        InputError: nothing there, several splits in a folder, a file twice, shards missing, or a file system
            that cannot be read.
    """
    given = os.fspath(files) if isinstance(files, (str, os.PathLike)) else [os.fspath(file) for file in files]
    with refusing_what_cannot_be_asked():
        return _expanded(given)


@contextlib.contextmanager
def refusing_what_cannot_be_asked() -> Iterator[None]:
    """Where folders are looked through: what the system refuses is an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"Expected to find TFRecord files at {error.filename!r}, received: {error.strerror}. Check that this host "
            "and this user may read there, or copy the files to a disk."
        ) from error


def is_record_file(name: str) -> bool:
    """Whether a file in a folder is taken for a TFRecord file, by its name.

    >>> [is_record_file(n) for n in ("a.tfrecord", "train-00000-of-01024", "dataset.json", ".a.tfrecord")]
    [True, True, False, False]
    """
    return not name.startswith(".") and (name.endswith(_ENDINGS) or _SHARD.fullmatch(name) is not None)


def split_of(name: str) -> str | None:
    """The split that a shard belongs to, by its name; None where it is no shard's name.

    >>> split_of("train-00003-of-00008.tfrecord"), split_of("train.tfrecord")
    ('train', None)
    """
    match = _SHARD.fullmatch(name)
    return match["split"] if match else None


def missing_shards(files: Iterable[str]) -> list[str]:
    """The paths that the names of these files promise and that are not among them, sorted.

    >>> missing_shards(["a/b.tfrecord", "a/train-00000-of-00003", "a/train-00002-of-00003"])
    ['a/train-00001-of-00003']
    """
    present: dict[tuple[str, str, str, str], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(os.path.basename(file)):
            present.setdefault(_set_of(file), set()).add(int(match["shard"]))
    return [
        os.path.join(folder, f"{split}-{number:0{len(shards)}d}-of-{shards}{ending}")
        for (folder, split, shards, ending), numbers in sorted(present.items())
        for number in sorted(set(range(int(shards))) - numbers)
    ]


def _expanded(files: str | list[str]) -> list[str]:
    if isinstance(files, str):
        if storage.is_file(files):
            return [files]
        found = _in_folder(files) if storage.is_folder(files) else _matching(files)
    else:
        found = [_existing(file) for file in files]
        _refuse_repeated(found)
    _refuse_missing_shards(found)
    return sorted(found)


def _in_folder(folder: str) -> list[str]:
    names = [name for name in storage.names_in(folder) if is_record_file(name)]
    if not names:
        raise InputError(
            "Expected TFRecord files (*.tfrecord, *.tfrecords, *.tfrec, each perhaps with .gz or .zz, or shards named "
            f"NAME-00000-of-00008) in the folder {folder!r}, received {_listing(folder)}. "
            "Name another folder, or a pattern that matches the files."
        )
    splits = sorted({split for name in names if (split := split_of(name))})
    if len(splits) > 1:
        raise InputError(
            f"Expected one split in the folder {folder!r}, received {', '.join(splits)}. Name the one you "
            f"mean by a pattern, as in {os.path.join(folder, splits[0] + '-*')!r}."
        )
    return [os.path.join(folder, name) for name in names]


def _matching(pattern: str) -> list[str]:
    found = storage.matching(pattern)
    if not found:
        raise InputError(f"Expected TFRecord files at {pattern!r}, received none: {_what_is_there(pattern)}")
    return found


def _existing(path: str) -> str:
    if not storage.is_file(path):
        raise InputError(f"Expected TFRecord files, received {path!r} in their list: {_what_is_there(path)}")
    return path


def _what_is_there(path: str) -> str:
    """The nearest thing that exists, for somebody who mistyped one part of a path."""
    if storage.is_folder(path):
        return f"it is a folder. Name the files in it by a pattern, as in {os.path.join(path, 'part-*')!r}."
    if storage.is_remote(path):
        return _what_is_there_remotely(path)
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    return f"there is no {name!r} in {folder!r}; {_near(name, folder)}"


def _what_is_there_remotely(path: str) -> str:
    # Object stores have no folders to walk up in, only names with slashes.
    folder, name = os.path.split(path)
    if not storage.is_folder(folder):
        return f"there is no folder {folder!r}; check its name."
    return f"there is no {name!r} in {folder!r}; {_near(name, folder)}"


def _near(name: str, folder: str) -> str:
    here = _seen_in(folder)
    return nearest(name, here) if 0 < len(here) <= 5 or _close(name, here) else f"{_listing(folder)}."


def _close(name: str, entries: list[str]) -> bool:
    return bool(entries) and nearest(name, entries).startswith("did you mean")


def _listing(folder: str, most: int = 5) -> str:
    here = _seen_in(folder)
    if not here:
        return "an empty folder"
    more = f" and {len(here) - most} more" if len(here) > most else ""
    return f"a folder with {', '.join(here[:most])}{more}"


def _seen_in(folder: str) -> list[str]:
    return [name for name in storage.names_in(folder) if not name.startswith(".")]


def _refuse_repeated(files: list[str]) -> None:
    seen: set[str] = set()
    for file in files:
        real = file if storage.is_remote(file) else os.path.realpath(file)
        if real in seen:
            raise InputError(
                f"Expected each file once, received {file!r} twice: its records would count double. "
                "Remove one of them from the list."
            )
        seen.add(real)


def _refuse_missing_shards(files: list[str]) -> None:
    missing = missing_shards(files)
    if not missing:
        return
    folder, split, shards, _ = _set_of(missing[0])
    names = [os.path.basename(path) for path in missing if _set_of(path) == _set_of(missing[0])]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise InputError(
        f"Expected all {int(shards)} shards of {os.path.join(folder, split)!r}, received {int(shards) - len(names)}: "
        f"missing {', '.join(names[:5])}{more}. Restore them, or, to use only a part of the data, link that part under "
        f"names without '-of-{shards}'."
    )


def _set_of(path: str) -> tuple[str, str, str, str]:
    """The set of shards that a shard belongs to: folder, split, how many there are as it is written, and ending."""
    folder, name = os.path.split(path)
    match = _SHARD.fullmatch(name)
    assert match is not None
    return folder, match["split"], match["shards"], match["ending"]
