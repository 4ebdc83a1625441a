"""Random streams of the host that scripts and their callbacks draw from: Python's and NumPy's global ones.

    state = host_streams()                # plain values, see checkpoint/plain.py
    restore_host_streams(state)

Keras' streams are variables and saved as such (checkpoint/state.py). TensorFlow's own stateful ops in a step
(`tf.random.uniform` and the like, without Keras) keep their place in kernels of the runtime, where nobody can read it:
they draw other numbers after a resume. `keras.random` with a `keras.random.SeedGenerator` goes on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from distfit.errors import InputError


def host_streams() -> dict[str, Any]:
    """Where the streams are: {"python": ..., "numpy": ...}."""
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}


def of_numpy(state: Any) -> Any:
    """A state for a generator of NumPy, which reads memory wherever an MT19937 says that it is.

    Raises:
        ValueError: it is none.

    >>> of_numpy({"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 10**6}})
    Traceback (most recent call last):
    ValueError: Expected an MT19937 within its 624 words, received position 1000000.
    """
    if isinstance(state, Mapping) and state.get("bit_generator") == "MT19937":
        key, position = np.asarray(state["state"]["key"]), int(state["state"]["pos"])
        if key.shape != (624,) or not 0 <= position <= 624:
            raise ValueError(f"Expected an MT19937 within its 624 words, received position {position}.")
    elif isinstance(state, (list, tuple)):
        raise ValueError("Expected the state of a generator as a mapping, received a tuple of NumPy's older form.")
    return state


def restore_host_streams(state: Any) -> None:
    """Go on where they were, both or none.

    Args:
        state: of `host_streams`.

    Raises:
        InputError: it is no such state.

    >>> state = host_streams()
    >>> drawn = random.random(), np.random.rand()
    >>> restore_host_streams(state)
    >>> drawn == (random.random(), np.random.rand())
    True
    """
    before = host_streams()
    try:
        random.setstate(state["python"])
        np.random.set_state(of_numpy(state["numpy"]))
    except (TypeError, ValueError, KeyError, OverflowError, IndexError) as error:
        random.setstate(before["python"])
        raise InputError(
            "Expected the states of Python's and NumPy's random streams in the checkpoint, received something else "
            f"({error}). It was written by another version of Python or NumPy, or for another bit generator of NumPy; "
            "resume with those of the run before."
        ) from error
