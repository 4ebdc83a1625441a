"""What is checked: a script, a configuration, or a function that returns the arguments of distfit.fit.

target_of("train.py", ["--epochs", "3"])
target_of("configs/digits.yaml", ["batch_size=64"])
target_of("mypackage.jobs:arguments")
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from distfit.errors import InputError

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_CONFIGURATIONS = (".yaml", ".yml")


class Kind(StrEnum):
    """Ways to name a training."""

    script = "script"
    configuration = "configuration"
    function = "function"


@dataclass(frozen=True)
class Target:
    """A training that can be started again and again.

    Args:
        kind: what `name` is.
        name: of a file, as it was given, or `package.module:function`.
        arguments: of a script its own, of a configuration `key=value` that replace fields.
    """

    kind: Kind
    name: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.name, *self.arguments))


def target_of(named: str | os.PathLike | Callable, arguments: Sequence[str] = ()) -> Target:
    """What a user named.

    Args:
        named: a file, `package.module:function`, or a function of a module.
        arguments: as in `Target`.

    Raises:
        InputError: there is no such file, or it cannot be started again in another process.

    >>> target_of("jobs:arguments").kind
    <Kind.function: 'function'>
    """
    name = _path_of(named) if callable(named) else os.fspath(named)
    if _FUNCTION.fullmatch(name) and not Path(name).exists():
        if arguments:
            raise InputError(f"Expected no arguments behind the function {name}, received {' '.join(arguments)!r}.")
        return Target(Kind.function, name)
    if not Path(name).is_file():
        raise InputError(
            "Expected a script, a configuration (.yaml) or package.module:function to check, received "
            f"{name!r}, which is no file. Correct the name: distfit check train.py"
        )
    kind = Kind.configuration if name.endswith(_CONFIGURATIONS) else Kind.script
    return Target(kind, name, tuple(arguments))


def _path_of(function: Callable) -> str:
    module, name = function.__module__, getattr(function, "__qualname__", type(function).__name__)
    if module == "__main__" or not name.isidentifier():
        raise InputError(
            "Expected a function that other processes can import, one of a module and not inside of another function, "
            f"received {module}:{name}. Move it into a module, or name the script."
        )
    return f"{module}:{name}"
