"""`distfit.fit`, `evaluate` and `predict`: keras.Model's, on one process, a node or a cluster.

    history = distfit.fit(model, train, validation_data=valid, epochs=3, batch_size=64)

Each is a table of contents: who are we, what are we asked, is it possible (refused on every rank or on
none), say what will happen, run the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from distfit import checks
from distfit.monitor.announce import announce
from distfit.callbacks.policy import callbacks_of_rank
from distfit.callbacks.saver import ModelSaver
from distfit.data.feed import Feed
from distfit.data.index import Index
from distfit.data.sources import Request, source_of
from distfit.data.tfrecords import TFRecords
from distfit.log import say
from distfit.monitor.progress import make_progress
from distfit.seeds import settle_seed
from distfit.session import STALL_LIMIT_S, Session, init
from distfit.training.loop import Loop, Validation

ModelOrBuilder = keras.Model | Callable[[], keras.Model]


def fit(
    model: ModelOrBuilder,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool = True,
    class_weight: dict | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | list[int] = 1,
    *,
    strategy: str = "auto",
    devices: int | None = None,
    seed: int | None = None,
    log_dir: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    stall_limit_s: float = STALL_LIMIT_S,
) -> keras.callbacks.History:
    """Train a Keras model: keras.Model.fit, however the script was launched.

    With the same seed, data and batch size, one process, N devices and N ranks end with the same weights to
    float rounding, and on one device the result is that of keras.Model.fit to the bit.

    Args:
        model: a compiled Keras 3 model, or a function that returns one (called after seeding).
        x: arrays, `distfit.TFRecords`, a tf.data.Dataset of *global* batches, `distfit.local(...)`, or what
            else keras.Model.fit takes. A Python generator is refused with several ranks.
        y, sample_weight, class_weight: as in keras.Model.fit, for arrays.
        batch_size: rows of one step over all replicas. Default: 32, or the data's own.
        epochs, initial_epoch, steps_per_epoch, shuffle, validation_split, validation_data,
            validation_steps, validation_batch_size, validation_freq: as in keras.Model.fit;
            validation_data may be anything that x may be. `shuffle` orders arrays and TFRecords.
        verbose: 0 silent, 1 a progress line, 2 one line an epoch; "auto" is 1. Only the chief speaks.
        callbacks: as in keras.Model.fit; those that write run on the chief only.
        strategy, devices, stall_limit_s: see `distfit.init`.
        seed: of the order of records and of the process's random state (keras.utils.set_random_seed). None
            keeps a seed that the script has set; without one, several ranks get one that the chief draws.
        log_dir: TensorBoard logs of the run, in `train/` and `validation/`.
        checkpoint: a folder for `model.keras`, replaced whole after each epoch.

    Returns:
        keras.callbacks.History; its metrics are global and the same on every rank.

    Raises:
        InputError: the arguments cannot work; on every rank, before training starts, nothing written.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = fit(model, np.ones((8, 2)), np.ones((8, 1)), batch_size=4, epochs=2, verbose=0)
    >>> len(history.history["loss"])
    2
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    with session.running("training"):
        seed = settle_seed(session, seed)
        model = session.agree(lambda: checks.compiled_model(model))
        own_callbacks = session.agree(lambda: callbacks_of_rank(callbacks, session.is_chief))
        session.agree(lambda: checks.epochs(epochs, initial_epoch))
        session.from_chief(lambda: checks.writable(log_dir, checkpoint))
        (x, y, sample_weight), validation_data = _split(x, y, sample_weight, validation_split, validation_data)
        session.agree(lambda: checks.labels(model, y))
        request = Request(y, sample_weight, class_weight, batch_size, steps_per_epoch, shuffle, seed)
        train = _feed(session, x, request)
        validation = None
        if validation_data is not None:
            valid_x, valid_y, valid_weight = unpack_x_y_sample_weight(validation_data)
            session.agree(lambda: checks.labels(model, valid_y))
            rows = validation_batch_size or batch_size
            request = Request(valid_y, valid_weight, batch_size=rows, steps=validation_steps)
            validation = Validation(_feed(session, valid_x, request), validation_freq)
        with _adopted(session, model, train):
            loop = Loop(model, session)
            session.agree(lambda: checks.shareable(model, "train_step", session.num_replicas))
            announce(session, model, train, seed, log_dir, checkpoint, verbose)
            every_callback = keras.callbacks.CallbackList(
                [*own_callbacks, *_publishers(session, log_dir, checkpoint), *_speakers(session, train, epochs, verbose)],
                add_history=True,
                model=model,
                verbose=0 if verbose == 0 else 1,
                epochs=epochs,
                steps=train.num_batches,
            )
            return loop.fit(train, every_callback, epochs, initial_epoch, validation)


def evaluate(
    model: ModelOrBuilder,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
    *,
    strategy: str = "auto",
    devices: int | None = None,
    stall_limit_s: float = STALL_LIMIT_S,
) -> Any:
    """The loss and metrics over some data: keras.Model.evaluate, each row once, however launched.

    Args:
        model, x, y, batch_size, sample_weight: as in `fit`.
        verbose: 0 says nothing; otherwise the chief prints one line with the results.
        steps, callbacks, return_dict: as in keras.Model.evaluate.
        strategy, devices, stall_limit_s: see `distfit.init`.

    Returns:
        What keras.Model.evaluate returns, the same on every rank.

    Raises:
        InputError: as in `fit`.
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    with session.running("evaluation"):
        model = session.agree(lambda: checks.compiled_model(model))
        own_callbacks = session.agree(lambda: callbacks_of_rank(callbacks, session.is_chief))
        session.agree(lambda: checks.labels(model, y))
        feed = _feed(session, x, Request(y, sample_weight, batch_size=batch_size, steps=steps))
        with _adopted(session, model, feed):
            loop = Loop(model, session)
            session.agree(lambda: checks.shareable(model, "test_step", session.num_replicas))
            listening = keras.callbacks.CallbackList(own_callbacks, model=model, epochs=1, steps=feed.num_batches)
            results = loop.evaluate(feed, listening)
        if verbose != 0:
            say(" - ".join(f"{name}: {value:.4f}" for name, value in results.items()))
        return results if return_dict else model._flatten_metrics_in_order(results)


def predict(
    model: ModelOrBuilder,
    x: Any,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    steps: int | None = None,
    callbacks: Any = None,
    *,
    strategy: str = "auto",
    devices: int | None = None,
    stall_limit_s: float = STALL_LIMIT_S,
) -> Any:
    """The model's outputs: keras.Model.predict, computed by all replicas.

    Args:
        model: as in `fit`, but need not be compiled.
        x, batch_size: as in `fit`.
        verbose: accepted for keras.Model.predict's sake; nothing is printed.
        steps, callbacks: as in keras.Model.predict.
        strategy, devices, stall_limit_s: see `distfit.init`.

    Returns:
        NumPy arrays with one row a record in the data's order, on every rank; with `distfit.local`, each rank
        gets the outputs of its own data.

    Raises:
        InputError: as in `fit`.
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    with session.running("prediction"):
        model = session.agree(lambda: checks.keras_model(model))
        own_callbacks = session.agree(lambda: callbacks_of_rank(callbacks, session.is_chief))
        feed = _feed(session, x, Request(batch_size=batch_size, steps=steps))
        with _adopted(session, model, feed):
            listening = keras.callbacks.CallbackList(own_callbacks, model=model, epochs=1, steps=feed.num_batches)
            own = Loop(model, session).predict(feed, listening)
        by_rank = [own] if feed.source.uneven else session.transport.gather(own)
        return _in_order(by_rank)


def _split(x: Any, y: Any, sample_weight: Any, fraction: float, validation_data: Any) -> tuple[tuple, Any]:
    """Arrays cut as keras.Model.fit cuts them: the last `fraction` of the rows validates."""
    if not fraction or validation_data is not None:
        return (x, y, sample_weight), validation_data
    from keras.src.trainers.data_adapters.array_slicing import train_validation_split

    return train_validation_split((x, y, sample_weight), validation_split=fraction)


def _feed(session: Session, x: Any, request: Request) -> Feed:
    if isinstance(x, TFRecords):
        # One process scans the files, whatever the number of ranks.
        x.use_index(Index.from_bytes(session.from_chief(lambda: x.load_index().to_bytes())))
    source = session.agree(lambda: source_of(x, request, session.topology))
    return Feed(source, session.topology, session.transport, request.steps)


def _adopted(session: Session, model: keras.Model, feed: Feed) -> AbstractContextManager[None]:
    return session.backend.adopted(model, feed.data_spec)


def _publishers(session: Session, log_dir: Any, checkpoint: Any) -> list[keras.callbacks.Callback]:
    """What leaves files behind: the chief's."""
    if not session.is_chief:
        return []
    tensorboard = [] if log_dir is None else [keras.callbacks.TensorBoard(log_dir, write_graph=False)]
    return [*tensorboard, *([] if checkpoint is None else [ModelSaver(checkpoint)])]


def _speakers(session: Session, train: Feed, epochs: int, verbose: str | int) -> list[keras.callbacks.Callback]:
    """What shows progress: the chief's."""
    if not session.is_chief or verbose == 0:
        return []
    source = train.source
    return [
        make_progress(
            global_batch=source.batch_size,
            records=source.records,
            steps=train.num_batches,
            epochs=epochs,
            verbose=verbose,
        )
    ]


def _in_order(by_rank: list[list[list[Any]]]) -> Any:
    """Outputs of [rank][step][local replica] as rows in the data's order."""
    steps = max(len(outputs) for outputs in by_rank)
    pieces = [piece for step in range(steps) for outputs in by_rank for piece in outputs[step]]
    return keras.tree.map_structure(lambda *parts: np.concatenate([np.atleast_1d(part) for part in parts]), *pieces)
