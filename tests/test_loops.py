"""Hand-written loops: docs/guides/loops.md and the cases of tests/loops_script.py, on every engine.

A documented loop ends with the bits of `fit`; the page's examples and all cases end as on one device, and the examples
as plain Keras and TensorFlow do, without a line of distfit (tests/plain_loops.py).
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from distfit import thread_ranks
from distfit.errors import InputError, RunError
from distfit.session import init
from tests.compare import apart
from tests.loops_script import CASES, SETS, STEPS, WRONG, another_batch_size
from tests.ranks import launch

EXAMPLES = ("loop.py", "gan.py", "accumulation.py", "clipping.py", "contrastive.py")
BITS = [case.__name__ for case in CASES if case.__name__.startswith("bits_of")]
# A loop does the same as fit in another order of additions, or through other collectives.
TO_ROUNDING = ("own_accumulation_of_keras", "masked_words", "python_instead_of_a_trace")
AS_ON_ONE_DEVICE = (
    *("bits_of_synchronised_moments", "bits_of_averaged_weights", "bits_of_records_in_files"),
    *("bits_of_data_of_unknown_length", "own_accumulation_of_keras", "masked_words", "sums_over_the_batch"),
    *("much_in_the_middle", "left_early"),
)
# Launcher, ranks, engines, what goes wrong at last.
JOBS = {
    "local": ("none", 1, ("mirrored:3/and refusals", "mirrored:2/page", "single", "plain"), None),
    "mpirun 3": ("mpirun", 3, ("auto/ranks",), "leaves_early"),
    "mpirun 2": ("mpirun", 2, ("auto/page",), "one_step_more"),
}
ENGINES = {
    "plain": ("local", "plain.npz"),
    "single": ("local", "single-1.npz"),
    "mirrored 3": ("local", "mirrored-3.npz"),
    "mirrored 2": ("local", "mirrored-2.npz"),
    "mpirun 3": ("mpirun 3", "auto-3.npz"),
    "mpirun 2": ("mpirun 2", "auto-2.npz"),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


class Jobs:
    """Each is launched when something of it is first asked for."""

    def __init__(self, folder):
        self._folder = folder
        self._done = {}

    def job(self, name):
        if name not in self._done:
            launcher, ranks, engines, fault = JOBS[name]
            arguments = ["-m", "tests.loops_script", str(self._folder), *engines, *([fault] if fault else [])]
            self._done[name] = launch(arguments, ranks, launcher, limit_s=800)
        return self._done[name]

    def numbers(self, engine):
        name, file = ENGINES[engine]
        job = self.job(name)
        assert (self._folder / file).exists(), job.report()
        return np.load(self._folder / file)

    def of(self, engine, prefix):
        numbers = self.numbers(engine)
        found = {key.removeprefix(f"{prefix}/"): numbers[key] for key in numbers if key.startswith(f"{prefix}/")}
        assert found, f"{engine} has no {prefix}"
        return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("loops"))


def engines(*names):
    return pytest.mark.parametrize(
        "engine", [pytest.param(name, marks=[pytest.mark.mpi] if name.startswith("mpirun") else []) for name in names]
    )


EVERY = engines("single", "mirrored 3", "mirrored 2", "mpirun 3", "mpirun 2")
SEVERAL = engines("mirrored 3", "mirrored 2", "mpirun 3", "mpirun 2")
WITH_CASES = engines("single", "mirrored 3", "mpirun 3")


def of_engines(cases, *names):
    """Each of the cases with each engine that runs it."""
    on_ranks = {case.__name__ for case in SETS["ranks"]}
    return pytest.mark.parametrize(
        ("case", "engine"),
        [
            pytest.param(case, name, marks=[pytest.mark.mpi] if name.startswith("mpirun") else [])
            for case in cases
            for name in names
            if case in on_ranks or not name.startswith("mpirun")
            if case != "bits_of_uneven_ranks" or name.startswith("mpirun")
        ],
    )


@EVERY
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_documented_loop_has_the_bits_of_fit(jobs, engine, precision):
    by_hand, by_fit = jobs.of(engine, f"loop.py/{precision}"), jobs.of(engine, f"fit.py/{precision}")
    assert by_hand.keys() == by_fit.keys()
    for name in ("weights", "optimizer"):
        np.testing.assert_array_equal(by_hand[name], by_fit[name], err_msg=name)
    for name, values in by_fit.items():
        np.testing.assert_allclose(by_hand[name], values, rtol=1e-6, err_msg=name)


@engines("single", "mirrored 3", "mpirun 3")
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_do_what_plain_keras_does(jobs, engine, example):
    found = apart(jobs.of("plain", f"{example}/float64"), jobs.of(engine, f"{example}/float64"))
    assert max(found.values()) <= 1e-9, found


@SEVERAL
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_one_device(jobs, engine, example):
    expected, received = jobs.of("single", f"{example}/float64"), jobs.of(engine, f"{example}/float64")
    assert expected.keys() == received.keys()
    assert max(apart(expected, received).values()) <= 1e-9


@of_engines(BITS, "single", "mirrored 3", "mpirun 3")
def test_a_loop_has_the_bits_of_fit(jobs, engine, case):
    found = jobs.of(engine, case)
    by_hand = {name for name in found if name.startswith("loop/")}
    assert len(by_hand) == len(found) / 2
    for name in by_hand:
        expected = found[name.replace("loop/", "fit/")]
        if "history" in name:
            np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
        elif name == "loop/files":
            assert_same_files(found[name], expected)
        else:
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


def assert_same_files(received, expected):
    """Names, and a log whose numbers are the same to rounding."""
    assert list(received[:-1]) == list(expected[:-1])
    (names, *rows), (_, *others) = (text.split() for text in (received[-1], expected[-1]))
    assert names == "epoch,learning_rate,loss,val_loss"
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(np.array(row.split(","), float), np.array(other.split(","), float), rtol=1e-6)


@of_engines(TO_ROUNDING, "single", "mirrored 3", "mpirun 3")
def test_a_loop_is_fit_to_rounding(jobs, engine, case):
    found = jobs.of(engine, case)
    by_fit = {name.removeprefix("fit/"): value for name, value in found.items() if name.startswith("fit/")}
    by_hand = {name.removeprefix("loop/"): value for name, value in found.items() if name.startswith("loop/")}
    assert by_fit
    assert max(apart(by_fit, by_hand).values()) <= 1e-12


@of_engines(AS_ON_ONE_DEVICE, "mirrored 3", "mpirun 3")
def test_a_loop_is_one_device(jobs, engine, case):
    expected, received = jobs.of("single", case), jobs.of(engine, case)
    assert expected.keys() == received.keys()
    assert max(apart(expected, received).values()) <= 1e-9


@WITH_CASES
def test_a_callback_ends_a_loop_at_the_step_of_fit(jobs, engine):
    told = jobs.of(engine, "bits_of_layers_and_callbacks")["loop/told"]
    assert told[:STEPS].tolist() == [[1, step] for step in range(STEPS)]
    # Ranks hear of each other's wish two steps later.
    assert told[-1].tolist() == ([3, 1] if not engine.startswith("mpirun") else [3, 3])


@engines("mirrored 3", "mpirun 3")
def test_a_step_sends_what_fit_sends(jobs, engine):
    found = jobs.of(engine, "counts")
    (small, *buckets), (small_of_fit, *buckets_of_fit) = found["loop"].tolist(), found["fit"].tolist()
    assert buckets == buckets_of_fit
    assert len(buckets) == 1
    # fit's small vector has the divisor of its loss as well; a loop says it by scale_loss.
    assert [*small[:2], int(small[2]) + 1] == [*small_of_fit[:2], int(small_of_fit[2])]


@WITH_CASES
def test_a_step_is_traced_once_for_each_data_set(jobs, engine):
    train, test = jobs.of(engine, "counts")["traced"]
    replicas = 3 if engine == "mirrored 3" else 1
    assert (train, test) == (replicas, 2 * replicas)


@WITH_CASES
def test_numbers_come_to_the_host_at_log_points_alone(jobs, engine):
    read_after = jobs.of(engine, "counts")["read_after"]
    # Of 40 steps; ranks read what they agree on, one step late, from a step that is over.
    if engine == "single":
        assert read_after.size == 0
    elif engine == "mirrored 3":
        assert set(read_after) <= set(range(0, 40, 2))


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_run_is_said(jobs, wrong):
    said = str(jobs.of("mirrored 3", "refusals")[wrong])
    assert said.startswith(SAID[wrong])
    assert bool(said) == bool(SAID[wrong])


OUTSIDE = "Expected batches and steps to be used inside of `with session.training"
NO_STEP = "Expected scale_loss, apply, share, gather, sum, rows and first_row to be called inside of a function with"
BRANCH = "Expected what replicas sum (gradients, moments of synchronised BatchNormalization) to be summed in the step"
UNNAMED = "Expected all that {}, a @session.step, changes to be named in session.training, received {}, of which"
SAID = {
    "a step outside of a training": "Expected _lambda_, which is a @session.step, to be called with a batch of",
    "batches outside of a training": OUTSIDE,
    "scale_loss outside of a step": NO_STEP,
    "gather outside of a step": NO_STEP,
    "no function": "Expected session.step to be given a function, received int.",
    "a batch that is none": "Expected _lambda_, which is a @session.step, to be called with a batch of session.batches",
    "data that are none": "Expected the data of a training from session.batches(...), received tuple.",
    "a model that is not built": "Expected models whose weights are made",
    "a model that is none": "Expected models of a hand-written training to be keras Model objects, received Dense.",
    "no model": "Expected at least one model to train, received none.",
    "an optimizer that is not built": "Expected optimizers whose state is made",
    "metrics of one name": "Expected metrics of different names, which their results go by, received a more than once.",
    "a training inside of another": "Expected one session.training at a time, received one inside of another.",
    "a pass inside of another": "Expected one pass over the same data at a time, received one inside of another.",
    "a pass outside of an epoch": "Expected the data that are trained on to be iterated within an epoch",
    "validation by no step": "Expected training.validate to be given a @session.step, received builtin_function",
    "validation on what is trained": "Expected data of their own to validate on, received those that are trained on.",
    "a vector for a loss": "Expected the loss that session.scale_loss is given to be one number, received a tensor of",
    "a vector for a count": "Expected the count that session.scale_loss is given to be one number, received a tensor",
    "fewer gradients than variables": "Expected session.apply to be given one gradient a variable, received 3",
    "an optimizer that nobody named": "Expected session.apply to be given an optimizer that session.training was given",
    "apply in a tf.cond": BRANCH,
    "apply in a loop": BRANCH,
    "apply in a tf.function": BRANCH,
    "a variable that nobody named": UNNAMED.format("_lambda_", "unnamed"),
    "a variable that nobody named, in a branch": UNNAMED.format("_lambda_", "unnamed"),
    "a metric that nobody named": UNNAMED.format("_lambda_", "forgotten/count, forgotten/total"),
    "exceptions in a loop": "",
}


def test_a_session_goes_on_after_refusals(jobs):
    assert jobs.of("mirrored 3", "refusals")["afterwards"] == "1"


@pytest.mark.mpi
def test_a_rank_that_leaves_its_loop_early_ends_all_with_a_report(jobs):
    job = jobs.job("mpirun 3")
    assert job.code == 1, job.report()
    assert "has waited for the other ranks for 10 s in" in job.errors, job.report()
    assert "every rank waits, so they are in different collectives" in job.errors, job.report()
    # The report shows each rank's line of the loop.
    assert "in leaves_early" in job.errors


@pytest.mark.mpi
def test_a_rank_that_runs_a_step_more_ends_all_before_the_epoch_ends(jobs):
    """Its batch meets the next one of the others."""
    job = jobs.job("mpirun 2")
    assert job.code == 2, job.report()
    assert job.errors.count("received different ones at step 4") == 1, job.report()
    assert "a hand-written loop ran a step more on one of them" in job.errors, job.report()


def test_ranks_that_ask_for_other_batches_are_refused():
    with pytest.raises(InputError, match=r"(?s)^Expected the same call on every rank, received:.*batch_size +12 +13"):
        thread_ranks.run(lambda: another_batch_size(init()), ranks=2)


def plain_parts(session):
    """A model that is not compiled, its optimizer, a metric, and a step."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="only")])
    optimizer, mean = keras.optimizers.SGD(0.1), keras.metrics.Mean("loss")

    @session.step
    def train(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
            scaled = session.scale_loss(loss)
        session.apply(optimizer, tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        mean.update_state(loss)

    return model, optimizer, mean, train


def of_a_plain_model(session, **options):
    """On arrays that nobody has seeded, left after an epoch; its history."""
    model, optimizer, mean, train = plain_parts(session)
    data = session.batches(np.random.default_rng(0).normal(size=(12, 3)), batch_size=4, seed=5)
    with session.training(model, optimizer, data, metrics=mean, epochs=3, verbose=0, **options) as training:
        for _ in training:
            for batch in data:
                train(batch)
            break
    return training.history.history


def test_an_epoch_that_a_break_has_left_is_in_the_history_and_the_logs(tmp_path):
    one, other = thread_ranks.run(lambda: of_a_plain_model(init(), log_dir=tmp_path), ranks=2)
    assert len(one["loss"]) == 1
    assert one == other
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_steps_between_comparisons_are_checked():
    with pytest.raises(InputError, match=r"^Expected in_sync_steps to be a whole number of at least 1, received 0"):
        thread_ranks.run(lambda: of_a_plain_model(init(), in_sync_steps=0), ranks=2)


def test_steps_on_other_data_than_the_trainings_are_compared_too():
    def diverge():
        session = init()
        model, optimizer, mean, train = plain_parts(session)
        rows = np.random.default_rng(0).normal(size=(12, 3))
        data, other = (session.batches(rows, batch_size=4) for _ in range(2))
        with session.training(model, optimizer, data, metrics=mean, verbose=0, in_sync_steps=2) as training:
            for _ in training:
                for number, batch in enumerate(other):
                    train(batch)
                    if session.rank == 1 and number == 1:
                        model.layers[0].bias.assign([9.0])

    with pytest.raises(RunError, match=r"received .* at other data, step 2 .*only/bias differs"):
        thread_ranks.run(diverge, ranks=2)
