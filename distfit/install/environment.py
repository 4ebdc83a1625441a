"""The packages of this environment: replaced only by what was verified, put back otherwise.

    with kept_unless_verified(facts, log):
        put(facts, wheels, log)
        verify(facts, log)
        mark(key)

When anything inside raises, the packages that were there before come back.
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distfit.install import recipe
from distfit.install.build import pip
from distfit.install.facts import Facts

_MARK = "distfit.json"
_REPLACED = ("horovod", "mpi4py")


def installed_key() -> str | None:
    """The cache key of the Horovod that is installed, None when it is absent or not ours."""
    distribution = _distribution("horovod")
    text = distribution.read_text(_MARK) if distribution else None
    return json.loads(text)["key"] if text else None


def mark(key: str) -> None:
    """Write beside the installed Horovod that it was built for this key and verified."""
    distribution = importlib.metadata.distribution("horovod")
    name = f"horovod-{recipe.HOROVOD}.dist-info/{_MARK}"
    path = Path(str(distribution.locate_file(name)))
    # pip uninstalls what RECORD lists; a file that stayed behind would look like an installed package.
    with path.with_name("RECORD").open("a") as record:
        record.write(f"{name},,\n")
    temporary = path.with_name(f".{_MARK}")
    temporary.write_text(json.dumps({"key": key}))
    os.replace(temporary, path)


def put_mpi(facts: Facts, log: Path) -> None:
    """Install PyPI's Open MPI and mpi4py's wheel."""
    pip(facts, ["install", recipe.OPEN_MPI, recipe.MPI4PY], recipe.run_environment(facts, os.environ), log)


def put(facts: Facts, wheels: list[Path], log: Path) -> None:
    """Install the wheels and what they need to run."""
    environment = recipe.run_environment(facts, os.environ)
    from_pypi = facts.mpi is not None and facts.mpi.from_pypi
    needed = [*recipe.RUNTIME_REQUIREMENTS, *([recipe.MPI4PY] if from_pypi else [])]
    pip(facts, ["install", *needed], environment, log)
    if from_pypi and _is_from_a_file("mpi4py"):  # ours, for an MPI of the system that is no longer chosen
        pip(facts, ["install", "--no-deps", "--force-reinstall", recipe.MPI4PY], environment, log)
    pip(facts, ["install", "--no-deps", "--force-reinstall", *map(str, wheels)], environment, log)


@contextmanager
def kept_unless_verified(facts: Facts, log: Path) -> Iterator[None]:
    """Whatever happens inside, Ctrl-C included, the packages end as they were unless it succeeds."""
    with tempfile.TemporaryDirectory(prefix="distfit-kept-") as folder:
        kept = {name: _copy_files(name, Path(folder) / name) for name in _REPLACED}
        try:
            yield
        except BaseException:
            _put_back(facts, kept, log)
            raise


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    importlib.invalidate_caches()  # pip may have changed the folder under this process
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_from_a_file(name: str) -> bool:
    distribution = _distribution(name)
    return distribution is not None and distribution.read_text("direct_url.json") is not None


def _copy_files(name: str, folder: Path) -> list[tuple[Path, Path]]:
    """(copy, original) of each file that the package installed; nothing when it is not there."""
    distribution = _distribution(name)
    pairs = []
    for number, file in enumerate((distribution.files or []) if distribution else []):
        original = Path(str(file.locate()))
        if original.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            pairs.append((Path(shutil.copy2(original, folder / str(number))), original))
    return pairs


def _put_back(facts: Facts, kept: dict[str, list[tuple[Path, Path]]], log: Path) -> None:
    new = [name for name in kept if _distribution(name)]
    if new:
        pip(facts, ["uninstall", "--yes", *new], recipe.run_environment(facts, os.environ), log)
    for pairs in kept.values():
        for copy, original in pairs:
            original.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(copy, original)
