"""Who runs which callback: one function decides, when the list is built.

*Writers* leave files or talk to a service: the chief only. Everything else, a user's own class included,
runs on every rank, on the same global numbers, so that all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from distfit.errors import InputError

WRITERS = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.ProgbarLogger,
)


# They write and read back, each in a way of its own: on every rank they would write over each other's file, on
# the chief alone the others would not be restored.
RESTORERS = tuple(
    getattr(keras.callbacks, name) for name in ("BackupAndRestore", "OrbaxCheckpoint") if hasattr(keras.callbacks, name)
)


def callbacks_of_rank(callbacks: Any, is_chief: bool, size: int) -> list[Any]:
    """The user's callbacks that run on this rank, in their order. Subclasses follow their base.

    Args:
        callbacks: what keras.Model.fit takes: None, one callback, a list of them, or a CallbackList.
        is_chief: whether this rank writes.
        size: ranks of the job.

    Raises:
        InputError: something in the list is no Keras callback, or needs what several ranks cannot give yet.
    """
    given = _flat(callbacks)
    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise InputError(
                f"Expected callbacks to be keras.callbacks.Callback objects, received {type(callback).__name__}. "
                "Subclass keras.callbacks.Callback, or wrap a function in keras.callbacks.LambdaCallback."
            )
        if size > 1 and isinstance(callback, RESTORERS):
            raise InputError(
                f"Expected callbacks that {size} ranks can share, received {type(callback).__name__}, which every "
                "rank would write to the same files. Pass checkpoint=... to keep the model after each epoch."
            )
    return [callback for callback in given if is_chief or not isinstance(callback, WRITERS)]


def _flat(callbacks: Any) -> Sequence[Any]:
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks
    return keras.tree.flatten(callbacks)
