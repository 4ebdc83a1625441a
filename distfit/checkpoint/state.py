"""What of a training is saved, and comes back: every variable that a step may change, on all replicas.

    state = State(model, session)
    tensors = state.parts() | snapshot.tensors         # of metrics: each replica's; of all else: the first replica's
    state.restore(tensors, described)                  # collective

Weights, optimizer state and random streams are the same on all replicas. Metrics are not: each replica has counted its
own rows. Their parts are kept one by one, so that the same number of replicas goes on to the bit, and put together,
for another number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

from distfit.backends.hooks import raw_variables_of, seed_generators_of, untracked_of, variables_of
from distfit.errors import InputError, on_every_rank
from distfit.log import warn_once
from distfit.training.metric_rules import metrics_of
from distfit.training.metrics import Merging

if TYPE_CHECKING:
    from distfit.session import Session

# The last is what layers keep without counting it among their weights.
WEIGHT, OPTIMIZER, STREAM, METRIC, CARRIED = "weight", "optimizer", "stream", "metric", "carried"
# Of a metric's variable, beside each replica's part: what one process would hold, and what others begin with then.
_WHOLE, _OTHERS = "whole", "others"
_MOST_SHOWN = 5
_MOST_SENT = 2**30


@dataclass(frozen=True)
class Held:
    """One variable of a training.

    Args:
        kind: "weight", "optimizer", "stream", "metric" or "carried".
        tensor: its name in a checkpoint.
        variable: of Keras.
    """

    kind: str
    tensor: str
    variable: Any

    def described(self) -> dict[str, Any]:
        """For the checkpoint's facts."""
        shape = [int(size) for size in self.variable.shape]
        return {
            "kind": self.kind,
            "path": self.variable.path,
            "tensor": self.tensor,
            "shape": shape,
            "dtype": self.variable.dtype,
        }


class State:
    """The variables of a model in the hands of an engine.

    Args:
        model: adopted by the session's engine.
        session: who we are and how we reach the others.
    """

    def __init__(self, model: Any, session: Session) -> None:
        self._model, self._session = model, session
        self.held = held_by(model)
        self.common = [held for held in self.held if held.kind != METRIC]
        self._of_metrics = {id(held.variable): held for held in self.held if held.kind == METRIC}
        if raw := raw_variables_of(model):
            warn_once(
                f"checkpoints do not hold {', '.join(variable.name for variable in raw[:_MOST_SHOWN])}: variables of "
                "TensorFlow's own in attributes of the model, which Keras does not know. Where a step changes them, a "
                "run that goes on is another one; make them with self.add_weight(..., trainable=False)."
            )

    def described(self) -> list[dict[str, Any]]:
        """Every variable in order, for the facts of a checkpoint."""
        return [held.described() for held in self.held]

    def parts(self) -> dict[str, np.ndarray]:
        """On the chief, the metrics of each replica. Collective; waits for the device."""
        backend = self._session.backend
        own = {held.tensor: np.stack(backend.replica_values(held.variable)) for held in self._of_metrics.values()}
        by_rank = self._session.transport.collect(own)
        if by_rank is None:
            return {}
        return {name: np.concatenate([of_rank[name] for of_rank in by_rank]) for name in own}

    def whole(self, every: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """On the chief, the metrics as one process would have them, from `parts`. Collective, as a user's function that
        puts them together may fail."""
        found: dict[str, np.ndarray] = {}
        self._session.from_chief(lambda: found.update(self._merged(every)))
        return found

    def _merged(self, every: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for metric in metrics_of(self._model):
            merging = Merging(metric)
            names = [self._of_metrics[id(variable)].tensor for variable in merging.variables]
            sent = [merging.sent(place, every[name], 0, len(every[name])) for place, name in enumerate(names)]
            whole = merging.whole(sent)
            for name, value, others in zip(names, whole, merging.of_others(whole), strict=True):
                found.setdefault(f"{_WHOLE}/{name}", np.asarray(value, every[name].dtype))
                found.setdefault(f"{_OTHERS}/{name}", np.asarray(others, every[name].dtype))
        return found

    def check(self, described: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a checkpoint whose variables are others: nothing is loaded in part.

        Args:
            described: what its facts say, on every rank.

        Raises:
            InputError: names, shapes or types differ.
        """
        own = [_essence(one) for one in self.described()]
        theirs = [_essence(one) for one in described]
        if own != theirs:
            missing = [one for one in theirs if one not in own]
            new = [one for one in own if one not in theirs]
            raise InputError(
                "Expected the variables of the checkpoint to be those of the model and its optimizer, received "
                f"{_listed('in the checkpoint alone', missing)}{_listed('in the model alone', new)}"
                "Build and compile the model as it was, choose another folder, or pass resume=False."
            )

    def restore(
        self, tensors: Mapping[str, np.ndarray] | None, described: Sequence[Mapping[str, Any]], leave: str = ""
    ) -> None:
        """Give every replica what a checkpoint holds. Collective.

        Args:
            tensors: on the chief.
            described: what the checkpoint's facts say of its variables, which `check` has compared.
            leave: variables whose path ends so stay as the script has made them; "" for none.
        """
        parts: list[tuple[Any, list[np.ndarray]]] = []
        for held, saved in zip(self.held, described, strict=True):
            if held.kind == METRIC:
                parts.append((held.variable, self._parts_of(tensors, saved["tensor"])))
            elif not leave or not held.variable.path.endswith(leave):
                held.variable.assign(self._from_chief(tensors, saved["tensor"]))
        self._assign_parts(parts)

    def _parts_of(self, tensors: Mapping[str, np.ndarray] | None, name: str) -> list[np.ndarray]:
        """What each replica of the job goes on with."""
        every, whole, others = (
            self._from_chief(tensors, each) for each in (name, f"{_WHOLE}/{name}", f"{_OTHERS}/{name}")
        )
        replicas = self._session.num_replicas
        return list(every) if len(every) == replicas else [whole] + [others] * (replicas - 1)

    def _assign_parts(self, parts: Sequence[tuple[Any, list[np.ndarray]]]) -> None:
        topology = self._session.topology

        def assign(*values: Any) -> tf.Tensor:
            for (variable, _), value in zip(parts, values, strict=True):
                variable.assign(value)
            return tf.zeros([])

        of_replicas = [
            [of_each[topology.first_replica + local] for _, of_each in parts]
            for local in range(topology.replicas_per_process)
        ]
        # In a graph: TensorFlow warns of replicas that run without one.
        tf.function(lambda: self._session.backend.run(assign, of_replicas), autograph=False)()

    def _from_chief(self, tensors: Mapping[str, np.ndarray] | None, name: str) -> np.ndarray:
        """A part at a time: an object of MPI ends at 2 GiB."""
        broadcast = self._session.transport.broadcast
        value = None if tensors is None else tensors.get(name)
        form = broadcast(None if value is None else (value.dtype, value.shape))
        if form is None:
            raise on_every_rank(
                InputError(f"Expected the tensor {name} in the checkpoint, received none of that name.")
            )
        if self._session.size == 1:
            return value  # type: ignore[return-value]
        received = np.empty(form[1], form[0]) if value is None else value
        flat = received.reshape(-1)
        each = max(1, _MOST_SENT // max(1, flat.itemsize))
        for start in range(0, flat.size, each):
            part = broadcast(None if value is None else flat[start : start + each])
            if value is None:
                flat[start : start + each] = part
        return received


def held_by(model: Any) -> list[Held]:
    """Every variable of a training, weights first, as `model.weights` has them; Keras' global random stream last, but
    for what layers carry from batch to batch."""
    weights = {id(variable): variable for variable in model.weights}
    streams = {id(generator.state) for generator in seed_generators_of(model)}
    metrics = {id(variable) for metric in metrics_of(model) for variable in metric.variables}
    every = weights | {id(variable): variable for variable in variables_of(model)}
    stream = global_seed_generator().state
    every[id(stream)] = stream
    carried = {id(variable): variable for variable in untracked_of(model)}
    every |= carried

    def kind(identity: int) -> str:
        if identity in metrics:
            return METRIC
        if identity in streams or identity == id(stream):
            return STREAM
        if identity in carried:
            return CARRIED
        return WEIGHT if identity in weights else OPTIMIZER

    return [
        Held(kind(identity), f"{kind(identity)}/{number:05d}/{variable.path}", variable)
        for number, (identity, variable) in enumerate(every.items())
    ]


def _essence(described: Mapping[str, Any]) -> tuple:
    """Without the path: Keras counts names on in a process that has made other models."""
    return described["kind"], tuple(described["shape"]), described["dtype"]


def _listed(where: str, found: Sequence[tuple]) -> str:
    if not found:
        return ""
    shown = ", ".join(f"a {kind} of shape {shape} in {dtype}" for kind, shape, dtype in found[:_MOST_SHOWN])
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return f"{where}: {shown}{more}. "
