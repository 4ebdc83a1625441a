"""Files by path, wherever they lie: the operating system's, and those of `scheme://` through TensorFlow.

    size, time_ns = size_and_time("gs://bucket/train-00000-of-00008.tfrecord")
    file = open_file("data/train-00000-of-00008.tfrecord")
    file.read_at(offset=4096, length=1024)          # from any thread; shorter at the end of the file

What goes wrong is an `OSError`, as for local files. TensorFlow is imported for paths with a scheme only; which
schemes there are is its matter (`tf.io.gfile.get_registered_schemes`; the package tensorflow-io brings more).
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from distfit.errors import InputError

CHUNK = 8 << 20


class OpenFile(Protocol):
    """A file that is read from any place by any thread; it closes with its last reference."""

    path: str

    def size(self) -> int:
        """Bytes that it has now."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """So many bytes from there; fewer where the file ends."""
        ...

    def will_need(self, offset: int, length: int) -> None:
        """Asks for these bytes to be fetched in the background, where the file system can."""
        ...


def is_remote(path: str) -> bool:
    """Whether TensorFlow reads it.

    >>> is_remote("gs://bucket/train-*"), is_remote("/data/train-*")
    (True, False)
    """
    return "://" in path


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes of a file, and when it was last changed, in nanoseconds; 0 where the file system does not say."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with _errors_of_the_system(path) as gfile:
        found = gfile.stat(path)
    if found.is_directory:
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    return found.length, found.mtime_nsec


def is_file(path: str) -> bool:
    """Whether a file is there; what cannot be asked is an error, not a no."""
    try:
        if not is_remote(path):
            return stat.S_ISREG(os.stat(path).st_mode)
        size_and_time(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether a folder is there."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _errors_of_the_system(path) as gfile:
        return gfile.isdir(path)


def names_in(folder: str) -> list[str]:
    """The names of what lies in a folder, sorted; folders in it have no slash at the end."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    with _errors_of_the_system(folder) as gfile:
        return sorted(name.rstrip("/") for name in gfile.listdir(folder))


def matching(pattern: str) -> list[str]:
    """The files that a pattern matches, sorted; `**` for any depth is for local files only."""
    if not is_remote(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    with _errors_of_the_system(pattern) as gfile:
        # Asking of each whether it is a folder would be one request each.
        return sorted(gfile.glob(pattern))


def open_file(path: str) -> OpenFile:
    """A file to be read at any place."""
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


def chunks(path: str, size: int = CHUNK) -> Iterator[bytes]:
    """A file from its beginning to its end, in pieces of at most `size` bytes."""
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(size):
                yield chunk
        return
    remote, at = open_file(path), 0
    while chunk := remote.read_at(at, size):
        yield chunk
        at += len(chunk)


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1  # for __del__, should opening fail
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        # One call reads at most 2 GiB, and a signal may cut it short on a network file system.
        while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
            data += more
        return data

    def will_need(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _RemoteFile:
    """As a `GFile` has one position, each read takes one that no other thread uses, or opens one more."""

    def __init__(self, path: str) -> None:
        self.path = path
        with _errors_of_the_system(path) as gfile:
            file = gfile.GFile(path, "rb")
            file.size()  # opening alone does not look whether it is there
        self._idle = [file]

    def size(self) -> int:
        return size_and_time(self.path)[0]

    def read_at(self, offset: int, length: int) -> bytes:
        import tensorflow as tf

        with _errors_of_the_system(self.path) as gfile:
            try:
                file = self._idle.pop()
            except IndexError:
                file = gfile.GFile(self.path, "rb")
            try:
                file.seek(offset)
                data = file.read(length)
            except tf.errors.OutOfRangeError:  # beyond the end
                data = b""
            self._idle.append(file)
        return data

    def will_need(self, offset: int, length: int) -> None:
        """Nothing: these file systems read ahead by themselves."""


def unreadable(path: str, error: OSError) -> InputError:
    """What is said of a file of records that cannot be opened or asked for."""
    return InputError(
        f"Expected a TFRecord file that can be read, received {path!r}: {error.strerror}. "
        "Check the path and its permissions."
    )


@contextmanager
def _errors_of_the_system(path: str) -> Iterator[Any]:
    """`tf.io.gfile`, whose errors leave as the operating system's do."""
    import tensorflow as tf

    try:
        yield tf.io.gfile
    except tf.errors.UnimplementedError as error:
        scheme = path.split("://", 1)[0]
        known = sorted(name for name in tf.io.gfile.get_registered_schemes() if name)
        if scheme in known:
            raise OSError(errno.ENOTSUP, error.message, path) from error
        raise InputError(
            f"Expected a path that TensorFlow can read here ({', '.join(name + '://' for name in known)}), received "
            f"{path!r}. Copy the files to a disk, mount the bucket and name the mounted path, or import a package "
            "that brings this file system, such as tensorflow-io."
        ) from error
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", path) from error
    except (tf.errors.PermissionDeniedError, tf.errors.UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, error.message, path) from error
    except tf.errors.OpError as error:
        raise OSError(errno.EIO, " ".join(error.message.split()), path) from error
