"""A training that was killed goes on and ends as the one that nobody killed: on the same ranks with the same bits."""

import json
import os
import random
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distfit
from distfit.checkpoint import keeper, opened, state
from distfit.checkpoint.fields import refuse_changes
from distfit.checkpoint.folder import Checkpoints
from distfit.checkpoint.lock import RunLock
from distfit.errors import InputError, RunError, on_every_rank
from tests import resume_script
from tests.ranks import launch
from tests.resume_script import EPOCHS, RECORDS, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Printed when a test fails, and fixed, so that it fails again.
SEED = 20261122


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


class Runs:
    """Jobs in one folder with data."""

    def __init__(self, folder):
        self.folder = folder
        self._whole = {}
        resume_script.write_data(folder)

    def launch(self, run, engine="auto", ranks=1, kills=()):
        return launch(["-m", "tests.resume_script", str(self.folder), run, engine, *kills], ranks)

    def numbers(self, run):
        return dict(np.load(self.folder / f"{run}.npz"))

    def whole(self, engine="auto", ranks=1):
        """What nobody has killed."""
        name = f"whole-{engine.replace(':', '-')}-{ranks}"
        if name not in self._whole:
            job = self.launch(name, engine, ranks)
            assert job.code == 0, job.report()
            self._whole[name] = self.numbers(name)
        return self._whole[name]

    def csv(self, run):
        return (self.folder / f"{run}.csv").read_text()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_every_record_is_trained_on_once_an_epoch(runs):
    ledger = runs.whole()["ledger"]
    assert ledger.shape == (EPOCHS, RECORDS)
    for epoch, steps in enumerate(ledger):
        assert set(steps) == set(range(epoch * STEPS + 1, (epoch + 1) * STEPS + 1))


# Before, at and behind the end of an epoch, in validation, at the end of an epoch, near the end of the run.
PLACES = ["step@5", f"step@{STEPS}", f"step@{STEPS + 1}", "validation@2", "epoch@1", f"step@{3 * STEPS - 1}"]


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_bits(runs, place):
    run = re.sub(r"\W", "-", place)
    job = runs.launch(run, kills=[place])
    assert job.code == -9, job.report()
    job = runs.launch(run)
    assert job.code == 0, job.report()
    assert_same_bits(runs.numbers(run), runs.whole())
    assert runs.csv(run) == runs.csv("whole-auto-1")
    assert points(runs.folder / f"{run}-logs") == points(runs.folder / "whole-auto-1-logs")


# In `make test` a few; `KILLS=50 make test PYTEST_ARGS="tests/test_resume.py -k anywhere"` for many.
@pytest.mark.parametrize("number", range(int(os.environ.get("KILLS", "5"))))
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(runs, number):
    step = random.Random(SEED + number).randint(1, EPOCHS * STEPS)
    print("killed at step", step)
    run = f"anywhere-{number}"
    assert runs.launch(run, kills=[f"step@{step}"]).code == -9
    job = runs.launch(run)
    assert job.code == 0, job.report()
    assert_same_bits(runs.numbers(run), runs.whole())


@pytest.mark.parametrize(("engine", "ranks"), [("mirrored:2", 1), pytest.param("auto", 2, marks=pytest.mark.mpi)])
def test_several_replicas_go_on_to_the_same_bits(runs, engine, ranks):
    whole, run = runs.whole(engine, ranks), f"killed-{ranks}"
    assert runs.launch(run, engine, ranks, [f"step@14/{ranks - 1}"]).code != 0
    job = runs.launch(run, engine, ranks)
    assert job.code == 0, job.report()
    assert "going on from" in job.errors, job.report()
    assert_same_bits(runs.numbers(run), whole)


@pytest.mark.mpi
def test_a_run_killed_three_times_goes_on_with_other_numbers_of_ranks(runs):
    """Two ranks, then one, three and two: the records of a run that nobody killed, its weights to rounding."""
    draw = random.Random(SEED)
    steps = sorted(draw.sample(range(4, EPOCHS * STEPS), 3))
    print("killed at steps", steps)
    for ranks, step in zip((2, 1, 3), steps, strict=True):
        job = runs.launch("moved", ranks=ranks, kills=[f"step@{step}/{ranks - 1}"])
        assert job.code != 0, job.report()
    job = runs.launch("moved", ranks=2)
    assert job.code == 0, job.report()
    found, whole = runs.numbers("moved"), runs.whole()
    np.testing.assert_array_equal(found["ledger"], whole["ledger"])
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def points(folder):
    """Every point that TensorBoard shows, but for those that a clock has made."""
    found = {}
    for part in ("train", "validation"):
        events = EventAccumulator(str(folder / part), size_guidance={"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            if "per_second" not in tag and not tag.startswith(("_hparams", "keras")):
                values = [(event.step, tf_numbers(event)) for event in events.Tensors(tag)]
                found[part, tag] = values
    return found


def tf_numbers(event):
    return event.tensor_proto.tensor_content or list(event.tensor_proto.float_val)


# --- in this process


def small(optimizer=None, units=3):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


def fit(model, folder, epochs=2, **arguments):
    arguments = {"verbose": 0, "batch_size": 8, "strategy": "single"} | arguments
    arguments.setdefault("checkpoint", None if folder is None else distfit.Checkpoint(folder, every_steps=1))
    return distfit.fit(model, X, Y, epochs=epochs, **arguments)


class Ends(keras.callbacks.Callback):
    """Raises before a step of the run."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) + 1 == self._step:
            raise on_every_rank(RunError("ended"))


def test_a_run_that_has_ended_is_not_trained_again(tmp_path):
    first = fit(model := small(), tmp_path)
    again = fit(other := small(), tmp_path)
    assert again.history == first.history
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(other.optimizer.iterations) == 6


CHANGES = {
    "epochs": {"epochs": 3},
    "batch_size": {"batch_size": 4},
    "seed": {"seed": 5},
    "optimizer": {"model": lambda: small(keras.optimizers.Adam(0.02))},
    "model": {"model": lambda: small(units=4)},
    "callbacks": {"callbacks": [keras.callbacks.EarlyStopping("loss")]},
    "arguments": {"validation_freq": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_is_another_one_is_refused_by_name(tmp_path, name):
    fit(small(), tmp_path)
    before = tree(tmp_path)
    changes = dict(CHANGES[name])
    with pytest.raises(InputError, match=rf"(?s)go on as it began.*allow=\['{name}'\]") as refused:
        fit(changes.pop("model", small)(), tmp_path, **changes)
    assert "checkpoint" in str(refused.value)
    assert tree(tmp_path) == before


def test_what_was_accepted_by_name_is_trained_with(tmp_path):
    fit(small(), tmp_path)
    history = fit(small(), tmp_path, epochs=3, allow=["epochs"])
    assert history.history == fit(small(), tmp_path / "whole", epochs=3).history
    model = small(keras.optimizers.Adam(0.5))
    fit(model, tmp_path, epochs=4, allow=["epochs", "optimizer"])
    assert float(model.optimizer.learning_rate) == 0.5


class Stops(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def test_a_run_that_a_callback_has_stopped_goes_on_without_it(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(keeper, "say", said.append)
    assert fit(small(), tmp_path, epochs=3, callbacks=[Stops()]).epoch == [0]
    assert fit(small(), tmp_path, epochs=3, callbacks=[Stops()]).epoch == [0]
    assert "a callback stopped the run after epoch 1 (step 3 of the run)" in said.pop()
    history = fit(small(), tmp_path, epochs=3, allow=["callbacks"])
    assert history.history == fit(small(), tmp_path / "whole", epochs=3).history
    fit(small(), tmp_path, epochs=3)
    assert "the run has had its epochs; it ended after epoch 3 (step 9 of the run)" in said.pop()


def test_the_model_is_that_which_fit_leaves(tmp_path):
    """With averages in the weights' place; also where it is written after each epoch."""
    model = small(keras.optimizers.Adam(0.1, use_ema=True))
    fit(model, None, checkpoint=distfit.Checkpoint(tmp_path, model="epoch"))
    saved = keras.models.load_model(tmp_path / "model.keras").get_weights()
    for one, two in zip(saved, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_cannot_be_kept_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="validation_data for the best 'val_loss', received none"):
        fit(small(), None, checkpoint=distfit.Checkpoint(tmp_path / "run", best="val_loss"))
    with pytest.raises(InputError, match="path of a folder to write to, received ''"):
        fit(small(), None, checkpoint="")
    assert tree(tmp_path) == {}


def test_within_an_epoch_nothing_may_change_which_records_are_left():
    then, now, allowed = (
        {"batch_size": "8", "epochs": "2"},
        {"batch_size": "4", "epochs": "3"},
        ["batch_size", "epochs"],
    )
    with pytest.raises(InputError, match=r"(?s)end the epoch that it was in.*batch_size  8 +4"):
        refuse_changes(then, now, allowed, "runs/a", within=True)
    assert refuse_changes(then, now, allowed, "runs/a") == ["batch_size: 8 -> 4", "epochs: 2 -> 3"]
    assert refuse_changes(then, then | {"epochs": "3"}, allowed, "runs/a", within=True) == ["epochs: 2 -> 3"]


UNSEEDED = """
import sys
import keras, numpy as np
import distfit

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.arange(96.0).reshape(24, 4)
distfit.fit(model, x, x[:, :1], batch_size=8, epochs=int(sys.argv[2]), checkpoint=sys.argv[1], allow=["epochs"])
"""


def test_a_run_without_a_seed_goes_on_with_the_one_that_was_drawn(tmp_path):
    jobs = [launch(["-c", UNSEEDED, str(tmp_path / "run"), epochs]) for epochs in "12"]
    assert [job.code for job in jobs] == [0, 0], jobs[1].report()
    first, second = (re.search(r"seed +(\d+)", job.errors)[1] for job in jobs)
    assert first == second


def test_a_model_of_other_shapes_is_never_loaded_in_part(tmp_path):
    fit(small(), tmp_path)
    model = small(units=4)
    before = model.get_weights()
    with pytest.raises(InputError, match="variables of the checkpoint"):
        fit(model, tmp_path, allow=["model"])
    for one, two in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_run_begins_anew_where_it_is_told_to(tmp_path):
    history = fit(small(), tmp_path)
    assert fit(small(), tmp_path, resume=False).history == history.history
    earlier = {path.name for path in (tmp_path / "earlier-1").iterdir()}
    assert {"latest", "model.keras", "step-000000000006"} <= earlier


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(opened, "say", said.append)
    whole = fit(small(), tmp_path / "whole")
    # The best epoch's save waits for the one before it: two there are in any case, however slow the disk is.
    two = distfit.Checkpoint(tmp_path / "run", every_steps=1, best="loss")
    with pytest.raises(RunError):
        fit(small(), tmp_path / "run", checkpoint=two, callbacks=[Ends(5)])
    newest = sorted((tmp_path / "run").glob("step-*"))[-1]
    damaged = bytearray((newest / "tensors.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(damaged)
    history = fit(small(), tmp_path / "run", callbacks=[Ends(0)])
    assert f"checkpoint {newest} is damaged" in said[0]
    assert "the checkpoint before it is used" in said[0]
    assert history.history == whole.history


def carrying():
    """What an LSTM has seen goes from batch to batch, in variables that are none of the model's weights."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Reshape((2, 2)), keras.layers.LSTM(3, stateful=True), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input(batch_shape=(8, 4)), *layers])
    model.compile("adam", "mse")
    return model


def test_what_layers_carry_from_batch_to_batch_comes_back(tmp_path):
    whole = fit(carrying(), tmp_path / "whole", shuffle=False).history
    with pytest.raises(RunError):
        fit(carrying(), tmp_path / "run", shuffle=False, callbacks=[Ends(5)])
    assert fit(carrying(), tmp_path / "run", shuffle=False, callbacks=[Ends(0)]).history == whole


class Counting(keras.layers.Layer):
    """Old code: a variable that Keras knows nothing of."""

    def __init__(self):
        super().__init__()
        self.calls = [tf.Variable(0.0, name="calls")]

    def call(self, x):
        self.calls[0].assign_add(1.0)
        return x


def test_a_variable_that_no_checkpoint_holds_is_warned_about(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(state, "warn_once", warned.append)
    model = keras.Sequential([keras.Input((4,)), Counting(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, tmp_path / "run")
    (warning,) = warned
    assert "checkpoints do not hold calls:0" in warning


class Moves(keras.callbacks.Callback):
    """Changes the current folder in the middle of the training."""

    def __init__(self, folder, monkeypatch):
        super().__init__()
        self._folder, self._patch = folder, monkeypatch

    def on_train_begin(self, logs=None):
        self._folder.mkdir()
        self._patch.chdir(self._folder)


def test_folders_are_where_they_were_when_the_training_was_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"checkpoint": "runs/a", "log_dir": "logs", "callbacks": [Moves(tmp_path / "elsewhere", monkeypatch)]}
    fit(small(), None, **options)
    found = {path.as_posix() for path in tree(tmp_path)}
    assert {"runs/a/latest", "runs/a/model.keras", "runs/a/step-000000000006/manifest.json"} <= found
    assert any(name.startswith("logs/train/events") for name in found)
    assert not any(name.startswith("elsewhere/") for name in found)


def test_a_folder_of_damaged_checkpoints_is_refused_and_left_alone(tmp_path):
    fit(small(), tmp_path)
    for folder in tmp_path.glob("step-*"):
        (folder / "manifest.json").write_text("{")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"damaged ones only.*Nothing was changed"):
        fit(small(), tmp_path)
    assert tree(tmp_path) == before


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_works(tmp_path):
    fit(small(), tmp_path)
    before = tree(tmp_path)
    with RunLock(tmp_path, "the first"), pytest.raises(InputError, match=rf"only run in .*the first.*{os.getpid()}"):
        fit(small(), tmp_path, epochs=3, allow=["epochs"])
    assert tree(tmp_path) == before


class Removes(keras.callbacks.Callback):
    """Takes the run's folder away in the middle of the training."""

    def __init__(self, folder):
        super().__init__()
        self._folder = folder

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self._folder.rename(self._folder.with_name("elsewhere"))
            self._folder.write_text("no folder any more")


def test_a_folder_that_vanishes_ends_the_run_with_the_reason(tmp_path):
    options = distfit.Checkpoint(tmp_path / "run", every_steps=1, model=None)
    with pytest.raises(RunError, match=r"Expected to write the checkpoint of step \d .*Not a directory"):
        fit(small(), tmp_path / "run", checkpoint=options, callbacks=[Removes(tmp_path / "run")])


def test_beside_keras_own_restorer_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="BackupAndRestore"):
        fit(small(), tmp_path / "run", callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert tree(tmp_path) == {}


class Poisons(keras.callbacks.Callback):
    """Puts a NaN into the weights before a step of the run."""

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 4:
            self.model.layers[0].kernel.assign(np.full((4, 3), np.nan))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_state_with_nan_is_not_saved_unless_it_is_asked_for(tmp_path, allowed):
    options = distfit.Checkpoint(tmp_path, every_steps=1, allow_nan=allowed)
    fit(small(), tmp_path, checkpoint=options, callbacks=[Poisons()])
    steps = sorted(int(folder.name[5:]) for folder in tmp_path.glob("step-*"))
    assert steps[-1] == 6 if allowed else steps[-1] <= 4
    if allowed:
        newest = tmp_path / "step-000000000006"
        saved = [
            json.loads((newest / name).read_text(), parse_constant=no_json) for name in ("facts.json", "manifest.json")
        ]
        assert [facts["metrics"]["loss"] for facts in saved] == ["nan", "nan"]
        assert np.isnan(Checkpoints(tmp_path).read(6).manifest.metrics["loss"])


def no_json(word):
    raise AssertionError(f"{word} is no JSON")


def test_the_best_epoch_stays(tmp_path):
    """Here the worst: the first."""
    options = distfit.Checkpoint(tmp_path, keep=1, best="loss", mode="max")
    fit(small(), tmp_path, epochs=5, checkpoint=options)
    assert sorted(int(folder.name[5:]) for folder in tmp_path.glob("step-*")) == [3, 15]


def tree(folder):
    """Every file with its content, but for the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}
