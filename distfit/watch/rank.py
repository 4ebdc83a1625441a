"""The watch as a rank's main thread sees it; `distfit.watch` has the synopsis."""

import atexit
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from distfit import log
from distfit.errors import INTERRUPTED_EXIT_CODE, RUN_EXIT_CODE, DistfitError, RunError
from distfit.topology import Topology
from distfit.watch.callbacks import raised_in
from distfit.watch.calls import Call
from distfit.watch.client import Client, connect
from distfit.watch.ending import leave
from distfit.watch.face import NoWatch, at_once_text
from distfit.watch.here import Here
from distfit.watch.judge import failure_text
from distfit.watch.protocol import Message, trim
from distfit.watch.server import Server
from distfit.watch.shared import SharedWatch, is_agreed

_JOIN_LIMIT_S = 30.0  # a rank tries for 20 s
_END_LIMIT_S = 6.0  # patience and printing of the chief take at most 4 s
_FAREWELL_LIMIT_S = 4.0
_HEADER_LIMIT = 300


def start(topology: Topology, broadcast: Callable[[Any], Any], stall_limit_s: float = 600.0) -> "NoWatch | RankWatch":
    """Connect all ranks; every rank calls this at the same point, after the engine's start.

    Args:
        topology: this rank's place.
        broadcast: collective; returns on every rank the JSON-able object that the chief passes (the
            others pass None). Called once.
        stall_limit_s: seconds, > 0, that a rank may be inside one `waiting` before the run ends with all
            stacks. Ten minutes: longer than the slowest compilation of a first step, less than a night.

    Raises:
        RunError: the ranks cannot reach each other; at most 30 s after the call.
    """
    if topology.size == 1:
        return NoWatch()
    return RankWatch(topology, broadcast, stall_limit_s)


class RankWatch(SharedWatch):
    """The watch of one rank of several; see `start` for arguments and errors."""

    def __init__(self, topology: Topology, broadcast: Callable[[Any], Any], stall_limit_s: float) -> None:
        self._topology, self._pid = topology, os.getpid()
        super().__init__(Here(stall_limit_s))
        self._hook_before = sys.excepthook
        self._endpoint: Server | Client
        if topology.is_chief:
            self._endpoint = self._open(broadcast, stall_limit_s)
        else:
            self._endpoint = self._join(broadcast, stall_limit_s)
        self._leave_properly()
        self._await_everyone()
        log.connect(topology.rank, topology.size, self._endpoint.send)

    def fail(self, error: BaseException, *, secondary: bool = False) -> NoReturn:
        """See `Watch.fail`."""
        if self._is_child():
            raise error
        log.flush()
        failure = _failure(error, secondary, self._here)
        self._end(failure, failure_text(self._who(), failure))

    def leave_at_once(self, why: str, code: int) -> NoReturn:
        """See `Watch.leave_at_once`."""
        text = at_once_text(why, self._who(), self.position, code)
        self._end({"type": "failed", "kind": "at once", "header": text, "code": code}, text)

    def limit(self, stall_limit_s: float) -> None:
        """See `Watch.limit`."""
        self._here.limit_s = stall_limit_s

    def install_hooks(self) -> None:
        """See `Watch.install_hooks`."""
        if sys.excepthook != self._uncaught:
            self._hook_before, sys.excepthook = sys.excepthook, self._uncaught

    def close(self) -> None:
        """See `Watch.close`."""
        if self._is_child():
            return
        atexit.unregister(self.close)
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._hook_before
        log.disconnect()
        self._endpoint.farewell({"type": "bye", "done": self._here.done}, _FAREWELL_LIMIT_S)

    def _meet(self, call: Call) -> None:
        """One message; the chief's watch answers when all ranks have sent theirs, or ends the run."""
        self._here.met.clear()
        if not self._endpoint.send(call.message()):
            raise RunError(f"Expected the chief to answer before {call}, received nothing: it has left the run.")
        self._here.met.wait()

    def _section_changed(self) -> None:
        self._endpoint.send(self._here.section())

    def _open(self, broadcast: Callable[[Any], Any], stall_limit_s: float) -> Server:
        """Listen before the offer goes out; a chief that cannot listen says so to everybody."""
        try:
            server = Server(self._topology, self._here, stall_limit_s)
        except OSError as error:
            broadcast({"error": str(error), "host": self._topology.host})
            raise _cannot_listen(self._topology.host, str(error)) from error
        server.start()
        broadcast(server.offer())
        return server

    def _join(self, broadcast: Callable[[Any], Any], stall_limit_s: float) -> Client:
        offer = broadcast(None)
        if "error" in offer:
            raise _cannot_listen(offer["host"], offer["error"])
        sock = connect(offer, self._topology)
        client = Client(sock, self._topology, self._here, offer["host"], tick_s=min(0.5, stall_limit_s / 4))
        client.start()
        return client

    def _leave_properly(self) -> None:
        """A farewell at exit; and no copies of the sockets in forked children, which would hide this
        process's death from the others."""
        atexit.register(self.close)
        endpoint = weakref.ref(self._endpoint)
        os.register_at_fork(after_in_child=lambda: (alive := endpoint()) and alive.forget())

    def _await_everyone(self) -> None:
        limit_s = _JOIN_LIMIT_S if self._topology.is_chief else _JOIN_LIMIT_S + _END_LIMIT_S
        missing = self._endpoint.await_everyone(limit_s)
        if missing:
            self.fail(
                RunError(
                    f"Expected all {self._topology.size} ranks to connect to the failure watch within "
                    f"{limit_s:g} s, received nothing from {missing}, which says itself what it tried."
                )
            )

    def _end(self, failure: Message, text: str) -> NoReturn:
        if self._report(failure, text):
            time.sleep(_END_LIMIT_S)  # the watch's thread ends this process when the chief has spoken
        leave(failure["code"], text)

    def _report(self, failure: Message, text: str) -> bool:
        if isinstance(self._endpoint, Client):
            return self._endpoint.report(failure, text)
        return self._endpoint.send(failure)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._is_child():
            self._hook_before(kind, error, trace)
        else:
            self.fail(error)

    def _is_child(self) -> bool:
        """Whether this is a forked child of the rank, which is nobody in the job."""
        return os.getpid() != self._pid

    def _who(self) -> str:
        return f"rank {self._topology.rank} of {self._topology.size} on host {self._topology.host}"


def _failure(error: BaseException, secondary: bool, here: Here) -> Message:
    """The message of an exception: its kind, its words, and what the run exits with."""
    # Not by attribute: other libraries' exceptions have an exit_code too, even 0.
    code = error.exit_code if isinstance(error, DistfitError) else RUN_EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        kind, code = "interrupted", INTERRUPTED_EXIT_CODE
    elif is_agreed(error):
        kind = "agreed"
    else:
        kind = "secondary" if secondary else "error"
    return {
        "type": "failed",
        "kind": kind,
        "header": trim(str(error)) if kind == "agreed" else _headline(error),
        "traceback": trim("".join(traceback.format_exception(error))),
        "position": here.position,
        "callback": raised_in(error) or here.callback_name,
        "code": code,
    }


def _headline(error: BaseException) -> str:
    """
    >>> _headline(ValueError("no such thing\\nand more"))
    'ValueError: no such thing'
    """
    words = str(error).strip().split("\n")[0][:_HEADER_LIMIT]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _cannot_listen(host: str, why: str) -> RunError:
    error = RunError(
        f"Expected the chief on host {host} to open a TCP port for the failure watch, received: {why}. "
        "Allow it to listen on a port of the system's choice."
    )
    error.agreed = True
    return error
