"""Files that Keras downloads, such as pretrained weights: whole ones, also when several ranks want the same.

`keras.utils.get_file` writes into the final name, and takes a file of that name for complete: a second rank
that comes while the first one is downloading loads half a file. Here each download gets its final name when it
has ended, and ranks that all download the same are told how to do it once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keras.src.utils import file_utils

from distfit.log import warn_once


@contextmanager
def whole(one_at_a_time: Callable[[], bool]) -> Iterator[None]:
    """Inside, what Keras downloads appears under its name when it is complete.

    Args:
        one_at_a_time: whether this process downloads while no other does; else the user is told how.
    """
    original = file_utils.urlretrieve

    def urlretrieve(origin: str, target: str, *more: Any, **options: Any) -> Any:
        if not one_at_a_time():
            warn_once(
                f"every rank downloads {origin} for itself. Let the chief do it and the others find it: put the lines "
                "that download into `with distfit.init().chief_first():`, or pass distfit.fit a function that builds "
                "the model."
            )
        # Hosts may share the folder, and processes of two hosts a number.
        partial = f"{target}.{socket.gethostname()}-{os.getpid()}.partial"
        try:
            retrieved = original(origin, partial, *more, **options)
            os.replace(partial, target)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
        return target, retrieved[1]

    file_utils.urlretrieve = urlretrieve
    try:
        yield
    finally:
        file_utils.urlretrieve = original
