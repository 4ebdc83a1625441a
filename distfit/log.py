"""Who speaks: only the chief, and each warning once.

`speak_as` is called once, when the session starts; afterwards any module says what it has to say without
asking who it is.
"""

import logging
import sys
import warnings
from typing import TextIO

_logger = logging.getLogger("distfit")
_said: set[str] = set()


def speak_as(chief: bool) -> None:
    """The chief prints from INFO upwards; every other process is silent.

    To standard error; in a notebook to standard output, as Jupyter shows the other on a ground of red.

    Python's warnings of other libraries (Keras says that data ran out, say) are the same on every rank and
    are silenced on all but the chief as well.
    """
    if not chief:
        warnings.simplefilter("ignore")
    _logger.handlers.clear()
    _logger.propagate = False
    handler: logging.Handler = logging.StreamHandler(_stream()) if chief else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)


def _stream() -> TextIO:
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return sys.stdout if in_notebook else sys.stderr


def say(message: str) -> None:
    """Tell the user something, on the chief only."""
    _logger.info(message)


def warn_once(message: str) -> None:
    """Warn the user, on the chief only, once in this process however often it is called."""
    if message not in _said:
        _said.add(message)
        _logger.warning("distfit: warning: %s", message)
