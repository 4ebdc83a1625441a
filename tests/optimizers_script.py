"""The program of tests/test_optimizers.py: what happens inside, around the step, on one engine after another.

    python -m tests.optimizers_script OUT keras single mirrored:2 mirrored:3
    mpirun -np 2 python -m tests.optimizers_script OUT horovod

Each check returns named arrays, which `OUT/ENGINE-DEVICES.npz` holds for the tests to compare; what has to hold
on one engine alone is asserted here, on every rank. "keras" is keras.Model.fit itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator

import distfit
from distfit.backends.hooks import optimizers_of, seed_generators_of, variables_of
from distfit.errors import InputError, RunError
from distfit.session import init
from tests.ranks import collect_less_garbage, show_stacks_when_asked

RNG = np.random.default_rng(0)
X, Y = RNG.random((20, 4)), RNG.random((20, 1))
IMAGES = RNG.random((6, 8, 8, 3)).astype("float32")
WORDS = np.array(["a b", "b c a", "c zz a", "zz b b", "a"] * 4)
Result = dict[str, Any]


class Engine:
    """fit on one engine, and a look at its replicas."""

    def __init__(self, text: str) -> None:
        name, _, devices = text.partition(":")
        self.keras = name == "keras"
        self.options = {"strategy": name, "devices": int(devices) if devices else None}
        self.session = None if self.keras else init(**self.options)
        self.replicas = 1 if self.session is None else self.session.num_replicas

    def fit(self, model: Any, *data: Any, **arguments: Any) -> Result:
        """Trained weights, the loss of each epoch, and the keys of all that the model holds afterwards."""
        arguments = {"batch_size": 8, "epochs": 2, "verbose": 0, "shuffle": False} | arguments
        if self.keras:
            history = model.fit(*data, **arguments)
        else:
            history = distfit.fit(model, *data, **arguments, **self.options)
        loss = np.array(history.history["loss"])
        return {"weights": weights_of(model), "loss": loss, "keys": keys_of(model)}

    def copies(self, variable: Any) -> list[Any]:
        """What all replicas of the job hold in a variable of a model that is being trained."""
        if self.session is None:
            return [variable.numpy()]
        own = self.session.backend.replica_values(variable)
        return [copy for copies in self.session.transport.gather(own) for copy in copies]

    def traced(self, function: Callable[..., Any]) -> Callable[..., list[Any]]:
        """The function on all local replicas, which get the same arguments."""
        backend, count = self.session.backend, self.session.topology.replicas_per_process
        return tf.function(lambda *arguments: backend.run(function, [arguments] * count), autograph=False)

    def on_replicas(self, function: Callable[[], Any]) -> list[Any]:
        """The results of all replicas of the job."""
        own = tf.nest.map_structure(np.asarray, self.traced(function)())
        return [result for theirs in self.session.transport.gather(own) for result in theirs]


def weights_of(model: Any) -> np.ndarray:
    return np.concatenate([np.ravel(weight).astype("float64") for weight in model.get_weights()])


def keys_of(model: Any) -> np.ndarray:
    """The names of all attributes of the model's objects: a hook that is left behind shows."""
    # Without what the loops of fit and evaluate keep for their own time.
    things = [*model._flatten_layers(), *optimizers_of(model), *seed_generators_of(model), *variables_of(model)]
    return np.array(
        sorted({f"{type(thing).__name__}.{key}" for thing in things for key in vars(thing) if "iterator" not in key})
    )


def dense(*between: Any, seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(6, "tanh", name="first"), *between, keras.layers.Dense(1, name="last")]
    return keras.Sequential([keras.Input((4,)), *layers])


class Scale(keras.callbacks.Callback):
    """After every batch: the scale, the counter and the updates, alike on all replicas."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        outer = self.model.optimizer
        state = [
            outer.dynamic_scale,
            outer.step_counter,
            outer.inner_optimizer._iterations,
            self.model.layers[0].kernel,
        ]
        copies = [self._engine.copies(variable) for variable in state]
        assert all((copy == own[0]).all() for own in copies for copy in own), "replicas differ"
        self.seen.append([own[0].sum() for own in copies])


def _scaled(engine: Engine, inner: Any) -> Result:
    """An infinite value in row 9 of 20: it meets one replica of several, in the second batch of each epoch."""
    model = dense()
    model.compile(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0, dynamic_growth_steps=2), "mse")
    x = X.copy()
    x[9] = np.inf
    watcher = Scale(engine)
    result = engine.fit(model, x, Y, callbacks=[watcher], epochs=3)
    del result["loss"]  # NaN
    return result | {"scales": np.array(watcher.seen)}


def loss_scale(engine: Engine) -> Result:
    return _scaled(engine, keras.optimizers.Adam(0.01))


def loss_scale_around_accumulation_and_ema(engine: Engine) -> Result:
    return _scaled(engine, keras.optimizers.AdamW(0.01, use_ema=True, clipnorm=0.5, gradient_accumulation_steps=2))


def a_fixed_loss_scale(engine: Engine) -> Result:
    """Nobody draws: the global stream made for the replicas is gone, and Python's is where Keras leaves it."""
    model = dense()
    model.compile(keras.optimizers.SGD(0.1, loss_scale_factor=64.0, clipnorm=0.1), "mse")
    result = engine.fit(model, X, Y)
    assert global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) is None
    return result | {"python": np.array(random.random())}


@contextmanager
def policy(name: str) -> Iterator[None]:
    """Layers of this dtype policy, in Keras' usual float type."""
    keras.backend.set_floatx("float32")
    keras.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        keras.backend.set_floatx("float64")
        keras.mixed_precision.set_global_policy("float64")


def _of_policy(engine: Engine, name: str) -> Result:
    with policy(name):
        model = dense()
        model.compile(keras.optimizers.SGD(0.3), "mse", jit_compile=False)
        result = engine.fit(model, X.astype("float32"), Y.astype("float32"))
    return result | {"wrapped": np.array(type(model.optimizer).__name__)}


def mixed_float16(engine: Engine) -> Result:
    """compile wraps the optimizer by itself."""
    return _of_policy(engine, "mixed_float16")


def float16(engine: Engine) -> Result:
    return _of_policy(engine, "float16")


def bfloat16(engine: Engine) -> Result:
    """Variables and gradients of a type that Horovod does not carry."""
    return _of_policy(engine, "bfloat16")


def several_optimizers(engine: Engine) -> Result:
    """By variable, and kept by key: which optimizer, where its state is, what does not decay."""
    model = dense()
    decaying = keras.optimizers.AdamW(0.01, weight_decay=5.0, use_ema=True)
    decaying.exclude_from_weight_decay(var_list=[model.layers[1].kernel], var_names=["bias"])
    by_name = {"(.*/)?first/.*": keras.optimizers.SGD(0.1, momentum=0.9)}
    model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(decaying, by_name)), "mse")
    return engine.fit(model, X, Y) | {"decays": _decaying(decaying, model)}


def _decaying(optimizer: Any, model: Any) -> np.ndarray:
    """What Keras remembers of each variable after the run, by the keys of plain variables."""
    remembered = optimizer._exclude_from_weight_decay_cache
    return np.array([str(remembered.get(optimizer._var_key(variable))) for variable in model.trainable_variables])


SPECIAL = {
    "Adadelta": {"learning_rate": 1.0},
    "Adafactor": {"learning_rate": 0.05},
    "Ftrl": {"learning_rate": 0.1},
    "Lamb": {"learning_rate": 0.05, "weight_decay": 0.1},
    "Lion": {"learning_rate": 0.01},
    "Muon": {"learning_rate": 0.05},
    "Nadam": {"learning_rate": 0.05},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "ScheduleFreeAdamW": {"learning_rate": 0.05, "warmup_steps": 3},
}


class Several(keras.Model):
    """A layer for each optimizer, which the model keeps as Keras' GAN example keeps its two: in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [keras.layers.Dense(4) for _ in SPECIAL]
        self.by_name = {name: getattr(keras.optimizers, name)(**given) for name, given in SPECIAL.items()}
        self.late = [keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())]

    def call(self, x: Any) -> Any:
        return sum(part(x) for part in self.parts)

    def update(self, gradient: Any) -> Any:
        for part, optimizer in zip(self.parts, self.by_name.values(), strict=True):
            variables = part.trainable_variables
            optimizer.apply([gradient * (variable.value + 1) for variable in variables], variables)
        return tf.constant(0)


def optimizers_of_the_models_own(engine: Engine) -> Result:
    """They are adopted and update the replicas' variables; one that was not built says so where it is used."""
    keras.utils.set_random_seed(1)
    model = Several()
    model.compile("sgd", "mse")
    model(X[:1])
    for part, optimizer in zip(model.parts, model.by_name.values(), strict=True):
        optimizer.build(part.trainable_variables)
    late = model.late[0]
    assert optimizers_of(model)[1:] == [*model.by_name.values(), late, late.inner_optimizer]
    if engine.keras:
        update = tf.function(model.update, autograph=False)
        for gradient in GRADIENTS:
            update(tf.constant(gradient, tf.float64))
    else:
        with engine.session.backend.adopted(model):
            _update_on_replicas(engine, model)
    assert "build" not in vars(late)
    return {name: weights_of(part) for name, part in zip(SPECIAL, model.parts, strict=True)}


GRADIENTS = (0.5, -0.25, 1.0)


def _update_on_replicas(engine: Engine, model: Several) -> None:
    def update(gradient: Any) -> Any:
        with engine.session.backend.updating():
            return model.update(gradient)

    updates = engine.traced(update)
    for gradient in GRADIENTS:
        updates(tf.constant(gradient, tf.float64))
    copies = [engine.copies(variable) for optimizer in model.by_name.values() for variable in optimizer.variables]
    assert all(len(own) == engine.replicas and (copy == own[0]).all() for own in copies for copy in own)
    if engine.replicas > 1:
        with pytest.raises(InputError, match="to be built before replicas share its state, received LossScale"):
            engine.traced(lambda: model.late[0].apply([tf.ones(4)], [model.parts[0].bias]))()


class Noise(keras.layers.Layer):
    """Draws from Keras' global stream, and from one that it keeps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = [keras.random.SeedGenerator(1337)]

    def call(self, x: Any, training: bool = False) -> Any:
        if not training:
            return x
        shape = keras.ops.shape(x)
        return x + keras.random.normal(shape, dtype=x.dtype) + keras.random.uniform(shape, seed=self.generators[0])


def noise_from_the_global_stream(engine: Engine) -> Result:
    """It repeats to the bit, and leaves the streams, and Python's own, where Keras leaves them."""
    bits = []
    for _ in range(2):
        model = dense(Noise())
        model.compile("sgd", "mse")
        weights = engine.fit(model, X, Y)["weights"]
        states = [global_seed_generator().state, model.layers[1].generators[0].state]
        bits.append((weights.tobytes(), [state.numpy().tolist() for state in states], random.random()))
    assert bits[0] == bits[1]
    return {"streams": np.array(bits[0][1]), "python": np.array(bits[0][2])}


def random_layers() -> dict[str, Callable[[], Any]]:
    """Layers of images that draw in their own ways; each is called on the same images."""
    own = keras.layers
    sequence = keras.layers.Reshape((8, 24))
    return {
        "dropout": lambda: own.Dropout(0.5),
        "spatial dropout": lambda: own.SpatialDropout2D(0.5),
        "gaussian noise": lambda: own.GaussianNoise(0.5),
        "alpha dropout": lambda: own.AlphaDropout(0.5),
        "global": lambda: Noise(),
        "cell": lambda: keras.Sequential([sequence, own.RNN(own.LSTMCell(3, dropout=0.3, recurrent_dropout=0.3))]),
        "contrast": lambda: own.RandomContrast(0.9, value_range=(0, 1)),
        "rotation": lambda: own.RandomRotation(0.5),
        "crop": lambda: own.RandomCrop(5, 5),
        "erasing": lambda: own.RandomErasing(1.0, value_range=(0, 1)),
        "pipeline": lambda: own.Pipeline([own.RandomBrightness(0.9, value_range=(0, 1)), own.RandomZoom(0.5)]),
        "rand augment": lambda: own.RandAugment(value_range=(0, 1), num_ops=1, factor=0.9),
    }


def streams_of_replicas(engine: Engine) -> Result:
    """Each replica its own stream, the first one Keras' own; the saved state is the same, and Keras'."""
    with policy("float32"):  # Keras' layers for images mix it with others
        return _streams_of_replicas(engine)


def _streams_of_replicas(engine: Engine) -> Result:
    keras.utils.set_random_seed(3)
    x = keras.Input((8, 8, 3))
    layers = {name: make() for name, make in random_layers().items()}
    model = keras.Model(x, {name: layer(x) for name, layer in layers.items()})

    def draw() -> Any:
        return model(tf.constant(IMAGES), training=True)

    if engine.keras:
        drawn = [tf.nest.map_structure(np.asarray, tf.function(draw, autograph=False)())]
    else:
        with engine.session.backend.adopted(model):
            drawn = engine.on_replicas(draw)
            states = [engine.copies(generator.state) for generator in seed_generators_of(model)]
        assert all((copy == copies[0]).all() for copies in states for copy in copies)
    for name in layers:
        assert len({outputs[name].tobytes() for outputs in drawn}) == engine.replicas, f"{name}: replicas drew alike"
    states = [*seed_generators_of(model), global_seed_generator()]
    return drawn[0] | {"states": np.array([generator.state.numpy() for generator in states])}


def embeddings(engine: Engine) -> Result:
    """Words that repeat within a batch: Keras' Adam squares each occurrence's gradient, not their sum."""
    keras.utils.set_random_seed(1)
    text, numbers, x = keras.Input((), dtype="string"), keras.Input((1,), dtype="int64"), keras.Input((4,))
    vectorize, bins = keras.layers.TextVectorization(output_sequence_length=3), keras.layers.Discretization(num_bins=4)
    scale = keras.layers.Normalization()
    for layer, rows in ((vectorize, WORDS), (bins, X), (scale, X)):
        layer.adapt(rows)
    tokens = [
        vectorize(text),
        keras.layers.StringLookup(vocabulary=["a", "a b", "zz"])(text[:, None]),
        keras.layers.IntegerLookup(vocabulary=[1, 2, 3])(numbers),
        keras.layers.Hashing(5)(numbers),
        bins(x),
    ]
    embedded = [keras.layers.Flatten()(keras.layers.Embedding(9, 3)(ids)) for ids in tokens]
    model = keras.Model([text, numbers, x], keras.layers.Dense(1)(keras.layers.Concatenate()([*embedded, scale(x)])))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rows = (WORDS, np.arange(20)[:, None] % 5, X)
    return engine.fit(model, tf.data.Dataset.from_tensor_slices((rows, Y)).batch(8), batch_size=None)


@keras.saving.register_keras_serializable("tests")
class Keeps(keras.Model):
    """Variables of every kind, in attributes, a list and a dict; one gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.out = keras.layers.Dense(1)
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")
        self.calls = keras.Variable(0, dtype="int32", trainable=False, name="calls")
        self.kept = {"flag": keras.Variable(False, dtype="bool", trainable=False, name="flag")}
        self.scales = [keras.Variable(np.ones(4), name="scale")]
        self.frozen = keras.layers.Dense(4, trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1)
            self.kept["flag"].assign(True)
        return self.out(self.frozen(x * self.scales[0]))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def variables_of_every_kind(engine: Engine) -> Result:
    """A second training after `trainable` was toggled, too."""
    keras.utils.set_random_seed(1)
    model = Keeps()
    model.compile("adam", "mse")
    first = engine.fit(model, X, Y, epochs=1)
    assert bool(model.kept["flag"].numpy())
    model.frozen.trainable, model.out.trainable = True, False
    model.compile("adam", "mse")
    return engine.fit(model, X, Y, epochs=1) | {"first": first["weights"], "calls": model.calls.numpy()}


class Meddling(keras.callbacks.Callback):
    """Does something after the first batch of the second epoch: in the middle of an update of two batches."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        super().__init__()
        self._act, self._epoch = act, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self._epoch, batch) == (1, 0):
            self._act(self.model)


def _accumulating() -> keras.Model:
    model = dense()
    model.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), "mse")
    return model


def _raise(model: Any) -> None:
    raise KeyError("in the middle")


def an_update_that_an_exception_interrupts(engine: Engine) -> Result:
    """What had been accumulated is whole for the training that follows. Ranks would end."""
    if engine.replicas > 1 and engine.session.size > 1:
        return {}
    model = _accumulating()
    with pytest.raises(KeyError, match="in the middle"):
        engine.fit(model, X, Y, callbacks=[Meddling(_raise)])
    return engine.fit(model, X, Y)


def iterations_that_a_callback_sets(engine: Engine) -> Result:
    """Between two batches of an update: replicas would have updated with their own parts. One device does not mind."""
    model = _accumulating()
    meddling = Meddling(lambda model: model.optimizer._iterations.assign_add(1))
    if engine.replicas == 1:
        engine.fit(model, X, Y, callbacks=[meddling])
    else:
        with pytest.raises(RunError, match="to have seen 6 batches at the end of this epoch, received 7"):
            engine.fit(model, X, Y, callbacks=[meddling])
    return {}


def a_function_as_metric(engine: Engine) -> Result:
    """One number for a batch, as in Keras' documentation: it counts by rows."""
    model = dense()
    model.compile("sgd", "mse", metrics=[lambda y, predicted: keras.ops.mean(keras.ops.abs(y - predicted))])
    history = keras.callbacks.History()
    result = engine.fit(model, X, Y, callbacks=[history])
    (name,) = set(history.history) - {"loss"}
    return result | {"metric": np.array(history.history[name])}


def data_of_each_process(engine: Engine) -> Result:
    """The last process has none, from which its logarithm is not finite; calls hold more steps than there are."""
    if engine.keras:
        return {}

    def own_part(context: distfit.InputContext) -> tf.data.Dataset:
        rows = 0 if context.rank == context.size - 1 and context.size > 1 else 20
        return tf.data.Dataset.from_tensor_slices((X[:rows] + 1, Y[:rows])).batch(8)

    def trained(**options: Any) -> tuple[np.ndarray, int]:
        keras.utils.set_random_seed(1)
        x = keras.Input((4,))
        h = keras.layers.BatchNormalization()(keras.layers.Dense(3)(keras.ops.log(x)))
        model = keras.Model(x, keras.layers.Dense(1)(h))
        model.compile("sgd", "mse", **options)
        return engine.fit(model, distfit.local(own_part), batch_size=None)["weights"], int(model.optimizer.iterations)

    (one, updates), (several, as_many) = trained(), trained(steps_per_execution=2)
    assert np.isfinite(one).all()
    assert updates == as_many == 6
    np.testing.assert_allclose(several, one, rtol=1e-9, atol=1e-9)
    return {}


CHECKS: dict[str, Callable[[Engine], Result]] = {
    check.__name__: check
    for check in (
        loss_scale,
        loss_scale_around_accumulation_and_ema,
        a_fixed_loss_scale,
        mixed_float16,
        float16,
        bfloat16,
        several_optimizers,
        optimizers_of_the_models_own,
        noise_from_the_global_stream,
        streams_of_replicas,
        embeddings,
        variables_of_every_kind,
        an_update_that_an_exception_interrupts,
        iterations_that_a_callback_sets,
        a_function_as_metric,
        data_of_each_process,
    )
}


def main(out: str, *engines: str) -> None:
    show_stacks_when_asked()
    collect_less_garbage()
    keras.backend.set_floatx("float64")
    if "mirrored:3" in engines:
        init("mirrored", 3)  # the most devices first: logical ones can only be made before TensorFlow starts
    for text in engines:
        engine = Engine(text)
        results = {f"{name}//{key}": value for name, check in CHECKS.items() for key, value in check(engine).items()}
        if engine.session is None or engine.session.is_chief:
            np.savez(Path(out) / f"{text.replace(':', '-')}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
