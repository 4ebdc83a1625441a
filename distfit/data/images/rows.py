"""The rows of a batch by several threads.

    pixels, bad = decode_rows(images, encoded, seeds, threads=4)    # uint8 [n, h, w, c], {row: reason}

libjpeg-turbo and OpenCV let go of Python's lock, so threads decode side by side. Each takes the next row when it
has done one: rows of 12 megapixels among small ones hold up nobody. Which thread does which row changes nothing.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from distfit.data.images import memory
from distfit.data.images.draws import Seed
from distfit.data.images.formats import NotAnImage
from distfit.data.images.recipe import Images


def decode_rows(
    images: Images,
    encoded: Sequence[bytes],
    seeds: Sequence[Seed] | np.ndarray | None,
    threads: int,
    *,
    augmented: bool = True,
) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes many images.

    Args:
        images: the recipe.
        encoded: an image a row.
        seeds: uint32 [n, 2]; None where the recipe has nothing random.
        threads: that decode; the pool is made at the first call and kept.
        augmented: False leaves out what differs from epoch to epoch, for a cache.

    Returns:
        The pixels, uint8 [n, height, width, channels], and why rows are bad; a bad row is black.
    """
    pixels = memory.rows((len(encoded), *images.shape))
    bad: dict[int, str] = {}

    def do(row: int) -> None:
        seed = None if seeds is None else seeds[row]
        try:
            images.decode(encoded[row], pixels[row], seed)
            if augmented and seed is not None:
                images.augment(pixels[row], seed)
        except NotAnImage as error:
            bad[row] = str(error)
            pixels[row] = 0

    each(do, len(encoded), threads)
    return pixels, dict(sorted(bad.items()))


def augment_rows(images: Images, pixels: np.ndarray, seeds: Sequence[Seed] | np.ndarray, threads: int) -> None:
    """Augments rows that were kept, in place."""
    if images.augments:
        each(lambda row: images.augment(pixels[row], seeds[row]), len(pixels), threads)


def each(do: Callable[[int], None], rows: int, threads: int) -> None:
    """Calls `do` with every row from 0, by this thread and others of a pool; the first exception is raised.

    Args:
        threads: that work on it, this one among them. Handing rows over costs; where as many batches are in work as
            there are cores, nothing needs to be handed over.
    """
    _leave_threads_to_us()
    # `next` on a count is one step of the interpreter: no two threads get the same row.
    count = itertools.count()

    def work() -> None:
        while (row := next(count)) < rows:
            do(row)

    helpers = min(threads, rows) - 1
    waiting = [_pool(threads).submit(work) for _ in range(helpers)]
    work()
    for future in waiting:
        future.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Two batches are decoded at a time (`pipeline`); a thread that is not needed is not started.
    return ThreadPoolExecutor(2 * threads, thread_name_prefix="distfit-images")


@functools.cache
def _leave_threads_to_us() -> None:
    import cv2

    # OpenCV has one setting for the whole process. Left at its default, each resizing of more than some 300 x 300
    # pixels would start as many threads as there are cores, beside ours. Who has set it is not overruled.
    if cv2.getNumThreads() == cv2.getNumberOfCPUs():
        cv2.setNumThreads(1)


# The threads of a pool do not live on in a child.
os.register_at_fork(after_in_child=_pool.cache_clear)
