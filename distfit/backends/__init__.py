"""The engines, and the one place that knows their names.

`choose` turns a strategy's name and the facts of the job into a backend that has not started yet.
"""

from __future__ import annotations

import numbers
import os
from importlib import import_module
from importlib.util import find_spec

from distfit.backends.base import Backend
from distfit.errors import InputError, nearest
from distfit.topology import Topology, launched

_ENGINES = {
    "single": ("distfit.backends.single", "Single"),
    "mirrored": ("distfit.backends.mirrored", "Mirrored"),
    "horovod": ("distfit.backends.horovod", "Horovod"),
}
STRATEGIES = ("auto", *_ENGINES)
_ONE_DEVICE = ("single", "horovod")


def choose(strategy: str, devices: int | None, topology: Topology) -> Backend:
    """The engine for a job, not started.

    Args:
        strategy, devices, topology: as for `settle`.

    Raises:
        InputError: as `settle`; one that cannot serve several ranks, or an engine that is not installed.
    """
    name, devices = settle(strategy, devices, topology)
    _check_ranks(name, topology)
    _check_devices(name, devices)
    module, engine = _ENGINES[name]
    return getattr(import_module(module), engine)(topology, devices)


def ranks_have_an_engine() -> bool:
    """Whether the engine of several ranks is installed; it is not loaded."""
    return find_spec("horovod") is not None


def settle(strategy: str, devices: int | None, topology: Topology) -> tuple[str, int | None]:
    """What is asked for in one spelling, so that two ways to ask for the same engine are equal.

    Args:
        strategy: one of `STRATEGIES`. `auto` means horovod when the process was started as one of several
            ranks, mirrored when it has several GPUs or is asked for several devices, else single.
        devices: devices of this process, None for all its GPUs or one CPU.
        topology: where this process stands.

    Returns:
        The engine's name and its devices, None where one is all that it takes.

    Raises:
        InputError: an unknown strategy, or devices that are no number of them.
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"Expected strategy to be one of {', '.join(STRATEGIES)}, received {strategy!r}; "
            f"{nearest(str(strategy), list(STRATEGIES))}"
        )
    if devices is not None and (not isinstance(devices, numbers.Integral) or devices < 1):
        raise InputError(f"Expected devices to be a whole number of at least 1, or None, received {devices!r}.")
    name = _automatic(devices, topology) if strategy == "auto" else strategy
    return name, None if devices == 1 and name in _ONE_DEVICE else devices


def _automatic(devices: int | None, topology: Topology) -> str:
    if topology.size > 1:
        return "horovod"
    if devices is not None:
        return "mirrored" if devices > 1 else "single"
    from distfit.backends.devices import visible_gpus

    return "mirrored" if len(visible_gpus()) > 1 else "single"


def _check_ranks(name: str, topology: Topology) -> None:
    """Refuse what would train `size` models side by side, each thinking it is alone."""
    if name == "horovod" and not launched(os.environ):
        raise InputError(
            "Expected strategy 'horovod' in a process that a launcher started, received one that was started "
            "alone. Start it with mpirun -np N or horovodrun -np N, or leave strategy out."
        )
    if name == "horovod":
        from distfit.backends.horovod import missing

        reason = missing()
        if reason is not None:
            raise InputError(
                f"This job needs Horovod ({topology.size} ranks were started) and Horovod cannot be imported "
                f"({reason}). Type: distfit horovod install, in the environment of {_python()}; `distfit doctor` shows "
                "what is in the way."
            )
    elif topology.size > 1:
        raise InputError(
            f"Expected strategy 'auto' or 'horovod' in a job of several ranks, received {name!r} and "
            f"{topology.size} ranks: each would train a model of its own. Start one process, or leave strategy out."
        )


def _check_devices(name: str, devices: int | None) -> None:
    if name == "single" and devices not in (None, 1):
        raise InputError(
            f"Expected one device for strategy 'single', received devices={devices}. Leave strategy out, or "
            "take 'mirrored'."
        )


def _python() -> str:
    import sys

    return sys.executable
