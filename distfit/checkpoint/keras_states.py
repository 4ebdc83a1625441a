"""What Keras' own callbacks know beside plain attributes: files that they write, functions that they have chosen.

    special = of(callback)
    state = special.state(callback)            # plain values
    special.restore(callback, state, place)    # after on_train_begin
    special.own                                # attributes that nobody else saves

A killed run has written beyond its last checkpoint. CSVLogger's file is cut at the size that it had then; what
keras.callbacks.TensorBoard has written since is taken away (event_files.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from distfit.callbacks import event_files
from distfit.checkpoint.place import Place
from distfit.log import warn_once

State = Mapping[str, Any]
# As MonitorCallback has them.
_BETTER = {"less": keras.ops.less, "greater": keras.ops.greater}


@dataclass(frozen=True)
class Special:
    """How a class of Keras' is saved.

    Attributes:
        own: its attributes that are no state, or that stand in `state` in other words.
        state: of a callback.
        restore: give a callback its state, at a place.
    """

    own: frozenset[str] = frozenset()
    state: Callable[[Any], State] = lambda callback: {}
    restore: Callable[[Any, State, Place], None] = lambda callback, state, place: None


def of(callback: Any) -> Special:
    """How to save what this callback knows beside plain attributes."""
    return next((special for kinds, special in _SPECIAL if isinstance(callback, kinds)), Special())


@contextmanager
def appending(callbacks: Sequence[Any]) -> Iterator[None]:
    """CSVLogger's on_train_begin opens its file to go on with it."""
    loggers = [(callback, callback.append) for callback in callbacks if isinstance(callback, keras.callbacks.CSVLogger)]
    try:
        for logger, _ in loggers:
            logger.append = True
        yield
    finally:
        for logger, append in loggers:
            logger.append = append


def flush(callback: Any) -> None:
    """What was written is in the files."""
    if isinstance(callback, keras.callbacks.TensorBoard):
        for writer in getattr(callback, "_writers", {}).values():
            writer.flush()
    if isinstance(callback, keras.callbacks.CSVLogger) and _is_open(callback):
        callback.csv_file.flush()


# --- MonitorCallback: what is better ----------------------------------------------------------------------------


def _better(callback: Any) -> State:
    """Keras finds out at the end of the first epoch, and turns `min_delta` round then."""
    found = [name for name, operator in _BETTER.items() if operator is callback.monitor_op]
    return {"better": found[0]} if found else {}


def _restore_better(callback: Any, state: State, place: Place) -> None:
    # Where it is not known yet, Keras finds out in time.
    if callback.monitor_op is not None or "better" not in state:
        return
    better = {"min": "less", "max": "greater"}.get(str(callback.mode), str(state["better"]))
    callback.monitor_op = _BETTER[better]
    if better == "less":
        callback.min_delta *= -1


# --- CSVLogger: its file ----------------------------------------------------------------------------------------


def _is_open(logger: Any) -> bool:
    return logger.csv_file is not None and not logger.csv_file.closed


def _rows(logger: Any) -> State:
    if not _is_open(logger):
        return {}
    logger.csv_file.flush()
    return {"bytes": os.path.getsize(logger.filename)}


def _restore_rows(logger: Any, state: State, place: Place) -> None:
    """The file ends where it ended at the checkpoint; the next row goes there."""
    if not _is_open(logger) or (logger.append and "bytes" not in state):
        return
    wanted, there = int(state.get("bytes", 0)), os.path.getsize(logger.filename)
    if wanted < 0:
        raise ValueError(f"a file of {wanted} bytes")
    if there < wanted:
        warn_once(
            f"CSVLogger's {logger.filename} is shorter than it was at the checkpoint ({there:,} instead of {wanted:,} "
            "bytes): somebody has changed or removed it. Rows of earlier epochs may be missing from it."
        )
    elif there > wanted:
        logger.csv_file.truncate(wanted)
    logger.append_header = min(there, wanted) == 0


# --- TensorBoard: its counters and event files ------------------------------------------------------------------


def _points(board: Any) -> State:
    found = {"train_batch": board._global_train_batch, "test_batch": board._global_test_batch}
    if board.write_steps_per_second and hasattr(board, "_epoch_start_time"):
        found["epoch_updates"] = float(board._previous_epoch_iterations)
        found["epoch_seconds"] = time.time() - board._epoch_start_time
    return found


def _restore_points(board: Any, state: State, place: Place) -> None:
    if not state:  # it was not there before
        return
    board._global_train_batch, board._global_test_batch = int(state["train_batch"]), int(state["test_batch"])
    if "epoch_updates" in state:
        board._previous_epoch_iterations = tf.constant(float(state["epoch_updates"]))
        board._epoch_start_time = time.time() - float(state["epoch_seconds"])
    board._should_write_train_graph &= not board._global_train_batch
    _take_back(board, place)


def _take_back(board: Any, place: Place) -> None:
    """Its files hold what they held at the checkpoint."""
    optimizer = getattr(board.model, "optimizer", None)
    updates = 0 if optimizer is None else int(optimizer.iterations.numpy())
    board._pop_writer()  # of on_train_begin
    board._close_writers()
    board._writers = {}
    reached = event_files.Place(place.epoch, board._global_train_batch, updates, within=place.step)
    for folder in (board._train_dir, board._val_dir):
        earlier = event_files.survey(folder, reached, None)
        if earlier.stale:
            event_files.carry_over(earlier, reached, None)
    board._push_writer(board._train_writer, board._global_train_batch)


# Where it is, and what it has open: it finds both again.
_OF_TENSORBOARD = frozenset(vars(keras.callbacks.TensorBoard())) | {"_epoch_start_time", "_should_write_train_graph"}
_MONITORS = tuple(
    getattr(keras.callbacks, name)
    for name in ("EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint", "OrbaxCheckpoint")
    if hasattr(keras.callbacks, name)
)
_SPECIAL: tuple[tuple[Any, Special], ...] = (
    (_MONITORS, Special(frozenset(("monitor_op", "min_delta")), _better, _restore_better)),
    (
        keras.callbacks.CSVLogger,
        Special(frozenset(("append", "append_header", "csv_file", "writer")), _rows, _restore_rows),
    ),
    (keras.callbacks.TensorBoard, Special(_OF_TENSORBOARD, _points, _restore_points)),
)
