"""What can run a case: Keras' own `fit`, Keras with the rows of each batch permuted, Keras under
MirroredStrategy, and distfit on each of its engines.

    engine = engine_of("mirrored:3/float32", folder)
    result = engine.fit(model, X, LABEL)

An engine's name is ENGINE[:DEVICES][/PRECISION]; float64 unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit.session import init
from tests.cases.table import FLOAT64, Result
from tests.compare import SAVED, flat

EPOCHS = 3
BATCH = 32
# Arguments of distfit.fit that keras.Model.fit does not have.
OWN_ARGUMENTS = ("seed", "sync_batch_norm")


class Engine:
    """fit, evaluate and predict on one of distfit's engines, or by Keras; in one precision.

    Args:
        name: "single", "mirrored" or "horovod"; subclasses have names of their own.
        devices: of this process; None for its default.
        folder: where record files lie in `digits/`, and models are left in `models/`.
        precision: Keras' float type.
    """

    keras = False

    def __init__(self, name: str, devices: int | None, folder: Path, precision: str = FLOAT64) -> None:
        self.name = name
        self.options = {"strategy": name, "devices": devices}
        self.folder = folder
        self.precision = precision
        self.file = stem(name, devices, precision)
        self.save_as: str | None = None

    def scope(self) -> Any:
        """Held around a case: the scope in which its models are made."""
        return nullcontext()

    def fit(self, model: Any, *data: Any, **arguments: Any) -> Result:
        """Train and return the weights, the number of updates and the history of every epoch."""
        arguments = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "shuffle": False} | cast(arguments)
        history = self._fit(model, *cast(data), **arguments)
        trained = history.model
        logs = {f"history/{name}": np.array(values) for name, values in history.history.items()}
        saved = self._saved(trained) if self.save_as else {}
        return {
            "weights": flat(trained.weights),
            "updates": trained.optimizer.iterations.numpy(),
            **logs,
            **saved,
        }

    def evaluate(self, model: Any, *data: Any, **arguments: Any) -> Any:
        return distfit.evaluate(model, *cast(data), batch_size=BATCH, verbose=0, **cast(arguments), **self.options)

    def predict(self, model: Any, data: Any) -> Any:
        return distfit.predict(model, cast(data), batch_size=BATCH, verbose=0, **self.options)

    def session(self) -> distfit.Session:
        return init(**self.options)

    @property
    def is_chief(self) -> bool:
        return self.session().is_chief

    def _fit(self, model: Any, *data: Any, **arguments: Any) -> keras.callbacks.History:
        arguments["callbacks"] = [*arguments.pop("callbacks", []), ReplicasAgree(self)]
        history = distfit.fit(model, *data, **arguments, **self.options)
        variables = history.model.variables
        assert not any(isinstance(variable._value, tf.distribute.DistributedValues) for variable in variables)
        return history

    def _saved(self, model: Any) -> Result:
        """Leave the model as a file, and say what has to come out of it again."""
        path = self.folder / "models" / self.file / f"{self.save_as}.keras"
        if self.is_chief:
            path.parent.mkdir(parents=True, exist_ok=True)
            model.save(path)
        return {SAVED: flat([*model.weights, *model.optimizer.variables])}


class Keras(Engine):
    """keras.Model.fit itself: what every engine is compared to."""

    keras = True
    is_chief = True

    def _fit(self, model: Any, *data: Any, **arguments: Any) -> keras.callbacks.History:
        return model.fit(*data, **{name: value for name, value in arguments.items() if name not in OWN_ARGUMENTS})

    def evaluate(self, model: Any, *data: Any, **arguments: Any) -> Any:
        return model.evaluate(*cast(data), batch_size=BATCH, verbose=0, **cast(arguments))

    def predict(self, model: Any, data: Any) -> Any:
        return model.predict(cast(data), batch_size=BATCH, verbose=0)


class Permuted(Keras):
    """The control: Keras on one device with the rows of each training batch in another order.

    What this changes, no arithmetic can keep. Evaluations and predictions see the rows as they are.
    """

    def _fit(self, model: Any, *data: Any, **arguments: Any) -> keras.callbacks.History:
        train_step = model.train_step
        model.train_step = lambda batch: train_step(permuted(batch))
        try:
            return super()._fit(model, *data, **arguments)
        finally:
            del model.train_step


class PlainMirrored(Keras):
    """What a user without distfit does: the model is made in the scope of a MirroredStrategy of logical CPUs, then
    Keras' fit. TensorFlow must not have started."""

    def __init__(self, name: str, devices: int | None, folder: Path, precision: str = FLOAT64) -> None:
        super().__init__(name, devices, folder, precision)
        devices = devices or 2
        (cpu,) = tf.config.list_physical_devices("CPU")
        if tf.config.get_logical_device_configuration(cpu) is None:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
        names = [f"CPU:{number}" for number in range(devices)]
        # One failed step of TensorFlow's default on CPUs fails every step after it, also those of other models.
        self._strategy = tf.distribute.MirroredStrategy(names, tf.distribute.ReductionToOneDevice())

    def scope(self) -> Any:
        return self._strategy.scope()

    def _fit(self, model: Any, *data: Any, sync_batch_norm: bool = False, **arguments: Any) -> Any:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = sync_batch_norm
        return super()._fit(model, *data, **arguments)


class ReplicasAgree(keras.callbacks.Callback):
    """At the end of a training every replica of every rank holds the same weights and optimizer state."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_end(self, logs: Any = None) -> None:
        session = self._engine.session()
        variables = [*self.model.weights, *self.model.optimizer.variables]
        copies = [session.backend.replica_values(variable) for variable in variables]
        for variable, own in zip(variables, copies, strict=True):
            assert len(own) == session.topology.replicas_per_process
            assert all(copy.tobytes() == own[0].tobytes() for copy in own), f"{variable.path} differs between replicas"
        fingerprints = session.transport.gather(b"".join(own[0].tobytes() for own in copies))
        assert len(set(fingerprints)) == 1, "weights differ between ranks"


def engine_of(label: str, folder: Path) -> Engine:
    """The engine of a name, see the module."""
    name, devices, precision = parsed(label)
    kinds = {"keras": Keras, "permuted": Permuted, "plain": PlainMirrored}
    return kinds.get(name, Engine)(name, devices, folder, precision)


def parsed(label: str) -> tuple[str, int | None, str]:
    """An engine's name, devices and precision.

    >>> parsed("mirrored:3/float32"), parsed("single")
    (('mirrored', 3, 'float32'), ('single', None, 'float64'))
    """
    engine, _, precision = label.partition("/")
    name, _, devices = engine.partition(":")
    return name, int(devices) if devices else None, precision or FLOAT64


def file_of(label: str) -> str:
    """The stem of the files of an engine.

    >>> file_of("mirrored:3"), file_of("keras/float32")
    ('mirrored-3-float64', 'keras-float32')
    """
    return stem(*parsed(label))


def stem(*parts: Any) -> str:
    return "-".join(str(part) for part in parts if part is not None)


@contextmanager
def precision(floatx: str, policy: str | None = None) -> Iterator[None]:
    """Inside, Keras computes in this type.

    Args:
        policy: of layers, where it is not simply the type ("mixed_float16").
    """
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy or floatx)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def cast(structure: Any) -> Any:
    """The float arrays in it as Keras' float type, everything else as it is."""

    def own(leaf: Any) -> Any:
        floats = isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating)
        return leaf.astype(keras.config.floatx()) if floats else leaf

    return keras.tree.map_structure(own, structure)


def dataset(*arrays: Any) -> tf.data.Dataset:
    """Rows of arrays in Keras' float type."""
    return tf.data.Dataset.from_tensor_slices(cast(arrays if len(arrays) > 1 else arrays[0]))


def permuted(batch: Any) -> Any:
    """The rows of a batch in another order, the same for every tensor of it and for every batch of its size."""
    leaves = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
    # In an order that XLA can compile as well: multiples of a number modulo a prime, sorted.
    order = tf.argsort(tf.range(1, tf.shape(leaves[0])[0] + 1) * 7919 % 65521)
    return tf.nest.map_structure(lambda leaf: leaf if leaf is None else _gathered(leaf, order), batch)


def _gathered(leaf: Any, order: Any) -> Any:
    if isinstance(leaf, tf.SparseTensor):
        return tf.sparse.from_dense(tf.gather(tf.sparse.to_dense(leaf), order))
    return tf.gather(leaf, order)
