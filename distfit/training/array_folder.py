"""NumPy arrays that grow row by row on disk, in a folder that appears when all of them are whole.

    arrays = ArrayFolder("predictions")
    arrays.begin()
    arrays.append({"digits": rows, "sizes": others})      # any number of times
    maps = arrays.publish()                               # {"digits": numpy.memmap, "sizes": numpy.memmap}

Until it is published, everything lies in `.predictions.partial` beside it. A process that is killed leaves that there,
and the next one that writes to the same folder takes it away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from distfit import checks
from distfit.errors import InputError, RunError

LISTING = "predictions.json"


class ArrayFolder:
    """One file `NAME.npy` for each array, and a listing of their types and shapes.

    Args:
        folder: made by `publish`; may be there, empty.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        # Where a relative path or a link leads now, whatever the script does meanwhile.
        self._folder = Path(os.path.realpath(folder))
        self._partial = self._folder.with_name(f".{self._folder.name}.partial")
        self._arrays: dict[str, _Growing] = {}
        self._identity: tuple[int, int] | None = None

    def begin(self) -> None:
        """Make the folder in which the arrays grow.

        Raises:
            InputError: the folder holds something, or cannot be made.
        """
        checks.writable(self._folder)
        _refuse_content(self._folder)
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir()
            self._identity = _identity(self._partial)
        except OSError as error:
            raise InputError(
                f"Expected to be able to write predictions to {self._folder}, received: {error}. Choose another folder."
            ) from error

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """More rows of each array; the first call says which arrays there are, of which types and shapes.

        Raises:
            InputError: no file can hold them: Python objects, or rows of several shapes.
            RunError: the disk takes no more.
        """
        with self._explained():
            for name, own in rows.items():
                if name not in self._arrays:
                    self._arrays[name] = _Growing(name, self._partial / f"{name}.npy", own)
                self._arrays[name].append(own)

    def publish(self) -> dict[str, np.memmap]:
        """Give the folder its name, with all that it holds on disk; the arrays, read where they lie.

        Raises:
            RunError: the disk takes no more, or another process has taken the place.
        """
        with self._explained():
            if not self._is_ours():
                raise FileExistsError
            for array in self._arrays.values():
                array.close()
            self._write_listing()
            _to_disk(self._partial)
            os.rename(self._partial, self._folder)
            _to_disk(self._folder.parent)
        return {name: array.mapped(self._folder / f"{name}.npy") for name, array in self._arrays.items()}

    def discard(self) -> None:
        """Take away what has not been published; nothing after `publish`."""
        for array in self._arrays.values():
            array.abandon()
        if self._is_ours():
            shutil.rmtree(self._partial)

    def _is_ours(self) -> bool:
        return self._identity is not None and _identity(self._partial) == self._identity

    def _write_listing(self) -> None:
        outputs = {name: {"dtype": str(array.dtype), "shape": array.shape} for name, array in self._arrays.items()}
        with open(self._partial / LISTING, "w") as file:
            json.dump(outputs, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = (error.strerror or error) if self._is_ours() else "another process writes there, too"
            raise RunError(
                f"Expected to write predictions to {self._folder}, received: {reason}; what was written is taken away "
                "again. Make room, or choose another folder, and predict again."
            ) from error


class _Growing:
    """An .npy file of a number of rows that is known at the end.

    NumPy leaves room in a header for the first dimension to grow (numpy.lib.format.GROWTH_AXIS_MAX_DIGITS), so that
    it is written again, in place, with the last number.
    """

    def __init__(self, name: str, path: Path, rows: np.ndarray) -> None:
        if rows.dtype.hasobject:
            raise InputError(
                f"Expected numbers to write predictions to disk, received Python objects (strings, say) in the output "
                f"{name!r}. Leave `to` out, or let the model give numbers."
            )
        self._name = name
        self.dtype = rows.dtype
        self._row = rows.shape[1:]
        self._rows = 0
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by `close` or `abandon`
        self._write_header()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows, *self._row)

    def append(self, rows: np.ndarray) -> None:
        if rows.shape[1:] != self._row or rows.dtype != self.dtype:
            raise InputError(
                f"Expected rows of one shape and type to write predictions to disk, received {self._row} and "
                f"{rows.shape[1:]} ({self.dtype} and {rows.dtype}) in the output {self._name!r}. Leave `to` out or let "
                "the model pad its output."
            )
        self._file.write(rows.tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close a file that will be removed."""
        with suppress(OSError):  # a full disk does not take what is still buffered, and need not
            self._file.close()

    def mapped(self, path: Path) -> np.memmap:
        # A type that NumPy does not know (bfloat16) is bytes in its files.
        return np.load(path, mmap_mode="r").view(self.dtype)

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        npy.write_array_header_1_0(self._file, header)


def _refuse_content(folder: Path) -> None:
    if os.path.ismount(folder):
        raise InputError(f"Expected a folder that can be made, received {folder}, a mount point. Pass a folder in it.")
    if folder.exists() and (found := sorted(entry.name for entry in folder.iterdir())):
        raise InputError(
            f"Expected a folder for predictions that is not there yet, or empty, received {folder}, which holds "
            f"{found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}. Remove it, or choose another folder."
        )


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of the same name; None where there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
