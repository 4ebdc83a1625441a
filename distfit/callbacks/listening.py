"""Keras' list of callbacks, which does not wait for the device where nobody listens.

keras.callbacks.CallbackList turns a batch's logs into Python numbers for all callbacks and before it knows whether
one of them looks at batches (keras 3.15, callbacks/callback_list.py; its way round that, another thread, is shut on
TensorFlow). Every number is a wait for the step that has just begun, so that the device idles while Python prepares
the next one. Here numbers are made where a callback listens that may want them; a callback that says
`reads_late = True` takes tensors, and reads them when it needs to.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.utils.python_utils import is_default, pythonify_logs


class Listening(keras.callbacks.CallbackList):
    """As keras.callbacks.CallbackList, in everything that a callback can see."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._tell(("on_train_batch_end", "on_batch_end"), batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._tell(("on_test_batch_end",), batch, logs)

    def _tell(self, methods: tuple[str, ...], batch: int, logs: Any) -> None:
        """Call the first method of those callbacks that have one of their own."""
        listening = [
            callback
            for callback in self.callbacks
            if not all(is_default(getattr(callback, method)) for method in methods)
        ]
        late = all(getattr(callback, "reads_late", False) for callback in listening)
        given = _flat(logs or {}) if late else pythonify_logs(logs)
        for callback in listening:
            getattr(callback, methods[0])(batch, logs=given)


def _flat(logs: dict) -> dict:
    """What a metric gives by names of its own stands beside the others, as in Keras' numbers.

    >>> _flat({"b": {"c": 2, "d": 3}, "a": 1})
    {'a': 1, 'c': 2, 'd': 3}
    """
    found: dict = {}
    for name, value in sorted(logs.items()):
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found
