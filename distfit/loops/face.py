"""The methods of a `Session` that a hand-written loop calls.

    session = distfit.init()

    @session.step
    def train(x, y):
        with tf.GradientTape() as tape:
            loss = session.scale_loss(loss_of(y, model(x, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        session.apply(optimizer, gradients, model.trainable_variables)

    data = session.batches(x, y, batch_size=64)
    with session.training(model, optimizer, data, epochs=3) as training:
        for epoch in training:
            for batch in data:
                train(batch)

TensorFlow is loaded when the first of them is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from distfit.errors import InputError

if TYPE_CHECKING:
    from distfit.loops.batches import Batches, HandStep
    from distfit.loops.training import Training
    from distfit.session import Session


class HandWritten:
    """What `Session` offers to loops that scripts write by hand."""

    _training: Training | None = None

    @property
    def _session(self) -> Session:
        return cast("Session", self)

    def batches(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        steps: int | None = None,
        seed: int | None = None,
    ) -> Batches:
        """The data of a loop: this process's part of each global batch. Collective.

        Args:
            x, y, sample_weight: what `distfit.fit` takes; a step is called with as many of them as there are.
            batch_size: rows of one step over all replicas. Default: 32, or the data's own.
            shuffle: the order of arrays and records is another one in each pass; False for validation data.
            steps: of one pass, as `steps_per_epoch` of `distfit.fit`. None means all of the data.
            seed: of the order of records; arrays are shuffled by the script's random state, as in keras.Model.fit.
                None takes what the script has set with keras.utils.set_random_seed, the same on every rank, or what the
                chief draws.

        Returns:
            An iterable of one opaque batch a step, for `step` functions. Ranks get the same number of them.

        Raises:
            InputError: the data cannot serve the job; on every rank.
        """
        from distfit.loops.data import batches_of

        return batches_of(self._session, x, y, sample_weight, batch_size, shuffle, steps, seed)

    def step(self, function: Callable[..., Any] | None = None, *, run_eagerly: bool = False) -> Any:
        """Make a function of one replica's rows a step of all replicas: a decorator.

        It is traced once, without AutoGraph (Python's `if` and `for` are Python's), as tf.function traces, and called
        with a batch of `batches`. Each replica runs it with its rows: `def train(x, y)`. A replica may get no rows in
        a short batch; it then sees one repeated row, and `scale_loss`, `apply`, `sum` and metrics leave it out.
        A step of several replicas that changes a variable which `training` does not know is refused when it is traced.

        Args:
            run_eagerly: Python runs it at each step, to look inside; several times slower.

        Returns:
            A function of a batch; it returns a list of what the function returned on each of this process's replicas.
            Numbers that everybody should see belong in metrics.
        """
        from distfit.loops.batches import HandStep

        def made(own: Callable[..., Any]) -> HandStep:
            return HandStep(self._session, own, run_eagerly)

        return made if function is None else made(function)

    @contextmanager
    def training(
        self,
        models: Any,
        optimizers: Any,
        data: Batches,
        *,
        metrics: Any = None,
        variables: Any = None,
        epochs: int = 1,
        initial_epoch: int = 0,
        callbacks: Any = None,
        verbose: str | int = "auto",
        sync_batch_norm: bool = False,
        reduction_dtype: str | None = None,
        bucket_bytes: int | None = None,
        in_sync_steps: int | None = None,
        logs_every_steps: int | None = None,
        log_dir: str | os.PathLike | None = None,
        checkpoint: str | os.PathLike | None = None,
    ) -> Iterator[Training]:
        """Around a hand-written loop: the engine holds models, optimizers and metrics. Collective.

        Args:
            models: built keras.Models, one or a list. Callbacks and the checkpoint see the first; it need only be
                compiled where a callback asks for its optimizer (ReduceLROnPlateau, say).
            optimizers: all that steps use, one or a list, built; a single one of a single model is built here.
            data: that is trained on; its steps count, and callbacks hear of them.
            metrics: all that steps update; their states are summed over replicas, reset at each epoch, and their
                results are the logs of callbacks and of the history. One number given to a keras.metrics.Mean counts
                by rows.
            variables: keras.Variables that steps change and of which each replica keeps a part of its own, such as
                accumulated gradients. Afterwards they hold the first replica's part.
            epochs, initial_epoch, callbacks, verbose, sync_batch_norm, reduction_dtype, bucket_bytes, in_sync_steps,
                logs_every_steps, log_dir, checkpoint: as in `distfit.fit`.

        Yields:
            The training: iterate it for its epochs; `validate(step, data)` and `history`.

        Raises:
            InputError: something cannot be run, or ranks differ; on every rank, before the first step.
        """
        from distfit.loops.data import check_is_data, run_of
        from distfit.loops.trainee import trainee_of
        from distfit.loops.training import training

        session = self._session
        with session.running("training"):
            if self._training is not None:
                raise InputError("Expected one session.training at a time, received one inside of another.")
            run = run_of(
                session,
                epochs=epochs,
                initial_epoch=initial_epoch,
                callbacks=callbacks,
                verbose=verbose,
                log_dir=log_dir,
                checkpoint=checkpoint,
                in_sync_steps=in_sync_steps,
                logs_every_steps=logs_every_steps,
                sync_batch_norm=sync_batch_norm,
                reduction_dtype=reduction_dtype,
                bucket_bytes=bucket_bytes,
            )
            session.agree(lambda: check_is_data(data))
            trainee = session.agree(lambda: trainee_of(models, optimizers, metrics, variables))
            try:
                with training(session, trainee, data, run) as self._training:
                    yield self._training
            finally:  # callbacks of the end may still use it
                self._training = None

    def in_training(self) -> Training:
        """The hand-written training that goes on.

        Raises:
            InputError: there is none.
        """
        if self._training is None:
            raise InputError(
                "Expected batches and steps to be used inside of `with session.training(model, optimizer, data):`, "
                "where replicas hold the model, received a use outside of it. Move the loop into the block."
            )
        return self._training

    def scale_loss(self, loss: Any, count: Any = None) -> Any:
        """In a step: this replica's addend of the global loss, from which the gradient is taken.

        The mean over a batch is not the mean of the means of its parts: each part counts by what it was divided by.

        Args:
            loss: a scalar, a mean over `count` things of this replica.
            count: what the loss was divided by, such as the number of valid words; terms with other divisors are
                scaled each by itself and added. None means this replica's rows. A loss of weights (regularisation)
                may be scaled by any count. Where it can be 0 on a replica with rows, divide by it with
                tf.math.divide_no_nan: the gradient of 0/0 is no number, whatever follows.

        Returns:
            A scalar whose sum over the replicas is the loss of the global batch. With one replica, the loss as it is.

        Raises:
            InputError: it is no scalar, or this is no step.
        """
        from distfit.training.by_hand import part

        return part().scale_loss(loss, count)

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """In a step: sum gradients over all replicas, and let the optimizer update variables with the sums.

        Args:
            optimizer: of `training`.
            gradients: of this replica's addend of the loss (`scale_loss`); None where there is none. Sparse ones
                (tf.IndexedSlices) stay sparse. A replica without rows adds zeros, but for a training with
                `variables`, in which they are taken as they are: they may hold what earlier batches left.
            variables: one a gradient, in the same order on every rank.

        Raises:
            InputError: inside a tf.cond, a loop or a tf.function, where some replicas may not arrive; the optimizer is
                none of the training's; or this is no step.
        """
        from distfit.training.by_hand import part

        part().apply(optimizer, list(gradients), list(variables))

    def share(self, count: Any = None) -> Any:
        """In a step: this replica's part of all, between 0 and 1, in float64: for what is a mean and no scalar loss.

        Args:
            count: as in `scale_loss`.
        """
        from distfit.training.by_hand import part

        return part().share(count)

    def gather(self, tensor: Any) -> Any:
        """In a step: the rows of all replicas, in the global batch's order; gradients flow back to each replica's own.

        Args:
            tensor: one row for each of this replica's rows.

        Returns:
            All rows of the global batch; those that replicas without rows repeated are left out.
        """
        from distfit.training.by_hand import part

        return part().gather(tensor)

    def sum(self, tensor: Any) -> Any:
        """In a step: a tensor added up over all replicas; gradients flow back to each replica's addend.

        Args:
            tensor: of the same shape on every replica, of what its rows gave: a replica without rows adds zeros.
        """
        from distfit.training.by_hand import part

        return part().sum(tensor)

    def rows(self) -> Any:
        """In a step: how many rows this replica has, an int64 scalar; 0 where it sees a repeated one."""
        from distfit.training.by_hand import part

        return part().rows()

    def first_row(self) -> Any:
        """In a step: the number of this replica's first row in the global batch, an int64 scalar."""
        from distfit.training.by_hand import part

        return part().first_row()
