"""Signals that ask a run to end: what is noted, what ends at once, and whose handlers stay as they are."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import distfit
from distfit import thread_ranks
from distfit.errors import Interrupted, Preempted
from distfit.training import interrupt
from distfit.training.interrupt import Interrupt, Wanted, ended

ASKED = {
    signal.SIGTERM: (Wanted.PREEMPTED, "SIGTERM"),
    signal.SIGUSR1: (Wanted.PREEMPTED, "SIGUSR1"),
    signal.SIGINT: (Wanted.INTERRUPTED, "Ctrl-C"),
}


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


# --- runs that keep checkpoints


def in_a_child(tmp_path, does):
    """What a forked process that does something leaves with: exit code (negative: the signal), standard error."""
    child = os.fork()
    if child == 0:
        try:
            errors = os.open(tmp_path / "errors", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(errors, 2)
            sys.stderr = os.fdopen(2, "w")  # in place of pytest's
            does()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (tmp_path / "errors").read_text()


def tell(number):
    os.kill(os.getpid(), number)


def until_noted(interrupt):
    deadline = time.monotonic() + 20
    while interrupt.pending is None and time.monotonic() < deadline:
        time.sleep(0.01)


def busy_in_native_code():
    """Seconds in which Python calls no handler."""
    hashlib.pbkdf2_hmac("sha512", b"", b"", 30_000_000)


@pytest.mark.parametrize("number", ASKED)
def test_a_run_that_keeps_checkpoints_notes_the_first_signal_and_goes_on(number):
    before = [signal.getsignal(each) for each in ASKED]
    with Interrupt(keeps=True).heard() as heard:
        assert (heard.pending, heard.came) == (None, "")
        tell(number)
        until_noted(heard)
        assert (heard.pending, heard.came) == ASKED[number]
        heard.check()
    assert [signal.getsignal(each) for each in ASKED] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_same_wish_told_twice_at_once_is_one(tmp_path):
    """As `timeout` and systemd do it, which tell a process and its group."""
    with Interrupt(keeps=True).heard() as heard:
        for _ in range(3):
            tell(signal.SIGTERM)
            until_noted(heard)
    assert heard.came == "SIGTERM"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "distfit: preempted again (SIGTERM): ended at once; exit 75\n"),
        (signal.SIGINT, 130, "distfit: interrupted again (Ctrl-C): ended at once; exit 130\n"),
    ],
)
@pytest.mark.parametrize("taken", [False, True])
def test_a_second_signal_ends_the_process_at_once_with_one_line(tmp_path, number, code, said, taken):
    def told_twice():
        if taken:  # by an event loop, say: then the main thread counts
            _, other = os.pipe2(os.O_NONBLOCK)
            signal.set_wakeup_fd(other)
        with Interrupt(keeps=True).heard() as heard:
            tell(signal.SIGUSR1)
            until_noted(heard)
            pid = os.getpid()
            threading.Timer(0.7, lambda: os.kill(pid, number)).start()
            time.sleep(20) if taken else busy_in_native_code()

    began = time.monotonic()
    assert in_a_child(tmp_path, told_twice) == (code, said)
    assert time.monotonic() - began < 10


def test_who_handles_a_signal_already_keeps_it_and_that_is_said_once(monkeypatch):
    said, came = [], []
    monkeypatch.setattr(interrupt.log, "warn_once", said.append)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        with Interrupt(keeps=True).heard() as heard, Interrupt(keeps=True).heard():
            tell(signal.SIGUSR1)
            time.sleep(0.05)
            assert heard.pending is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]
    assert set(said) == {
        "SIGUSR1 is handled by somebody else in this process, who keeps on doing so: training does not save and end "
        "on it."
    }


def test_native_handlers_are_somebody_elses_too(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt.log, "warn_once", lambda text: os.write(2, text.encode()))

    def dumps():
        faulthandler.register(signal.SIGUSR1, file=2)
        with Interrupt(keeps=True).heard() as heard:
            tell(signal.SIGUSR1)
            time.sleep(0.05)
            os._exit(0 if heard.pending is None else 1)

    code, said = in_a_child(tmp_path, dumps)
    assert code == 0
    assert "SIGUSR1 is handled by somebody else" in said
    assert "most recent call first" in said


def test_signals_to_a_forked_child_are_its_own(tmp_path):
    with Interrupt(keeps=True).heard() as heard:
        code, said = in_a_child(tmp_path, lambda: (tell(signal.SIGTERM), time.sleep(20)))
        assert (code, said) == (-signal.SIGTERM, "")
        time.sleep(0.05)
        assert heard.pending is None


def test_outside_of_the_main_thread_nothing_is_heard_and_nothing_breaks():
    seen = []

    def elsewhere():
        with Interrupt(keeps=True).heard() as heard:
            seen.append((heard.pending, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, signal.SIG_DFL)]


def test_ctrl_c_may_travel_as_another_signal(monkeypatch):
    """mpirun cannot forward SIGINT; `distfit launch` says which signal stands for it."""
    monkeypatch.setenv("DISTFIT_CTRL_C", "SIGUSR2")
    with Interrupt(keeps=True).heard() as heard:
        tell(signal.SIGUSR2)
        until_noted(heard)
    assert (heard.pending, heard.came) == (Wanted.INTERRUPTED, "Ctrl-C")
    with pytest.raises(KeyboardInterrupt), Interrupt().heard():
        signal.raise_signal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_without_checkpoints_sigterm_and_sigusr1_stay_as_they_are():
    with Interrupt().heard():
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


# --- the end that all ranks share


@pytest.mark.parametrize(
    ("heard", "kind", "line"),
    [
        (
            [(None, ""), (Wanted.PREEMPTED, "SIGTERM")],
            Preempted,
            "distfit: preempted (SIGTERM on rank 1) at epoch 3, step 17: checkpoint a is saved; exit 75",
        ),
        (
            [(Wanted.PREEMPTED, "SIGUSR1"), (Wanted.INTERRUPTED, "Ctrl-C")],
            Interrupted,
            "distfit: interrupted (SIGUSR1 on rank 0, Ctrl-C on rank 1) at epoch 3, step 17: checkpoint a is saved; "
            "exit 130",
        ),
    ],
)
def test_all_ranks_end_alike_and_one_line_says_why(heard, kind, line, monkeypatch):
    said = []
    monkeypatch.setattr(interrupt.log, "say", said.append)
    monkeypatch.setattr(interrupt._at_exit, "code", 0)

    def rank():
        session = distfit.init()
        pending, came = heard[session.rank]
        own = SimpleNamespace(pending=pending, came=came)
        return ended(session, own, "epoch 3, step 17", "checkpoint a is saved")

    errors = thread_ranks.run(rank, ranks=2)
    assert [(type(error), error.code, error.agreed) for error in errors] == [(kind, kind().code, True)] * 2
    assert set(said) == {line}


def test_when_all_is_saved_another_signal_ends_the_process_without_a_word(tmp_path):
    def leaves():
        interrupt._at_exit.code = 75
        with suppress(Preempted), Interrupt(keeps=True).heard():
            raise Preempted
        tell(signal.SIGTERM)
        time.sleep(20)

    assert in_a_child(tmp_path, leaves) == (75, "")


def test_a_rank_that_is_about_to_leave_does_not_die_of_its_launcher(tmp_path):
    def leaves():
        interrupt._at_exit.code = 75
        interrupt._at_exit.ignore()
        for number in ASKED:
            tell(number)
        os._exit(75)

    assert in_a_child(tmp_path, leaves) == (75, "")
