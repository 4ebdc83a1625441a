"""The last file that is written of a checkpoint, and the first that is read: what the others have to be."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distfit.checkpoint.tensors import BAD_JSON, FileFact, Unreadable

FORMAT = 1
TENSORS, FACTS, MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"
# Of any manifest: what is longer is none.
MOST_BYTES = 2**20
# Of everything else that it says.
_OWN = "sha256"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def number(value: float) -> float | str:
    """As JSON holds it: strictly, it has no word for what is not finite. `float` takes both.

    >>> number(0.5), number(float("nan")), float(number(float("-inf")))
    (0.5, 'nan', -inf)
    """
    return value if math.isfinite(value) else str(value)


class NewerFormat(Unreadable):
    """A later version of distfit wrote it."""


@dataclass(frozen=True)
class Manifest:
    """
    Args:
        step: of the run.
        files: what each has to be, by name.
        created: seconds since 1970.
        metrics: global ones of the epoch that ended there; none within an epoch.
        nan: whether a tensor holds NaN or infinity.
        written_by: version of distfit.
    """

    step: int
    files: Mapping[str, FileFact]
    created: float
    metrics: Mapping[str, float]
    nan: bool
    written_by: str
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files that it names."""
        return sum(fact.size for fact in self.files.values())

    @classmethod
    def of(cls, step: int, files: Mapping[str, FileFact], facts: Mapping[str, Any]) -> Manifest:
        """Of a checkpoint that is being written, with what `facts` say of it."""
        versions = facts.get("versions") or {}
        return cls(
            step,
            dict(files),
            float(facts.get("time") or time.time()),
            {name: float(value) for name, value in (facts.get("metrics") or {}).items()},
            bool(facts.get("nan")),
            str(versions.get("distfit", "")),
        )

    def to_json(self) -> bytes:
        content = {**asdict(self), "metrics": {name: number(value) for name, value in self.metrics.items()}}
        return json.dumps({**content, _OWN: _digest(content)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes, step: int) -> Manifest:
        """
        Args:
            step: that it has to be of.

        Raises:
            Unreadable: it is none, of a newer format, or of another step.
        """
        try:
            found = json.loads(text)
            _check_format(found)
            files = {str(name): _fact(fact) for name, fact in found["files"].items()}
            metrics = {str(name): float(value) for name, value in found["metrics"].items()}
            own = cls(
                _whole(found["step"]),
                files,
                _time(found["created"]),
                metrics,
                bool(found["nan"]),
                str(found["written_by"]),
            )
        except Unreadable:
            raise
        except BAD_JSON as error:
            raise Unreadable(f"it cannot be read: {error!r}") from error
        if set(own.files) != {TENSORS, FACTS}:
            raise Unreadable(f"it names the files {sorted(own.files)} instead of {FACTS} and {TENSORS}")
        if own.step != step:
            raise Unreadable(f"it is of step {own.step}")
        return own


def _digest(content: Mapping[str, Any]) -> str:
    """Of what a manifest says, however it is laid out: of a later format, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_format(found: Any) -> None:
    """What is there besides may be of a later version that still has this format: it is left alone."""
    if not isinstance(found, dict) or found.pop(_OWN, None) != _digest(found):
        raise Unreadable("its own checksum is not there or is another one: its content has changed")
    if type(found.get("format")) is not int:
        raise Unreadable("it names no format")
    if found["format"] > FORMAT:
        raise NewerFormat(
            f"it has format {found['format']}, which distfit {found.get('written_by', 'of a later version')!s} wrote; "
            f"this one reads {FORMAT}: install that version"
        )


def _fact(fact: Mapping[str, Any]) -> FileFact:
    if not _SHA256.fullmatch(fact["sha256"]):
        raise ValueError(f"{fact['sha256']!r} is no SHA-256")
    return FileFact(_whole(fact["size"]), fact["sha256"])


def _time(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return int(value)
