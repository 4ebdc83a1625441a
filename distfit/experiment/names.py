"""Names in a configuration that mean a user's own code: found, called, and what goes wrong told by its line.

build = named("model", "mypackage.models:build")
model = call("model", build, input_shape=(8, 8, 1), classes=10)
"""

import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from distfit.errors import DistfitError, InputError, nearest


def named(field: str, path: str) -> Any:
    """What a `package.module:function` names.

    Args:
        field: of the configuration, for the error.
        path: as it stands there.

    Raises:
        InputError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _raised(f"the module {module_name} that {field} names to be imported", module_name, error) from error
        raise InputError(
            f"Expected {field} to name a module that can be imported, received {path!r} ({error}). Correct "
            "the name, or start in the folder where the module lies."
        ) from error
    except Exception as error:
        raise _raised(f"the module {module_name} that {field} names to be imported", module_name, error) from error
    if not callable(getattr(module, name, None)):
        known = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise InputError(
            f"Expected {field} to name a function of {module_name} ({getattr(module, '__file__', 'built in')}), "
            f"received {name!r}; {nearest(name, known) if known else 'it has none.'}"
        )
    return getattr(module, name)


def call(field: str, function: Callable[..., Any], /, **arguments: Any) -> Any:
    """What a user's function returns.

    Args:
        field: of the configuration that named it, for the error.

    Raises:
        InputError: whatever the function raises, with the line of the user's code that it came from.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    with running(field, f"{function.__module__}:{name}"):
        return function(**arguments)


@contextmanager
def running(field: str, path: str) -> Iterator[None]:
    """Around a user's code: what it raises becomes an error about the field that named it.

    Raises:
        InputError: whatever is raised inside, with the line of the user's code that it came from.
    """
    try:
        yield
    except DistfitError:
        raise
    except Exception as error:
        raise _raised(f"{path} that {field} names to return", path, error) from error


def check_arguments(field: str, path: str, function: Callable[..., Any], given: dict[str, Any], ours: set[str]) -> None:
    """Refuse options that a function does not have, before it is called.

    Args:
        field: that named the function.
        path: of the function, as it stands there.
        given: all arguments, by name.
        ours: those that distfit gives; the others are those of `{field}_options`.

    Raises:
        InputError: one too many, or one is missing.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(**given)
    except TypeError as error:
        own = [name for name in signature.parameters if name not in ours]
        takes = [*(name for name in given if name in ours), f"the {field}_options"]
        raise InputError(
            f"Expected {path} to take {' and '.join(takes)}, received: "
            f"{error}. It takes {', '.join(signature.parameters)}; {field}_options may be {', '.join(own) or 'none'}."
        ) from error


def one_sentence(error: Exception, most: int = 400) -> str:
    """An error's text within a paragraph; Keras' can be pages.

    >>> one_sentence(ValueError("no such\\n  layer"))
    'no such layer.'
    """
    # Keras prints some of them in bold.
    words = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    text = words if len(words) <= most else f"{words[: most - 3]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def own_objects(path: str) -> dict[str, Any]:
    """The classes and functions that a user's module has beside the named one, by name, for loading a model."""
    module = importlib.import_module(path.partition(":")[0])
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and not value.__module__.startswith(f"{keras.__name__}.")
    }


def _raised(expected: str, path: str, error: Exception) -> InputError:
    return InputError(
        f"Expected {expected}, received {type(error).__name__}{line_of(path, error)}: "
        f"{one_sentence(error)} Correct that code; distfit --debug shows the whole traceback."
    )


def line_of(path: str, error: Exception) -> str:
    """Where the user's code was when it failed, as " from FILE:LINE (FUNCTION)", or nothing.

    Its own last line, not one of a library that it called. Code that TensorFlow traces is translated first; then
    its message says the lines, and the frames are those of a file that nobody wrote.

    Args:
        path: `package.module`, with or without a `:function`; what lies in this package is the user's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" from {error.filename}:{error.lineno}"
    package = path.partition(":")[0].partition(".")[0]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        ours = module.startswith(f"{__package__}.")
        if module.partition(".")[0] == package and not ours and "__autograph_generated" not in frame.f_code.co_filename:
            return f" from {frame.f_code.co_filename}:{line} ({frame.f_code.co_name})"
    return ""
