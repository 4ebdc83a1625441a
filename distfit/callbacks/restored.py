"""What a restorer restores on the chief, on every rank.

    chosen = callbacks_of_rank(followed(given, session), session.is_chief, session.size)

keras.callbacks.BackupAndRestore reads a backup when a training begins and writes one after each epoch. It runs on the
chief, whose folder other hosts need not see; behind it, on every rank, stands a `Restored`, which hands out what the
chief has then: every variable of the model, its optimizer and its random streams, and the epoch to begin with. So the
callbacks that follow in the list see the restored model on all ranks, as they do in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import variables_of
from distfit.callbacks.policy import Policy, all_of, policy_of

if TYPE_CHECKING:
    from distfit.session import Session


class Restored(keras.callbacks.Callback):
    """Gives every rank what a restorer has just restored on the chief; collective.

    Args:
        session: how we reach the others.
        restorer: stands before this one in the chief's list.
    """

    def __init__(self, session: Session, restorer: Any) -> None:
        super().__init__()
        self._session = session
        self._restorer = restorer

    def on_train_begin(self, logs: Any = None) -> None:
        # A backup is deleted when its run has ended well: no folder, nothing restored. The first run has none yet.
        if self._session.from_chief(lambda: tf.io.gfile.exists(str(self._restorer.backup_dir))):
            self._share()

    def _share(self) -> None:
        """One variable at a time: an object of MPI ends at 2 GiB."""
        broadcast, is_chief = self._session.transport.broadcast, self._session.is_chief
        self.model._initial_epoch = broadcast(self.model._initial_epoch)
        for variable in variables_of(self.model):
            value = broadcast(variable.numpy() if is_chief else None)
            if not is_chief:
                variable.assign(value)


def followed(callbacks: Any, session: Session) -> list[Any]:
    """The callbacks, and behind each restorer one that shares what it restored.

    Args:
        callbacks: what keras.Model.fit takes.

    Raises:
        InputError: something in it is no callback.
    """
    return [one for callback in all_of(callbacks) for one in _with_follower(callback, session)]


def _with_follower(callback: Any, session: Session) -> list[Any]:
    shares = session.size > 1 and policy_of(callback) is Policy.RESTORER
    return [callback, Restored(session, callback)] if shares else [callback]
