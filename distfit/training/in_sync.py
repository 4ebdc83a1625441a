"""Proof that replicas train one model: they compare all that they should have in common, bit for bit.

    in_sync = InSync(model, session, every_steps=1000)
    in_sync.at_start()
    in_sync.after(steps, flags)           # after each call of training steps
    in_sync.before_saving()               # where a model that differs would replace a good one
    in_sync.at_end()

Compared are weights, optimizer state (learning rate, iterations and loss scale included) and the random streams of
layers; not metrics and gradients accumulated between two updates, of which each replica has its own part. Each variable
becomes 64 bits on the device where it lies (`training.fingerprint`), and ranks exchange one number. The first update
also shows, by `Wire.evidence`, that what was applied is not each replica's own gradient.

A step costs nothing but an addition on the host: nothing is read from a device and nothing travels between two
comparisons. With one replica there is nobody to compare with, and nothing happens at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from distfit.backends.hooks import optimizers_of, seed_generators_of, variables_of
from distfit.callbacks.policy import RESTORERS
from distfit.callbacks.saver import ModelSaver
from distfit.errors import RunError, on_every_rank
from distfit.log import warn_once
from distfit.training import suspicion
from distfit.training.accumulation import batches_per_update
from distfit.training.fingerprint import fingerprints
from distfit.training.suspicion import Compared, Divergence, Moment, divergence_of
from distfit.training.wire import EVIDENCE

if TYPE_CHECKING:
    from distfit.session import Session

# A comparison reads weights and slots once, a step several times, so that it costs no more than one step
# (benchmarks/in_sync_cost.py): every thousandth step makes it a thousandth of the time at most.
EVERY_STEPS = 1000
# Updates that may show nothing (gradients that are zero, or not finite while a loss scale settles).
_MOST_TRIES = 100
# A variable that is fetched from two replicas, to say how much of it differs.
_MOST_FETCHED_BYTES = 2**20
_KINDS = {
    "learning_rate": suspicion.RATE,
    "iteration": suspicion.ITERATIONS,
    "dynamic_scale": suspicion.SCALE,
    "step_counter": suspicion.SCALE,
}


class Verdict(Enum):
    """What an update says about the summing of gradients."""

    NOTHING = "no replica sent a gradient that is dense and not zero"
    NOT_FINITE = "gradients are not finite"
    LOCAL = "nobody got anything from the others"
    SUMMED = "the others' gradients were applied"
    ALIKE = "the others' gradients were applied, and were the same as the own"


class InSync:
    """Compares the replicas of one model in one run. All methods are collective.

    Args:
        model: adopted by the session's engine.
        session: who we are and how we reach the others.
        every_steps: from one comparison to the next, at least 1. The default of 1000 makes the comparisons cost less
            than a thousandth of the training.
        checkpoint: where the chief keeps the model of this run, for the message; None for nowhere.
    """

    def __init__(
        self, model: Any, session: Session, every_steps: int = EVERY_STEPS, checkpoint: Path | None = None
    ) -> None:
        self._model = model
        self._session = session
        self._every = every_steps
        self._checkpoint = checkpoint
        self._alone = session.num_replicas == 1
        self._variables: list[Any] = []
        self._compared: list[Compared] = []
        self._functions: dict[bool, Callable[[], Any]] = {}
        self._steps = self._since = 0
        self._equal_at = ""
        self._proof = _Proof(0)

    @property
    def proven(self) -> str:
        """What has been shown so far, for a line of a log; "" before the first update has shown anything."""
        if not self._proof.summed:
            return ""
        replicas = self._session.num_replicas
        return f"{replicas} replicas agree to the bit; the first update applied the gradients of all"

    def at_start(self) -> None:
        """Compare what the replicas begin with.

        Raises:
            RunError: they differ; on every rank, as from all methods.
        """
        if self._alone:
            return
        self._variables = variables_in_common(self._model)
        self._compared = [Compared(variable.path, kind) for variable, kind in kinds_of(self._model, self._variables)]
        tries = _MOST_TRIES * batches_per_update(self._model) if self._model.trainable_variables else 0
        self._proof = _Proof(tries, self._updates() or 0)
        self._compare("the start")

    def after(self, steps: int, flags: Sequence[Any]) -> None:
        """After each call of training steps: count, and compare where it is due.

        Args:
            steps: how many ran.
            flags: of the last step, a vector of each local replica that ends with `Wire.evidence`; read only until the
                first update has been looked at. None where nothing ended an update.
        """
        if self._alone:
            return
        before, self._steps = self._steps, self._steps + steps
        self._since += steps
        due = before // self._every < self._steps // self._every
        first_update = self._proof.wanted and len(flags) > 0 and self._look_at(flags)
        if due or first_update:
            self._compare(first_update=first_update)

    def before_saving(self) -> None:
        """Compare before the model replaces the last one that was saved, if there were steps since the last time."""
        if self._since:
            self._compare(f"{self._position()}, before the model is saved")

    def at_end(self) -> None:
        """Compare what the training leaves behind; what callbacks have done at the end of the last epoch included."""
        if not self._alone:
            self._compare(f"{self._position()}, at the end of the training")

    def _position(self) -> str:
        return self._session.watch.position or f"step {self._steps}"

    def _look_at(self, flags: Sequence[Any]) -> bool:
        """Whether this call made the first update of the run; what it shows of the summing is judged."""
        evidence = [tuple(np.asarray(of_replica)[-EVIDENCE:].tolist()) for of_replica in flags]
        by_rank = self._session.transport.gather((evidence, self._updates() or 0))
        verdict = judge([of_replica for of_rank, _ in by_rank for of_replica in of_rank])
        if verdict is Verdict.LOCAL:
            raise on_every_rank(RunError(_not_summed(self._session.num_replicas, self._position())))
        return self._proof.saw(verdict, max(updates for _, updates in by_rank))

    def _compare(self, position: str = "", first_update: bool = False) -> None:
        position = position or self._position()
        with self._session.watch.waiting(f"the comparison of all replicas at {position}"):
            own = self._fingerprints(nan_alike=False)
            numbers = self._session.transport.gather(_one_number(own))
            if None in numbers or len(set(numbers)) > 1:
                self._explain(position, first_update)
        self._since, self._equal_at = 0, position

    def _explain(self, position: str, first_update: bool) -> None:
        """Refuse what differs, unless it is only in how it says that it is no number."""
        transport = self._session.transport
        by_rank = transport.gather(self._fingerprints(nan_alike=True))
        found = divergence_of(self._compared, [vector for of_rank in by_rank for vector in of_rank])
        if found is not None:
            kept = str(self._checkpoint) if self._checkpoint is not None and self._checkpoint.exists() else ""
            own = Moment(position, self._steps, self._updates(), self._equal_at, first_update, kept)
            self._refuse(self._with_details(found), transport.broadcast(own))

    def _refuse(self, found: Divergence, moment: Moment) -> NoReturn:
        raise on_every_rank(RunError(suspicion.paragraph(found, self._session.topology, moment)))

    def _with_details(self, found: Divergence) -> Divergence:
        """The values of numbers that differ; of the only variable that does, how much of it. Every rank asks for the
        same, as all know what differs."""
        numbers = [index for kind in suspicion.SHOWN for index in found.of(kind)]
        found = replace(found, values={index: [_text(value) for value in self._everybodys(index)] for index in numbers})
        (first, *others) = found.differing
        if numbers or others or _nbytes(self._variables[first]) > _MOST_FETCHED_BYTES:
            return found
        one, other = found.groups[0][0], found.groups[1][0]
        held = self._everybodys(first, only=(one, other))
        return replace(found, extent=suspicion.extent(held[one], held[other]))

    def _everybodys(self, index: int, only: Sequence[int] | None = None) -> list[Any]:
        """What each replica holds in a variable, by its number; None for those that are not asked."""
        first = self._session.topology.first_replica
        own = self._session.backend.replica_values(self._variables[index])
        sent = [value if only is None or first + local in only else None for local, value in enumerate(own)]
        return [value for of_rank in self._session.transport.gather(sent) for value in of_rank]

    def _fingerprints(self, nan_alike: bool) -> list[np.ndarray]:
        """Of each local replica, a number a variable."""
        if nan_alike not in self._functions:
            self._functions[nan_alike] = self._traced(nan_alike)
        return [np.asarray(vector) for vector in self._functions[nan_alike]()]

    def _traced(self, nan_alike: bool) -> Callable[[], Any]:
        def on_replica() -> Any:
            values = [tf.convert_to_tensor(variable.value) for variable in self._variables]
            return fingerprints(values, nan_alike)

        replicas = self._session.topology.replicas_per_process
        on_all = tf.function(lambda: self._session.backend.run(on_replica, [()] * replicas), autograph=False)
        return on_all.get_concrete_function()

    def _updates(self) -> int | None:
        """How many updates the busiest optimizer has made, on this process's first replica; None without one."""
        first = self._session.backend.replica_values
        return max((int(first(counter)[0]) // batches for counter, batches in counters_of(self._model)), default=None)


class _Proof:
    """What the first updates have shown so far; alike on every rank.

    Args:
        tries: how many calls may show nothing.
        updates: that had been made before the run.
    """

    def __init__(self, tries: int, updates: int = 0) -> None:
        self._tries = tries
        self._updates = updates
        self._updated = False
        self.summed = False

    @property
    def wanted(self) -> bool:
        return not self.summed and self._tries > 0

    def saw(self, verdict: Verdict, updates: int) -> bool:
        """Whether this was the run's first update."""
        self._tries -= 1
        self.summed = verdict in (Verdict.SUMMED, Verdict.ALIKE)
        if verdict is Verdict.ALIKE:
            warn_once(_ALIKE)
        elif not self.wanted and not self.summed:
            warn_once(_unproven(verdict))
        before, self._updated = self._updated, self._updated or self.summed or updates > self._updates
        return self._updated and not before


def variables_in_common(model: Any) -> list[Any]:
    """What all replicas hold alike: not metrics, of which each has its own sums, nor gradients between two updates."""
    parts = [*model.metrics_variables]
    for optimizer in optimizers_of(model):
        parts += [held for held in getattr(optimizer, "_accumulated_gradients", []) if held is not None]
    own = set(map(id, parts))
    return [variable for variable in variables_of(model) if id(variable) not in own]


def kinds_of(model: Any, variables: Iterable[Any]) -> list[tuple[Any, str]]:
    """Each variable with what it is to the training, of the words of `training.suspicion`."""
    kinds = {id(variable): suspicion.WEIGHT for variable in model.trainable_variables}
    kinds |= {id(generator.state): suspicion.STREAM for generator in seed_generators_of(model)}
    for optimizer in optimizers_of(model):
        for variable in optimizer.variables:
            kinds.setdefault(id(variable), _KINDS.get(variable.path.rsplit("/", 1)[-1], suspicion.SLOT))
    return [(variable, kinds.get(id(variable), suspicion.STATE)) for variable in variables]


def counters_of(model: Any) -> list[tuple[Any, int]]:
    """What counts the batches of each optimizer, and how many of them make one of its updates."""
    found = {}
    # What wraps others comes before them, has their variables too, and does not accumulate itself.
    for optimizer in optimizers_of(model):
        for variable in optimizer.variables:
            if _KINDS.get(variable.path.rsplit("/", 1)[-1]) == suspicion.ITERATIONS:
                found[id(variable)] = variable, optimizer.gradient_accumulation_steps or 1
    return list(found.values())


def judge(evidence: Sequence[tuple[float, float]]) -> Verdict:
    """What an update says, from `Wire.evidence` of all replicas.

    That nobody was added anything although somebody sent is proof: if each replica's sum were its own addend, all
    addends would be the sum, so that n times the sum were the sum, which is then zero.

    >>> judge([(4.0, 1.0), (1.0, 4.0)]).name, judge([(4.0, 0.0), (1.0, 0.0)]).name
    ('SUMMED', 'LOCAL')
    >>> judge([(0.0, 0.0), (0.0, 0.0)]).name, judge([(4.0, 4.0), (4.0, 4.0)]).name
    ('NOTHING', 'ALIKE')
    """
    if not np.isfinite(evidence).all():
        return Verdict.NOT_FINITE
    sent = [own for own, _ in evidence if own > 0]
    if not sent:
        return Verdict.NOTHING
    if not any(added > 0 for _, added in evidence):
        return Verdict.LOCAL
    return Verdict.ALIKE if len(sent) > 1 and len(set(sent)) == 1 else Verdict.SUMMED


def saves(callbacks: Iterable[Any]) -> bool:
    """Whether one of these callbacks writes the model when an epoch ends.

    >>> saves([keras.callbacks.History()]), saves([keras.callbacks.ModelCheckpoint("a.keras")])
    (False, True)
    """
    return any(isinstance(one, (ModelSaver, keras.callbacks.ModelCheckpoint, *RESTORERS)) for one in callbacks)


def _one_number(vectors: Sequence[np.ndarray]) -> int | None:
    """What stands for all local replicas; None where they differ."""
    texts = {vector.tobytes() for vector in vectors}
    if len(texts) > 1:
        return None
    return int.from_bytes(hashlib.blake2b(texts.pop(), digest_size=8).digest(), "little")


def _nbytes(variable: Any) -> int:
    return prod(variable.shape) * tf.as_dtype(variable.dtype).size


def _text(value: Any) -> str:
    return str(np.asarray(value)[()])


def _not_summed(replicas: int, position: str) -> str:
    return (
        f"Expected each of {replicas} replicas to apply the sum of all gradients, received on each of them its own "
        f"gradient alone, at {position}: nothing was summed, so that each would train a model of its own. Look for "
        "another library's optimizer, hook or patch that takes the reduction away, and run distfit's own tests of this "
        "engine."
    )


def _unproven(verdict: Verdict) -> str:
    return (
        f"that gradients are summed could not be shown by the first {_MOST_TRIES} updates: {verdict.value}. Whether "
        "all replicas hold the same weights is compared all the same. See docs/guides/in_sync.md."
    )


_ALIKE = (
    "all replicas computed the same gradient in the first update: most likely every rank trains on the same records, "
    "as when distfit.local is given the whole data on each. Let each rank read its own part (see docs/guides/data.md)."
)
