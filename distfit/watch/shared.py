"""What watches of several ranks have in common: sections, waits, and collectives that callbacks call."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from distfit.errors import DistfitError, Ended
from distfit.watch.callbacks import InCallback, call_of, refuse_on_the_chief_alone
from distfit.watch.calls import Call
from distfit.watch.face import Watch
from distfit.watch.here import Here, Waiting


class SharedWatch(Watch):
    """See `Watch`.

    Args:
        here: what this rank is doing.
    """

    def __init__(self, here: Here) -> None:
        self._here = here

    @property
    def position(self) -> str:  # type: ignore[override]
        """Where the loop is, for messages."""
        return self._here.position

    @position.setter
    def position(self, position: str) -> None:
        self._here.position = position

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """See `Watch.waiting`; outside of callbacks assignments alone."""
        return Waiting(self._here, what) if self._here.callback is None else self._waiting_together(what)

    @contextmanager
    def running(self, what: str = "training") -> Iterator[None]:
        """See `Watch.running`; one message at each end."""
        here = self._here
        with self._agreed(what):
            outer, position = here.inside, here.position
            here.started, here.inside = here.started + 1, what
            self._section_changed()
            try:
                yield
            except BaseException as error:
                # An error that all ranks raise ends the section for all of them: nobody is missed in it. Any other
                # ends the run, and its report says where that was.
                if is_agreed(error):
                    self._complete(outer, position)
                raise
            else:
                self._complete(outer, position)
            finally:
                here.inside = outer
                self._section_changed()

    def in_callback(self, name: str, everywhere: bool) -> AbstractContextManager[None]:
        """See `Watch.in_callback`; assignments alone."""
        return InCallback(self._here, name, everywhere)

    @abstractmethod
    def _meet(self, call: Call) -> None:
        """Announce a call, and return when all ranks have announced the same."""

    @abstractmethod
    def _section_changed(self) -> None:
        """This rank has entered or left a section."""

    def _complete(self, outer: str, position: str) -> None:
        """A section has ended well. While another one is around it, nothing that others wait for is complete."""
        if not outer:
            self._here.done = self._here.started
        self._here.position = position

    @contextmanager
    def _waiting_together(self, what: str) -> Iterator[None]:
        with self._agreed(what), Waiting(self._here, what):
            yield

    @contextmanager
    def _agreed(self, what: str) -> Iterator[None]:
        """Around what a callback makes all ranks do: it begins when all of them are about to; what is collective
        inside of it is so by itself. Outside of callbacks nothing is asked."""
        here, callback = self._here, self._here.callback
        if callback is None:
            yield
            return
        refuse_on_the_chief_alone(here)
        here.call = call = call_of(here, what)
        try:
            with Waiting(here, str(call)):
                self._meet(call)
        finally:
            here.call = None
        here.callback = None
        try:
            yield
        finally:
            here.callback = callback


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises this error at the same point."""
    return isinstance(error, DistfitError | Ended) and error.agreed
