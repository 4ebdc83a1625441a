"""What the loop asks of a training's keeper, for one that keeps no state: nothing is saved, Ctrl-C ends it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from distfit.callbacks.saver import ModelSaver
from distfit.checkpoint.place import BEGINNING, Moment, Place
from distfit.training.interrupt import Interrupt
from distfit.training.wishes import Wishes


class NotKept:
    """The interface of `keeper.Keeper`, which does nothing.

    Attributes:
        interrupt: hears signals.
        seed: of the run that goes on; None for one that begins.
        folder: of the run; None where nothing is kept.
        saver: writes its model; None for nobody.
        began: the epoch that the run began with, and
        ranks: how many it had where it goes on from; None where it does not go on.
    """

    folder: Path | None = None
    saver: ModelSaver | None = None
    began: int | None = None
    ranks: int | None = None

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.seed: int | None = None

    def compare(self, now: Callable[[], Mapping[str, str]]) -> None:
        """Refuse a run that is another one."""

    def restored(self, model: Any, first_epoch: int) -> tuple[Place, Moment]:
        """Where the training begins, or goes on."""
        return Place(first_epoch, 0, 0), BEGINNING

    def beginning(self, callbacks: Sequence[Any], data: Any) -> AbstractContextManager[None]:
        """Around `on_train_begin`."""
        return nullcontext()

    def arrived(self) -> None:
        """The data are where the training begins, or goes on."""

    def wishes(self, stop: bool) -> Wishes:
        """What this rank wants of all, before a step."""
        return Wishes(stop=bool(stop))

    def agreed(self, wishes: Wishes) -> None:
        """What all ranks want, as a step has said it."""

    def after_step(self, place: Place, moment: Callable[[], Moment]) -> None:
        """Between two steps at which no gradients wait to be applied."""

    def before_validation(self, place: Place, moment: Callable[[], Moment]) -> None:
        """After the last step of an epoch."""

    def in_validation(self) -> None:
        """Between two steps of a validation."""

    def after_epoch(self, place: Place, logs: Mapping[str, Any]) -> None:
        """At the beginning of the next epoch."""

    def at_end(self, place: Place) -> None:
        """After the last epoch, before callbacks hear of the end."""
