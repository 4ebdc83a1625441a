"""`horovodrun`, made fit to be started by others.

    python -m distfit.launchers.horovodrun_program -np 2 -H h1:1,h2:1 --gloo python train.py

It is Horovod 0.28.1's own program, with four differences:

- ssh checks host keys as it is configured. Horovod calls `ssh -o PasswordAuthentication=no
  -o StrictHostKeyChecking=no`, so it connects to whatever answers in a host's place, and has no option against it.
  Here it is `ssh -o BatchMode=yes`: a host that is not known yet, or needs a password, is an error that says so
  instead of a question that nobody sees.
- a job that ends with an error is Horovod's sentence, without the traceback of its launcher, and the exit code of
  the rank that failed first.
- one that was interrupted ends with 128 + the signal. Horovod's own code is then 0 or 1, as it happens.
- SIGUSR1 and SIGUSR2 are passed on, as mpirun does it: to the ranks of this machine, which tell the others. With
  `--mpi`, Horovod becomes a shell, which would die of them, around mpirun; here it becomes mpirun. (SIGINT and SIGTERM
  leave ranks of Gloo no time: Horovod kills them after five seconds, stopped, SIGSTOP, before they hear of it.)
"""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psutil

_AS_CONFIGURED = "ssh -o BatchMode=yes"
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
_become = os.execve
# Set for each rank, and for what a rank starts.
_OF_A_RANK = "HOROVOD_RANK"


def main() -> None:
    """Horovod's own main function."""
    from horovod.runner import launch
    from horovod.runner.util import remote

    if "StrictHostKeyChecking=no" not in getattr(remote, "SSH_COMMAND_PREFIX", ""):
        sys.exit(
            "distfit: error: Expected Horovod 0.28.1, whose horovod.runner.util.remote.SSH_COMMAND_PREFIX switches off "
            "ssh's check of host keys, found one that has it elsewhere. Type: distfit horovod install"
        )
    remote.SSH_COMMAND_PREFIX = _AS_CONFIGURED
    os.execve = without_shell  # type: ignore[assignment]  # which Horovod calls to start mpirun, and nothing else
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    came, signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(signals)  # Horovod replaces the handlers; Python still notes each signal here
    code = 0
    try:
        launch.run_commandline()
    except RuntimeError as error:
        print(f"horovodrun: {error}".strip(), file=sys.stderr, flush=True)
        code = exit_code(str(error))
    os.write(signals, b"\0")  # so that there is something to read
    stopped = [number for number in os.read(came, 4096) if number in (signal.SIGINT, signal.SIGTERM)]
    sys.exit(128 + stopped[0] if stopped else code)


def pass_on(number: int, frame: FrameType | None = None) -> None:
    """Send a signal to the ranks that run here."""
    import psutil

    ranks = {process.pid: process for process in psutil.Process().children(recursive=True) if _is_of_a_rank(process)}
    for process in ranks.values():
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in ranks:  # a rank's own children have its environment
                process.send_signal(number)


def _is_of_a_rank(process: "psutil.Process") -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return _OF_A_RANK in process.environ()
    return False


def without_shell(path: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """os.execve, where a shell with a command for one program becomes that program."""
    shell, option, line = arguments
    _become(path, [shell, option, f"exec {line}"], environment)


def exit_code(told: str) -> int:
    """The code of the rank that failed first, from what Horovod says about it; 1 where it does not say.

    >>> exit_code("The first process to do so was: Process name: 1 Exit code: 137"), exit_code("could not connect")
    (137, 1)
    """
    found = re.search(r"Exit code: (\d+)", told)
    return int(found[1]) if found else 1


# horovodrun starts helper processes, which import this module again.
if __name__ == "__main__":
    main()
