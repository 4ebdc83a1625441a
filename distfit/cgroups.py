"""The limits that a container or a batch job puts on this process: control groups, version 2 and 1.

groups = of_this_process()
core_quota(groups), least(groups, "memory.max")
"""

from collections.abc import Sequence
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
MINE = Path("/proc/self/cgroup")


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


def least(groups: Sequence[Path], name: str) -> int | None:
    """The smallest limit that a file of this name sets, None without one ("max")."""
    words = [_words(group / name) for group in groups]
    return min((int(word[0]) for word in words if word and word[0].isdigit()), default=None)


def core_quota(groups: Sequence[Path]) -> float | None:
    """Cores of time that the groups grant, None without a limit."""
    return min((quota for group in groups if (quota := _quota(group)) is not None), default=None)


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
