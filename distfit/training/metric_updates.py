"""What a metric is given on one replica of several: every `update_state` asks the replica that is being traced.

    with installed(model):                               # around all steps of a run
        with here(Here(wire, rows, data)) as replica:    # in a step, in the thread that traces it
            metric.update_state(y, y_pred)
            replica.alike                                # variables that now hold the same on all replicas

Outside of a step, and for metrics of Keras' own that add up what their rows give, everything is as ever. Else:

* a scalar that a `keras.metrics.Mean` is given is a mean over the replica's rows and counts by them;
* a metric that was declared (`distfit.reduced`) is updated with the replica's rows;
* a metric that is given rows is tried out (training/metric_experiment.py). Where a rule holds, it is updated with the
  replica's rows; where none does, all replicas update it with the rows of all, gathered in their order;
* a metric that is given scalars which were computed from rows is given their means over the replicas, by rows;
* anything else cannot be known, and is refused by name.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

from distfit.backends.hooks import replaced
from distfit.errors import InputError
from distfit.log import warn_once
from distfit.training import means, metric_rules
from distfit.training.metric_experiment import Given, found_rule
from distfit.training.metric_rules import SAME, Rule

if TYPE_CHECKING:
    from distfit.training.wire import Wire

Update = Callable[..., Any]


class Here:
    """One replica while its step is traced (or run eagerly), as metrics see it.

    Args:
        wire: to the other replicas.
        rows: how many this replica has, a scalar.
        data: of the step, from whose first axis rows are told.
        from_rows: whether a weight depends on the replica's rows, so that weighted numbers add up by themselves.
        scalars_count: whether the trackers of the model's losses are given means over rows, too; Keras' own losses
            count by themselves (training/share.py).

    Attributes:
        alike: the ids of variables that hold the same on all replicas, those without rows included.
    """

    def __init__(
        self,
        wire: Wire,
        rows: Any,
        data: Any,
        from_rows: Callable[[Any], bool] = means.depends_on_rows,
        scalars_count: bool = True,
    ) -> None:
        self.wire = wire
        self.from_rows = from_rows
        self.scalars_count = scalars_count
        self.alike: set[int] = set()
        self._rows = tf.cast(rows, tf.float64)
        self._share: Any = None
        self._data = [leaf for leaf in tf.nest.flatten(data) if tf.is_tensor(leaf)]
        self._lengths = {leaf.shape[0] for leaf in self._data if leaf.shape.rank}
        self._gathered: dict[int, tuple[Any, Any]] = {}

    @property
    def row_share(self) -> Any:
        """This replica's rows over all rows; where replicas have not met yet, in a forward pass, they do now."""
        if self._share is None:
            (total,) = self.wire.sum([self._rows], name="rows")
            self._share = tf.math.divide_no_nan(self._rows, total)
        return self._share

    def share_of(self, tensors: Sequence[Any]) -> Any:
        """Of the rows of these tensors, which may be fewer or more than those of the batch."""
        if any(tensor is own for tensor in tensors for own in self._data):
            return self.row_share
        own = tf.cast(tf.shape(tensors[0])[0], tf.float64) * tf.cast(self._rows > 0, tf.float64)
        (total,) = self.wire.sum([own], name="metric")
        return tf.math.divide_no_nan(own, total)

    def met(self, row_share: Any) -> None:
        """Replicas have counted their rows."""
        self._share = row_share

    def has_rows(self, tensor: Any) -> bool:
        """Whether a tensor has a row for each of the batch's, or for some of them: what is unknown is that number."""
        return bool(tensor.shape.rank) and (tensor.shape[0] is None or tensor.shape[0] in self._lengths)

    def mean(self, scalar: Any) -> Any:
        """Of a scalar of every replica, weighted by rows."""
        own = tf.math.multiply_no_nan(scalar, tf.cast(self.row_share, scalar.dtype))
        return self.wire.sum([own], name="metric")[0]

    def gathered(self, tensor: Any) -> Any:
        """The rows of all replicas with the mask that they bring along, but for those that stand in for none."""
        known = self._gathered.get(id(tensor))
        if known is None:
            mask, every = get_keras_mask(tensor), self._gather(tensor)
            if mask is not None:
                set_keras_mask(every, self._gather(mask))
            # With the tensor, as another one could get its id.
            known = self._gathered[id(tensor)] = tensor, every
        return known[1]

    def _gather(self, tensor: Any) -> Any:
        """In one collective: behind each row lies whether it is one."""
        kind = tf.uint8 if tensor.dtype.is_bool else tensor.dtype
        rows, shape = tf.cast(tensor, kind), tf.shape(tensor)
        size = tensor.shape[1:].num_elements()
        flat = tf.reshape(rows, [shape[0], tf.reduce_prod(shape[1:]) if size is None else size])
        valid = tf.fill([shape[0], 1], tf.cast(self._rows > 0, kind))
        (every,) = self.wire.gather([tf.concat([flat, valid], axis=1)], name="metric")
        numbers = tf.boolean_mask(every[:, :-1], every[:, -1] > 0)
        result = tf.cast(tf.reshape(numbers, tf.concat([[-1], shape[1:]], axis=0)), tensor.dtype)
        return tf.ensure_shape(result, [None, *tensor.shape[1:]])


class _Current(threading.local):
    """The replica that this thread traces: replicas of one process are traced in threads."""

    here: Here | None = None


_current = _Current()


@contextmanager
def here(replica: Here | None) -> Iterator[Here | None]:
    """This thread traces a step of this replica; with None, metrics are as ever."""
    before, _current.here = _current.here, replica
    try:
        yield replica
    finally:
        _current.here = before


@contextmanager
def discarded() -> Iterator[None]:
    """Inside, nothing that a metric is given is kept, so that it need not be right."""
    with here(None):
        yield


@contextmanager
def scalars_counted() -> Iterator[None]:
    """Inside, the trackers of losses are given means over the replica's rows."""
    replica = _current.here
    if replica is None:
        yield
        return
    before, replica.scalars_count = replica.scalars_count, True
    try:
        yield
    finally:
        replica.scalars_count = before


def met(row_share: Any) -> None:
    """In a step: replicas have counted their rows."""
    if _current.here is not None:
        _current.here.met(row_share)


@contextmanager
def installed(model: Any) -> Iterator[None]:
    """The metrics of a model ask the replica that is being traced, for as long as steps are."""
    compiled = model._compile_loss
    trackers = [model._loss_tracker, *(compiled.metrics if compiled is not None else [])]
    with ExitStack() as stack:
        for metric in metric_rules.metrics_of(model):
            # Inside another run of the same model (an evaluation by a callback) they do already.
            if "update_state" not in vars(metric):
                metric_rules.begin(metric)
                update = _asking(metric, of_loss=any(metric is tracker for tracker in trackers))
                stack.enter_context(replaced(metric, "update_state", update))
        yield


def _asking(metric: Any, of_loss: bool) -> Update:
    update = metric.update_state

    def asking(*args: Any, **kwargs: Any) -> Any:
        replica = _current.here
        if replica is None or (of_loss and not replica.scalars_count):
            return update(*args, **kwargs)
        # What a metric gives to others that it keeps is its own affair.
        if means.counts_scalars(metric):
            return _of_a_mean(metric, update, replica, *args, **kwargs)
        if means.adds_up(metric):
            return _of_a_sum(metric, update, replica, *args, **kwargs)
        return _Updated(metric, update, replica, (args, kwargs)).done()

    return asking


def _of_a_mean(metric: Any, update: Update, replica: Here, values: Any, sample_weight: Any = None) -> Any:
    # A number, or a vector that is none of rows, such as a mean over them for each class. An eager step does not show
    # which vector is one: all sizes are known.
    of_rows = tf.executing_eagerly() or not _is_own(values, replica) or replica.has_rows(values)
    of_batch = keras.ops.ndim(values) == 0 or not of_rows
    if of_batch and not replica.from_rows(sample_weight):
        share = tf.cast(replica.row_share, metric.dtype)
        sample_weight = share if sample_weight is None else share * tf.cast(sample_weight, metric.dtype)
    return update(values, sample_weight=sample_weight)


def _of_a_sum(metric: Any, update: Update, replica: Here, values: Any, sample_weight: Any = None) -> Any:
    """What all replicas have alike, such as a 1 a step, counts once."""
    if keras.ops.ndim(values) == 0 and sample_weight is None and not _is_own(values, replica):
        sample_weight = tf.cast(replica.row_share, metric.dtype)
    return update(values, sample_weight=sample_weight)


class _Updated:
    """One update of one metric on one replica.

    Args:
        update: the metric's own `update_state`.
        given: (args, kwargs).
    """

    def __init__(self, metric: Any, update: Update, replica: Here, given: tuple[tuple, dict]) -> None:
        self._metric, self._update, self._replica, self._given = metric, update, replica, given
        self._leaves = tf.nest.flatten(given)
        own = [_is_own(leaf, replica) for leaf in self._leaves]
        self._rows = [mine and replica.has_rows(leaf) for leaf, mine in zip(self._leaves, own, strict=True)]
        self._scalars = [mine and _is_number(leaf) for leaf, mine in zip(self._leaves, own, strict=True)]
        self._unknown = [
            leaf for leaf, mine in zip(self._leaves, own, strict=True) if mine and not _is_known(leaf, replica)
        ]

    def done(self) -> Any:
        """The update, as the metric's rule asks for it."""
        if _adds_up(self._metric, self._leaves):
            return self._with(self._given)
        self._check_state()
        rule = metric_rules.declared(self._metric) if metric_rules.is_declared(self._metric) else self._found()
        self._replica.wire.note(f"metric {self._metric.name}: {rule}")
        if rule.by_rows:
            return self._by_rows()
        if SAME in rule.of_each:
            self._replica.alike.update(id(variable) for variable in self._metric.variables)
            return self._with(self._of_all())
        return self._with(self._given)

    def _found(self) -> Rule:
        """The rule that was found before, or for this update.

        Raises:
            InputError: the metric is given what can neither be tried out nor gathered, or has two rules for two
                updates.
        """
        metric, before = self._metric, metric_rules.found(self._metric)
        if self._unknown:
            raise InputError(self._refusal(f"{_described(self._unknown)}, which may be anything"))
        same = Rule((SAME,) * len(metric.variables))
        only_rows = any(self._rows) and not any(self._scalars)
        if only_rows and before is not None:
            return before
        rule = (self._tried() if only_rows else None) or same
        if before is not None and before != rule:
            raise InputError(self._refusal(f"rows in one place and {_described(self._leaves)} in another"))
        metric_rules.note_found(metric, rule)
        if rule == same and self._replica.wire.ragged and any(map(_has_unknown_axis, self._of_rows())):
            raise InputError(self._refusal("rows whose lengths each rank's own data say, which cannot be gathered"))
        if rule == same and any(self._rows):
            warn_once(
                f"Metric {metric.name!r} ({type(metric).__name__}): no rule puts the states of replicas together, so "
                "each step gathers its rows on every replica. That is exact; distfit.reduced(metric, by=...) saves the "
                'gathering where you know a rule, by="rows" for a mean over all rows of a batch (of a function: '
                "keras.metrics.MeanMetricWrapper(function))."
            )
        return rule

    def _tried(self) -> Rule | None:
        args, kwargs = self._given
        constant = [tf.get_static_value(leaf) if tf.is_tensor(leaf) else leaf for leaf in self._leaves]
        leaves = [
            leaf if of_rows else value for leaf, of_rows, value in zip(self._leaves, self._rows, constant, strict=True)
        ]
        structure = tf.nest.pack_sequence_as((args, kwargs), leaves)
        weights = _place_of_weights(self._update, args, kwargs)
        with here(None):
            return found_rule(self._metric, self._update, Given(structure, self._rows, weights))

    def _of_rows(self) -> list[Any]:
        return [leaf for leaf, of_rows in zip(self._leaves, self._rows, strict=True) if of_rows]

    def _by_rows(self) -> None:
        """What an update adds, times the replica's share of the rows."""
        variables = self._metric.variables
        share = self._replica.share_of(self._of_rows())
        before = [tf.convert_to_tensor(variable.value) for variable in variables]
        self._with(self._given)
        for variable, old in zip(variables, before, strict=True):
            added = variable.value - old
            variable.assign(old + tf.math.multiply_no_nan(added, tf.cast(share, added.dtype)))

    def _of_all(self) -> Any:
        """What one process would have given it: all rows, and means over all rows."""
        replica = self._replica
        leaves = [
            replica.gathered(leaf) if of_rows else replica.mean(leaf) if scalar else leaf
            for leaf, of_rows, scalar in zip(self._leaves, self._rows, self._scalars, strict=True)
        ]
        return tf.nest.pack_sequence_as(self._given, leaves)

    def _with(self, given: Any) -> Any:
        args, kwargs = given
        with here(None):
            return self._update(*args, **kwargs)

    def _check_state(self) -> None:
        metric = self._metric
        held = [name for name, value in vars(metric).items() if isinstance(value, tf.Variable)]
        if metric.variables and not held:
            return
        raise InputError(
            f"Expected metric {metric.name!r} ({type(metric).__name__}) to keep its state in variables that it has "
            "made with add_variable before replicas share them, received "
            f"{'tf.Variables in ' + ', '.join(held) if held else 'none'}, of which replicas would have no copies. Make "
            "them in __init__; where the class makes them in its first update, update it once on a batch and call "
            "reset_state()."
        )

    def _refusal(self, received: str) -> str:
        metric = self._metric
        return (
            f"Expected metric {metric.name!r} ({type(metric).__name__}) to be given rows, or scalars that are means "
            f"over rows, of which distfit knows how replicas put them together, received {received}. Say how its "
            "states are put together: distfit.reduced(metric, by=...), or give it the rows."
        )


def _has_unknown_axis(tensor: Any) -> bool:
    return any(size is None for size in tensor.shape[1:])


def _adds_up(metric: Any, leaves: Sequence[Any]) -> bool:
    """Whether it is one of Keras' own that adds up what each row gives.

    Those that average a function do, if that has one value a row: its last axis must not be that of the rows.
    """
    if not metric_rules.is_keras_own(metric) or metric_rules.is_declared(metric):
        return False
    if not isinstance(metric, keras.metrics.MeanMetricWrapper):
        return True
    ranks = [len(leaf.shape) for leaf in leaves if tf.is_tensor(leaf)]
    return metric._fn_kwargs.get("axis", -1) == -1 and max(ranks, default=0) > 1


def _is_own(leaf: Any, replica: Here) -> bool:
    """Whether only this replica has it."""
    if not tf.is_tensor(leaf) or isinstance(leaf, (keras.Variable, tf.Variable)):
        return False
    constant = isinstance(leaf, tf.Tensor) and not tf.executing_eagerly() and tf.get_static_value(leaf) is not None
    return not constant and not replica.wire.alike(leaf)


def _is_number(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and leaf.shape.rank == 0 and leaf.dtype.is_floating


def _is_known(leaf: Any, replica: Here) -> bool:
    dense = isinstance(leaf, tf.Tensor) and (leaf.dtype.is_floating or leaf.dtype.is_integer or leaf.dtype.is_bool)
    return dense and (_is_number(leaf) or replica.has_rows(leaf))


def _place_of_weights(update: Update, args: tuple, kwargs: dict) -> int | None:
    """Of the leaf that is given as sample_weight; None where there is none."""
    marked, names = object(), list(inspect.signature(update).parameters)
    if "sample_weight" in kwargs:
        where = args, kwargs | {"sample_weight": marked}
    elif "sample_weight" in names[: len(args)]:
        place = names.index("sample_weight")
        where = (*args[:place], marked, *args[place + 1 :]), kwargs
    else:
        return None
    return next(place for place, leaf in enumerate(tf.nest.flatten(where)) if leaf is marked)


def _described(leaves: Sequence[Any]) -> str:
    tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]
    shapes = [f"a {leaf.dtype.name} tensor of shape {leaf.shape}" for leaf in tensors]
    return " and ".join(shapes) or "no tensor"
