"""Callbacks that are saved at any moment of a training and go on in another process: the same decisions and files.

One training is run in the order of training/loop.py, by hand, so that it can be cut anywhere. At each moment its state
is put through JSON; a little later, when more has been written, its folder is copied, as a killed run leaves it. Then
each copy is gone on with by new callbacks and a new model.
"""

from __future__ import annotations

import collections
import functools
import glob
import json
import logging
import math
import random
import shutil
from dataclasses import dataclass, field

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import distfit
from distfit.callbacks.listening import Listening
from distfit.checkpoint.callback_states import CallbackStates, flushed, names, prepared, refuse_restorers
from distfit.checkpoint.place import Place
from distfit.checkpoint.plain import packed, unpacked
from distfit.checkpoint.random_streams import host_streams, restore_host_streams
from distfit.errors import InputError
from distfit.monitor.progress import Pace, make_progress

EPOCHS, STEPS, ROWS = 6, 4, 4
# (epoch, steps of it that have run); STEPS is before the validation, 0 at the beginning of an epoch.
MOMENTS = {
    "in the first epoch": (0, 2),
    "before the first validation": (0, STEPS),
    "between epochs": (2, 0),
    "within an epoch": (3, 1),
    "before a validation": (3, STEPS),
    "before the last epoch": (4, 0),
}
# So many steps after a checkpoint the run is killed.
LOST = 6
TIMED = ("second", "_per_")


class Own(keras.callbacks.Callback):
    """A user's, with what users keep: counts, lists that somebody else holds, generators."""

    best: float | None = None

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.window = collections.deque(maxlen=3)
        self.counts = collections.defaultdict(int)
        self.rng, self.python = np.random.default_rng(1), random.Random(1)
        self.phase = 0

    def on_train_begin(self, logs=None):
        self.phase = 1

    def on_epoch_begin(self, epoch, logs=None):
        self.phase, self.seen = 0, {epoch}

    def on_train_batch_end(self, batch, logs=None):
        self.window.append(logs["loss"])
        self.counts[batch] += 1
        self.shared.append((self.phase, self.rng.random(), self.python.random(), sum(self.window)))

    def on_epoch_end(self, epoch, logs=None):
        self.best = min(logs["val_loss"], math.inf if self.best is None else self.best)


# With more than 1, Keras leaves values of epochs out as well.
BOARDS = {"keras": keras.callbacks.TensorBoard, "distfit": distfit.TensorBoard}


def callbacks_in(folder, board):
    """All kinds whose state matters; of two boards in one list both would write what is meant for one."""
    here = keras.callbacks
    return [
        here.SwapEMAWeights(swap_on_epoch=True),
        here.EarlyStopping(patience=3, min_delta=0.01, restore_best_weights=True),
        here.EarlyStopping("loss", patience=50, start_from_epoch=1),
        here.ModelCheckpoint(folder / "best.weights.h5", save_best_only=True, save_weights_only=True),
        here.ModelCheckpoint(folder / "{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=5),
        here.LearningRateScheduler(lambda epoch, rate: rate * 0.99),
        here.ReduceLROnPlateau(patience=1, factor=0.5, cooldown=1, min_delta=0.2),
        here.CSVLogger(folder / "log.csv", separator=";"),
        here.CSVLogger(folder / "appended.csv", append=True),
        BOARDS[board](folder / "logs", update_freq=3 if board == "distfit" else 1, write_steps_per_second=True),
        here.TerminateOnNaN(),
        here.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        Own([]),
    ]


@functools.cache
def model_of_all():
    """One, as it is what takes time; each run begins with all of its variables as they were."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.3, use_ema=True, ema_momentum=0.8), "mse")
    model.optimizer.build(model.trainable_variables)
    return model, [variable.numpy() for variable in variables_of(model)]


def variables_of(model):
    return [*model.variables, *model.optimizer.variables]


def assign(model, values):
    for variable, value in zip(variables_of(model), values, strict=True):
        variable.assign(value)


def batch(number):
    rng = np.random.default_rng(number)
    return rng.normal(size=(ROWS, 3)).astype("float32"), rng.normal(size=(ROWS, 1)).astype("float32")


@dataclass
class Saved:
    """A moment as a checkpoint keeps it, and the folder of the run when it was killed."""

    place: Place
    variables: list
    states: str
    arrays: dict
    stop: bool
    killed_at: int
    folder: object = None


@dataclass
class Training:
    """The loop of training/loop.py for one process.

    Args:
        board: which TensorBoard listens.
        moments: at which to save.
    """

    folder: object
    board: str
    moments: dict = field(default_factory=dict)

    def __post_init__(self):
        self.model, values = model_of_all()
        assign(self.model, values)
        self.saved = {}
        self.callbacks = Listening(
            callbacks_in(self.folder, self.board),
            add_history=True,
            model=self.model,
            epochs=EPOCHS,
            steps=STEPS,
            verbose=0,
        )
        self.states = CallbackStates(self.callbacks.callbacks)
        self.model.stop_training = False

    def run(self, start: Saved | None = None):
        place = Place(0, 0, 0) if start is None else start.place
        if start is None:
            self.callbacks.on_train_begin()
        else:
            self._restore(start)
        epoch, step, self.total = place.epoch, place.step, place.total
        while epoch < EPOCHS and not self.model.stop_training:
            self._epoch(epoch, step)
            epoch, step = epoch + 1, 0
            self._arrive(epoch, 0)
        self._copy(EPOCHS * STEPS)
        self.callbacks.on_train_end()
        return self

    def _epoch(self, epoch, step):
        if step:
            self.callbacks.on_epoch_resumed(epoch, step)
        else:
            self.callbacks.on_epoch_begin(epoch)
        for number in range(step, STEPS):
            self.callbacks.on_train_batch_begin(number)
            # The learning rate is part of what a step does, and so is what was restored.
            self.loss = float(self.model.train_on_batch(*batch(epoch * STEPS + number)))
            self.total += 1
            self.callbacks.on_train_batch_end(number, {"loss": self.loss})
            self._arrive(epoch, number + 1)
        self.callbacks.on_test_begin()
        val_loss = float(self.model.test_on_batch(*batch(1000)))
        self.callbacks.on_test_end({"loss": val_loss})
        # Of the last step, which a run that begins behind it has to know as well: the loop keeps it in its moment.
        loss = float(np.square(self.model.predict_on_batch(batch(0)[0])).mean())
        self.callbacks.on_epoch_end(epoch, {"loss": loss, "val_loss": val_loss})

    def _arrive(self, epoch, step):
        flushed(self.callbacks.callbacks)
        for name, moment in self.moments.items():
            if moment == (epoch, step):
                plain, arrays = packed(self.states.state())
                self.saved[name] = Saved(
                    Place(epoch, step, self.total),
                    [variable.numpy() for variable in variables_of(self.model)],
                    json.dumps(plain, allow_nan=False),
                    arrays,
                    self.model.stop_training,
                    self.total + LOST,
                )
        self._copy(self.total)

    def _copy(self, total):
        """What is there of runs that are killed now."""
        for name, saved in self.saved.items():
            if saved.killed_at <= total and saved.folder is None:
                saved.folder = self.folder.with_name(name.replace(" ", "-"))
                shutil.copytree(self.folder, saved.folder)

    def _restore(self, start):
        assign(self.model, start.variables)
        with prepared(self.callbacks.callbacks):
            self.callbacks.on_train_begin()
        self.states.restore(unpacked(json.loads(start.states), start.arrays), start.place)
        self.model.stop_training = start.stop


def of_kind(training, kind):
    return [callback for callback in training.callbacks.callbacks if type(callback) is kind]


def known(training):
    """What each callback knows at the end, exactly; times are another run's."""
    states = training.states.state()
    for state in states.values():
        state.get("keras", {}).pop("epoch_seconds", None)
    plain, arrays = packed(states)
    return json.dumps(plain), {name: array.tobytes() for name, array in arrays.items()}


def points(folder):
    """How often each point is in the files, and its value, where it is not a time."""
    found = collections.Counter()
    for file in sorted(glob.glob(f"{folder}/*.tfevents.*")):
        for event in tf.compat.v1.train.summary_iterator(file):
            for value in event.summary.value:
                timed = any(part in value.tag for part in TIMED) or value.tag.startswith("_hparams_")
                found[value.tag, event.step, b"" if timed else value.tensor.SerializeToString()] += 1
    return found


def weights_in(folder):
    found = {}
    for path in sorted(folder.glob("*.weights.h5")):
        with h5py.File(path) as file:
            file.visititems(functools.partial(_note, found, path.name))
    return found


def _note(found, file, name, held):
    if isinstance(held, h5py.Dataset):
        found[file, name] = held[()].tobytes()


@pytest.fixture(scope="module", params=BOARDS)
def whole(tmp_path_factory, request):
    """The run that nobody killed, and its moments."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    folder.mkdir()
    (folder / "appended.csv").write_text("epoch,loss,val_loss\n0,earlier,earlier\n")
    return Training(folder, request.param, MOMENTS).run()


@pytest.fixture(scope="module", params=MOMENTS)
def resumed(whole, request):
    saved = whole.saved[request.param]
    return Training(saved.folder, whole.board).run(saved)


def test_saving_changes_nothing(whole, tmp_path):
    unsaved = Training(tmp_path, whole.board).run()
    assert known(unsaved)[0].replace(str(tmp_path), "") == known(whole)[0].replace(str(whole.folder), "")
    assert whole.model.history.epoch == list(range(len(whole.model.history.epoch)))
    assert len(whole.model.history.epoch) > MOMENTS["before a validation"][0]


def test_history_has_the_same_bits(whole, resumed):
    assert packed(resumed.model.history.history) == packed(whole.model.history.history)
    assert resumed.model.history.epoch == whole.model.history.epoch
    assert resumed.model.history is of_kind(resumed, keras.callbacks.History)[0]


def test_decisions_and_what_led_to_them_are_the_same(whole, resumed):
    assert [weight.tobytes() for weight in resumed.model.get_weights()] == [
        weight.tobytes() for weight in whole.model.get_weights()
    ]
    first, second = (of_kind(each, keras.callbacks.EarlyStopping)[0] for each in (whole, resumed))
    assert (first.best, first.wait, first.stopped_epoch, first.best_epoch) == (
        second.best,
        second.wait,
        second.stopped_epoch,
        second.best_epoch,
    )
    assert first.monitor_op is second.monitor_op
    assert first.min_delta == second.min_delta == -0.01
    assert of_kind(resumed, Own)[0].shared == of_kind(whole, Own)[0].shared
    assert known(resumed) == known(whole)


def test_files_are_the_same(whole, resumed):
    for name in ("log.csv", "appended.csv"):
        assert (resumed.folder / name).read_text() == (whole.folder / name).read_text()
    assert weights_in(resumed.folder) == weights_in(whole.folder)
    assert len(weights_in(whole.folder)) > 2


@pytest.mark.parametrize("part", ["train", "validation"])
def test_tensorboard_has_each_point_once(whole, resumed, part):
    expected = points(whole.folder / "logs" / part)
    assert points(resumed.folder / "logs" / part) == expected
    assert set(expected.values()) == {1}
    assert {step for tag, step, _ in expected if tag == "epoch_loss"} == set(whole.model.history.epoch)


def passed_on(callbacks, then, begun=()):
    """What these callbacks know, through JSON, to others, which have seen on_train_begin."""
    states = CallbackStates(callbacks)
    for change in begun:
        change()
    plain, arrays = packed(states.state())
    after = CallbackStates(then)
    with prepared(then):
        for callback in then:
            callback.on_train_begin()
    after.restore(unpacked(json.loads(json.dumps(plain)), arrays), Place(1, 0, 4))
    return json.loads(json.dumps(plain))


def test_what_a_script_has_chosen_stays_the_scripts():
    before, after = keras.callbacks.EarlyStopping(patience=3), keras.callbacks.EarlyStopping(patience=9, min_delta=0.5)
    passed_on([before], [after], begun=[lambda: vars(before).update(wait=2, best=0.25)])
    assert (after.patience, after.min_delta, after.wait, after.best) == (9, 0.5, 2, 0.25)


@pytest.mark.parametrize("mode", ["auto", "min", "max"])
def test_what_is_better_is_known_within_an_epoch_and_a_changed_mode_counts(mode):
    before = keras.callbacks.ModelCheckpoint("a.keras", "loss", save_best_only=True)
    after = keras.callbacks.ModelCheckpoint("a.keras", "loss", save_best_only=True, mode=mode)
    passed_on([before], [after], begun=[before._set_monitor_op])
    assert after.monitor_op is (keras.ops.greater if mode == "max" else keras.ops.less)


class Speaks(keras.callbacks.Callback):
    """Keeps an object, and says what of it is state."""

    def __init__(self, value):
        super().__init__()
        self.held = object()
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"] * 2


def test_a_callback_may_speak_for_itself():
    after = Speaks(0)
    assert passed_on([Speaks(21)], [after]) == {"Speaks": {"own": {"value": 21}}}
    assert after.value == 42


def test_half_of_speaking_for_itself_and_what_is_not_plain_are_refused():
    half = type("Half", (keras.callbacks.Callback,), {"state_dict": lambda self: {}})
    with pytest.raises(InputError, match=r"Half to have both.*load_state_dict"):
        CallbackStates([half()])
    with pytest.raises(InputError, match=r"Speaks.state_dict\(\) gives cannot be saved.*a object at .value"):
        CallbackStates([Speaks(object())]).state()


def test_what_cannot_be_saved_is_said_of_users_callbacks_alone(caplog):
    mine, logger = Own([]), keras.callbacks.CSVLogger("never-written.csv")
    states = CallbackStates([mine, logger])
    mine.model_of_mine, mine.function, logger.writer = object(), print, object()
    with caplog.at_level(logging.WARNING, "distfit"):
        states.state()
    assert "what Own keeps in function, model_of_mine" in caplog.text
    assert "CSVLogger" not in caplog.text


def test_what_on_train_begin_sets_is_as_it_was_at_the_checkpoint():
    before, after = Own([]), Own([])
    passed_on([before], [after], begun=[lambda: before.on_train_begin(), lambda: vars(before).update(phase=0)])
    assert after.phase == 0


def test_large_arrays_are_saved_when_they_have_changed_and_left_alone_when_not():
    def having(value):
        callback = Own([])
        callback.table = np.full(400_000, value)
        return callback

    before, after = having(1.0), having(1.0)
    assert "table" not in passed_on([before], [having(1.0)])["Own"]["attributes"]
    passed_on([before], [after], begun=[lambda: before.table.__setitem__(slice(100_000, None), 7.0)])
    assert np.array_equal(after.table, before.table)
    assert after.table is not before.table


@pytest.mark.parametrize(
    "state",
    [
        7,
        {"EarlyStopping": 7},
        {"EarlyStopping": {"attributes": 3, "keras": {}}},
        {"EarlyStopping": {}},
        {"EarlyStopping": {"attributes": {3: 4}, "keras": {}}},
        {"EarlyStopping": {"attributes": {}, "keras": 5}},
        {"EarlyStopping": {"attributes": {}, "keras": {"better": "system"}}},
        {"CSVLogger (chief)": {"attributes": {}, "keras": {"bytes": "many"}}},
        {"CSVLogger (chief)": {"attributes": {}, "keras": {"bytes": -1}}},
        {"Own": {"attributes": {"rng": {"bit_generator": "MT19937"}, "python": 4}, "keras": {}}},
        {"Speaks": {"own": 3}},
    ],
)
def test_a_state_that_is_none_is_refused(state, tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    logger.on_train_begin()
    callbacks = [keras.callbacks.EarlyStopping(), logger, Own([]), Speaks(1)]
    with pytest.raises(InputError, match="Expected the state"):
        CallbackStates(callbacks).restore(state, Place(1, 0, 4))


def test_a_checkpoint_of_somebody_else_gives_data_and_nothing_more(tmp_path):
    hostile = {
        "filepath": "/etc/passwd",
        "filename": "/etc/passwd",
        "on_epoch_end": 3,
        "__class__": 3,
        "model": 3,
        "_model": "/etc/passwd",
        "monitor_op": 3,
        "schedule": 3,
        "_distfit_policy": 3,
        "own_path": "/etc/passwd",
        "new text": "/etc/passwd",
    }
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
        keras.callbacks.CSVLogger(tmp_path / "a.csv"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        Own([]),
    ]
    callbacks[3].own_path = str(tmp_path)
    before = [dict(vars(callback)) for callback in callbacks]
    states = CallbackStates(callbacks)
    states.restore(
        {name: {"attributes": hostile, "keras": {}} for name in names(callbacks)} | {"Nobody": 3}, Place(1, 0, 4)
    )
    for callback, held in zip(callbacks, before, strict=True):
        for name in hostile.keys() & held.keys():
            assert vars(callback)[name] is held[name]
        assert "on_epoch_end" not in vars(callback)
    assert "own_path" not in vars(callbacks[0])


def test_a_logger_whose_file_is_gone_says_so_and_begins_another_one(tmp_path, caplog):
    logger, others = (keras.callbacks.CSVLogger(tmp_path / name) for name in ("log.csv", "gone.csv"))
    logger.on_train_begin()
    with caplog.at_level(logging.WARNING, "distfit"):
        passed_on([logger], [others], begun=[lambda: logger.on_epoch_end(0, {"loss": 1.0})])
    others.on_epoch_end(1, {"loss": 0.5})
    assert "gone.csv is shorter than it was at the checkpoint" in caplog.text
    assert (tmp_path / "gone.csv").read_text().splitlines() == ["epoch,loss,val_loss", "1,0.5,NA"]


def test_a_new_logger_begins_its_file_as_ever(tmp_path):
    (tmp_path / "log.csv").write_text("of another run")
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    passed_on([], [logger])
    logger.on_epoch_end(1, {"loss": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["epoch,loss,val_loss", "1,0.5,NA"]
    assert not logger.append


def test_names_are_those_of_every_rank():
    callbacks = [keras.callbacks.LambdaCallback() for _ in range(3)]
    distfit.chief_only(callbacks[0])
    assert names(callbacks) == ["LambdaCallback (chief)", "LambdaCallback", "LambdaCallback-2"]
    assert names(callbacks[1:]) == ["LambdaCallback", "LambdaCallback-2"]


def test_nobody_else_restores_beside_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="received BackupAndRestore beside it"):
        refuse_restorers([keras.callbacks.BackupAndRestore(tmp_path)])


def test_host_streams_go_on_and_others_are_refused_whole():
    state = unpacked(*packed(host_streams()))
    drawn = random.random(), np.random.rand()
    restore_host_streams(state)
    assert (random.random(), np.random.rand()) == drawn
    for other in (None, {}, {"python": (3, (1,), None), "numpy": state["numpy"]}, state | {"numpy": {"pos": 3}}):
        before = random.getstate()
        with pytest.raises(InputError, match="Expected the states of Python's"):
            restore_host_streams(other)
        assert random.getstate() == before


def test_a_pace_goes_on_from_what_was_measured():
    now = [0.0]
    pace = Pace(10, 100, 10, clock=lambda: now[0])
    pace.begin(10, (2, 4.0))
    assert (pace.steps_per_second, pace.records_per_second) == (2.0, 20.0)
    pace.begin(4)
    now[0] = 2.0
    pace.step(5)
    assert (pace.steps_per_second, pace.epoch_left) == (0.5, 10.0)
    now[0] = 3.0
    pace.step(6)
    assert (pace.steps_per_second, pace.epoch_left) == (1.0, 4.0)


def test_the_progress_line_goes_on_within_an_epoch(capsys):
    progress = make_progress(global_batch=2, records=8, steps=4, epochs=3)
    progress.on_train_begin()
    progress.on_epoch_resumed(1, 3)
    progress.on_train_batch_end(3, {"loss": 0.5})
    progress.on_epoch_end(1, {"loss": 0.5})
    assert capsys.readouterr().out.startswith("epoch 2/3 - 4 steps - 0s - loss: 0.5000")
