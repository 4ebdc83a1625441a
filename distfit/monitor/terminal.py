"""Whether a line may be redrawn where the output of this process ends.

live = live_here(session.size, os.environ)      # for make_progress
columns_of(sys.stdout, os.environ)              # what `distfit launch` tells its ranks
"""

import os
import shutil
import stat
from collections.abc import Mapping
from typing import TextIO

from distfit.errors import InputError

# Set by `distfit launch` for its ranks: the columns of the terminal that their standard output ends at.
TERMINAL = "DISTFIT_TERMINAL"


def live_here(size: int, environment: Mapping[str, str]) -> bool | int:
    """Whether a line may be redrawn, as `make_progress` takes it.

    One process sees by its stream whether that is a terminal. Ranks do not: Open MPI gives each a terminal of its own,
    whose other end may be a file, and others give pipes, whose end may be a terminal. `distfit launch` tells them.

    Args:
        size: ranks of the job.
        environment: of this process.

    Raises:
        InputError: what it says of a terminal is no number.

    >>> live_here(1, {}), live_here(2, {}), live_here(2, {"DISTFIT_TERMINAL": "120"})
    (True, False, 120)
    """
    told = environment.get(TERMINAL)
    if told is None:
        return size == 1
    if not told.isdecimal() or int(told) < 1:
        raise InputError(
            f"Expected the environment variable {TERMINAL}, which distfit launch sets, to be a number of columns, "
            f"received {told!r}. Unset it."
        )
    return int(told)


def columns_of(stream: TextIO, environment: Mapping[str, str]) -> int | None:
    """The columns of the terminal that a stream is; None where it is none, or one that cannot redraw a line."""
    if not stream.isatty() or environment.get("TERM", "").lower() in ("dumb", "unknown"):
        return None
    return shutil.get_terminal_size().columns


def redraws(stream: TextIO, live: bool | int) -> bool:
    """Whether to redraw a line of this stream; `live` as `live_here` says it."""
    if live is True:
        return stream.isatty()
    return bool(live) and not _is_file(stream)  # where a rank's own shell may have sent it


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # a stream of Python's own, as in a notebook
        return False
