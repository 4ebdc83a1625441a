"""Every number is global: metrics are computed from their state over all replicas.

    states = GlobalStates(model, backend)    # the one exchange
    states.results()                         # by name, as one process would have them
    states.leave()                           # and in the metric objects

A metric's variables are each replica's own part. What becomes of the parts is the metric's rule
(training/metric_rules.py): most are sums, and the result, asked for once of the whole state, is what one device would
have had, where an average of results would not.

All states of all metrics travel in one exchange, the sum of one float64 vector, in which counts up to 2**53 and every
float32 are exact. What is a sum is added up there. Of what is not, every replica has a place of its own in the vector,
where the others have zeros: so that all see what each holds.

All ranks hold the same bits afterwards, as what callbacks decide hangs on them: MPI requires of an all-reduce that "all
processes participating in these operations receive identical results" (MPI 3.1, section 5.9.6), the other engines'
transports gather and add in the ranks' order, and what follows is the same arithmetic everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf

from distfit.errors import InputError, on_every_rank
from distfit.training.metric_rules import (
    MAX,
    MIN,
    SAME,
    SUM,
    Rule,
    initial_of,
    metrics_of,
    names_of,
    rule_of,
    states_by_name,
)

if TYPE_CHECKING:
    from distfit.backends.base import Backend


class GlobalStates:
    """What one process would hold in each variable of the model's metrics, since their last reset. Collective to make,
    and waits for the device.

    Args:
        model: adopted by `backend`.
    """

    def __init__(self, model: Any, backend: Backend) -> None:
        self._model, self._backend = model, backend
        parts = [Merging(metric) for metric in metrics_of(model)]
        sent = [self._sent(part, place) for part in parts for place in range(len(part.variables))]
        packed = np.concatenate([np.zeros(0), *sent])
        received = iter(np.split(backend.transport.sum(packed), np.cumsum([len(vector) for vector in sent])[:-1]))
        # Of a variable, what all hold, and what the other replicas begin with where one has all of it.
        self._states: dict[int, tuple[Any, tf.Tensor, tf.Tensor]] = {}
        for part in parts:
            values = part.whole([next(received) for _ in part.variables])
            for variable, value, other in zip(part.variables, values, part.of_others(values), strict=True):
                # One that a metric shares with another that keeps it: once, as the first of them says.
                held = tf.constant(value, dtype=variable.dtype), tf.constant(other, dtype=variable.dtype)
                self._states.setdefault(id(variable), (variable, *held))

    def _sent(self, part: Merging, place: int) -> np.ndarray:
        topology = self._backend.topology
        own = np.stack(self._backend.replica_values(part.variables[place]))
        return part.sent(place, own, topology.first_replica, topology.num_replicas)

    def results(self) -> dict[str, Any]:
        """The metrics by name."""
        with keras.StatelessScope(state_mapping=[(variable, held) for variable, held, _ in self._states.values()]):
            # Converted here: a result that is the variable itself would be read outside the scope, on one replica.
            return keras.tree.map_structure(tf.convert_to_tensor, self._model.get_metrics_result())

    def leave(self) -> None:
        """Leave it in the metric objects on every replica, as Keras leaves it: nothing is added before a reset."""
        for variable, held, _ in self._states.values():
            variable.assign(held)

    def leave_once(self) -> None:
        """Leave it on the first replica alone, so that what is added from here on counts once."""
        topology = self._backend.topology
        first = topology.rank * topology.replicas_per_process
        variables = [variable for variable, _, _ in self._states.values()]

        def assign(*values: Any) -> None:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

        of_replicas = [
            [held if first + replica == 0 else other for _, held, other in self._states.values()]
            for replica in range(topology.replicas_per_process)
        ]
        self._backend.run(assign, of_replicas)


class Counting:
    """From a reset of a model's metrics to their results; held around it.

    An evaluation in a callback resets and counts in the same metrics, and the pass around it goes on from what it
    leaves there, as in Keras.

    Attributes:
        disturbed: an evaluation inside of this pass has left its own in the metrics, since they were added up.
    """

    _of_models: ClassVar[WeakKeyDictionary[Any, Counting]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._depth = 0
        self.disturbed = False

    @classmethod
    def of(cls, model: Any) -> Counting:
        """That of a model, whoever runs it."""
        return cls._of_models.setdefault(model, cls())

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self) -> None:
        """As `with`, where there is no block to hold it around."""
        self._depth += 1

    def end(self) -> None:
        """See `begin`."""
        self._depth -= 1

    def settle(self, states: GlobalStates) -> None:
        """Leave what was counted in the metrics, so that the pass around this one, if there is one, counts it once."""
        self.disturbed = self._depth > 1
        if self.disturbed:
            states.leave_once()
        else:
            states.leave()


class Merging:
    """How the parts of one metric become one.

    Attributes:
        variables: of the metric.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._rule: Rule = rule_of(metric)
        self.variables = list(metric.variables)
        self._initial = initial_of(metric)

    def sent(self, place: int, parts: np.ndarray, first: int, replicas: int) -> np.ndarray:
        """What a process adds to the sum over all, in float64: a flat vector.

        Args:
            place: of the variable.
            parts: of the process's replicas, stacked; the first of them is number `first` of so many `replicas`.
        """
        own = np.asarray(parts, np.float64)
        if self._how(place) == SUM:
            return np.sum(own - self._initial[place], axis=0).ravel()
        if self._how(place) == SAME:
            return own[0].ravel() if first == 0 else np.zeros(own[0].size)
        every = np.zeros([replicas, *own.shape[1:]])
        every[first : first + len(own)] = own
        return every.ravel()

    def whole(self, received: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What one process would hold, from the sums over all processes of what each has sent."""
        shaped = [
            vector.reshape(-1, *variable.shape) for vector, variable in zip(received, self.variables, strict=True)
        ]
        if self._rule.of_all is not None:
            return self._by_all(self._rule.of_all, shaped)
        return [self._by_each(place, stacked) for place, stacked in enumerate(shaped)]

    def of_others(self, whole: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What all replicas but the first hold where the first one holds the whole."""
        return [whole[place] if self._how(place) == SAME else initial for place, initial in enumerate(self._initial)]

    def _how(self, place: int) -> Any:
        return None if self._rule.of_all is not None else self._rule.of_each[place]

    def _by_each(self, place: int, stacked: np.ndarray) -> np.ndarray:
        how = self._how(place)
        if how == SUM:
            return self._initial[place] + stacked[0]
        if how == SAME:
            return stacked[0]
        if how in (MAX, MIN):
            return (np.max if how == MAX else np.min)(stacked, axis=0)
        return self._checked(place, how(stacked))

    def _by_all(self, of_all: Any, stacked: Sequence[np.ndarray]) -> list[np.ndarray]:
        made, names = of_all(list(states_by_name(self._metric, stacked))), names_of(self._metric)
        if not isinstance(made, dict) or set(made) != set(names):
            raise on_every_rank(
                InputError(
                    f"Expected the function that distfit.reduced was given for metric {self._metric.name!r} to return "
                    f"a dict with a value for each of its variables, {', '.join(names)}, received "
                    f"{', '.join(map(str, made)) if isinstance(made, dict) else type(made).__name__}."
                )
            )
        return [self._checked(place, made[name]) for place, name in enumerate(names)]

    def _checked(self, place: int, value: Any) -> np.ndarray:
        array, shape = np.asarray(value, np.float64), tuple(self.variables[place].shape)
        if array.shape != shape:
            raise on_every_rank(
                InputError(
                    f"Expected what distfit.reduced was given for metric {self._metric.name!r} to make a value of "
                    f"shape {shape} for {names_of(self._metric)[place]}, received one of shape {array.shape}."
                )
            )
        return array
