"""The limits that a container or a batch job puts on this process: control groups, version 2 and 1.

groups = of_this_process()
core_quota(groups), memory_limit(groups), memory_left(groups)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
MINE = Path("/proc/self/cgroup")
# The limit, what is used of it, and the part of that which the kernel gives back at once: files read and not in use.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def of_this_process(mounted: Path = MOUNTED, mine: Path = MINE) -> list[Path]:
    """The folders of this process's control groups and of those above them, whose limits count as well.

    Args:
        mounted: where they are mounted; inside a container its own group looks like the root.
        mine: the file that says which of them this process is in: lines of NUMBER:CONTROLLERS:PATH, without
            controllers for version 2.
    """
    found = [mounted]
    for line in _text(mine).splitlines():
        _, controllers, path = line.split(":", 2)
        top = mounted / controllers.split(",")[0] if controllers else mounted
        group = top / path.lstrip("/")
        found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def memory_limit(groups: Sequence[Path]) -> int | None:
    """The smallest limit on memory, bytes; None without one ("max")."""
    return min((limit for limit, _ in _memory(groups)), default=None)


def memory_left(groups: Sequence[Path]) -> int | None:
    """What the fullest group still grants, bytes; None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory(groups)), default=None)


def core_quota(groups: Sequence[Path]) -> float | None:
    """Cores of time that the groups grant, None without a limit."""
    return min((quota for group in groups if (quota := _quota(group)) is not None), default=None)


def _memory(groups: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each group that has a limit."""
    for group in groups:
        for limit, used, idle in _MEMORY:
            if (most := _number(group / limit)) is not None:
                kept = dict(line.split() for line in _text(group / "memory.stat").splitlines())
                yield most, (_number(group / used) or 0) - int(kept.get(idle, 0))


def _number(file: Path) -> int | None:
    word = _text(file).strip()
    return int(word) if word.isdigit() else None


def _quota(group: Path) -> float | None:
    """ "QUOTA PERIOD" in one file of version 2, in two of version 1; no limit is "max" or -1."""
    old = [word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _words(group / name)]
    quota, period = [*(_words(group / "cpu.max") or old), "", ""][:2]
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _words(file: Path) -> list[str]:
    return _text(file).split()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # another version of control groups, or none
        return ""
