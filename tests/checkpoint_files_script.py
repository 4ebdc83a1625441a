"""Processes that die, or whose disk ends, while they write a checkpoint: what tests/test_checkpoint_files.py starts.

    python -m tests.checkpoint_files_script killed FOLDER SEED    # 30 saves, each killed at a place of its own
    python -m tests.checkpoint_files_script full|readonly|limited FOLDER

The last line that it prints is JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distfit.checkpoint import folder as folder_module
from distfit.checkpoint.folder import Checkpoints
from distfit.checkpoint.lock import RunLock
from distfit.errors import RunError

KILLS = 30
VALUES = 30_000


def tensors_of(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full(VALUES, value, np.float32), "b": np.full((3, 5), value, np.float64)}


def publish(folder: str | os.PathLike, step: int, value: float) -> None:
    Checkpoints(folder).publish(step, tensors_of(value), {"value": value, "text": "x" * 2000})


def value_of(stored: Any) -> float:
    """The value of which a checkpoint is made, if all of it is."""
    value = stored.facts["value"]
    for name, array in tensors_of(value).items():
        np.testing.assert_array_equal(stored.tensors[name], array)
    return value


class Killer:
    """Kills this process after so many written bytes; a call to the system besides counts as `CALL` of them."""

    CALL = 2000

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, real: Callable[..., int]) -> Callable[..., int]:
        def written(number: int, block: Any) -> int:
            if len(block) > self.left:
                real(number, block[: self.left])
            self.spend(len(block))
            return real(number, block)

        return written

    def call(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            if self.left >= self.CALL // 2:
                found = real(*arguments, **more)
                self.spend(self.CALL)
                return found
            self.spend(self.CALL)

        return called

    def arm(self) -> None:
        os.write = self.write(os.write)
        for name in ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, self.call(getattr(os, name)))
        folder_module._change_places = self.call(folder_module._change_places)


def without_exchange(*paths: Path) -> bool:
    """A file system that cannot let two names change places."""
    return False


def save_and_die(folder: str, step: int, value: float, left: int, exchange: bool) -> bool:
    """In a child; whether it was killed."""
    child = os.fork()
    if child == 0:
        if not exchange:
            folder_module._change_places = without_exchange
        Killer(left).arm()
        publish(folder, step, value)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def cost_of_a_save(folder: str) -> int:
    """What a `Killer` counts in one, about."""
    size = sum(path.stat().st_size for path in Checkpoints(folder).entries()[-1].path.iterdir())
    return size + 20 * Killer.CALL


def killed(folder: str, seed: str) -> dict[str, Any]:
    draw = random.Random(int(seed))
    publish(folder, 0, 0.0)
    cost, found, hidden = cost_of_a_save(folder), [], 0
    for number in range(1, KILLS + 1):
        before = Checkpoints(folder).newest()[0]
        assert before is not None
        kind = draw.choice(["next", "same", "same without exchange"])
        step = before.step + (kind == "next")
        # Half of them among the calls at the end, which are few and decide.
        left = draw.randrange(cost) if number % 2 else draw.randrange(cost - 14 * Killer.CALL, cost)
        died = save_and_die(folder, step, float(number), left, kind != "same without exchange")
        stored, damaged = Checkpoints(folder).newest()
        kept = stored is not None and value_of(stored) in (value_of(before), float(number))
        entries = [entry.damage for entry in Checkpoints(folder).entries()]
        found.append({"kind": kind, "left": left, "died": died, "kept": kept, "damaged": len(damaged) + any(entries)})
        hidden += sum(name.startswith(".") for name in os.listdir(folder))
        Checkpoints(folder).clean()
        publish(folder, step, float(number))
        again = Checkpoints(folder).newest()[0]
        found[-1]["next"] = again is not None and value_of(again) == float(number)
        found[-1]["clean"] = not [name for name in os.listdir(folder) if name.startswith(".")]
    return {"saves": found, "hidden": hidden}


def refused(folder: str) -> dict[str, Any]:
    """What a save says that cannot be made, and what is there afterwards."""
    try:
        publish(folder, 2, 2.0)
    except RunError as error:
        stored = Checkpoints(folder).newest()[0]
        left = None if stored is None else value_of(stored)
        return {"said": str(error), "newest": left, "names": sorted(os.listdir(folder))}
    return {"said": None}


def full(folder: str) -> dict[str, Any]:
    publish(folder, 1, 1.0)
    return refused(folder)


def readonly(folder: str) -> dict[str, Any]:
    publish(folder, 1, 1.0)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    found = refused(folder)
    try:
        RunLock(folder, "test").acquire()
    except ValueError as error:
        found["lock"] = str(error)
    return found


def limited(folder: str) -> dict[str, Any]:
    publish(folder, 1, 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (VALUES, VALUES))
    return refused(folder)


def held(folder: str) -> dict[str, Any]:
    """Takes the lock, says so, and keeps it until it is killed."""
    lock = RunLock(folder, "the first run")
    lock.acquire()
    lock.touch(step=37)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    signal.pause()
    return {}


if __name__ == "__main__":
    commands = {one.__name__: one for one in (killed, full, readonly, limited, held)}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
