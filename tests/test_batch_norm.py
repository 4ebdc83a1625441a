"""Synchronised BatchNormalization: whatever replica has which rows, moments and gradients are one device's.

Replicas are threads here, each with a copy of the model, which meet at a barrier for every collective; real engines
run in tests/test_engines.py.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from distfit.errors import InputError
from distfit.training import batch_norm
from distfit.training.wire import Wire

ROWS = 7
RNG = np.random.default_rng(0)
# Uneven, with replicas that have nothing, one row, or everything.
SPLITS = [(3, 4), (2, 0, 5), (0, 7), (1, 1, 5)]


class Threads:
    """A backend whose replicas are threads of this process."""

    def __init__(self, replicas):
        self._places = threading.local()
        self._brought = [None] * replicas
        self._barrier = threading.Barrier(replicas, timeout=60)

    def run(self, function, shards):
        def on_replica(place):
            self._places.here = place
            try:
                return function(*shards[place])
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(shards)) as pool:
            futures = [pool.submit(on_replica, place) for place in range(len(shards))]
            failures = [future.exception() for future in futures]
        for failure in failures:
            if failure is not None and not isinstance(failure, threading.BrokenBarrierError):
                raise failure
        return [future.result() for future in futures]

    def sum(self, tensors, name):
        self._brought[self._places.here] = (name, [tensor.shape for tensor in tensors], tensors)
        self._barrier.wait()
        assert len({str(brought[:2]) for brought in self._brought}) == 1, self._brought
        totals = [tf.add_n(list(parts)) for parts in zip(*(brought[2] for brought in self._brought), strict=True)]
        self._barrier.wait()
        return totals


def replicated(build, x, split, step, everywhere=True, void=lambda part: part[:1]):
    """`step(model, x of the replica, rows)` on every replica, and what each of them sent.

    Args:
        void: what of the batch a replica without rows computes.
    """
    backend = Threads(len(split))
    wire = Wire(backend)
    models = [build() for _ in split]
    ends = np.cumsum(split)

    def on_replica(replica):
        rows, end = split[replica], ends[replica]
        mine = [part[end - rows : end] if rows else void(part) for part in x]
        together = batch_norm.installed(batch_norm.layers_of(models[replica], everywhere), wire)
        with together, wire.step("train") as transfers, batch_norm.counting(tf.constant(rows, tf.int64)):
            result = step(models[replica], *mine, rows)
        return result, transfers

    results = backend.run(on_replica, [(replica,) for replica in range(len(split))])
    return [result for result, _ in results], [transfers for _, transfers in results]


def trained(model, inputs, target, rows):
    """One training step's outputs, gradients and moved weights; the loss is a sum, so that replicas' add up."""
    inputs = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = model(inputs, training=True)
        loss = tf.reduce_sum(tf.square(tf.sin(output) - target)) * float(rows > 0)
    of_input, *gradients = tape.gradient(loss, [inputs, *model.trainable_variables])
    return {
        "output": output.numpy()[:rows],
        "of_input": of_input.numpy()[:rows],
        "gradients": [gradient.numpy() for gradient in gradients],
        "moved": [weight.numpy() for weight in model.non_trainable_variables],
    }


def assert_one_device(build, x, split, tolerance=1e-12):
    parts, transfers = replicated(build, x, split, trained)
    whole = trained(build(), *x, ROWS)
    near = {"rtol": tolerance, "atol": tolerance}
    for rows in ("output", "of_input"):
        np.testing.assert_allclose(np.concatenate([part[rows] for part in parts]), whole[rows], **near)
    for number, gradient in enumerate(whole["gradients"]):
        np.testing.assert_allclose(sum(part["gradients"][number] for part in parts), gradient, **near)
    for number, weight in enumerate(whole["moved"]):
        np.testing.assert_allclose(parts[0]["moved"][number], weight, **near)
        assert all((part["moved"][number] == parts[0]["moved"][number]).all() for part in parts)
    return transfers


def normalised(shape, mask=None, **arguments):
    """A builder of a model of one BatchNormalization whose scale and offset are not their initial ones."""

    def build():
        keras.utils.set_random_seed(3)
        x = keras.Input(shape[1:], dtype="float64")
        initial = keras.initializers.RandomUniform(0.5, 1.5)
        own = {"gamma_initializer": initial, "beta_initializer": initial, "moving_mean_initializer": initial}
        layer = keras.layers.BatchNormalization(dtype="float64", **own | arguments)
        return keras.Model(x, layer(x if mask is None else Masked(mask)(x)))

    return build


class Masked(keras.layers.Layer):
    """Puts a mask on its inputs, made from them so that it follows the rows."""

    def __init__(self, mask):
        super().__init__(dtype="float64")
        self.mask = mask

    def call(self, inputs):
        return inputs * 1.0

    def compute_mask(self, inputs, previous=None):
        return self.mask(inputs)


def batch(*shape, mean=0.3):
    return RNG.normal(mean, 1.0, (ROWS, *shape)), RNG.normal(0.0, 1.0, (ROWS, *shape))


CASES = {
    "rows": ((5,), {}),
    "images": ((4, 3, 2), {}),
    "volumes": ((2, 3, 2, 2), {}),
    "channels_first": ((3, 4, 4), {"axis": 1}),
    "middle_axis": ((3, 4, 2), {"axis": 2}),
    "one_channel": ((4, 1), {}),
    "no_scale": ((5,), {"scale": False}),
    "no_center": ((5,), {"center": False, "momentum": 0.5}),
    "renorm": ((5,), {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}}),
    "tiny_epsilon": ((5,), {"epsilon": 1e-9}),
}
MASKS = {
    "some": lambda x: x[..., 0] > -0.3,
    "none_valid": lambda x: x[..., 0] > 99,
    "all_valid": lambda x: x[..., 0] > -99,
}


ROUND = [(case, SPLITS[place % len(SPLITS)]) for place, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "split"), ROUND, ids=str)
def test_rows_wherever_they_are_have_the_moments_of_one_device(case, split):
    shape, arguments = CASES[case]
    assert_one_device(normalised((ROWS, *shape), **arguments), batch(*shape), split)


@pytest.mark.parametrize("mask", MASKS)
def test_only_valid_elements_count(mask):
    assert_one_device(normalised((ROWS, 4, 3), MASKS[mask]), batch(4, 3), (2, 0, 5))


def test_a_replica_whose_rows_are_all_masked():
    x, y = batch(4, 3)
    x[:3, :, 0] = -1.0
    assert_one_device(normalised((ROWS, 4, 3), MASKS["some"]), (x, y), (3, 4))


def test_a_mask_beside_channels_that_are_not_last():
    """Counts then differ between channels."""
    transfers = assert_one_device(normalised((ROWS, 3, 4), MASKS["some"], axis=1), batch(3, 4), (3, 0, 4))
    assert [transfer.elements for transfer in transfers[0]] == [6, 9, 9]


@pytest.mark.parametrize("mask", [None, MASKS["some"]])
def test_a_large_mean_costs_no_accuracy(mask):
    """Moments of distances to 0 would lose (1e4 / 1)^2 * 1e-16 = 1e-8."""
    x, y = batch(4, 3)
    assert_one_device(normalised((ROWS, 4, 3), mask), (x + 1e4, y), (2, 0, 5), tolerance=5e-10)


@pytest.fixture
def double():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


def deep():
    """A layer that is called twice, one of a nested model, a frozen one, and what lies between them."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    nested = keras.Sequential([keras.Input((4,)), layers.Dense(4, "tanh"), layers.BatchNormalization()])
    twice, frozen = layers.BatchNormalization(), layers.BatchNormalization(trainable=False)
    x = keras.Input((4,))
    h = frozen(layers.Dense(4, "tanh")(twice(nested(x))))
    return keras.Model(x, layers.Dense(4)(layers.BatchNormalization()(twice(h))))


@pytest.mark.parametrize("split", [(4, 3), (2, 0, 5)], ids=str)
def test_layers_in_a_row_shared_and_nested(split, double):
    transfers = assert_one_device(deep, batch(4), split)
    assert all(own == transfers[0] for own in transfers)
    names = [transfer.name.removeprefix("train.moments.") for transfer in transfers[0]]
    forward = [name for name in names if not name.startswith(("0.s", "1.s", "2.s", "3.s")) and "gradient" not in name]
    # In the order of calls; the frozen layer (2) sends nothing.
    assert forward == ["0", "1", "1.2", "3"]
    assert [name for name in names if "gradient" in name] == ["3.gradient", "1.gradient", "1.gradient.2", "0.gradient"]


def sent_by(dtype, watched=True):
    """The collectives of one layer of 5 channels, forward and backward."""

    def step(model, x, rows):
        x = tf.constant(x, dtype)
        with tf.GradientTape() as tape:
            tape.watch(x if watched else [])
            loss = tf.reduce_sum(tf.cast(model(x, training=True), tf.float32) ** 2)
        tape.gradient(loss, [x, *model.trainable_variables])

    def build():
        layer = keras.layers.BatchNormalization(dtype=dtype)
        return keras.Sequential([keras.Input((5,), dtype=dtype), layer])

    _, transfers = replicated(build, (batch(5)[0],), (3, 4), step)
    return [(transfer.name, transfer.nbytes) for transfer in transfers[0]]


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_one_collective_forward_and_one_backward(dtype):
    inputs = dtype.replace("mixed_", "")
    assert sent_by(inputs) == [("train.moments.0", 88), ("train.moments.0.gradient", 88)]


def test_float64_asks_for_the_mean_first():
    assert sent_by("float64") == [
        ("train.moments.0.shift", 48),
        ("train.moments.0", 88),
        ("train.moments.0.gradient", 88),
    ]


def test_nothing_comes_back_where_no_gradient_is_asked_for():
    assert sent_by("float32", watched=False) == [("train.moments.0", 88)]


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_moments_are_taken_in_the_type_of_keras(dtype):
    """Of numbers far from 0, in float32: as near to the exact ones as on one device."""

    def build():
        return keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=0.0, dtype=dtype)])

    def moved(model, x, rows):
        model(tf.constant(x), training=True)
        return [weight.numpy() for weight in model.non_trainable_variables]

    x = (RNG.normal(0.0, 1.0, (ROWS, 3)) + 500).astype(dtype.replace("mixed_bfloat16", "float32")[-7:])
    exact = x.astype("float64")
    if "bfloat16" in dtype:
        exact = tf.cast(tf.cast(x, tf.bfloat16), tf.float64).numpy()
    results, _ = replicated(build, (x,), (3, 0, 4), moved)
    for mean, variance in results:
        assert (mean.dtype, variance.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, exact.var(0), rtol=1e-4)


def forward(model, x, rows):
    return model(tf.constant(x), training=True).numpy()[:rows]


def test_what_a_replica_without_rows_computes_counts_for_nothing():
    x, build = batch(5)[0], normalised((ROWS, 5))
    outputs, _ = replicated(build, (x,), (4, 3), forward)
    for garbage in (np.inf, np.nan):
        void, _ = replicated(build, (x,), (4, 0, 3), forward, void=lambda part: part[:1] * garbage)  # noqa: B023
        np.testing.assert_allclose(np.concatenate(void), np.concatenate(outputs), rtol=1e-12)


def test_a_constant_channel_has_no_negative_variance():
    """Nor an output that is not finite, with next to no epsilon."""

    def build():
        layer = keras.layers.BatchNormalization(epsilon=1e-30, momentum=0.0)
        return keras.Sequential([keras.Input((64,)), layer])

    def step(model, x, rows):
        return model(tf.constant(x), training=True).numpy(), model.layers[-1].moving_variance.numpy()

    x = np.tile(RNG.random(64).astype("float32") * 1e5, (ROWS, 1))
    results, _ = replicated(build, (x,), (1, 4, 2), step)
    for output, variance in results:
        assert np.isfinite(output).all()
        assert (variance >= 0).all()


def mixed():
    layers = [keras.layers.BatchNormalization(synchronized=asked, dtype="float64") for asked in (False, True)]
    return keras.Sequential([keras.Input((5,), dtype="float64"), *layers])


def test_keras_own_argument_asks_for_it_layer_by_layer():
    x, _ = batch(5)
    outputs, transfers = replicated(mixed, (x,), (3, 4), forward, everywhere=False)
    assert {transfer.name for transfer in transfers[0]} == {"train.moments.0", "train.moments.0.shift"}

    def alone(rows):
        return keras.layers.BatchNormalization(dtype="float64")(rows, training=True)

    of_own_rows = np.concatenate([alone(x[:3]), alone(x[3:])])
    np.testing.assert_allclose(np.concatenate(outputs), alone(of_own_rows), rtol=1e-12, atol=1e-12)


def test_outside_of_a_step_and_afterwards_the_layer_is_keras_own(tmp_path):
    model, x = normalised((ROWS, 5))(), batch(5)[0]
    layer = model.layers[-1]
    before, config = model(x, training=True).numpy(), model.to_json()
    with batch_norm.installed(batch_norm.layers_of(model, everywhere=True), Wire(None)):
        assert (model(x, training=True).numpy() == before).all()
        model.save(tmp_path / "model.keras")
    assert "_moments" not in vars(layer)
    assert model.to_json() == config
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is keras.layers.BatchNormalization
    assert not loaded.layers[-1].synchronized
    assert all((own == saved).all() for own, saved in zip(model.get_weights(), loaded.get_weights(), strict=True))


def test_weights_that_move_alike_are_all_that_the_layer_moves():
    layer = keras.layers.BatchNormalization(renorm=True)
    layer.build((None, 3))
    assert {weight.name for weight in batch_norm.weights_of([layer])} == {
        "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"
    }  # fmt: skip


class OwnMoments(keras.layers.BatchNormalization):
    def _moments(self, inputs, mask):
        return keras.ops.moments(inputs, axes=[0])


class OwnCall(keras.layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return inputs - keras.ops.mean(inputs, axis=0)


class OwnName(keras.layers.BatchNormalization):
    pass


@pytest.mark.parametrize(("kind", "method"), [(OwnMoments, "_moments"), (OwnCall, "call")])
def test_a_layer_that_may_take_moments_in_its_own_way_is_refused(kind, method):
    model = keras.Sequential([keras.Input((2,)), kind(name="mine")])
    with pytest.raises(InputError, match=f"mine, whose class {kind.__name__} overrides {method}"):
        batch_norm.layers_of(model, everywhere=True)
    assert batch_norm.layers_of(model, everywhere=False) == []


def test_a_subclass_that_changes_neither_is_taken():
    model = keras.Sequential([keras.Input((2,)), OwnName()])
    assert batch_norm.layers_of(model, everywhere=True) == model.layers


class Inside(keras.layers.Layer):
    """A layer that calls BatchNormalization in some construct."""

    def __init__(self, construct):
        super().__init__()
        self.construct, self.normalise = construct, keras.layers.BatchNormalization(name="inner")

    def build(self, shape):
        self.normalise.build((None, shape[-1]))

    def call(self, x, training=False):
        return self.construct(lambda y: self.normalise(y, training=training), x)


CONSTRUCTS = {
    "a branch": lambda normalise, x: keras.ops.cond(keras.ops.sum(x) > 0, lambda: normalise(x), lambda: x),
    "a loop": lambda normalise, x: tf.while_loop(lambda y: tf.reduce_sum(y) > 0, lambda y: (normalise(y),), [x])[0],
    "a recurrent layer": lambda normalise, x: keras.src.backend.rnn(
        lambda y, states: (normalise(y), states), keras.ops.expand_dims(x, 1), [x]
    )[0],
    "a vectorised map": lambda normalise, x: tf.vectorized_map(normalise, tf.stack([x, x])),
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_a_call_that_some_replicas_might_not_reach_is_refused_in_one_sentence(construct):
    model = keras.Sequential([keras.Input((2,)), Inside(CONSTRUCTS[construct])])
    wire = Wire(SimpleNamespace(sum=lambda tensors, name: list(tensors)))

    def step(x):
        with wire.step("train"), batch_norm.counting(3):
            return model(x, training=True)

    traced = tf.function(step, input_signature=[tf.TensorSpec([None, 2])], autograph=False)
    together = batch_norm.installed(batch_norm.layers_of(model, everywhere=True), wire)
    with together, pytest.raises(InputError) as refused:
        traced.get_concrete_function()
    assert str(refused.value).startswith("Expected inner (BatchNormalization), for whose moments")
    assert "\n" not in str(refused.value)


def test_time_steps_of_a_known_number_each_have_their_moments():
    def build():
        layer = keras.layers.TimeDistributed(keras.layers.BatchNormalization(dtype="float64"), dtype="float64")
        return keras.Sequential([keras.Input((2, 3), dtype="float64"), layer])

    transfers = assert_one_device(build, batch(2, 3), (3, 0, 4))
    assert "train.moments.0.2" in [transfer.name for transfer in transfers[0]]


def test_each_replica_keeps_the_losses_of_its_own_call():
    """They meet in the middle of the forward pass, when both have called the first layer."""
    layers = [keras.layers.Dense(2, activity_regularizer="l2"), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((2,)), *layers, keras.layers.ActivityRegularization(l1=1.0)])
    own, backend = model.layers[0]._losses, Threads(2)
    wire = Wire(backend)

    def on_replica(x):
        with wire.step("train"), batch_norm.counting(1):
            model(x, training=True)
        return [float(loss) for loss in model.losses]

    together = batch_norm.installed(batch_norm.layers_of(model, everywhere=True), wire)
    with batch_norm.losses_apart(model), together:
        first, second = backend.run(on_replica, [(tf.constant([[1.0, 2.0]]),), (tf.constant([[3.0, 9.0]]),)])
    assert len(first) == len(second) == 2
    squares = keras.ops.sum(keras.ops.square(layers[0](tf.constant([[1.0, 2.0]])))).numpy()
    assert first[0] == pytest.approx(0.01 * squares, rel=1e-5)
    assert second[0] != first[0]
    assert model.layers[0]._losses is own
