"""Ranks that are threads of one process, for tests: what distfit does between processes, without starting any.

    group = Group(3)                             # shared by the ranks
    backend = Threads(topology, group)           # in the thread of each rank
    group.leave(rank)                            # the rank has ended
    group.abort()                                # one has failed: nobody waits any longer

Tensors of a step travel through TensorFlow's queues, one from each rank to each other, and are added in the order of
the ranks. A queue that is waited for keeps no thread of TensorFlow's waiting, of which there may be fewer than ranks.

Ranks take turns: one runs Python at a time, from one collective to the next, with random states (Python's, NumPy's
and TensorFlow's global seed) of its own, as processes have them. So a training in threads gives the same numbers every
time. `distfit.thread_ranks` starts them.
"""

from __future__ import annotations

import functools
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.context import context

from distfit.backends.base import Backend
from distfit.backends.hooks import build, everything_shared, hooked
from distfit.errors import RunError
from distfit.topology import Topology
from distfit.watch.calls import Call, Calls, Progress
from distfit.watch.here import Here


@dataclass(frozen=True)
class RandomStates:
    """What a process has once, and code draws on unseen."""

    python: Any
    numpy: Any
    seed: int | None
    operations: random.Random | None

    @staticmethod
    def now() -> RandomStates:
        """Those of this process at the moment."""
        own = vars(context())
        return RandomStates(random.getstate(), np.random.get_state(), own["_seed"], own.get("_rng"))

    @staticmethod
    def unseeded() -> RandomStates:
        """Those of a process that has just started."""
        return RandomStates(random.Random().getstate(), np.random.RandomState().get_state(), None, None)

    def restore(self) -> None:
        """Make them this process's."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        context()._seed, context()._rng = self.seed, self.operations


class Missed(Exception):
    """A rank waits for one that does not come."""


class Turns:
    """One rank runs Python at a time, with its own random states."""

    def __init__(self, ranks: int) -> None:
        self._changed = threading.Condition()
        self._holder: int | None = None
        self._over = False
        self._states = [RandomStates.unseeded() for _ in range(ranks)]

    def take(self, rank: int) -> None:
        """Wait for a turn; at once for who has it."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._holder in (None, rank))
            if self._holder is None:
                self._holder = rank
                self._states[rank].restore()

    def leave(self, rank: int) -> None:
        """End a turn; nothing for who has none."""
        with self._changed:
            if self._holder == rank:
                self._states[rank] = RandomStates.now()
                self._holder = None
                self._changed.notify_all()

    def end(self) -> None:
        """Nobody waits for a turn any longer."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @contextmanager
    def left(self, rank: int) -> Iterator[None]:
        """Around what waits for other ranks."""
        self.leave(rank)
        try:
            yield
        finally:
            self.take(rank)


class Group:
    """What the ranks of one run share.

    Attributes:
        aborted: one has failed; what others raise from then on is a consequence.
        ended: ranks that have nothing more to send.
        turns: whose Python runs.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.turns = Turns(size)
        self.aborted = False
        self.ended: list[int] = []
        self._changed = threading.Condition()
        self._calls = [0] * size
        self._sent: dict[int, dict[int, bytes]] = {}
        self._heres: dict[int, Here] = {}
        self._announced = Calls(size)
        self._met = 0
        self._queues: dict[tuple[int, int, str, tf.DType], tf.queue.FIFOQueue] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """A host value of every rank, as a copy, in their order.

        Raises:
            Missed: another rank has ended or failed.
        """
        call, self._calls[rank] = self._calls[rank], self._calls[rank] + 1
        sent = pickle.dumps(value)
        with self.turns.left(rank), self._changed:
            here = self._sent.setdefault(call, {})
            here[rank] = sent
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(here) == self.size or self._in_vain(call))
            if len(here) < self.size:
                raise Missed("another rank has ended")
            # Everybody is here, so that nobody reads what was sent before.
            self._sent.pop(call - 1, None)
        return [pickle.loads(here[each]) for each in range(self.size)]

    def watched(self, rank: int, here: Here) -> None:
        """From now on the others can see what this rank is doing."""
        self._heres[rank] = here

    def waits(self) -> None:
        """A rank waits for others, who may wait for it in a callback."""
        with self._changed:
            if self._announced.pending:
                self._changed.notify_all()

    def meet(self, rank: int, call: Call) -> None:
        """Wait until all ranks are about to make a callback's call.

        Raises:
            RunError: some never will.
            Missed: another rank has failed.
        """
        with self.turns.left(rank), self._changed:
            before = self._met
            self._announced.announce(rank, call, now=0.0)
            if self._announced.met():
                self._met += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._met > before or self.aborted or self._contradiction())
            if self._met == before:
                raise RunError(self._contradiction()) if not self.aborted else Missed("another rank has failed")

    def _contradiction(self) -> str | None:
        for rank, here in self._heres.items():
            self._announced.place(rank, here.place())
        progress = [Progress(gone=rank in self.ended) for rank in range(self.size)]
        return self._announced.contradiction(progress, lambda rank: f"rank {rank} of {self.size}")

    def queue(self, sender: int, receiver: int, name: str, dtype: tf.DType) -> tf.queue.FIFOQueue:
        """The way of one tensor of a step; closed when its sender has gone."""
        key = (sender, receiver, name, dtype)
        with self._changed:
            if key not in self._queues:
                with tf.init_scope():
                    self._queues[key] = tf.queue.FIFOQueue(-1, [dtype])
                self._close_what_nobody_feeds()
            return self._queues[key]

    def leave(self, rank: int) -> None:
        """A rank has ended: who waits for it now, or will, gets an error; what it has sent arrives."""
        with self._changed:
            self.ended.append(rank)
            self._close_what_nobody_feeds()
            self._changed.notify_all()
        self.turns.leave(rank)

    def abort(self) -> None:
        """A rank has failed: nobody waits any longer."""
        with self._changed:
            self.aborted = True
            self._close_what_nobody_feeds()
            self._changed.notify_all()
        self.turns.end()

    def _in_vain(self, call: int) -> bool:
        """Whether a rank will not come to its call of this number any more."""
        return self.aborted or any(self._calls[rank] <= call for rank in self.ended)

    def _close_what_nobody_feeds(self) -> None:
        for (sender, *_), queue in self._queues.items():
            if self.aborted or sender in self.ended:
                with tf.init_scope():
                    # Closing twice is an error.
                    if not queue.is_closed():
                        queue.close()


class _Meeting:
    """Host values between the ranks of a group (`transport.Transport`)."""

    def __init__(self, group: Group, topology: Topology) -> None:
        self._group, self._topology = group, topology

    def broadcast(self, value: Any) -> Any:
        return self.gather(value if self._topology.is_chief else None)[0]

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self._topology.rank, value)

    def collect(self, value: Any) -> list[Any] | None:
        gathered = self.gather(value)
        return gathered if self._topology.is_chief else None

    def sum(self, array: np.ndarray) -> np.ndarray:
        return functools.reduce(np.add, self.gather(array))


class Threads(Backend):
    """One replica in each of several threads.

    Args:
        topology: this rank's place.
        group: of its ranks.
    """

    title = "threads (ranks of one process, for tests)"

    def __init__(self, topology: Topology, group: Group) -> None:
        self.topology = topology
        self.transport = _Meeting(group, topology)
        self._group = group

    def start(self) -> None:
        self.devices = ["CPU:0"]

    def build(self, model: Any, data_spec: Any, targets: bool = True) -> None:
        build(model, data_spec, targets)

    @contextmanager
    def adopted(self, model: Any) -> Iterator[None]:
        with everything_shared(model) as variables:
            chiefs = self.transport.broadcast([variable.numpy() for variable in variables])
            for variable, value in zip(variables, chiefs, strict=True):
                variable._value.assign(value)
            with hooked(model, self):
                yield

    def run(self, function: Callable[..., Any], shards: Sequence[Sequence[Any]]) -> list[Any]:
        return [function(*shards[0])]

    def replica(self) -> int:
        return self.topology.rank

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        # Stacked, as the order in which TensorFlow's graph optimiser adds up single tensors depends on their names.
        return [
            tf.reduce_sum(tf.stack(self._exchanged(tensor, tensor.shape, f"{name}.{number}")), axis=0)
            for number, tensor in enumerate(tensors)
        ]

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return [
            tf.concat(self._exchanged(tensor, [None, *tensor.shape[1:]], f"{name}.{number}"), axis=0)
            for number, tensor in enumerate(tensors)
        ]

    def failed_elsewhere(self, error: BaseException) -> bool:
        return self._group.aborted

    def _exchanged(self, tensor: Any, shape: Any, name: str) -> list[Any]:
        """A tensor of every rank, in their order."""
        if tf.executing_eagerly():
            with self._group.turns.left(self.topology.rank):
                return self._sent_and_received(tensor, shape, name)
        # When it runs, this rank's Python waits for the step to return. Its next turn it takes in `waiting`.
        leaving = tf.numpy_function(self._leave_turn, [], tf.int64)
        with tf.control_dependencies([leaving]):
            return self._sent_and_received(tensor, shape, name)

    def _leave_turn(self) -> np.int64:
        self._group.turns.leave(self.topology.rank)
        return np.int64(0)

    def _sent_and_received(self, tensor: Any, shape: Any, name: str) -> list[Any]:
        own, others = self.topology.rank, [rank for rank in range(self._group.size) if rank != self.topology.rank]
        for rank in others:
            self._group.queue(own, rank, name, tensor.dtype).enqueue(tensor)
        arrived = {rank: self._group.queue(rank, own, name, tensor.dtype).dequeue() for rank in others}
        return [tensor if rank == own else tf.ensure_shape(arrived[rank], shape) for rank in range(self._group.size)]
