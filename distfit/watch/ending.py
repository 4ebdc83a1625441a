"""How a process of a failed job ends: what it has to say, its buffers flushed, then out, whatever hangs.

`os._exit` and not `sys.exit`: the main thread may be inside a collective that never returns, and the exit
handlers of MPI and Horovod wait for ranks that are gone.
"""

import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

from distfit.watch.stacks import WATCH_THREAD

# A pipe that nobody reads blocks a writer for ever; the end must not wait for it.
_FLUSH_LIMIT_S = 2.0


def leave(code: int, text: str = "") -> NoReturn:
    """Say `text`, flush, and end this process with `code`; takes two seconds at most."""
    try:
        speak(text)
    finally:
        os._exit(code)


def speak(text: str) -> None:
    """Flush what the script printed, then print `text` to standard error; waits two seconds at most."""
    speaker = threading.Thread(target=_speak, args=(text,), name=WATCH_THREAD, daemon=True)
    try:
        speaker.start()
    except RuntimeError:
        # From 3.12 on an interpreter that is shutting down starts no threads; nobody else writes then.
        _speak(text)
    else:
        speaker.join(_FLUSH_LIMIT_S)


def _speak(text: str) -> None:
    # A closed or broken stream leaves nobody to tell; the exit code still says it.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        _end_progress_line(sys.stdout)
    with contextlib.suppress(OSError, ValueError):
        stream = _behind_progress(sys.stderr)
        stream.write(text.rstrip("\n") + "\n" if text else "")
        stream.flush()


def _behind_progress(stream: Any) -> Any:
    """The stream itself: while rich draws a progress line, it would wrap a report to the width of the terminal
    and print it on standard output."""
    return getattr(stream, "rich_proxied_file", stream)


def _end_progress_line(stream: Any) -> None:
    screen = _behind_progress(stream)
    if screen is not stream:
        screen.write("\n")
        screen.flush()
