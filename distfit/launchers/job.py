"""What the user wants to run: ranks, hosts, program. Frozen, and refused here when it cannot be.

Job(ranks=6, program=("python", "train.py"), hosts=parse_hosts("h1:4,h2:4")).ranks_on_hosts   # (4, 2)
"""

import re
from dataclasses import dataclass

from distfit.errors import InputError

# Host and interface names become arguments of programs, and with horovodrun words of a shell's command line:
# they begin with a letter or digit and hold nothing that either would take for something else.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes.

    Args:
        name: a name or IPv4 address, as ssh and the launcher understand it.
        slots: ranks that it takes at most, >= 1.
    """

    name: str
    slots: int


@dataclass(frozen=True)
class Job:
    """The ranks to start.

    Args:
        ranks: how many, >= 1.
        program: what each of them runs, with its arguments.
        hosts: filled in this order; none means this machine, or the hosts of a batch scheduler's allocation.
        interface: the network interface that ranks talk over, e.g. "eth0"; the launcher's choice by default.
        passed: names of environment variables that ranks get beside those of the allow-list.
        allow_root: whether root may start it, which Open MPI refuses otherwise.
        columns: of the terminal where the ranks' output ends up; None where it is none, or none is to be drawn on.

    Raises:
        InputError: what cannot be started.
    """

    ranks: int
    program: tuple[str, ...]
    hosts: tuple[Host, ...] = ()
    interface: str | None = None
    passed: tuple[str, ...] = ()
    allow_root: bool = False
    columns: int | None = None

    def __post_init__(self) -> None:
        slots = sum(host.slots for host in self.hosts)
        if not self.program:
            raise InputError(
                "Expected a program after --, received none. For example: distfit launch -np 2 -- python train.py"
            )
        if ":" in self.program:
            raise InputError(
                "Expected a program without an argument that is a colon alone, behind which mpirun and srun take what "
                "follows for another program, received one. Write it with its option: --separator=:"
            )
        if self.ranks < 1:
            raise InputError(f"Expected at least one rank, received -np {self.ranks}.")
        if self.hosts and self.ranks > slots:
            raise InputError(
                f"Expected at most {slots} ranks, the slots of --hosts {in_words(self.hosts)}, received -np "
                f"{self.ranks}. Lower -np, or write more slots behind a host."
            )
        if self.interface is not None and not _NAME.fullmatch(self.interface):
            raise InputError(
                f"Expected the name of one network interface, as `ip link` lists it, received --interface "
                f"{self.interface!r}. For example: --interface eth0"
            )
        for name in self.passed:
            _refuse_no_name(name)

    @property
    def ranks_on_hosts(self) -> tuple[int, ...]:
        """Ranks on each of `hosts`, which are filled in their order.

        >>> Job(5, ("true",), (Host("h1", 4), Host("h2", 4))).ranks_on_hosts
        (4, 1)
        """
        left, found = self.ranks, []
        for host in self.hosts:
            found.append(min(left, host.slots))
            left -= found[-1]
        return tuple(found)

    def evenly(self, launcher: str) -> tuple[str, int]:
        """The hosts that get ranks, comma separated, and how many each: for launchers that take one number for all.

        Args:
            launcher: which one, for the error.

        Raises:
            InputError: some would get more than others.

        >>> Job(8, ("true",), parse_hosts("h1:4,h2:4,h3:4")).evenly("srun")
        ('h1,h2', 4)
        """
        used = {host.name: ranks for host, ranks in zip(self.hosts, self.ranks_on_hosts, strict=True) if ranks}
        if len(set(used.values())) > 1:
            raise InputError(
                f"Expected as many ranks on each host, which is all that {launcher} takes on its command line, "
                f"received -np {self.ranks} for --hosts {in_words(self.hosts)}. Give all hosts the same slots and fill "
                "them."
            )
        return ",".join(used), max(used.values())


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Hosts as mpirun and horovodrun write them; a name alone is one slot.

    Args:
        text: `name:slots` separated by commas.

    Raises:
        InputError: it is none, or names a host twice.

    >>> in_words(parse_hosts("h1:4,10.0.0.2"))
    'h1:4,10.0.0.2:1'
    """
    hosts = tuple(_parse_host(part.strip(), text) for part in text.split(","))
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"Expected each host once, received {name} twice in --hosts {text!r}. Add up its slots.")
    return hosts


def in_words(hosts: tuple[Host, ...]) -> str:
    """The inverse of `parse_hosts`, every slot written."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def _parse_host(part: str, whole: str) -> Host:
    name, _, slots = part.partition(":")
    if not _NAME.fullmatch(name) or (":" in part and not (slots.isdecimal() and int(slots) >= 1)):
        raise InputError(
            f"Expected --hosts as name:slots separated by commas, like h1:4,h2:4, received {part!r} in {whole!r}. "
            "A name is a host name or an IPv4 address; users and ports belong into ~/.ssh/config."
        )
    return Host(name, int(slots) if slots else 1)


def _refuse_no_name(name: str) -> None:
    if not _VARIABLE.fullmatch(name):
        shown = name.partition("=")[0]
        raise InputError(
            f"Expected the name of an environment variable for --env, received one that begins with {shown!r} and goes "
            "on. Values stay off command lines, where every user of the machine can read them: export the variable, "
            f"then pass --env {shown}."
            if "=" in name
            else f"Expected the name of an environment variable for --env, received {name!r}."
        )
