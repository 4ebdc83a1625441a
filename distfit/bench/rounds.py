"""Measures all ways in turn, round after round, so that what else the machine does meets all of them.

    results = measured([KINDS["25 KB"]], cores=[1, 2], seconds=1.0, rounds=5, count=shown)
    results.rates["25 KB"]["2"]["transform"]        # images/s of each round

For each kind of image and number of cores a child process waits (`bench.child`), pinned to the first cores that this
process may use; one pass at a time runs, all others wait.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from distfit.bench.samples import Kind, make
from distfit.bench.targets import ways_of
from distfit.errors import InputError, RunError
from distfit.monitor.counting import Done

# By kind of image, number of cores (as text, for JSON) and way: images/s of each round.
Rates = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True)
class Results:
    """
    Args:
        machine: what it was measured on, for people.
        settings: seconds of a pass, number of rounds.
        rates: of each way.
    """

    machine: dict[str, str]
    settings: dict[str, float]
    rates: Rates

    def to_json(self) -> str:
        """To be read again with `Results(**json.loads(text))`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def measured(
    kinds: Sequence[Kind],
    cores: Sequence[int],
    seconds: float,
    rounds: int,
    count: Callable[[str, int, str], AbstractContextManager[Done]],
) -> Results:
    """Runs everything; the images lie in a temporary folder meanwhile.

    Args:
        kinds: of images.
        cores: numbers of cores to measure on.
        seconds: of a pass, about.
        rounds: passes of each way; the first one of each is a trial and comes on top.
        count: the progress.

    Raises:
        InputError: this process may not use so many cores.
        RunError: a child process ended.
    """
    mine = sorted(os.sched_getaffinity(0))
    if not cores or not all(1 <= number <= len(mine) for number in cores):
        raise InputError(f"Expected numbers of cores from 1 to the {len(mine)} that there are, received {list(cores)}.")
    passes = rounds * len(cores) * sum(len(ways_of(kind)) for kind in kinds)
    rates: Rates = {}
    with tempfile.TemporaryDirectory(prefix="distfit-bench-") as folder, count("Measuring", passes, "passes") as done:
        for kind in kinds:
            files = make(kind, folder)
            rates[kind.name] = _of_kind(kind, files, {number: mine[:number] for number in cores}, seconds, rounds, done)
            for file in files:
                os.remove(file)
    return Results(machine(), {"seconds": seconds, "rounds": rounds}, rates)


def _of_kind(
    kind: Kind, files: Sequence[str], cores: dict[int, list[int]], seconds: float, rounds: int, done: Done
) -> dict[str, dict[str, list[float]]]:
    rates: dict[str, dict[str, list[float]]] = {str(number): {} for number in cores}
    with ExitStack() as stack:
        requests = {
            number: {"kind": kind.name, "files": list(files), "cores": own, "seconds": seconds}
            for number, own in cores.items()
        }
        asks = {number: stack.enter_context(_child(request)) for number, request in requests.items()}
        for _ in range(rounds):
            for way in ways_of(kind):
                for number, ask in asks.items():
                    rates[str(number)].setdefault(way, []).append(ask(way))
                    done()
    return rates


@contextmanager
def _child(request: dict[str, Any]) -> Iterator[Callable[[str], float]]:
    """A function that asks a child process for a way's images/s."""
    # Decoding needs no GPU, and TensorFlow would take all of them.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "distfit.bench.child", json.dumps(request)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, text=True) as child,
    ):

        def ask(way: str) -> float:
            answer = _answer(child, way)
            if not answer:
                errors.seek(0)
                *_, last = ["none", *errors.read().split("\n\n")[-1].strip().splitlines()]
                raise RunError(
                    f"Expected the process that measures images of {request['kind']} to measure {way!r} on cores "
                    f"{request['cores']}, received its end with exit code {child.wait()}. Its last words: {last}"
                )
            found = json.loads(answer)
            return round(found["images"] / found["seconds"], 2)

        try:
            yield ask
        finally:
            child.kill()


def _answer(child: subprocess.Popen[str], way: str) -> str:
    """Its line, or nothing where it has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(f"{way}\n")
        child.stdin.flush()
    except BrokenPipeError:
        return ""
    return child.stdout.readline()


def machine() -> dict[str, str]:
    """What figures depend on: the processor and the versions."""
    from importlib.metadata import version

    names = ("tensorflow", "simplejpeg", "opencv-python-headless", "numpy")
    versions = {name: version(name) for name in names}
    python = ".".join(map(str, sys.version_info[:3]))
    cores = len(os.sched_getaffinity(0))
    return {"processor": _processor(), "cores": str(cores), "python": python} | versions


def _processor() -> str:
    """Its name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return "unknown"
    found = {name.strip(): value.strip() for name, value in facts.items()}
    return found.get("model name", "unknown")
