"""What must be the same for a run to go on: shown field by field where it is not, refused, or accepted by name.

now = fields_of(facts, data, others)
refuse_changes(then, now, allow=["epochs"], folder)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distfit.errors import InputError, nearest

# What may be accepted by name, and what it covers.
GROUPS = {
    "model": "layers, their settings and the policy of precision",
    "optimizer": "the optimizer and its settings",
    "compile": "loss, loss weights and metrics",
    "data": "what is trained on",
    "validation": "what is validated on",
    "seed": "the seed",
    "batch_size": "rows of a step",
    "epochs": "how many epochs",
    "callbacks": "the callbacks",
    "arguments": "other arguments of the training",
}
# What decides which records a step has.
_OF_THE_ORDER = ("data", "seed", "batch_size")
_MOST_SHOWN = 12
_MOST_WIDE = 60
_GONE = "-"


def group_of(field: str) -> str:
    """
    >>> group_of("layer 3: Dense units"), group_of("optimizer: SGD momentum"), group_of("data: records")
    ('model', 'optimizer', 'data')
    """
    head = field.partition(":")[0]
    if head in GROUPS:
        return head
    word = head.split()[0]
    return {"metric": "compile", "optimizer": "optimizer"}.get(word, "model")


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(field, what it was, what it is), in the order of the run that is there."""
    names = [*then, *(name for name in now if name not in then)]
    return [
        (name, then.get(name, _GONE), now.get(name, _GONE))
        for name in names
        if then.get(name, _GONE) != now.get(name, _GONE)
    ]


def check_allowed(allow: Sequence[str]) -> None:
    """
    Raises:
        InputError: a name that nothing has.
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise InputError(f'Expected allow to be a list of names such as ["epochs"], received {allow!r}.')
    for name in allow:
        if name not in GROUPS:
            raise InputError(
                f"Expected allow to hold names of {', '.join(GROUPS)}, received {name!r}; {nearest(name, list(GROUPS))}"
            )


def refuse_changes(
    then: Mapping[str, str], now: Mapping[str, str], allow: Sequence[str], folder: Any, within: bool = False
) -> list[str]:
    """What was accepted, as lines to say.

    Args:
        within: the run goes on within an epoch, of which the records that are left have to be known.

    Raises:
        InputError: something else has changed.
    """
    changed = differences(then, now)
    refused = [one for one in changed if group_of(one[0]) not in allow]
    if refused:
        names = sorted({group_of(field) for field, _, _ in refused}, key=list(GROUPS).index)
        raise InputError(
            f"Expected the run in {folder} to go on as it began, received:\n{_table(refused)}\n"
            f"Undo the change, accept it with allow={names!r}, choose another folder, or begin anew with resume=False "
            "(what is there is moved to a folder beside it)."
        )
    moved = [one for one in changed if within and group_of(one[0]) in _OF_THE_ORDER]
    if moved:
        raise InputError(
            f"Expected the run in {folder} to end the epoch that it was in as it began it, received:\n{_table(moved)}\n"
            "Which records of the epoch are left depends on it. Let the epoch end first, delete the checkpoints after "
            "the last one at the end of an epoch (`distfit checkpoint list`), or begin anew with resume=False."
        )
    return [f"{field}: {_short(was)} -> {_short(given)}" for field, was, given in changed]


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    shown = [("", "checkpoint", "now"), *rows[:_MOST_SHOWN]]
    texts = [tuple(map(_short, row)) for row in shown]
    widths = [max(len(row[column]) for row in texts) for column in range(2)]
    lines = [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in texts]
    more = [f"  and {len(rows) - _MOST_SHOWN} more"] if len(rows) > _MOST_SHOWN else []
    return "\n".join([*lines, *more])


def _short(text: str) -> str:
    return text if len(text) <= _MOST_WIDE else f"{text[: _MOST_WIDE - 3]}..."
