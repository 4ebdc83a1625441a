"""Replicas that no longer hold the same model: what is known of it, in one paragraph, and what to suspect.

    found = divergence_of(compared, vectors)         # None where all replicas hold the same
    paragraph(found, topology, moment)

Facts and pure functions; `training.in_sync` collects the facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distfit.differences import ranks_text
from distfit.topology import Topology

# What a variable is to the training.
WEIGHT, STATE, STREAM = "weight", "non-trainable weight", "random stream"
RATE, ITERATIONS, SCALE, SLOT = "learning rate", "iterations", "loss scale", "optimizer slot"
# A number, of which the message shows the values.
SHOWN = (RATE, ITERATIONS, SCALE)
_MOST_GROUPS = 4


@dataclass(frozen=True)
class Compared:
    """A variable that replicas compare.

    Args:
        path: as Keras names it, "sequential/dense/kernel".
        kind: one of the words above.
    """

    path: str
    kind: str


@dataclass(frozen=True)
class Divergence:
    """What a comparison found.

    Args:
        compared: all variables.
        differing: the indices of those that are not the same on all replicas; at least one.
        groups: replicas, by their numbers in the job, that hold the same as each other; the largest group first.
        values: of the numbers among those that differ, by index: what each replica holds.
        extent: of the only variable that differs, how much of it; "" where that is not known.
    """

    compared: Sequence[Compared]
    differing: Sequence[int]
    groups: Sequence[Sequence[int]]
    values: Mapping[int, Sequence[str]] = field(default_factory=dict)
    extent: str = ""

    def of(self, kind: str) -> list[int]:
        """The indices of the variables of a kind that differ."""
        return [index for index in self.differing if self.compared[index].kind == kind]


@dataclass(frozen=True)
class Moment:
    """When a comparison was made.

    Args:
        position: in the run, "epoch 2, step 31".
        steps: of this run so far.
        updates: that the optimizer has made so far, of earlier runs too; None without an optimizer.
        equal_at: where all replicas were the same the last time; "" for never.
        first_update: the first one of the run has just been made.
        kept: the file of the model that the chief has, "" for none.
    """

    position: str
    steps: int
    updates: int | None = None
    equal_at: str = ""
    first_update: bool = False
    kept: str = ""


def divergence_of(compared: Sequence[Compared], vectors: Sequence[Any]) -> Divergence | None:
    """What differs between replicas; None where nothing does.

    Args:
        vectors: of each replica, in order: a fingerprint a variable.

    >>> weights = [Compared("a/kernel", WEIGHT), Compared("a/bias", WEIGHT)]
    >>> found = divergence_of(weights, [[1, 2], [1, 3], [1, 2]])
    >>> found.differing, found.groups
    ([1], [[0, 2], [1]])
    """
    table = [tuple(int(one) for one in vector) for vector in vectors]
    if len(set(table)) == 1:
        return None
    groups: dict[tuple[int, ...], list[int]] = {}
    for replica, vector in enumerate(table):
        groups.setdefault(vector, []).append(replica)
    differing = [index for index, values in enumerate(zip(*table, strict=True)) if len(set(values)) > 1]
    return Divergence(compared, differing, sorted(groups.values(), key=len, reverse=True))


def paragraph(found: Divergence, topology: Topology, moment: Moment) -> str:
    """The whole message."""
    count = _count(moment.steps, "step") + " of this run"
    count += "" if moment.updates is None else f", {_count(moment.updates, 'update')} of its optimizer"
    before = f" When they were compared before, at {moment.equal_at}, all were the same." if moment.equal_at else ""
    kept = f" {moment.kept} was left as it is." if moment.kept else ""
    return (
        f"Expected all {topology.num_replicas} replicas to hold the same model, received "
        f"{_who(found.groups, topology)}, at {moment.position} ({count}): {_what(found)}.{before}{kept} "
        f"{suspicion(found, topology, moment.first_update)}"
    )


def suspicion(found: Divergence, topology: Topology, first_update: bool) -> str:
    """What most likely happened, and what to do about it.

    Args:
        first_update: the comparison was made after the first update of the run.
    """
    for kind, advice in _OF_NUMBERS.items():
        if found.of(kind):
            return f"{_values(found, found.of(kind)[0], topology)}: {advice}"
    weights = [index for index, one in enumerate(found.compared) if one.kind == WEIGHT]
    if first_update and weights and found.of(WEIGHT) == weights:
        return _NOT_SUMMED
    if len(found.differing) == 1 and found.of(STREAM) == []:
        return _ONE_VARIABLE
    kinds = {found.compared[index].kind for index in found.differing}
    return _OF_KINDS.get(kinds.pop(), _ANYTHING) if len(kinds) == 1 else _ANYTHING


def extent(one: np.ndarray, other: np.ndarray) -> str:
    """How much of a variable differs between two replicas.

    >>> extent(np.float32([0, 1, 2]), np.float32([0, 1, -2]))
    '1 of its 3 elements, by 1 bit'
    >>> extent(np.float32([0, 1, 2]), np.float32([5, 1, 3]))
    '2 of its 3 elements'
    """
    width = one.dtype.itemsize
    bits = np.bitwise_xor(*(np.frombuffer(copy.tobytes(), np.uint8).reshape(-1, width) for copy in (one, other)))
    elements = int(bits.any(axis=1).sum())
    amount = f", by {_count(int(np.unpackbits(bits).sum()), 'bit')}" if elements == 1 else ""
    return f"{elements} of its {one.size} elements{amount}"


def replicas_text(replicas: Sequence[int], topology: Topology) -> str:
    """Replicas as people know them: by their ranks, where each rank has one.

    >>> replicas_text([1, 2], Topology(0, 3, 0, 3)), replicas_text([1], Topology(0, 1, 0, 1).with_replicas(3))
    ('ranks 1-2', 'replica 1')
    """
    text = ranks_text(replicas)
    return text if topology.replicas_per_process == 1 else text.replace("rank", "replica", 1)


def _who(groups: Sequence[Sequence[int]], topology: Topology) -> str:
    first, *rest = groups
    if len(first) > max(map(len, rest)):
        others = sorted(replica for group in rest for replica in group)
        return f"another one on {replicas_text(others, topology)}"
    names = [replicas_text(group, topology) for group in groups[:_MOST_GROUPS]]
    more = f" and {len(groups) - _MOST_GROUPS} more groups" if len(groups) > _MOST_GROUPS else ""
    return f"different ones on {' / '.join(names)}{more}"


def _what(found: Divergence) -> str:
    first, total = found.compared[found.differing[0]].path, len(found.compared)
    if len(found.differing) == 1:
        return f"{first} differs{f' ({found.extent})' if found.extent else ''}, alone of {total} variables"
    return f"{first} is the first of {len(found.differing)} that differ, of {total} variables"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _values(found: Divergence, index: int, topology: Topology) -> str:
    """
    >>> rate = Divergence([Compared("sgd/learning_rate", RATE)], [0], [[0, 2], [1]], {0: ["0.1", "0.5", "0.1"]})
    >>> _values(rate, 0, Topology(0, 3, 0, 3))
    'sgd/learning_rate is 0.1 on ranks 0, 2 and 0.5 on rank 1'
    """
    holders: dict[str, list[int]] = {}
    for replica, value in enumerate(found.values[index]):
        holders.setdefault(value, []).append(replica)
    shown = [f"{value} on {replicas_text(replicas, topology)}" for value, replicas in holders.items()][:_MOST_GROUPS]
    return f"{found.compared[index].path} is {' and '.join(shown)}"


_OF_NUMBERS = {
    RATE: "a callback or the script sets it on some ranks only, or from numbers that are not the same on all. Let "
    "every rank run the same lines; the logs that callbacks get are global.",
    ITERATIONS: "some replicas made more updates than others. Something applies the optimizer outside of the step, or "
    "sets its iterations, on some ranks only; let every rank run the same lines.",
    SCALE: "some replicas skipped an update that others made, so that what they took for the summed gradient was not "
    "the same. Look for another library that changes the optimizer or the reduction.",
}
_NOT_SUMMED = (
    "All trainable weights differ after the first update, as if each replica had applied its own gradient: look for "
    "another library's optimizer, hook or patch that takes the reduction away, and for gradients that the model "
    "computes outside of the step."
)
_ONE_VARIABLE = (
    "Something assigns it on some ranks only (a callback, a layer that asks for the rank, its clock or a file), or a "
    "device's memory is at fault: look at its ECC errors (nvidia-smi -q -d ECC; dmesg for the host's) and run once "
    "more on another machine."
)
_OF_KINDS = {
    SLOT: "Only the optimizer's state differs: something builds, restores or resets it on some ranks only. Restore it "
    "on every rank, or before the training, when all ranks get the chief's.",
    STATE: "Only weights that are not trained differ (moving statistics, counters): something calls the model with "
    "training=True, adapts a layer or assigns them on some ranks only. Do it on every rank, or with training=False.",
    STREAM: "Only random streams differ: something calls the model's random layers (with training=True) on some ranks "
    "only. Do it on every rank, or with training=False.",
}
_ANYTHING = (
    "Something changes the model on some ranks only (a callback, a layer that asks for the rank, its clock or a file), "
    "computes another update from the same gradients (other libraries or devices), or a device's memory is at fault "
    "(nvidia-smi -q -d ECC)."
)
