"""All of one checkpoint: `distfit checkpoint show`.

    print(contents_text(contents(Checkpoints("runs/a").read(120)), now=time.time()))

Facts come from a file of somebody: what of them is not there is left out, and nothing in them steers a terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distfit.checkpoint.folder import Stored
from distfit.checkpoint.plain import unpacked
from distfit.checkpoint.pruning import folder_size
from distfit.checkpoint.statistics import Numbers, numbers_of
from distfit.checkpoint.tables import place_text, when
from distfit.data.build.whole_folder import format_bytes
from distfit.data.inspect.text import aligned
from distfit.errors import InputError

# Longer values of facts are cut; JSON has them whole.
_WIDEST = 60
# Facts that are shown in another form, or say nothing to people; JSON has them.
_ELSEWHERE = ("place", "model", "variables", "time", "moment")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    numbers: Numbers


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint.

    Args:
        folder: its path.
        step: batches that the run had trained.
        written: seconds since 1970.
        size: bytes of its files.
        facts: as they were saved.
        said: the same, in words and cut: names and values of each section, "" for what is in none.
        tensors: by name.
    """

    folder: str
    step: int
    written: float
    size: int
    facts: Mapping[str, Any]
    said: Mapping[str, Mapping[str, str]]
    tensors: tuple[Tensor, ...]


def contents(stored: Stored) -> Contents:
    """All that is in a checkpoint, and what its numbers are."""
    tensors = [
        Tensor(name, str(tensor.dtype), tensor.shape, tensor.nbytes, numbers_of(tensor))
        for name, tensor in sorted(
            stored.tensors.items(), key=lambda item: (not item[0].startswith("weight/"), item[0])
        )
    ]
    return Contents(
        folder=str(stored.path),
        step=stored.step,
        written=stored.manifest.created,
        size=folder_size(stored.path),
        facts=stored.facts,
        said=_said(stored.facts, stored.tensors),
        tensors=tuple(tensors),
    )


def contents_text(contents: Contents, now: float) -> str:
    """What `distfit checkpoint show` prints.

    Args:
        contents: of a checkpoint.
        now: seconds since 1970.
    """
    model = contents.facts.get("model")
    head = [
        ("place", place_text(contents.facts.get("place") or {}) or "not known"),
        ("written", f"{when(contents.written, now)}, {format_bytes(contents.size)}"),
        ("model", f"described in {format_bytes(len(json.dumps(model)))}" if model else "not described: it needs code"),
        *contents.said[""].items(),
    ]
    parts = [[f"{contents.folder}: step {contents.step:,}", *aligned(head, "  ")]]
    parts += [
        [*aligned([(name,)], ""), *aligned(list(rows.items()), "  ")] for name, rows in contents.said.items() if name
    ]
    return "\n\n".join("\n".join(part) for part in [*parts, _tensor_table(contents.tensors)])


def words(value: Any) -> str:
    """
    >>> words({"best": 0.25, "wait": 2, "weights": [np.zeros((2, 3))]})
    'best 0.25, wait 2, weights [float64[2, 3]]'
    """
    if isinstance(value, Mapping):
        inner = {key: words(one) if not isinstance(one, Mapping) else f"({words(one)})" for key, one in value.items()}
        return ", ".join(f"{key} {text}" for key, text in inner.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(words, value))}]"
    if isinstance(value, np.ndarray) and value.shape:
        return f"{value.dtype}{list(value.shape)}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _said(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Facts in words, by section."""
    said: dict[str, dict[str, str]] = {"": {}}
    for name, packed in facts.items():
        value = _unpacked(name, packed, tensors)
        if name in _ELSEWHERE or (isinstance(value, Mapping) and not value):
            continue
        if isinstance(value, Mapping):
            said[name] = {str(key): _short(words(inner)) for key, inner in value.items() if not _of_layer(str(key))}
            if left := len(value) - len(said[name]):
                said[name]["layers"] = f"{left:,} settings; --json has them"
        else:
            said[""][name] = _short(words(value))
    return said


def _of_layer(field: str) -> bool:
    """One of the settings of a layer (checkpoint/fields.py), of which a deep model has thousands."""
    return re.match(r"layer \d+(:|$)", field) is not None


def _unpacked(name: str, packed: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """The states of callbacks and streams are packed, with their arrays among the tensors (checkpoint/facts.py)."""
    prefix = f"{name}/"
    arrays = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    try:
        return unpacked(packed, arrays)
    except InputError:  # of somebody else: shown as it is
        return packed


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _tensor_table(tensors: Sequence[Tensor]) -> list[str]:
    count = sum(tensor.numbers.count for tensor in tensors)
    size = format_bytes(sum(tensor.size for tensor in tensors))
    heads = ("name", "type", "shape", "bytes", "least", "mean", "most", "norm", "")
    title = f"{len(tensors):,} tensors of {count:,} numbers, {size}"
    return [title, *aligned([heads, *map(_tensor_row, tensors)], "  ")]


def _tensor_row(tensor: Tensor) -> tuple[str, ...]:
    found = tensor.numbers
    values = ["" if value is None else f"{value:.4g}" for value in (found.least, found.mean, found.most, found.norm)]
    notes = [f"{count:,} {name}" for count, name in ((found.nan, "nan"), (found.infinite, "infinite")) if count]
    return tensor.name, tensor.dtype, str(list(tensor.shape)), f"{tensor.size:,}", *values, ", ".join(notes)
