"""One process, one device: the null object, with which everything is plain Keras.

`sum` returns its tensors and `adopted` changes nothing, so that no caller asks whether it is distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distfit.backends.base import Backend
from distfit.backends.devices import visible_gpus
from distfit.backends.transport import Alone
from distfit.topology import Topology


class Single(Backend):
    """One replica in one process."""

    title = "single (one process, one device)"
    supports_jit = True

    def __init__(self, topology: Topology, devices: int | None = None) -> None:
        self.topology = topology
        self.transport = Alone()
        self.devices = []

    def start(self) -> None:
        self.devices = ["GPU:0"] if visible_gpus() else ["CPU:0"]

    @contextmanager
    def adopted(self, model: Any) -> Iterator[None]:
        yield

    def run(self, function: Callable[..., Any], shards: Sequence[Sequence[Any]]) -> list[Any]:
        return [function(*shards[0])]

    def replica(self) -> int:
        return 0

    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return list(tensors)

    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return list(tensors)
