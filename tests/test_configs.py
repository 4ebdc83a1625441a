"""Every file in configs/ loads, holds to the schema, and runs: on a small data set, as a user starts it."""

import json
import re

import jsonschema
import keras
import pytest
import tensorflow as tf
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from distfit import cli, config, experiment
from distfit.data.description import load as load_description
from distfit.data.plan import Order
from distfit.experiment import run
from distfit.experiment.job import prepare
from distfit.models import IMAGENET_MEAN, IMAGENET_VARIANCE
from tests.pictures import make_caltech
from tests.ranks import ROOT, launch

# The command line with the same paths, behind which each rank has another folder: OUT/RANK.
AS_ON_TWO_HOSTS = (
    "import os, sys, distfit.cli; os.chdir(sys.argv.pop(1) + '/' + os.environ['OMPI_COMM_WORLD_RANK']); "
    "distfit.cli.main()"
)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_the_configurations_that_the_pages_name():
    assert [path.stem for path in CONFIGS] == ["caltech256", "digits", "resnet50", "tabular"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_holds_to_the_schema(path):
    text = path.read_text()
    config.load(path)
    jsonschema.Draft202012Validator(config.schema()).validate(yaml.load(text, config._Loader))
    header = text[: text.index("data:")]
    assert f"distfit train configs/{path.name}" in header
    assert "distfit data build" in header
    assert "Time" in header or "about" in header
    assert "Result" in header or "result" in header


def test_schema_is_printed_without_a_configuration():
    printed = CliRunner().invoke(cli.app, ["train", "--schema"])
    assert printed.exit_code == 0
    assert json.loads(printed.output) == config.schema()
    for arguments in (["train"], ["train", "--schema", "x.yaml"], ["train", "--schema", "--smoke"]):
        refused = CliRunner().invoke(cli.app, arguments)
        assert refused.exit_code == 2
        assert "Error: " in refused.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set that `distfit data build` made of a folder of JPEGs in the layout of Caltech-256."""
    folder = tmp_path_factory.mktemp("caltech")
    make_caltech(folder / "pictures", classes=3, per_class=20)
    built = CliRunner().invoke(cli.app, ["data", "build", "--images", str(folder / "pictures"), str(folder / "data")])
    assert built.exit_code == 0, built.output
    return folder / "data"


def test_caltech256_is_the_experiment_that_the_project_began_with(pictures):
    settings = config.load(ROOT / "configs" / "caltech256.yaml", ["data.classes=3"])
    assert (settings.batch_size, settings.epochs, settings.steps_per_epoch) == (32, 3, 1000)
    job = prepare(settings, load_description(pictures))
    model = job.build()
    convolutions = [layer.get_config() for layer in model.layers if type(layer).__name__ == "Conv2D"]
    assert [each["filters"] for each in convolutions] == [64, 64, 128, 256]
    assert {(each["kernel_size"], each["strides"], each["activation"]) for each in convolutions} == {
        ((3, 3), (2, 2), "relu")
    }
    assert {each["kernel_initializer"]["class_name"] for each in convolutions} == {"HeNormal"}
    assert [type(layer).__name__ for layer in model.layers[-2:]] == ["GlobalAveragePooling2D", "Dense"]
    assert model.layers[-1].get_config()["activation"] == "linear"
    assert model.input_shape == (None, 224, 224, 3)
    assert type(model.optimizer).__name__ == "Adam"
    image, _ = next(iter(job.records("train").process_batches(order=Order(4, shuffle=False), global_batch=4)))[2]
    assert tf.reduce_mean(image, [1, 2, 3]).numpy() == pytest.approx([0] * 4, abs=1e-4)
    assert tf.math.reduce_variance(image, [1, 2, 3]).numpy() == pytest.approx([1] * 4, abs=1e-3)


@pytest.fixture(scope="module")
def caltech(pictures, tmp_path_factory):
    """From a number of ranks to the job and folder of a short run of configs/caltech256.yaml; each is started once."""
    runs = {}

    def of(ranks):
        if ranks not in runs:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            overrides = [f"data.path={pictures}", "data.classes=3", "steps_per_epoch=2", "epochs=2", "run_dir=run"]
            command = ["-m", "distfit", "train", str(ROOT / "configs" / "caltech256.yaml"), *overrides]
            runs[ranks] = launch(command, ranks, limit_s=240, cwd=folder), folder / "run"
        return runs[ranks]

    return of


def _history(run_dir):
    return json.loads((run_dir / "history.json").read_text())["history"]


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.mpi)])
def test_caltech256_runs_from_a_folder_of_jpegs_to_curves(caltech, ranks):
    job, run_dir = caltech(ranks)
    assert job.code == 0, job.report()
    history = _history(run_dir)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(run_dir / "logs" / folder)).Reload()
        for metric in ("loss", "accuracy"):
            curve = events.Tensors(f"epoch_{metric}")
            assert [event.step for event in curve] == [0, 1]
            shown = [float(tf.make_ndarray(event.tensor_proto)) for event in curve]
            assert shown == pytest.approx(history[f"{prefix}{metric}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(500)
def test_caltech256_on_two_ranks_is_the_training_of_one(caltech):
    (alone, alone_dir), (both, both_dir) = caltech(1), caltech(2)
    assert (alone.code, both.code) == (0, 0), alone.report() + both.report()
    expected, received = (
        json.loads((folder / "history.json").read_text())["history"] for folder in (alone_dir, both_dir)
    )
    for metric in ("loss", "val_loss"):
        # Four updates of a network with ReLUs in float32; 1e-6 apart where it was measured.
        assert received[metric] == pytest.approx(expected[metric], abs=1e-5)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(300)
def test_smoke_and_evaluation_on_two_ranks(caltech, pictures, tmp_path):
    job, run_dir = caltech(1)
    assert job.code == 0, job.report()
    before = sorted(run_dir.parent.rglob("*"))
    fields = [str(ROOT / "configs" / "caltech256.yaml"), f"data.path={pictures}", "data.classes=null", "run_dir=run"]
    smoke = launch(["-m", "distfit", "train", "--smoke", *fields], 2, limit_s=140, cwd=run_dir.parent)
    assert smoke.code == 0, smoke.report()
    assert smoke.output.count("smoke test passed") == 1, smoke.report()
    assert sorted(run_dir.parent.rglob("*")) == before
    # Only the chief sees the model.
    (tmp_path / "0").symlink_to(run_dir.parent)
    (tmp_path / "1").mkdir()
    command = ["-c", AS_ON_TWO_HOSTS, str(tmp_path), "evaluate", *fields, "--json"]
    evaluation = launch(command, 2, limit_s=140)
    assert evaluation.code == 0, evaluation.report()
    found = json.loads(evaluation.output)
    assert found["metrics"]["loss"] == pytest.approx(_history(run_dir)["val_loss"][-1], rel=1e-5)
    assert (found["split"], found["records"]) == ("validation", 12)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resnet50_runs_two_steps(pictures, tmp_path):
    small = ["data.image.size=[40, 40]", "model_options.crop=[32, 32]", "batch_size=4"]
    short = ["epochs=6", "strategy=single", "verbose=0", f"run_dir={tmp_path}"]
    settings = config.load(ROOT / "configs" / "resnet50.yaml", [f"data.path={pictures}", *small, *short])
    kept = []

    class Kept(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            kept.extend(variable.numpy() for variable in self.model.trainable_variables)

    history = run.train(settings, [Kept()], only_steps=2)
    model = history.model
    assert model.compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"
    assert {"loss", "accuracy", "top_k_categorical_accuracy"} <= set(history.history)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert model.count_params() > 23e6
    # The first update has a learning rate of 0, the second moved every weight.
    assert all((before != after.numpy()).any() for before, after in zip(kept, model.trainable_variables, strict=True))
    assert (tmp_path / "checkpoint" / "model.keras").stat().st_size > 90e6


def test_resnet50_augments_in_a_training_and_cuts_the_middle_out_otherwise(pictures):
    settings = config.load(
        ROOT / "configs" / "resnet50.yaml",
        [f"data.path={pictures}", "data.image.size=[40, 40]", "model_options.crop=[32, 32]", "dtype=float32"],
    )
    model = prepare(settings, load_description(pictures)).build()
    front = model.layers[:-2]
    images = tf.random.stateless_uniform([2, 40, 40, 3], [0, 1])

    def through(training):
        x = images
        for layer in front[1:]:
            x = layer(x, training=training) if "Random" in type(layer).__name__ else layer(x)
        return x.numpy()

    middle = (images.numpy()[:, 4:36, 4:36] - IMAGENET_MEAN) / [value**0.5 for value in IMAGENET_VARIANCE]
    assert through(training=False) == pytest.approx(middle, abs=1e-5)
    assert through(training=True).shape == (2, 32, 32, 3)
    assert abs(through(training=True) - middle).max() > 0.1


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wine") / "data" / "wine"
    built = CliRunner().invoke(cli.app, ["data", "build", "--from", "wine", str(folder)])
    assert built.exit_code == 0, built.output
    return folder


def test_tabular_learns_in_a_few_epochs(wine, tmp_path):
    overrides = [f"data.path={wine}", f"run_dir={tmp_path / 'run'}", "epochs=5", "verbose=0"]
    history = experiment.train(config.load(ROOT / "configs" / "tabular.yaml", [*overrides, "strategy=single"])).history
    assert history["val_accuracy"][-1] > 0.9


def _own_package(folder):
    """The user's package and configuration of docs/guides/experiments.md, written down."""
    page = (ROOT / "docs" / "guides" / "experiments.md").read_text()
    blocks = re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", page, re.DOTALL)
    for name, text in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [name for name, _ in blocks]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(300)
def test_own_package_of_the_guide_trains_on_two_ranks_and_evaluates_on_one(wine, tmp_path):
    assert _own_package(tmp_path) == ["wine.yaml", "mypackage/models.py"]
    (tmp_path / "data").symlink_to(wine.parent)
    training = launch(["-m", "distfit", "train", "wine.yaml"], 2, limit_s=140, cwd=tmp_path)
    assert training.code == 0, training.report()
    assert (tmp_path / "runs" / "mine" / "config.yaml").read_text().startswith("# distfit train runs/mine/config.yaml")
    evaluation = launch(["-m", "distfit", "evaluate", "runs/mine/config.yaml"], limit_s=140, cwd=tmp_path)
    assert evaluation.code == 0, evaluation.report()
    loss = re.search(r"^  loss +(\S+)$", evaluation.output, re.MULTILINE)
    assert float(loss[1]) == pytest.approx(_history(tmp_path / "runs" / "mine")["val_loss"][-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_ranks_with_other_data_sets_are_refused_with_a_table(wine, tmp_path):
    other = CliRunner().invoke(
        cli.app, ["data", "build", "--from", "wine", "--seed", "5", str(tmp_path / "1" / "data")]
    )
    assert other.exit_code == 0, other.output
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "data").symlink_to(wine)
    fields = [str(ROOT / "configs" / "tabular.yaml"), "data.path=data"]
    refused = launch(["-c", AS_ON_TWO_HOSTS, str(tmp_path), "train", *fields], 2, limit_s=140)
    assert refused.code == 2, refused.report()
    assert refused.errors.count("Expected the same data set on every rank, received:") == 1, refused.report()
    assert re.search(r"^  seed +0 +5$", refused.errors, re.MULTILINE), refused.report()
    assert not list(tmp_path.glob("*/runs"))


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_own_package_that_raises_is_told_once_by_its_line(wine, tmp_path):
    _own_package(tmp_path)
    (tmp_path / "data").symlink_to(wine.parent)
    model = tmp_path / "mypackage" / "models.py"
    model.write_text(model.read_text().replace("    return keras.Model(", "    halves / 2\n    return keras.Model("))
    line = 1 + model.read_text()[: model.read_text().index("halves / 2")].count("\n")
    refused = launch(["-m", "distfit", "train", "wine.yaml"], 2, limit_s=140, cwd=tmp_path)
    assert refused.code == 2, refused.report()
    expected = (
        f"Expected mypackage.models:build that model names to return, received TypeError from {model}:{line} (build)"
    )
    assert refused.errors.count(expected) == 1, refused.report()
    assert "Traceback" not in refused.errors
    assert not (tmp_path / "runs").exists()
