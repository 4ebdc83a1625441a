"""A replica's share of a global batch: what its rows count for in the loss and in what is tracked.

`Whole` is the share of the only replica: nothing is measured, nothing multiplied, so that the step is
Keras' own to the bit. `Part` is the share of one replica of several. A step asks its share and never how
many there are.

Values "in Keras' view" are such that their *mean* over the replicas is the value of the global batch: the
trackers of Keras, whose states are summed over replicas, then come out right by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import replaced
from distfit.training import moving, terms
from distfit.training.reduction import sum_in_buckets

if TYPE_CHECKING:
    from distfit.backends.base import Backend

Update = Callable[[], Any]


class Whole:
    """The share of a replica that is alone: everything, as it is."""

    def measure(self, model: Any, y: Any, y_pred: Any, sample_weight: Any, rows: Any, flags: Any) -> WholeWeights:
        return WholeWeights(flags)

    def installed(self, model: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def moving_averages(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])

    def additional_losses(self, model: Any) -> list[tuple[Any, bool]]:
        return []

    def summed(self, tensors: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        return list(tensors)

    def kept(self, variables: Sequence[Any], rows: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def rows_of(self, outputs: Any, rows: Any) -> Any:
        return outputs


class WholeWeights:
    """What the step of a lonely replica multiplies with: nothing."""

    def __init__(self, flags: Any) -> None:
        self.agreed = flags

    def loss(self, model: Any, compute_loss: Update, additional: Sequence[Any]) -> Any:
        return compute_loss()

    def own_loss(self, loss: Any) -> Any:
        return loss

    def tracked_rows(self, x: Any) -> Any:
        return tf.shape(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))[0]

    def averaged(self, values: Sequence[Any]) -> list[Any]:
        return list(values)


class Part:
    """The share of one replica of several.

    Args:
        backend: sums over the replicas.
        opaque: the model overrides compute_loss, whose terms cannot be seen: it counts as a mean over rows.
    """

    def __init__(self, backend: Backend, opaque: bool) -> None:
        self._backend = backend
        self._opaque = opaque

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """The model's losses and weights tell the step what it has to know; held around all steps."""
        with terms.installed(model), moving.installed(model):
            yield

    def measure(self, model: Any, y: Any, y_pred: Any, sample_weight: Any, rows: Any, flags: Any) -> PartWeights:
        """One small all-reduce: rows, the normalisers of all terms, and flags; in float64, so exact."""
        measured = [] if self._opaque else terms.measure(model, y, y_pred, sample_weight)
        rows = tf.cast(rows, tf.float64)
        has_rows = tf.cast(rows > 0, tf.float64)
        # A term without a divisor still takes its place, as a 1 for each replica that has rows.
        divisors = [has_rows if one is terms.NO_NORMALISER else has_rows * one for one in measured]
        local = tf.stop_gradient(tf.concat([tf.stack([rows, *divisors]), flags], axis=0))
        (total,) = self._backend.sum([local], name="small")
        shares = [
            local[1 + index] if one is terms.NO_NORMALISER else _ratio(local[1 + index], total[1 + index])
            for index, one in enumerate(measured)
        ]
        return PartWeights(
            replicas=self._backend.topology.num_replicas,
            all_rows=total[0],
            row_share=_ratio(local[0], total[0]),
            term_shares=None if self._opaque else shares,
            agreed=total[1 + len(measured) :],
        )

    def moving_averages(self) -> AbstractContextManager[list[Any]]:
        return moving.noted()

    def additional_losses(self, model: Any) -> list[tuple[Any, bool]]:
        """Losses beside the compiled ones, and whether each is computed from the rows.

        Taken right after the forward pass: a layer keeps only its last call's, and at the next collective
        another replica's forward pass is traced.
        """
        layers = [model, *model._flatten_layers(include_self=False)]
        of_rows = [(loss, True) for layer in layers for loss in layer._get_own_losses()]
        return of_rows + [(loss, False) for loss in model._get_regularization_losses()]

    def summed(self, tensors: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        """Tensors of these static shapes, summed over the replicas."""
        # A sparse gradient (tf.IndexedSlices) becomes dense: its rows differ between replicas.
        dense = [tf.ensure_shape(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
        return sum_in_buckets(self._backend, dense)

    @contextmanager
    def kept(self, variables: Sequence[Any], rows: Any) -> Iterator[None]:
        """What happens inside has no effect on `variables` where this replica has no rows."""
        before = [tf.identity(variable.value) for variable in variables]
        yield
        for variable, old in zip(variables, before, strict=True):
            variable.assign(tf.where(rows > 0, variable.value, old))

    def rows_of(self, outputs: Any, rows: Any) -> Any:
        return keras.tree.map_structure(lambda output: output[:rows], outputs)


class PartWeights:
    """One replica's numbers over the global ones, as one step multiplies with them.

    Args:
        replicas: how many there are in the job.
        all_rows: rows of the global batch.
        row_share: this replica's rows over all rows; 0 where it has none.
        term_shares: for each compiled loss, this replica's normaliser over the global one, or 1 for a sum;
            None for an opaque loss.
        agreed: the flags, summed over all replicas.
    """

    def __init__(
        self, replicas: int, all_rows: Any, row_share: Any, term_shares: list[Any] | None, agreed: Any
    ) -> None:
        self._replicas = replicas
        self._all_rows = all_rows
        self._row_share = row_share
        self._term_shares = term_shares
        self.agreed = agreed

    def loss(self, model: Any, compute_loss: Update, additional: Sequence[tuple[Any, bool]]) -> Any:
        """The loss in Keras' view."""
        if self._term_shares is None:
            given = [loss for loss, _ in additional]
            with _losses_given(model, given), _means_over_rows(model, self._row_share):
                return self._by_rows(compute_loss())
        given = [self._by_rows(loss) if of_rows else loss for loss, of_rows in additional]
        with _losses_given(model, given):
            return terms.weigh(compute_loss, [share * self._replicas for share in self._term_shares])

    def own_loss(self, loss: Any) -> Any:
        """This replica's addend of the global loss: where its backward pass starts."""
        return loss / tf.cast(self._replicas, loss.dtype)

    def tracked_rows(self, x: Any) -> Any:
        return self._all_rows / self._replicas

    def averaged(self, values: Sequence[Any]) -> list[Any]:
        """Addends whose sum over the replicas is the values' mean, weighted by rows."""
        return [value * tf.cast(self._row_share, value.dtype) for value in values]

    def _by_rows(self, loss: Any) -> Any:
        return loss * tf.cast(self._row_share * self._replicas, loss.dtype)


@contextmanager
def _means_over_rows(model: Any, row_share: Any) -> Iterator[None]:
    """A `keras.metrics.Mean` that is given a scalar counts it by rows, as the loss beside it is counted."""
    with ExitStack() as stack:
        for metric in model.metrics:
            if type(metric) is keras.metrics.Mean:
                stack.enter_context(replaced(metric, "update_state", _by_rows(metric, row_share)))
        yield


def _by_rows(metric: Any, row_share: Any) -> Callable[..., Any]:
    update = metric.update_state

    def updating(values: Any, sample_weight: Any = None) -> Any:
        if keras.ops.ndim(values) == 0:
            share = tf.cast(row_share, metric.dtype)
            sample_weight = share if sample_weight is None else share * tf.cast(sample_weight, metric.dtype)
        return update(values, sample_weight=sample_weight)

    return updating


def _ratio(local: Any, total: Any) -> Any:
    return tf.math.divide_no_nan(local, total)


@contextmanager
def _losses_given(model: Any, losses: list[Any]) -> Iterator[None]:
    """`model.losses` answers what this replica computed (see `Part.additional_losses`)."""
    own = model._losses_override
    model._losses_override = losses
    try:
        yield
    finally:
        model._losses_override = own
