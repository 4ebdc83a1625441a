"""Inside of a step that a user wrote: what one replica shares with the others, where its code says so.

    by_hand = ByHand(trainee, backend, Choices())
    with by_hand.installed():                                    # around all steps of a run
        result, flags = by_hand.run("train", function, rows, flags, data)   # as every replica runs it
    part()                                                       # in the function: the part that this replica has

Nothing is guessed here, in contrast to a model's own train_step (own_step.py): the gradient of this replica's addend
of the global loss is what its code asks for, `apply` sums it. What a forward pass moves (moving statistics) and what a
metric is given is made right as in `fit`. With one replica the step is the user's code and nothing else.

The arithmetic is that of `fit` (share.py) in the same order, so that a loop ends with the bits of `fit`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

from distfit.backends.hooks import optimizers_of, variables_of
from distfit.errors import InputError
from distfit.training import batch_norm, means, metric_updates, moving
from distfit.training.changes import changed_elsewhere
from distfit.training.reduction import counted, summed
from distfit.training.wire import Transfer, Wire

if TYPE_CHECKING:
    from distfit.backends.base import Backend
    from distfit.training.reduction import Packing
    from distfit.training.step import Choices


class ByHand:
    """The steps of hand-written loops on one engine.

    Args:
        trainee: a keras.Model that holds everything that a step changes.
        backend: the engine that has adopted it.
        choices: of the user.

    Attributes:
        transfers: of each step that was traced, by name: its collectives in their order.
    """

    def __init__(self, trainee: Any, backend: Backend, choices: Choices) -> None:
        self._trainee = trainee
        self._backend = backend
        self._wire = Wire(backend)
        self._packing = choices.packing
        self._alone = backend.topology.num_replicas == 1
        self._together = [] if self._alone else batch_norm.layers_of(trainee, everywhere=choices.sync_batch_norm)
        self._optimizers = _Optimizers(trainee)
        self.transfers: dict[str, list[Transfer]] = {}

    def expect(self, ragged: bool) -> None:
        """Before a step is traced: whether data of replicas may differ in more than their number of rows."""
        self._wire.ragged = ragged

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Held around all steps of a run."""
        if self._alone:
            yield
            return
        with (
            batch_norm.installed(self._together, self._wire),
            batch_norm.losses_apart(self._trainee),
            moving.installed(self._trainee, alike=batch_norm.weights_of(self._together)),
            metric_updates.installed(self._trainee),
        ):
            yield

    def run(self, name: str, function: Callable[..., Any], rows: Any, flags: Any, data: Any) -> tuple[Any, Any]:
        """The user's function on what one replica got.

        Args:
            name: of the step; its collectives are named after it.
            rows, flags, data: as in training/step.py.

        Returns:
            What it returned, and the flags summed over all replicas, followed by `Wire.evidence`.
        """
        arguments = data if isinstance(data, tuple) else (data,)
        if self._alone:
            with _here(_Alone(rows, self._optimizers)):
                return function(*arguments), flags
        with self._wire.step(name, [rows, data]) as transfers:
            local = tf.concat([tf.cast(rows, tf.float64)[None], flags], axis=0)
            (total,) = self._wire.sum([local], name="small")
            part, seen = self._part(local[0], total[0]), metric_updates.Here(self._wire, rows, data)
            seen.met(part.share())
            with _here(part), self._counting(rows, seen), moving.noted() as moved:
                result = function(*arguments)
            for variable, mean in zip(moved, moving.averaged(self._wire, moved, local[0], total[0]), strict=True):
                variable.assign(mean)
            agreed = tf.concat([total[1:], self._wire.evidence()], axis=0)
        self.transfers[name] = transfers
        return result, agreed

    def check_changes(self, name: str, graph: Any) -> None:
        """
        Args:
            name: of the step.
            graph: as all replicas of this process traced it.

        Raises:
            InputError: the step changes variables of which replicas have no copies.
        """
        foreign = (
            []
            if self._alone
            else changed_elsewhere(graph, [*variables_of(self._trainee), global_seed_generator().state])
        )
        if foreign:
            raise InputError(
                f"Expected all that {name}, a @session.step, changes to be named in session.training, received "
                f"{', '.join(foreign)}, of which replicas would have no copies. Pass what it belongs to: a model, an "
                "optimizer, metrics=[...] or variables=[...]."
            )

    def finalize(self) -> None:
        """After the last step: weights become their moving averages where an optimizer keeps these (use_ema)."""
        for optimizer, variables in self._optimizers.called:
            # Keras pairs them with the averages by their order.
            optimizer.finalize_variable_values(optimizer._trainable_variables or variables)

    def _part(self, rows: Any, all_rows: Any) -> _OneOfSeveral:
        holds_parts = len(self._trainee.metrics_variables) > len(self._states)
        return _OneOfSeveral(
            self._backend, self._wire, self._packing, self._optimizers, rows, all_rows, holds_parts=holds_parts
        )

    @property
    def _states(self) -> list[Any]:
        return [variable for metric in self._trainee.metrics for variable in metric.variables]

    @contextmanager
    def _counting(self, rows: Any, seen: metric_updates.Here) -> Iterator[None]:
        with batch_norm.counting(rows), means.kept(self._states, rows, seen.alike), metric_updates.here(seen):
            yield


def part() -> Any:
    """The part that this replica has in the step which this thread traces.

    Raises:
        InputError: it is no hand-written step.
    """
    if _current.part is None:
        raise InputError(
            "Expected scale_loss, apply, share, gather, sum, rows and first_row to be called inside of a function with "
            "@session.step, while replicas run it, received a call outside of one. Move the call into the step."
        )
    return _current.part


class _Current(threading.local):
    """What the replica has that is being traced: replicas of one process are traced in threads."""

    part: Any = None


_current = _Current()


@contextmanager
def _here(own: Any) -> Iterator[None]:
    before, _current.part = _current.part, own
    try:
        yield
    finally:
        _current.part = before


class _Optimizers:
    """Those of a training.

    Attributes:
        called: those that steps have called, each with the variables that it was given.
    """

    def __init__(self, trainee: Any) -> None:
        self._known = {id(optimizer) for optimizer in optimizers_of(trainee)}
        self.called: list[tuple[Any, list[Any]]] = []

    def note(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """
        Raises:
            InputError: it is none of them.
        """
        if id(optimizer) not in self._known:
            raise InputError(
                "Expected session.apply to be given an optimizer that session.training was given, received another "
                f"{type(optimizer).__name__}. Pass it to session.training(models, optimizers, data), too."
            )
        if all(optimizer is not other for other, _ in self.called):
            self.called.append((optimizer, list(variables)))


class _Alone:
    """The part of the only replica: everything, as it is."""

    def __init__(self, rows: Any, optimizers: _Optimizers) -> None:
        self._rows = rows
        self._optimizers = optimizers

    def rows(self) -> Any:
        return self._rows

    def first_row(self) -> Any:
        return tf.zeros([], tf.int64)

    def share(self, count: Any = None) -> Any:
        return tf.ones([], tf.float64)

    def scale_loss(self, loss: Any, count: Any = None) -> Any:
        _check_one_number("loss", loss)
        return loss

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        self._optimizers.note(optimizer, variables)
        if len(gradients) != len(variables):
            raise InputError(
                f"Expected session.apply to be given one gradient a variable, received {len(gradients)} gradients and "
                f"{len(variables)} variables. Pass what tape.gradient(loss, variables) answers, None included."
            )
        totals = self._totals(gradients, variables)
        with self._updating():
            optimizer.apply_gradients(zip(totals, variables, strict=True))

    def gather(self, tensor: Any) -> Any:
        return tensor

    def sum(self, tensor: Any) -> Any:
        return tensor

    def _totals(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def _updating(self) -> AbstractContextManager[None]:
        return nullcontext()


class _OneOfSeveral(_Alone):
    """The part of one replica of several.

    Args:
        rows: of this replica, a float64 scalar; 0 where it has none and computes a repeated one.
        all_rows: of the global batch.
        holds_parts: replicas keep variables of their own from step to step, such as accumulated gradients.
    """

    def __init__(
        self,
        backend: Backend,
        wire: Wire,
        packing: Packing,
        optimizers: _Optimizers,
        rows: Any,
        all_rows: Any,
        holds_parts: bool,
    ) -> None:
        super().__init__(tf.cast(rows, tf.int64), optimizers)
        self._backend = backend
        self._wire = wire
        self._packing = packing
        self._has_rows = tf.cast(rows > 0, tf.float64)
        self._row_share = tf.math.divide_no_nan(rows, all_rows)
        self._holds_parts = holds_parts
        self._replicas = backend.topology.num_replicas

    def first_row(self) -> Any:
        own = tf.one_hot(self._backend.replica(), self._replicas, dtype=tf.float64) * tf.cast(self._rows, tf.float64)
        (of_all,) = self._wire.sum([own], name="first_row")
        # A replica without rows computes with the last row there is: a number behind it would be no row's.
        first = tf.minimum(tf.reduce_sum(of_all[: self._backend.replica()]), tf.reduce_sum(of_all) - 1)
        return tf.cast(first, tf.int64)

    def share(self, count: Any = None) -> Any:
        if count is None:
            return self._row_share
        _check_one_number("count", count)
        own = tf.stop_gradient(tf.math.multiply_no_nan(tf.cast(count, tf.float64), self._has_rows))
        (total,) = self._wire.sum([own], name="count")
        return tf.math.divide_no_nan(own, total)

    def scale_loss(self, loss: Any, count: Any = None) -> Any:
        _check_one_number("loss", loss)
        # A number of Python's is the sum of no terms: sum(model.losses) of a model without.
        loss = loss if tf.is_tensor(loss) else tf.convert_to_tensor(loss, keras.config.floatx())
        # Times the replicas and divided by them again, as `fit` does it, whose losses are in Keras' view: for the
        # same bits. What a replica without rows computed may not be finite.
        share = tf.cast(self.share(count) * self._replicas, loss.dtype)
        return tf.math.multiply_no_nan(loss, share) / tf.cast(self._replicas, loss.dtype)

    def gather(self, tensor: Any) -> Any:
        rows = tf.convert_to_tensor(tensor)
        valid = tf.repeat(self._has_rows, tf.shape(rows)[0])
        (all_valid,) = self._wire.gather([valid], name="valid")
        return tf.boolean_mask(self._wire.differentiable_gather(rows, name="gather"), all_valid > 0)

    def sum(self, tensor: Any) -> Any:
        addend = tf.convert_to_tensor(tensor)
        own = tf.where(self._has_rows > 0, addend, tf.zeros_like(addend))
        return self._wire.differentiable_sum(own, name="sum")

    def _totals(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        own = [gradients[index] for index in there]
        if not self._holds_parts:
            # What a replica without rows computed may not be finite. Where replicas hold parts, a gradient may be of
            # earlier batches, too, of which there were rows.
            own = [counted(gradient, self._has_rows) for gradient in own]
        totals = summed(self._wire, own, [variables[index].shape for index in there], self._packing)
        by_index = dict(zip(there, totals, strict=True))
        return [by_index.get(index) for index in range(len(gradients))]

    def _updating(self) -> AbstractContextManager[None]:
        return self._backend.updating()


def _check_one_number(name: str, given: Any) -> None:
    shape = tf.convert_to_tensor(given).shape
    if shape.rank != 0:
        raise InputError(
            f"Expected the {name} that session.scale_loss is given to be one number, received "
            f"a tensor of shape {shape}. Reduce it first: tf.reduce_mean(losses), tf.reduce_sum(valid)."
        )
