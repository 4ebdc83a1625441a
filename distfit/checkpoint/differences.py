"""How two checkpoints differ: the fields of their facts, and the numbers of their tensors.

found = differences(one, other)         # two `Stored`, of one run or of two
found.equal                             # to the bit, and every field
print(differences_text(found, "runs/a@120", "runs/b@120"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from distfit.checkpoint.statistics import Difference, difference_of
from distfit.data.inspect.text import aligned

# Longer lists are cut; JSON and --all have them whole.
MOST = 20
_WIDEST = 40
# Of the file, not of the training.
_NOT_COMPARED = ("time",)
_ABSENT = "-"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Field:
    """A fact that is not the same in both.

    Args:
        name: dotted, such as "run.ranks".
        one: the first checkpoint's value as JSON; None where it has none.
        other: the second's.
    """

    name: str
    one: str | None
    other: str | None


@dataclass(frozen=True)
class Tensor:
    """A tensor whose type, shape or numbers are not the same in both.

    Args:
        name: in the first checkpoint.
        one: its type and shape; None where it has no such tensor.
        other: the second's.
        difference: of the numbers, where type and shape are the same.
    """

    name: str
    one: str | None
    other: str | None
    difference: Difference | None = None


@dataclass(frozen=True)
class Differences:
    """All that differs, and how much was compared.

    Args:
        fields: that differ.
        tensors: that differ.
        compared_fields: how many there are in either.
        compared_tensors: how many there are in either.
        numbers: of the tensors that both have.
    """

    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]
    compared_fields: int
    compared_tensors: int
    numbers: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.fields and not self.tensors


def differences(
    one_facts: Mapping[str, Any],
    one_tensors: Mapping[str, np.ndarray],
    other_facts: Mapping[str, Any],
    other_tensors: Mapping[str, np.ndarray],
) -> Differences:
    """Compares every field and every number.

    A tensor's name ends with the path that Keras gave its variable, which counts on in a process that has built other
    models (`dense_1`). Where names differ, tensors of the same kind and number are compared.

    Args:
        one_facts: of the first checkpoint.
        one_tensors: by name.
        other_facts: of the second.
        other_tensors: by name.
    """
    fields = list(_paired(_flat(_compared_facts(one_facts)), _flat(_compared_facts(other_facts))))
    tensors = list(_paired_tensors(one_tensors, other_tensors))
    compared = [_compared(name, ours, theirs) for name, ours, theirs in tensors]
    return Differences(
        fields=tuple(Field(name, ours, theirs) for name, ours, theirs in fields if ours != theirs),
        tensors=tuple(found for found in compared if found is not None),
        compared_fields=len(fields),
        compared_tensors=len(tensors),
        numbers=sum(ours.size for _, ours, theirs in tensors if ours is not None and theirs is not None),
    )


def differences_text(found: Differences, one: str, other: str, most: int | None = MOST) -> str:
    """What `distfit checkpoint diff` prints.

    Args:
        found: of it.
        one: what the first is called.
        other: what the second is called.
        most: lines of each table; None for all.
    """
    counts = f"{found.compared_fields:,} fields and {found.compared_tensors:,} tensors of {found.numbers:,} numbers"
    if found.equal:
        return f"{one} and {other} are equal to the bit: {counts}"
    fields = [(field.name, _short(field.one), _short(field.other)) for field in found.fields]
    tensors = [_tensor_row(tensor) for tensor in found.tensors]
    return "\n".join(
        [
            f"{one} and {other} differ",
            *_table(f"{len(fields):,} of {found.compared_fields:,} fields", ("field", one, other), fields, most),
            *_table(
                f"{len(tensors):,} of {found.compared_tensors:,} tensors",
                ("tensor", "numbers", "differ", "at most", "relative", ""),
                tensors,
                most,
            ),
        ]
    )


def _compared_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _NOT_COMPARED}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Dotted names and JSON; a text that is a JSON object, as the description of a model, is looked into.

    >>> _flat({"run": {"ranks": 2}, "model": '{"units": 3}', "shape": [1, 2], "of": {"$dict": [[7, None]]}})
    {'run.ranks': '2', 'model.units': '3', 'shape': '[1, 2]', 'of.7': 'null'}
    """
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return {name: json.dumps(value)}
    nested: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping) and list(value) == ["$dict"]:  # of checkpoint/plain.py: pairs, for any kind of key
        nested = iter(value["$dict"])
    elif isinstance(value, Mapping):
        nested = iter(value.items())
    elif isinstance(value, list) and any(isinstance(one, (Mapping, list)) for one in value):
        nested = iter(enumerate(value))
    else:
        return {name: json.dumps(value)}
    found: dict[str, str] = {}
    for key, inner in nested:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _paired(
    ours: Mapping[str, _Value], theirs: Mapping[str, _Value]
) -> Iterator[tuple[str, _Value | None, _Value | None]]:
    """The names of both, in the order of the first, with both values."""
    return ((name, ours.get(name), theirs.get(name)) for name in {**ours, **theirs})


def _paired_tensors(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]:
    by_number = {_number_of(name): name for name in theirs if name not in ours}
    alike = {by_number.get(_number_of(name)): name for name in ours if name not in theirs}
    return _paired(ours, {alike.get(name, name): tensor for name, tensor in theirs.items()})


def _number_of(name: str) -> str:
    """
    >>> _number_of("weight/00003/sequential_1/dense_4/kernel"), _number_of("whole/metric/00007/mean/total")
    ('weight/00003', 'whole/metric/00007')
    """
    found = re.match(r".*?/\d+(?=/|$)", name)
    return found[0] if found else name


def _compared(name: str, ours: np.ndarray | None, theirs: np.ndarray | None) -> Tensor | None:
    """What differs in a tensor; None where nothing does."""
    if ours is None or theirs is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return Tensor(name, _kind(ours), _kind(theirs))
    difference = difference_of(ours, theirs)
    return Tensor(name, _kind(ours), _kind(theirs), difference) if difference.bits else None


def _kind(tensor: np.ndarray | None) -> str | None:
    return None if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _tensor_row(tensor: Tensor) -> tuple[str, ...]:
    found = tensor.difference
    if found is None:
        return tensor.name, "", "", "", "", f"{tensor.one or 'absent'} and {tensor.other or 'absent'}"
    finite = f"{found.finite_in_one:,} not finite" if found.finite_in_one else ""
    return tensor.name, f"{found.count:,}", f"{found.bits:,}", f"{found.absolute:.3g}", f"{found.relative:.3g}", finite


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], most: int | None) -> list[str]:
    if not rows:
        return []
    shown = rows if most is None else rows[:most]
    more = [f"    and {len(rows) - len(shown):,} more; --all lists them"] if len(shown) < len(rows) else []
    return [f"  {title} differ", *aligned([heads, *shown]), *more]


def _short(value: str | None) -> str:
    if value is None:
        return _ABSENT
    return value if len(value) <= _WIDEST else f"{value[: _WIDEST - 3]}..."
