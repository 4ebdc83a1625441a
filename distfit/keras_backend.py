"""Which library Keras will compute with, told before Keras is imported: with a backend that is not installed,
`import keras` fails with a traceback that names neither the setting nor the remedy.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from distfit.errors import InputError

VARIABLE = "KERAS_BACKEND"
NEEDED = "tensorflow"


def configured(environment: Mapping[str, str]) -> tuple[str, str]:
    """The backend, and what names it: the variable, Keras' own file, or nothing.

    >>> configured({"KERAS_BACKEND": "jax"})
    ('jax', 'KERAS_BACKEND')
    """
    if environment.get(VARIABLE):
        return environment[VARIABLE], VARIABLE
    named = from_file(environment)
    return (named, str(_file(environment))) if named else (NEEDED, "")


def from_file(environment: Mapping[str, str]) -> str | None:
    """What Keras' own file says, None where it says nothing."""
    try:
        return json.loads(_file(environment).read_text()).get("backend")
    except (OSError, ValueError, AttributeError):  # none, or one that Keras ignores too
        return None


def _file(environment: Mapping[str, str]) -> Path:
    """Where Keras looks: a user without a home that can be written, as in a container, has it in /tmp."""
    home = os.path.expanduser("~")
    folder = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    return Path(os.path.expanduser(environment.get("KERAS_HOME") or folder)) / "keras.json"


def refuse_others(environment: Mapping[str, str]) -> None:
    """
    Raises:
        InputError: Keras would not run on TensorFlow.
    """
    backend, where = configured(environment)
    if backend != NEEDED:
        raise InputError(
            f"Expected Keras to run on TensorFlow, received the backend {backend!r} from {where}. Type: "
            f"export {VARIABLE}={NEEDED} (it must be set before Keras is imported)."
        )
