"""What to say when a device has no memory left, or a disk no room: what was held, and what to lower."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tensorflow as tf

from distfit.errors import RunError

if TYPE_CHECKING:
    from distfit.session import Session

_MOST_WORDS = 200
# Limits of the operating system for which TensorFlow raises the same error as for a device's memory.
_SYSTEM_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


@contextmanager
def explained(session: Session, batch_size: int | None) -> Iterator[None]:
    """Around what fills the devices' memory.

    Args:
        session: this process in its job.
        batch_size: rows of the global batch; None when unknown.

    Raises:
        RunError: TensorFlow ran out of memory, with the rows of a replica and the remedies; or out of room or
            files, as a callback of TensorBoard does on a full disk.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        message = str(error.message)
        memory = out_of_memory(message, session.backend.devices, batch_size, session.num_replicas)
        raise RunError(system_limit(message) or memory) from error


def system_limit(message: str) -> str | None:
    """What to say when it is no memory that is missing, None when it is.

    >>> print(system_limit("{{function_node __wrapped__Flush}} logs/train/a.v2; No space left on device"))
    TensorFlow could not write or open a file: logs/train/a.v2; No space left on device. Make room there, or raise \
the limit that it names (ulimit -n for open files); the run ends, as its results could not be kept.
    >>> system_limit("OOM when allocating tensor")
    """
    if not any(os.strerror(number) in message for number in _SYSTEM_LIMITS):
        return None
    said = _first_line(message.rpartition("}} ")[2])
    return (
        f"TensorFlow could not write or open a file: {said}. Make room there, or raise the limit that it names "
        "(ulimit -n for open files); the run ends, as its results could not be kept."
    )


def out_of_memory(message: str, devices: list[str], batch_size: int | None, replicas: int) -> str:
    """
    >>> print(out_of_memory("OOM when allocating tensor with shape[64,9]", ["GPU:3"], 512, 8))
    Out of memory on GPU:3: 64 rows of the batch of 512 for each of the 8 replicas were too many (OOM when \
allocating tensor with shape[64,9]). Lower batch_size (256 halves the rows of a replica; \
gradient_accumulation_steps=2 in the optimizer then keeps the size of an update), start more replicas, make the \
inputs smaller, or compute in mixed_bfloat16. nvidia-smi shows whether another process holds memory of the device.
    """
    first = _first_line(message)
    on = f"Out of memory on {', '.join(devices)}"
    if batch_size is None:
        what, less = f"the rows of a batch for each of the {replicas} replicas", "Make the batches smaller ("
    else:
        rows = -(-batch_size // replicas)
        what = f"{rows:,} rows of the batch of {batch_size:,} for each of the {replicas} replicas"
        less = f"Lower batch_size ({batch_size // 2} halves the rows of a replica; "
        if rows == 1:
            return (
                f"{on}: a single row for each of the {replicas} replicas was too much ({first}). Make the model or its "
                "inputs smaller, or compute in mixed_bfloat16. nvidia-smi shows whether another process holds memory "
                "of the device."
            )
    return (
        f"{on}: {what} were too many ({first}). {less}gradient_accumulation_steps=2 in the optimizer then keeps the "
        "size of an update), start more replicas, make the inputs smaller, or compute in mixed_bfloat16. nvidia-smi "
        "shows whether another process holds memory of the device."
    )


def _first_line(message: str) -> str:
    return " ".join(message.splitlines()[:1])[:_MOST_WORDS]
