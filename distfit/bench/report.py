"""Tables of a benchmark's results: in plain text for a terminal, in Markdown for a page. Pure.

print(text(results))
markdown_ratios(results.rates), markdown_rates(results.rates)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from distfit.bench.targets import Ratio, ratios

Row = Sequence[str]
_RATIO_HEADS = ("images", "cores", "ratio", "", "rounds", "at least", "")


def text(rates: Mapping[str, Any], machine: Mapping[str, str]) -> str:
    """Rates, ratios, and which targets were missed."""
    found = list(ratios(rates))
    parts = [
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        _columns([("images", "cores", "way", "images/s"), *_rate_rows(rates)]),
        _columns([_RATIO_HEADS, *map(_ratio_row, found)]),
        summary(found),
    ]
    return "\n\n".join(parts)


def summary(found: Sequence[Ratio]) -> str:
    """One sentence, and a line for each target that was missed somewhere."""
    missed: dict[tuple[str, float], list[str]] = {}
    for ratio in found:
        if not ratio.reached:
            where = f"{ratio.value:.2f} ({ratio.kind}, {_cores(ratio.cores)})"
            missed.setdefault((ratio.name, ratio.least), []).append(where)
    reached = sum(ratio.reached for ratio in found)
    lines = [f"Missed: {name}, at least {least:.2f}: {', '.join(where)}." for (name, least), where in missed.items()]
    return "\n".join([f"{reached} of {len(found)} ratios are as they should be.", *lines])


def markdown_ratios(rates: Mapping[str, Any]) -> str:
    """A row a ratio, a column for each kind of image and number of cores."""
    found = list(ratios(rates))
    columns = list(dict.fromkeys((ratio.kind, ratio.cores) for ratio in found))
    rows = []
    for name, least in dict.fromkeys((ratio.name, ratio.least) for ratio in found):
        cells = {(ratio.kind, ratio.cores): _cell(ratio) for ratio in found if ratio.name == name}
        rows.append((name, f"{least:.2f}", *(cells.get(column, "") for column in columns)))
    heads = [f"{kind}, {_cores(cores)}" for kind, cores in columns]
    return _markdown([("ratio", "at least", *heads), *rows])


def markdown_rates(rates: Mapping[str, Any]) -> str:
    """Images/s: a row a way, a column for each kind of image and number of cores."""
    columns = {(kind, cores): ways for kind, by_cores in rates.items() for cores, ways in by_cores.items()}
    names = dict.fromkeys(way for ways in columns.values() for way in ways)
    rows = [(f"`{name}`", *(_speed(ways[name]) if name in ways else "" for ways in columns.values())) for name in names]
    return _markdown([("way", *(f"{kind}, {_cores(cores)}" for kind, cores in columns)), *rows])


def _rate_rows(rates: Mapping[str, Any]) -> list[Row]:
    return [
        (kind, cores, way, _speed(values))
        for kind, by_cores in rates.items()
        for cores, by_way in by_cores.items()
        for way, values in by_way.items()
    ]


def _ratio_row(ratio: Ratio) -> Row:
    spread = f"{ratio.low:.2f}-{ratio.high:.2f}"
    verdict = "" if ratio.reached else "MISSED"
    return ratio.kind, ratio.cores, ratio.name, f"{ratio.value:.2f}", spread, f"{ratio.least:.2f}", verdict


def _cell(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}" if ratio.reached else f"**{ratio.value:.2f}**"


def _speed(values: Sequence[float]) -> str:
    return f"{median(values):,.0f}" if median(values) >= 100 else f"{median(values):.1f}"


def _cores(number: str) -> str:
    return "1 core" if number == "1" else f"{number} cores"


def _columns(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _markdown(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
