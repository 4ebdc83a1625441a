"""What TensorBoard shows of a run: event files read back, what its servers answer, and its pages in a browser."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from contextlib import contextmanager

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def
from tensorboard.util.tensor_util import make_ndarray

import distfit
from distfit.callbacks import hparams as of_run
from distfit.callbacks.hparams import RunFacts
from distfit.callbacks.logs import Logs
from distfit.errors import InputError
from distfit.thread_ranks import run
from tests.cases.engines import precision
from tests.cases.table import FLOAT64
from tests.ranks import ROOT, environment, launch
from tests.tensorboard_script import DATA, ROWS, STEPS, TARGETS, model, train

THROUGHPUT = {"epoch_records_per_second", "epoch_records_per_second_per_device"}
# Keras has none of these.
OURS = {*THROUGHPUT, of_run.STARTED_TAG, of_run.ENDED_TAG, "__run_graph__"}
CLOCKED = {*THROUGHPUT, "epoch_steps_per_second", "batch_steps_per_second"}
SCREENSHOTS = ROOT / "build" / "screenshots"


def events(folder):
    """Every (tag, step, value) of the event files right in a folder, doubles and all."""
    found = []
    for file in sorted(folder.glob("*tfevents*")):
        for event in EventFileLoader(str(file)).Load():
            found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


def points(folder):
    """From tag and step to the value; each has to be there once."""
    found = events(folder)
    twice = [place for place, count in Counter((tag, step) for tag, step, _ in found).items() if count > 1]
    assert twice == []
    return {(tag, step): make_ndarray(value.tensor) for tag, step, value in found}


def steps(folder, tag):
    return [step for name, step in points(folder) if name == tag]


def assert_same_points(received, expected, tolerance=0.0):
    assert {place for place in received if place[0] not in OURS} == set(expected)
    for place, value in expected.items():
        if place[0] == "keras":
            assert _graph(received[place]) == _graph(value)
        elif place[0] not in CLOCKED:
            np.testing.assert_allclose(received[place], value, rtol=tolerance, atol=tolerance, err_msg=str(place))


def _graph(written):
    """As the page draws it; in the JSON objects have numbers of their own."""
    return keras_model_to_graph_def(json.loads(written.item()))


def of_keras(folder, update_freq):
    board = keras.callbacks.TensorBoard(folder, histogram_freq=1, write_steps_per_second=True, update_freq=update_freq)
    model().fit(**DATA, epochs=3, callbacks=[board])


def began(board, trained=None):
    """A callback that was told of a training, as by a list of callbacks."""
    board.set_params({"epochs": 2, "steps": STEPS, "verbose": 0})
    board.set_model(trained or model())
    board.on_train_begin()
    return board


def test_parameters_are_those_of_keras():
    own, theirs = (
        inspect.signature(kind.__init__).parameters for kind in (distfit.TensorBoard, keras.callbacks.TensorBoard)
    )
    assert [(name, one.default) for name, one in own.items() if name != "hparams"] == [
        (name, one.default) for name, one in theirs.items()
    ]
    assert own["hparams"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("update_freq", ["epoch", 1])
def test_one_process_writes_the_points_of_keras(tmp_path, update_freq):
    of_keras(tmp_path / "keras", update_freq)
    train(tmp_path / "own", update_freq)
    for part in ("train", "validation"):
        assert_same_points(points(tmp_path / "own" / part), points(tmp_path / "keras" / part))
    assert {tag for tag, _ in points(tmp_path / "own" / "train")} >= THROUGHPUT


@pytest.mark.slow
def test_replicas_write_the_points_of_one_process_once(tmp_path):
    with precision(FLOAT64):
        of_keras(tmp_path / "keras", 1)
        run(lambda: train(tmp_path / "threads", 1, logs_every_steps=1), ranks=2)
    job = launch(["-m", "tests.tensorboard_script", str(tmp_path / "mirrored")])
    assert job.code == 0, job.report()
    for engine in ("threads", "mirrored"):
        files = [path for path in (tmp_path / engine).rglob("*") if path.is_file()]
        assert sorted(path.parent.name for path in files) == ["train", "validation"]
        for part in ("train", "validation"):
            assert_same_points(points(tmp_path / engine / part), points(tmp_path / "keras" / part), 1e-6)
    known = _hparams(tmp_path / "threads" / "validation")
    assert {name: known[name] for name in ("engine", "ranks", "replicas", "precision")} == {
        "engine": "threads",
        "ranks": 2,
        "replicas": 2,
        "precision": "float64",
    }


@pytest.mark.parametrize(("update_freq", "expected"), [(1, [1, 5, 6, 7, 11, 12]), (3, [5, 6, 11, 12]), (10, [11])])
def test_batches_have_points_where_their_values_are_new(tmp_path, update_freq, expected):
    """Of several replicas they are made anew after the first, fifth and last of six steps."""
    board = began(distfit.TensorBoard(tmp_path, update_freq=update_freq))
    for epoch in range(2):
        board.on_epoch_begin(epoch)
        for step in range(STEPS):
            board.on_train_batch_begin(step)
            board.on_train_batch_end(step, Logs({"loss": float(step)}, step=step - step % 4 if step < 5 else 5))
        board.on_epoch_end(epoch, {"loss": 1.0})
    board.on_train_end()
    assert steps(tmp_path / "train", "batch_loss") == expected
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1]


class Unknown(keras.layers.Layer):
    """A layer that cannot be described."""

    def __init__(self, argument):
        super().__init__()

    def call(self, inputs):
        return inputs


@pytest.mark.filterwarnings("ignore:Model failed to serialize as JSON")
@pytest.mark.parametrize(
    ("layer", "graphs"),
    [(lambda rows: keras.ops.reshape(rows, (-1, 2)), {"keras", "__run_graph__"}), (Unknown(object()), set())],
)
def test_a_model_has_the_graph_that_can_be_drawn(tmp_path, layer, graphs):
    """TensorBoard's own drawing of the first one fails."""
    inputs = keras.Input((4,))
    trained = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    trained.compile("sgd", "mse")
    board = began(distfit.TensorBoard(tmp_path), trained)
    board.on_epoch_begin(0)
    board.on_train_end()
    assert {tag for tag, _ in points(tmp_path / "train")} & {"keras", "__run_graph__"} == graphs


def test_no_batch_is_waited_for_unless_asked_for(tmp_path, monkeypatch):
    reads = []
    numbers = Logs._numbers
    monkeypatch.setattr(Logs, "_numbers", lambda logs: reads.append(logs.step) or numbers(logs))
    train(tmp_path)
    assert sorted(set(reads) - {None}) == [STEPS - 1]  # with the last step an epoch's time is known


def test_points_of_an_epoch_do_not_hang_on_its_last_batch(tmp_path):
    """Keras loses them where `update_freq` does not divide the number of steps."""
    train(tmp_path, update_freq=4)
    assert steps(tmp_path / "train", "epoch_loss") == steps(tmp_path / "validation", "epoch_loss") == [0, 1, 2]
    assert steps(tmp_path / "validation", "evaluation_loss_vs_iterations") == [6, 12, 18]
    assert steps(tmp_path / "train", "batch_loss") == [4, 8, 12, 16]


def test_an_evaluation_writes_its_own_points_and_nothing_else(tmp_path):
    trained = train(tmp_path / "training", epochs=1).model
    loss, mae = distfit.evaluate(
        trained, ROWS, TARGETS, verbose=0, callbacks=[distfit.TensorBoard(tmp_path / "evaluation")]
    )
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["validation"]
    assert points(tmp_path / "evaluation" / "validation") == {
        ("evaluation_loss_vs_iterations", STEPS): pytest.approx(loss),
        ("evaluation_mae_vs_iterations", STEPS): pytest.approx(mae),
    }


class Killed(keras.callbacks.Callback):
    """Ends a run in its last epoch, with the model as it was two epochs before."""

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if epoch == 2:
            self._kept = [variable.numpy() for variable in self._variables()]

    def on_train_batch_end(self, batch, logs=None):
        if self._epoch == 3 and batch >= 2:
            for variable, value in zip(self._variables(), self._kept, strict=True):
                variable.assign(value)
            raise KeyboardInterrupt

    def _variables(self):
        optimizer = self.model.optimizer
        return [*self.model.variables, *optimizer.variables, *getattr(optimizer, "inner_optimizer", model()).variables]


VARIANTS = {
    "calls of four steps, updates of two": lambda: {
        "optimizer": keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
        "steps_per_execution": 4,
    },
    "loss scale": lambda: {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_goes_on_without_a_gap_and_without_a_point_twice(tmp_path, variant):
    trained = model(**VARIANTS[variant]())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 1, 4, trained, [Killed()])
    train(tmp_path, 1, 4, trained, initial_epoch=2)
    assert [len(list((tmp_path / part).iterdir())) for part in ("train", "validation")] == [
        2,
        2,
    ]  # what was carried over, and this run's
    every = trained.steps_per_execution
    batches = [step for step in range(1, 4 * STEPS + 1) if (step % STEPS) % every == 0]
    assert steps(tmp_path / "train", "batch_loss") == batches
    assert steps(tmp_path / "train", "epoch_learning_rate") == [0, 1, 2, 3]
    assert steps(tmp_path / "train", "hidden/kernel/histogram") == [0, 1, 2, 3]
    assert steps(tmp_path / "validation", "epoch_loss") == [0, 1, 2, 3]
    updates = STEPS // 2 if every > 1 else STEPS
    assert steps(tmp_path / "validation", "evaluation_loss_vs_iterations") == [
        epoch * updates for epoch in (1, 2, 3, 4)
    ]


def test_a_restored_run_goes_on_wherever_the_callback_stands(tmp_path):
    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "logs", 1, 4, None, [backup(), Killed()])
    train(tmp_path / "logs", 1, 4, None, [backup()])
    assert steps(tmp_path / "logs" / "train", "epoch_loss") == [0, 1, 2, 3]
    assert steps(tmp_path / "logs" / "train", "batch_loss") == list(range(1, 4 * STEPS + 1))


def test_weights_alone_go_on_at_the_place_of_their_epoch(tmp_path):
    train(tmp_path, 1, 3, initial_epoch=2)
    assert steps(tmp_path / "train", "batch_loss") == list(range(2 * STEPS + 1, 3 * STEPS + 1))


def test_a_run_from_the_start_leaves_the_earlier_one_its_own_folder(tmp_path, caplog):
    trained = train(tmp_path, epochs=2).model
    before = {part: points(tmp_path / part) for part in ("train", "validation")}
    with caplog.at_level(logging.INFO, "distfit"):
        distfit.fit(trained, **{**DATA, "verbose": 2}, callbacks=[distfit.TensorBoard(tmp_path)])
    assert f"which are in {tmp_path / 'earlier-1'} now" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "train", "validation"]
    for part, expected in before.items():
        assert points(tmp_path / "earlier-1" / part).keys() == expected.keys()
        assert steps(tmp_path / part, "epoch_loss") == [0]
    train(tmp_path, epochs=1, trained=trained)
    assert (tmp_path / "earlier-2" / "train").is_dir()


def test_a_point_before_the_training_stays_with_it(tmp_path):
    board = distfit.TensorBoard(tmp_path)
    trained = model()
    distfit.evaluate(trained, ROWS, TARGETS, verbose=0, callbacks=[board])
    distfit.fit(trained, **DATA, callbacks=[board])
    assert not (tmp_path / "earlier-1").exists()
    assert steps(tmp_path / "validation", "evaluation_loss_vs_iterations") == [0, STEPS]


def test_the_learning_rate_is_that_of_the_optimizer_within(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, STEPS, 0.5)
    wrapped = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule))
    train(tmp_path / "wrapped", trained=model(wrapped), epochs=2)
    found = points(tmp_path / "wrapped" / "train")
    assert [float(found["epoch_learning_rate", epoch]) for epoch in range(2)] == pytest.approx([0.05, 0.025])
    assert _hparams(tmp_path / "wrapped" / "train")["learning_rate"] == 0.1

    slow, fast = keras.optimizers.SGD(0.1, name="slow"), keras.optimizers.Adam(0.01, name="fast")
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(slow, {".*kernel": fast}))
    train(tmp_path / "several", trained=model(several), epochs=1)
    tags = {tag for tag, _ in points(tmp_path / "several" / "train")}
    assert {"epoch_learning_rate_slow", "epoch_learning_rate_fast"} <= tags
    assert "learning_rate" not in _hparams(tmp_path / "several" / "train")


def test_throughput_is_of_the_steps_alone(tmp_path):
    """The first call, which compiles, took 100 s, each further one 2 s, the validation 1,000 s."""
    board = distfit.TensorBoard(tmp_path, write_steps_per_second=True)
    board.of_run(RunFacts("single", 1, replicas=4, batch_size=8, records=44, seed=0))
    now = 0.0
    board._pace.clock = lambda: now
    began(board).on_epoch_begin(0)
    for step in range(STEPS):
        now += 2.0 if step else 100.0
        board.on_train_batch_begin(step)
        board.on_train_batch_end(step, {"loss": 1.0})
    now += 1000.0
    board.on_test_begin()
    board.on_test_end({"loss": 1.0})
    board.on_epoch_end(0, {"loss": 1.0, "val_loss": 1.0})
    board.on_train_end()
    found = points(tmp_path / "train")
    assert found["epoch_records_per_second", 0] == pytest.approx((44 - 8) / 10.0)
    assert found["epoch_records_per_second_per_device", 0] == pytest.approx((44 - 8) / 10.0 / 4)
    assert found["epoch_steps_per_second", 0] == pytest.approx(0.5)


def _hparams(folder):
    started = [value for tag, _, value in events(folder) if tag == of_run.STARTED_TAG]
    assert len(started) == 1
    return of_run.read(started[0].metadata.plugin_data.content)


def test_both_folders_have_the_hyper_parameters_of_the_run(tmp_path):
    board = distfit.TensorBoard(tmp_path, hparams={"width": 3, "seed": 7})
    distfit.fit(model(), **DATA, epochs=2, seed=5, callbacks=[board])
    for part in ("train", "validation"):
        assert _hparams(tmp_path / part) == {
            "batch_size": 8,
            "engine": "single",
            "epochs": 2,
            "learning_rate": 0.01,
            "optimizer": "Adam",
            "precision": "float32",
            "ranks": 1,
            "replicas": 1,
            "seed": 7,
            "width": 3,
        }
        assert [step for tag, step, _ in events(tmp_path / part) if tag == of_run.ENDED_TAG] == [0]


@pytest.mark.parametrize("wrong", [{"layers": [3, 4]}, {"none": None}, {3: 4}])
def test_hyper_parameters_that_cannot_be_shown_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match="Expected hparams by names"):
        distfit.TensorBoard(tmp_path, hparams=wrong)


def test_a_longer_resumed_run_says_so(tmp_path):
    trained = train(tmp_path, epochs=2).model
    train(tmp_path, epochs=3, trained=trained, initial_epoch=2)
    assert _hparams(tmp_path / "train")["epochs"] == 3
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1, 2]


def test_steps_can_be_profiled(tmp_path):
    board = distfit.TensorBoard(tmp_path, profile_batch=(4, 5))  # within calls of two
    distfit.fit(model(steps_per_execution=2), **DATA, callbacks=[board])
    assert [path.suffix for path in (tmp_path / "train" / "plugins" / "profile").glob("*/*")] == [".pb"]
    assert ("batch_5", 5) in points(tmp_path / "train")


@contextmanager
def server(logs, log, *options):
    """The address of a TensorBoard of this machine, which ends with the block."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    with open(log, "wb") as output:
        started = subprocess.Popen(
            [*command, "--reload_interval", "1", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    try:
        yield eventually(lambda: re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())[0])
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait(timeout=30)


def eventually(check, limit_s=60.0):
    """What `check` returns, once it neither raises nor fails."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return check()
        except (AssertionError, TypeError, OSError, KeyError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.3)


def shown(url, run, tag):
    """The steps of a curve on the page."""
    with urllib.request.urlopen(f"{url}data/plugin/scalars/tags", timeout=20) as answer:
        assert tag in json.load(answer)[run]
    query = urllib.parse.urlencode({"run": run, "tag": tag})
    with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?{query}", timeout=20) as answer:
        return [step for _, step, _ in json.load(answer)]


@pytest.mark.slow
def test_servers_that_have_been_running_show_each_point_once(tmp_path):
    """TensorBoard has two loaders, which know different signs of a run that was resumed."""
    trained = model()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "logs", 1, 4, trained, [Killed()])

    def curves_have(url, epochs):
        batches = list(range(1, epochs * STEPS + 1))
        # Of an epoch in which a run was killed there may be points of some batches.
        assert shown(url, "train", "batch_loss")[: len(batches)] == batches
        for part in ("train", "validation"):
            assert shown(url, part, "epoch_loss") == list(range(epochs))
        assert shown(url, "validation", "evaluation_loss_vs_iterations") == batches[STEPS - 1 :: STEPS]

    data_server = pytest.importorskip("tensorboard_data_server", reason="TensorBoard has one loader here")
    if data_server.server_binary() is None:
        pytest.skip("TensorBoard has one loader here")
    with (
        server(tmp_path / "logs", tmp_path / "slow.txt", "--load_fast", "false") as slow,
        server(tmp_path / "logs", tmp_path / "fast.txt", "--load_fast", "true") as fast,
    ):
        for url in (slow, fast):
            eventually(lambda url=url: curves_have(url, 3))
        train(tmp_path / "logs", 1, 4, trained, initial_epoch=2)
        for url in (slow, fast):
            eventually(lambda url=url: curves_have(url, 4))
            assert shown(url, "train", "batch_loss") == list(range(1, 4 * STEPS + 1))


def browser():
    """The path of a browser that can be driven."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    for found in filter(None, map(shutil.which, names)):
        # Ubuntu's chromium may be a script that asks for a snap.
        if subprocess.run([found, "--version"], capture_output=True, timeout=60).returncode == 0:
            return found
    return pytest.skip("no browser runs here: type apt-get install chromium (Debian), or install Google Chrome")


@contextmanager
def page_of(url, name):
    """A page of TensorBoard in a browser; of one that shows something else a picture is kept."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        page = program.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        try:
            page.goto(f"{url}#{name}")
            yield page
        except BaseException as error:
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOTS / f"tensorboard-{name}.png")
            error.add_note(f"The page as it was: {SCREENSHOTS / f'tensorboard-{name}.png'}")
            raise
        finally:
            program.close()


def assert_shows(page, *texts):
    for text in texts:
        page.get_by_text(text, exact=True).first.wait_for()


@pytest.mark.slow
def test_the_pages_show_runs_tags_and_hyper_parameters(tmp_path):
    browser()
    distfit.fit(model(), **DATA, epochs=2, log_dir=tmp_path / "logs")
    with server(tmp_path / "logs", tmp_path / "server.txt") as url:
        eventually(lambda: shown(url, "validation", "epoch_loss"))
        with page_of(url, "timeseries") as page:
            assert_shows(page, "train", "validation", "epoch_loss", "epoch_mae", "epoch_learning_rate")
            assert_shows(page, "epoch_records_per_second", "epoch_records_per_second_per_device")
            assert_shows(page, "epoch_steps_per_second", "evaluation_loss_vs_iterations")
        with page_of(url, "hparams") as page:
            assert_shows(page, "Trial ID", "train", "validation", "batch_size", "learning_rate", "optimizer", "Adam")
            assert_shows(page, "epoch_loss")
        with page_of(url, "graphs") as page:
            assert_shows(page, "Main Graph")
            assert page.get_by_text("Graph visualization failed").count() == 0
