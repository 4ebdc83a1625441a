"""The other ranks' side of the watch: one connection to the chief and one daemon thread that obeys it.

client = Client(connect(offer, topology), topology, here, chief_host, tick_s=0.5)
client.start()
client.send({"type": "bye", "done": 1})
"""

import socket
import threading
import time
import traceback

from distfit.errors import RUN_EXIT_CODE, RunError
from distfit.topology import Topology
from distfit.watch import addresses
from distfit.watch.callbacks import Unasked
from distfit.watch.calls import REMEDY
from distfit.watch.ending import leave
from distfit.watch.here import Here
from distfit.watch.judge import VANISHED, WHY_VANISHED, at, ending, silence
from distfit.watch.protocol import Lines, Message, encode, notice_dead_hosts
from distfit.watch.stacks import WATCH_THREAD

_ATTEMPT_LIMIT_S = 2.0
_CONNECT_LIMIT_S = 20.0
_ANSWER_LIMIT_S = 8.0  # the chief asks for stacks at once and has its verdict within three seconds


def connect(offer: Message, topology: Topology) -> socket.socket:
    """A connection to the chief that has been welcomed.

    Args:
        offer: `Server.offer`, as it came from the chief.
        topology: of this rank.

    Raises:
        RunError: the chief cannot be reached; at most 20 s after the call.
    """
    same_host = offer["host"] == topology.host
    hello = {"type": "hello", "token": offer["token"], "rank": topology.rank, "host": topology.host}
    tried: list[str] = []
    deadline = time.monotonic() + _CONNECT_LIMIT_S
    for address in addresses.in_order(offer["addresses"], same_host):
        if time.monotonic() > deadline:
            break
        try:
            return _greet(address, offer["port"], hello)
        except (OSError, ValueError) as error:
            tried.append(f"{address} ({error or type(error).__name__})")
    raise RunError(
        f"Expected rank {topology.rank} on host {topology.host} to reach the chief on host {offer['host']}, "
        f"port {offer['port']}, for the failure watch; tried {', '.join(tried) or 'no address at all'}. Let "
        f"the ranks open TCP connections to each other, or set {addresses.VARIABLE} on the chief to the "
        "addresses (comma separated) under which the other hosts reach it."
    )


def _greet(address: str, port: int, hello: Message) -> socket.socket:
    """Connect and say hello; whoever answers something else is not our chief."""
    sock = socket.create_connection((address, port), timeout=_ATTEMPT_LIMIT_S)
    try:
        notice_dead_hosts(sock)
        sock.sendall(encode(hello))
        answer = sock.recv(len(encode({"type": "welcome"})))  # no byte more: the rest is the thread's
        if Lines().feed(answer) != [{"type": "welcome"}]:
            raise ValueError("what answers there is not this run's chief")
        return sock
    except BaseException:
        sock.close()
        raise


class Client:
    """The endpoint of a rank that is not the chief.

    Args:
        sock: what `connect` returned.
        topology: of this rank.
        here: what this rank's main thread is doing.
        chief_host: for messages.
        tick_s: seconds between two looks at the own wait.
    """

    def __init__(self, sock: socket.socket, topology: Topology, here: Here, chief_host: str, tick_s: float):
        self._sock, self._topology, self._here, self._chief_host = sock, topology, here, chief_host
        sock.settimeout(tick_s)
        self._sending = threading.Lock()
        self._lines, self._unasked = Lines(), Unasked(here)
        self._deputy = False
        self._everyone, self._answered = threading.Event(), threading.Event()
        self._heard, self._stalled_at = time.monotonic(), 0.0
        self._unheard = ""  # this rank's own report, until the chief has taken over
        self.chief_done: int | None = None  # the chief's last section, once it has said farewell
        self._thread = threading.Thread(target=self._run, name=WATCH_THREAD, daemon=True)

    def start(self) -> None:
        """From now on the chief's orders are obeyed."""
        self._thread.start()

    def await_everyone(self, timeout_s: float) -> str:
        """Wait until all ranks are connected; returns who is missing, "" when nobody is. Without this a rank
        could fail, and the chief end, before a slower one has connected and can be told."""
        return "" if self._everyone.wait(timeout_s) else "a rank that only the chief knows"

    def send(self, message: Message) -> bool:
        """Tell the chief; False when it is gone. Bounded: a chief that does not read is as good as gone."""
        if self.chief_done is not None:
            self._miss_chief(self.chief_done)
            return False
        try:
            with self._sending:
                self._sock.sendall(encode(message))
        except OSError:
            return False
        return True

    def report(self, message: Message, text: str) -> bool:
        """Send a failure; `text` is printed here if the chief vanishes before it could print it."""
        self._unheard = text
        return self.send(message)

    def farewell(self, message: Message, timeout_s: float) -> None:
        """Leave normally, unless the chief answers that the run needed this rank."""
        if self.send(message):
            self._answered.wait(timeout_s)

    def forget(self) -> None:
        """Close this process's copy of the socket, after a fork."""
        self._sock.close()

    def _run(self) -> None:
        try:
            while self.chief_done is None:
                self._listen()
                stalled, unasked = self._here.stalled(), self._unasked.news()
                if stalled:
                    self._stalled_at = time.monotonic()
                for news in (stalled, unasked):
                    if news:
                        self.send(news)
                self._doubt_chief()
        except BaseException:
            leave(RUN_EXIT_CODE, f"distfit: the failure watch itself failed\n{traceback.format_exc()}")

    def _listen(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except TimeoutError as error:
            if error.errno is None:  # nothing to read within a tick; the kernel's ETIMEDOUT has a number
                return
            data = b""
        except OSError:  # reset, or the chief's host is gone
            data = b""
        self._heard = time.monotonic()
        if not data:
            self._chief_lost()
        for message in self._lines.feed(data):
            self._obey(message)

    def _obey(self, message: Message) -> None:
        match message["type"]:
            case "end":
                leave(message["code"])
            case "stacks?":
                self.send(self._here.stacks())
            case "place?":
                self.send(self._here.place())
            case "met":
                self._here.all_have_met()
            case "everyone":
                self._deputy = message["deputy"]
                self._everyone.set()
            case "bye":
                self.chief_done = message["done"]
                self._answered.set()
                self._miss_chief(message["done"])

    def _miss_chief(self, done: int) -> None:
        """The chief left normally; the end if this rank is, or goes, into a section that needs it, or waits for it
        to make a call that it will not make."""
        call = self._here.call
        if call is not None:
            self._end_alone(f"exited, and rank {self._topology.rank} called {call}, which needs all ranks", REMEDY)
        if self._here.inside and self._here.started > done:
            self._end_alone(f"exited while the others were {self._here.inside}")

    def _doubt_chief(self) -> None:
        """Its host lives, but nothing in its Python does: then the one who waits for it ends the run; one for all, but
        if that one is stuck itself, another."""
        limit_s = _ANSWER_LIMIT_S * (1 if self._deputy else 2)
        if self._stalled_at and time.monotonic() - max(self._stalled_at, self._heard) > limit_s:
            what, since, _ = self._here.wait or ("", self._stalled_at, 0)
            waited = f'rank {self._topology.rank} has waited for {time.monotonic() - since:.0f} s in "{what}"'
            self._end_alone(silence(self._here.ran_last), f"{waited} (limit {self._here.limit_s:g} s)")

    def _chief_lost(self) -> None:
        if self._unheard or not self._deputy:
            leave(RUN_EXIT_CODE, self._unheard)
        self._end_alone(VANISHED, WHY_VANISHED)

    def _end_alone(self, what: str, why: str = "") -> None:
        who = f"rank 0 of {self._topology.size} on host {self._chief_host} (the chief)"
        where = at(self._here.position)
        lines = [f"distfit: {who} {what}{where}", *([why] if why else []), ending(RUN_EXIT_CODE)]
        leave(RUN_EXIT_CODE, "\n".join(lines))
