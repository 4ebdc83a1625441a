"""The main job, as a user starts it: `distfit train configs/digits.yaml` alone, on two devices, on ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import ROOT, environment, launch

EPOCHS = 3
RUNS = {
    "alone": (1, "none", ["strategy=single"]),
    "two devices": (1, "none", ["strategy=mirrored", "devices=2"]),
    "two ranks": (2, "mpirun", []),
    "three ranks": (3, "mpirun", []),
}
MANY = [pytest.param(run, marks=[pytest.mark.mpi] * (RUNS[run][0] > 1)) for run in RUNS if run != "alone"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """From a run's name to its finished job and folder; each is started once."""
    folder = tmp_path_factory.mktemp("digits")
    build = [sys.executable, "-m", "distfit", "data", "build", "--from", "digits", str(folder / "data")]
    subprocess.run(build, check=True, env=environment(), timeout=120)
    cache = {}

    def of(name):
        if name not in cache:
            ranks, launcher, fields = RUNS[name]
            run_dir = folder / name.replace(" ", "-")
            overrides = [f"data.path={folder / 'data'}", f"run_dir={run_dir}", f"epochs={EPOCHS}", *fields]
            command = ["-m", "distfit", "train", str(ROOT / "configs" / "digits.yaml"), *overrides]
            cache[name] = launch(command, ranks, launcher, limit_s=240, cwd=folder), run_dir
        return cache[name]

    return of


def _history(run_dir):
    return json.loads((run_dir / "history.json").read_text())["history"]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", MANY)
def test_losses_agree_however_it_is_launched(run_of, name):
    (alone, alone_dir), (job, run_dir) = run_of("alone"), run_of(name)
    assert (alone.code, job.code) == (0, 0), alone.report() + job.report()
    expected, received = _history(alone_dir), _history(run_dir)
    assert expected.keys() == received.keys() == {"loss", "accuracy", "val_loss", "val_accuracy"}
    for metric in ("loss", "val_loss"):
        assert len(received[metric]) == EPOCHS
        assert received[metric] == pytest.approx(expected[metric], abs=1e-5)
    assert received["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["alone", *MANY])
def test_one_rank_speaks_and_the_run_folder_is_whole(run_of, name):
    job, run_dir = run_of(name)
    assert job.code == 0, job.report()
    assert job.errors.count("global batch    32") == 1
    assert (job.output + job.errors).count(f"epoch {EPOCHS}/{EPOCHS}") == 1
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    logs = {file for file in files if file.startswith("logs/")}
    kept = {file for file in files if file.startswith("checkpoint/step-")}
    assert {Path(file).name for file in kept} == {"facts.json", "manifest.json", "tensors.safetensors"}
    of_checkpoint = {"checkpoint/model.keras", "checkpoint/latest", "checkpoint/run.lock"}
    assert files - logs - kept == {"config.yaml", "history.json"} | of_checkpoint
    assert {file.split("/")[1] for file in logs} == {"train", "validation"}
    assert len(logs) == 2


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["alone", *MANY])
def test_tensorboard_shows_what_the_history_says(run_of, name):
    _, run_dir = run_of(name)
    history = _history(run_dir)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(run_dir / "logs" / folder)).Reload()
        for metric in ("loss", "accuracy"):
            shown = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(f"epoch_{metric}")]
            assert shown == pytest.approx(history[f"{prefix}{metric}"], rel=1e-6)


LOAD = """
import sys
sys.modules["distfit"] = None
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
assert model.optimizer.iterations == int(sys.argv[2]), int(model.optimizer.iterations)
assert model.predict(np.zeros((1, 8, 8, 1)), verbose=0).shape == (1, 10)
"""


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["alone", *MANY])
def test_the_model_left_behind_is_plain_keras(run_of, name):
    _, run_dir = run_of(name)
    job = launch(["-c", LOAD, str(run_dir / "checkpoint" / "model.keras"), str(45 * EPOCHS)], limit_s=120)
    assert job.code == 0, job.report()
