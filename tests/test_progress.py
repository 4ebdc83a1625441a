"""The progress line: pure formatting and timing with a clock of our own, then Keras' own callback list."""

import io

import numpy as np
import pytest

from distfit.errors import InputError
from distfit.monitor.progress import Board, Pace, format_logs, make_progress
from distfit.monitor.terminal import columns_of, live_here


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Screen(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self):
        return True


class Device:
    """A value that counts how often it is fetched."""

    fetched = 0

    def __array__(self, dtype=None, copy=None):
        type(self).fetched += 1
        return np.array(0.5, dtype)


def board(stream, clock, *, steps=4, epochs=2, verbose=1, records=40, validation_steps=None, live=True):
    pace = Pace(global_batch=10, records=records, steps=steps, clock=clock)
    shown = Board(pace, epochs, verbose, validation_steps, stream, live)
    shown.begin_training()
    return shown


def train(shown, clock, epoch=0, steps=4, seconds=1.0, logs=None):
    shown.begin_epoch(epoch)
    for step in range(1, steps + 1):
        clock.now += seconds
        shown.step(step, logs or {"loss": 1.0 / step})


def test_pace_leaves_the_first_step_out_of_speed_and_time_left():
    clock = Clock()
    pace = Pace(global_batch=10, records=38, steps=4, clock=clock)
    for done, seconds in ((1, 60.0), (2, 2.0), (3, 2.0)):
        clock.now += seconds
        pace.step(done)
    assert pace.records_per_second == 5.0
    assert pace.epoch_left == 2.0
    clock.now += 2.0
    pace.step(4)
    assert pace.records_per_second == pytest.approx(28 / 6)  # the last batch had 8 records


def test_pace_uses_the_first_step_while_there_is_no_other():
    clock = Clock()
    pace = Pace(global_batch=10, records=None, steps=3, clock=clock)
    clock.now += 5.0
    pace.step(1)
    assert (pace.records_per_second, pace.epoch_left, pace.run_left(1)) == (2.0, 10.0, 25.0)


def test_pace_without_a_batch_size_has_no_speed_but_a_time_left():
    clock = Clock()
    pace = Pace(global_batch=None, records=100, steps=3, clock=clock)
    clock.now += 5.0
    pace.step(1)
    assert (pace.records_per_second, pace.epoch_left) == (None, 10.0)


def test_a_step_is_done_when_the_device_has_done_it():
    clock = Clock()
    pace = Pace(global_batch=10, records=None, steps=3, clock=clock)
    pace.waited()
    assert (pace.steps_per_second, pace.records_per_second) == (None, None)
    for done in (1, 2, 3):
        clock.now += 1.0
        pace.step(done)
    assert pace.steps_per_second == 1.0
    clock.now += 2.0
    pace.waited()
    assert (pace.steps_per_second, pace.records_per_second) == (0.5, 5.0)


@pytest.mark.parametrize("validates", [True, False])
def test_the_epochs_speed_counts_until_its_metrics_are_read_and_no_further(validates):
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock, validation_steps=1)
    train(shown, clock)
    clock.now += 3.0  # the device is behind, and who reads the metrics waits for it
    if validates:
        shown.begin_pass("evaluating")
        clock.now += 50.0
        shown.end_pass({})
    shown.end_epoch({})
    assert stream.getvalue().splitlines()[-1].split(" - ")[3] == "5.0 records/s"


def test_pace_of_a_run_counts_on_the_finished_epochs():
    clock = Clock()
    pace = Pace(global_batch=10, records=None, steps=None, clock=clock)
    assert pace.run_left(3) is None
    for done in (1, 2):
        clock.now += 1.0
        pace.step(done)
    clock.now += 4.0  # validation
    pace.end()
    assert (pace.steps, pace.epochs_take(2)) == (2, 12.0)
    pace.begin()
    clock.now += 1.0
    pace.step(1)
    assert pace.run_left(1) == 1.0 + 6.0


@pytest.mark.parametrize("steps", [0, None, 3])
def test_an_empty_epoch_or_a_clock_that_stands_still_divides_by_nothing(steps):
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock, steps=steps, records=None)
    shown.begin_epoch(0)
    shown.end_epoch({})
    train(shown, clock, epoch=1, steps=3, seconds=0.0)
    shown.end_epoch({"loss": 1.0})
    assert stream.getvalue() == "epoch 1/2 - 0 steps - 0s\nepoch 2/2 - 3 steps - 0s - loss: 1.0000\n"


def test_a_pipe_gets_one_line_an_epoch_with_the_time_left():
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock)
    train(shown, clock)
    shown.end_epoch({"accuracy": 0.75, "loss": 0.25})
    shown.end_training()
    line = "epoch 1/2 - 4 steps - 4s - loss: 0.2500 - accuracy: 0.7500 - 10.0 records/s - run left 4s\n"
    assert stream.getvalue() == line


def test_a_long_epoch_gets_a_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    train(board(stream, clock, steps=8, records=80), clock, steps=8, seconds=4.0)
    assert stream.getvalue().split("\n") == [
        "epoch 1/2 - step 3/8 - left 20s (run 52s) - 2.5 records/s - loss: 0.3333",
        "epoch 1/2 - step 6/8 - left 8s (run 40s) - 2.5 records/s - loss: 0.1667",
        "",
    ]


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (1, 3), (2, 1)])
def test_verbose_chooses_what_is_shown(verbose, lines):
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock, verbose=verbose)
    train(shown, clock, seconds=6.0)
    shown.end_epoch({"loss": 0.5})
    assert stream.getvalue().count("\n") == lines


def test_validation_is_shown_and_leaves_no_line_of_its_own():
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock, validation_steps=3)
    train(shown, clock)
    shown.begin_pass("evaluating")
    for step in (1, 2, 3):
        clock.now += 6.0
        shown.pass_step(step, {"loss": 0.5})
    shown.step(4, {"loss": 9.0})  # late news of a training step
    shown.end_pass({"loss": 0.5})
    assert stream.getvalue() == "epoch 1/2 - validating 2/3 - loss: 0.5000\n"
    shown.end_epoch({"loss": 0.25, "val_loss": 0.5})
    assert "4 steps - 22s - loss: 0.2500 - val_loss: 0.5000 - 10.0 records/s" in stream.getvalue()


def test_evaluation_alone_leaves_one_line():
    stream, clock = io.StringIO(), Clock()
    shown = board(stream, clock, records=20, steps=2)
    shown.end_training()
    shown.begin_pass("evaluating")
    for step in (1, 2):
        clock.now += 1.0
        shown.pass_step(step, {})
    shown.end_pass({"loss": 0.5})
    assert stream.getvalue() == "evaluating - 2 steps - 2s - loss: 0.5000 - 10.0 records/s\n"


def test_values_are_fetched_only_for_lines_that_are_drawn():
    stream, clock = Screen(), Clock()
    shown = board(stream, clock, steps=1000)
    Device.fetched = 0
    train(shown, clock, steps=1000, seconds=1 / 64, logs={"loss": Device()})
    assert Device.fetched == 1000 / 64 * 4 // 1
    assert stream.getvalue().count("step 1000/1000") <= 1


def test_a_terminal_keeps_one_line_an_epoch(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream, clock = Screen(), Clock()
    shown = board(stream, clock)
    for epoch in (0, 1):
        train(shown, clock, epoch=epoch)
        shown.end_epoch({"loss": 0.25})
    shown.end_training()
    text = stream.getvalue()
    assert "step 0/4" in text
    assert "step 3/4 - left 1s (run 5s) - 10.0 records/s - loss: 0.3333" in text
    assert [text.count(f"epoch {epoch}/2 - 4 steps - 4s - loss: 0.2500") for epoch in (1, 2)] == [1, 1]
    hidden, shown_again = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert hidden < shown_again


def test_a_narrow_terminal_shows_all_of_the_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Screen(), Clock()
    train(board(stream, clock), clock, logs={"loss": 0.25, "accuracy": 0.5, "auc": 0.125})
    shown = stream.getvalue().split("\x1b[2K")[-1]
    assert "step 4/4" in shown
    assert "auc: 0.1250" in shown


@pytest.mark.parametrize(
    ("live", "terminal", "redrawn"),
    [(True, True, True), (True, False, False), (False, True, False), (120, False, True), (120, True, True)],
)
def test_a_line_is_redrawn_on_a_terminal_and_where_a_launcher_says_so(live, terminal, redrawn, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Screen() if terminal else io.StringIO(), Clock()
    shown = board(stream, clock, live=live)
    train(shown, clock, logs={"loss": 0.25, "accuracy": 0.5, "auc": 0.125})
    shown.end_epoch({})
    shown.end_training()
    assert ("\x1b[2K" in stream.getvalue()) is redrawn
    if live == 120:  # wide enough for one line, which is drawn again without a new one
        assert stream.getvalue().count("\n") <= 2


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_file_gets_no_control_characters_whatever_the_launcher_says(verbose, tmp_path):
    clock = Clock()
    with open(tmp_path / "log", "w") as file:
        shown = board(file, clock, verbose=verbose, live=120)
        train(shown, clock, seconds=6.0)
        shown.end_epoch({"loss": 0.5})
        shown.end_training()
    written = (tmp_path / "log").read_bytes()
    assert not {27, 13, 8} & set(written)
    assert written.count(b"\n") == {0: 0, 1: 3, 2: 1}[verbose]


def test_ranks_are_told_of_a_terminal_by_their_launcher():
    assert (live_here(1, {}), live_here(3, {}), live_here(3, {"DISTFIT_TERMINAL": "99"})) == (True, False, 99)
    for wrong in ("", "0", "wide"):
        with pytest.raises(InputError, match="DISTFIT_TERMINAL"):
            live_here(3, {"DISTFIT_TERMINAL": wrong})


def test_columns_are_those_of_a_terminal_that_can_redraw(monkeypatch):
    monkeypatch.setenv("COLUMNS", "132")
    assert columns_of(Screen(), {"TERM": "xterm"}) == columns_of(Screen(), {}) == 132
    assert columns_of(Screen(), {"TERM": "dumb"}) is None
    assert columns_of(io.StringIO(), {"TERM": "xterm"}) is None


def test_verbose_shows_as_much_as_keras_does(capsys):
    """Nothing at 0; at 2 a line for an epoch (above which Keras has a heading), an evaluation, a prediction."""
    keras = pytest.importorskip("keras")
    import distfit

    x, y = np.ones((8, 2), np.float32), np.ones((8, 1), np.float32)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    def lines(call, *given, **more):
        capsys.readouterr()
        call(*given, **more)
        return len(capsys.readouterr().out.replace("\r", "\n").split("\n")) - 1

    shown = {}
    for verbose in (0, 1, 2):
        ours = (distfit.fit, distfit.evaluate, distfit.predict)
        more = [{"epochs": 2, "validation_data": (x, y)}, {}, {}]
        given = [(x, y), (x, y), (x,)]
        shown[verbose] = [
            (lines(mine, model, *data, verbose=verbose, **options), lines(kerass, *data, verbose=verbose, **options))
            for mine, kerass, data, options in zip(
                ours, (model.fit, model.evaluate, model.predict), given, more, strict=True
            )
        ]
    assert shown[0] == [(0, 0)] * 3
    assert shown[2] == [(2, 4), (1, 1), (1, 1)]
    assert all(mine >= 1 and kerass >= 1 for mine, kerass in shown[1])


def test_loss_comes_first_and_arrays_are_averaged():
    assert format_logs({"b": 0.0, "a": [1.0, 2.0], "loss": 12.5}) == "loss: 12.5000 - b: 0.0000 - a: 1.5000"


def test_unknown_verbose_is_refused():
    with pytest.raises(InputError, match="0, 1, 2 or 'auto', received 'loud'"):
        make_progress(global_batch=1, records=1, steps=1, epochs=1, verbose="loud")


def test_keras_drives_it():
    keras = pytest.importorskip("keras")
    stream = io.StringIO()
    progress = make_progress(global_batch=10, records=None, steps=None, epochs=2, verbose="auto", stream=stream)
    callbacks = keras.callbacks.CallbackList([progress])
    assert progress.async_safe
    callbacks.on_train_begin()
    for epoch in (0, 1):
        callbacks.on_epoch_begin(epoch)
        for step in range(5):
            callbacks.on_train_batch_begin(step)
            callbacks.on_train_batch_end(step, {"loss": keras.ops.ones(()) / 4})
        callbacks.on_test_begin()
        callbacks.on_test_batch_end(0, {"loss": 0.5})
        callbacks.on_test_end({"loss": 0.5})
        callbacks.on_epoch_end(epoch, {"loss": 0.25, "val_loss": 0.5})
    callbacks.on_train_end()
    callbacks.on_predict_begin()
    callbacks.on_predict_batch_end(0, {"outputs": [[1.0]]})
    callbacks.on_predict_end()
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("epoch 1/2 - 5 steps - 0s - loss: 0.2500 - val_loss: 0.5000")
    assert second.startswith("epoch 2/2 - 5 steps - 0s - loss: 0.2500 - val_loss: 0.5000")
    assert third.startswith("predicting - 1 steps - 0s")
