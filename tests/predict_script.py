"""A rank of tests/test_predict.py: predictions gathered everywhere, on the chief and on disk, by real processes."""

from __future__ import annotations

import os
import signal
import sys

import keras
import numpy as np

import distfit
from distfit.training import predicting
from tests.test_predict import ROWS, predicted, same


class Dies(keras.callbacks.Callback):
    """The last rank is killed while the chief has written some rows."""

    def on_predict_batch_end(self, batch, logs=None):
        session = distfit.init()
        if batch == 3 and session.rank == session.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, how):
    # Chunks of one step, so that there are many.
    predicting.CHUNK_BYTES = 1
    if how == "killed":
        predicted(to=folder, callbacks=[Dies()])
    session = distfit.init()
    expected = predicted()
    on_chief = predicted(gather="chief")
    on_disk = predicted(to=folder)
    if session.is_chief:
        same(on_chief, expected)
        same(np.array(on_disk), expected)
    else:
        assert on_chief is None
        assert on_disk is None
        assert expected.shape == (ROWS, 3)
    # It is there for everybody when anybody's call returns.
    np.testing.assert_array_equal(np.load(f"{folder}/output.npy"), expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
