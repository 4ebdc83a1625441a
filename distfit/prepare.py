"""What `fit`, `evaluate` and `predict` make ready before their loop, alike on every rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from distfit import checks
from distfit.backends.hooks import optimizers_of
from distfit.callbacks.listening import Listening
from distfit.callbacks.policy import callbacks_of_rank
from distfit.callbacks.saver import ModelSaver
from distfit.data.feed import Feed
from distfit.data.sources import Request, keras_refusals, source_of
from distfit.data.tfrecords import TFRecords
from distfit.monitor.progress import make_progress
from distfit.training import learning_rate as rates
from distfit.training import own_step, signature
from distfit.training.loop import Validation
from distfit.training.memory import explained

if TYPE_CHECKING:
    from distfit.session import Session

Folder = str | os.PathLike | None


def same_compilation(session: Session, model: keras.Model) -> None:
    """Ranks that run their steps in other ways would meet in other collectives. Collective.

    Raises:
        InputError: `compile` was given other settings on another rank; on every rank.
    """
    session.same(
        "a model compiled with the same settings",
        "Let all ranks build and compile the model from the same lines.",
        steps_per_execution=model.steps_per_execution,
        run_eagerly=model.run_eagerly,
        jit_compile=model.jit_compile,
        **_settings_of_optimizers(model),
    )


def same_signature(session: Session, model: keras.Model, ready: Feed, validation: Feed | None = None) -> None:
    """Before the first step: the script, the model and its compilation, and the data. Collective.

    Raises:
        InputError: ranks differ in one of them; on every rank, with the first difference.
    """

    def facts() -> list[signature.Fact]:
        feeds = {"data": ready} if validation is None else {"training data": ready, "validation data": validation}
        of_data = [fact for name, feed in feeds.items() for fact in signature.of_data(name, feed.given, feed)]
        return [*signature.of_code(), *signature.of_model(model), *of_data]

    signature.compare(session, facts)


def split(arrays: tuple, fraction: float, validation_data: Any) -> tuple[tuple, Any]:
    """Arrays cut as keras.Model.fit cuts them: the last `fraction` of the rows validates.

    Args:
        arrays: (x, y, sample_weight).
        fraction: 0 cuts nothing, and so does validation data that is given.

    Raises:
        InputError: they are no arrays.
    """
    if not fraction or validation_data is not None:
        return arrays, validation_data
    with keras_refusals(arrays[0]):
        return train_validation_split(arrays, validation_split=fraction)


def feed(
    session: Session, model: keras.Model, x: Any, request: Request, targets: bool = True, endless: bool = False
) -> Feed:
    """The batches for a call. Collective.

    Args:
        targets: the model needs y; False for a prediction.
        endless: records may be seen again in an epoch of more steps than they have, as in a training.

    Raises:
        InputError: the data cannot serve the model or the job; on every rank.
    """
    session.agree(lambda: checks.labels(model, request.y))
    ready = feed_of_any(session, x, request, endless, model.steps_per_execution)
    session.agree(lambda: checks.targets(model, ready.data_spec) if targets else checks.rows_in_order(ready.source))
    return ready


def feed_of_any(session: Session, x: Any, request: Request, endless: bool, steps_per_execution: int = 1) -> Feed:
    """As `feed`, for data of which no model says what they should be."""
    if isinstance(x, TFRecords):
        # Another seed is another order, and another policy another number of collectives.
        session.same("the same arguments of distfit.TFRecords", "Make them by the same lines.", **x.options())
        # One process looks at the files, whatever the number of ranks.
        x.use(session.from_chief(x.find))
    source = session.agree(lambda: source_of(x, request, session.topology))
    return Feed(source, session.topology, session.transport, request.steps, endless, steps_per_execution, given=x)


def validation(session: Session, model: keras.Model, data: Any, request: Request, freq: Any) -> Validation | None:
    """What to validate on, or None. Collective.

    Args:
        data: as `validation_data` of keras.Model.fit.
        request: how many rows and steps; its arrays are those of `data`.
        freq: as `validation_freq` of keras.Model.fit.

    Raises:
        InputError: as `feed`.
    """
    if data is None:
        return None
    x, y, sample_weight = session.agree(lambda: _unpacked(data))
    return Validation(feed(session, model, x, replace(request, y=y, sample_weight=sample_weight)), freq)


def learning_rate(
    session: Session, model: keras.Model, train: Feed, callbacks: Any, learning_rate_scaling: Any, warmup_epochs: Any
) -> rates.Plan:
    """What the learning rate becomes, and how that is said. Collective.

    Raises:
        InputError: it cannot be scaled or warmed up, or ranks would scale different rates; on every rank.
    """
    replicas, steps = session.num_replicas, train.num_batches
    plan = session.agree(lambda: rates.plan(model, learning_rate_scaling, warmup_epochs, replicas, steps, callbacks))
    if learning_rate_scaling is not None:  # the same on all ranks, as the arguments of the call are
        session.same(
            "the same learning rate",
            "Let all ranks build, load and compile the model from the same lines.",
            learning_rate=plan.sentence,
        )
    return plan


def callbacks(session: Session, given: Any, log_dir: Folder = None, checkpoint: Folder = None) -> list[Any]:
    """The callbacks of this rank: the user's, and on the chief those that leave a run's files behind.

    Raises:
        InputError: something that was given is no callback.
    """
    chosen = callbacks_of_rank(given, session.is_chief, session.size)
    if session.is_chief and log_dir is not None:
        chosen.append(keras.callbacks.TensorBoard(log_dir, write_graph=False))
    if session.is_chief and checkpoint is not None:
        chosen.append(ModelSaver(checkpoint))
    return chosen


@contextmanager
def adopted(
    session: Session, model: keras.Model, ready: Feed, step: str, validation: Validation | None = None
) -> Iterator[None]:
    """The model in the hands of the session's engine, built from the shapes of its data. Collective.

    Args:
        step: which of the model's will run: "train_step", "test_step" or "predict_step".
        validation: beside a training.

    Raises:
        InputError: Keras cannot build it, or ranks have built different models; on every rank.
    """
    if step != "predict_step":
        same_compilation(session, model)
    session.agree(lambda: _build(session, model, ready, step, validation))
    same_signature(session, model, ready, None if validation is None else validation.feed)
    with explained(session, ready.source.batch_size), session.backend.adopted(model):
        yield


@contextmanager
def listening(
    session: Session,
    model: keras.Model,
    chosen: list[Any],
    ready: Feed,
    epochs: int,
    verbose: str | int,
    history: bool = False,
) -> Iterator[keras.callbacks.CallbackList]:
    """Keras' list of the callbacks, the chief's progress line among them, which is taken away at the end.

    Args:
        history: give the model a new `history`, as a training does.
    """
    speakers = [_progress(session, ready, epochs, verbose)] if session.is_chief and verbose != 0 else []
    try:
        yield Listening(
            [*chosen, *speakers],
            add_history=history,
            model=model,
            verbose=0 if verbose == 0 else 1,
            epochs=epochs,
            steps=ready.num_batches,
        )
    finally:
        # While a progress line is drawn, rich takes what is written to standard error: no traceback may meet it.
        for speaker in speakers:
            speaker.on_train_end()


def _build(session: Session, model: keras.Model, ready: Feed, step: str, validation: Validation | None) -> None:
    if (
        session.num_replicas > 1
        and step in own_step.STEPS
        and any(map(partial(own_step.overrides, model), own_step.STEPS))
    ):
        own_step.build(model, step, ready.data_spec)
        if validation is not None:
            own_step.build(model, "test_step", validation.feed.data_spec)
    else:
        session.backend.build(model, ready.data_spec, targets=step in own_step.STEPS)


def in_order(by_rank: list[list[list[Any]]]) -> Any:
    """Outputs of [rank][step][local replica] as rows in the data's order."""
    steps = max(len(outputs) for outputs in by_rank)
    pieces = [piece for step in range(steps) for outputs in by_rank for piece in outputs[step]]
    return keras.tree.map_structure(lambda *parts: np.concatenate([np.atleast_1d(part) for part in parts]), *pieces)


def _settings_of_optimizers(model: keras.Model) -> dict[str, Any]:
    """How each optimizer clips, decays and accumulates; the rest is compared once it is built (training/signature.py).

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(momentum=0.5), "mse")
    >>> _settings_of_optimizers(model)["SGD.momentum"]
    0.5
    """
    found = {}
    for number, optimizer in enumerate(optimizers_of(model)):
        place = type(optimizer).__name__ + (f".{number}" if number else "")
        for name, value in optimizer.get_config().items():
            if name not in ("name", "learning_rate") and (value is None or isinstance(value, (bool, int, float))):
                found[f"{place}.{name}"] = value
    return found


def _unpacked(data: Any) -> tuple[Any, Any, Any]:
    with keras_refusals(data):
        return unpack_x_y_sample_weight(data)


def _progress(session: Session, ready: Feed, epochs: int, verbose: str | int) -> keras.callbacks.Callback:
    return make_progress(
        global_batch=ready.source.batch_size,
        # How many an endless feed gives in an epoch depends on how many short batches that has.
        records=None if ready.endless else ready.source.records,
        steps=ready.num_batches,
        epochs=epochs,
        verbose=verbose,
        live=session.size == 1,
    )
