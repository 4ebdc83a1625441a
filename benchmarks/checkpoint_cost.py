"""What it costs a training to save its state: the longest gap between two steps, the share of its time, memory.

    python -m benchmarks.checkpoint_cost                                    25 and 100 million parameters, Adam, 50 MB/s
    python -m benchmarks.checkpoint_cost --millions 25 --disk-mb-s 1000     a faster disk

A model is trained by distfit.fit, in rounds: as many steps as a save lasts, and as many without one. A gap goes from
the end of a step to the end of the next one; the copy of the state is in it, and all that writing takes from the steps.
How far the longest exceeds the median of the steps without a save is measured in copies of the state in memory
(`np.copyto`, the same bytes, one thread). The line shows the median of the rounds; "neighbours" is the same figure of
the steps without a save: what else runs on this machine.

Exit code 1: a gap of more than 1.2 copies, more than 1 % of the time at the default of `every_seconds`, or more memory
than 1.1 times the state. About 6 minutes on two cores, most of it the slow disk.
"""

from __future__ import annotations

import argparse
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
from distfit.checkpoint.options import EVERY_SECONDS
from distfit.checkpoint.snapshot import Snapshot
from distfit.checkpoint.writer import Writer
from distfit.session import init

MOST_COPIES, MOST_SHARE, MOST_MEMORY = 1.2, 0.01, 1.1
BATCH, WARM_UP, ROUNDS, MOST_STEPS = 16, 6, 5, 10**6
LEAST_STEPS = 12  # of a stretch, so that it has a median
# Input and output, and two hidden layers, by millions of parameters.
WIDTHS = {1: (256, 832), 25: (1024, 4096), 100: (2048, 8192)}
HEADER = ("parameters", "state", "step", "copy", "take", "longest gap", "neighbours", "share", "memory")

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
        take_s: of the copy at the boundary; it is in the first gap.
    """

    saving: Stretch = field(default_factory=Stretch)
    plain: Stretch = field(default_factory=Stretch)
    take_s: float = 0.0

    def over(self, stretch: Stretch) -> float:
        return max(stretch.gaps) - median(self.plain.gaps)

    def cost_s(self) -> float:
        return sum(self.saving.gaps) - sum(self.plain.gaps)


class Saving(keras.callbacks.Callback):
    """Saves at steps' ends as a training that keeps its state does, and takes the time."""

    def __init__(self, publish: Publish) -> None:
        super().__init__()
        self._publish = publish
        self.rounds: list[Round] = []
        self.buffer_bytes = 0

    def on_train_begin(self, logs: Any = None) -> None:
        named = [(f"{number}/{variable.path}", variable) for number, variable in enumerate(variables_of(self.model))]
        self.snapshot = Snapshot(named, init().backend.first_copy)
        self._stages = self._in_turn()

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
        with Writer("a folder of the benchmark") as writer:
            for number in range(1, ROUNDS + 1):
                new = Round()
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


def trained(millions: int, publish: Publish) -> Saving:
    """A model of so many parameters, with Adam, until every round has been."""
    keras.utils.set_random_seed(1)
    outer, inner = WIDTHS[millions]
    hidden = [layers.Dense(inner, "relu"), layers.Dense(inner, "relu")]
    model = keras.Sequential([keras.Input((outer,)), *hidden, layers.Dense(outer)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    batch, saving = np.random.default_rng(0).random((2, BATCH, outer), np.float32), Saving(publish)
    # One epoch: TensorFlow may take seconds for the end of one.
    data = tf.data.Dataset.from_tensors((batch[0], batch[1])).repeat()
    distfit.fit(model, data, steps_per_epoch=MOST_STEPS, verbose=0, callbacks=[saving])
    return saving


def measured(millions: int, bytes_per_s: float, folder: Path) -> tuple[str, bool]:
    """A line of the table, and whether it is within the bounds."""
    checkpoints = Checkpoints(folder)
    saving = trained(millions, slow(lambda step, tensors: checkpoints.publish(step, tensors, {}), bytes_per_s))
    state, rounds = saving.snapshot.nbytes, saving.rounds
    copy = copy_s(saving.snapshot.tensors)
    longest = median(each.over(each.saving) for each in rounds) / copy
    neighbours = median(each.over(each.plain) for each in rounds) / copy
    share = median(each.cost_s() for each in rounds) / EVERY_SECONDS
    memory = saving.memory_bytes() / state
    take = median(each.take_s for each in rounds)
    cells = (
        f"{millions} million",
        f"{state / 1e6:,.0f} MB",
        _ms(median(gap for each in rounds for gap in each.plain.gaps)),
        _ms(copy),
        f"{take / copy:.2f} copies",
        f"{longest:.2f} copies",
        f"{neighbours:.2f} copies",
        f"{share:.2%}",
        f"{memory:.2f} states",
    )
    return _line(cells), longest <= MOST_COPIES and share <= MOST_SHARE and memory <= MOST_MEMORY


def copy_s(tensors: dict[str, np.ndarray]) -> float:
    """Seconds that one thread needs to copy them to memory that has been touched."""
    other = {name: np.full_like(tensor, 1) for name, tensor in tensors.items()}
    times = []
    for _ in range(5):
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
    for millions in map(int, chosen.millions.split(",")):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            line, good = measured(millions, bytes_per_s, Path(folder))
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
