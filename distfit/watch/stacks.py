"""Where every thread of this process is, as text: the main thread first, distfit's own helpers left out."""

import sys
import threading
import traceback
from types import FrameType

from distfit.watch.protocol import trim

WATCH_THREAD = "distfit-watch"
_HELPERS = "distfit-"


def all_stacks() -> str:
    """The stacks of all Python threads, outermost call first, as in a traceback."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    order = sorted(frames, key=lambda ident: (ident != main, names.get(ident, "")))
    shown = [ident for ident in order if not names.get(ident, "").startswith(_HELPERS)]
    return trim("\n".join(_stack(names.get(ident, "of a library"), frames[ident]) for ident in shown))


def _stack(name: str, frame: FrameType) -> str:
    return f"thread {name}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
