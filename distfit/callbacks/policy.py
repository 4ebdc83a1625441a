"""Who runs which callback: one place decides, when the list is built.

    policy_of(keras.callbacks.CSVLogger("log.csv"))          # Policy.CHIEF
    policy_of(chief_only(my_callback))                       # Policy.CHIEF: a declaration has the last word
    callbacks_of_rank(callbacks, is_chief=False, size=3)     # those that this rank runs, in their order

*Deciders* and a user's own classes run on every rank: logs are global, so that all ranks decide alike, and what
changes the model changes it on all. *Writers* leave files or talk to a service: the chief only; third_party.py knows
those of other packages. *Restorers* run on the chief, and every rank gets what they restored (restored.py). A subclass
follows its base. With one process there is nothing to decide: it is the chief.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeVar

import keras

from distfit.callbacks.saver import ModelSaver
from distfit.callbacks.third_party import is_writer
from distfit.errors import InputError

Declared = TypeVar("Declared")

# What leaves something behind. ProgbarLogger leaves lines on the screen, RemoteMonitor requests at a server.
# OrbaxCheckpoint only writes, although its name sounds like more: its reader is a function that the user calls, and
# where Keras computes with TensorFlow it takes each process for one that is alone.
WRITERS = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.ProgbarLogger,
    ModelSaver,
    *([keras.callbacks.OrbaxCheckpoint] if hasattr(keras.callbacks, "OrbaxCheckpoint") else []),
)
# What a training goes on from: read and written by the chief, whose folder other hosts need not see.
RESTORERS = (keras.callbacks.BackupAndRestore,)
# What sets weights or learning rates: on one rank alone it would make a model of its own there.
_CHANGERS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.SwapEMAWeights,
)
# The attribute of a declaration: of an instance, or of a class for all of its instances.
_DECLARATION = "_distfit_policy"


class Policy(Enum):
    """Where a callback runs; the value says it in words."""

    EVERY_RANK = "on every rank"
    CHIEF = "on the chief"
    RESTORER = "on the chief, and every rank gets what it restores"


def chief_only(callback: Declared) -> Declared:
    """Declare that a callback runs on the chief alone, whatever its class: one that prints, or writes files.

    It may set `model.stop_training`, which ends all ranks on the same step. It may neither change the model nor call
    anything that needs every rank.

    Args:
        callback: a keras.callbacks.Callback, or a class of them (`@distfit.chief_only`), its subclasses included. One
            that restores a run (`BackupAndRestore`) goes on doing so on all ranks.

    Returns:
        The same object, so that it may stand in a list.

    Raises:
        InputError: it is no callback.

    >>> report = chief_only(keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs)))
    >>> callback_policies([report, keras.callbacks.EarlyStopping()])
    'LambdaCallback: on the chief; EarlyStopping: on every rank'
    """
    return _declared(callback, Policy.CHIEF)


def on_every_rank(callback: Declared) -> Declared:
    """Declare that a callback runs on every rank, also where its class leaves files: give each rank a file of its own.

    Args:
        callback: as in `chief_only`.

    Returns:
        The same object.

    Raises:
        InputError: it is no callback.

    >>> callback_policies(on_every_rank(keras.callbacks.CSVLogger("log-of-rank-0.csv")))
    'CSVLogger: on every rank'
    """
    return _declared(callback, Policy.EVERY_RANK)


def callback_policies(callbacks: Any) -> str:
    """Where each callback runs, as one line of text; what `distfit.fit` goes by.

    Args:
        callbacks: what keras.Model.fit takes: None, one callback, a list of them, or a CallbackList.

    Raises:
        InputError: something in it is no callback.

    >>> callback_policies([keras.callbacks.TerminateOnNaN(), keras.callbacks.BackupAndRestore("backup")])
    'TerminateOnNaN: on every rank; BackupAndRestore: on the chief, and every rank gets what it restores'
    """
    lines = [f"{type(callback).__name__}: {policy_of(callback).value}" for callback in all_of(callbacks)]
    return "; ".join(dict.fromkeys(lines))


def policy_of(callback: keras.callbacks.Callback) -> Policy:
    """Where a callback runs: as declared, else as its class is known to need, else everywhere."""
    if isinstance(callback, RESTORERS):
        return Policy.RESTORER
    return getattr(callback, _DECLARATION, None) or _of_its_class(callback)


def callbacks_of_rank(callbacks: Any, is_chief: bool, size: int) -> list[Any]:
    """The callbacks that run on this rank, in their order.

    Args:
        callbacks: as in `callback_policies`.
        is_chief: whether this rank writes.
        size: ranks of the job.

    Raises:
        InputError: something in the list is no callback, or is declared to change the model on one of several ranks.
    """
    given = all_of(callbacks)
    if size > 1:
        for callback in given:
            _check_all_change(callback)
    return [callback for callback in given if is_chief or policy_of(callback) is Policy.EVERY_RANK]


def all_of(callbacks: Any) -> list[Any]:
    """What keras.Model.fit takes as a list.

    Raises:
        InputError: something in it is no callback.
    """
    given = _flat(callbacks)
    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise InputError(
                f"Expected callbacks to be keras.callbacks.Callback objects, received {type(callback).__name__}. "
                "Subclass keras.callbacks.Callback, or wrap a function in keras.callbacks.LambdaCallback."
            )
    return list(given)


def _of_its_class(callback: keras.callbacks.Callback) -> Policy:
    writes = isinstance(callback, WRITERS) or is_writer(callback)
    return Policy.CHIEF if writes else Policy.EVERY_RANK


def _check_all_change(callback: keras.callbacks.Callback) -> None:
    restores = isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights
    if (restores or isinstance(callback, _CHANGERS)) and policy_of(callback) is Policy.CHIEF:
        remedy = "Leave the declaration out; it runs on every rank, on the same numbers."
        if getattr(callback, _DECLARATION, None) is None:
            remedy = "Make two callbacks of it, as one that writes runs on the chief."
        raise InputError(
            f"Expected callbacks of the chief alone to leave the model as it is, received {type(callback).__name__}, "
            "which sets weights or the learning rate: the chief would then train another model than the other ranks. "
            + remedy
        )


def _declared(callback: Any, policy: Policy) -> Any:
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, keras.callbacks.Callback) or issubclass(kind, keras.callbacks.CallbackList):
        raise InputError(
            f"Expected one keras.callbacks.Callback to declare where it runs, or a class of them, received "
            f"{kind.__name__}. Declare each callback by itself: callbacks=[distfit.chief_only(report), ...]."
        )
    setattr(callback, _DECLARATION, policy)
    return callback


def _flat(callbacks: Any) -> Sequence[Any]:
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return _flat(callbacks.callbacks)
    return [one for each in keras.tree.flatten(callbacks) for one in _within(each)]


def _within(callback: Any) -> Sequence[Any]:
    """A list that stands for one of its members has its own."""
    return _flat(callback) if isinstance(callback, keras.callbacks.CallbackList) else [callback]
