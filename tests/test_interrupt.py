"""Ctrl-C ends a run also where Python raises it in a finalizer, whose exceptions it ignores."""

from __future__ import annotations

import signal
import weakref

import keras
import numpy as np
import pytest

import distfit


class InAFinalizer(keras.callbacks.Callback):
    """Presses Ctrl-C at the first step, where it gets lost."""

    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 1:
            gone = np.zeros(1)
            weakref.finalize(gone, signal.raise_signal, signal.SIGINT)
            del gone

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


CALLS = {
    "fit": lambda model, x, y, **more: distfit.fit(model, x, y, epochs=2, **more),
    "evaluate": distfit.evaluate,
    "predict": lambda model, x, y, **more: distfit.predict(model, x, **more),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_in_a_finalizer_ends_the_run_at_the_next_step(call):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    lost, before = InAFinalizer(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        CALLS[call](model, np.zeros((40, 2)), np.zeros((40, 1)), batch_size=4, verbose=0, callbacks=[lost])
    assert lost.steps == 1
    assert signal.getsignal(signal.SIGINT) is before
