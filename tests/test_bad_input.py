"""What cannot work is refused in one paragraph before training starts: expected, received, what to do.

Most of it in this process, through `distfit.fit` and the command line; what several ranks have to refuse
together, and what a process can meet only once, in processes of their own.
"""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

import distfit
from distfit import cli
from distfit.backends import choose, devices
from distfit.data.build import Source, write_dataset
from distfit.data.records import write_records
from distfit.data.sources import Request, source_of
from distfit.topology import Topology
from tests.ranks import launch
from tests.test_failing import errors

X, Y = np.ones((12, 4), np.float32), np.arange(12) % 3
FEATURES = {"label": tf.io.FixedLenFeature([], tf.int64)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in, no launcher around."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISTFIT_DEVICES", "DISTFIT_STRATEGY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def compiled(**arguments):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **arguments)
    return model


def uncompiled():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def refused(call, message, folder):
    """`call` raises one paragraph that says it all and leaves `folder` as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(distfit.InputError, match=message) as caught:
        call()
    paragraph = str(caught.value)
    assert "xpected" in paragraph
    assert re.search("received|refuse", paragraph)
    assert "\n" not in paragraph
    assert sorted(folder.rglob("*")) == before


def fit(*data, model=None, **arguments):
    settings = {"strategy": "single", "verbose": 0, "log_dir": "logs", "checkpoint": "checkpoint"}
    return distfit.fit(model or compiled(), *(data or (X, Y)), **(settings | arguments))


class Legacy:
    """Looks like a model of tf_keras, which is not installed here."""


Legacy.__module__ = "tf_keras.src.engine.training"

DATASET = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)

BAD_FITS = {
    "uncompiled model": (lambda: fit(model=uncompiled()), "Expected a compiled model.*Call model.compile"),
    "no model": (lambda: fit(model="resnet"), "Expected a keras.Model, or a function .*, received str"),
    "layer": (lambda: fit(model=keras.layers.Dense(3)), "received Dense"),
    "builder of nothing": (lambda: fit(model=lambda: None), r"received <lambda>\(\), which returns NoneType"),
    "builder with arguments": (lambda: fit(model=lambda units: None), r"received <lambda>\(units\)"),
    "legacy model": (lambda: fit(model=Legacy()), "received one of the legacy tf_keras. Build it with"),
    "type of the wire": (
        lambda: fit(reduction_dtype="float8"),
        "Expected reduction_dtype to be None or one of float32, float16, .*received 'float8'",
    ),
    "sync_batch_norm of another type": (
        lambda: fit(sync_batch_norm="yes"),
        "Expected sync_batch_norm to be True or False, received 'yes'",
    ),
    "unknown strategy": (lambda: fit(strategy="mirored"), "received 'mirored'; did you mean 'mirrored'?"),
    "strategy of another type": (
        lambda: fit(strategy=2),
        "Expected strategy to be one of auto, .*received 2",
    ),
    "no devices": (lambda: fit(devices=0), "Expected devices to be .* at least 1, or None, received 0"),
    "devices of another type": (lambda: fit(devices="2"), "received '2'"),
    "devices of single": (
        lambda: fit(devices=2),
        "Expected one device for strategy 'single', received devices=2",
    ),
    "labels too high": (
        lambda: fit(X, Y + 1),
        r"Expected labels from 0 to 2.*received labels from 1 to 3 \(row 2\)",
    ),
    "labels too low": (lambda: fit(X, Y - 1), r"received labels from -1 to 1 \(row 0\)"),
    "validation labels": (lambda: fit(X, Y, validation_data=(X, Y + 1)), "received labels from 1 to 3"),
    "no targets": (
        lambda: fit(X),
        "Expected targets y for Sequential, .* received data without them. Pass y",
    ),
    "dataset without targets": (lambda: fit(DATASET.map(lambda x, y: x)), "Expected targets y"),
    "no validation targets": (lambda: fit(X, Y, validation_data=X), "Expected targets y"),
    "other numbers of rows": (
        lambda: fit(X, Y[:5]),
        "Keras refuses with ValueError: Data cardinality is ambiguous",
    ),
    "other number of weights": (lambda: fit(X, Y, sample_weight=Y[:5]), "Data cardinality is ambiguous"),
    "lists of words": (
        lambda: fit(["a", "b"], [0, 1]),
        "Keras refuses with ValueError: Unrecognized data type",
    ),
    "class weights in a list": (
        lambda: fit(X, Y, class_weight=[1, 2, 3]),
        "Keras refuses with AttributeError",
    ),
    "no data": (lambda: fit(None), "Expected data in x, received None"),
    "name of a folder": (
        lambda: fit("data/train"),
        r"received the name 'data/train'. Pass distfit.TFRecords\(",
    ),
    "no rows": (lambda: fit(X[:0], Y[:0]), "Expected data with at least one batch, received none"),
    "dataset without batches": (lambda: fit(DATASET.take(0)), "Expected data with at least one batch"),
    "dataset with y": (lambda: fit(DATASET, Y), "`y` should not be passed"),
    "local of a list": (
        lambda: fit(distfit.local([1, 2])),
        "Expected distfit.local to get a tf.data.Dataset",
    ),
    "batch_size 0": (lambda: fit(batch_size=0), "Expected batch_size to be .* at least 1, received 0"),
    "batch_size in words": (lambda: fit(batch_size="32"), "Expected batch_size .* received '32'"),
    "batch_size with a fraction": (lambda: fit(batch_size=2.5), "Expected batch_size .* received 2.5"),
    "epochs": (lambda: fit(epochs=-1), "Expected epochs to be a whole number of at least 0, received -1"),
    "epochs with a fraction": (lambda: fit(epochs=1.5), "Expected epochs .* received 1.5"),
    "initial_epoch": (lambda: fit(initial_epoch="1"), "Expected initial_epoch .* received '1'"),
    "steps_per_epoch": (lambda: fit(steps_per_epoch=0), "Expected steps_per_epoch .* at least 1, received 0"),
    "validation_steps": (lambda: fit(validation_steps=-2), "Expected validation_steps .* received -2"),
    "validation_freq": (lambda: fit(validation_freq=0), "Expected validation_freq .* received 0"),
    "validation_split": (
        lambda: fit(validation_split=2.0),
        "Expected validation_split to be a fraction .* received 2.0",
    ),
    "validation_split of a dataset": (
        lambda: fit(DATASET, validation_split=0.5),
        "only supported for tensors or NumPy",
    ),
    "verbose": (lambda: fit(verbose="loud"), "Expected verbose to be 0, 1, 2 or 'auto', received 'loud'"),
    "negative seed": (lambda: fit(seed=-1), "Expected seed to be .* from 0 to 4294967295, received -1"),
    "seed in words": (lambda: fit(seed="1"), "Expected seed .* received '1'"),
    "function as callback": (lambda: fit(callbacks=[print]), "Expected callbacks .*LambdaCallback"),
    "class as callback": (
        lambda: fit(callbacks=keras.callbacks.EarlyStopping),
        "Expected callbacks .* received type",
    ),
    "stall limit": (lambda: fit(stall_limit_s=0), "Expected stall_limit_s .* above 0, received 0"),
    "log_dir of another type": (
        lambda: fit(log_dir=3),
        "Expected the path of a folder to write to, received 3",
    ),
    "evaluate uncompiled": (
        lambda: distfit.evaluate(uncompiled(), X, Y, strategy="single"),
        "Expected a compiled",
    ),
    "evaluate without targets": (
        lambda: distfit.evaluate(compiled(), X, strategy="single"),
        "Expected targets y",
    ),
    "predict on nothing": (
        lambda: distfit.predict(uncompiled(), None, strategy="single"),
        "Expected data in x",
    ),
    "predict steps": (
        lambda: distfit.predict(uncompiled(), X, steps=0, strategy="single"),
        "Expected steps .* 0",
    ),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_argument_is_refused(case, here):
    call, message = BAD_FITS[case]
    refused(call, message, here)


def test_unwritable_run_folder_is_refused(here):
    (here / "file").write_text("in the way")
    for argument in ("log_dir", "checkpoint"):
        message = (
            "Expected to be able to write to the folder file/run, received: Not a directory .*file.. Choose another"
        )
        refused(lambda name=argument: fit(**{name: "file/run"}), message, here)


def records(files):
    return distfit.TFRecords(files, FEATURES, lambda example: (tf.zeros([4]), example["label"]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("data/nowhere", "Expected TFRecord files at 'data/nowhere', received none: there is no 'nowhere'"),
        ("data/empty", "in the folder 'data/empty', received an empty folder. Name another folder"),
        ("data/train-*", r"received none: there is no 'train-\*' in '.*data'"),
        (
            "data/junk.tfrecord",
            "this is no TFRecord file. Check the path, copy the file again, or rebuild it",
        ),
        ("data/part-00000-of-00002.*", r"Expected all 2 shards .* missing part-00001-of-00002"),
        (["data/a.tfrecord", "data/a.tfrecord"], "twice: its records would count double"),
    ],
)
def test_bad_record_files_are_refused(here, files, message):
    (here / "data" / "empty").mkdir(parents=True)
    (here / "data" / "junk.tfrecord").write_text("no records here, but words, and enough of them")
    for name in ("a.tfrecord", "part-00000-of-00002.tfrecord"):
        write_records(here / "data" / name, [b"x"])
    missing = "part" in str(files)
    refused(lambda: fit(records("data/part-*" if missing else files)), message, here)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "DISTFIT_DEVICES",
            "abc",
            "environment variable DISTFIT_DEVICES .* received 'abc'. Correct it or unset it",
        ),
        ("DISTFIT_DEVICES", "0", "at least 1, received '0'"),
        (
            "DISTFIT_STRATEGY",
            "horovd",
            "variable DISTFIT_STRATEGY .* received 'horovd'; did you mean 'horovod'",
        ),
    ],
)
def test_wrong_environment_is_refused(here, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    refused(fit, message, here)


def test_more_devices_than_gpus_is_refused(here, monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["GPU:0", "GPU:1"])
    message = "at most the 2 GPUs that this process sees, received 3. Ask for fewer, or check CUDA_VISIBLE_DEVICES"
    refused(lambda: devices.replica_devices(3), message, here)
    assert devices.replica_devices(None) == ["GPU:0", "GPU:1"]


def test_more_ranks_than_gpus_is_refused(here, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0", "GPU:1"])
    refused(lambda: devices.pin_gpu(2), "received local rank 2 and 2 GPUs. Start at most one rank a GPU", here)


@pytest.mark.parametrize("strategy", ["single", "mirrored"])
def test_strategy_of_one_process_is_refused_for_several(here, strategy):
    message = f"in a job of several ranks, received '{strategy}' and 2 ranks: each would train a model of its own"
    refused(lambda: choose(strategy, None, Topology(rank=1, size=2)), message, here)


@pytest.mark.parametrize(
    ("x", "request_", "message"),
    [
        (
            X,
            Request(Y, batch_size=3),
            "at least the number of replicas, received batch_size=3 and 4 replicas.*Raise",
        ),
        (tf.data.Dataset.from_tensors(X), Request(class_weight=3), "Keras refuses"),
        (
            distfit.local(DATASET),
            Request(batch_size=6),
            "to divide by the number of ranks .*received 6 and 4 ranks",
        ),
        (distfit.local(DATASET), Request(Y), "Expected y to be part of the data of distfit.local"),
        (
            (X for _ in range(2)),
            Request(),
            "received a Python generator, which each of the 4 ranks would run",
        ),
    ],
)
def test_data_that_four_ranks_cannot_share_are_refused(here, x, request_, message):
    refused(lambda: source_of(x, request_, Topology(rank=1, size=4)), message, here)


def test_keras_on_another_backend_is_refused(here, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refused(
        fit,
        "Expected Keras to run on TensorFlow, received the backend 'jax'. Set KERAS_BACKEND=tensorflow",
        here,
    )


def test_error_of_the_users_own_generator_stays_what_it_is():
    def broken():
        raise ValueError("no such camera")
        yield

    with pytest.raises(ValueError, match=r"^no such camera$") as caught:
        fit(broken())
    assert not isinstance(caught.value, distfit.InputError)


# Through the command line: exit code 2, one paragraph, and no run folder.


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of three classes."""
    pixels = tf.io.encode_png(np.zeros((8, 8, 1), np.uint8)).numpy()
    source = Source(
        name="black",
        classes=("a", "b", "c"),
        filenames=[f"{number}.png" for number in range(24)],
        labels=np.arange(24) % 3,
        encoded=lambda number: pixels,
        image_format="png",
        pixels="gray",
    )
    folder = tmp_path_factory.mktemp("images") / "black"
    write_dataset(source, folder, shards=2, validation_shards=1)
    return folder


@pytest.fixture
def config(images, here):
    """A configuration that works, and the data beside it, free to damage."""
    (here / "data").mkdir()
    for file in images.iterdir():
        (here / "data" / file.name).write_bytes(file.read_bytes())
    (here / "run.yaml").write_text("data: {path: data}\nepochs: 1\nstrategy: single\nverbose: 0\nrun_dir: runs/bad\n")
    return here / "run.yaml"


def command_refuses(config, *overrides, message):
    result = CliRunner().invoke(cli.app, ["train", str(config), *overrides], prog_name="distfit")
    assert result.exit_code == 2, result.output
    (paragraph,) = result.stderr.splitlines()
    assert paragraph.startswith("distfit: error: ")
    assert re.search(message, paragraph), paragraph
    assert not (config.parent / "runs").exists()


def damage(path, **changes):
    described = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(described | changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.path=nowhere"],
            "Expected the folder of a data set, received 'nowhere', which is not there. Build one",
        ),
        (["data.path=empty"], "Expected dataset.json in the folder 'empty', received a folder without it"),
        (["data.train=trian"], "received 'trian'; did you mean 'train'?"),
        (["run_dir=run.yaml/x"], "write to the folder run.yaml/x, received: Not a directory .*run.yaml"),
        (["strategy=sngle"], "received 'sngle'; did you mean 'single'"),
        (["batch_size=0"], "Expected .*batch_size.* received 0"),
        (
            ["model=distfit.models:nothing"],
            r"Expected model to name a function of distfit.models \(.*models.py\), received 'nothing'",
        ),
    ],
)
def test_command_refuses_bad_input(config, overrides, message):
    (config.parent / "empty").mkdir()
    command_refuses(config, *overrides, message=message)


def test_command_refuses_a_shard_that_is_no_record_file(config):
    shard = config.parent / "data" / "train-00000-of-00002.tfrecord"
    shard.write_bytes(b"x" * shard.stat().st_size)
    command_refuses(config, message="this is no TFRecord file|Expected .* received")


def test_command_refuses_a_label_outside_the_classes(config):
    damage(config.parent / "data", classes=["a", "b"])
    command_refuses(config, message="Expected a label from 0 to 1, one for each of 2 classes, received 2 in record")


# Where a process of its own is needed.


def test_devices_after_tensorflow_has_started_are_refused(here):
    job = launch(["-m", "tests.bad_input_script", "devices_too_late", str(here)], launcher="none")
    assert job.code == 1, job.report()
    last = errors(job).splitlines()[-1]
    assert "TensorFlow had already started when distfit wanted to set its devices (2 logical CPU devices" in last
    assert "call distfit.init(...) with the same strategy and devices before the first tensor" in last
    assert not list(here.iterdir())


def test_command_refuses_a_batch_smaller_than_the_replicas(config):
    arguments = ["-m", "distfit", "train", "run.yaml", "strategy=mirrored", "devices=3", "batch_size=2"]
    job = launch(arguments, launcher="none", cwd=config.parent)
    assert job.code == 2, job.report()
    (paragraph,) = errors(job).splitlines()
    assert "received batch_size=2 and 3 replicas: some would never get a row. Raise batch_size" in paragraph
    assert not (config.parent / "runs").exists()


SAID_BY_ALL = {
    "missing data": "there is no 'nowhere'",
    "batch smaller than replicas": "received batch_size=1 and 2 replicas",
    "uncompiled model": "Expected a compiled model",
    "generator": "received a Python generator, which each of the 2 ranks would run",
    "rows of different number": "Data cardinality is ambiguous",
    "unwritable folder": "Not a directory ",
    "seed": "Expected seed",
    "verbose": "Expected verbose",
    "unknown strategy": "did you mean 'horovod'?",
    "label on rank 1": "On rank 1 of 2: Expected labels from 0 to 2",
    "epochs on rank 1": "epochs 1 2 Let all ranks run the same lines",
    "validation on rank 1": "validation_data NoneType tuple",
    "another call on rank 1": "call distfit.evaluate distfit.fit",
    "steps of a call on rank 1": "steps_per_execution 1 2 Let all ranks build and compile",
    "callback on rank 1": "On rank 1 of 2: Expected callbacks",
}


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_all_ranks_refuse_together_and_one_says_why(here, launcher):
    job = launch(["-m", "tests.bad_input_script", "refused_by_all", str(here)], ranks=2, launcher=launcher)
    by_rank = [json.loads((here / f"refusals-{rank}.json").read_text()) for rank in (0, 1)]
    assert by_rank[0] == by_rank[1]
    for case, words in SAID_BY_ALL.items():
        assert words in " ".join(by_rank[0][case].split())
    assert by_rank[0].keys() == SAID_BY_ALL.keys()
    said = errors(job)
    assert said.count("distfit: error: Expected batch_size") == 1, job.report()
    assert said.count("distfit: ") == 1, job.report()
    assert job.code == (2 if launcher == "mpirun" else 1), job.report()
    assert sorted(path.name for path in here.iterdir()) == ["refusals-0.json", "refusals-1.json"]


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-m", "distfit", "train", "run.yaml", "strategy=auto", "data.path=nowhere"],
            "which is not there. Build",
        ),
        (["-m", "tests.bad_input_script", "wrong_environment", "out"], "DISTFIT_DEVICES"),
    ],
    ids=["command", "before the ranks know each other"],
)
def test_a_job_that_cannot_start_says_so_once(config, arguments, message):
    job = launch(arguments, ranks=2, cwd=config.parent)
    assert job.code == 2, job.report()
    (paragraph,) = [line for line in errors(job).splitlines() if line.startswith("distfit: ")]
    assert message in paragraph
    assert "Traceback" not in job.errors, job.report()
    assert not (config.parent / "runs").exists()
    assert not (config.parent / "out").exists()
