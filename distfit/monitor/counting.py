"""How far a long count is: one redrawn line on a terminal, a line every ten seconds elsewhere.

    with shown("Checking", 30_607, "images") as done:
        for image in images:
            check(image)
            done()

It is written to standard error, as standard output is for results.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TextIO

from distfit.monitor.progress import format_seconds, joined

_PLAIN_LINE_S = 10.0


class Done(Protocol):
    """Counts one, of so many bytes where that is worth showing; from any thread."""

    def __call__(self, size: int = 0) -> None: ...


# From a title, a total and the name of what is counted to a block within which each call counts one.
Counting = Callable[[str, int, str], AbstractContextManager[Done]]


def silent(title: str, total: int, unit: str) -> AbstractContextManager[Done]:
    """Counts without a word."""
    return nullcontext(lambda size=0: None)


def shown(title: str, total: int, unit: str) -> AbstractContextManager[Done]:
    """Counts for whoever watches standard error."""
    return _on_terminal(title, total, unit) if sys.stderr.isatty() else in_lines(title, total, unit, sys.stderr)


@contextmanager
def in_lines(
    title: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
) -> Iterator[Done]:
    """Plain lines: none when it is over within ten seconds.

    Args:
        title: what is being done, such as "Checking".
        total: how many there are.
        unit: what is counted, such as "images".
        stream: where the lines go.
        clock: seconds, steady; a test gives its own.
    """
    start = spoke = clock()
    count = bytes_done = 0
    lock = threading.Lock()

    def done(size: int = 0) -> None:
        nonlocal count, bytes_done, spoke
        with lock:
            count, bytes_done = count + 1, bytes_done + size
            now = clock()
            if now - spoke >= _PLAIN_LINE_S:
                spoke = now
                left = (now - start) / count * (total - count)
                speed = rates(count / (now - start), bytes_done / (now - start), unit)
                line = joined(f"{title} {count:,}/{total:,} {unit}", speed, f"left {format_seconds(left)}")
                print(line, file=stream, flush=True)

    yield done


def rates(count_s: float, bytes_s: float, unit: str) -> str:
    """How fast, where it is of use.

    >>> rates(2134.2, 56e6, "images"), rates(0.31, 0, "files")
    ('2,134 images/s, 56.0 MB/s', '0.3 files/s')
    """
    count = f"{count_s:,.{0 if count_s >= 10 else 1}f} {unit}/s"
    return f"{count}, {bytes_s / 1e6:.1f} MB/s" if bytes_s else count


@contextmanager
def _on_terminal(title: str, total: int, unit: str) -> Iterator[Done]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rates(ProgressColumn):
        max_refresh = 0.5  # seconds, as a number that changes faster cannot be read

        def render(self, task: Any) -> Text:
            seconds = task.finished_time or task.elapsed or 0
            count_s = task.completed / seconds if seconds else 0.0
            return Text(rates(count_s, count_s * task.fields["size"] / max(1, task.completed), unit))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rates())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    lock, bytes_done = threading.Lock(), 0

    def done(size: int = 0) -> None:
        nonlocal bytes_done
        with lock:
            bytes_done += size
            bar.update(task, advance=1, size=bytes_done)

    with bar:
        task = bar.add_task(title, total=total, size=0)
        yield done
