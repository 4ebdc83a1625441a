"""How far a long count is: one redrawn line on a terminal, a line every ten seconds elsewhere.

    with shown("Checking", 30_607, "images") as done:
        for image in images:
            check(image)
            done()

It is written to standard error, as standard output is for results.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TextIO

from distfit.monitor.progress import format_seconds, joined

_PLAIN_LINE_S = 10.0

# From a title, a total and the name of what is counted to a block within which each call counts one.
Counting = Callable[[str, int, str], AbstractContextManager[Callable[[], None]]]


def silent(title: str, total: int, unit: str) -> AbstractContextManager[Callable[[], None]]:
    """Counts without a word."""
    return nullcontext(lambda: None)


def shown(title: str, total: int, unit: str) -> AbstractContextManager[Callable[[], None]]:
    """Counts for whoever watches standard error."""
    return _on_terminal(title, total, unit) if sys.stderr.isatty() else in_lines(title, total, unit, sys.stderr)


@contextmanager
def in_lines(
    title: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Plain lines: none when it is over within ten seconds.

    Args:
        title: what is being done, such as "Checking".
        total: how many there are.
        unit: what is counted, such as "images".
        stream: where the lines go.
        clock: seconds, steady; a test gives its own.
    """
    start = spoke = clock()
    count = 0

    def done() -> None:
        nonlocal count, spoke
        count += 1
        now = clock()
        if now - spoke >= _PLAIN_LINE_S:
            spoke = now
            left = (now - start) / count * (total - count)
            print(
                joined(f"{title} {count:,}/{total:,} {unit}", f"left {format_seconds(left)}"), file=stream, flush=True
            )

    yield done


@contextmanager
def _on_terminal(title: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
