"""What callbacks know, saved and given back, so that they decide and write as if the run had never been killed.

    states = CallbackStates(callbacks)         # before on_train_begin
    with prepared(callbacks):                  # of a run that goes on
        callbacks.on_train_begin()
    states.restore(state, place)
    ...
    flushed(callbacks); state = states.state() # plain values, see checkpoint/plain.py

The state of a callback is what its attributes hold, as far as that is plain data and has changed since the training
began: what a script has chosen (a patience, a file's name) stays the script's. A callback with `state_dict()` and
`load_state_dict(state)` speaks for itself, as distfit.TensorBoard does. Text that was there before the training is
never taken from a checkpoint, and no text at all for callbacks of Keras and distfit: it may be the name of a file.
"""

from __future__ import annotations

import collections
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

import numpy as np

from distfit.callbacks.policy import Policy, all_of, policy_of
from distfit.callbacks.third_party import is_writer
from distfit.checkpoint import keras_states
from distfit.checkpoint.place import Place
from distfit.checkpoint.plain import NotPlain, packed, unpacked
from distfit.checkpoint.random_streams import of_numpy
from distfit.errors import InputError
from distfit.log import warn_once

# The model is saved by itself; Keras gives the others to every callback.
_NOT_STATE = frozenset(("model", "_model", "params", "_distfit_policy"))
# Larger values are not copied to know what they were.
_MOST_COPIED = 2**20
_TEXT = (str, bytes, bytearray)
# Of a callback that speaks for itself, as in PyTorch.
_OWN = ("state_dict", "load_state_dict")


class CallbackStates:
    """The states of the callbacks of this rank.

    Args:
        callbacks: in their order, before `on_train_begin`; what they hold now is no state.

    Raises:
        InputError: one has `state_dict` or `load_state_dict` without the other.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._holders: dict[str, _OfItself | _Held] = {
            name: (_OfItself if any(hasattr(callback, method) for method in _OWN) else _Held)(callback)
            for name, callback in zip(names(callbacks), callbacks, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """What each callback knows now, by the names of `names`.

        Raises:
            InputError: a `state_dict` gives something that is not plain.
        """
        return {name: holder.state() for name, holder in self._holders.items()}

    def restore(self, state: Mapping[str, Any], place: Place) -> None:
        """Give each callback what it knew, after `on_train_begin`.

        Args:
            state: of `state`, on the chief of the run before. What is in it for callbacks that this rank does not have
                is left: the chief's own, or those that the user has taken out.
            place: where the training goes on.

        Raises:
            InputError: it is no such state, or a `load_state_dict` does not take it.
        """
        for name, holder in self._holders.items():
            try:
                holder.restore(state.get(name), place)
            except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
                raise _refused(name, f"{type(error).__name__}: {error}") from error


def names(callbacks: Any) -> list[str]:
    """A name for each callback, the same in every run of a script and on every rank that has it: its class, where it
    runs if that is not everywhere, and a number from the second one on.

    Args:
        callbacks: what keras.Model.fit takes.

    Raises:
        InputError: something in it is no callback.

    >>> import keras
    >>> names([keras.callbacks.EarlyStopping(), keras.callbacks.CSVLogger("a.csv"), keras.callbacks.EarlyStopping()])
    ['EarlyStopping', 'CSVLogger (chief)', 'EarlyStopping-2']
    """
    found, counts = [], collections.Counter[str]()
    for callback in all_of(callbacks):
        # Ranks without the chief's own would count others.
        name = type(callback).__name__ + ("" if policy_of(callback) is Policy.EVERY_RANK else " (chief)")
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return found


def refuse_restorers(callbacks: Any) -> None:
    """
    Raises:
        InputError: keras.callbacks.BackupAndRestore is among them, which would put its own, older weights in place of
            those of the checkpoint.

    >>> import keras
    >>> refuse_restorers(keras.callbacks.EarlyStopping())
    """
    for callback in all_of(callbacks):
        if policy_of(callback) is Policy.RESTORER:
            raise InputError(
                f"Expected checkpoint=... alone to keep the training's state, received {type(callback).__name__} "
                "beside it, which would restore other weights and another epoch. Leave the callback out: "
                "checkpoint=... does what it does, at any step."
            )


@contextmanager
def prepared(callbacks: Sequence[Any]) -> Iterator[None]:
    """Around `on_train_begin` of a run that goes on: nothing that was written before is lost. `CallbackStates.restore`
    then takes away what was written after the checkpoint."""
    with keras_states.appending(callbacks):
        yield


def flushed(callbacks: Sequence[Any]) -> None:
    """What callbacks have written is in their files, for a run that is killed after its next checkpoint."""
    for callback in callbacks:
        keras_states.flush(callback)


class _OfItself:
    """A callback with `state_dict` and `load_state_dict`.

    Raises:
        InputError: it has one of them alone.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        for method in _OWN:
            if not callable(getattr(callback, method, None)):
                raise InputError(
                    f"Expected {type(callback).__name__} to have both methods state_dict() and load_state_dict(state), "
                    f"received no {method}. Add it, or rename the other one."
                )

    def state(self) -> dict[str, Any]:
        try:
            return {"own": _copied(self._callback.state_dict())}
        except NotPlain as error:
            raise InputError(
                f"What {type(self._callback).__name__}.state_dict() gives cannot be saved. {error}"
            ) from error

    def restore(self, state: Mapping[str, Any] | None, place: Place) -> None:
        if state is not None:
            self._callback.load_state_dict(state["own"])


class _Held:
    """The attributes of a callback.

    Args:
        callback: before the training.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._known = _is_known(callback)
        self._special = keras_states.of(callback)
        self._before = {name: _Noted(value) for name, value in self._attributes()}

    def state(self) -> dict[str, Any]:
        found, unsaved = {}, []
        for name, value in self._attributes():
            before, mark = self._before.get(name), _mark(value)
            if mark is None:
                if before is None or value is not before.value:
                    unsaved.append(name)
            elif (before is None or mark != before.mark) and self._takes(name, value):
                found[name] = _data(value)
        if unsaved and not self._known:
            _warn_of(self._callback, unsaved)
        return {"attributes": found, "keras": dict(self._special.state(self._callback))}

    def restore(self, state: Mapping[str, Any] | None, place: Place) -> None:
        """As it was; one that was not there before is as it begins."""
        if state is not None:
            # What is not in the state was as before the training, whatever on_train_begin has put there now.
            unchanged = {name: noted.value for name, noted in self._before.items() if noted.mark is not None}
            for name, value in {**unchanged, **state["attributes"]}.items():
                if self._takes(name, value) and _mark(vars(self._callback).get(name)) != _mark(value):
                    self._set(name, value)
        self._special.restore(self._callback, {} if state is None else state["keras"], place)

    def _attributes(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self._callback).items() if self._is_free(name)]

    def _is_free(self, name: str) -> bool:
        return name not in _NOT_STATE and name not in self._special.own

    def _takes(self, name: str, value: Any) -> bool:
        """Whether an attribute is state: data in place of data, and no name of a file that a script has chosen."""
        of_class = getattr_static(type(self._callback), name, None)
        before = self._before[name] if name in self._before else _Noted(of_class)
        return (
            name.isidentifier()
            and self._is_free(name)
            and not callable(of_class)
            and not hasattr(of_class, "__get__")
            and before.mark is not None
            and not isinstance(before.value, _TEXT)
            and not (self._known and isinstance(value, _TEXT))
        )

    def _set(self, name: str, value: Any) -> None:
        """In place, where somebody else may hold the same list."""
        present = vars(self._callback).get(name)
        if isinstance(present, np.random.Generator):
            present.bit_generator.state = of_numpy(value)
        elif isinstance(present, np.random.RandomState):
            present.set_state(of_numpy(value))
        elif isinstance(present, random.Random):
            present.setstate(value)
        elif isinstance(present, (dict, set)) and isinstance(value, (dict, set)):
            present.clear()
            present.update(_copied(value))
        elif isinstance(present, (list, collections.deque)) and type(present) is type(value):
            present.clear()
            present.extend(_copied(value))
        else:
            setattr(self._callback, name, _copied(value))


class _Noted:
    """What an attribute held.

    Attributes:
        value: as data; large arrays are not copied.
        mark: of it; None where it is no data.
    """

    def __init__(self, value: Any) -> None:
        self.mark = _mark(value)
        self.value = value if self.mark is None or _size(value) > _MOST_COPIED else _copied(_data(value))


def _data(value: Any) -> Any:
    """What of a value is saved: generators' states, and of dictionaries with more to them what is in them."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if isinstance(value, random.Random):
        return value.getstate()
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    return unpacked(*packed(value))


def _size(value: Any) -> int:
    return sum(array.nbytes for array in packed(_data(value), copy=False)[1].values())


def _mark(value: Any) -> str | None:
    """A text that is another one for another value; None where the value is no data."""
    try:
        plain, arrays = packed(_data(value), copy=False)
    except NotPlain:
        return None
    return json.dumps([plain, {name: _mark_of_array(array) for name, array in arrays.items()}])


def _mark_of_array(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{array.dtype} {array.shape} {hashlib.sha256(content.data).hexdigest()}"


def _is_known(callback: Any) -> bool:
    """Whether it is of a package of which distfit knows what is state: its files and connections are none."""
    of_package = type(callback).__module__.partition(".")[0] in ("keras", "distfit")
    return of_package or is_writer(callback) is not None


def _warn_of(callback: Any, attributes: Sequence[str]) -> None:
    kind = type(callback).__name__
    warn_once(
        f"the checkpoint cannot hold what {kind} keeps in {', '.join(sorted(attributes))}, as it is no plain data: "
        f"after a resume it is as on_train_begin leaves it. Give {kind} methods state_dict() and "
        "load_state_dict(state) that save what it needs as numbers, text, lists, dictionaries and NumPy arrays "
        "(state_dict() may return {})."
    )


def _refused(name: str, received: str) -> InputError:
    return InputError(
        f"Expected the state of {name} in the checkpoint as the callback saves it, received {received}. If the "
        "callback has changed since, resume with the code of the run before, or begin another run in another folder."
    )
