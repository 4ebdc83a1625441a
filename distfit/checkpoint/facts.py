"""What a checkpoint says beside its tensors, as JSON holds it.

facts = Facts.of(now, place, parts={"callbacks": states, ...}, ...)
facts.saved(logs), facts.tensors           # to be published
Facts(saved).part("callbacks", tensors)    # and back
"""

from __future__ import annotations

import hashlib
import json
import numbers
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distfit.checkpoint.manifest import number
from distfit.checkpoint.place import Place
from distfit.checkpoint.plain import packed, unpacked
from distfit.errors import InputError
from distfit.meeting import installed

_VERSIONS = ("distfit", "tensorflow", "keras", "numpy")


class Facts:
    """
    Args:
        saved: as JSON gives them.

    Attributes:
        tensors: arrays among them, by the names that they have in the checkpoint; of facts that are made here.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._saved = dict(saved)
        self.tensors: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, now: Mapping[str, Any], place: Place, parts: Mapping[str, Any], **more: Any) -> Facts:
        """Those of a moment.

        Args:
            now: of the run.
            parts: values that `plain.packed` takes, arrays among them.
            more: as JSON takes it.
        """
        versions = {name: installed(name) for name in _VERSIONS}
        facts = cls({**now, **more, "hash": _hash(now), "place": place.plain(), "versions": versions})
        for name, value in parts.items():
            plain, arrays = packed(value)
            facts._saved[name] = plain
            facts.tensors.update({f"{name}/{key}": array for key, array in arrays.items()})
        return facts

    def saved(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """To be published.

        Args:
            logs: of the epoch that has just ended; none within one.
        """
        found = {name: number(number_of(logs, name)) for name in logs if _is_number(logs[name])}
        return {**self._saved, "metrics": found, "time": time.time()}

    def part(self, name: str, tensors: Mapping[str, np.ndarray] | None) -> Any:
        """One of the `parts`, from the facts and the tensors of a checkpoint."""
        prefix = f"{name}/"
        arrays = {key.removeprefix(prefix): array for key, array in (tensors or {}).items() if key.startswith(prefix)}
        return unpacked(self._saved[name], arrays)

    @property
    def seed(self) -> int:
        return int(self._saved["run"]["seed"])

    @property
    def fields(self) -> Mapping[str, str]:
        return self._saved["fields"]

    @property
    def variables(self) -> Sequence[Mapping[str, Any]]:
        return self._saved["variables"]

    @property
    def place(self) -> Place:
        return Place(**self._saved["place"])

    @property
    def began(self) -> int:
        """The epoch that the run began with."""
        return int(self._saved["began"])

    @property
    def ranks(self) -> int:
        return int(self._saved["run"]["ranks"])

    @property
    def replicas(self) -> int:
        return int(self._saved["run"]["replicas"])

    @property
    def fingerprint(self) -> int | None:
        """Of the last batch that was trained on, where the data have to be passed over again."""
        return self._saved["fingerprint"]

    @property
    def best(self) -> float | None:
        best = self._saved["best"]
        return None if best is None else float(best)

    @property
    def best_by(self) -> Sequence[str] | None:
        """Of which metric, and "min" or "max" of it."""
        return self._saved["best_by"]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the epoch that had just ended."""
        return {name: float(value) for name, value in self._saved["metrics"].items()}

    @property
    def finished(self) -> bool:
        """Whether its last epoch had ended."""
        return bool(self._saved["finished"])

    @property
    def stop_training(self) -> bool:
        return bool(self._saved["stop_training"])


def described(model: Any) -> str | None:
    """The model's layers as Keras writes them, without code: None where it has functions of a user's in it, or cannot
    be described."""
    try:
        with warnings.catch_warnings(action="ignore"):
            text = model.to_json()
    except Exception:  # a user's class without get_config: `distfit checkpoint export` asks for the function then
        return None
    return None if "__lambda__" in text else text


def _hash(now: Mapping[str, Any]) -> str:
    """Of what has to be the same, so that two runs can be told apart at a glance."""
    return hashlib.sha256(json.dumps(now.get("fields"), sort_keys=True).encode()).hexdigest()[:16]


def number_of(logs: Mapping[str, Any], name: str) -> float:
    """A metric of an epoch's logs.

    Raises:
        InputError: there is none of that name, or it is no number.
    """
    if name not in logs or not _is_number(logs[name]):
        raise InputError(f"Expected a metric of the name {name!r} to keep the best by, received {', '.join(logs)}.")
    return float(logs[name])


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (hasattr(value, "shape") and tuple(value.shape) == ())
