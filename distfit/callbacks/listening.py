"""Keras' list of callbacks: one order, one place where each is called, no number made where nobody reads it.

The order is that of keras.Model.fit: the user's callbacks as they were given, then distfit's own writers, the History,
and last the progress line. All are called with global values: where the loop calls this list, ranks have met already.

    with_names = Listening(callbacks, around=session.in_callback, ...)

Logs are `Logs`, whose values become numbers when a callback reads them, so that callbacks which look at every batch
cost no wait for the device unless they read a value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from string import Formatter
from typing import Any, TypeAlias

import keras
from keras.src.utils.python_utils import is_default, pythonify_logs

from distfit.callbacks.logs import Logs

# Given a callback and the name of its method: what is held while it runs.
Around: TypeAlias = Callable[[keras.callbacks.Callback, str], AbstractContextManager[Any]]

# The first is what Keras calls; where it is not overridden, it calls the second.
_TRAIN_BATCH_END = ("on_train_batch_end", "on_batch_end")
_TEST_BATCH_END = ("on_test_batch_end",)
_OF_BATCHES = {
    "on_train_batch_begin": ("on_train_batch_begin", "on_batch_begin"),
    "on_train_batch_end": _TRAIN_BATCH_END,
    "on_test_batch_begin": ("on_test_batch_begin",),
    "on_test_batch_end": _TEST_BATCH_END,
    "on_predict_batch_begin": ("on_predict_batch_begin",),
    "on_predict_batch_end": ("on_predict_batch_end",),
}

# Keras' own that have methods of batches, and whether they look at a value there.
_KERAS_READS: dict[Any, Callable[[Any], bool]] = {
    keras.callbacks.BackupAndRestore: lambda callback: False,
    keras.callbacks.ModelCheckpoint: lambda callback: callback.save_freq != "epoch",
    keras.callbacks.TensorBoard: lambda callback: callback.update_freq != "epoch",
}


class Listening(keras.callbacks.CallbackList):
    """As keras.callbacks.CallbackList, in everything that a callback can see.

    Args:
        callbacks: those of this rank, in their order.
        around: held around each call; None for nothing.
        others: as keras.callbacks.CallbackList takes them.
    """

    def __init__(self, callbacks: list[Any], around: Around | None = None, **others: Any) -> None:
        self._around = around
        super().__init__(callbacks, **others)

    def reads_batches(self, training: bool) -> bool:
        """Whether a callback wants to know the values of batches, of a training or of an evaluation."""
        methods = _TRAIN_BATCH_END if training else _TEST_BATCH_END
        return any(_reads(callback, methods) for callback in self.callbacks)

    def demands_every_step(self) -> bool:
        """Whether a callback decides by the value of a batch: an old one would be another decision."""
        return any(
            isinstance(callback, keras.callbacks.TerminateOnNaN) or _saves_by_values(callback)
            for callback in self.callbacks
        )

    def on_train_begin(self, logs: Any = None) -> None:
        self._tell("on_train_begin", logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._tell("on_train_end", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._tell("on_epoch_begin", logs, epoch)

    def on_epoch_resumed(self, epoch: int, step: int) -> None:
        """An epoch goes on after so many steps, of which callbacks were told in a run before this one: they have the
        state that they had then. Who shows something says so."""
        for callback in self.callbacks:
            if hasattr(callback, "on_epoch_resumed"):
                callback.on_epoch_resumed(epoch, step)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._tell("on_epoch_end", logs, epoch)

    def on_test_begin(self, logs: Any = None) -> None:
        self._tell("on_test_begin", logs)

    def on_test_end(self, logs: Any = None) -> None:
        self._tell("on_test_end", logs)

    def on_predict_begin(self, logs: Any = None) -> None:
        self._tell("on_predict_begin", logs)

    def on_predict_end(self, logs: Any = None) -> None:
        self._tell("on_predict_end", logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._tell("on_train_batch_begin", logs, batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._tell("on_train_batch_end", logs, batch)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._tell("on_test_batch_begin", logs, batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._tell("on_test_batch_end", logs, batch)

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._tell("on_predict_batch_begin", logs, batch)

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._tell("on_predict_batch_end", logs, batch)

    def _tell(self, method: str, logs: Any, *number: int) -> None:
        """Call a method of all callbacks; one of batches, of those that have one of their own."""
        asked = _OF_BATCHES.get(method)
        # One dictionary for all, as in Keras: what a callback puts there the next ones see.
        given = pythonify_logs(logs) if asked is None else logs if isinstance(logs, Logs) else Logs(logs)
        for callback in self.callbacks:
            if asked is not None and not _has_own(callback, asked):
                continue
            with nullcontext() if self._around is None else self._around(callback, method):
                if asked is None:
                    getattr(callback, method)(*number, given)
                else:  # by name, as Keras does it: functions of a LambdaCallback may be written for either
                    getattr(callback, method)(*number, logs=given)


def _saves_by_values(callback: Any) -> bool:
    """Whether it is a checkpoint within epochs that is chosen, or named, by a metric."""
    if not isinstance(callback, keras.callbacks.ModelCheckpoint) or callback.save_freq == "epoch":
        return False
    fields = {field for _, field, _, _ in Formatter().parse(str(callback.filepath)) if field}
    return bool(callback.save_best_only or fields - {"epoch", "batch"})


def _has_own(callback: Any, methods: tuple[str, ...]) -> bool:
    return not all(is_default(getattr(callback, method)) for method in methods)


def _reads(callback: Any, methods: tuple[str, ...]) -> bool:
    """Whether a callback looks at the values of batches. One that does not says so: `reads_batch_logs = False`.

    A class speaks for its own methods alone: one below it that has others is asked first.
    """
    if not _has_own(callback, methods):
        return False
    for kind, members in [(None, vars(callback)), *((kind, vars(kind)) for kind in type(callback).__mro__)]:
        if "reads_batch_logs" in members:
            return bool(callback.reads_batch_logs)
        if kind in _KERAS_READS:
            return _KERAS_READS[kind](callback)
        if any(method in members for method in methods):
            return True
    return True
