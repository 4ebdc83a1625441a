"""What it costs a training to save its state: the longest gap between two steps, the share of its time, memory.

    python -m benchmarks.checkpoint_cost                                    25 and 100 million parameters, Adam, 50 MB/s
    python -m benchmarks.checkpoint_cost --millions 25 --disk-mb-s 1000     a faster disk

A model is trained by distfit.fit, in rounds: as many steps as a save lasts, and as many without one. A gap goes from
the end of a step to the end of the next one; the copy of the state is in it, and all that writing takes from the steps.
How far the longest exceeds the median of the steps without a save is measured in copies of the state in memory
(`np.copyto`, the same bytes, one thread, timed just before the round: the memory of a virtual machine is twice as fast
in one second as in the next). The line shows the median of the rounds; "neighbours" is the same figure of
the steps without a save: what else runs on this machine.

Who computes: "device" are steps of 250 ms in which the host waits, as it does for an accelerator; "host" are Adam's, on
all cores of this machine, so that whatever writes takes them from a step.

Exit code 1: beside a device, a gap of more than 1.2 copies; more than 1 % of the time at the default of
`every_seconds`; or more memory than 1.1 times the state. About 16 minutes on two cores, most of it the slow disk.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import distfit
from distfit.backends.hooks import variables_of
from distfit.checkpoint.folder import Checkpoints
from distfit.checkpoint.options import EVERY_SECONDS, Checkpoint
from distfit.checkpoint.publishing import Publishing
from distfit.checkpoint.snapshot import Snapshot
from distfit.checkpoint.state import WEIGHT
from distfit.checkpoint.writer import Writer
from distfit.session import init

MOST_COPIES, MOST_SHARE, MOST_MEMORY = 1.2, 0.01, 1.1
BATCH, WARM_UP, ROUNDS, MOST_STEPS = 16, 6, 5, 10**6
LEAST_STEPS = 12  # of a stretch, so that it has a median
# Input and output, and two hidden layers, by millions of parameters.
WIDTHS = {1: (256, 832), 25: (1024, 4096), 100: (2048, 8192)}
DEVICE_S = 0.25
HEADER = ("parameters", "computes", "state", "step", "copy", "take", "longest gap", "neighbours", "share", "memory")

# Writes the tensors of a step.
Publish: TypeAlias = Callable[[int, dict[str, np.ndarray]], Any]


@dataclass
class Stretch:
    """Seconds from the end of a step to the end of the next one, and the most memory that was held."""

    gaps: list[float] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass
class Round:
    """One save, and as many steps without one.

    Args:
        copy_s: of a copy in memory, just before.
        take_s: of the copy at the boundary; it is in the first gap.
    """

    copy_s: float

    saving: Stretch = field(default_factory=Stretch)
    plain: Stretch = field(default_factory=Stretch)
    take_s: float = 0.0

    def over(self, stretch: Stretch) -> float:
        """In copies."""
        return (max(stretch.gaps) - median(self.plain.gaps)) / self.copy_s

    def cost_s(self) -> float:
        return sum(self.saving.gaps) - sum(self.plain.gaps)


class Saving(keras.callbacks.Callback):
    """Saves at steps' ends as a training that keeps its state does, and takes the time."""

    def __init__(self, publish: Publish, device_s: float) -> None:
        super().__init__()
        self._publish, self._device_s = publish, device_s
        self.rounds: list[Round] = []
        self.buffer_bytes = 0

    def on_train_begin(self, logs: Any = None) -> None:
        variables = enumerate(variables_of(self.model))
        named = [(f"{WEIGHT}/{number}/{variable.path}", variable) for number, variable in variables]
        self.snapshot = Snapshot(named, init().backend.first_copy)
        self._stages = self._in_turn()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        time.sleep(self._device_s)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = next(self._stages, True)

    def memory_bytes(self) -> float:
        """What a save needs: the buffers, and by how much the steps of a save hold more than others."""
        return self.buffer_bytes + median(each.saving.peak_bytes - each.plain.peak_bytes for each in self.rounds)

    def _in_turn(self) -> Iterator[bool]:
        """One `next` at the end of each step."""
        for _ in range(WARM_UP):
            yield False
        before = _memory("VmRSS")
        self.snapshot.prepare()
        self.buffer_bytes = _memory("VmRSS") - before
        other = {name: np.full_like(tensor, 1) for name, tensor in self.snapshot.tensors.items()}
        with Writer("a folder of the benchmark") as writer:
            for number in range(1, ROUNDS + 1):
                new = Round(copy_s(self.snapshot.tensors, other))
                yield from _timed(new.saving, self._saved(number, new, writer))
                yield from _timed(new.plain, range(len(new.saving.gaps)))
                self.rounds.append(new)

    def _saved(self, number: int, new: Round, writer: Writer) -> Iterator[None]:
        """At each boundary until the save has ended; the first one is where it begins."""
        began = time.perf_counter()
        self.snapshot.take()
        new.take_s = time.perf_counter() - began
        writer.start(lambda: self._publish(number, self.snapshot.tensors))
        while writer.busy or len(new.saving.gaps) < LEAST_STEPS:
            yield
            writer.check()


def _timed(stretch: Stretch, boundaries: Iterable[Any]) -> Iterator[bool]:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak becomes what is held now
    began = time.perf_counter()
    for _ in boundaries:
        yield False
        now = time.perf_counter()
        stretch.gaps.append(now - began)
        began = now
    stretch.peak_bytes = _memory("VmHWM")


class Held(layers.Layer):
    """So many parameters and their two slots of Adam, which a step leaves alone: the host waits for a device."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        for _ in range(3):
            self.add_weight((millions * 10**6,), trainable=False)

    def call(self, inputs: Any) -> Any:
        return inputs


def trained(millions: int, publish: Publish, on_device: bool) -> Saving:
    """A model of so many parameters, with Adam, until every round has been."""
    keras.utils.set_random_seed(1)
    outer, inner = WIDTHS[millions]
    hidden = [Held(millions)] if on_device else [layers.Dense(inner, "relu"), layers.Dense(inner, "relu")]
    outer = 1 if on_device else outer
    model = keras.Sequential([keras.Input((outer,)), *hidden, layers.Dense(outer)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    batch = np.random.default_rng(0).random((2, BATCH, outer), np.float32)
    saving = Saving(publish, DEVICE_S if on_device else 0.0)
    # One epoch: TensorFlow may take seconds for the end of one.
    data = tf.data.Dataset.from_tensors((batch[0], batch[1])).repeat()
    distfit.fit(model, data, steps_per_epoch=MOST_STEPS, verbose=0, callbacks=[saving])
    return saving


def measured(millions: int, on_device: bool, bytes_per_s: float, folder: Path) -> tuple[str, bool]:
    """A line of the table, and whether it is within the bounds."""
    publishing = Publishing(Checkpoints(folder), Checkpoint(folder))
    saving = trained(
        millions, slow(lambda step, tensors: publishing.publish(step, tensors, {}), bytes_per_s), on_device
    )
    state, rounds = saving.snapshot.nbytes, saving.rounds
    longest = median(each.over(each.saving) for each in rounds)
    neighbours = median(each.over(each.plain) for each in rounds)
    share = median(each.cost_s() for each in rounds) / EVERY_SECONDS
    memory = saving.memory_bytes() / state
    take = median(each.take_s / each.copy_s for each in rounds)
    cells = (
        f"{millions} million",
        "device" if on_device else "host",
        f"{state / 1e6:,.0f} MB",
        _ms(median(gap for each in rounds for gap in each.plain.gaps)),
        _ms(median(each.copy_s for each in rounds)),
        f"{take:.2f} copies",
        f"{longest:.2f} copies",
        f"{neighbours:.2f} copies",
        f"{share:.2%}",
        f"{memory:.2f} states",
    )
    good = share <= MOST_SHARE and memory <= MOST_MEMORY and (longest <= MOST_COPIES or not on_device)
    return _line(cells), good


def copy_s(tensors: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Seconds that one thread needs to copy them to others, whose memory has been touched."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for name, tensor in tensors.items():
            np.copyto(other[name], tensor)
        times.append(time.perf_counter() - began)
    return median(times)


def _memory(name: str) -> int:
    """Bytes: "VmRSS" what this process holds, "VmHWM" the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def slow(publish: Publish, bytes_per_s: float) -> Publish:
    """As on a disk of this speed: what is to be written is held for as long. Its beginning is as fast as this one."""

    def published(step: int, tensors: dict[str, np.ndarray]) -> None:
        ends = time.monotonic() + sum(tensor.nbytes for tensor in tensors.values()) / bytes_per_s
        publish(step, tensors)
        time.sleep(max(0.0, ends - time.monotonic()))

    return published


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", default="25,100", help=f"of parameters: {', '.join(map(str, WIDTHS))}")
    parser.add_argument("--disk-mb-s", type=float, default=50.0, help="how fast the disk is; 0 as fast as it can")
    parser.add_argument("--folder", help="on the disk to write to; by default a temporary one")
    chosen = parser.parse_args(arguments)
    bytes_per_s = chosen.disk_mb_s * 1e6 or float("inf")
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.platform()}")
    print(_line(HEADER), _line(["---"] * len(HEADER)), sep="\n", flush=True)
    within = []
    for millions, on_device in itertools.product(map(int, chosen.millions.split(",")), (True, False)):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            line, good = measured(millions, on_device, bytes_per_s, Path(folder))
        print(line, flush=True)
        within.append(good)
        keras.backend.clear_session()
    return int(not all(within))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
