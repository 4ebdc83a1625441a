"""The one function that starts a launcher."""

import os
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
    try:
        os.execve(command.argv[0], list(command.argv), dict(command.environment))
    except OSError as error:
        raise RunError(f"Expected to start {command.argv[0]}, received {error}. Check that it is installed.") from error
