"""What can go wrong, as exceptions that a person can act on.

Every message is one paragraph: what was expected, what was received, what to do. `InputError` is raised
before training starts and ends every rank with the same exit code; `RunError` is raised when a run that
had started cannot go on. `Ended` is no error: all ranks leave because somebody asked them to.
"""

INPUT_EXIT_CODE = 2
RUN_EXIT_CODE = 1
# EX_TEMPFAIL of sysexits.h: "the user is invited to retry". Batch scripts put the job back into the queue.
PREEMPTED_EXIT_CODE = 75
INTERRUPTED_EXIT_CODE = 130  # what a shell reports after Ctrl-C


class DistfitError(Exception):
    """Base of all errors that distfit raises on purpose.

    Attributes:
        exit_code: what the process exits with when nobody catches it.
        agreed: True when every rank raises this same error at the same point, so that the chief alone
            prints it and nobody needs to be stopped.
    """

    exit_code = RUN_EXIT_CODE
    agreed = False


class InputError(DistfitError, ValueError):
    """The user's input cannot work; refused before training starts, nothing written."""

    exit_code = INPUT_EXIT_CODE


class RunError(DistfitError, RuntimeError):
    """A run that had started cannot go on."""


class Ended(SystemExit):
    """All ranks end at the same step, because somebody asked for it; Python leaves without a word.

    Attributes:
        code: what the process exits with.
        agreed: True, as of errors that all ranks raise: nobody is missed.
    """

    code: int
    agreed = True


class Preempted(Ended):
    """The machine is needed for something else (SIGTERM, SIGUSR1); the same command goes on later."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)


class Interrupted(Ended):
    """A person has pressed Ctrl-C."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)


def on_every_rank(error: DistfitError) -> DistfitError:
    """Mark an error that every rank raises at the same point, from facts that all of them share."""
    error.agreed = True
    return error


def nearest(word: str, known: list[str]) -> str:
    """The end of an error message about an unknown name.

    >>> nearest("bach_size", ["batch_size", "epochs"])
    "did you mean 'batch_size'?"
    >>> nearest("zzz", ["batch_size", "epochs"])
    'known are batch_size, epochs.'
    """
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
