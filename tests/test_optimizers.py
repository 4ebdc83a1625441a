"""Optimizers, random streams and other state under several replicas: what a table of results cannot show.

What is found and what is put back is tested here; what several replicas do, in tests/optimizers_script.py, which
runs once with three logical devices and once with two ranks, beside Keras' own fit.
"""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator

from distfit.backends import hooks
from distfit.errors import InputError
from tests.optimizers_script import CHECKS
from tests.ranks import launch

# Launcher, ranks, and what tests/optimizers_script.py is asked for.
JOBS = {
    "local": ("none", 1, ("keras", "single", "mirrored:3")),
    "mpirun": ("mpirun", 2, ("horovod",)),
}
REPLICATED = ("mirrored:3", pytest.param("horovod", marks=pytest.mark.mpi))
OF_ONE_PROCESS = ("an_update_that_an_exception_interrupts",)
# What 11 bits of float16 and 8 of bfloat16 allow, where a sum in another order rounds differently.
TOLERANCE = {"mixed_float16": 2e-3, "float16": 2e-3, "bfloat16": 3e-2}


def _dense():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


class Layered(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.optimizer = keras.optimizers.SGD()
        self.streams = {"a": [keras.random.SeedGenerator(1)], "b": (keras.random.SeedGenerator(2),)}

    def call(self, x):
        return x


class Jittered(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.stream = keras.random.SeedGenerator(3)

    def call(self, y_true, y_pred):
        return y_pred + keras.random.normal((), seed=self.stream)


def test_optimizers_are_found_wherever_a_model_keeps_them_once_each():
    model, layer = _dense(), Layered()
    model.add(layer)
    slow, fast = keras.optimizers.Adam(), keras.optimizers.Lion()
    model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(slow, {"x": fast, "y": slow})), "mse")
    model.other, model.same = [keras.optimizers.LossScaleOptimizer(keras.optimizers.Ftrl())], {"slow": slow}
    found, wrapping = hooks.optimizers_of(model), model.other[0]
    expected = [model.optimizer, *model.optimizer.optimizers, wrapping, wrapping.inner_optimizer, layer.optimizer]
    assert found[:3] == expected[:3]
    assert found.index(wrapping) + 1 == found.index(wrapping.inner_optimizer)
    assert sorted(map(id, found)) == sorted(map(id, expected))
    shared = {id(variable) for variable in hooks.variables_of(model)}
    assert {id(variable) for optimizer in expected for variable in optimizer.variables} <= shared


def test_streams_are_found_in_layers_losses_and_containers():
    model, layer, loss = _dense(), Layered(), Jittered()
    model.add(layer)
    model.augment = keras.layers.Pipeline([keras.layers.RandomFlip(seed=4)])
    model.compile("sgd", loss)
    model.noise = keras.random.SeedGenerator(5)
    seeds = [generator._initial_seed for generator in hooks.seed_generators_of(model)]
    assert sorted(seeds) == [1, 2, 3, 4, 5]
    shared = {id(variable) for variable in hooks.variables_of(model)}
    assert {id(generator.state) for generator in hooks.seed_generators_of(model)} <= shared


def _global_stream():
    return global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)


def test_the_global_stream_is_made_for_the_time_and_leaves_no_trace():
    keras.utils.set_random_seed(1)
    with hooks.everything_shared(_dense()) as variables:
        made = _global_stream()
        assert any(variable is made.state for variable in variables)
    assert _global_stream() is None
    drawn = random.random()
    keras.utils.set_random_seed(1)
    _dense()
    assert random.random() == drawn


def test_a_global_stream_that_was_drawn_from_stays_as_keras_would_have_made_it():
    def after(draw):
        keras.utils.set_random_seed(1)
        model = _dense()
        draw(model)
        return _global_stream().state.numpy().tolist(), random.random()

    def shared(model):
        with hooks.everything_shared(model):
            keras.random.normal(())

    assert after(shared) == after(lambda model: keras.random.normal(()))


def test_a_global_stream_that_was_there_is_shared_and_kept():
    keras.utils.set_random_seed(1)
    stream = global_seed_generator()
    with hooks.everything_shared(_dense()) as variables:
        assert variables[-1] is stream.state
    assert _global_stream() is stream


class Second:
    """As much of an engine as a stream asks for: the second replica of several."""

    def replica(self):
        return 1


def test_hooks_are_put_back_whatever_was_there_before():
    model = _dense()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    own = model.optimizer._var_key
    model.optimizer.__dict__["_var_key"] = own  # as inside another run
    with hooks.everything_shared(model):
        before = [dict(vars(thing)) for thing in (model.optimizer, global_seed_generator())]
        with hooks.hooked(model, Second(), strategy):
            assert model.optimizer._distribution_strategy is strategy
            assert vars(model.optimizer)["_var_key"] is not own
        assert [dict(vars(thing)) for thing in (model.optimizer, global_seed_generator())] == before


def test_a_stream_of_another_replica_is_another_one_and_its_state_is_keras():
    def draws(context):
        keras.utils.set_random_seed(1)
        model = _dense()
        with hooks.everything_shared(model), context(model):
            noise = keras.random.normal((8,)).numpy().tolist()
            return noise, _global_stream().state.numpy().tolist()

    own, state = draws(lambda model: hooks.hooked(model, Second()))
    keras_own, keras_state = draws(lambda model: hooks._traced_anew(model))
    assert own != keras_own
    assert state == keras_state


def test_an_optimizer_that_nobody_built_is_refused_where_it_is_used_and_only_there():
    model = _dense()
    model.late = keras.optimizers.Adam()
    with hooks.everything_shared(model):
        with hooks.hooked(model, Second()), pytest.raises(InputError, match=r"received Adam 'adam.*build\(variables\)"):
            model.late.apply([tf.ones((2, 1))], [model.layers[0].kernel])
        model.late.build(model.trainable_variables)
        with hooks.hooked(model, Second()):
            model.late.apply([tf.ones((2, 1))], [model.layers[0].kernel])
    assert int(model.late.iterations) == 1


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """What each engine wrote; a job is started when the first of its engines is asked for."""
    done = {}

    def of(engine):
        job = next(name for name, (_, _, engines) in JOBS.items() if engine in engines)
        if job not in done:
            launcher, ranks, engines = JOBS[job]
            folder = tmp_path_factory.mktemp(job)
            ended = launch(["-m", "tests.optimizers_script", str(folder), *engines], ranks, launcher, limit_s=500)
            assert ended.code == 0, ended.report()
            done[job] = {name: dict(np.load(folder / f"{name.replace(':', '-')}.npz")) for name in engines}
        return done[job][engine]

    return of


def _of_check(results, check):
    return {key.partition("//")[2]: value for key, value in results.items() if key.startswith(f"{check}//")}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", CHECKS)
def test_one_device_is_keras_to_the_bit(numbers, check):
    expected, received = _of_check(numbers("keras"), check), _of_check(numbers("single"), check)
    assert expected.keys() == received.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(received[key], value, err_msg=key)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", REPLICATED)
@pytest.mark.parametrize("check", CHECKS)
def test_several_replicas_are_one_device(numbers, check, engine):
    """What training changed, what is left on the objects, and where the streams stand."""
    expected, received = _of_check(numbers("single"), check), _of_check(numbers(engine), check)
    # What can be seen in one process only says nothing on ranks.
    assert expected.keys() == received.keys() or (engine == "horovod" and check in OF_ONE_PROCESS and not received)
    for key in received:
        value = expected[key]
        if value.dtype.kind == "f":
            tolerance = TOLERANCE.get(check, 1e-9)
            np.testing.assert_allclose(received[key], value, rtol=tolerance, atol=tolerance, err_msg=key)
        else:
            np.testing.assert_array_equal(received[key], value, err_msg=key)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["keras", *REPLICATED])
def test_an_inf_on_one_replica_skips_the_update_and_halves_the_scale_on_all(numbers, engine):
    """In the second of each three batches; that all replicas say so is asserted where they run."""
    scales = numbers(engine)["loss_scale//scales"]
    scale, counter, updates, kernel = scales.T
    assert scale.tolist() == [1024, 512, 512, 1024, 512, 512, 1024, 512, 512]
    assert counter.tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 1]
    assert updates.tolist() == [1, 1, 2, 3, 3, 4, 5, 5, 6]
    assert (np.diff(kernel)[[0, 3, 6]] == 0).all()
    assert (np.diff(kernel)[[1, 2, 4, 5, 7]] != 0).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["single", *REPLICATED])
def test_what_decays_is_remembered_by_the_keys_of_plain_variables(numbers, engine):
    """Of two kernels and two biases, the first layer's belong to an optimizer without decay."""
    assert numbers(engine)["several_optimizers//decays"].tolist() == ["None", "None", "False", "False"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["single", *REPLICATED])
def test_compile_wraps_the_optimizer_of_a_mixed_float16_model(numbers, engine):
    assert numbers(engine)["mixed_float16//wrapped"] == "LossScaleOptimizer"
