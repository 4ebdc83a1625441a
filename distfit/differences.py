"""Who differs from whom, and in what: a table of facts that should be the same on every rank.

table([{"keras": "3.15.1"}, {"keras": "3.15.2"}, {"keras": "3.15.2"}])
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile

# More columns do not fit on a screen, and the first few say where to look.
MOST_COLUMNS = 4
MOST_WIDTH = 40
MOST_SENT = 1000
_SHOWN_BEFORE = 10  # characters of what long values have in common
ABSENT = "-"


def table(by_rank: Sequence[Mapping[str, str]], hosts: Sequence[str] = ()) -> str:
    """The facts that are not the same everywhere, a column for each kind of rank; "" when none differs.

    Args:
        by_rank: name and value of each rank's facts, in rank order.
        hosts: where each rank is, to be shown above; none to leave them out.

    >>> print(table([{"keras": "3.15.1", "numpy": "2.4"}, {"keras": "3.15.2", "numpy": "2.4"}]))
               rank 0    rank 1
      keras    3.15.1    3.15.2
    >>> table([{"numpy": "2.4"}] * 2)
    ''
    """
    names = list(dict.fromkeys(name for facts in by_rank for name in facts))
    different = [name for name in names if len({facts.get(name) for facts in by_rank}) > 1]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for rank, facts in enumerate(by_rank):
        kinds.setdefault(tuple(facts.get(name, ABSENT) for name in different), []).append(rank)
    cells = [_cells(values) for values in zip(*kinds, strict=True)]
    shown = list(zip(kinds.values(), zip(*cells, strict=True), strict=False))[:MOST_COLUMNS]
    columns = [["", *(["host"] if hosts else []), *different]]
    columns += [[ranks_text(ranks), *_where(ranks, hosts), *values] for ranks, values in shown]
    hidden = len(kinds) - MOST_COLUMNS
    return "\n".join([*_lines(columns), *([f"  and {hidden} more kinds of ranks"] if hidden > 0 else [])])


def comparable(value: object) -> str:
    """The text that stands for a value when ranks compare it: of a long one its beginning and a digest, since every
    rank sends it to every other.

    >>> comparable("adam"), comparable(32), comparable("x" * 2000)
    ('adam', '32', 'xxxxxxxxxxxxxxxxxxxxxxx... (cefada40)')
    """
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= MOST_SENT:
        return text
    return f"{text[:23]}... ({hashlib.blake2b(text.encode(), digest_size=4).hexdigest()})"


def ranks_text(ranks: Sequence[int]) -> str:
    """
    >>> ranks_text([0]), ranks_text([1, 2, 3, 7])
    ('rank 0', 'ranks 1-3, 7')
    """
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> list[str]:
    different = list(dict.fromkeys(hosts[rank] for rank in ranks)) if hosts else []
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return [_short(different[0] + more)] if different else []


def _cells(values: Sequence[str]) -> list[str]:
    """Values of one fact, long ones from shortly before they part: a table has to show that they differ.

    >>> _cells(["/a/very/long/path/to/a/folder/of/a/run/one", "/a/very/long/path/to/a/folder/of/a/run/two"])
    ['.../of/a/run/one', '.../of/a/run/two']
    """
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*values, strict=False))
    start = len(list(alike)) - _SHOWN_BEFORE
    if start <= 0 or max(map(len, values)) <= MOST_WIDTH:
        return [_short(value) for value in values]
    return [_short(f"...{value[start:]}") for value in values]


def _short(value: str) -> str:
    return value if len(value) <= MOST_WIDTH else f"{value[: MOST_WIDTH - 3]}..."


def _lines(columns: list[list[str]]) -> list[str]:
    if len(columns) < 2:
        return []
    gap = "  "
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return [(gap + (2 * gap).join(row)).rstrip() for row in zip(*padded, strict=True)]
