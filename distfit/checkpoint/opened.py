"""A run's folder in the chief's hands: nobody else writes there meanwhile, and what an earlier run has left is found.

with opened(session, options, resume=True) as run:
    run.found                      # on every rank: what the run goes on from; None for a beginning
    run.checkpoints, run.tensors   # on the chief
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distfit.callbacks.saver import MODEL_FILE
from distfit.checkpoint.folder import LATEST, Checkpoints, Damaged, Newer, Stored
from distfit.checkpoint.lock import RunLock
from distfit.checkpoint.options import Checkpoint
from distfit.checkpoint.place import Place
from distfit.errors import Ended, InputError
from distfit.log import say, warn_once

if TYPE_CHECKING:
    from distfit.session import Session

# The lock's owner shows that it lives, and how far it is.
_HEARTBEAT_S = 10.0


@dataclass(frozen=True)
class Found:
    """What a run goes on from, on every rank.

    Args:
        name: of the checkpoint's folder.
        facts: as they were saved.
        lost: steps after it that the run had begun, as far as is known; None where it is not.
    """

    name: str
    facts: Mapping[str, Any]
    lost: int | None = None


class Opened:
    """See the module.

    Attributes:
        found: what there is to go on from.
        checkpoints: the folder; on the chief.
        tensors: of the checkpoint, until they are on all replicas; on the chief.
        step: the run's newest, which the lock tells.
    """

    def __init__(self, session: Session, found: Found | None, hands: _Hands | None) -> None:
        self._session = session
        self.found = found
        self._hands = hands
        self.tensors: Mapping[str, np.ndarray] | None = None if hands is None else hands.tensors

    @property
    def checkpoints(self) -> Checkpoints:
        assert self._hands is not None, "the chief's alone"
        return self._hands.checkpoints

    def sentence(self, place: Place, over: bool, stopped: bool) -> str:
        """What a person is told of a run that goes on.

        Args:
            over: it has had its epochs.
            stopped: a callback has ended it.
        """
        assert self.found is not None
        name, lost = self.found.name, self.found.lost
        if over:
            return f"distfit: the run has had its epochs; it ended {place.behind} ({name})."
        if stopped:
            return (
                f"distfit: a callback stopped the run {place.behind} ({name}): nothing is trained. It goes on with "
                "other callbacks and allow=['callbacks']."
            )
        again = f" {lost} steps after it were lost and are trained again." if lost else ""
        return f"distfit: going on from {place} ({name}).{again}"

    def forget(self) -> None:
        """What has been restored takes no memory any more."""
        self.tensors = None
        if self._hands is not None:
            self._hands.tensors = {}

    def begin(self) -> None:
        """From now on the folder is written to, by this run alone. Collective.

        Raises:
            InputError: another run works there, or it cannot be written; on every rank.
        """
        self._session.from_chief(lambda: None if self._hands is None else self._hands.begin())

    def at(self, step: int) -> None:
        """The run has come to this step."""
        if self._hands is not None:
            self._hands.at(step)


@contextmanager
def opened(session: Session, options: Checkpoint, resume: bool) -> Iterator[Opened]:
    """Collective. Nothing is written before `Opened.begin`, but for the lock of a folder that has a run.

    Raises:
        InputError: another run works there, or its checkpoints are all damaged; on every rank.
    """
    with ExitStack() as stack:
        hands = stack.enter_context(_Hands(options.path, resume)) if session.is_chief else None
        found = session.from_chief(lambda: None if hands is None else hands.look())
        yield Opened(session, found, hands)


class _Hands:
    """What the chief alone does with the folder."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self._folder, self._resume = folder, resume
        self._lock = RunLock(folder, "distfit.fit")
        self._locked = self._begun = False
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="distfit-lock")
        self.checkpoints = Checkpoints(folder)
        self.tensors: Mapping[str, np.ndarray] = {}
        self.step = 0

    def __enter__(self) -> _Hands:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._begun:
            self._ended.set()
            self._heart.join()
        if self._locked:
            ended_well = error is None or isinstance(error, Ended)
            self._lock.release(None if self._begun and ended_well else self._left())

    def _left(self) -> Mapping[str, Any] | None:
        """What the next run should know of one that did not end well, or did not begin."""
        return {"step": self.step} if self._begun else self._lock.left

    def at(self, step: int) -> None:
        self.step = step
        self._lock.at(step)

    def look(self) -> Found | None:
        """What there is to go on from."""
        if not self.checkpoints.entries() and not self.checkpoints.replaced():
            return None
        self._take()
        if not self._resume:
            return None
        self.checkpoints.put_back()
        stored, damaged = self.checkpoints.newest()
        self._refuse_unreadable(stored, damaged)
        for one in damaged:
            say(f"distfit: {one}; the checkpoint before it is used.")
        if stored is None:
            return None
        self.tensors, self.step = stored.tensors, stored.step
        reached = (self._lock.left or {}).get("step")
        lost = max(0, reached - stored.step) if isinstance(reached, int) else None
        return Found(stored.path.name, stored.facts, lost)

    def begin(self) -> None:
        """Make the folder this run's."""
        _make(self._folder)
        if not self._locked:
            self._take()
            if self.checkpoints.entries():
                raise InputError(
                    f"Expected to begin a run in {self._folder}, received checkpoints that another one has saved there "
                    "meanwhile. Start one of the two with another folder."
                )
        if not self._resume:
            self._put_aside()
        self.checkpoints.clean()
        self._beat_once()
        self._begun = True
        self._heart.start()

    def _take(self) -> None:
        self._lock.acquire()
        self._locked = True

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S):
            self._beat_once()

    def _beat_once(self) -> None:
        try:
            self._lock.touch(step=self.step)
        except OSError as error:  # the next save says what is wrong with the folder
            warn_once(f"the lock of {self._folder} could not be renewed: {error.strerror or error}.")

    def _refuse_unreadable(self, stored: Stored | None, damaged: Sequence[Damaged]) -> None:
        newer = next((one for one in damaged if isinstance(one, Newer)), None)
        if newer is not None:  # to go back to an older one would throw away what is whole
            raise InputError(
                f"Expected checkpoints that this version of distfit can read, received {newer.path}: {newer.why}. "
                "Nothing was changed."
            )
        if stored is None and damaged:
            named = "; ".join(str(one) for one in damaged)
            raise InputError(
                f"Expected a whole checkpoint in {self._folder} to go on from, received damaged ones only: {named}. "
                "Nothing was changed. Restore the folder from a copy, choose another one, or begin anew with "
                "resume=False."
            )

    def _put_aside(self) -> None:
        """An earlier run's, where nobody takes them for this one's."""
        names = (LATEST, MODEL_FILE)
        others = [path for name in names if (path := self._folder / name).exists()]
        earlier = [*(entry.path for entry in self.checkpoints.entries()), *others]
        if not earlier:
            return
        aside = next(path for n in itertools.count(1) if not (path := self._folder / f"earlier-{n}").exists())
        aside.mkdir()
        for path in earlier:
            os.replace(path, aside / path.name)
        say(f"distfit: {self._folder} had checkpoints of an earlier run, which are in {aside} now.")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Expected to be able to write to the folder {folder}, received: {error.strerror or error}. Choose another "
            "folder or correct its permissions."
        ) from error
