"""What the rest of distfit knows of the failure watch; `distfit.watch` has the synopsis."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

from distfit.watch.ending import leave
from distfit.watch.judge import at

_NOTHING = nullcontext()


class Watch(ABC):
    """One rank's watch.

    Attributes:
        position: where the loop is ("epoch 2, step 17"), for messages; set at every step, costs nothing.
    """

    position: str

    @abstractmethod
    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Hold this around anything collective; `what` names it in messages ("epoch 2, step 17").

        In a callback it begins when all ranks are about to make the same collective.

        Raises:
            RunError: in a callback that runs on the chief alone.
        """

    @abstractmethod
    def running(self, what: str = "training") -> AbstractContextManager[None]:
        """Hold this around a section that needs every rank; a rank that exits meanwhile ends the run.

        Collective in a callback, as `waiting` is. Afterwards section and position are those from before.
        """

    @abstractmethod
    def in_callback(self, name: str, everywhere: bool) -> AbstractContextManager[None]:
        """Hold this around each call of a callback's method.

        Args:
            name: class and method, for messages: "Probe.on_epoch_end".
            everywhere: every rank runs this callback; False where the chief alone does.
        """

    @abstractmethod
    def fail(self, error: BaseException, *, secondary: bool = False) -> NoReturn:
        """End the run because of an exception on this rank.

        Args:
            error: what was raised. With `error.agreed` every rank raises the same, the chief prints its
                message alone; otherwise this rank's traceback is the report.
            secondary: the error may only be the consequence of another rank's failure (a collective that was
                shut down); reported only if no cause arrives within two seconds.
        """

    def leave_at_once(self, why: str, code: int) -> NoReturn:
        """End all ranks now, wherever they are, with one line; from any thread.

        Args:
            why: begins the line: "interrupted again (Ctrl-C)".
            code: what they exit with.
        """
        leave(code, at_once_text(why, "", self.position, code))

    @abstractmethod
    def limit(self, stall_limit_s: float) -> None:
        """From now on a `waiting` of this rank may take so many seconds, > 0."""

    @abstractmethod
    def install_hooks(self) -> None:
        """From now on an exception that nobody catches ends all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave the watch: this rank ends normally. Also happens at the interpreter's exit."""


def at_once_text(why: str, who: str, position: str, code: int) -> str:
    """
    >>> at_once_text("preempted again (SIGTERM)", "rank 1 of 2 on host a", "epoch 1, step 3", 75)
    'distfit: preempted again (SIGTERM) on rank 1 of 2 on host a at epoch 1, step 3: ended at once; exit 75'
    """
    rank = f" on {who}" if who else ""
    return f"distfit: {why}{rank}{at(position)}: ended at once; exit {code}"


class NoWatch(Watch):
    """The watch of a single process: the same methods, and exceptions take their normal way."""

    def __init__(self) -> None:
        self.position = ""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Nobody is waited for."""
        return _NOTHING

    @contextmanager
    def running(self, what: str = "training") -> Iterator[None]:
        """Nobody can leave; only the position ends with the section, as with several ranks."""
        before = self.position
        yield
        self.position = before

    def in_callback(self, name: str, everywhere: bool) -> AbstractContextManager[None]:
        """The chief alone is every rank."""
        return _NOTHING

    def fail(self, error: BaseException, *, secondary: bool = False) -> NoReturn:
        """Raise it."""
        raise error

    def limit(self, stall_limit_s: float) -> None:
        """Nobody is waited for."""

    def install_hooks(self) -> None:
        """Python's own traceback is the report."""

    def close(self) -> None:
        """Nothing to leave."""
