"""Two hosts on one machine, for tests: network namespaces h1 and h2 with a cable between them.

    with two_hosts(tmp_path) as hosts:
        done = hosts.run("h1", ["mpirun", "-H", "h1:1,h2:1", ...], environment())

Each has its own host name, addresses, /etc/hosts and TMPDIR, without which MPI's ranks take each other for
neighbours; files are shared, as on a cluster. In place of ssh there is a script of that name first on PATH. As a
real login does, it starts with an environment of its own, so that what ranks need has to be passed to them.
Whoever may not make namespaces gets a skipped test with the reason.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import Job

NAMES = ("h1", "h2")
INTERFACE = "e0"
# Private addresses, and only inside the two namespaces.
ADDRESSES = {"h1": "192.168.77.1", "h2": "192.168.77.2"}

# Entering a host: its network, its name, its hosts file; then whatever the caller says.
_ENTER = """\
exec ip netns exec {namespace} unshare --uts --mount sh -c '
hostname "$0" && mount --bind {hosts_file} /etc/hosts && export TMPDIR={scratch}/"$0" && exec "$@"' {name} "$@"
"""

# `ssh [options] HOST WORD...`: the words are joined and given to a shell, in the login's own environment.
_SSH = """\
#!/bin/sh
echo "$@" >> {scratch}/ssh.log
while :; do case $1 in -o|-p|-i|-l) shift 2 ;; -*) shift ;; *) break ;; esac; done
host=$1; shift
if [ "$1" = -o ]; then shift 2; fi
exec env -i HOME="$HOME" USER=somebody PATH=/usr/bin:/bin:/usr/sbin:/sbin {scratch}/enter-"$host" sh -c "$*"
"""


@dataclass(frozen=True)
class TwoHosts:
    """Where the scripts are that enter h1 and h2."""

    scratch: Path

    @property
    def ssh_log(self) -> str:
        """The arguments of every call of ssh, a line each."""
        log = self.scratch / "ssh.log"
        return log.read_text() if log.exists() else ""

    def run(self, host: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path, limit_s: float = 150) -> Job:
        """Run a program on a host as a user there would, with the stand-in for ssh first on PATH."""
        started = time.monotonic()
        process = subprocess.Popen(
            [str(self.scratch / f"enter-{host}"), *argv],
            env={**env, "PATH": f"{self.scratch}{os.pathsep}{env['PATH']}"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end_all(self._namespaces)
            output, errors = process.communicate(timeout=10)
            job = Job(list(argv), -1, output, errors, time.monotonic() - started)
            pytest.fail(f"The job hung: killed after {limit_s} s.\n{job.report()}", pytrace=False)
        return Job(list(argv), process.returncode, output, errors, time.monotonic() - started)

    @property
    def _namespaces(self) -> list[str]:
        return [_namespace(name) for name in NAMES]


@contextmanager
def two_hosts(scratch: Path) -> Iterator[TwoHosts]:
    """Two connected hosts, gone afterwards with everything that ran in them."""
    _skip_unless_permitted()
    namespaces = [_namespace(name) for name in NAMES]
    try:
        _connect(*namespaces)
        yield _with_scripts(scratch)
    finally:
        _end_all(namespaces)
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def _namespace(name: str) -> str:
    return f"distfit-{os.getpid()}-{name}"


def _skip_unless_permitted() -> None:
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"two hosts need network namespaces, and {program} is not installed")
    name = _namespace("try")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"two hosts need network namespaces, which are not permitted here: {made.stderr.strip()}")
    entered = subprocess.run(
        ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    if entered.returncode:
        pytest.skip(f"two hosts need namespaces of their own, which are not permitted here: {entered.stderr.strip()}")


def _connect(first: str, second: str) -> None:
    commands = [f"ip netns add {namespace}" for namespace in (first, second)]
    commands += [f"ip link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}"]
    for namespace, address in zip((first, second), ADDRESSES.values(), strict=True):
        commands += [
            f"ip -n {namespace} address add {address}/24 dev {INTERFACE}",
            f"ip -n {namespace} link set {INTERFACE} up",
            f"ip -n {namespace} link set lo up",
        ]
    for command in commands:
        subprocess.run(command.split(), check=True, timeout=20)


def _with_scripts(scratch: Path) -> TwoHosts:
    hosts_file = scratch / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
    hosts_file.write_text("\n".join(lines) + "\n")
    for name in NAMES:
        (scratch / name).mkdir()
        words = {"namespace": _namespace(name), "hosts_file": hosts_file, "scratch": scratch, "name": name}
        enter = _ENTER.format(**{key: shlex.quote(str(word)) for key, word in words.items()})
        _script(scratch / f"enter-{name}", f"#!/bin/sh\n{enter}")
    _script(scratch / "ssh", _SSH.format(scratch=shlex.quote(str(scratch))))
    return TwoHosts(scratch)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _end_all(namespaces: list[str]) -> None:
    """Kill until nobody is left: what is started between the listing and the killing is in the next listing."""
    deadline = time.monotonic() + 10
    while (left := [pid for namespace in namespaces for pid in _inside(namespace)]) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _inside(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]
