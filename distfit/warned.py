"""What the ranks of a job warn of, collected on the chief: each warning once, with who has it. Pure, without a clock.

    collector = Collector(size=3)
    collector.hear(2, "key", f"the disk is slow{WHO}", now)
    collector.due(now + QUIET_S)          # ["the disk is slow (on rank 2 of 3)"]

Ranks meet the same lines within moments of each other, so a warning is held back until every rank has it, or until
nobody has joined for a while.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from distfit.differences import ranks_text

# Stands in a text where the ranks are to be named: behind a message, before the line of source that Python shows.
WHO = "\0"
QUIET_S = 2.0
HELD_AT_MOST_S = 10.0
# Of one run. A program that warns in other words at every step would fill the screen, once for each rank.
MOST_SHOWN = 200


@dataclass
class _Warning:
    text: str
    since: float
    joined: float
    ranks: set[int] = field(default_factory=set)
    told: int = 0  # of how many ranks the reader knows


class Collector:
    """What was heard of the ranks and what a reader knows of it.

    Args:
        size: ranks of the job, >= 2.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._heard: dict[str, _Warning] = {}
        self._left_out = 0

    def hear(self, rank: int, key: str, text: str, now: float) -> None:
        """A rank warns; `key` is the same for the same warning on all ranks, `now` in seconds of any steady clock."""
        if key not in self._heard and len(self._heard) >= MOST_SHOWN:
            self._left_out += 1
            return
        found = self._heard.setdefault(key, _Warning(text, now, now))
        if rank not in found.ranks:
            found.ranks.add(rank)
            found.joined = now

    def due(self, now: float) -> list[str]:
        """What is to be shown now, in the order in which it was first heard."""
        return [self._told(each) for each in self._untold() if self._due_at(each) <= now]

    def next_due(self) -> float | None:
        """When there will be something to show; None while nothing is held back."""
        return min((self._due_at(each) for each in self._untold()), default=None)

    def rest(self) -> list[str]:
        """At the end: what has not been shown, and who joined behind what has been."""
        joined_late = [each for each in self._heard.values() if 0 < each.told < len(each.ranks)]
        lines = [self._told(each) for each in self._untold()]
        lines += [f"distfit: later the same{self._who(each)}: {_first_line(each.text)}" for each in joined_late]
        for each in joined_late:
            each.told = len(each.ranks)
        if self._left_out:
            lines.append(f"distfit: warning: {self._left_out:,} more warnings were not shown")
            self._left_out = 0
        return lines

    def _untold(self) -> list[_Warning]:
        return [each for each in self._heard.values() if not each.told]

    def _due_at(self, each: _Warning) -> float:
        if len(each.ranks) == self._size:
            return each.since
        return min(each.joined + QUIET_S, each.since + HELD_AT_MOST_S)

    def _told(self, each: _Warning) -> str:
        each.told = len(each.ranks)
        return each.text.replace(WHO, self._who(each))

    def _who(self, each: _Warning) -> str:
        return f" ({who(sorted(each.ranks), self._size)})"


def who(ranks: Sequence[int], size: int) -> str:
    """
    >>> who([0, 1, 2], 3), who([2], 3), who([0, 2], 3)
    ('on all 3 ranks', 'on rank 2 of 3', 'on ranks 0, 2 of 3')
    """
    return f"on all {size} ranks" if len(ranks) == size else f"on {ranks_text(ranks)} of {size}"


def _first_line(text: str) -> str:
    return text.split(WHO)[0].split("\n")[0]
