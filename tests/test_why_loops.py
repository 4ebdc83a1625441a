"""The experiment of docs/why-loops-differ.md: its loop is `fit`, each mistake does what it claims to do and nothing
else, and the page shows the results that are stored."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.why_loops_differ import __main__ as command
from benchmarks.why_loops_differ import figures, page, runs
from benchmarks.why_loops_differ.causes import CAUSES, GROUPS, SHARDS, EpsilonOfThePaper, OtherEpsilon
from benchmarks.why_loops_differ.loop import Fit, Loop
from benchmarks.why_loops_differ.pictures import make_folder
from benchmarks.why_loops_differ.tasks import BATCH, digits, folder
from tests import pages
from tests.ranks import ROOT

EPOCHS = 2
# What a group's mistakes leave as it is: with averages only the report is wrong.
ONLY_REPORTED = {name for name, cause in CAUSES.items() if cause.group == "averages"}


@pytest.fixture(scope="module")
def task():
    """A tenth of the digits and a smaller network; the last batches have four rows and one."""
    whole = digits()
    train, valid = (np.linspace(0, len(y) - 1, n).astype(int) for y, n in ((whole.train_y, 164), (whole.valid_y, 65)))
    return replace(
        whole,
        train_x=whole.train_x[train],
        train_y=whole.train_y[train],
        valid_x=whole.valid_x[valid],
        valid_y=whole.valid_y[valid],
        filters=(8,),
        strides=(2,),
        epochs=EPOCHS,
    )


@pytest.fixture(scope="module")
def trained(task):
    """A training of that name after two epochs, with its numbers; each once."""
    known = {}

    def of(name):
        if name not in known:
            keras.backend.clear_session()
            training = runs.training_of(name, task, seed=0)
            training.epochs = training.run(EPOCHS)
            known[name] = training
        return known[name]

    return of


def state_of(training, kind):
    return [variable.numpy() for variable in training.model.variables if kind in variable.path]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loop_ends_with_the_bits_of_fit(optimizer):
    whole = digits()
    fit, loop = Fit(whole, 0, optimizer), Loop(whole, 0, optimizer)
    assert loop.run(EPOCHS) == fit.run(EPOCHS), "the numbers of every epoch"
    np.testing.assert_array_equal(loop.weights(), fit.weights())


@pytest.mark.slow  # half a minute together
@pytest.mark.parametrize("name", CAUSES)
def test_a_mistake_changes_the_weights_or_the_report_alone(name, trained):
    fit, wrong = trained(f"fit_{CAUSES[name].optimizer}"), trained(name)
    same = np.array_equal(fit.weights(), wrong.weights())
    assert same == (name in ONLY_REPORTED)
    if same:
        assert wrong.measured() == fit.measured()
        reported = [(one.loss, one.accuracy) for one in wrong.epochs]
        assert reported != [(one.loss, one.accuracy) for one in fit.epochs]


def test_a_mistake_is_one_method(task):
    """What else a class has serves that method."""
    helpers = {"build", "probabilities", "rows", "parts", "epsilon", "__init__"}
    for cause in CAUSES.values():
        own = {name for kind in cause.loop.__mro__[: cause.loop.__mro__.index(Loop)] for name in vars(kind)}
        changed = {name for name in own - helpers if name in vars(Loop) or name in vars(Loop.__base__)}
        changed -= {"__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__"}
        # A stateless call leaves no losses behind, so that this one adds up the penalties itself.
        assert len(changed) == 1 or cause.name == "statistics_not_updated", (cause.name, changed)


def test_no_flag_is_training_false(trained):
    np.testing.assert_array_equal(trained("no_flag").weights(), trained("training_false").weights())


def test_statistics_stay_where_they_were_and_dropout_goes_on(task, trained):
    fresh, wrong, right = Loop(task, 0), trained("statistics_not_updated"), trained("loop_adam")
    np.testing.assert_equal(state_of(wrong, "moving"), state_of(fresh, "moving"))
    np.testing.assert_equal(state_of(wrong, "seed"), state_of(right, "seed"))
    # BatchNormalization's moments of the batch are those of the right loop: what is trained is trained alike.
    for expected, received in zip(right.model.trainable_variables, wrong.model.trainable_variables, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-6)


def test_evaluating_in_training_mode_moves_the_statistics(trained):
    wrong, right = trained("training_true_in_evaluation"), trained("loop_adam")
    moved, expected = (np.concatenate(state_of(one, "moving")) for one in (wrong, right))
    assert not np.array_equal(moved, expected)


def test_adam_written_out_is_keras_adam_but_for_epsilon(task):
    class AlmostNone(OtherEpsilon):
        epsilon = 1e-12

    written, keras_own = EpsilonOfThePaper(task, 0), AlmostNone(task, 0)
    gradients = [tf.random.normal(value.shape, seed=1) for value in written.model.trainable_variables]
    for _ in range(3):
        written.apply(gradients)
        keras_own.apply(gradients)
    np.testing.assert_allclose(written.weights(), keras_own.weights(), rtol=1e-5, atol=1e-6)


def test_what_a_reduction_multiplies(task):
    """The gradient's factor on a batch of 8 rows; that of the last row alone counts a 32nd."""
    outputs, labels = tf.random.normal([8, 10], seed=0), tf.range(8, dtype=tf.int64)
    expected = Loop(task, 0).loss(labels, outputs)
    factors = {"sum_over_batch": 8, "means_summed": 4, "divided_twice": 1 / 4, "short_batch_as_full": 8 / BATCH}
    for name, factor in factors.items():
        loss = CAUSES[name].loop(task, 0).loss(labels, outputs)
        np.testing.assert_allclose(loss, expected * factor, rtol=1e-5, err_msg=name)


def orders(name, task):
    """The labels of two epochs, in batches."""
    records = (CAUSES[name].loop if name in CAUSES else Loop)(task, 0).records()
    return [[tuple(y.numpy()) for _, y in records] for _ in range(2)]


def test_what_a_shuffle_does(task):
    first, second = orders("right", task)
    assert first != second
    assert min(len(set(batch)) for batch in first[:-1]) > 5
    for name in ("shuffled_before_cache", "no_reshuffle"):
        first, second = orders(name, task)
        assert first == second, name
        assert min(len(set(batch)) for batch in first[:-1]) > 5, name
    for name in ("no_shuffle", "shuffled_batches"):
        assert max(len(set(batch)) for batch in orders(name, task)[0]) <= 4, name
    assert orders("small_buffer", task)[0][0].count(9) == 0, "the first batch knows nothing of the last class"
    for name in ("right", *(cause.name for cause in CAUSES.values() if cause.group == "shuffle")):
        assert sorted(sum(orders(name, task)[0], ())) == task.train_y.tolist(), name


def test_averages_of_averages_are_what_they_are_called(task, trained):
    right = trained("loop_adam").model(task.valid_x, training=False).numpy().argmax(1) == task.valid_y
    batches = [right[start : start + BATCH].mean() for start in range(0, len(right), BATCH)]
    shards = [part.mean() for part in np.split(right, np.round(np.cumsum(SHARDS)[:-1] * len(right)).astype(int))]
    for name, expected in (("mean_of_batches", np.mean(batches)), ("mean_of_shards", np.mean(shards))):
        assert trained(name).epochs[-1].accuracy == pytest.approx(expected, abs=1e-6)
    assert trained("last_batch").epochs[-1].accuracy == batches[-1]
    of_both = np.mean([one.accuracy for one in trained("loop_adam").epochs])
    assert trained("never_reset").epochs[-1].accuracy == pytest.approx(of_both, abs=1e-6)


def test_the_folder_is_class_folders_of_pictures_of_many_sizes(tmp_path):
    made = make_folder(tmp_path / "a", total=197)
    names = sorted(path.relative_to(made) for path in made.rglob("*.jpg"))
    again = make_folder(tmp_path / "b", total=197)
    assert [(made / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]
    task = folder(made)
    assert (len(names), task.classes, len(task.train_y), len(task.valid_y)) == (197, 24, 164, 33)
    assert task.train_x.shape[1:] == (64, 64, 3)
    assert (np.diff(task.train_y) >= 0).all(), "sorted by class, as folders are listed"


# The page.


@pytest.mark.parametrize("module", ["figures", "page", "pictures", "runs", "tasks"])
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"benchmarks.why_loops_differ.{module}"))
    assert attempted
    assert not failed


@pytest.fixture(scope="module")
def stored():
    return runs.load()


def test_the_page_and_its_pictures_are_those_of_the_stored_results(stored):
    assert command.outdated(stored) == []


def test_another_result_makes_the_page_outdated(stored):
    digits_runs = stored.runs["digits"]
    numbers = digits_runs["no_flag"].numbers
    numbers = numbers | {"true_loss": [[value + 1 for value in seed] for seed in numbers["true_loss"]]}
    other = stored.runs | {"digits": digits_runs | {"no_flag": replace(digits_runs["no_flag"], numbers=numbers)}}
    assert len(command.outdated(replace(stored, runs=other))) == 1 + len(GROUPS)


def test_the_results_have_every_cause_on_both_data_sets_and_the_loop_is_fit(stored):
    assert sorted(stored.runs) == ["digits", "folder"]
    for own in stored.runs.values():
        assert set(own) == {*runs.BASELINES, *CAUSES}
        misreported = {name for name, run in own.items() if page.misreported(run)}
        assert misreported == {*ONLY_REPORTED, "training_true_in_evaluation"}
    command.agree(stored)
    broken = stored.runs | {"digits": stored.runs["digits"] | {"loop_sgd": stored.runs["digits"]["sum_over_batch"]}}
    with pytest.raises(SystemExit, match=r"The right loop differs from fit on digits under sgd"):
        command.agree(replace(stored, runs=broken))


def test_the_page_speaks_of_every_cause():
    prose = page.prose(pages.read(page.PAGE))
    assert [name for name in [*CAUSES, "no_flagg"] if name not in prose] == ["no_flagg"]


def test_pictures_are_small_and_repeat_themselves(stored, tmp_path):
    drawn = figures.draw(stored, tmp_path)
    again = [path.read_bytes() for path in figures.draw(stored, tmp_path)]
    assert [path.read_bytes() for path in drawn] == again
    kept = [ROOT / "docs" / "_static" / path.name for path in drawn]
    assert sum(path.stat().st_size for path in kept) < 300_000
    assert {figures.drawn_from(path) for path in [*drawn, *kept]} == {figures.digest(stored)}


def test_a_short_run_that_differs_is_named(stored, task, trained):
    short = runs.Results("", 0, [0], {}, {"digits": {"no_flag": stored.runs["digits"]["fit_adam"]}})
    assert [text.split(":")[0] for text in runs.differing(stored, short)] == ["digits no_flag"] * 2
    assert runs.differing(stored, replace(short, runs=stored.runs)) == []


def test_results_are_kept_as_they_are(stored, tmp_path):
    runs.save(stored, tmp_path / "results.json")
    assert runs.load(tmp_path / "results.json") == stored
    assert (tmp_path / "results.json").read_text() == runs.STORED.read_text()


def test_a_cause_that_there_is_not_is_refused():
    with pytest.raises(SystemExit, match=r"Expected causes among double_softmax, .*, received tripled_softmax\."):
        command.main(["--causes", "tripled_softmax"])
