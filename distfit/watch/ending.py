"""How a process of a failed job ends: what it has to say, its buffers flushed, then out, whatever hangs.

`os._exit` and not `sys.exit`: the main thread may be inside a collective that never returns, and the exit
handlers of MPI and Horovod wait for ranks that are gone.
"""

import contextlib
import os
import sys
import threading
from typing import NoReturn

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
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text.rstrip("\n") + "\n" if text else "")
        sys.stderr.flush()
