"""A replica's share of a global batch: what its rows count for in the loss and in what is tracked.

`Whole` is the share of the only replica: nothing is measured, nothing multiplied, so that the step is
Keras' own to the bit. `Part` is the share of one replica of several. A step asks its share and never how
many there are.

Values "in Keras' view" are such that their *mean* over the replicas is the value of the global batch: the
trackers of Keras, whose states are summed over replicas, then come out right by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.errors import InputError
from distfit.training import batch_norm, means, metric_updates, moving, terms
from distfit.training.reduction import AS_THEY_ARE, Packing, counted, summed

if TYPE_CHECKING:
    from distfit.training.wire import Wire

Update = Callable[[], Any]


class Whole:
    """The share of a replica that is alone: everything, as it is."""

    def installed(self, model: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def forward(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])

    def additional_losses(self, model: Any) -> list[Any]:
        return []

    def normalisers(self, model: Any, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
        return []

    def measure(self, normalisers: Sequence[Any], moved: Sequence[Any], rows: Any, flags: Any) -> WholeWeights:
        return WholeWeights(flags)

    def averaged(self, moved: Sequence[Any], weights: Any) -> list[Any]:
        return []

    def summed(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def kept(self, variables: Sequence[Any], rows: Any, data: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def rows_of(self, outputs: Any, rows: Any) -> Any:
        return outputs


class WholeWeights:
    """What the step of a lonely replica multiplies with: nothing."""

    means: Sequence[Any] = ()

    def __init__(self, flags: Any) -> None:
        self.agreed = flags

    def loss(self, model: Any, compute_loss: Update, additional: Sequence[Any]) -> Any:
        return compute_loss()

    def own_loss(self, loss: Any) -> Any:
        return loss

    def counted(self, gradients: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def scalars(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tracked(self, loss: Any, x: Any) -> tuple[Any, Any]:
        return loss, tf.shape(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))[0]


class Part:
    """The share of one replica of several.

    Args:
        wire: sums over the replicas.
        replicas: how many there are in the job.
        opaque: the model overrides compute_loss, whose terms cannot be seen: it counts as a mean over rows.
        sync_batch_norm: BatchNormalization takes the moments of the global batch.
        packing: how gradients travel.
    """

    def __init__(
        self,
        wire: Wire,
        replicas: int,
        opaque: bool,
        sync_batch_norm: bool = False,
        packing: Packing = AS_THEY_ARE,
    ) -> None:
        self._wire = wire
        self._replicas = replicas
        self._opaque = opaque
        self._sync_batch_norm = sync_batch_norm
        self._packing = packing

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """The model's losses and weights tell the step what it has to know; held around all steps."""
        together = batch_norm.layers_of(model, everywhere=self._sync_batch_norm)
        with (
            terms.installed(model),
            batch_norm.installed(together, self._wire),
            batch_norm.losses_apart(model),
            moving.installed(model, alike=batch_norm.weights_of(together)),
            metric_updates.installed(model),
        ):
            yield

    def forward(self) -> AbstractContextManager[list[Any]]:
        """Around a forward pass; which weights it moved is known on the way out."""
        return moving.noted()

    def additional_losses(self, model: Any) -> list[Any]:
        """Losses beside the compiled ones: of layers and of weights. Taken right after the forward pass, as a layer
        keeps only its last call's."""
        layers = [model, *model._flatten_layers(include_self=False)]
        return [*(loss for layer in layers for loss in layer._get_own_losses()), *model._get_regularization_losses()]

    def normalisers(self, model: Any, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
        """What each compiled loss divides by on this replica; terms.NO_NORMALISER for a sum."""
        return [] if self._opaque else terms.measure(model, y, y_pred, sample_weight)

    def measure(self, normalisers: Sequence[Any], moved: Sequence[Any], rows: Any, flags: Any) -> PartWeights:
        """One small all-reduce: rows, normalisers, flags and moving statistics; in float64, so that counts are
        exact."""
        rows = tf.cast(rows, tf.float64)
        has_rows = tf.cast(rows > 0, tf.float64)
        # A term without a divisor still takes its place, as a 1 for each replica that has rows.
        divisors = [has_rows if one is terms.NO_NORMALISER else has_rows * one for one in normalisers]
        local = tf.stop_gradient(tf.concat([tf.stack([rows, *divisors]), flags, *moving.times(rows, moved)], axis=0))
        (total,) = self._wire.sum([local], name="small")
        shares = [
            local[1 + index] if one is terms.NO_NORMALISER else _ratio(local[1 + index], total[1 + index])
            for index, one in enumerate(normalisers)
        ]
        ends_of_flags = 1 + len(normalisers) + flags.shape[0]
        row_share = _ratio(local[0], total[0])
        metric_updates.met(row_share)
        return PartWeights(
            replicas=self._replicas,
            rows=rows,
            all_rows=total[0],
            row_share=row_share,
            term_shares=None if self._opaque else shares,
            agreed=total[1 + len(normalisers) : ends_of_flags],
            means=moving.cut(total[ends_of_flags:] / total[0], moved),
        )

    def averaged(self, moved: Sequence[Any], weights: Any) -> list[Any]:
        """Of what a forward pass moved, over the replicas, weighted by rows, where they have met before it."""
        return moving.averaged(self._wire, moved, weights.rows, weights.all_rows)

    def summed(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Gradients of these variables, summed over the replicas."""
        shapes = [variable.shape for variable in variables]
        return summed(self._wire, gradients, shapes, self._packing)

    @contextmanager
    def kept(self, variables: Sequence[Any], rows: Any, data: Any) -> Iterator[None]:
        """Around all that a replica computes in a step, the backward pass included, which calls a layer again that
        forgets its activations (keras.remat); it has no effect on `variables` where the replica has no rows, but for
        those of metrics that are given the rows of all replicas."""
        replica = metric_updates.Here(self._wire, rows, data, scalars_count=False)
        with batch_norm.counting(rows), means.kept(variables, rows, replica.alike), metric_updates.here(replica):
            yield

    def rows_of(self, outputs: Any, rows: Any) -> Any:
        if any(output.shape.rank == 0 for output in keras.tree.flatten(outputs)):
            raise InputError(
                "Expected outputs with one row a record to predict on several replicas, received one number for the "
                "whole batch. Let the model return a value a row."
            )
        return keras.tree.map_structure(lambda output: output[:rows], outputs)


class PartWeights:
    """One replica's numbers over the global ones, as one step multiplies with them.

    Args:
        replicas: how many there are in the job.
        rows: of this replica.
        all_rows: rows of the global batch.
        row_share: this replica's rows over all rows; 0 where it has none.
        term_shares: for each compiled loss, this replica's normaliser over the global one, or 1 for a sum;
            None for an opaque loss.
        agreed: the flags, summed over all replicas.
        means: of what the forward pass moved, over the replicas, weighted by rows.
    """

    def __init__(
        self,
        replicas: int,
        rows: Any,
        all_rows: Any,
        row_share: Any,
        term_shares: list[Any] | None,
        agreed: Any,
        means: Sequence[Any],
    ) -> None:
        self._replicas = replicas
        self.rows = rows
        self.all_rows = all_rows
        self.row_share = row_share
        self._term_shares = term_shares
        self.agreed = agreed
        self.means = means

    def loss(self, model: Any, compute_loss: Update, additional: Sequence[Any]) -> Any:
        """The loss in Keras' view."""
        if self._term_shares is None:
            with _losses_given(model, list(additional)), self.scalars():
                return self._by_rows(compute_loss())
        # Losses of weights are the same on every replica, and the shares add up to one.
        with _losses_given(model, [self._by_rows(loss) for loss in additional]):
            return terms.weigh(compute_loss, [share * self._replicas for share in self._term_shares])

    def own_loss(self, loss: Any) -> Any:
        """This replica's addend of the global loss: where its backward pass starts."""
        return loss / tf.cast(self._replicas, loss.dtype)

    def counted(self, gradients: Sequence[Any]) -> list[Any]:
        """This replica's gradients; nothing, where it has no rows, not even where what it computed is not finite."""
        has_rows = tf.cast(self.row_share > 0, tf.float64)
        return [None if gradient is None else counted(gradient, has_rows) for gradient in gradients]

    def scalars(self) -> AbstractContextManager[None]:
        """Around what a model may give to the trackers of its losses by itself: one number for a batch counts by
        rows."""
        return metric_updates.scalars_counted()

    def tracked(self, loss: Any, x: Any) -> tuple[Any, Any]:
        """What the loss tracker is given: a value, and how much it counts."""
        if loss.shape.rank == 0:
            return loss, self.all_rows / self._replicas
        # Without a reduction it is a value a row, of which Keras tracks the mean.
        return self.own_loss(loss), self.all_rows * self.row_share

    def _by_rows(self, loss: Any) -> Any:
        return tf.math.multiply_no_nan(loss, tf.cast(self.row_share * self._replicas, loss.dtype))


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
