"""The progress line: epoch, step, loss, metrics, records/s and the time left, on the chief.

    progress = make_progress(
        global_batch=64, records=50_000, steps=782, epochs=10, validation_steps=157, verbose="auto"
    )                                   # a keras.callbacks.Callback

On a terminal one line (two where it is narrow) is redrawn at most four times a second and each epoch leaves
one summary line; in a pipe or a log file there are plain lines: one every ten seconds and one at the end of
each epoch. Values are turned into floats only when a line is drawn, so that the device is not asked at every
step.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np

from distfit.errors import InputError
from distfit.monitor.terminal import redraws

_REDRAW_S = 0.25
_PLAIN_LINE_S = 10.0

Logs = Mapping[str, Any]


def make_progress(
    *,
    global_batch: int | None,
    records: int | None,
    steps: int | None,
    epochs: int,
    verbose: int | str = "auto",
    validation_steps: int | None = None,
    stream: TextIO | None = None,
    live: bool | int = True,
) -> Any:
    """A `keras.callbacks.Callback` that shows how training, evaluation or prediction goes.

    Args:
        global_batch: records of one step over all replicas; None when unknown.
        records: records of one epoch; None when unknown.
        steps: steps of one epoch, or of an evaluation or prediction; None when unknown.
        epochs: the number of the last epoch, for "epoch 3/10".
        verbose: 0 shows nothing, 1 everything, 2 only the line that ends an epoch; "auto" is 1.
        validation_steps: steps of one validation; None when unknown.
        stream: where to write; standard output by default, as Keras does.
        live: True redraws one line where `stream` is a terminal, False never does; a number says that it ends at a
            terminal of so many columns, whatever it looks like from here. See `distfit.monitor.terminal`.

    Raises:
        InputError: `verbose` is something else.
    """
    import keras

    pace = Pace(global_batch, records, steps)
    board = Board(pace, epochs, _checked(verbose), validation_steps, stream or sys.stdout, live)

    class Progress(keras.callbacks.Callback):
        """Passes Keras' events on to a `Board`."""

        async_safe = True  # no reason for Keras to make the other callbacks wait for the device
        reads_batch_logs = verbose in (1, "auto")  # of distfit.callbacks.listening: they stand in lines of an epoch

        def on_train_begin(self, logs: Logs | None = None) -> None:
            board.begin_training()

        def on_train_end(self, logs: Logs | None = None) -> None:
            board.end_training()

        def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
            board.begin_epoch(epoch)

        def on_epoch_resumed(self, epoch: int, step: int) -> None:  # of distfit.callbacks.listening
            board.begin_epoch(epoch, step)

        def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
            board.step(batch + 1, logs or {})

        def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
            board.end_epoch(logs or {})

        def on_test_begin(self, logs: Logs | None = None) -> None:
            board.begin_pass("evaluating")

        def on_test_batch_end(self, batch: int, logs: Logs | None = None) -> None:
            board.pass_step(batch + 1, logs or {})

        def on_test_end(self, logs: Logs | None = None) -> None:
            board.end_pass(logs or {})

        def on_predict_begin(self, logs: Logs | None = None) -> None:
            board.begin_pass("predicting")

        def on_predict_batch_end(self, batch: int, logs: Logs | None = None) -> None:
            board.pass_step(batch + 1, {})  # the logs are the predictions

        def on_predict_end(self, logs: Logs | None = None) -> None:
            board.end_pass({})

    return Progress()


def _checked(verbose: int | str) -> int:
    if verbose not in (0, 1, 2, "auto"):
        raise InputError(f"Expected verbose to be 0, 1, 2 or 'auto', received {verbose!r}.")
    return 1 if verbose == "auto" else int(verbose)


class Pace:
    """Counts steps against the clock; knows the speed and the time left.

    Args:
        global_batch: records of a full step; None when unknown, then there is no speed.
        records: records of one epoch; None when unknown.
        steps: steps of one epoch; None when unknown.
        clock: seconds, steady.
    """

    def __init__(
        self,
        global_batch: int | None,
        records: int | None,
        steps: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.steps = clock, steps
        self._global_batch, self._records = global_batch, records
        self._epoch_seconds: list[float] = []
        self.begin()

    def begin(self, done: int = 0, measured: tuple[int, float] | None = None) -> None:
        """An epoch starts, or goes on in another process.

        Args:
            done: steps of it that have run.
            measured: what `measured` was then; None counts the steps of this process.
        """
        self.done = done
        self._from, seconds = measured or (done, 0.0)
        self._start = self.clock() - seconds
        self._first: tuple[int, float] | None = None  # step and time after the first one, which compiles
        self._last = self.clock()

    def step(self, done: int) -> None:
        """`done` steps of the epoch are done; late news of an earlier step changes nothing."""
        if done > self.done:
            self.done, self._last = done, self.clock()
            self._first = self._first or (done, self._last)

    def waited(self) -> None:
        """The device has done the steps that were begun: the metrics of the epoch have been read."""
        if self.done:
            self._last = self.clock()

    def end(self) -> None:
        """The epoch is over, validation included; the next one has as many steps."""
        self._epoch_seconds.append(self.elapsed)
        self.steps = self.steps or self.done or None

    @property
    def elapsed(self) -> float:
        """Seconds since the epoch began."""
        return self.clock() - self._start

    @property
    def records_per_second(self) -> float | None:
        """Speed of this epoch's steps; None before there is anything to measure."""
        step, seconds = self.measured
        records = self._seen(self.done) - self._seen(step)
        return records / seconds if seconds > 0 and records else None

    @property
    def steps_per_second(self) -> float | None:
        """As `records_per_second`, of steps."""
        step, seconds = self.measured
        return (self.done - step) / seconds if seconds > 0 and self.done > step else None

    @property
    def epoch_left(self) -> float | None:
        """Seconds until the last step of this epoch; None when unknown."""
        step, seconds = self.measured
        if self.steps is None or self.done == step:
            return None
        return max(0, self.steps - self.done) * seconds / (self.done - step)

    def run_left(self, epochs_after: int) -> float | None:
        """Seconds until the end of the run, with so many epochs after this one; None when unknown."""
        left, after = self.epoch_left, self.epochs_take(epochs_after)
        if left is None:
            return None
        return left + (epochs_after * (self.elapsed + left) if after is None else after)

    def epochs_take(self, epochs: int) -> float | None:
        """Seconds of so many more epochs, each as long as the finished ones with their validation."""
        finished = self._epoch_seconds
        return epochs * sum(finished) / len(finished) if finished else None

    @property
    def measured(self) -> tuple[int, float]:
        """The step from which time is measured and the seconds since: from the first step on, which
        compiles, as soon as there is a second one."""
        step, since = self._first or (self._from, self._start)
        if self.done == step:
            step, since = self._from, self._start
        return step, self._last - since

    def _seen(self, steps: int) -> int:
        seen = steps * (self._global_batch or 0)
        return seen if self._records is None else min(seen, self._records)


class Board:
    """What is shown when: turns events into lines. Keras calls it from several threads.

    Args:
        pace: counts the steps of the epochs.
        epochs: the number of the last epoch.
        verbose: 0, 1 or 2, see `make_progress`.
        validation_steps: steps of one validation; None when unknown.
        stream: a terminal gets one line that is redrawn, anything else plain lines.
        live: as in `make_progress`.
    """

    def __init__(
        self,
        pace: Pace,
        epochs: int,
        verbose: int,
        validation_steps: int | None,
        stream: TextIO,
        live: bool | int = True,
    ) -> None:
        self._pace, self._epochs, self._verbose = pace, epochs, verbose
        self._validation_steps = validation_steps
        self._terminal = verbose == 1 and redraws(stream, live)
        self._paper = _Terminal(stream, None if live is True else live) if self._terminal else _Plain(stream)
        self._interval_s = _REDRAW_S if self._terminal else _PLAIN_LINE_S
        self._lock = threading.Lock()
        self._training = False
        self._epoch = 0
        self._pass = ""  # what goes on beside training steps: validating, evaluating, predicting
        self._pass_done = 0
        self._validated = False  # in this epoch
        self._logs: Logs = {}
        self._drawn = pace.clock()

    def begin_training(self) -> None:
        """From here on a pass is a validation."""
        self._training = True

    def end_training(self) -> None:
        """No unfinished line stays behind."""
        self._training = False
        self._paper.close()

    def begin_epoch(self, epoch: int, done: int = 0) -> None:
        """`epoch` counts from 0; `done` steps of it have run in an earlier process."""
        with self._lock:
            self._epoch, self._logs = epoch, {}
            self._validated = False
            self._pace.begin(done)
            self._begin_line()

    def step(self, done: int, logs: Logs) -> None:
        """`done` steps of the epoch are done."""
        with self._lock:
            # Keras' threads may bring an older step after a newer one, even when validation has begun.
            if done > self._pace.done:
                self._pace.step(done)
                self._logs = logs if not self._pass else self._logs
                self._draw_if_due()

    def end_epoch(self, logs: Logs) -> None:
        """One line remains of the epoch."""
        with self._lock:
            if not self._validated:
                self._pace.waited()
            self._pace.end()
            if self._verbose:
                self._paper.keep(self._epoch_summary(logs))

    def begin_pass(self, what: str) -> None:
        """A walk through data without training: "evaluating" or "predicting"."""
        with self._lock:
            self._pass, self._pass_done, self._logs = what, 0, {}
            if self._training:
                self._pass, self._validated = "validating", True
                self._pace.waited()
            else:
                self._pace.begin()
            self._begin_line()

    def pass_step(self, done: int, logs: Logs) -> None:
        """`done` steps of the pass are done."""
        with self._lock:
            if done > self._pass_done:
                self._pass_done, self._logs = done, logs
                if not self._training:
                    self._pace.step(done)
                self._draw_if_due()

    def end_pass(self, logs: Logs) -> None:
        """A validation leaves no line of its own: its values are in the epoch's."""
        with self._lock:
            if self._training:
                self._validation_steps = self._validation_steps or self._pass_done or None
            elif self._verbose:
                self._paper.keep(self._pass_summary(logs))
                self._paper.close()
            self._pass = ""

    def _begin_line(self) -> None:
        """On a terminal something is seen at once: the first step may compile for minutes. In a log file
        the first line comes after an interval."""
        self._drawn = self._pace.clock() - (self._interval_s if self._terminal else 0.0)
        self._draw_if_due()

    def _draw_if_due(self) -> None:
        now = self._pace.clock()
        if self._verbose == 1 and now - self._drawn >= self._interval_s:
            self._drawn = now
            self._paper.draw(*(self._pass_line() if self._pass else self._epoch_line()))

    def _epoch_line(self) -> tuple[str, float | None]:
        pace, after = self._pace, self._epochs_after
        run = pace.run_left(after) if after else None
        left = "" if pace.epoch_left is None else f"left {format_seconds(pace.epoch_left)}"
        text = joined(
            self._head,
            f"step {fraction(pace.done, pace.steps)}",
            left + ("" if run is None else f" (run {format_seconds(run)})"),
            format_speed(pace.records_per_second),
            format_logs(self._logs),
        )
        return text, pace.done / pace.steps if pace.steps else None

    def _pass_line(self) -> tuple[str, float | None]:
        steps = self._validation_steps if self._training else self._pace.steps
        done = f"{self._pass} {fraction(self._pass_done, steps)}"
        text = joined(self._head if self._training else "", done, format_logs(self._logs))
        return text, self._pass_done / steps if steps else None

    def _epoch_summary(self, logs: Logs) -> str:
        after = self._epochs_after
        run = self._pace.epochs_take(after) if after else None
        return joined(self._head, self._result(logs), f"run left {format_seconds(run)}" if run else "")

    def _pass_summary(self, logs: Logs) -> str:
        return joined(self._pass, self._result(logs))

    def _result(self, logs: Logs) -> str:
        pace = self._pace
        speed = format_speed(pace.records_per_second)
        return joined(f"{pace.done} steps", format_seconds(pace.elapsed), format_logs(logs), speed)

    @property
    def _head(self) -> str:
        return f"epoch {fraction(self._epoch + 1, self._epochs)}"

    @property
    def _epochs_after(self) -> int:
        return max(0, self._epochs - self._epoch - 1)


class _Plain:
    """Lines for a pipe or a file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, text: str, fraction: float | None) -> None:
        self.keep(text)

    def keep(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class _Terminal:
    """One line that is redrawn, with a bar, and lines that stay above it."""

    def __init__(self, stream: TextIO, columns: int | None) -> None:
        from rich.console import Console

        self._console = Console(file=stream, width=columns, force_terminal=True if columns else None)
        self._live: Any = None

    def draw(self, text: str, fraction: float | None) -> None:
        from rich.live import Live

        if self._live is None:
            # Drawn by us, not by a thread of rich's; the script's own prints go above the line.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            # A failed run leaves without a chance to show a hidden cursor again.
            self._console.show_cursor(True)
        self._live.update(_bar_and_text(text, fraction), refresh=True)

    def keep(self, text: str) -> None:
        self.close()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def _bar_and_text(text: str, fraction: float | None) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Text(text)  # wrapped, as a line with a metric and a speed does not fit into 80 columns
    if fraction is None:
        return line
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=1.0, completed=fraction, width=12), line)
    return grid


def joined(*parts: str) -> str:
    """
    >>> joined("epoch 1/2", "", "loss: 0.5000")
    'epoch 1/2 - loss: 0.5000'
    """
    return " - ".join(part for part in parts if part)


def fraction(done: int, total: int | None) -> str:
    """
    >>> fraction(3, 10), fraction(3, None)
    ('3/10', '3')
    """
    return f"{done}/{total}" if total else str(done)


def format_logs(logs: Logs) -> str:
    """Values as Keras shows them, the loss first; this is where tensors become floats.

    >>> format_logs({"accuracy": 0.98765, "loss": 0.00012, "val_loss": 2})
    'loss: 1.2000e-04 - accuracy: 0.9877 - val_loss: 2.0000'
    """
    names = sorted(logs, key=lambda name: name != "loss")
    return joined(*(f"{name}: {_format_value(float(np.mean(logs[name])))}" for name in names))


def _format_value(value: float) -> str:
    return f"{value:.4e}" if 0 < abs(value) <= 1e-3 else f"{value:.4f}"


def format_speed(records_per_second: float | None) -> str:
    """
    >>> format_speed(5321.7), format_speed(3.14159), format_speed(None)
    ('5,322 records/s', '3.1 records/s', '')
    """
    if records_per_second is None:
        return ""
    return f"{records_per_second:,.{0 if records_per_second >= 100 else 1}f} records/s"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(0.4), format_seconds(65), format_seconds(3723)
    ('0s', '1:05', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"
