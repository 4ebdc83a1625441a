"""BatchNormalization over the global batch: moments of all replicas' rows, whatever device or rank has them.

    layers = batch_norm.layers_of(model, everywhere=True)    # or only those with synchronized=True
    with batch_norm.installed(layers, wire):                 # for the time of a run
        with batch_norm.counting(rows):                      # around all that a replica computes in a step
            model(x, training=True)

Without it every replica normalises with the moments of its own rows (Ioffe and Szegedy 2015, arXiv:1502.03167),
which is another training than one device's and a worse one where a replica has few rows: dense prediction and
detection synchronise (Zhang et al. 2018, Context Encoding for Semantic Segmentation, arXiv:1803.08904; Peng et al.
2018, MegDet, arXiv:1711.07240). Keras' own `synchronized=True` meets the replicas of one tf.distribute strategy
only, leaves masked moments local, counts a replica without rows, and takes E[x^2] - E[x]^2 in float32
(keras/src/backend/tensorflow/nn.py, `_compute_moments_sync`); here it asks for what this module does.

**What is computed.** Each replica takes the count, the mean and the variance of its own valid elements, as Keras
does; replicas add up count, count * (mean - s) and count * (variance + (mean - s)^2) in float64, from which every
one of them has the moments of the whole batch. Squares of float32 are exact in float64, so s = 0. For float64
nothing wider is left, and cancellation would cost the ratio (mean / deviation)^2 in accuracy, so s is the global
mean, for which replicas meet once before. Gradients flow through the sum: what all replicas ask of it is what one
device asks.

**What it costs**, a layer and step, for C channels: one collective of (2 C + 1) * 8 bytes forward and one backward
(3 C * 8 with a mask, whose count may differ between channels); for float64 one more forward. The layer waits for
it, so that latency counts, not bytes: no other layer can compute meanwhile. `torch.nn.SyncBatchNorm` meets as often
(torch/nn/modules/_functions.py), and gathers forward, whose bytes grow with the replicas, where this adds.

**What is moved.** All replicas have the same moments and therefore move the layer's statistics alike; `weights_of`
names them, so that nobody averages them. The layer itself is Keras' own before, during and after: only its
`_moments` is lent, on the instance.

BatchNormalization is the one layer of Keras that mixes the rows of a batch: Layer-, Group-, RMS-, Unit- and
SpectralNormalization do not, and `keras.layers.Normalization` learns before the training. A layer of the user's own
that takes moments over its batch keeps to its replica's rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, MutableSequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import replaced
from distfit.errors import InputError

if TYPE_CHECKING:
    from distfit.training.wire import Wire

# Whoever overrides one of these may take moments in another way, which nobody would notice.
_OF_KERAS = ("call", "_moments")


class _Current(threading.local):
    """How many rows the replica has that this thread computes: replicas of one process are traced in threads."""

    rows: Any = None


_current = _Current()


@dataclass(frozen=True)
class _Local:
    """What one replica knows, in float64.

    Args:
        count: valid elements of each channel: one number a channel, or one for all of them.
        mean, variance: one number a channel; anything where the count is 0.
        masked: some elements may not be valid. Keras then adds its epsilon to the count before it divides by it, and
            differentiates the variance by the mean too; without a mask, tf.nn.moments holds the mean fast. That makes
            no difference to a gradient, but to the gradient of a gradient (a gradient penalty).
    """

    count: Any
    mean: Any
    variance: Any
    masked: bool


def layers_of(model: Any, everywhere: bool) -> list[Any]:
    """The layers whose moments replicas take together, in the model's order.

    Args:
        model: built as far as it can be; a layer that it makes later is not found.
        everywhere: every BatchNormalization, or only those with Keras' own `synchronized=True`.

    Raises:
        InputError: one of them computes in a way of its own.

    >>> plain, together = (keras.layers.BatchNormalization(synchronized=asked) for asked in (False, True))
    >>> model = keras.Sequential([keras.Input((2,)), plain, together])
    >>> [len(layers_of(model, everywhere)) for everywhere in (True, False)]
    [2, 1]
    """
    found = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization) and (everywhere or layer.synchronized)
    ]
    for layer in found:
        _refuse_own_ways(layer)
    return found


def weights_of(layers: Collection[Any]) -> list[Any]:
    """The weights that these layers move by themselves, alike on every replica: there is nothing to average."""
    return [weight for layer in layers for weight in layer.non_trainable_variables]


@contextmanager
def installed(layers: Collection[Any], wire: Wire) -> Iterator[None]:
    """Within `counting`, these layers take the moments of all replicas' rows; elsewhere they are Keras' own, as
    where a callback calls the model. Undone on the way out.

    Args:
        layers: of `layers_of`; none where there is one replica.
        wire: sums over the replicas. A collective is named by its layer's place, as names of layers may differ
            between ranks that have built other models before.
    """
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.enter_context(replaced(layer, "_moments", _together(layer, wire, f"moments.{place}")))
        yield


@contextmanager
def counting(rows: Any) -> Iterator[None]:
    """Held around all that one replica computes in a step.

    Args:
        rows: how many of them count; 0 on a replica that computes one repeated row in place of none, of which
            nothing counts. An integer scalar.
    """
    before, _current.rows = _current.rows, rows
    try:
        yield
    finally:
        _current.rows = before


@contextmanager
def losses_apart(model: Any) -> Iterator[None]:
    """Each replica finds its own additional losses in the model's layers. Undone on the way out.

    A layer keeps what its last call gave to `add_loss` (activity regularisers do). Where replicas meet inside a
    forward pass, the others' calls come in between: TensorFlow traces the replicas of one process in turns, up to
    the next collective each.
    """
    with ExitStack() as stack:
        for layer in model._flatten_layers():
            stack.enter_context(replaced(layer, "_losses", _Losses()))
        yield


class _Losses(threading.local, MutableSequence):
    """A list of which each thread has its own."""

    def __init__(self) -> None:
        self._own: list[Any] = []

    def __getitem__(self, index: Any) -> Any:
        return self._own[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._own[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._own[index]

    def __len__(self) -> int:
        return len(self._own)

    def insert(self, index: int, value: Any) -> None:
        self._own.insert(index, value)


def _refuse_own_ways(layer: Any) -> None:
    for method in _OF_KERAS:
        if getattr(type(layer), method) is not getattr(keras.layers.BatchNormalization, method):
            raise InputError(
                "Expected to synchronise layers that take their moments as keras.layers.BatchNormalization does, "
                f"received {layer.name}, whose class {type(layer).__name__} overrides {method}. Use Keras' own layer, "
                "or leave out sync_batch_norm=True and the layer's synchronized=True."
            )


def _together(layer: Any, wire: Wire, name: str) -> Callable[[Any, Any], tuple[Any, Any]]:
    """In place of `BatchNormalization._moments`."""
    alone = layer._moments

    def moments(inputs: Any, mask: Any) -> tuple[Any, Any]:
        if _current.rows is None:
            return alone(inputs, mask)
        local = _local(inputs, mask, layer.axis, _current.rows)
        try:
            shift = _rough_mean(local, wire, f"{name}.shift") if inputs.dtype == tf.float64 else 0.0
            mean, variance = _global(local, shift, wire, name)
        except InputError as error:
            raise _out_of_reach(layer) from error
        return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)

    return moments


def _local(inputs: Any, mask: Any, axis: int, rows: Any) -> _Local:
    """The moments of this replica's rows, as Keras takes them, of an empty set where it has none."""
    axis %= inputs.shape.rank
    axes = [other for other in range(inputs.shape.rank) if other != axis]
    channels = inputs.shape[axis]
    if mask is None:
        mean, variance = tf.nn.moments(inputs, axes)
        count = tf.reshape(tf.size(inputs, tf.int64) // channels, [1])
    else:
        # A mask says of each position in all axes but the last whether it counts.
        valid = tf.broadcast_to(tf.cast(tf.expand_dims(mask, -1), tf.bool), tf.shape(inputs))
        count, mean, variance = _masked_moments(inputs, valid, axes)
    has_rows = tf.cast(tf.convert_to_tensor(rows) > 0, tf.float64)
    return _Local(
        count=tf.cast(count, tf.float64) * has_rows,
        mean=tf.cast(tf.reshape(mean, [channels]), tf.float64),
        variance=tf.cast(tf.reshape(variance, [channels]), tf.float64),
        masked=mask is not None,
    )


def _masked_moments(inputs: Any, valid: Any, axes: list[int]) -> tuple[Any, Any, Any]:
    count = tf.math.count_nonzero(valid, axes, keepdims=True)
    divisor = tf.cast(count, inputs.dtype)

    def mean_of(values: Any) -> Any:
        total = tf.reduce_sum(tf.where(valid, values, tf.zeros_like(values)), axes, keepdims=True)
        return tf.math.divide_no_nan(total, divisor)

    mean = mean_of(inputs)
    variance = mean_of(tf.square(tf.where(valid, inputs - mean, tf.zeros_like(inputs))))
    return tf.reshape(count, [-1]), mean, variance


def _rough_mean(local: _Local, wire: Wire, name: str) -> Any:
    """The mean of the global batch, not a gradient's way."""
    packed = tf.concat([local.count, tf.math.multiply_no_nan(local.mean, local.count)], axis=0)
    (total,) = wire.sum([tf.stop_gradient(packed)], name=name)
    counts = local.count.shape[0]
    return tf.math.divide_no_nan(total[counts:], total[:counts])


def _global(local: _Local, shift: Any, wire: Wire, name: str) -> tuple[Any, Any]:
    """Mean and variance of the global batch from every replica's.

    Args:
        shift: the same on every replica; squares are taken of distances to it.
    """
    held = tf.identity if local.masked else tf.stop_gradient
    offset = local.mean - shift
    # What a replica without rows computed counts for nothing, not even when it is not finite.
    first = tf.math.multiply_no_nan(offset, local.count)
    second = tf.math.multiply_no_nan(local.variance + held(offset) * (2.0 * offset - held(offset)), local.count)
    packed = tf.concat([local.count, first, second], axis=0)
    parts = [tensor.shape[0] for tensor in (local.count, first, second)]
    count, first, second = tf.split(wire.differentiable_sum(packed, name), parts)
    # Keras' masked mean lies closer to 0 than the mean, by what its divisor is too large.
    unseen = keras.config.epsilon() if local.masked else 0.0
    divisor = count + unseen
    offset = (first - unseen * shift) / divisor
    variance = (second - 2.0 * held(offset) * first + tf.square(held(offset)) * count) / divisor
    # Rounding may leave less than nothing of a channel that is constant.
    return shift + offset, tf.maximum(variance, 0.0)


def _out_of_reach(layer: Any) -> InputError:
    error = InputError(
        f"Expected {layer.name} ({type(layer).__name__}), for whose moments all replicas meet, to be called in the "
        "step itself, received a call inside a tf.cond, a loop (a recurrent layer, TimeDistributed over an unknown "
        "number of steps, tf.vectorized_map), a tf.function of the model's own or an XLA program, where some replicas "
        "might not arrive and the others would wait for ever. Call it outside, or leave out sync_batch_norm=True and "
        "the layer's synchronized=True."
    )
    # Keras would put the layer's arguments around the sentence.
    error._keras_call_info_injected = True  # type: ignore[attr-defined]
    return error
