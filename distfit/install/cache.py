"""The wheels that were built before, in the user's cache: whole and as they were written, or not used.

    shelf = Shelf(key)              # ~/.cache/distfit/horovod/<key>/
    wheels = shelf.load(say)        # None: nothing there, or damaged, which is said
    shelf.store(built, made_of)

The manifest beside the wheels says what the key was made of and holds each file's checksum.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from distfit.errors import InputError

_MANIFEST = "manifest.json"


class Shelf:
    """One folder of the cache.

    Args:
        key: the folder's name.
        environment: XDG_CACHE_HOME, if set to an absolute path, is used in place of ~/.cache.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, key: str, environment: Mapping[str, str] = os.environ):
        self.folder = cache_root(environment) / "horovod" / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.install_log.write_text("")
        except OSError as error:
            raise InputError(
                f"Expected to keep Horovod's build in {self.folder}, received {error}. Name a folder that "
                "can be written: XDG_CACHE_HOME=/path distfit horovod install"
            ) from error

    @property
    def build_log(self) -> Path:
        """The full output of the last build."""
        return self.folder / "build.log"

    @property
    def install_log(self) -> Path:
        """The full output of the last installation from this folder, its verification included."""
        return self.folder / "install.log"

    def load(self, say: Callable[[str], None]) -> list[Path] | None:
        """The wheels, when all of them are there and their checksums are right."""
        manifest = self.folder / _MANIFEST
        if not manifest.exists():
            return None
        damage = _damage(manifest)
        if damage:
            say(f"The cached build in {self.folder} is damaged ({damage}); building anew.")
            return None
        return [self.folder / name for name in json.loads(manifest.read_text())["wheels"]]

    def store(self, wheels: list[Path], made_of: Mapping[str, object]) -> list[Path]:
        """Take the wheels in; the manifest comes last, so that a killed copy is never taken for a build."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        kept = [_copy_whole(wheel, self.folder / wheel.name) for wheel in wheels]
        content = {"made_of": made_of, "wheels": {wheel.name: _sha256(wheel) for wheel in kept}}
        temporary = self.folder / f".{_MANIFEST}.{os.getpid()}"
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            _to_disk(file.fileno(), file.flush)
        os.replace(temporary, self.folder / _MANIFEST)
        return kept


def cache_root(environment: Mapping[str, str]) -> Path:
    """Where distfit keeps what can be made again.

    >>> cache_root({"XDG_CACHE_HOME": "/scratch/cache"}).as_posix()
    '/scratch/cache/distfit'
    """
    given = Path(environment.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "distfit"


def _damage(manifest: Path) -> str | None:
    try:
        wheels: dict[str, str] = json.loads(manifest.read_text())["wheels"]
    except (ValueError, KeyError):
        return f"{manifest.name} cannot be read"
    for name, checksum in wheels.items():
        wheel = manifest.parent / name
        if not wheel.exists():
            return f"{name} is gone"
        if _sha256(wheel) != checksum:
            return f"the checksum of {name} differs"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_whole(source: Path, target: Path) -> Path:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with source.open("rb") as read, temporary.open("wb") as write:
        shutil.copyfileobj(read, write)
        _to_disk(write.fileno(), write.flush)
    os.replace(temporary, target)
    return target


def _to_disk(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)
