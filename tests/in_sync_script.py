"""The runs of tests/test_in_sync.py: trainings in which something goes wrong on one replica, and others in which
nothing does, one after the other on one engine.

    python -m tests.in_sync_script OUT mirrored:3
    mpirun -np 3 python -m tests.in_sync_script OUT horovod

Each rank writes what it saw to `OUT/ENGINE-RANK.json`, by case: the error, what was warned of, how often replicas were
compared, and what was proven.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import distfit
from distfit import log
from distfit.backends.hooks import replaced
from distfit.callbacks.saver import MODEL_FILE
from distfit.errors import DistfitError
from distfit.session import Session, init
from distfit.training import in_sync, reduction
from distfit.training.in_sync import InSync
from distfit.training.wire import EVIDENCE
from tests.ranks import collect_less_garbage, show_stacks_when_asked

# Five steps an epoch; in the last one only the first replica has a row.
BATCH, ROWS, STEPS, EPOCHS, CLASSES, WORDS = 12, 49, 5, 2, 3, 10
# On this replica things go wrong, in this epoch and at this batch (from 0).
FAULTY, FAULTY_EPOCH, FAULTY_BATCH = 1, 1, 1
EVERY = 4
RNG = np.random.default_rng(0)
X, Y = RNG.random((ROWS, 4), np.float32), RNG.integers(0, CLASSES, ROWS)
SEQUENCES = RNG.integers(0, WORDS, (ROWS, 4))
Found = dict[str, Any]


class Engine:
    """fit on one engine, with a look at how its replicas compare themselves."""

    def __init__(self, text: str, folder: Path) -> None:
        name, _, devices = text.partition(":")
        self.options: dict[str, Any] = {"strategy": name, "devices": int(devices) if devices else None}
        self.session: Session = init(**self.options)
        # Of one engine: a training goes on from the checkpoint that it finds.
        self.folder = folder / text.replace(":", "-")

    @property
    def ranks(self) -> bool:
        return self.session.size > 1

    def fit(self, model: Any, x: Any = X, y: Any = Y, **arguments: Any) -> None:
        common = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "shuffle": False, "in_sync_steps": EVERY}
        distfit.fit(model, x, y, **(common | arguments | self.options))

    def on(self, replica: int) -> bool:
        """Whether this process has a replica."""
        return not self.ranks or self.session.rank == replica

    def change(self, variable: Any, replica: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """What one replica holds in a variable, and no other."""
        if self.on(replica):
            copy = variable._value if self.ranks else variable._value.values[replica]
            copy.assign(change(copy.numpy()))


class On(keras.callbacks.Callback):
    """Does something once, at `FAULTY_BATCH` of `FAULTY_EPOCH`."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        super().__init__()
        self._act, self._epoch = act, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self._epoch, batch) == (FAULTY_EPOCH, FAULTY_BATCH):
            self._act(self.model)


def mlp(optimizer: Any = "adam", *between: Any, **compiling: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    parts = [layers.Dense(8, "tanh", name="first"), *between, layers.Dense(CLASSES, name="last", dtype="float32")]
    return compiled(keras.Sequential([keras.Input((4,)), *parts], name="net"), optimizer, **compiling)


def compiled(model: Any, optimizer: Any = "adam", **compiling: Any) -> Any:
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compiling)
    return model


def flipped(values: np.ndarray) -> np.ndarray:
    """One bit of the second element, the lowest."""
    flat = np.array(values).reshape(-1)
    flat.view(f"u{flat.itemsize}")[1] ^= 1
    return flat.reshape(values.shape)


# --- what goes wrong, on every engine


def nothing_is_summed(engine: Engine) -> None:
    """The engine gives each replica back what it sent of its gradients."""
    own = engine.session.backend.sum

    def local(tensors: Any, name: str) -> Any:
        return list(tensors) if "bucket" in name else own(tensors, name)

    with replaced(engine.session.backend, "sum", local):
        engine.fit(mlp())


def reduction_taken_away(engine: Engine) -> None:
    """Another library's patch: gradients never reach the wire, so that there is no evidence either."""
    with pytest.MonkeyPatch.context() as patch:
        summed = reduction.summed
        for name, module in list(sys.modules.items()):
            if name.startswith("distfit.") and vars(module).get("summed") is summed:
                patch.setattr(module, "summed", lambda wire, gradients, *rest, **options: list(gradients))
        engine.fit(mlp())


def a_bit_of_a_weight(engine: Engine) -> None:
    act = On(lambda model: engine.change(model.get_layer("last").kernel, FAULTY, flipped))
    engine.fit(mlp("adam", layers.Dropout(0.2)), callbacks=[act])


def a_callback_sets_the_learning_rate(engine: Engine) -> None:
    def lower(model: Any) -> None:
        engine.change(model.optimizer.learning_rate, FAULTY, lambda _: np.float32(0.25))

    engine.fit(mlp(keras.optimizers.SGD(0.5)), callbacks=[On(lower)])


def found_before_the_model_is_saved(engine: Engine) -> Found:
    """The file of the epoch before stays, byte by byte."""
    folder = engine.folder / "kept"
    options = distfit.Checkpoint(folder, model="epoch")
    before: list[bytes] = []

    def flip(model: Any) -> None:
        if engine.session.is_chief:
            before.append((folder / MODEL_FILE).read_bytes())
        engine.change(model.get_layer("last").kernel, FAULTY, flipped)

    found = caught(lambda: engine.fit(mlp(), callbacks=[On(flip)], checkpoint=options, in_sync_steps=1000))
    if engine.session.is_chief:
        found["kept"] = [len(one) > 0 and one == (folder / MODEL_FILE).read_bytes() for one in before]
        found["left"] = sorted(path.name for path in folder.iterdir())
    return found


def the_last_callback_of_all(engine: Engine) -> None:
    """After the last epoch's end, as by restoring the best weights on one rank alone."""

    class AtEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == EPOCHS - 1:
                engine.change(self.model.get_layer("first").bias, FAULTY, flipped)

    engine.fit(mlp(), callbacks=[AtEnd()])


def the_same_rows_everywhere(engine: Engine) -> None:
    """A warning, and no error: all replicas compute the same gradient."""
    if engine.ranks:
        own = tf.data.Dataset.from_tensor_slices((X[:48], Y[:48])).batch(BATCH)
        engine.fit(mlp(), distfit.local(own), None, batch_size=None, epochs=1)
    else:
        engine.fit(mlp(), np.ones_like(X), np.zeros_like(Y), epochs=1)


def no_gradient_ever(engine: Engine) -> None:
    """Nothing can be shown by gradients that are zero: a warning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_sync, "_MOST_TRIES", 3)
        model = mlp()
        model.compile("sgd", lambda y, y_pred: 0.0 * keras.ops.sum(y_pred, axis=-1))
        engine.fit(model)


FAULTS = [
    nothing_is_summed,
    reduction_taken_away,
    a_bit_of_a_weight,
    a_callback_sets_the_learning_rate,
    found_before_the_model_is_saved,
    the_last_callback_of_all,
    the_same_rows_everywhere,
    no_gradient_ever,
]

# --- what ranks begin differently


def another_learning_rate(engine: Engine) -> None:
    engine.fit(mlp(keras.optimizers.SGD(0.5 if engine.on(FAULTY) else 0.25)))


def another_seed(engine: Engine) -> None:
    model = mlp()
    keras.utils.set_random_seed(40 + engine.session.rank // 2)
    try:
        engine.fit(model)
    finally:
        keras.utils.set_random_seed(1)


def another_order_of_layers(engine: Engine) -> None:
    between = [layers.Dropout(0.2), layers.Activation("relu")]
    engine.fit(mlp("adam", *(between[::-1] if engine.on(FAULTY) else between)))


def another_activation(engine: Engine) -> None:
    engine.fit(mlp("adam", layers.Dense(8, "relu" if engine.on(FAULTY) else "elu", name="between")))


def another_size(engine: Engine) -> None:
    engine.fit(mlp("adam", layers.Dense(64 if engine.on(FAULTY) else 32)))


def another_dtype(engine: Engine) -> None:
    engine.fit(mlp("adam", layers.Dense(8, dtype="float64" if engine.on(FAULTY) else "float32", name="between")))


def another_connection(engine: Engine) -> None:
    """The same layers in the same order, and the same variables."""
    x = keras.Input((4,))
    hidden = layers.Dense(8, "tanh")(x)
    more = layers.Dense(8, "tanh")(hidden)
    total = layers.Add()([more, more if engine.on(FAULTY) else hidden])
    engine.fit(compiled(keras.Model(x, layers.Dense(CLASSES)(total))))


def another_loss(engine: Engine) -> None:
    model = mlp()
    ignored = 2 if engine.on(FAULTY) else None
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored))
    engine.fit(model)


def another_type_of_data(engine: Engine) -> None:
    engine.fit(mlp(), X, Y.astype("int32" if engine.on(FAULTY) else "int64"))


def another_number_of_records(engine: Engine) -> None:
    rows = ROWS - 1 if engine.on(FAULTY) else ROWS - 2
    engine.fit(mlp(), X[:rows], Y[:rows])


DIFFERENCES = [
    another_learning_rate,
    another_seed,
    another_order_of_layers,
    another_activation,
    another_size,
    another_dtype,
    another_connection,
    another_loss,
    another_type_of_data,
    another_number_of_records,
]

# --- what must not be taken for a fault


def random_layers_moving_statistics_and_evaluations(engine: Engine) -> None:
    """One of the evaluations is a callback's, in the middle of an epoch."""

    def look(model: Any) -> None:
        distfit.evaluate(model, X, Y, batch_size=BATCH, verbose=0, **engine.options)

    model = mlp("adam", layers.Dropout(0.5), layers.BatchNormalization(), layers.GaussianNoise(0.1))
    engine.fit(model, callbacks=[On(look)], validation_data=(X, Y))


def synchronised_moments(engine: Engine) -> None:
    engine.fit(mlp("adam", layers.BatchNormalization()), sync_batch_norm=True)


def accumulation_over_epochs_and_averages_of_weights(engine: Engine) -> None:
    """Five steps an epoch, of which every third ends an update; the model is saved in the middle of one."""
    optimizer = keras.optimizers.AdamW(0.1, gradient_accumulation_steps=3, use_ema=True, ema_overwrite_frequency=2)
    engine.fit(mlp(optimizer), checkpoint=engine.folder / "accumulated")


def a_loss_scale_that_skips(engine: Engine) -> None:
    """The first scales are too large for float16, so that updates are skipped."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**20)
        engine.fit(mlp(optimizer), epochs=3)
    finally:
        keras.config.set_dtype_policy(policy)


def words_and_several_optimizers(engine: Engine) -> None:
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01), {"table": keras.optimizers.SGD(0.1)})
    parts = [layers.Embedding(WORDS, 4, name="table"), layers.LSTM(4, dropout=0.2), layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *parts])
    engine.fit(compiled(model, keras.optimizers.MultiOptimizer(optimizers)), SEQUENCES)


class Gan(keras.Model):
    """Two optimizers in a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), layers.Dense(4)])
        self.critic = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, "elu"), layers.Dropout(0.2), layers.Dense(1)]
        )
        self.seed_generator = keras.random.SeedGenerator(3)
        self.tracker = keras.metrics.Mean("loss")
        self.build((None, 4))

    def build(self, shape: Any) -> None:
        self.built = True

    def compile(self) -> None:
        super().compile()
        self.optimizers = [keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1)]
        for optimizer, model in zip(self.optimizers, [self.generator, self.critic], strict=True):
            optimizer.build(model.trainable_variables)

    def call(self, x: Any) -> Any:
        return self.critic(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        x = data[0] if isinstance(data, tuple) else data
        noise = keras.random.normal((tf.shape(x)[0], 2), seed=self.seed_generator)
        losses = []
        for optimizer, model, sign in zip(self.optimizers, [self.generator, self.critic], (1.0, -1.0), strict=True):
            with tf.GradientTape() as tape:
                made = self.critic(self.generator(noise), training=True)
                loss = sign * keras.ops.mean(made) - (sign < 0) * keras.ops.mean(self.critic(x, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            losses.append(loss)
        self.tracker.update_state(losses[0] + losses[1])
        return {"loss": self.tracker.result()}


def own_step_with_two_optimizers(engine: Engine) -> None:
    keras.utils.set_random_seed(1)
    model = Gan()
    model.compile()
    engine.fit(model, X, None)


def eagerly(engine: Engine) -> None:
    engine.fit(mlp("adam", layers.Dropout(0.2), run_eagerly=True), epochs=1)


def another_model_made_before_on_one_rank(engine: Engine) -> None:
    """Its automatic names differ there, and so do the values of its weights: all get the chief's."""
    if engine.on(FAULTY):
        compiled(keras.Sequential([keras.Input((4,)), layers.Dense(2), layers.BatchNormalization()]))
    parts = [layers.Dense(8), layers.BatchNormalization(), layers.Lambda(lambda h: h * 2.0), layers.Dense(CLASSES)]
    model = compiled(keras.Sequential([keras.Input((4,)), *parts]), steps_per_execution=2)
    model.layers[0].bias.assign(np.full(8, engine.session.rank, np.float32))
    engine.fit(model)


def nothing_is_trained(engine: Engine) -> None:
    model = mlp()
    model.trainable = False
    engine.fit(compiled(model), epochs=1)


FINE = [
    random_layers_moving_statistics_and_evaluations,
    synchronised_moments,
    accumulation_over_epochs_and_averages_of_weights,
    a_loss_scale_that_skips,
    words_and_several_optimizers,
    own_step_with_two_optimizers,
    eagerly,
    another_model_made_before_on_one_rank,
    nothing_is_trained,
]

# --- counts


class Counted:
    """A transport that counts its calls."""

    def __init__(self, transport: Any) -> None:
        self._transport, self.calls = transport, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._transport, name)


class Unread:
    """Flags that nobody may bring to the host."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("a step's flags were read")


@contextmanager
def adopted(engine: Engine, model: Any) -> Iterator[InSync]:
    """What compares a model in the engine's hands, with which nothing is trained."""
    engine.session.backend.build(model, (tf.TensorSpec([None, 4]), tf.TensorSpec([None], tf.int64)))
    with engine.session.backend.adopted(model):
        yield InSync(model, engine.session, every_steps=EVERY)


def exchanges(engine: Engine) -> Found:
    """How many calls between ranks, and graphs that ran, each part of a run needs."""
    session, local = engine.session, engine.session.topology.replicas_per_process
    rows = [np.zeros(3 + EVIDENCE) + session.topology.first_replica + number for number in range(local)]
    counted, unread = Counted(session.transport), [Unread()] * local
    found: dict[str, list[int]] = {}
    runs: list[Any] = []
    with replaced(session, "transport", counted), adopted(engine, mlp()) as checked:
        take = checked._fingerprints

        def counting(**options: Any) -> Any:
            runs.append(options)
            return take(**options)

        checked._fingerprints = counting  # type: ignore[method-assign]
        for name, part in {
            "start": checked.at_start,
            "first update": lambda: checked.after(1, rows),
            "two steps": lambda: [checked.after(1, unread) for _ in range(2)],
            "the fourth": lambda: checked.after(1, unread),
            "saved at once": checked.before_saving,
            "a call of two": lambda: checked.after(2, unread),
            "saved": checked.before_saving,
            "a call over the eighth": lambda: checked.after(3, unread),
            "end": checked.at_end,
        }.items():
            before = counted.calls, len(runs)
            part()
            found[name] = [counted.calls - before[0], len(runs) - before[1]]
    return {"counts": found, "proven": checked.proven}


def one_variable_of_each_kind(engine: Engine) -> Found:
    """A change of each on one replica alone; and of a weight that is no number, in its sign only."""
    frozen, norm, drop = layers.Dense(8, trainable=False), layers.BatchNormalization(), layers.Dropout(0.2)
    model = mlp(keras.optimizers.Adam(0.5), frozen, norm, drop)
    found: Found = {}
    undo: list[tuple[Any, np.ndarray]] = []
    with adopted(engine, model) as checked:
        bias = model.get_layer("first").bias
        places = {
            "a bias": [bias],
            "a frozen weight": [frozen.kernel, frozen.bias],
            "moving statistics": [norm.moving_mean, norm.moving_variance],
            "slots": model.optimizer._velocities[:2],
            "a random stream": [drop.seed_generator.state],
            "iterations": [model.optimizer.iterations],
            "a learning rate": [model.optimizer.learning_rate],
        }
        for name, variables in places.items():
            for variable in variables:
                (before, *_) = engine.session.backend.replica_values(variable)
                engine.change(variable, FAULTY, raised)
                undo.append((variable, before))
            found[name] = caught(checked.at_start)
            while undo:
                variable, before = undo.pop()
                engine.change(variable, FAULTY, lambda _, before=before: before)
        for replica in range(engine.session.num_replicas):
            negated = np.negative if replica == FAULTY else np.positive
            engine.change(bias, replica, lambda values, negated=negated: negated(np.full_like(values, np.nan)))
        found["no number"] = caught(checked.at_start)
    return {"kinds": found}


def raised(values: np.ndarray) -> np.ndarray:
    return values + values.dtype.type(1)


# --- the frame


def caught(run: Callable[[], Any]) -> Found:
    """What it returned, or the error that all ranks were told."""
    try:
        return run() or {"error": None}
    except DistfitError as error:
        return {"error": type(error).__name__, "message": str(error), "agreed": error.agreed}


@contextmanager
def warned() -> Iterator[list[str]]:
    """What is said on any rank; on all but the chief nobody sees it."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("distfit")
    log._said.clear()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def observed(engine: Engine, case: Callable[[Engine], Any]) -> Found:
    made: list[InSync] = []
    comparisons = []
    make, compare = InSync.__init__, InSync._compare
    with pytest.MonkeyPatch.context() as patch, warned() as said:

        def making(self: InSync, *arguments: Any, **options: Any) -> None:
            made.append(self)
            make(self, *arguments, **options)

        def counting(self: InSync, *arguments: Any, **options: Any) -> None:
            comparisons.append(1)
            compare(self, *arguments, **options)

        patch.setattr(InSync, "__init__", making)
        patch.setattr(InSync, "_compare", counting)
        found = caught(lambda: case(engine))
    proven = made[0].proven if made else ""
    return {"warnings": said, "comparisons": len(comparisons), "proven": proven} | found


def main(folder: Path, text: str) -> None:
    engine = Engine(text, folder)
    only = os.environ.get("CASES", "").split(",")
    cases = [exchanges, one_variable_of_each_kind, *FAULTS, *(DIFFERENCES if engine.ranks else []), *FINE]
    found = {case.__name__: observed(engine, case) for case in cases if only == [""] or case.__name__ in only}
    (folder / f"{text.replace(':', '-')}-{engine.session.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    show_stacks_when_asked()
    collect_less_garbage()
    main(Path(sys.argv[1]), sys.argv[2])
