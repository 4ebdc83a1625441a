"""The chief's side of the watch: one daemon thread with a selector, a connection to every other rank.

The thread listens before the offer is handed out, admits exactly one connection for each rank that knows
the token, hands what they say to the `Judge`, and carries out its verdict: print, order everyone to end, end.
"""

import contextlib
import hmac
import secrets
import selectors
import socket
import threading
import time
import traceback
from queue import SimpleQueue

from distfit import log
from distfit.topology import Topology
from distfit.watch import addresses
from distfit.watch.callbacks import Unasked
from distfit.watch.ending import leave, speak
from distfit.watch.here import Here
from distfit.watch.judge import Judge, Verdict
from distfit.watch.protocol import MAX_LINE, Lines, Message, encode, notice_dead_hosts
from distfit.watch.stacks import WATCH_THREAD

_HELLO_LIMIT_S = 5.0
_HELLO_BYTES = 4096
_END_LIMIT_S = 2.0
_GUESTS = 64  # connections that may be waiting to prove themselves, beyond one for each rank


class _Connection:
    """One accepted connection; a guest until its hello was right."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.lines = sock, Lines(_HELLO_BYTES)
        self.rank: int | None = None
        self.since = time.monotonic()


class Server:
    """The chief's endpoint.

    Args:
        topology: of rank 0.
        here: what the chief's main thread is doing.
        stall_limit_s: seconds that the chief may wait; decides how often that is looked at.

    Raises:
        OSError: no port can be opened on this host.
    """

    def __init__(self, topology: Topology, here: Here, stall_limit_s: float) -> None:
        self._topology, self._here = topology, here
        self._token = secrets.token_hex(16)
        self._judge = Judge(topology.size, lambda: here.position)
        self._judge.receive(0, {"type": "hello", "host": topology.host}, time.monotonic())
        self._tick_s = min(0.5, stall_limit_s / 4)
        self._listener = _listen(topology.size)
        self._bell, self._button = socket.socketpair()
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._ranks: dict[int, _Connection] = {}
        self._guests: list[_Connection] = []
        self._unasked = Unasked(here)
        self._everyone = threading.Event()
        self._leaving = self._over = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name=WATCH_THREAD, daemon=True)

    def offer(self) -> Message:
        """What the other ranks need to connect; the token makes it a secret of the job."""
        port = self._listener.getsockname()[1]
        offered = addresses.offered()
        return {"addresses": offered, "port": port, "token": self._token, "host": self._topology.host}

    def start(self) -> None:
        """From now on connections are answered."""
        self._thread.start()

    def await_everyone(self, timeout_s: float) -> str:
        """Wait until all ranks are connected; returns which ones are missing, "" when none is."""
        self._everyone.wait(timeout_s)
        missing = [str(rank) for rank in range(1, self._topology.size) if rank not in self._ranks]
        return f"rank {', '.join(missing)}" if missing else ""

    def send(self, message: Message) -> bool:
        """Something that the chief's own main thread has to say; False when nobody listens any more."""
        if not self._thread.is_alive():
            return False
        self._inbox.put(message)
        self._button.send(b"!")
        return True

    def farewell(self, message: Message, timeout_s: float) -> None:
        """Say goodbye to all ranks, or end with them if they still need this one."""
        if self.send(message):
            self._thread.join(timeout_s)

    def forget(self) -> None:
        """Close this process's copies of the sockets, after a fork. The selector is shared with the parent:
        it is closed first and never told anything."""
        self._selector.close()
        connections = [*self._ranks.values(), *self._guests]
        for sock in (self._listener, self._bell, self._button, *(c.sock for c in connections)):
            sock.close()

    def _run(self) -> None:
        try:
            while not self._over:
                self._serve(self._selector.select(self._tick_s))
                self._hear_chief()
                self._dismiss_silent_guests()
                self._act()
        except BaseException:
            # A watch that dies silently would let the job hang: end it, the others see the connection close.
            leave(1, f"distfit: the failure watch itself failed\n{traceback.format_exc()}")

    def _serve(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in events:
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._bell:
                self._bell.recv(4096)
            else:
                self._read(key.data)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # the caller hung up before it was answered
            return
        if len(self._guests) >= self._topology.size + _GUESTS:
            sock.close()
            return
        sock.setblocking(False)
        notice_dead_hosts(sock)
        guest = _Connection(sock)
        self._guests.append(guest)
        self._selector.register(sock, selectors.EVENT_READ, guest)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(1 << 16)
            messages = connection.lines.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # reset, timed out, or no rank of ours: closed either way
            data, messages = b"", []
        for message in messages:
            if connection.rank is None and not self._admit(connection, message):
                data = b""
                break
            self._hear(connection, message)
        if not data:
            self._drop(connection)

    def _admit(self, guest: _Connection, message: Message) -> bool:
        rank, token = message.get("rank"), str(message.get("token")).encode(errors="replace")
        known = message.get("type") == "hello" and hmac.compare_digest(token, self._token.encode())
        others = range(1, self._topology.size)
        if not (known and isinstance(rank, int) and rank in others) or rank in self._ranks:
            return False
        guest.rank, guest.lines.limit = rank, MAX_LINE
        self._guests.remove(guest)
        self._ranks[rank] = guest
        self._tell(guest, {"type": "welcome"})
        return True

    def _hear(self, connection: _Connection, message: Message) -> None:
        assert connection.rank is not None
        if message["type"] == "warned":
            log.hear(connection.rank, message)
            return
        self._judge.receive(connection.rank, message, time.monotonic())
        if message["type"] == "hello" and len(self._ranks) == self._topology.size - 1:
            self._complete()
        # One that others still want something of is told how that ends instead.
        if message["type"] == "bye" and self._judge.verdict(time.monotonic()) is None and not self._judge.undecided:
            self._tell(connection, {"type": "bye", "done": self._judge.done(0)})

    def _complete(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for rank, connection in self._ranks.items():
            self._tell(connection, {"type": "everyone", "deputy": rank == self._judge.deputy()})
        self._everyone.set()

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if connection.rank is None:
            self._guests.remove(connection)
        else:
            self._judge.lost(connection.rank)

    def _dismiss_silent_guests(self) -> None:
        for guest in list(self._guests):
            if time.monotonic() - guest.since > _HELLO_LIMIT_S:
                self._drop(guest)

    def _hear_chief(self) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            self._leaving = self._leaving or message["type"] == "bye"
            self._judge.receive(0, message, time.monotonic())
        for news in (self._here.stalled(), self._unasked.news()):
            if news:
                self._judge.receive(0, news, time.monotonic())

    def _act(self) -> None:
        if self._judge.wants_stacks():
            self._tell_all({"type": "stacks?"})
            self._judge.receive(0, self._here.stacks(), time.monotonic())
        if self._judge.calls.met():
            self._tell_all({"type": "met"})
            self._here.all_have_met()
        if self._judge.calls.wants_places(time.monotonic()):
            self._tell_all({"type": "place?"})
            self._judge.receive(0, self._here.place(), time.monotonic())
        verdict = self._judge.verdict(time.monotonic())
        if verdict is not None:
            self._end(verdict)
        if self._leaving and not self._judge.undecided:
            self._tell_all({"type": "bye", "done": self._judge.done(0)})
            self._over = True

    def _end(self, verdict: Verdict) -> None:
        """Print first: when the first rank has gone, the launcher kills the others, this one included."""
        self._serve(self._selector.select(0))  # what others warned of has arrived by now
        speak("\n".join([*log.remaining(), verdict.text]))
        self._tell_all({"type": "end", "code": verdict.code})
        self._await_closing(time.monotonic() + _END_LIMIT_S)
        leave(verdict.code)

    def _await_closing(self, deadline: float) -> None:
        """Until every rank has closed its connection, that is, has ended; nothing more is heard."""
        while any(c.sock.fileno() >= 0 for c in self._ranks.values()) and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                if key.data is not None and _has_closed(key.data.sock):
                    self._selector.unregister(key.data.sock)
                    key.data.sock.close()

    def _tell_all(self, message: Message) -> None:
        for connection in self._ranks.values():
            self._tell(connection, message)

    def _tell(self, connection: _Connection, message: Message) -> None:
        # A rank whose buffer is full or whose host is gone: reading from it will tell, nothing waits here.
        if connection.sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                connection.sock.send(encode(message))


def _has_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(size: int) -> socket.socket:
    """A port of the system's choice on all addresses, IPv6 too where the host has it."""
    if socket.has_dualstack_ipv6():
        # Some containers have the family compiled in and switched off.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size + _GUESTS, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=size + _GUESTS)
