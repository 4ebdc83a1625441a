"""`distfit.fit`, `evaluate` and `predict`: keras.Model's, on one process, a node or a cluster.

    history = distfit.fit(model, train, validation_data=valid, epochs=3, batch_size=64)

Each is a table of contents: who are we, what are we asked, is it possible (refused on every rank or on
none), say what will happen, run the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from distfit import checks, prepare
from distfit.backends.hooks import variables_of
from distfit.callbacks.saver import model_file
from distfit.checkpoint.keeper import kept
from distfit.checkpoint.options import Checkpoint
from distfit.data.sources import Request
from distfit.monitor.announce import announce
from distfit.seeds import settle_seed
from distfit.session import init
from distfit.training import learning_rate
from distfit.training.batch_norm import layers_of
from distfit.training.in_sync import EVERY_STEPS
from distfit.training.loop import Loop
from distfit.training.predicting import outputs
from distfit.training.reduction import BUCKET_BYTES
from distfit.training.step import Choices

ModelOrBuilder: TypeAlias = keras.Model | Callable[[], keras.Model]


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
    sync_batch_norm: bool = False,
    reduction_dtype: str | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    in_sync_steps: int = EVERY_STEPS,
    logs_every_steps: int | None = None,
    learning_rate_scaling: str | None = None,
    warmup_epochs: float = 0.0,
    log_dir: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    resume: bool = True,
    allow: Sequence[str] = (),
    stall_limit_s: float | None = None,
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
        epochs, initial_epoch, shuffle: as in keras.Model.fit; `shuffle` orders arrays and TFRecords.
        validation_split, validation_data, validation_steps: as in keras.Model.fit; the data may be anything that x
            may be.
        validation_batch_size, validation_freq: as in keras.Model.fit.
        steps_per_epoch: as in keras.Model.fit; with it, TFRecords are read pass after pass: an epoch of more steps
            than they have goes on into the next pass, one of fewer leaves the rest to the next epoch.
        verbose: 0 silent, 1 a progress line, 2 one line an epoch; "auto" is 1. Only the chief speaks.
        callbacks: as in keras.Model.fit; those that write run on the chief only, all others on every rank, with the
            same global values; `distfit.callback_policies` says which, `distfit.chief_only` and
            `distfit.on_every_rank` declare it.
        strategy, devices, stall_limit_s: see `distfit.init`.
        seed: of the order of records and of the process's random state (keras.utils.set_random_seed). None
            keeps a seed that the script has set; without one, several ranks get one that the chief draws.
        sync_batch_norm: BatchNormalization takes the moments of the global batch, as one device does, at the price of
            two collectives a layer; False leaves each replica its own rows' moments, except in layers that were made
            with synchronized=True. The saved model is plain Keras either way.
        reduction_dtype: gradients travel and are added in this type: "float16" and "bfloat16" halve the bytes and
            round. None leaves each its own, which keeps the guarantee above; so does "float32" for gradients of that.
        bucket_bytes: of gradients that travel together, at most; a larger gradient travels alone. The default of 16 MiB
            was measured (benchmarks/bucket_size.py); the sums are the same to rounding whatever it is.
        in_sync_steps: replicas compare all that they have in common, bit for bit, at the start, after the first
            update, whenever so many steps have been made, before the model is saved, and at the end. The default costs
            less than 0.1 % (benchmarks/in_sync_cost.py).
        logs_every_steps: with several replicas, the values of batches that callbacks, the progress line and TensorBoard
            see are global ones, of all rows of the epoch so far, made anew after the first step, so many further ones,
            and the last; `logs.step` is the step that they are of. It costs a wait for the device and for the other
            ranks each time; nothing where no callback reads them. None: 20 times an epoch, at least 50 steps apart,
            which is less than 0.5 % of steps of 25 ms (benchmarks/batch_logs_cost.py). With
            keras.callbacks.TerminateOnNaN, which decides on every batch, or a ModelCheckpoint within epochs that goes
            by values, it is 1.
        learning_rate_scaling: for scripts that multiply batch_size with the replicas: "linear" multiplies the learning
            rate by their number (Goyal et al. 2017, arXiv:1706.02677), "sqrt" by its square root (for Adam and its
            relatives). None leaves it: batch_size is global, so that more replicas alone are the same training.
        warmup_epochs: the scaled rate is reached over so many epochs (5 in Goyal et al. 2017), in equal parts a step.
            The saved model has a schedule of Keras' own.
        log_dir: TensorBoard logs of the run, in `train/` and `validation/`.
        checkpoint: a folder in which this run keeps its state (a `distfit.Checkpoint` says how often, and what stays)
            and, at the end, its model as `model.keras`. SIGTERM, SIGUSR1 and Ctrl-C then save before they end
            all ranks, with the exit codes 75 and 130.
        resume: go on from the newest whole checkpoint of the folder, if there is one: with the same bits on the same
            engine and number of replicas, with the same order of records on any. False moves what is there aside.
        allow: what may have changed since then, by the names that the refusal says: "epochs", "optimizer", ...

    Returns:
        keras.callbacks.History; its metrics are global and the same on every rank.

    Raises:
        InputError: the arguments cannot work, or the folder holds another run, damaged checkpoints only, or one that
            goes on; on every rank, before training starts, nothing written.
        RunError: a checkpoint cannot be written.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = fit(model, np.ones((8, 2)), np.ones((8, 1)), batch_size=4, epochs=2, verbose=0)
    >>> len(history.history["loss"])
    2
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    lengths = {
        "in_sync_steps": in_sync_steps,
        "logs_every_steps": logs_every_steps,
        "epochs": epochs,
        "initial_epoch": initial_epoch,
        "steps_per_epoch": steps_per_epoch,
        "validation_split": validation_split,
        "validation_freq": validation_freq,
        "validation_steps": validation_steps,
    }
    with session.running("training"):
        kinds = {
            "model": type(model).__name__,
            "x": type(x).__name__,
            "validation_data": type(validation_data).__name__,
        }
        rates = {"learning_rate_scaling": learning_rate_scaling, "warmup_epochs": warmup_epochs}
        rows = {"batch_size": batch_size, "validation_batch_size": validation_batch_size}
        choices = Choices(sync_batch_norm, reduction_dtype, bucket_bytes)
        session.same_call("fit", **kinds, **rows, **lengths, shuffle=shuffle, seed=seed, **vars(choices), **rates)
        session.agree(lambda: checks.arguments(verbose, **lengths))
        session.agree(lambda: checks.choices(choices, session.backend))
        session.agree(lambda: learning_rate.check(**rates))
        with kept(session, checkpoint, resume, allow) as keeper, keeper.interrupt.heard():
            folder, whole = keeper.folder, keeper.folder is not None
            seed = settle_seed(session, seed, whole, keeper.seed)
            model = session.agree(
                lambda: checks.compiled_model(model, session.num_replicas), in_turns=checks.is_builder(model)
            )
            session.from_chief(lambda: checks.writable(log_dir, folder))
            (x, y, sample_weight), validation_data = session.agree(
                lambda: prepare.split((x, y, sample_weight), validation_split, validation_data)
            )
            request = Request(y, sample_weight, class_weight, batch_size, steps_per_epoch, shuffle, seed, training=True)
            train = prepare.feed(session, model, x, request, endless=True)
            request = Request(batch_size=validation_batch_size or batch_size, steps=validation_steps)
            validation = prepare.validation(session, model, validation_data, request, validation_freq)
            scaled = prepare.learning_rate(session, model, train, callbacks, **rates)
            with scaled.applied(), prepare.adopted(session, model, train, "train_step", validation, whole):
                session.agree(lambda: layers_of(model, everywhere=sync_batch_norm))
                session.from_chief(lambda: checks.room(folder, variables_of(model)))
                prepare.same_restorers(session, callbacks, whole)
                others = {**vars(choices), **rates, "epochs": epochs, "class_weight": class_weight}
                others["validation_freq"] = validation_freq
                keeper.compare(lambda: prepare.remembered(session, model, train, validation, callbacks, seed, **others))
                facts = prepare.run_facts(session, train, seed)
                own = session.agree(lambda: prepare.callbacks(session, callbacks, log_dir, keeper.saver, facts))
                announce(session, model, train, seed, choices, log_dir, folder, verbose, scaled.sentence, callbacks)
                with prepare.listening(session, model, own, train, epochs, verbose, history=True) as listening:
                    loop = Loop(model, session, choices, in_sync_steps, model_file(folder), logs_every_steps, keeper)
                    return loop.fit(train, listening, epochs, initial_epoch, validation)


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
    stall_limit_s: float | None = None,
) -> Any:
    """The loss and metrics over some data: keras.Model.evaluate, each row once, however launched.

    Args:
        model, x, y, batch_size, sample_weight: as in `fit`.
        verbose: 0 says nothing; otherwise the chief shows progress and the results.
        steps, callbacks, return_dict: as in keras.Model.evaluate.
        strategy, devices, stall_limit_s: see `distfit.init`.

    Returns:
        What keras.Model.evaluate returns, the same on every rank.

    Raises:
        InputError: as in `fit`.
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    with session.running("evaluating"):
        session.same_call(
            "evaluate", model=type(model).__name__, x=type(x).__name__, batch_size=batch_size, steps=steps
        )
        session.agree(lambda: checks.arguments(verbose, steps=steps))
        model = session.agree(
            lambda: checks.compiled_model(model, session.num_replicas), in_turns=checks.is_builder(model)
        )
        feed = prepare.feed(session, model, x, Request(y, sample_weight, batch_size=batch_size, steps=steps))
        own = session.agree(lambda: prepare.callbacks(session, callbacks))
        with (
            prepare.adopted(session, model, feed, "test_step"),
            prepare.listening(session, model, own, feed, 1, verbose) as listening,
        ):
            results = Loop(model, session).evaluate(feed, listening)
        return results if return_dict else model._flatten_metrics_in_order(results)


def predict(
    model: ModelOrBuilder,
    x: Any,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    steps: int | None = None,
    callbacks: Any = None,
    *,
    gather: str | None = None,
    to: str | os.PathLike | None = None,
    strategy: str = "auto",
    devices: int | None = None,
    stall_limit_s: float | None = None,
) -> Any:
    """The model's outputs: keras.Model.predict, computed by all replicas.

    Args:
        model: as in `fit`, but need not be compiled.
        x, batch_size: as in `fit`.
        verbose: 0 says nothing; otherwise the chief shows progress.
        callbacks: as in keras.Model.predict; `logs["outputs"]` are those for this rank's rows. After a callback of any
            rank has set `model.stop_predicting`, rows of later steps are left out.
        steps: as in keras.Model.predict.
        gather: "all" gives every rank all rows, "chief" the chief alone; the others get None, and hold no more than a
            chunk of steps at a time (16 MiB of outputs over all ranks, or one step). None is "all" without `to`.
        to: a folder, made here, in which the chief writes the rows as they come, one `.npy` file for each output; it
            appears when all are on disk. The chief gets them as memory maps, the other ranks None.
        strategy, devices, stall_limit_s: see `distfit.init`.

    Returns:
        NumPy arrays with one row a record in the data's order, on every rank unless `gather` or `to` says otherwise;
        with `distfit.local`, each rank gets the outputs of its own data.

    Raises:
        InputError: as in `fit`; or `to` is a folder that holds something.
        RunError: the rows cannot be written.
    """
    session = init(strategy, devices, stall_limit_s=stall_limit_s)
    with session.running("predicting"):
        call = {"batch_size": batch_size, "steps": steps, "gather": gather, "to": to}
        session.same_call("predict", model=type(model).__name__, x=type(x).__name__, **call)
        session.agree(lambda: checks.arguments(verbose, steps=steps))
        model = session.agree(
            lambda: checks.predictable_model(model, session.num_replicas), in_turns=checks.is_builder(model)
        )
        feed = prepare.feed(session, model, x, Request(batch_size=batch_size, steps=steps), targets=False)
        own = session.agree(lambda: prepare.callbacks(session, callbacks))
        with (
            prepare.adopted(session, model, feed, "predict_step"),
            outputs(session, model, feed.source.uneven, gather, to) as predicted,
            prepare.listening(session, model, own, feed, 1, verbose) as listening,
        ):
            return Loop(model, session).predict(feed, listening, predicted)
