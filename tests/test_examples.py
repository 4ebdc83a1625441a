"""KerasTuner, Optuna and a notebook train with distfit, on one device and on two, and find the same."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.ranks import ROOT, environment, launch

EXAMPLES = ROOT / "docs" / "examples"

# One process for all: a search is many trainings in one process anyway, and devices change in between.
SEARCHES = """
import json, sys
import distfit
import search_keras_tuner, search_optuna

def both():
    study = search_optuna.search(trials=3, epochs=2)
    return {
        "replicas": distfit.init().num_replicas,
        "tuner": search_keras_tuner.main(trials=2, epochs=2),
        "states": [trial.state.name for trial in study.trials],
        "optuna": study.best_params | {"val_accuracy": study.best_value},
    }

session = distfit.init(devices=2)
two = both()
assert distfit.init(devices=2) is session, "the session stays, however many trainings it has seen"
distfit.init("single")
print("found", json.dumps([both(), two]))
"""

# What a person does in a notebook beside running it once from top to bottom.
AGAIN = "history.history['loss'][0] > distfit.fit(model, x, y, batch_size=64, epochs=1, verbose=0).history['loss'][0]"
INTERRUPTED = """
import os, signal

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 5:
            os.kill(os.getpid(), signal.SIGINT)

try:
    distfit.fit(model, x, y, batch_size=64, epochs=100, verbose=0, callbacks=[Stop()])
except KeyboardInterrupt:
    print("interrupted")
"""
GOES_ON = """
print(sorted({type(variable._value).__name__ for variable in model.variables}))
distfit.fit(model, x, y, batch_size=64, epochs=1, verbose=0)
print(model.fit(x, y, verbose=0).history.keys())
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two searches find on one device and on two."""
    folder = tmp_path_factory.mktemp("searches")
    job = launch(["-c", SEARCHES], cwd=folder, env={"PYTHONPATH": f"{ROOT}:{EXAMPLES}", "TF_NUM_INTRAOP_THREADS": "2"})
    assert job.code == 0, job.report()
    assert "retracing" not in job.errors.lower(), job.report()
    return json.loads(re.search(r"^found (.*)$", job.output, re.MULTILINE)[1])


@pytest.mark.slow
def test_keras_tuner_finds_the_same_on_one_device_and_on_two(found):
    one, two = found
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert two["tuner"] == pytest.approx(one["tuner"], rel=1e-5)
    assert one["tuner"]["val_accuracy"] > 0.5


@pytest.mark.slow
def test_optuna_gives_up_the_same_trials_on_one_device_and_on_two(found):
    one, two = found
    assert two["states"] == one["states"]
    assert set(one["states"]) == {"COMPLETE", "PRUNED"}
    assert two["optuna"] == pytest.approx(one["optuna"], rel=1e-5)


def test_the_guide_shows_what_the_examples_do():
    guide = (ROOT / "docs" / "guides" / "search.md").read_text()
    text = "\n".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    shown = [line for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 15
    assert [line for line in shown if line not in text] == []


def run(folder, *, devices: int, more: tuple[str, ...] = ()):
    """The notebook's cells after they were run, and after them `more`; what each printed and returned."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    (first,) = [cell for cell in notebook.cells if "distfit.init()" in cell.source and cell.cell_type == "code"]
    first.source = first.source.replace("distfit.init()", f"distfit.init(devices={devices})")
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment(TF_NUM_INTRAOP_THREADS="2"))
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_the_notebook_is_kept_without_what_it_printed():
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []


@pytest.mark.slow
def test_a_notebook_trains_on_one_device(tmp_path):
    session, _, fit, *_, scores = run(tmp_path, devices=1)
    assert "single" in said(session)
    assert re.findall(r"^epoch (\d)/3 - 23 steps - ", said(fit), re.MULTILINE) == ["1", "2", "3"]
    assert "\x1b" not in said(fit)
    assert set(eval(said(scores).splitlines()[-1])) == {"accuracy", "loss"}


@pytest.mark.slow
def test_a_notebook_trains_on_two_devices_again_and_after_an_interrupt(tmp_path):
    session, _, fit, fewer, _, again, back, interrupted, goes_on = run(
        tmp_path, devices=2, more=(AGAIN, "distfit.init(devices=2)", INTERRUPTED, GOES_ON)
    )
    assert "2 replicas" in said(session)
    assert said(fit).count("epoch ") == 3
    assert "INFO:tensorflow" not in said(session) + said(fit)
    assert re.search(r"replicas +1$", said(fewer), re.MULTILINE)
    assert said(again).endswith("True")
    assert "2 replicas" in said(back)
    assert said(interrupted).endswith("interrupted\n")
    assert said(goes_on).startswith("['ResourceVariable']\n")
