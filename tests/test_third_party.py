"""Callbacks of other packages: told apart as writers, and what they leave behind under mpirun is there once."""

from __future__ import annotations

import importlib
import json

import keras
import pytest

from distfit.callbacks.policy import Policy, policy_of
from distfit.callbacks.third_party import KNOWN, is_writer
from tests.ranks import launch

INSTALLED = {
    "wandb.integration.keras.WandbMetricsLogger": True,
    "wandb.integration.keras.WandbModelCheckpoint": True,
    "wandb.integration.keras.WandbEvalCallback": True,
    "mlflow.keras.MlflowCallback": True,
    "mlflow.tensorflow.MlflowCallback": True,
    "mlflow.tensorflow.MlflowModelCheckpointCallback": True,
    "tensorboard.plugins.hparams.api.KerasCallback": True,
    "tqdm.keras.TqdmCallback": True,
    "keras_tuner.src.engine.tuner_utils.SaveBestEpoch": True,
    "keras_tuner.src.engine.tuner_utils.TunerCallback": False,
}
# No phone calls: W&B offline and without error reports, MLflow in a folder and without telemetry.
QUIET = {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "DO_NOT_TRACK": "true",
}


def _classes(path):
    """A class of a package that may not be installed, and a user's subclass of it; without the first if it is
    abstract."""
    package, _, name = path.rpartition(".")
    kind = getattr(pytest.importorskip(package, reason=f"{package} is not installed"), name)
    methods = dict.fromkeys(getattr(kind, "__abstractmethods__", ()))
    mine = type(kind)("Mine", (kind,), {"__module__": "__main__"} | methods)
    return [mine] if methods else [kind, mine]


@pytest.mark.parametrize(("path", "writes"), INSTALLED.items())
def test_real_classes_are_told_apart(path, writes):
    for kind in _classes(path):
        callback = object.__new__(kind)
        assert is_writer(callback) is writes
        assert policy_of(callback) is (Policy.CHIEF if writes else Policy.EVERY_RANK)


def _like(known, name="Callback"):
    """A callback as its package would define it."""
    return type(name, (keras.callbacks.Callback,), {"__module__": f"{known.module}.somewhere"})()


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.module)
def test_every_line_of_the_table_holds_for_its_package(known):
    name = known.classes[0] if known.classes else "Anything"
    assert is_writer(_like(known, name)) is known.writes
    assert (is_writer(_like(known, "AnotherOne")) is None) == bool(known.classes)
    assert known.why
    assert known.source


@pytest.mark.parametrize("module", ["wandbox", "__main__", "my.wandb", "keras_tuner"])
def test_what_is_not_in_the_table_is_not_known(module):
    assert is_writer(type("Mine", (keras.callbacks.Callback,), {"__module__": module})()) is None


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """The folder after one training and one search on two ranks, and what each rank says of them."""
    for package in ("wandb", "mlflow", "keras_tuner", "tqdm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("run")
    env = QUIET | {"MLFLOW_TRACKING_URI": f"file:{folder}/mlruns"}
    job = launch(["-m", "tests.third_party_script", str(folder)], ranks=2, env=env)
    assert job.code == 0, job.report()
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.mpi
@pytest.mark.slow
def test_loggers_are_called_on_the_chief_alone(left_behind):
    _, (chief, other) = left_behind
    assert other["told"] == []
    assert len(chief["told"]) == 5
    assert chief["history"] == other["history"]


@pytest.mark.mpi
@pytest.mark.slow
def test_one_run_of_weights_and_biases_has_the_global_values(left_behind):
    folder, (chief, _) = left_behind
    assert len(list((folder / "wandb").glob("*-run-*"))) == 1
    assert (folder / "best.keras").is_file()
    for name, values in chief["history"].items():
        assert chief["wandb"][f"epoch/{name}"] == values[-1]


@pytest.mark.mpi
@pytest.mark.slow
def test_one_run_of_mlflow_has_the_global_values(left_behind):
    folder, (chief, _) = left_behind
    (run,) = (folder / "mlruns" / "0").glob("*/metrics")
    for name, values in chief["history"].items():
        lines = [line.split() for line in (run / name).read_text().splitlines()]
        assert [(float(value), int(step)) for _, value, step in lines] == list(zip(values, range(2), strict=True))


@pytest.mark.mpi
@pytest.mark.slow
def test_one_session_of_hparams(left_behind):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder, _ = left_behind
    events = [event for file in (folder / "hparams").iterdir() for event in EventFileLoader(str(file)).Load()]
    tags = [value.tag for event in events for value in event.summary.value]
    assert sorted(tags) == ["_hparams_/session_end_info", "_hparams_/session_start_info"]


@pytest.mark.mpi
@pytest.mark.slow
def test_a_search_by_keras_tuner_tries_the_same_on_every_rank(left_behind):
    folder, (chief, other) = left_behind
    assert chief["search"] == other["search"]
    assert len({rate for rate, _ in chief["search"]}) == 2
    assert len(list(folder.glob("tuner/*/trial_*/checkpoint.weights.h5"))) == 2
    assert other["saved"] == []
