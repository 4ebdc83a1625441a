"""What the chief concludes from what the ranks say: pure, no sockets, the time is an argument.

    judge = Judge(size=3, position=lambda: "epoch 2, step 17")
    judge.receive(1, {"type": "failed", ...}, now)
    judge.lost(2, now)
    verdict = judge.verdict(now)        # None while all is well

There is one verdict and it is the first *cause*: a failure that may only be the consequence of another one
(`secondary`), or that the chief is about to report itself (`agreed`), is held back for a moment.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from distfit.errors import RUN_EXIT_CODE
from distfit.topology import is_chief
from distfit.watch.calls import Call, Calls, Progress
from distfit.watch.protocol import Message

PATIENCE_S = 2.0
STACKS_LIMIT_S = 3.0
VANISHED = "was killed or crashed (its connection closed without a farewell)"
WHY_VANISHED = (
    "It could say nothing itself: out of memory (the kernel's log on its host says so: dmesg), killed by somebody, or "
    "a crash in native code, for which `distfit doctor` on that host looks for libraries that do not fit together."
)


@dataclass(frozen=True)
class Verdict:
    """The one report of the job and its one exit code."""

    text: str
    code: int = RUN_EXIT_CODE


@dataclass
class _Rank:
    host: str = "?"
    inside: str = ""  # these three as in `Here`
    started: int = 0
    done: int = 0
    gone: bool = False  # said farewell
    stacks: Message | None = None


@dataclass
class _Stall:
    rank: int
    what: str
    seconds: float
    limit_s: float
    deadline: float
    asked: bool = field(default=False)


class Judge:
    """Collects what is known of each rank and decides when the run has failed.

    Args:
        size: ranks of the job, >= 2.
        position: where the chief is now, for ranks that can no longer say it themselves.

    Attributes:
        calls: what callbacks are about to make all ranks do.
    """

    def __init__(self, size: int, position: Callable[[], str]) -> None:
        self._ranks = [_Rank() for _ in range(size)]
        self._position = position
        self._decided: Verdict | None = None
        self._held: tuple[Verdict, float] | None = None
        self._stall: _Stall | None = None
        self.calls = Calls(size)

    def receive(self, rank: int, message: Message, now: float) -> None:
        """Take in one message of a rank; `now` in seconds of any steady clock."""
        match message["type"]:
            case "hello":
                self._ranks[rank].host = message["host"]
            case "running":
                self._running(self._ranks[rank], message)
            case "bye":
                self._ranks[rank].gone, self._ranks[rank].done = True, message["done"]
                self._ranks[rank].inside = ""
            case "failed":
                self._failed(rank, message, now)
            case "stalled" if self._stall is None:
                self._stall = _Stall(
                    rank, message["what"], message["seconds"], message["limit_s"], now + STACKS_LIMIT_S
                )
            case "call":
                self.calls.announce(rank, message["call"] and Call(**message["call"]), now)
            case "place":
                self.calls.place(rank, message)
            case "stacks":
                self._ranks[rank].stacks = message

    def lost(self, rank: int) -> None:
        """The connection of a rank closed; fine after a farewell, the end of the run otherwise."""
        if not self._ranks[rank].gone:
            self._decide(f"{self._who(rank)} {VANISHED}{at(self._position())}\n{WHY_VANISHED}")

    def wants_stacks(self) -> bool:
        """True once, when every rank has to be asked where it is."""
        if self._stall is None or self._stall.asked:
            return False
        self._stall.asked = True
        return True

    def verdict(self, now: float) -> Verdict | None:
        """How the run ends, or None while it goes on."""
        self._check_missing()
        self._check_calls(now)
        if self._decided is None and self._stall is not None and self._stacks_complete(now):
            self._decided = Verdict(self._stall_report(self._stall))
        if self._decided is None and self._held is not None and now >= self._held[1]:
            self._decided = self._held[0]
        return self._decided

    @property
    def undecided(self) -> bool:
        """Whether a failure is being looked into, so that the chief must not leave yet."""
        return self._held is not None or self._stall is not None or self.calls.pending

    def done(self, rank: int) -> int:
        """The last section that this rank ended well."""
        return self._ranks[rank].done

    def deputy(self) -> int:
        """Who speaks when the chief vanishes: a rank of another host where there is one, else rank 1."""
        hosts = [rank.host for rank in self._ranks]
        return next((rank for rank, host in enumerate(hosts) if host != hosts[0]), 1)

    def _running(self, rank: _Rank, message: Message) -> None:
        rank.inside, rank.started, rank.done = message["what"], message["started"], message["done"]

    def _failed(self, rank: int, message: Message, now: float) -> None:
        verdict = Verdict(failure_text(self._who(rank), message), message["code"])
        kind = message["kind"]
        if kind == "secondary" or (kind == "agreed" and not is_chief(rank)):
            self._held = self._held or (verdict, now + PATIENCE_S)
        else:
            self._decided = self._decided or verdict

    def _check_missing(self) -> None:
        """A rank that left normally although another one is in a section that it has not completed."""
        left = [number for number, rank in enumerate(self._ranks) if rank.gone]
        inside = [rank for rank in self._ranks if rank.inside]
        if not left or not inside:
            return
        leaver = min(left, key=lambda number: self._ranks[number].done)
        other = max(inside, key=lambda rank: rank.started)
        if other.started > self._ranks[leaver].done:
            what = f"exited while the others were {other.inside}"
            self._decide(f"{self._who(leaver)} {what}{at(self._position())}")

    def _check_calls(self, now: float) -> None:
        """A callback's collective that some ranks will never make."""
        if not self.calls.pending:
            return
        progress = [Progress(rank.done, rank.gone) for rank in self._ranks]
        problem = self.calls.problem(now, progress, self._who)
        if problem is not None:
            self._decide(problem)

    def _decide(self, what: str) -> None:
        self._decided = self._decided or Verdict(f"distfit: {what}\n{ending(RUN_EXIT_CODE)}")

    def _who(self, rank: int) -> str:
        return f"rank {rank} of {len(self._ranks)} on host {self._ranks[rank].host}"

    def _stacks_complete(self, now: float) -> bool:
        answered = all(rank.stacks is not None or rank.gone for rank in self._ranks)
        return answered or (self._stall is not None and now >= self._stall.deadline)

    def _stall_report(self, stall: _Stall) -> str:
        lines = [
            f"distfit: {self._who(stall.rank)} has waited for the other ranks for {stall.seconds:.0f} s "
            f'in "{stall.what}" (limit {stall.limit_s:g} s)'
        ]
        if all(rank.stacks is not None and rank.stacks["waiting"] is not None for rank in self._ranks):
            lines.append("every rank waits, so they are in different collectives")
        # Those who stay away come first: one of them is the reason.
        groups: dict[tuple[int, str], list[int]] = {}
        ran = next((rank.stacks["ran"] for rank in self._ranks if rank.stacks), "")
        for number, rank in enumerate(self._ranks):
            groups.setdefault(_whereabouts(rank, ran), []).append(number)
        for (_, text), members in sorted(groups.items(), key=lambda item: item[0][0]):
            hosts = sorted({self._ranks[number].host for number in members})
            lines.append(f"{_plural(members)} on host {', '.join(hosts)} {text}")
        return "\n".join([*lines, ending(RUN_EXIT_CODE)])


def at(position: str, callback: str = "") -> str:
    """
    >>> at("epoch 2, step 17", "Probe.on_epoch_end"), at("")
    (' at epoch 2, step 17 in Probe.on_epoch_end', '')
    """
    return (f" at {position}" if position else "") + (f" in {callback}" if callback else "")


def ending(code: int) -> str:
    """The last line of every report: what happens now."""
    return f"distfit: all ranks end with exit code {code}; nothing more was written"


def failure_text(who: str, message: Message) -> str:
    """The report of a rank's own failure; `who` is "rank 1 of 3 on host h2"."""
    if message["kind"] == "agreed":
        return f"distfit: error: {message['header']}"
    if message["kind"] == "interrupted":
        return "distfit: interrupted"
    if message["kind"] == "at once":
        return str(message["header"])
    header = f"distfit: {who} failed{at(message['position'], message['callback'])}: {message['header']}"
    return f"{header}\n{message['traceback'].rstrip()}\n{ending(message['code'])}"


def silence(ran: str) -> str:
    """What is known of a rank that does not answer; `ran` are the callbacks that another one has run last."""
    stuck = "does not answer: it is stopped, or stuck in native code that holds Python's lock"
    return f"{stuck}, maybe in one of the callbacks that another rank ran last: {ran}" if ran else stuck


def _whereabouts(rank: _Rank, ran: str) -> tuple[int, str]:
    """(order of interest, text); equal for ranks that are in the same place."""
    if rank.stacks is None:
        return (2, "has left the run") if rank.gone else (0, silence(ran))
    position = at(rank.stacks["position"], rank.stacks["callback"])
    if rank.stacks["waiting"] is None:
        return 1, f"stays away{position}; its stacks:\n{rank.stacks['text']}"
    return 3, f'waits in "{rank.stacks["waiting"]}"; its stacks:\n{rank.stacks["text"]}'


def _plural(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'each of ranks'} {', '.join(map(str, ranks))}"
