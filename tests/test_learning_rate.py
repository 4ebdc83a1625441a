"""Learning rates that grow with the replicas: what is set, what is said, what is refused, and what is saved."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras.optimizers import schedules

from distfit.errors import InputError
from distfit.training.learning_rate import Plan, plan, scaled
from tests.ranks import environment

ROWS = np.ones((8, 2)), np.ones((8, 1))
# Loads models where distfit cannot be imported, and prints their rates at some steps.
PLAIN_KERAS = """
import json, sys
sys.modules["distfit"] = None
import keras
models = [keras.models.load_model(path) for path in sys.argv[2:]]
optimizers = [getattr(model.optimizer, "inner_optimizer", model.optimizer) for model in models]
rate = lambda optimizer, step: float(optimizer._learning_rate(step) if callable(optimizer._learning_rate)
                                     else optimizer.learning_rate)
print(json.dumps([[rate(optimizer, step) for step in json.loads(sys.argv[1])] for optimizer in optimizers]))
"""


def _model(optimizer, kind=keras.Sequential):
    model = kind([keras.Input((2,)), keras.layers.Dense(1, name="dense")], name="model")
    model.compile(optimizer, "mse")
    return model


def _rates(optimizer, steps):
    return [float(optimizer._learning_rate(step)) for step in steps]


@pytest.mark.parametrize(
    ("replicas", "scaling", "expected"), [(3, "linear", 0.3), (4, "sqrt", 0.2), (16, "linear", 1.6)]
)
def test_a_number_is_multiplied(replicas, scaling, expected):
    model = _model(keras.optimizers.SGD(0.1))
    chosen = plan(model, scaling, 0, replicas, None)
    assert model.optimizer.learning_rate == np.float32(0.1)
    with chosen.applied():
        pass
    assert model.optimizer.learning_rate == np.float32(expected)
    assert f"{replicas} replicas" in chosen.sentence
    assert chosen.sentence.endswith(f"= {expected:g}.")


def test_warm_up_is_a_straight_line_and_then_stays():
    model = _model(keras.optimizers.SGD(0.1))
    chosen = plan(model, "linear", 5, num_replicas=4, steps_per_epoch=100)
    with chosen.applied():
        found = np.array(_rates(model.optimizer, range(700)))
    # A float32 rate is off by no more than one of the addends' last bits.
    line = 0.1 + 0.3 * np.minimum(np.arange(700), 500) / 500
    np.testing.assert_allclose(found, line, rtol=0, atol=np.spacing(np.float32(0.4)))
    assert set(found[500:]) == {float(np.float32(0.4))}
    assert chosen.sentence == (
        "Learning rate: 0.1 x 4 replicas (linear) = 0.4, reached over 5 epochs (500 steps) from 0.1."
    )


def test_parts_of_an_epoch_are_whole_steps():
    assert "1.5 epochs (10 steps)" in plan(_model(keras.optimizers.SGD(0.1)), "sqrt", 1.5, 2, 7).sentence
    assert "(1 step)" in plan(_model(keras.optimizers.SGD(0.1)), "sqrt", 0.01, 2, 7).sentence


def test_keras_asks_a_schedule_by_batches_also_when_it_accumulates():
    """Why the warm-up is not divided by `gradient_accumulation_steps`."""
    model = _model(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    with plan(model, "linear", 2, num_replicas=3, steps_per_epoch=4).applied():
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: seen.append(float(model.optimizer.learning_rate))
        )
        model.fit(*ROWS, batch_size=2, epochs=3, verbose=0, callbacks=[note])
    expected = [0.1 + 0.2 * min(step, 8) / 8 for step in range(12)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (schedules.ExponentialDecay(0.1, 10, 0.5), (0, 5, 20)),
        (schedules.InverseTimeDecay(0.1, 10, 0.5, staircase=True), (0, 5, 20)),
        (schedules.PolynomialDecay(0.1, 10, 0.01, power=2.0), (0, 5, 20)),
        (schedules.PiecewiseConstantDecay([3, 6], [0.1, 0.01, 0.001]), (0, 5, 20)),
        (schedules.CosineDecay(0.1, 10, alpha=0.1), (0, 5, 20)),
        (schedules.CosineDecay(0.0, 10, warmup_target=0.1, warmup_steps=4), (0, 2, 9)),
        (schedules.CosineDecayRestarts(0.1, 10, t_mul=2.0, m_mul=0.5), (0, 5, 20)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedules_of_keras_are_scaled_at_every_step(schedule, steps):
    model = _model(keras.optimizers.SGD(schedule))
    chosen = plan(model, "linear", 0, num_replicas=3, steps_per_epoch=None)
    with chosen.applied():
        found = _rates(model.optimizer, steps)
    assert type(model.optimizer._learning_rate) is type(schedule)
    np.testing.assert_allclose(found, [3 * float(schedule(step)) for step in steps], rtol=1e-6)
    assert type(schedule).__name__ in chosen.sentence


def test_a_cosine_decay_warms_up_and_ends_where_it_did():
    schedule = schedules.CosineDecay(0.1, 100, alpha=0.01)
    warmed = scaled(schedule, 4.0, warmup_steps=20)
    found = [float(warmed(step)) for step in (0, 10, 20, 60, 100, 200)]
    np.testing.assert_allclose(found, [0.1, 0.25, 0.4, 0.202, 0.004, 0.004], rtol=1e-6)
    assert plan(_model(keras.optimizers.SGD(schedule)), "linear", 2, 4, 10).sentence == (
        "Learning rate: CosineDecay, whose rates are multiplied by 4 replicas (linear), reached over 2 epochs (20 "
        "steps) from 0.1; its decay ends where it did."
    )


def test_one_replica_is_left_alone_and_nothing_is_said_unasked():
    model = _model(keras.optimizers.SGD(0.1))
    variable = model.optimizer._learning_rate
    chosen = plan(model, "linear", 5, num_replicas=1, steps_per_epoch=4)
    with chosen.applied():
        assert model.optimizer._learning_rate is variable
    assert chosen.sentence == "Learning rate: 0.1 x 1 replica (linear) = 0.1."
    assert plan(model, None, 0, 4, None) == Plan("", ())


def test_a_training_that_goes_on_is_not_scaled_twice():
    model = _model(keras.optimizers.SGD(0.1, gradient_accumulation_steps=8))
    with plan(model, "linear", 1, num_replicas=2, steps_per_epoch=4).applied():
        # Less than one update, for which Keras counts no iteration yet.
        model.fit(*ROWS, verbose=0)
    before = _rates(model.optimizer, range(9))
    again = plan(model, "linear", 1, num_replicas=4, steps_per_epoch=4)
    with again.applied():
        assert _rates(model.optimizer, range(9)) == before
    assert "left as it is, as its optimizer has seen 1 batches" in again.sentence


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_what_fails_before_its_first_step_leaves_the_rate_as_it_was(warmup_epochs):
    model = _model(keras.optimizers.SGD(0.1, momentum=0.9))
    fresh = _model(keras.optimizers.SGD(0.1, momentum=0.9))

    def fail_when_built():
        with plan(model, "linear", warmup_epochs, num_replicas=4, steps_per_epoch=4).applied():
            model.optimizer.build(model.trainable_variables)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail_when_built()
    fresh.optimizer.build(fresh.trainable_variables)
    assert model.optimizer.learning_rate == np.float32(0.1)
    # In the order in which Keras saves and loads them.
    places = [[variable.name for variable in one.optimizer.variables] for one in (model, fresh)]
    assert places[0] == places[1]
    assert plan(model, "linear", 0, 4, 4).sentence.endswith("= 0.4.")


def test_what_fails_later_keeps_the_scaled_rate():
    model = _model(keras.optimizers.SGD(0.1))

    def interrupt_when_trained():
        with plan(model, "linear", 0, num_replicas=4, steps_per_epoch=4).applied():
            model.fit(*ROWS, verbose=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt_when_trained()
    assert model.optimizer.learning_rate == np.float32(0.4)


def test_wrapped_optimizers_are_scaled_inside():
    inner = keras.optimizers.Adam(0.1)
    model = _model(keras.optimizers.LossScaleOptimizer(inner))
    with plan(model, "sqrt", 2, num_replicas=4, steps_per_epoch=10).applied():
        np.testing.assert_allclose(_rates(inner, (0, 10, 20)), [0.1, 0.15, 0.2], rtol=1e-6)
    first, second = keras.optimizers.SGD(0.1, name="first"), keras.optimizers.Adam(0.01, name="second")
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(first, {".*bias": second}))
    chosen = plan(_model(several), "linear", 0, num_replicas=2, steps_per_epoch=None)
    with chosen.applied():
        assert [float(one.learning_rate) for one in (first, second)] == pytest.approx([0.2, 0.02])
    assert "Learning rate of first: 0.1 x 2" in chosen.sentence
    assert "Learning rate of second: 0.01 x 2" in chosen.sentence


def test_saved_models_are_plain_keras(tmp_path):
    optimizers = {
        "rate": keras.optimizers.SGD(0.1, momentum=0.9),
        "cosine": keras.optimizers.Adam(schedules.CosineDecay(0.1, 100)),
        "scaled": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
    }
    paths, expected = [], []
    steps = [0, 3, 8, 50]
    for name, optimizer in optimizers.items():
        model = _model(optimizer)
        with plan(model, "linear", 2, num_replicas=3, steps_per_epoch=4).applied():
            model.fit(*ROWS, batch_size=2, verbose=0)
        paths.append(str(tmp_path / f"{name}.keras"))
        model.save(paths[-1])
        expected.append(_rates(getattr(optimizer, "inner_optimizer", optimizer), steps))
    job = subprocess.run(
        [sys.executable, "-c", PLAIN_KERAS, json.dumps(steps), *paths],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout.splitlines()[-1]) == expected


class _OfTheirOwn(schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1


class _OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def _gan():
    model = _model(keras.optimizers.SGD(0.1), _OwnStep)
    model.d_optimizer = keras.optimizers.SGD(0.1)
    return model


def _of_a_function():
    return keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(0.1))


SGD = keras.optimizers.SGD
REFUSED = {
    "another rule": (lambda: _model(SGD(0.1)), {"scaling": "cubic"}, "'cubic'"),
    "epochs below 0": (lambda: _model(SGD(0.1)), {"warmup_epochs": -1}, "received -1"),
    "endless epochs": (lambda: _model(SGD(0.1)), {"warmup_epochs": float("inf")}, "received inf"),
    "no number": (lambda: _model(SGD(0.1)), {"warmup_epochs": "5"}, "received '5'"),
    "nothing to warm up to": (lambda: _model(SGD(0.1)), {"scaling": None}, "beside warmup_epochs=2"),
    "unknown length": (lambda: _model(SGD(0.1)), {"steps_per_epoch": None}, "Pass steps_per_epoch"),
    "a scheduler": (
        lambda: _model(SGD(0.1)),
        {"callbacks": keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)},
        "received LearningRateScheduler",
    ),
    "a plateau": (
        lambda: _model(SGD(0.1)),
        {"callbacks": [keras.callbacks.ReduceLROnPlateau()]},
        "received ReduceLROnPlateau",
    ),
    "a user's schedule": (lambda: _model(SGD(_OfTheirOwn())), {"warmup_epochs": 0}, "received a _OfTheirOwn"),
    "a function": (lambda: _model(SGD(lambda: 0.1)), {"warmup_epochs": 0}, "received a function"),
    "a schedule without warm-up": (
        lambda: _model(SGD(schedules.ExponentialDecay(0.1, 10, 0.5))),
        {},
        "received a ExponentialDecay",
    ),
    "two warm-ups": (
        lambda: _model(SGD(schedules.CosineDecay(0.0, 99, warmup_target=0.1, warmup_steps=4))),
        {},
        "of its own",
    ),
    "a decay too short": (lambda: _model(SGD(schedules.CosineDecay(0.1, 8))), {}, "one of 8"),
    "two optimizers in an own step": (_gan, {}, "2 optimizers"),
    "optimizers made later": (lambda: _model(_of_a_function()), {"warmup_epochs": 0}, "OptimizerMap"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("replicas", [1, 3])
def test_what_cannot_be_is_refused_for_any_number_of_replicas(case, replicas):
    make, arguments, words = REFUSED[case]
    model = make()
    asked = {"scaling": "linear", "warmup_epochs": 2, "steps_per_epoch": 4, "callbacks": None} | arguments
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as refused:
        plan(model, num_replicas=replicas, **asked)
    assert "\n" not in str(refused.value)


def test_a_scheduler_beside_scaling_has_the_last_word_and_that_is_said():
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    chosen = plan(_model(keras.optimizers.SGD(0.1)), "linear", 0, 2, 4, [scheduler])
    assert chosen.sentence.endswith("A LearningRateScheduler sets it in each epoch, and has the last word.")
    plateau = plan(_model(keras.optimizers.SGD(0.1)), "linear", 0, 2, 4, [keras.callbacks.ReduceLROnPlateau()])
    assert plateau.sentence.endswith("= 0.2.")


def test_a_model_with_several_optimizers_scales_all_of_them():
    model = _gan()
    with plan(model, "linear", 0, num_replicas=3, steps_per_epoch=None).applied():
        assert [float(one.learning_rate) for one in (model.optimizer, model.d_optimizer)] == pytest.approx([0.3, 0.3])
