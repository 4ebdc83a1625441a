"""One function over many tasks in several processes, with a count of how far they are.

    results = in_processes(check_file, tasks, jobs=4, done=bar_advances)

where `check_file(task, tick)` calls `tick()` now and then, each of which is one `done()` here.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from distfit.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], None]

_TICK = None


def in_processes(
    function: Callable[[Task, Tick], Result], tasks: Sequence[Task], jobs: int, done: Tick
) -> list[Result]:
    """The results in the order of the tasks.

    Args:
        function: of a module, so that another process finds it by its name.
        tasks: each is handed to the next process that is free; they and the results are pickled.
        jobs: processes; with one, or one task, all is done in this process.
        done: called here for each tick there.

    Raises:
        RunError: a process ended before its task.
    """
    if min(jobs, len(tasks)) <= 1:
        return [function(task, done) for task in tasks]
    with _workers(function, min(jobs, len(tasks))) as workers:
        return _shared_out(tasks, workers, done)


def _shared_out(tasks: Sequence[Task], workers: Sequence[Connection], done: Tick) -> list[Any]:
    """Hands the tasks to the workers, the next to whoever is free, until all results are there."""
    results: dict[int, Any] = {}
    left = iter(range(len(tasks)))
    free = list(workers)
    busy: dict[Connection, int] = {}
    while free or busy:
        for worker, number in zip(free, left, strict=False):
            with _none_may_end():
                worker.send(tasks[number])
            busy[worker] = number
        free = []
        for worker in _ready(busy):
            with _none_may_end():
                message = worker.recv()
            if message is _TICK:
                done()
            else:
                results[busy.pop(worker)] = message[0]
                free.append(worker)
    return [results[number] for number in range(len(tasks))]


def _ready(busy: Iterable[Connection]) -> list[Connection]:
    """Those that have something to say, or have ended; waits for one."""
    waiting = list(busy)
    return [worker for worker in wait(waiting) if isinstance(worker, Connection)] if waiting else []


@contextmanager
def _none_may_end() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RunError(
            "Expected every process to end its part of the work, received the end of one before: it was killed, or "
            "its traceback is above. Look for a lack of memory (dmesg), or try --jobs 1."
        ) from error


@contextmanager
def _workers(function: Callable[[Any, Tick], Any], count: int) -> Iterator[list[Connection]]:
    """Processes that wait for tasks; they are gone when the block ends, however it does."""
    # A fork would copy the locks of whatever threads run here, such as the progress bar's.
    context = multiprocessing.get_context("spawn")
    processes, ours = [], []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            processes.append(context.Process(target=_work, args=(function, there), daemon=True))
            processes[-1].start()
            there.close()  # so that the end of the process is the end of its messages
            ours.append(here)
        yield ours
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(function: Callable[[Any, Tick], Any], tasks: Connection) -> None:
    """The life of a process: one task after the other, until it is ended or nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's matter, which ends this one
    while True:
        try:
            task = tasks.recv()
        except EOFError:
            return
        tasks.send((function(task, lambda: tasks.send(_TICK)),))
