"""A model's own train_step on several replicas: what the table of tests/cases does not hold.

The trainings are in tests/own_steps_script.py, which runs once with three logical devices and once with two ranks.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from distfit.errors import InputError
from distfit.training import means, metric_updates, own_step
from distfit.training.origin import Origin, Origins
from distfit.training.wire import Wire
from tests.own_steps_script import CASES
from tests.ranks import launch

TOLERANCE = 1e-12
# float16 adds in another order, and these weights are near 1.
HALF = 1e-3
# Launcher, ranks, engines.
JOBS = {"local": ("none", 1, ("keras", "mirrored:3")), "mpirun": ("mpirun", 2, ("horovod",))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """From an engine to its numbers; each job is launched when it is first asked for."""
    folder = tmp_path_factory.mktemp("own_steps")
    found: dict[str, dict] = {}

    def of(job: str) -> dict:
        launcher, ranks, engines = JOBS[job]
        if engines[-1] not in found:
            done = launch(["-m", "tests.own_steps_script", str(folder), *engines], ranks, launcher, limit_s=400)
            assert done.code == 0, done.report()
            found.update({name: dict(np.load(folder / f"{name.replace(':', '-')}.npz")) for name in engines})
        return found

    return of


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", ["local", pytest.param("mpirun", marks=pytest.mark.mpi)])
@pytest.mark.parametrize("case", CASES)
def test_several_replicas_train_as_keras_does(trained, case, job):
    engine = JOBS[job][2][-1]
    expected, received = trained("local")["keras"], trained(job)[engine]
    names = [name for name in {**expected, **received} if name.startswith(f"{case}//")]
    assert names
    for name in names:
        limit = HALF if name.endswith("//half") else TOLERANCE
        if name.endswith("//repeats"):
            assert received[name]
        else:
            np.testing.assert_allclose(received[name], expected[name], rtol=limit, atol=limit, err_msg=name)


class Adversary(keras.Model):
    """No `call`, and two optimizers that are built by their first update."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([keras.layers.Dense(2), keras.layers.Dropout(0.5)])
        self.seen = keras.metrics.Mean(name="seen")

    def compile(self):
        super().compile()
        self.first, self.second = keras.optimizers.Adam(), keras.optimizers.SGD(momentum=0.9)

    def train_step(self, data):
        for optimizer in (self.first, self.second):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.inner(data, training=True))
            optimizer.apply(tape.gradient(loss, self.inner.trainable_weights), self.inner.trainable_weights)
        self.seen.update_state(loss)
        return {"seen": self.seen.result()}


SPEC = tf.TensorSpec([None, 3], tf.float32)


def _adversary():
    # Names begin anew as well.
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = Adversary()
    model.compile()
    return model


def test_building_leaves_a_model_as_keras_would_before_its_first_step():
    model, other = _adversary(), _adversary()
    own_step.build(model, "train_step", SPEC)
    assert len(model.inner.trainable_weights) == 2
    assert (model.first.built, model.second.built, model.optimizer.built) == (True, True, False)
    assert all((variable.numpy() == 0).all() for variable in model.second.variables[2:])
    assert float(model.seen.count.numpy()) == 0
    assert int(model.first.iterations) == 0
    data = np.random.default_rng(0).random((8, 3), "float32")
    for one in (model, other):
        one.fit(data, epochs=2, verbose=0)
    for own, theirs in zip(
        model.variables + model.first.variables, other.variables + other.first.variables, strict=True
    ):
        np.testing.assert_array_equal(own.numpy(), theirs.numpy())
        assert own.path == theirs.path


def test_a_variable_that_no_model_has_is_refused_by_name():
    class Loose(Adversary):
        def train_step(self, data):
            LOOSE.assign_add(1.0)
            return super().train_step(data)

    LOOSE = tf.Variable(0.0, name="loose")
    model = Loose()
    model.compile()
    with pytest.raises(InputError, match="received loose, of which"):
        own_step.build(model, "train_step", SPEC)


def test_notes_name_the_steps_that_a_model_brings():
    (note,) = own_step.notes(_adversary())
    assert "own train_step:" in note
    assert "docs: guides/own_steps" in note
    assert own_step.notes(keras.Sequential([keras.layers.Dense(1)])) == []


def _origins(function, *arguments):
    """What `function` says of origins in a graph whose first argument only this replica has."""
    found = []

    def traced(*given):
        found.extend(function(Origins([given[0]]), *given))

    tf.function(traced, autograph=False).get_concrete_function(*arguments)
    return found


def test_a_value_is_a_replicas_own_if_its_rows_are_in_it():
    state = tf.Variable(1.0)

    def of(origins, rows):
        total = tf.reduce_sum(rows)
        same = tf.identity(total)
        origins.same([same])
        result = tf.identity(state.read_value())
        origins.of_metrics([result])
        values = [
            rows * 2,
            tf.shape(rows)[0],
            state * 2,
            1.0,
            state,
            None,
            same / 2,
            same + total,
            result * 3,
            [1, rows],
        ]
        return [origins.of(value) for value in values]

    own, same, metrics = Origin.ROWS, Origin.SAME, Origin.METRICS
    found = _origins(of, tf.TensorSpec([None], tf.float32))
    assert found == [own, own, same, same, same, same, same, own, metrics, own]


def test_a_branch_is_seen_from_inside_and_not_looked_into_from_outside():
    inside = []

    def of(origins, rows, scale):
        total = tf.reduce_sum(rows)
        same = tf.identity(total)
        origins.same([same])

        def branch():
            inside.extend([origins.of(total * 2), origins.of(same * 2)])
            return same

        return [origins.of(tf.cond(same > 0, branch, lambda: same)), origins.of(tf.random.normal([2]))]

    spec = tf.TensorSpec([None], tf.float32)
    assert _origins(of, spec, spec) == [Origin.ROWS, Origin.ROWS]
    assert inside == [Origin.ROWS, Origin.SAME]


def test_what_is_computed_eagerly_counts_as_a_replicas_own():
    origins = Origins([tf.ones(2)])
    assert origins.of(tf.constant(1.0)) is Origin.ROWS
    assert origins.of(1.0) is Origin.SAME


def test_a_scalar_counts_by_rows_and_rows_count_themselves():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.mean, model.hits = keras.metrics.Mean(), keras.metrics.BinaryAccuracy()
    replica = metric_updates.Here(Wire(None), rows=1, data=())
    replica.met(tf.constant(0.25, tf.float64))
    with metric_updates.installed(model), metric_updates.here(replica):
        model.mean.update_state(4.0)
        model.mean.update_state(4.0, sample_weight=2.0)
        model.mean.update_state([1.0, 2.0])
    assert "update_state" not in vars(model.mean)
    assert float(model.mean.total.numpy()) == 1 + 2 + 3
    assert float(model.mean.count.numpy()) == 0.25 + 0.5 + 2


@pytest.mark.parametrize(("rows", "expected"), [(0, 0.0), (2, 3.0)])
def test_metrics_keep_nothing_of_a_replica_without_rows(rows, expected):
    metric = keras.metrics.Sum()
    with means.kept(metric.variables, tf.constant(rows, tf.int64)):
        metric.update_state([1.0, 2.0])
    assert float(metric.result()) == expected
