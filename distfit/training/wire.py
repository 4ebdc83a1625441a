"""The wire: what the replicas of a job send each other inside a step, named, recorded, in one order.

    wire = Wire(backend)
    with wire.step("train") as transfers:          # around a step, as each replica traces it
        (total,) = wire.sum([local], "small")
    transfers                                      # [Transfer("train.small", "float64", 8)]

Collectives pair up by name and order. Whoever calls one more or one fewer than the others, in another order or
of another size, hangs the job or mixes its steps; so the ranks compare what they recorded before the first
step runs (`training.loop`), and a collective that only some replicas might reach is refused while it is traced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from distfit.errors import InputError
from distfit.training.origin import Origin, Origins

if TYPE_CHECKING:
    from distfit.backends.base import Backend


# Of a bucket of gradients, so many elements or a few more are looked at: enough to meet one that is not zero, few
# enough to cost nothing.
_SAMPLE = 1024
# How many numbers `Wire.evidence` has.
EVIDENCE = 2


@dataclass(frozen=True)
class Transfer:
    """One collective of a step.

    Args:
        name: unique within the step.
        dtype: of its elements on the wire.
        elements: how many each replica sends; of a gather, or of a sum of any number of rows, in one row.
        gathered: replicas send rows of their own, which are put together; else what they send is added up.
    """

    name: str
    dtype: str
    elements: int
    gathered: bool = False

    @property
    def nbytes(self) -> int:
        """What each replica sends; of a gather, for one row.

        >>> Transfer("train.small", "float64", 8).nbytes
        64
        """
        return self.elements * tf.as_dtype(self.dtype).size

    def __str__(self) -> str:
        """For messages.

        >>> str(Transfer("train.small", "float64", 8))
        'train.small (8 x float64)'
        """
        return f"{self.name} ({self.elements} x {self.dtype})"


class _Current(threading.local):
    """The step that this thread traces: replicas of one process are traced in threads."""

    step: str | None = None
    graph: Any = None
    transfers: list[Transfer]
    evidence: list[Any]
    origins: Origins


class Wire:
    """All collectives of a model's steps on one engine.

    Args:
        backend: sums over the replicas.

    Attributes:
        ragged: the data of replicas may differ in more than their number of rows, as what each rank reads by itself.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._current = _Current()
        self.ragged = False

    @contextmanager
    def step(self, name: str, data: Any = ()) -> Iterator[list[Transfer]]:
        """Held around one step; the list is complete on the way out. Replicas each have their own.

        Args:
            name: of the step; its collectives are named after it.
            data: what only this replica has.
        """
        current = self._current
        current.step, current.graph, current.transfers, current.evidence = name, _graph(), [], []
        current.origins = Origins([data], same_lengths=not self.ragged)
        try:
            yield current.transfers
        finally:
            current.step = None

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Each tensor summed over all replicas, none of them a gradient's way.

        Args:
            tensors: dense, of shapes that are the same on every replica, and static but for the number of rows.
            name: the second one of a name within a step gets a number.

        Raises:
            InputError: in a branch, a loop or a function inside the step, which other replicas may not reach.
        """
        return [self._sum(tensor, name) for tensor in tensors]

    def differentiable_sum(self, tensor: Any, name: str) -> Any:
        """A tensor summed over all replicas, through which gradients flow: each replica's is the sum of all.

        As the loss is a sum over replicas too, the gradient of a replica's addend is what all of them ask of
        the sum. The backward pass makes the second collective.

        Raises:
            InputError: as `sum`.
        """

        @tf.custom_gradient
        def summed(addend: Any) -> tuple[Any, Any]:
            # Differentiable again: a gradient penalty asks for the gradient of a gradient.
            return self._sum(addend, name), lambda upstream: self.differentiable_sum(upstream, f"{name}.gradient")

        return summed(tensor)

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Each tensor's rows of all replicas, in the replicas' order.

        Args:
            tensors: of at least one row each, whose sizes are static; replicas may have different numbers of rows.
            name: as of `sum`.

        Raises:
            InputError: as `sum`.
        """
        return [self._send(self._backend.gather, tensor, name, gathered=True) for tensor in tensors]

    def differentiable_gather(self, tensor: Any, name: str) -> Any:
        """As `gather`, of one tensor, through which gradients flow: what all replicas ask of this one's rows.

        The backward pass makes the second collective, the sum of what each asks of all rows.
        """

        @tf.custom_gradient
        def gathered(rows: Any) -> tuple[Any, Any]:
            (every,) = self.gather([rows], name)
            (counts,) = self.gather([tf.shape(rows)[:1]], f"{name}.rows")
            first = tf.reduce_sum(counts[: self._backend.replica()])

            def gradient(upstream: Any) -> Any:
                asked = self.differentiable_sum(upstream, f"{name}.gradient")
                return tf.ensure_shape(asked[first : first + tf.shape(rows)[0]], rows.shape)

            return every, gradient

        return gathered(tensor)

    def note(self, what: str) -> None:
        """Something that replicas must do alike and that sends nothing; ranks compare it with what they send."""
        self._current.transfers.append(Transfer(self._unique(what), "uint8", 0))

    def alike(self, tensor: Any) -> bool:
        """Whether a tensor of this step is known to be the same on every replica."""
        return self._current.origins.of(tensor) is Origin.SAME

    def witness(self, own: Any, total: Any) -> None:
        """Look at a sample of what this replica sent and of what came back."""
        stride = max(1, own.shape[0] // _SAMPLE)
        sent, received = (tf.cast(flat[::stride], tf.float64) for flat in (own, total))
        self._current.evidence.append(tf.stack([_energy(sent), _energy(received - sent)]))

    def evidence(self) -> Any:
        """Of the step so far, in float64: the sum of squares of what this replica sent of its gradients, and that of
        what the others added to it, both of a sample. Zeros where no gradient has travelled."""
        found = self._current.evidence
        return tf.add_n(found) if found else tf.zeros([EVIDENCE], tf.float64)

    def _sum(self, tensor: Any, name: str) -> Any:
        return self._send(self._backend.sum, tensor, name, gathered=False)

    def _send(self, collective: Callable[..., list[Any]], tensor: Any, name: str, gathered: bool) -> Any:
        current = self._current
        if current.step is None:
            raise RuntimeError(f"a collective {name!r} outside of a step")
        if _graph() is not current.graph or _in_a_vectorised_map():
            raise InputError(
                "Expected what replicas sum (gradients, moments of synchronised BatchNormalization) to be summed in "
                f"the step itself, received {name!r} inside a tf.cond, a loop (tf.vectorized_map is one), a "
                "tf.function of the model's own or an XLA program, where some replicas might not arrive and the "
                "others would wait for ever. Move it out, or "
                "train with one replica."
            )
        by_row = gathered or tensor.shape.num_elements() is None
        elements = (tensor.shape[1:] if by_row else tensor.shape).num_elements()
        transfer = Transfer(self._unique(name), tensor.dtype.name, elements, gathered)
        current.transfers.append(transfer)
        (result,) = collective([tensor], name=transfer.name)
        return result

    def _unique(self, name: str) -> str:
        current = self._current
        taken = {transfer.name for transfer in current.transfers}
        names = [f"{current.step}.{name}", *(f"{current.step}.{name}.{again}" for again in range(2, len(taken) + 3))]
        return next(free for free in names if free not in taken)


def _energy(values: Any) -> Any:
    return tf.reduce_sum(values * values)


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _in_a_vectorised_map() -> bool:
    """Whether TensorFlow will turn what is computed here into a loop: its `pfor` (tf.vectorized_map, batch_jacobian)
    reads the body from the step's own graph, in a name scope of its own."""
    return any(part.startswith("loop_body") for part in tf.get_current_name_scope().split("/"))
