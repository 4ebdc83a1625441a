"""Who runs which callback, and what ranks decide together; the table of Keras' callbacks and engines is
tests/cases/callbacks.py.

Run as a program (`mpirun -np 2 python -m tests.test_callbacks OUT`), this file is a rank of the last tests.
"""

import copy
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import distfit
from distfit.callbacks import policy
from distfit.callbacks.policy import Policy, callback_policies, callbacks_of_rank, chief_only, on_every_rank, policy_of
from distfit.callbacks.saver import ModelSaver
from distfit.checks import shareable
from distfit.errors import InputError, RunError
from distfit.thread_ranks import run
from tests.compare import flat
from tests.ranks import launch, show_stacks_when_asked

ROWS = np.random.default_rng(0).normal(size=(40, 2))


class OwnCheckpoint(keras.callbacks.ModelCheckpoint):
    pass


class Own(keras.callbacks.Callback):
    pass


@chief_only
class Printer(keras.callbacks.Callback):
    pass


class OwnPrinter(Printer):
    pass


def build():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def trained(callbacks, built=None, **arguments):
    """The history of a training of eight steps an epoch."""
    arguments = {"epochs": 3, "batch_size": 5, "verbose": 0} | arguments
    return distfit.fit(built or build(), ROWS, ROWS[:, :1], callbacks=callbacks, **arguments)


@pytest.fixture
def model():
    return build()


def test_writers_and_their_subclasses_run_on_the_chief_alone(tmp_path):
    writers = [OwnCheckpoint(str(tmp_path / "m.keras")), keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))]
    others = [keras.callbacks.EarlyStopping(), Own()]
    assert callbacks_of_rank([*writers, *others], is_chief=True, size=2) == [*writers, *others]
    assert callbacks_of_rank([*writers, *others], is_chief=False, size=2) == others


def test_every_callback_of_keras_is_decided_on():
    """One that Keras adds is to be looked at: does it write, change the model, or restore?"""
    found = {
        name: Policy.RESTORER
        if issubclass(kind, policy.RESTORERS)
        else Policy.CHIEF
        if issubclass(kind, policy.WRITERS)
        else Policy.EVERY_RANK
        for name, kind in vars(keras.callbacks).items()
        if isinstance(kind, type) and not issubclass(kind, keras.callbacks.CallbackList)
    }
    every_rank = "Callback EarlyStopping History LambdaCallback LearningRateScheduler ReduceLROnPlateau SwapEMAWeights"
    expected = dict.fromkeys((*every_rank.split(), "TerminateOnNaN"), Policy.EVERY_RANK)
    writers = "CSVLogger ModelCheckpoint OrbaxCheckpoint ProgbarLogger RemoteMonitor TensorBoard"
    expected |= {name: Policy.CHIEF for name in writers.split() if hasattr(keras.callbacks, name)}
    assert found == expected | {"BackupAndRestore": Policy.RESTORER}


def test_a_declaration_has_the_last_word(tmp_path):
    declared = chief_only(Own())
    assert policy_of(declared) is Policy.CHIEF
    assert policy_of(copy.deepcopy(declared)) is Policy.CHIEF, "as KerasTuner copies it for each trial"
    assert policy_of(Own()) is Policy.EVERY_RANK
    assert policy_of(on_every_rank(keras.callbacks.CSVLogger(str(tmp_path / "rank-0.csv")))) is Policy.EVERY_RANK
    assert policy_of(Printer()) is policy_of(OwnPrinter()) is Policy.CHIEF
    assert policy_of(on_every_rank(OwnPrinter())) is Policy.EVERY_RANK


def test_what_restores_does_so_for_all_ranks_whatever_is_declared(tmp_path):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path))
    assert policy_of(on_every_rank(backup)) is policy_of(chief_only(backup)) is Policy.RESTORER


@pytest.mark.parametrize("thing", [print, "CSVLogger", Policy, keras.callbacks.CallbackList()])
def test_what_is_no_single_callback_cannot_be_declared(thing):
    with pytest.raises(InputError, match="Expected one keras"):
        chief_only(thing)


@pytest.mark.parametrize(
    "changes",
    [
        keras.callbacks.SwapEMAWeights(),
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.EarlyStopping(restore_best_weights=True),
    ],
)
def test_what_changes_the_model_is_refused_on_one_of_several_ranks(changes):
    declared = chief_only(copy.copy(changes))
    assert callbacks_of_rank([changes], is_chief=False, size=2) == [changes]
    assert callbacks_of_rank([declared], is_chief=True, size=1) == [declared]
    for is_chief in (True, False):
        with pytest.raises(InputError, match=f"received {type(changes).__name__}, which sets weights"):
            callbacks_of_rank([declared], is_chief, size=2)


def test_the_policies_are_told_in_words_each_once():
    stopping = keras.callbacks.EarlyStopping()
    told = callback_policies([stopping, chief_only(Own()), stopping])
    assert told == "EarlyStopping: on every rank; Own: on the chief"
    assert callback_policies(None) == ""
    with pytest.raises(InputError, match="received function"):
        callback_policies([lambda epoch, logs: None])


def test_none_one_callback_and_a_list_of_keras_are_taken():
    own = Own()
    assert callbacks_of_rank(None, is_chief=True, size=1) == []
    assert callbacks_of_rank(own, is_chief=True, size=1) == [own]
    assert own in callbacks_of_rank(keras.callbacks.CallbackList([own]), is_chief=True, size=1)


class Ends(keras.callbacks.Callback):
    """Ends a run in its second epoch, on all ranks."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise distfit.errors.on_every_rank(RunError("the run was ended"))


def test_only_the_chief_needs_to_see_a_backup(tmp_path):
    """Ranks on other hosts have other disks: here each has a folder of its own, and only the chief's is used."""

    def train():
        def backup():
            return keras.callbacks.BackupAndRestore(tmp_path / f"rank {distfit.init().rank}")

        with pytest.raises(RunError, match="the run was ended"):
            trained([backup(), Ends()])
        begins_with = []
        noting = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: begins_with.append(noting.model.get_weights())
        )
        history = trained([backup(), noting])
        begun = float(sum(weights.sum() for weights in begins_with[0]))
        whole = trained([]).model
        np.testing.assert_array_equal(flat(history.model.weights), flat(whole.weights))
        return history.epoch, begun, sorted(map(str, tmp_path.iterdir()))

    results = run(train, ranks=2)
    epochs, begun, folders = results[0]
    assert results[1] == results[0], "callbacks behind it see the restored model on every rank, when training begins"
    assert epochs == [1, 2]
    assert begun != float(sum(weights.sum() for weights in build().get_weights()))
    assert folders == []


def test_a_run_without_a_backup_begins_at_its_first_epoch(tmp_path):
    def train():
        return trained([keras.callbacks.BackupAndRestore(tmp_path / "backup")], initial_epoch=1).epoch

    assert run(train, ranks=2) == [[1, 2]] * 2


def test_callbacks_run_in_their_order_and_before_those_of_distfit(tmp_path):
    seen = []

    class Adds(keras.callbacks.Callback):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_epoch_end(self, epoch, logs=None):
            seen.append((self.name, [key for key in logs if key != "loss"], len(self.model.history.epoch)))
            assert (tmp_path / "run" / "model.keras").exists() == (epoch > 0)
            logs[self.name] = float(epoch)

    options = distfit.Checkpoint(tmp_path / "run", model="epoch")
    history = trained([Adds("first"), Adds("second")], epochs=2, checkpoint=options)
    assert seen[:2] == [("first", [], 0), ("second", ["first"], 0)]
    assert seen[2:] == [("first", [], 1), ("second", ["first"], 1)]
    assert history.history["second"] == [0.0, 1.0], "the history is written last"
    assert (tmp_path / "run" / "model.keras").exists()


def test_the_model_is_saved_at_the_end_unless_it_is_asked_for_earlier(tmp_path):
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append((tmp_path / "run" / "model.keras").exists())

    trained([Looks()], epochs=2, checkpoint=tmp_path / "run")
    assert seen == [False, False]
    keras.models.load_model(tmp_path / "run" / "model.keras")


def test_the_saved_model_is_replaced_whole(model, tmp_path, monkeypatch):
    saver = ModelSaver(tmp_path / "new" / "folder")
    saver.set_model(model)
    saver.on_epoch_end(0)
    path = tmp_path / "new" / "folder" / "model.keras"
    good = path.read_bytes()

    def breaks_half_way(partial):
        partial.write_bytes(good[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save", breaks_half_way)
    with pytest.raises(RunError, match="no space"):
        saver.on_epoch_end(1)
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_what_replicas_would_compute_wrongly_is_refused():
    normal = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(synchronized=True)])
    shareable(normal, replicas=2)
    fixed = keras.Sequential([keras.Input(batch_shape=(8, 2)), keras.layers.Dense(1)])
    with pytest.raises(InputError, match="built for batches of 8"):
        shareable(fixed, replicas=2)


def test_an_evaluation_leaves_the_history_of_the_training(model):
    rows = np.ones((4, 2)), np.ones((4, 1))
    history = distfit.fit(model, *rows, epochs=2, verbose=0)
    distfit.evaluate(model, *rows, verbose=0)
    distfit.predict(model, rows[0], verbose=0)
    assert model.history is history


def test_the_same_engine_in_another_spelling_is_the_same_session():
    session = distfit.init()
    assert distfit.init("single") is session
    assert distfit.init("single", devices=1) is session
    assert distfit.init(devices=1) is session


def test_a_callback_stops_a_prediction_of_one_process(model):
    class Stop(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            self.model.stop_predicting = True

    rows = distfit.predict(model, np.ones((10, 2)), batch_size=4, callbacks=[Stop()], verbose=0)
    assert rows.shape == (4, 1)


# --- real ranks --------------------------------------------------------------------------------------------


class StopsAt(keras.callbacks.Callback):
    """Wants to stop in the fourth step of the second epoch, where it may say so."""

    def __init__(self, has_a_say):
        super().__init__()
        self.has_a_say, self.steps = has_a_say, 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.has_a_say and self.steps == 12:
            self.model.stop_training = True


class Raises(keras.callbacks.Callback):
    """Breaks on one rank when an epoch ends."""

    def on_epoch_end(self, epoch, logs=None):
        if distfit.init().rank == 1:
            raise OSError("the callback's own words")


def ranks_program(out):
    """What each rank does: stops with the others in one step, then breaks."""
    show_stacks_when_asked()
    session = distfit.init()
    last = StopsAt(session.rank == session.size - 1)
    chiefs = chief_only(StopsAt(True))
    ended = []
    for callback in (last, chiefs):
        history = trained([callback])
        ended.append((history.epoch, int(history.model.optimizer.iterations)))
    by_rank = session.transport.gather((ended, last.steps, chiefs.steps))
    if session.is_chief:
        (out / "ended.json").write_text(json.dumps(by_rank))
    trained([Raises()])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    return launch(["-m", "tests.test_callbacks", str(out)], ranks=2, limit_s=100), out


@pytest.mark.mpi
def test_one_rank_that_wants_to_stop_ends_all_on_the_same_step(job):
    ended, out = job
    assert (out / "ended.json").exists(), ended.report()
    for by_rank in json.loads((out / "ended.json").read_text()):
        # Eight steps and four; the one with which the wish travels, and the one that has begun when it is read.
        assert by_rank[:2] == [[[[0, 1], 14], [[0, 1], 14]], 14]
    assert [steps for _, _, steps in json.loads((out / "ended.json").read_text())] == [14, 0]


@pytest.mark.mpi
def test_a_callback_that_raises_on_one_rank_ends_all_with_its_traceback_once(job):
    ended, _ = job
    assert ended.code == 1, ended.report()
    said = ended.output + ended.errors
    assert said.count("Traceback (most recent call last)") == 1, ended.report()
    assert said.count("OSError: the callback's own words\n") == 2, "the report's first line, and the traceback's last"
    assert "in Raises.on_epoch_end" in said
    assert "all ranks end with exit code 1" in said


if __name__ == "__main__":
    ranks_program(Path(sys.argv[1]))
