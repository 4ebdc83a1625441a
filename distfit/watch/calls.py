"""What ranks are about to do together from inside of their callbacks: the chief's conclusions, pure.

A collective under `if session.is_chief` would pair up with another one of the other ranks, and deliver garbage or hang.
So what a callback makes every rank do is announced first, and done when all ranks have announced the same:

    calls = Calls(size=3)
    calls.announce(0, Call(...), now)
    calls.met()                         # True once, when all ranks have announced the same
    calls.wants_places(now)             # time to ask every rank where it is
    calls.problem(now, ranks, who)      # what to report when some of them cannot come any more; None before

All ranks make the same collectives in the same order, and each counts its own. A rank that waits in one whose number is
not below that of the announced call has taken another way: neither can go on. One that is merely slow waits in none.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from distfit.differences import ranks_text
from distfit.watch.protocol import Message

ASK_AFTER_S = 1.0  # where ranks are is of no interest while all come at once
ASK_EVERY_S = 0.5
# What has stood for so long is no message that another one has overtaken; and the words of a rank that failed, if one
# did, have come by then.
STANDS_S = 2.0
REMEDY = (
    'Let every rank make this call, neither under "if session.is_chief" nor under another condition that differs '
    "between ranks: what it returns is there on all of them, and only what is done with it may be the chief's alone."
)

# What ranks do instead: the verb for one of them and for several, and the rest of the sentence.
Instead: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True)
class Call:
    """What one rank is about to do together with the others.

    Attributes:
        number: of this one among the rank's collectives.
        what: it is, as in `Watch.waiting` and `Watch.running`.
        called: by which name, as users write it: "distfit.evaluate".
        callback: class and method: "Probe.on_epoch_end".
        place: "probe.py, line 12".
        position: where the loop is.
        inside: the rank's section, as in `Here`; "" outside of one.
        section: its number.
        unasked: a function of another library, which distfit can only see and not hold up.
    """

    number: int
    what: str
    called: str
    callback: str
    place: str
    position: str
    inside: str
    section: int
    unasked: bool = False

    def message(self) -> Message:
        """For the chief."""
        return {"type": "call", "call": asdict(self)}

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same on all ranks that may go on."""
        return self.number, self.what, self.called

    def __str__(self) -> str:
        return f"{self.called} in {self.callback} ({self.place})"


@dataclass(frozen=True)
class Progress:
    """How far a rank is otherwise: the last section that it has completed, and whether it has left the run."""

    done: int = 0
    gone: bool = False


class Calls:
    """The calls that ranks have announced and not made.

    Args:
        size: ranks of the job.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._announced: dict[int, Call] = {}
        self._places: dict[int, Message] = {}
        self._ask_at = 0.0
        self._since: float | None = None

    @property
    def pending(self) -> bool:
        """Whether a rank waits for others to announce the same."""
        return bool(self._announced)

    def announce(self, rank: int, call: Call | None, now: float) -> None:
        """A rank is about to make a call. What another library does is seen late: it never replaces a call of
        distfit, nor does its end (None)."""
        if not self._announced:
            self._ask_at, self._places, self._since = now + ASK_AFTER_S, {}, None
        before = self._announced.get(rank)
        if before is not None and not before.unasked and (call is None or call.unasked):
            return
        self._announced.pop(rank, None)
        if call is not None:
            self._announced[rank] = call

    def place(self, rank: int, message: Message) -> None:
        """Where a rank is: what it waits in ("" for nothing), and the number of that."""
        self._places[rank] = message

    def met(self) -> bool:
        """Whether all ranks have announced the same call, which is forgotten then."""
        calls = list(self._announced.values())
        if len(calls) < self._size or any(call.unasked or call.kind != calls[0].kind for call in calls):
            return False
        self._announced = {}
        return True

    def wants_places(self, now: float) -> bool:
        """Whether every rank is to be asked for its place now."""
        if not self._announced or now < self._ask_at:
            return False
        self._ask_at = now + ASK_EVERY_S
        return True

    def problem(self, now: float, ranks: Sequence[Progress], who: Callable[[int], str]) -> str | None:
        """The report on a call that some ranks will never make; None while there is none.

        Args:
            now: seconds of any steady clock.
            ranks: all of the job.
            who: one of them in words.
        """
        found = self.contradiction(ranks, who)
        if found is None:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        return found if now - self._since >= STANDS_S else None

    def contradiction(self, ranks: Sequence[Progress], who: Callable[[int], str]) -> str | None:
        """As `problem`, for who knows where all ranks are at this moment."""
        elsewhere = self._elsewhere(ranks)
        return self._report(elsewhere, who) if elsewhere else None

    def _elsewhere(self, ranks: Sequence[Progress]) -> dict[Instead, list[int]]:
        """Who cannot come to the first call that is waited for, by what they do instead."""
        found: dict[Instead, list[int]] = {}
        for number, rank in enumerate(ranks if self._announced else ()):
            instead = self._instead(number, rank, self._announced[self._first()])
            if instead:
                found.setdefault(instead, []).append(number)
        return found

    def _first(self) -> int:
        """The rank whose call comes first in the common order; of several the lowest."""
        return min(self._announced, key=lambda rank: (self._announced[rank].number, rank))

    def _instead(self, number: int, rank: Progress, call: Call) -> Instead | None:
        own, place = self._announced.get(number), self._places.get(number)
        if own is not None:
            return None if own.kind == call.kind or (own.unasked and call.unasked) else ("calls", "call", str(own))
        if rank.gone:
            return "has", "have", "left the run"
        if call.inside and rank.done >= call.section:
            return "has", "have", f'ended "{call.inside}"'
        if place is not None and place["what"] and place["number"] >= call.number:
            return "waits", "wait", f'in "{place["what"]}"'
        return None

    def _report(self, elsewhere: dict[Instead, list[int]], who: Callable[[int], str]) -> str:
        first = self._first()
        call = self._announced[first]
        same = [rank for rank, own in self._announced.items() if own.kind == call.kind]
        callers = who(first) if len(same) == 1 else f"{ranks_text(sorted(same))} of {self._size}"
        others = [
            f"{ranks_text(members)} did not, but {one if len(members) == 1 else several} {where}"
            for (one, several, where), members in elsewhere.items()
        ]
        at = f" at {call.position}" if call.position else ""
        return f"{callers} called {call}{at}, which needs all ranks; {'; '.join(others)}\n{REMEDY}"
