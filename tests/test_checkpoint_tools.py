"""`distfit checkpoint list`, `verify`, `show`, `diff`, `prune` and `export`: what they say, change and refuse."""

import json
import os
import re
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from distfit.checkpoint import pruning, statistics
from distfit.checkpoint.differences import differences
from distfit.checkpoint.folder import Checkpoints
from distfit.checkpoint.lock import RunLock
from distfit.checkpoint.plain import packed
from distfit.checkpoint.statistics import Numbers, difference_of, numbers_of
from distfit.cli import checkpoint
from distfit.cli.frame import command_line
from tests.ranks import environment

app = command_line("Looks at checkpoints.", "distfit checkpoint list runs/a")
app.command("list")(checkpoint.list_)
for command in (checkpoint.verify, checkpoint.show, checkpoint.diff, checkpoint.prune, checkpoint.export):
    app.command()(command)

KERNEL, BIAS, RATE = "weight/00000/dense/kernel", "weight/00001/dense/bias", "optimizer/00002/adam/learning_rate"
VAL_LOSSES = {10: 0.5, 20: 0.4, 30: 0.6}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="distfit")


def printed(*arguments, code=0):
    """What a command says on standard output; it has to end with this exit code."""
    done = run(*arguments)
    assert done.exit_code == code, done.output
    return done.stdout


def refused(*arguments):
    """The one paragraph of a command that refuses its input."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("distfit: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def tensors_of(step):
    kernel = np.arange(12, dtype="float32").reshape(3, 4) / 7 + step
    return {KERNEL: kernel, BIAS: np.zeros(4, "float32"), RATE: np.array(0.1, "float32")}


def facts_of(step, **more):
    return {
        "place": {"epoch": step // 20, "step": step % 20, "total": step},
        "seed": 7,
        "metrics": {"loss": 1 / step, "val_loss": VAL_LOSSES.get(step, 1.0)},
        "versions": {"keras": "3.15.1"},
        "fields": {"batch_size": "32", "optimizer: Adam learning_rate": "0.1"},
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints at steps 10, 20 and 30."""
    checkpoints = Checkpoints(made(tmp_path / "run"))
    for step in VAL_LOSSES:
        checkpoints.publish(step, tensors_of(step), facts_of(step))
    return tmp_path / "run"


def made(folder):
    folder.mkdir()
    return folder


def step_folder(folder, step):
    return folder / f"step-{step:012d}"


def flip(folder, step):
    """One bit of a checkpoint's last number."""
    path = step_folder(folder, step) / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def steps_in(folder):
    return [entry.step for entry in Checkpoints(folder).entries()]


# ---- list


def test_list_has_a_line_for_each_checkpoint_with_place_age_metrics_and_the_latest(folder):
    head, titles, *lines = printed("list", folder).splitlines()
    assert re.fullmatch(rf"{folder}: 3 checkpoints, [\d.]+ kB", head)
    assert titles.split() == ["step", "place", "written", "size", "metrics"]
    assert [line.split("  ")[1] for line in lines] == ["10", "20", "30"]
    assert "epoch 1, step 10" in lines[0]
    assert "after epoch 1" in lines[1]
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \((now|\d+ s ago)\)", lines[2])
    assert "loss 0.033333, val_loss 0.6" in lines[2]
    assert [line.endswith("latest") for line in lines] == [False, False, True]


def test_list_marks_what_the_run_keeps_as_its_best(folder):
    Checkpoints(folder).publish(40, tensors_of(40), facts_of(40, best_by=["val_loss", "min"], finished=True))
    lines = printed("list", folder).splitlines()[2:]
    assert lines[1].endswith("best val_loss")
    assert lines[3].endswith("latest, finished")
    Checkpoints(folder).publish(50, tensors_of(50), facts_of(50, metrics={"val_loss": 0.1}, nan=True))
    assert printed("list", folder).splitlines()[-1].endswith("latest, holds NaN or infinity")


def test_list_names_damage_that_can_be_seen_without_reading_all(folder):
    path = step_folder(folder, 20) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (step_folder(folder, 30) / "manifest.json").write_text("{")
    lines = printed("list", folder).splitlines()[2:]
    assert "damaged" not in lines[0]
    assert "damaged: " in lines[1]
    assert "tensors.safetensors" in lines[1]
    assert "latest, damaged: " in lines[2]


def test_list_shows_what_an_unfinished_save_has_left(folder):
    left = folder / ".partial-000000000040-17"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"x" * 1500)
    line = printed("list", folder).splitlines()[-1]
    assert line.split("  ")[1] == left.name
    assert "1.5 kB  " in line
    assert "not finished" in line


def test_list_is_json_for_machines(folder):
    found = json.loads(printed("list", folder, "--json"))
    assert [row["step"] for row in found["rows"]] == [10, 20, 30]
    assert found["rows"][1]["metrics"] == {"loss": 0.05, "val_loss": 0.4}
    assert found["rows"][2]["marks"] == ["latest"]


def test_a_folder_of_distfit_train_is_understood(folder, tmp_path):
    (tmp_path / "runs").mkdir()
    os.rename(folder, tmp_path / "runs" / "checkpoint")
    assert "3 checkpoints" in printed("list", tmp_path / "runs")


@pytest.mark.parametrize("command", ["verify", "show"])
def test_what_is_no_run_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert "received '" in refused(command, tmp_path / "none")
    assert "no folder" in refused(command, tmp_path / "file")
    assert "which has none" in refused(command, tmp_path)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(folder):
    for command in ("show", "verify"):
        assert "received 15; there are 10, 20, 30" in refused(command, folder, "--step", 15)


# ---- verify


def test_verify_reads_every_byte_and_names_what_is_damaged(folder):
    assert printed("verify", folder).startswith("3 checkpoints, none of them damaged; ")
    flip(folder, 20)
    lines = printed("verify", folder, code=1).splitlines()
    assert re.match("step-000000000020: damaged: .*checksum", lines[0])
    assert lines[1].startswith("3 checkpoints, 1 of them damaged; ")


def test_verify_of_one_step_leaves_the_others(folder):
    flip(folder, 20)
    assert printed("verify", folder, "--step", 30).startswith("1 checkpoint, none of them damaged; ")
    found = json.loads(printed("verify", folder, "--step", 20, "--json", code=1))
    assert (found["whole"], list(found["damaged"])) == ([], ["step-000000000020"])


# ---- show


def test_show_has_facts_and_the_numbers_of_each_tensor(folder):
    text = printed("show", folder)
    assert text.startswith(f"{step_folder(folder, 30)}: step 30\n")
    assert re.search(r"^  place +epoch 2, step 10$", text, re.MULTILINE)
    assert re.search(r"^  seed +7$", text, re.MULTILINE)
    assert re.search(r"^fields\n  batch_size +32\n  optimizer: Adam learning_rate  0.1$", text, re.MULTILINE)
    assert "3 tensors of 17 numbers, 68 B" in text
    row = next(line for line in text.splitlines() if KERNEL in line)
    assert row.split()[1:] == ["float32", "[3,", "4]", "48", "30", "30.79", "31.57", "106.7"]


def test_show_has_the_states_of_callbacks_in_short(folder):
    states = {"EarlyStopping": {"best": 0.25, "wait": 2, "best_weights": [np.zeros((2, 3))], "seen": (1, 2)}}
    plain, arrays = packed(states)
    tensors = {f"callbacks/{name}": array for name, array in arrays.items()}
    Checkpoints(folder).publish(40, tensors, facts_of(40, callbacks=plain))
    text = printed("show", folder)
    assert "callbacks\n  EarlyStopping  best 0.25, wait 2, best_weights [float64[2, 3]], seen [1, 2]\n" in text


def test_show_counts_what_is_not_finite_and_stays_json(folder):
    bias = np.array([np.nan, 2, -np.inf, 4], "float32")
    Checkpoints(folder).publish(40, {BIAS: bias}, facts_of(40, best=float("inf")))
    assert "2      3     4     4.472  1 nan, 1 infinite" in printed("show", folder)
    found = json.loads(printed("show", folder, "--json"))
    assert found["tensors"][0]["numbers"]["nan"] == 1
    assert found["tensors"][0]["shape"] == [4]


def test_show_of_another_step_needs_no_whole_newest(folder):
    flip(folder, 30)
    done = run("show", folder)
    assert "step-000000000030" in done.stderr
    assert f"{step_folder(folder, 20)}: step 20" in done.stdout
    assert run("show", folder, "--step", 30).exit_code == 1
    for step in (10, 20):
        flip(folder, step)
    assert "3 that are all damaged" in run("show", folder).stderr
    named = run("show", folder, "--step", 30)
    assert named.exit_code == 1
    assert re.search(r"step-000000000030 is damaged: .*`distfit checkpoint verify` says which are whole", named.stderr)


def test_names_in_a_checkpoint_of_somebody_do_not_steer_the_terminal(folder):
    evil = "\x1b[2J"
    Checkpoints(folder).publish(
        40, {f"weight/{evil}": np.zeros(1)}, facts_of(40, note=evil, fields={evil: evil}, metrics={evil: 1.0})
    )
    shown = [printed("list", folder), printed("show", folder), printed("diff", folder, f"{folder}@10", code=1)]
    assert all("x1b[2J" in text and "\x1b" not in text for text in shown)


# ---- diff


def test_diff_of_equal_checkpoints_says_so_and_exits_with_0(folder, tmp_path):
    Checkpoints(made(tmp_path / "other")).publish(30, tensors_of(30), facts_of(30))
    text = printed("diff", folder, tmp_path / "other")
    assert text == f"{folder}@30 and {tmp_path}/other@30 are equal to the bit: 9 fields and 3 tensors of 17 numbers\n"


def test_diff_shows_fields_and_by_how_much_tensors_differ(folder):
    text = printed("diff", f"{folder}@10", "@20", code=1)
    assert "  5 of 9 fields differ\n" in text
    assert re.search(r"^    place.total +10 +20$", text, re.MULTILINE)
    assert "  1 of 3 tensors differ\n" in text
    assert re.search(rf"^    {KERNEL} +12 +12 +10 +0.5$", text, re.MULTILINE)
    assert " fields" not in printed("diff", folder, f"{folder}@10", "--tensors", code=1)


def test_diff_is_json_for_machines(folder):
    found = json.loads(printed("diff", folder, f"{folder}@20", "--json", code=1))
    assert (found["equal"], [tensor["name"] for tensor in found["tensors"]]) == (False, [KERNEL])
    assert found["tensors"][0]["difference"]["absolute"] == 10


@pytest.mark.parametrize("text", ["@10", "run@ten", "run@"])
def test_diff_refuses_what_names_no_step(folder, text, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert "RUN@STEP such as runs/a@120" in refused("diff", text, "run")


def test_diff_pairs_tensors_whose_layers_keras_has_counted_on():
    ours = {"weight/00000/dense/kernel": np.ones(2), "weight/00001/only": np.ones(1)}
    theirs = {"weight/00000/dense_1/kernel": np.array([1.0, 2.0]), "weight/00002/new": np.ones(3)}
    found = differences({}, ours, {}, theirs)
    assert [(one.name, one.one, one.other) for one in found.tensors] == [
        ("weight/00000/dense/kernel", "float64[2]", "float64[2]"),
        ("weight/00001/only", "float64[1]", None),
        ("weight/00002/new", None, "float64[3]"),
    ]
    assert found.tensors[0].difference == statistics.Difference(2, 1, 1.0, 0.5)


def test_diff_of_another_shape_or_type_names_both():
    found = differences({}, {"a": np.ones((2, 3), "float32")}, {}, {"a": np.ones((3, 2), "float16")})
    assert (found.tensors[0].one, found.tensors[0].other) == ("float32[2, 3]", "float16[3, 2]")
    assert found.tensors[0].difference is None


# ---- the numbers


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int8", "uint64", "bool"])
def test_numbers_are_those_of_float64_whatever_the_type_and_the_blocks(dtype, monkeypatch):
    values = np.random.default_rng(0).uniform(0, 100, size=(7, 11)).astype(dtype)
    monkeypatch.setattr(statistics, "_BLOCK", 10)
    wide = values.astype("float64")
    found = numbers_of(values)
    assert (found.count, found.least, found.most) == (77, wide.min(), wide.max())
    np.testing.assert_allclose([found.mean, found.norm], [wide.mean(), np.linalg.norm(wide)], rtol=1e-13)


def test_a_tensor_without_finite_numbers_has_counts_alone(monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", 2)
    assert numbers_of(np.array([np.nan, np.inf, np.nan])) == Numbers(3, None, None, None, None, nan=2, infinite=1)
    assert numbers_of(np.zeros((0, 3))) == Numbers(0, None, None, None, None)


def test_bits_are_compared_not_values():
    zeros, nan = np.array([0.0, -0.0, np.nan, 1.0]), np.array([0.0, 0.0, np.nan, np.nan])
    assert difference_of(zeros, nan) == statistics.Difference(4, bits=2, finite_in_one=1)
    assert difference_of(nan, nan).bits == 0


def test_large_integers_are_compared_exactly():
    one, other = np.array([2**62 + 1, -(2**63)]), np.array([2**62, 2**63 - 1])
    assert difference_of(one, other).absolute == float(2**64 - 1)
    assert difference_of(one[:1], other[:1]).absolute == 1.0
    halves = np.array([1.5, 3], ml_dtypes.bfloat16), np.array([1.5, 2], ml_dtypes.bfloat16)
    assert difference_of(*halves) == statistics.Difference(2, 1, 1.0, 1 / 3)


# ---- prune


def test_prune_deletes_what_the_rules_do_not_keep(folder):
    text = printed("prune", folder, "--keep", 1, "--best", "val_loss", "--mode", "min", "--dry-run")
    assert text.startswith("would delete step 10: ")
    assert steps_in(folder) == [10, 20, 30]
    text = printed("prune", folder, "--keep", 1, "--best", "val_loss")
    assert "\nstay: steps 20, 30, whole\n" in text
    assert steps_in(folder) == [20, 30]
    assert printed("prune", folder, "--keep", 2) == "nothing to delete\nstay: steps 20, 30, whole\n"


def test_prune_keeps_the_best_by_the_runs_own_metric(folder):
    Checkpoints(folder).publish(40, tensors_of(40), facts_of(40, best_by=["val_loss", "min"]))
    printed("prune", folder, "--keep", 1)
    assert steps_in(folder) == [20, 40]


def test_prune_never_counts_a_damaged_one_and_leaves_it(folder):
    flip(folder, 30)
    text = printed("prune", folder, "--keep", 1)
    assert "damaged, left to you: step 30: " in text
    assert steps_in(folder) == [20, 30]


def test_prune_deletes_nothing_where_nothing_is_whole(folder):
    for step in VAL_LOSSES:
        flip(folder, step)
    assert printed("prune", folder, "--keep", 1).startswith("nothing to delete\nnone is whole\n")
    assert steps_in(folder) == [10, 20, 30]


def test_prune_refuses_a_folder_in_which_a_run_is_at_work(folder):
    with RunLock(folder, "distfit.fit"):
        assert str(os.getpid()) in refused("prune", folder, "--keep", 1)
        assert "would delete" in printed("prune", folder, "--keep", 1, "--dry-run")
    assert steps_in(folder) == [10, 20, 30]


def test_prune_leaves_what_a_killed_run_has_told_of_itself(folder):
    code = (
        "import os, sys\n"
        "from distfit.checkpoint.lock import RunLock\n"
        "lock = RunLock(sys.argv[1], 'distfit.fit')\n"
        "lock.acquire()\n"
        "lock.touch(step=37)\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, folder], env=environment(), timeout=60, check=False)
    printed("prune", folder, "--keep", 1)
    with RunLock(folder, "distfit.fit") as lock:
        assert lock.left["step"] == 37


def test_prune_refuses_a_metric_that_no_checkpoint_has(folder):
    assert "did you mean 'val_loss'?" in refused("prune", folder, "--keep", 1, "--best", "val_los", "--mode", "min")
    assert "mode" in refused("prune", folder, "--keep", 1, "--best", "metric")
    assert steps_in(folder) == [10, 20, 30]


def test_a_plan_is_verified_before_anything_goes(folder, monkeypatch):
    """Of two that would stay one is damaged: the next older one takes its place."""
    seen = []
    monkeypatch.setattr(Checkpoints, "delete", lambda self, step: seen.append(step))
    flip(folder, 20)
    plan = pruning.planned(Checkpoints(folder), keep=2)
    pruning.delete(Checkpoints(folder), plan)
    assert (plan.gone, plan.kept, list(plan.damaged), seen) == ((), (10, 30), [20], [])


def test_commands_that_look_load_no_tensorflow(folder):
    code = (
        "import sys\n"
        "from distfit.cli import checkpoint\n"
        "run = sys.argv[1]\n"
        "checkpoint.list_(run), checkpoint.verify(run, None), checkpoint.show(run, None)\n"
        "checkpoint.diff(run, run), checkpoint.prune(run, 1, None, 'auto', None, False)\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=environment(), timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert steps_in(folder) == [30]


# ---- export


class Scaled(keras.layers.Layer):
    """A layer that Keras does not know."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


def network(*more):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, activation="relu")(inputs)
    hidden = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(hidden))
    for layer in more:
        hidden = layer(hidden)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden))


def plain_network():
    """What `--model` names."""
    return network()


def scaled_network():
    return network(Scaled())


def lambda_network():
    return network(keras.layers.Lambda(lambda x: x * 2))


X = np.linspace(-1, 1, 24, dtype="float32").reshape(6, 4)


def trained(model):
    model.compile("adam", "mse")
    model.fit(X, X[:, :2], epochs=2, verbose=0)
    return model


def publish(model, folder, described=True):
    names = [f"weight/{number:05d}/{weight.path}" for number, weight in enumerate(model.weights)]
    tensors = {name: weight.numpy() for name, weight in zip(names, model.weights, strict=True)}
    variables = [
        {"kind": "weight", "path": weight.path, "tensor": name}
        for name, weight in zip(names, model.weights, strict=True)
    ]
    facts = facts_of(50, model=model.to_json() if described else None, variables=variables)
    Checkpoints(made(folder)).publish(50, tensors, facts)


@pytest.fixture(scope="module")
def model():
    return trained(plain_network())


@pytest.fixture
def exported(model, tmp_path):
    """The folder of a run whose checkpoint has a trained model."""
    publish(model, tmp_path / "run")
    return tmp_path / "run"


LOAD = """
import sys
sys.modules["distfit"] = None
import keras, numpy as np, tensorflow as tf
x = np.load("x.npy")
model = keras.models.load_model("model.keras")
served = tf.saved_model.load("served")
np.savez("out.npz", keras=model.predict(x, verbose=0), served=served.serve(x).numpy())
"""


def test_what_is_exported_predicts_the_same_where_distfit_is_not_installed(exported, model, tmp_path):
    text = printed("export", exported, "--to", tmp_path / "model.keras")
    assert re.match(rf"{tmp_path}/model.keras: the model of step 50 of {exported}, [\d.]+ kB\n", text)
    printed("export", exported, "--to", tmp_path / "served", "--step", 50)
    np.save(tmp_path / "x.npy", X)
    subprocess.run([sys.executable, "-c", LOAD], env=environment(), cwd=tmp_path, timeout=100, check=True)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["keras"], model.predict(X, verbose=0))
        np.testing.assert_allclose(out["served"], model.predict(X, verbose=0), rtol=1e-6, atol=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "out.npz", "run", "served", "x.npy"]


def test_export_replaces_nothing_without_force_and_nothing_that_is_not_its_own(exported, tmp_path):
    out, folder = tmp_path / "model.keras", tmp_path / "served"
    out.write_bytes(b"mine")
    assert "Pass --force" in refused("export", exported, "--to", out)
    assert out.read_bytes() == b"mine"
    printed("export", exported, "--to", out, "--force")
    assert keras.models.load_model(out).count_params() > 0
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert "something else" in refused("export", exported, "--to", folder, "--force")
    assert (folder / "thesis.tex").read_text() == "mine"
    assert ".keras or a folder" in refused("export", exported, "--to", tmp_path / "model.h5")


def test_an_export_that_fails_leaves_what_was_there(exported, tmp_path, monkeypatch):
    def full(self, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "model.keras"
    out.write_bytes(b"mine")
    monkeypatch.setattr(keras.Model, "save", full)
    done = run("export", exported, "--to", out, "--force")
    assert done.exit_code == 1
    assert "No space left on device. " in done.stderr
    assert out.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "run"]


def test_a_model_with_other_weights_is_refused_whole_and_by_name(exported, tmp_path):
    done = refused("export", exported, "--to", tmp_path / "a.keras", "--model", f"{__name__}:scaled_network")
    assert "8 weights of the checkpoint, received one with 9: " in done
    assert "scale" in done
    assert not (tmp_path / "a.keras").exists()


def test_a_checkpoint_that_fit_has_not_written_is_refused(folder, tmp_path):
    out = tmp_path / "a.keras"
    assert "'variables' is missing" in refused("export", folder, "--to", out, "--model", f"{__name__}:plain_network")


def test_code_in_a_description_is_refused_and_a_function_builds_instead(tmp_path):
    publish(trained(lambda_network()), tmp_path / "run")
    out = tmp_path / "a.keras"
    assert "--model module:function" in refused("export", tmp_path / "run", "--to", out)
    printed("export", tmp_path / "run", "--to", out, "--model", f"{__name__}:lambda_network")


def test_a_checkpoint_without_a_description_needs_a_function(model, tmp_path):
    publish(model, tmp_path / "run", described=False)
    out = tmp_path / "a.keras"
    assert "--model module:function" in refused("export", tmp_path / "run", "--to", out)
    printed("export", tmp_path / "run", "--to", out, "--model", f"{__name__}:plain_network")
    np.testing.assert_array_equal(keras.models.load_model(out).predict(X, verbose=0), model.predict(X, verbose=0))
    assert "did you mean" in refused(
        "export", tmp_path / "run", "--to", out, "--force", "--model", f"{__name__}:plain_net"
    )


def test_own_layers_are_found_by_the_module_that_is_named(tmp_path):
    trained_model = trained(scaled_network())
    publish(trained_model, tmp_path / "run")
    out = tmp_path / "a.keras"
    assert "Could not locate class 'Scaled'" in refused("export", tmp_path / "run", "--to", out)
    printed("export", tmp_path / "run", "--to", out, "--custom", f"{__name__}:Scaled")
    again = keras.models.load_model(out, custom_objects={"Scaled": Scaled})
    np.testing.assert_array_equal(again.predict(X, verbose=0), trained_model.predict(X, verbose=0))
