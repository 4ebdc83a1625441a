"""The one function that starts a launcher."""

import os
import signal
import sys
from typing import NoReturn

from distfit.errors import RunError
from distfit.launchers.command import Command


def start(command: Command) -> NoReturn:
    """Become the launcher: this process is replaced, and never comes back.

    With nothing in between, Ctrl-C, SIGTERM and a closed terminal reach the launcher as if it had been typed, its
    exit code is the job's, and no parent is left that could end without its ranks.

    Raises:
        RunError: it does not start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these two, which what it becomes would inherit, down to the shell scripts that ranks may be.
    ignored = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        os.execve(command.argv[0], list(command.argv), dict(command.environment))
    except OSError as error:
        for number, before in ignored.items():
            signal.signal(number, before)
        raise RunError(f"Expected to start {command.argv[0]}, received {error}. Check that it is installed.") from error
