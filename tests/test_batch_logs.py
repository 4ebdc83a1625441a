"""What callbacks are told of batches: values that cost nothing until they are read, and that are global."""

from __future__ import annotations

import copy
import json
import pickle

import keras
import numpy as np
import pytest

import distfit
from distfit.callbacks.listening import Listening
from distfit.callbacks.logs import Logs
from distfit.errors import InputError
from distfit.thread_ranks import run
from distfit.training.log_points import LEAST_STEPS, LogPoints

ROWS = np.random.default_rng(0).normal(size=(44, 4)).astype("float32")
BATCH, STEPS = 8, 6


class Number:
    """Counts who asks for its value, as a tensor on a device would have to be waited for."""

    def __init__(self, value):
        self.value, self.reads = value, 0

    def __float__(self):
        self.reads += 1
        return self.value


def _updated(logs):
    found = {}
    found.update(logs)
    return found


READERS = {
    "get": lambda logs: {"a": logs.get("a")},
    "[]": lambda logs: {"a": logs["a"]},
    "items": lambda logs: {name: value for name, value in logs.items()},  # noqa: C416
    "values": lambda logs: dict(zip(logs, logs.values(), strict=True)),
    "dict()": dict,
    "**": lambda logs: {**logs},
    "update": _updated,
    "copy": lambda logs: logs.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "|": lambda logs: logs | {},
    "reversed |": lambda logs: {} | logs,
    "json": lambda logs: json.loads(json.dumps(logs)),
    "pickle": lambda logs: pickle.loads(pickle.dumps(logs)),
    "repr": lambda logs: eval(repr(logs)),
    "format": lambda logs: eval(f"{logs}"),
    "pop": lambda logs: {"a": logs.pop("a")},
    "popitem": lambda logs: dict([logs.popitem()]),
    "setdefault": lambda logs: {"a": logs.setdefault("a", 0.0)},
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_a_value_gets_numbers(reader):
    number = Number(1.5)
    assert READERS[reader](Logs({"a": number})) == {"a": 1.5}
    assert number.reads == 1


def test_names_are_there_before_the_values():
    number = Number(1.5)
    logs = Logs({"a": number, "of_metric": {"b": number}}, step=3)
    assert isinstance(logs, dict)
    assert logs
    assert len(logs) == 2
    assert list(logs) == list(logs.keys()) == ["a", "b"]
    assert "a" in logs
    assert "of_metric" not in logs
    assert logs.step == 3
    assert number.reads == 0
    assert logs == {"a": 1.5, "b": 1.5}
    assert logs != {"a": 1.5}


def test_what_a_callback_writes_into_logs_the_next_ones_see_and_the_next_batch_does_not():
    logs = Logs({"a": 1.0}, step=3)
    logs["mine"] = 2.0
    assert logs == {"a": 1.0, "mine": 2.0}
    assert logs.again() == {"a": 1.0}
    assert logs.again().step == 3


class Batches(keras.callbacks.Callback):
    """What it is told, by batch."""

    def __init__(self):
        super().__init__()
        self.of_training, self.of_validation = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.of_training.append((logs.step, dict(logs)))

    def on_test_batch_end(self, batch, logs=None):
        self.of_validation.append((logs.step, dict(logs)))


class Quiet(Batches):
    """Has a method for batches and looks at none of their values."""

    reads_batch_logs = False


def trained(*callbacks, **arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=["AUC"])
    y = (ROWS.sum(axis=1, keepdims=True) > 0).astype("float32")
    arguments = {"batch_size": BATCH, "verbose": 0, "shuffle": False, "validation_data": (ROWS, y)} | arguments
    distfit.fit(model, ROWS, y, callbacks=list(callbacks), **arguments)
    return callbacks


def told(*kinds, **arguments):
    return [(one.of_training, one.of_validation) for one in trained(*(kind() for kind in kinds), **arguments)]


def test_values_are_those_of_one_process_at_log_points_and_say_of_which_step_they_are():
    ((alone, alone_validated),) = told(Batches)
    assert [step for step, _ in alone] == list(range(STEPS))
    for ((training, validated),) in run(lambda: told(Batches, logs_every_steps=2), ranks=3):
        assert [step for step, _ in training] == [0, 0, 2, 2, 4, 5]
        for step, values in training:
            assert values == pytest.approx(alone[step][1], rel=1e-6)
        assert validated[-1][1] == pytest.approx(alone_validated[-1][1], rel=1e-6)


def test_ranks_meet_for_values_of_batches_only_where_somebody_reads_them(monkeypatch):
    asked = []
    due = LogPoints.due

    def noted(self, training, *others):
        asked.append((self.training, self.testing))
        return due(self, training, *others)

    monkeypatch.setattr(LogPoints, "due", noted)
    run(lambda: told(Quiet), ranks=2)
    assert set(asked) == {(False, False)}
    asked.clear()
    # On one rank alone: ranks must agree on whether they meet.
    run(lambda: told(Batches if distfit.init().is_chief else Quiet), ranks=2)
    assert set(asked) == {(True, True)}


def test_who_decides_on_every_batch_hears_of_every_batch():
    def steps():
        listener, _ = trained(Batches(), keras.callbacks.TerminateOnNaN())
        return [step for step, _ in listener.of_training]

    assert run(steps, ranks=2) == [list(range(STEPS))] * 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_a_distance_of_log_points_that_is_no_number_of_steps_is_refused(wrong):
    with pytest.raises(InputError, match="logs_every_steps"):
        trained(logs_every_steps=wrong)


@pytest.mark.parametrize("steps", [None, 1, 3, LEAST_STEPS, 10 * LEAST_STEPS, 10_000])
@pytest.mark.parametrize("execution", [1, 4, 7])
def test_the_first_and_the_last_step_of_a_pass_have_values_whatever_its_length(steps, execution):
    points = LogPoints(None, training=True, testing=True)
    calls = [(first, min(first + execution, steps or 60) - 1) for first in range(0, steps or 60, execution)]
    due = [points.due(True, first, last, steps) for first, last in calls]
    assert due[0]
    assert due[-1] or steps is None
    assert sum(due) <= 2 + (steps or 60) // LEAST_STEPS


def test_keras_own_callbacks_that_ignore_values_cost_none(tmp_path):
    path = str(tmp_path / "model.keras")
    ignoring = [
        keras.callbacks.BackupAndRestore(str(tmp_path)),
        keras.callbacks.ModelCheckpoint(path),
        keras.callbacks.EarlyStopping(),
        keras.callbacks.CSVLogger(path),
    ]
    assert not Listening(ignoring).reads_batches(training=True)
    reading = [
        keras.callbacks.ModelCheckpoint(path, save_freq=3),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None),
    ]
    for callback in reading:
        assert Listening([callback]).reads_batches(training=True)
        assert not Listening([callback]).reads_batches(training=False)


def test_a_checkpoint_within_epochs_that_goes_by_values_gets_those_of_its_step(tmp_path):
    def demanded(name, **arguments):
        return Listening([keras.callbacks.ModelCheckpoint(str(tmp_path / name), **arguments)]).demands_every_step()

    assert demanded("{batch}-{loss:.4f}.keras", save_freq=3)
    assert demanded("best.keras", save_freq=3, save_best_only=True)
    assert not demanded("{epoch:02d}-{batch}.keras", save_freq=3)
    assert not demanded("{loss:.4f}.keras", save_best_only=True)


def test_a_class_speaks_for_its_own_methods_alone(tmp_path):
    class Reads(keras.callbacks.ModelCheckpoint):
        def on_train_batch_end(self, batch, logs=None):
            self.loss = logs["loss"]

    class OfBoard(distfit.TensorBoard):
        def on_train_batch_end(self, batch, logs=None):
            self.loss = logs["loss"]

    class Ignores(Reads):
        reads_batch_logs = False

    path = str(tmp_path / "model.keras")
    assert Listening([Reads(path)]).reads_batches(training=True)
    assert Listening([OfBoard(str(tmp_path))]).reads_batches(training=True)
    assert not Listening([distfit.TensorBoard(str(tmp_path))]).reads_batches(training=True)
    assert not Listening([Ignores(path)]).reads_batches(training=True)


class Evaluates(keras.callbacks.Callback):
    """Within an epoch: the metrics of the model are reset and used by the evaluation, as in Keras."""

    def __init__(self, evaluate):
        super().__init__()
        self.evaluate = evaluate
        self.in_objects = []

    def on_epoch_begin(self, epoch, logs=None):
        self.evaluate(self.model)

    def on_train_batch_end(self, batch, logs=None):
        if batch in (1, STEPS - 1):
            self.evaluate(self.model)

    def on_epoch_end(self, epoch, logs=None):
        self.in_objects.append({name: float(value) for name, value in self.model.get_metrics_result().items()})


def of_an_epoch_with_evaluations(evaluate, fit):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=["AUC"])
    y = (ROWS.sum(axis=1, keepdims=True) > 0).astype("float32")
    evaluates = Evaluates(lambda model: evaluate(model, ROWS[:21], y[:21], verbose=0))
    history = fit(model, ROWS, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False, callbacks=[evaluates])
    return {name: values[-1] for name, values in history.history.items()}, evaluates.in_objects[-1]


def test_what_an_evaluation_within_an_epoch_leaves_counts_once():
    expected, in_objects = of_an_epoch_with_evaluations(keras.Model.evaluate, keras.Model.fit)
    for history, objects in run(lambda: of_an_epoch_with_evaluations(distfit.evaluate, distfit.fit), ranks=2):
        assert history == pytest.approx(expected, rel=1e-5)
        # On every rank: what a callback asks the metrics for is global when an epoch has ended.
        assert objects == pytest.approx(in_objects, rel=1e-5)


def test_what_a_callback_writes_before_anybody_reads_stays_as_it_is():
    logs = Logs({"a": Number(1.5)})
    logs["name"], logs["a"] = "12", "mine"
    assert logs == {"name": "12", "a": "mine"}
