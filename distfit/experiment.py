"""From a configuration to a run: what `distfit train` does, as one function.

    history = train(load("configs/digits.yaml", ["epochs=2"]))

The run folder gets `config.yaml` (resolved) when training starts, TensorBoard logs in `logs/` and the model
in `checkpoint/` as it goes, and `history.json` when it has ended. A second run into the same folder replaces
all but the older logs, beside which its own appear, as with Keras.
"""

import contextlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from distfit import checks
from distfit.config import Image, Optimizer, RunConfig, save
from distfit.data.description import Description, check_labels, load
from distfit.data.plan import steps_per_epoch
from distfit.data.records import whole_file
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError, nearest
from distfit.fitting import fit
from distfit.session import Session, init

FEATURES = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}


@dataclass(frozen=True)
class Job:
    """A configuration with its names resolved: what `fit` is given."""

    build: Callable[[], keras.Model]
    train: TFRecords
    validation: TFRecords | None


def train(config: RunConfig) -> keras.callbacks.History:
    """Runs one training; on every rank, with the same configuration.

    Returns:
        The history of `distfit.fit`: global metrics, the same on every rank.

    Raises:
        InputError: the configuration, the data or the run folder cannot work; before training starts,
            nothing written.
    """
    session = init(config.strategy, config.devices, stall_limit_s=config.stall_limit_s)
    run_dir = Path(config.run_dir)
    with _dtype_policy(config.dtype):
        with session.running("preparing"):
            data = session.agree(lambda: load(config.data.path))
            job = session.agree(lambda: prepare(config, data))
            session.from_chief(lambda: _check_labels(config, data))
            session.from_chief(lambda: checks.writable(run_dir))
        history = fit(
            job.build,
            job.train,
            validation_data=job.validation,
            epochs=config.epochs,
            batch_size=config.batch_size,
            callbacks=_saves_config(session, config, run_dir / "config.yaml"),
            verbose=config.verbose,
            seed=config.seed,
            strategy=config.strategy,
            devices=config.devices,
            stall_limit_s=config.stall_limit_s,
            log_dir=run_dir / "logs",
            checkpoint=run_dir / "checkpoint",
        )
    if session.is_chief:
        _save_history(history, run_dir / "history.json")
    return history


def prepare(config: RunConfig, data: Description) -> Job:
    """Everything that the configuration names, found and fitted together; nothing is trained or written.

    Raises:
        InputError: a split, model, loss, metric or optimizer argument that is not there.
    """
    shape = _image_shape(config, data)
    function = _named("model", config.model)
    options = {"input_shape": shape, "classes": len(data.classes), **config.model_options}
    _check_options(config.model, function, options)
    loss = _loss(config.loss)
    _check_metrics(config.metrics)
    updates = config.epochs * steps_per_epoch(data.split(config.data.train).records, config.batch_size)
    make_optimizer = _optimizer(config.optimizer, updates)

    def build() -> keras.Model:
        model = function(**options)
        model.compile(make_optimizer(), loss, metrics=list(config.metrics))
        return model

    def records(split: str) -> TFRecords:
        return TFRecords(data.files(split), FEATURES, _transform(config.data.image, shape))

    validation = config.data.validation
    return Job(build, records(config.data.train), None if validation is None else records(validation))


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Keras' dtype policy and, for a plain one, the type of losses and metrics; both are given back."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    if not name.startswith("mixed"):
        # Losses and metrics follow floatx, not the policy.
        keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])


def _check_labels(config: RunConfig, data: Description) -> None:
    for split in filter(None, (config.data.train, config.data.validation)):
        check_labels(data, split)


def _image_shape(config: RunConfig, data: Description) -> tuple[int, int, int]:
    """(height, width, channels) of the model's input; without a size, that of the first stored image."""
    image, split = config.data.image, data.split(config.data.train)
    if image.size is not None:
        return (*image.size, image.channels)
    if not split.records:
        raise InputError(f"Expected records in the split {config.data.train!r} of {data.folder!r}, received none.")
    files = data.files(config.data.train)
    first = next(file for file, shard in zip(files, split.shards, strict=True) if shard.records)
    try:
        record = next(iter(tf.data.TFRecordDataset(first).take(1)))
        encoded = tf.io.parse_single_example(record, FEATURES)["image"]
        height, width, channels = _decode(encoded, image.channels).shape
    except tf.errors.OpError as error:
        raise InputError(
            f"Expected an encoded image and a label in the first record of {first!r}, received: "
            f"{error.message.splitlines()[0]}. Build the data set again."
        ) from error
    return height, width, channels


def _decode(encoded: Any, channels: int) -> Any:
    return tf.io.decode_image(encoded, channels=channels, expand_animations=False)


def _transform(image: Image, shape: tuple[int, int, int]) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """From a record's features to (pixels of `shape`, label)."""
    dtype = keras.config.floatx()

    def transform(example: dict[str, Any]) -> tuple[Any, Any]:
        pixels = _decode(example["image"], image.channels)
        if image.size is not None:
            pixels.set_shape([None, None, image.channels])
            pixels = tf.image.resize(pixels, image.size)
        pixels = tf.cast(tf.ensure_shape(pixels, shape), dtype)
        if image.standardise:
            return tf.cast(tf.image.per_image_standardization(pixels), dtype), example["label"]
        return pixels / 255, example["label"]

    return transform


def _named(field: str, path: str) -> Any:
    """What a `package.module:function` names.

    Raises:
        InputError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"Expected {field} to name a module that can be imported, received {path!r} ({error}). Correct "
            "the name, or start in the folder where the module lies."
        ) from error
    if not callable(getattr(module, name, None)):
        known = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise InputError(
            f"Expected {field} to name a function of {module_name}, received {name!r}; {nearest(name, known)}"
        )
    return getattr(module, name)


def _check_options(path: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(**options)
    except TypeError as error:
        own = [name for name in signature.parameters if name not in ("input_shape", "classes")]
        raise InputError(
            f"Expected {path} to take input_shape, classes and the model_options, received: {error}. It "
            f"takes {', '.join(signature.parameters)}; model_options may be {', '.join(own) or 'none'}."
        ) from error


def _loss(name: str) -> Any:
    if ":" in name:
        return _named("loss", name)
    if name == "sparse_categorical_crossentropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    try:
        return keras.losses.get(name)
    except ValueError as error:
        raise InputError(
            f"Expected loss to be a Keras loss such as sparse_categorical_crossentropy, or "
            f"package.module:function, received {name!r}; {nearest(name, _snake_names(keras.losses))}"
        ) from error


def _check_metrics(names: tuple[str, ...]) -> None:
    for name in names:
        try:
            keras.metrics.get(name)
        except ValueError as error:
            raise InputError(
                f"Expected metrics of Keras, such as accuracy, received {name!r}; "
                f"{nearest(name, ['accuracy', *_snake_names(keras.metrics)])}"
            ) from error


def _snake_names(module: Any) -> list[str]:
    """The functions of a Keras module: `mean_squared_error` and its kin."""
    return [name for name in dir(module) if name.islower() and not name.startswith("_") and "_" in name]


def _optimizer(settings: Optimizer, updates: int) -> Callable[[], keras.optimizers.Optimizer]:
    """A function that makes the optimizer, because its variables belong to one model.

    Raises:
        InputError: a setting that this optimizer does not have.
    """
    kind = type(keras.optimizers.get(settings.name))
    arguments = settings.model_dump(include={"momentum", "clipnorm", "global_clipnorm"}, exclude_none=True)
    unknown = [name for name in arguments if name not in inspect.signature(kind).parameters]
    if unknown:
        raise InputError(
            f"Expected settings that Keras' {kind.__name__} has, received optimizer.{unknown[0]}="
            f"{arguments[unknown[0]]}. Leave it out, or set optimizer.name to sgd."
        )

    def make() -> keras.optimizers.Optimizer:
        rate: Any = settings.learning_rate
        if settings.schedule == "cosine":
            rate = keras.optimizers.schedules.CosineDecay(rate, decay_steps=updates)
        return kind(learning_rate=rate, **arguments)

    return make


def _saves_config(session: Session, config: RunConfig, path: Path) -> list[keras.callbacks.Callback]:
    """Writes the configuration when training starts: not sooner, as refused input leaves nothing behind."""
    if not session.is_chief:
        return []

    def write(logs: Any) -> None:
        os.makedirs(path.parent, exist_ok=True)
        save(config, path, header=f"distfit train {path}\nThe configuration of this run, resolved.")

    return [keras.callbacks.LambdaCallback(on_train_begin=write)]


def _save_history(history: keras.callbacks.History, path: Path) -> None:
    values = {name: [float(value) for value in by_epoch] for name, by_epoch in history.history.items()}
    text = json.dumps({"history": values, "final": {name: each[-1] for name, each in values.items()}}, indent=2)
    with whole_file(path) as file:
        file.write(f"{text}\n".encode())
