"""In front of a rank's program: a copy of all it prints, from its first word on, in a file of the rank's own.

    mpirun -np 4 python -P -m distfit.launchers.rank_log runs/logs -- python train.py

leaves runs/logs/rank-0000.log to rank-0003.log and changes nothing on the screen. `distfit launch --rank-logs
runs/logs` puts it there, under every launcher. Launchers have options of their own for it, no two alike: Open MPI 4
(`--output-filename`) and 5 (`--output dir=`) make a folder for each rank, those of srun (`--output`) and Hydra
(`-outfile-pattern`) take the output from the screen, and horovodrun has another one for each of its modes.

This process becomes the program: same process id, so that signals, exit codes and what the launcher knows of it stay as
they are. Before that it puts a second process, the copier, between the program's standard output and error and what
they were. The copier has left the launcher's session and ends when nobody can write to it any more, so what a rank had
written when it was killed is in its file.
"""

import fcntl
import os
import select
import selectors
import signal
import sys
import termios
import time
import traceback
import tty
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distfit.errors import DistfitError, InputError
from distfit.launchers.start import become
from distfit.topology import Topology, from_environment

_STANDARD = (1, 2)
_CHUNK = 1 << 16
_NO_MORE = b"distfit: warning: the file of this rank in --rank-logs takes no more; its disk may be full\n"
_ENDS_BY_ITSELF = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def wrapped(program: Sequence[str], folder: str, python: str) -> tuple[str, ...]:
    """The command of a rank with this module in front.

    >>> " ".join(wrapped(["python", "train.py"], "/runs/logs", "/env/bin/python"))
    '/env/bin/python -P -m distfit.launchers.rank_log /runs/logs -- python train.py'
    """
    return (python, "-P", "-m", "distfit.launchers.rank_log", folder, "--", *program)


def made(folder: str) -> str:
    """The folder's absolute path; it is there and can be written to.

    Raises:
        InputError: it cannot be made.
    """
    path = os.path.abspath(folder)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error.strerror) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unusable(path, "it is not writable")
    return path


def name_of(rank: int) -> str:
    """
    >>> name_of(7)
    'rank-0007.log'
    """
    return f"rank-{rank:04d}.log"


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the program behind `--`, copied to a file of the folder in front of it.

    Raises:
        DistfitError: there is no such folder or no such program.
    """
    folder, program = _parsed(arguments)
    copy_output(_opened(made(folder), from_environment(os.environ)))
    become(program, os.environ)


def _parsed(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    if len(arguments) < 3 or arguments[1] != "--":
        raise InputError(
            f"Expected a folder, -- and a program, received {' '.join(arguments) or 'nothing'}. For example: python -P "
            "-m distfit.launchers.rank_log runs/logs -- python train.py"
        )
    return arguments[0], arguments[2:]


def _opened(folder: str, place: Topology) -> int:
    """The rank's file, at its end, as that of a run that was killed is worth keeping; a line begins each run."""
    path = Path(folder) / name_of(place.rank)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    where = f"rank {place.rank} of {place.size} on host {place.host}, process {os.getpid()}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(file).st_size
        in_a_line = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, f"{chr(10) * in_a_line}=== {where}, {when}\n".encode())
    except OSError as error:
        raise _unusable(str(path), error.strerror) from error
    return file


def _unusable(path: str, why: str | None) -> InputError:
    return InputError(
        f"Expected --rank-logs to be a folder that can be made and written to, received {path}: {why}. Name another "
        "one."
    )


@dataclass
class _Way:
    """From the program to the screen.

    Args:
        end: where the copier reads.
        screen: what standard output or error was; None when nobody is there any more.
    """

    end: int
    screen: int | None


def copy_output(file: int) -> None:
    """From now on what this process writes, and what it becomes, is copied to `file` by another process."""
    ways: list[_Way] = []
    own_ends: dict[int, int] = {}
    for stream in _together():
        end, own_end = _pair_like(stream[0])
        ways.append(_Way(end, os.dup(stream[0])))
        own_ends.update(dict.fromkeys(stream, own_end))
    child = os.fork()
    if child == 0:
        _become_copier(ways, file)
    with suppress(ChildProcessError):  # where SIGCHLD is ignored, nobody can be waited for
        os.waitpid(child, 0)  # it has put the copier into a session of its own
    for stream_number, own_end in own_ends.items():
        os.dup2(own_end, stream_number)
    for number in {file, *own_ends.values(), *_numbers_of(ways)}:
        os.close(number)


def _numbers_of(ways: list[_Way]) -> set[int]:
    return {way.end for way in ways} | {way.screen for way in ways if way.screen is not None}


def _together() -> list[tuple[int, ...]]:
    """Standard output and error, as one where they are the same file: the order of their lines is kept."""
    first, second = (os.fstat(number) for number in _STANDARD)
    same = (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
    return [_STANDARD] if same else [(number,) for number in _STANDARD]


def _pair_like(stream: int) -> tuple[int, int]:
    """An end to read and one to write: a terminal in place of a terminal, as programs behave otherwise on a pipe."""
    if not os.isatty(stream):
        return os.pipe()
    end, own_end = os.openpty()
    tty.setraw(own_end)  # bytes arrive as they are written
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, fcntl.ioctl(stream, termios.TIOCGWINSZ, bytes(8)))
    return end, own_end


def _become_copier(ways: list[_Way], file: int) -> NoReturn:
    """A process that belongs to nobody: the program has no child that it did not start, and the launcher ends none."""
    try:
        os.setsid()
        if os.fork() == 0:
            for number in _ENDS_BY_ITSELF:
                signal.signal(number, signal.SIG_IGN)
            _keep_open({file, *_numbers_of(ways)})
            _copy(ways, file)
    except BaseException:
        _written(ways[-1].screen, traceback.format_exc().encode())
    finally:
        os._exit(0)


def _keep_open(kept: set[int]) -> None:
    """Close all others: a launcher sees by its connections to a rank that it has ended."""
    for name in os.listdir("/dev/fd"):
        if int(name) not in kept:
            with suppress(OSError):  # the folder that is being listed
                os.close(int(name))


def _copy(ways: list[_Way], file: int | None) -> None:
    """Until everybody who could write has ended."""
    with selectors.DefaultSelector() as selector:
        for way in ways:
            selector.register(way.end, selectors.EVENT_READ, way)
        while selector.get_map():
            for key, _ in selector.select():
                data = _read(key.data.end)
                if not data:
                    selector.unregister(key.data.end)
                kept = _written(file, data)
                key.data.screen = _written(key.data.screen, data)
                if file is not None and kept is None:
                    _written(ways[-1].screen, _NO_MORE)
                file = kept


def _read(end: int) -> bytes:
    try:
        return os.read(end, _CHUNK)
    except OSError:  # of a terminal whose other side is closed
        return b""


def _written(target: int | None, data: bytes) -> int | None:
    """Write all of it; returns the target, None when it takes no more: the disk is full, or the launcher has gone. The
    program goes on either way, and the other target has what this one lacks."""
    while target is not None and data:
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:
            select.select([], [target], [])
        except OSError:
            return None
    return target


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DistfitError as error:
        print(f"distfit: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
