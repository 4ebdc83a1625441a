"""What `fit`, `evaluate` and `predict` make ready before their loop, alike on every rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight

from distfit import checks
from distfit.backends.hooks import build, everything_shared, optimizers_of
from distfit.callbacks.hparams import RunFacts
from distfit.callbacks.listening import Around, Listening
from distfit.callbacks.policy import Policy, all_of, callbacks_of_rank, policy_of
from distfit.callbacks.restored import followed
from distfit.callbacks.saver import ModelSaver
from distfit.callbacks.tensorboard import TensorBoard
from distfit.checkpoint.callback_states import names, refuse_restorers
from distfit.checkpoint.facts import described
from distfit.data.feed import Feed
from distfit.data.sources import Request, keras_refusals, source_of
from distfit.data.tfrecords import TFRecords
from distfit.monitor.progress import make_progress
from distfit.monitor.terminal import live_here
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


def same_restorers(session: Session, given: Any, kept: bool = False) -> None:
    """What is restored on the chief is handed out to all ranks, which have to wait for it. Collective.

    Args:
        given: the user's callbacks.
        kept: the run keeps its own state, which it goes on from.

    Raises:
        InputError: something in it is no callback, ranks were given different restorers, or one beside a run that goes
            on by itself; on every rank.
    """
    callbacks = session.agree(lambda: all_of(given))
    if kept:
        session.agree(lambda: refuse_restorers(callbacks))
    session.same(
        "the same callbacks that restore a run",
        "Pass them on every rank: the chief alone reads and writes their files, and the others get what it restores.",
        restorers=[type(callback).__name__ for callback in callbacks if policy_of(callback) is Policy.RESTORER],
    )


def remembered(
    session: Session,
    model: keras.Model,
    train: Feed,
    validation: Validation | None,
    callbacks: Any,
    seed: int,
    epochs: int,
    **arguments: Any,
) -> dict[str, Any]:
    """What a checkpoint says of its run. Its "fields" have to be the same for a run to go on: none of them depends on
    the engine or the number of replicas.

    Args:
        arguments: others that change what is trained.
    """
    fields = {fact.what: fact.value for fact in signature.of_model(model) if not fact.what.startswith("variable ")}
    fields |= {f"data: {name}": str(value) for name, value in train.identity().items()}
    if validation is not None:
        fields |= {f"validation: {name}": str(value) for name, value in validation.feed.identity().items()}
    fields |= {"seed": str(seed), "epochs": str(epochs), "batch_size": str(train.source.batch_size)}
    fields["callbacks"] = ", ".join(names(all_of(callbacks)))
    fields |= {f"arguments: {name}": str(value) for name, value in arguments.items()}
    run = {"engine": session.backend.title, "ranks": session.size, "replicas": session.num_replicas, "seed": seed}
    return {"fields": fields, "run": run, "model": described(model)}


def run_facts(session: Session, train: Feed, seed: int | None) -> RunFacts:
    """What TensorBoard says of a training, beyond its model."""
    return RunFacts(
        engine=session.backend.title,
        ranks=session.size,
        replicas=session.num_replicas,
        batch_size=train.source.batch_size,
        records=None if train.endless else train.source.records,
        seed=seed,
    )


def callbacks(
    session: Session,
    given: Any,
    log_dir: Folder = None,
    saver: ModelSaver | None = None,
    facts: RunFacts | None = None,
) -> list[Any]:
    """The callbacks of this rank: the user's, and on the chief those that leave a run's files behind.

    Args:
        saver: writes the model; None for nobody.
        facts: of a training; None for an evaluation or a prediction.

    Raises:
        InputError: something that was given is no callback.
    """
    chosen = callbacks_of_rank(followed(given, session), session.is_chief, session.size)
    if session.is_chief and log_dir is not None:
        # Absolute: a callback may change the current folder before the first file is written.
        chosen.append(TensorBoard(os.path.abspath(log_dir), write_steps_per_second=True))
    if session.is_chief and saver is not None:
        chosen.append(saver)
    for callback in chosen:
        if facts is not None and isinstance(callback, TensorBoard):
            callback.of_run(facts)
    return chosen


@contextmanager
def adopted(
    session: Session,
    model: keras.Model,
    ready: Feed,
    step: str,
    validation: Validation | None = None,
    whole: bool = False,
) -> Iterator[None]:
    """The model in the hands of the session's engine, built from the shapes of its data. Collective.

    Args:
        step: which of the model's will run: "train_step", "test_step" or "predict_step".
        validation: beside a training.
        whole: every variable is there before the first step, also with one replica, as a state that is saved needs it.

    Raises:
        InputError: Keras cannot build it, or ranks have built different models; on every rank.
    """
    if step != "predict_step":
        same_compilation(session, model)
    session.agree(lambda: _build(session, model, ready, step, validation, whole))
    same_signature(session, model, ready, None if validation is None else validation.feed)
    # With one replica no engine does it, and Keras' global stream would be made out of Python's random state.
    alone = everything_shared(model) if whole and session.num_replicas == 1 else nullcontext()
    with explained(session, ready.source.batch_size), alone, session.backend.adopted(model):
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
) -> Iterator[Listening]:
    """Keras' list of the callbacks, the chief's progress line among them, which is taken away at the end.

    Args:
        history: give the model a new `history`, as a training does.
    """
    speakers = [_progress(session, ready, epochs, verbose)] if session.is_chief and verbose != 0 else []
    try:
        yield Listening(
            [*chosen, *speakers],
            around=_named(session),
            add_history=history,
            model=model,
            verbose=1 if verbose == "auto" else verbose,
            epochs=epochs,
            steps=ready.num_batches,
        )
    finally:
        # While a progress line is drawn, rich takes what is written to standard error: no traceback may meet it.
        for speaker in speakers:
            speaker.on_train_end()


def _named(session: Session) -> Around | None:
    """While a callback runs, the watch knows its name, and whether other ranks run it as well."""
    if session.size == 1:
        return None

    known: dict[int, tuple[str, bool]] = {}  # by identity: a user's callback need not be hashable

    def around(callback: keras.callbacks.Callback, method: str) -> AbstractContextManager[Any]:
        if id(callback) not in known:
            known[id(callback)] = type(callback).__name__, policy_of(callback) is Policy.EVERY_RANK
        name, everywhere = known[id(callback)]
        return session.in_callback(f"{name}.{method}", everywhere)

    return around


def _build(
    session: Session, model: keras.Model, ready: Feed, step: str, validation: Validation | None, whole: bool
) -> None:
    if (
        (session.num_replicas > 1 or whole)
        and step in own_step.STEPS
        and any(map(partial(own_step.overrides, model), own_step.STEPS))
    ):
        own_step.build(model, step, ready.data_spec)
        if validation is not None:
            own_step.build(model, "test_step", validation.feed.data_spec)
    elif whole:
        build(model, ready.data_spec)
    else:
        session.backend.build(model, ready.data_spec, targets=step in own_step.STEPS)


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
        live=live_here(session.size, os.environ),
    )
