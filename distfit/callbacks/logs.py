"""The logs that callbacks are given: a dictionary whose values become numbers when somebody reads one.

    logs = Logs({"loss": tensor}, step=7)      # waits for nothing
    logs.get("loss")                           # waits for the device, once, for all values
    logs.step                                  # of which step of the epoch they are

Keras turns the logs of a batch into Python numbers for all callbacks before it knows whether one of them looks
(keras 3.15, callbacks/callback_list.py; its way round that, another thread, is shut on TensorFlow). Every number is a
wait for the step that has just begun, so that the device idles while Python prepares the next one.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from keras.src.utils.python_utils import pythonify_logs


class Logs(dict):
    """What `dict` is, to everybody who reads it; the names are there before the values.

    Args:
        values: by name; what a metric gives by names of its own stands beside the others, as in Keras.
        step: number within the epoch, from 0, of the last step that these are of; None for those of a whole pass.

    >>> logs = Logs({"loss": 1, "of_metric": {"f1": 1, "f2": 2}}, step=3)
    >>> list(logs), logs["loss"], {**logs}, logs.step
    (['loss', 'f1', 'f2'], 1.0, {'loss': 1.0, 'f1': 1.0, 'f2': 2.0}, 3)
    """

    def __init__(self, values: Mapping[str, Any] | None = None, step: int | None = None) -> None:
        self._given = _flat(values or {})
        super().__init__(self._given)
        self.step = step
        self._read = False

    def again(self) -> Logs:
        """The values as they were given, in a dictionary of its own, whatever somebody wrote into this one."""
        return Logs(self._given, self.step)

    def __getitem__(self, name: str) -> Any:
        return dict.__getitem__(self._numbers(), name)

    def get(self, name: str, default: Any = None) -> Any:
        return dict.get(self._numbers(), name, default)

    def items(self) -> Any:
        return dict.items(self._numbers())

    def values(self) -> Any:
        return dict.values(self._numbers())

    # Without an iterator of its own, dict(logs) and {**logs} would copy what lies beneath (CPython's dict_merge).
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def pop(self, *arguments: Any) -> Any:
        return dict.pop(self._numbers(), *arguments)

    def popitem(self) -> tuple[str, Any]:
        return dict.popitem(self._numbers())

    def setdefault(self, name: str, default: Any = None) -> Any:
        return dict.setdefault(self._numbers(), name, default)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)

    def _numbers(self) -> Logs:
        if not self._read:
            self._read = True  # first: what follows must find it so
            # What somebody wrote meanwhile stays as it is.
            given = {name: value for name, value in self._given.items() if dict.get(self, name) is value}
            dict.update(self, pythonify_logs(given))
        return self


def _flat(logs: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> _flat({"b": {"c": 2, "d": 3}, "a": 1})
    {'a': 1, 'c': 2, 'd': 3}
    """
    found: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found
