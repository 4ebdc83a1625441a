"""Which library Keras will compute with, told before Keras is imported: with a backend that is not installed,
`import keras` fails with a traceback that names neither the setting nor the remedy.
"""

import json
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
    file = Path(environment.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    try:
        named = json.loads(file.read_text()).get("backend")
    except (OSError, ValueError, AttributeError):  # none, or one that Keras ignores too
        named = None
    return (str(named), str(file)) if named else (NEEDED, "")


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
