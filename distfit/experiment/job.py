"""A configuration with its names resolved: what there is to train, on what.

job = prepare(config, description)
job = job.knowing(job.measured())       # what the model's function asks of the data
model, train = job.build(), job.records("train")
"""

from __future__ import annotations

import dataclasses
import inspect
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from distfit.config import RunConfig
from distfit.data.description import Description
from distfit.data.plan import steps_per_epoch
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError
from distfit.experiment.features import Reader
from distfit.experiment.losses import check_metrics, loss_of
from distfit.experiment.names import call, check_arguments, line_of, named, one_sentence, own_objects
from distfit.experiment.optimizers import check_excluded, optimizer_maker

# What a model's function gets from the data, beside its options.
GIVEN = {"input_shape", "classes"}
MEASURED = {"mean", "variance"}


@dataclass(frozen=True)
class Job:
    """What `fit` and `evaluate` are given.

    Args:
        config: the configuration.
        reader: from records to inputs and labels.
        function: that makes the model.
        arguments: of this function.
        loss: for `keras.Model.compile`.
        make_optimizer: a new one for each model.
    """

    config: RunConfig
    reader: Reader
    function: Callable[..., Any]
    arguments: dict[str, Any]
    loss: Any
    make_optimizer: Callable[[], keras.optimizers.Optimizer]

    def records(self, split: str) -> TFRecords:
        """A split of the data, as `distfit.fit` takes it."""
        return self.reader.records(split)

    def measured(self) -> dict[str, Any]:
        """What the model's function asks of the training data: their `mean` and `variance`, by column, if it has
        parameters of these names without a default."""
        wanted = _required(self.function) & MEASURED - self.arguments.keys()
        if not wanted:
            return {}
        mean, variance = self.reader.moments(self.config.data.train)
        values = {"mean": mean.tolist(), "variance": variance.tolist()}
        return {name: values[name] for name in wanted}

    def knowing(self, measured: dict[str, Any]) -> Job:
        """This job with more arguments of the model's function."""
        return dataclasses.replace(self, arguments=self.arguments | measured)

    def build(self) -> keras.Model:
        """A new model, compiled.

        Raises:
            InputError: its function raises, returns no model, or one that does not fit the data.
        """
        model = call("model", self.function, **self.arguments)
        if not isinstance(model, keras.Model):
            raise InputError(
                f"Expected {self.config.model} to return a keras.Model, received {type(model).__name__}. Let it return "
                "the uncompiled model."
            )
        self._check_fit(model, self.config.model, "Let the model's function use its argument")
        self._check_saves(model)
        check_excluded(self.config.optimizer, model)
        return self._compiled(model)

    def load(self, path: Path) -> keras.Model:
        """A model that a training left behind, compiled with the loss and metrics of the configuration.

        Keras' safe mode stays on: a file that holds code is refused. The classes and functions of the module
        that the configuration names are known.

        Raises:
            InputError: no such file, one that Keras does not load, or a model that does not fit the data.
        """
        if not path.is_file():
            raise InputError(
                f"Expected a trained model at {str(path)!r}, received no such file. Train one with `distfit train` and "
                "this configuration, or name one with --model."
            )
        model = _loaded(path, own_objects(self.config.model))
        self._check_fit(model, str(path), "Name a model that was trained on such data, with the same")
        return self._compiled(model)

    def _compiled(self, model: keras.Model) -> keras.Model:
        optimizer = self.make_optimizer()
        if self.config.dtype == "mixed_float16":
            # Keras would do so by itself, but not again when a process of another policy loads the file: it then skips
            # the optimizer's state, with a warning (keras 3.15, trainers/trainer.py, auto_scale_loss).
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, self.loss, metrics=list(self.config.metrics))
        return model

    def _check_fit(self, model: keras.Model, name: str, remedy: str) -> None:
        """The model called on the shapes of the data, which also builds one that is not built yet.

        Args:
            remedy: what to do; followed by what does not fit, input_shape or classes.
        """
        inputs = keras.tree.map_structure(
            lambda spec: keras.KerasTensor((None, *spec.shape), spec.dtype.name), self.reader.specs[0]
        )
        try:
            outputs = keras.src.backend.compute_output_spec(model, inputs, training=False)
        except Exception as error:
            raise InputError(
                f"Expected {name} to take inputs of the shape {self.reader.input_shape}, as the data have them, "
                f"received {type(error).__name__}{line_of(self.config.model, error)}: {one_sentence(error)} {remedy} "
                "input_shape."
            ) from error
        _check_outputs(name, outputs, self.loss, len(self.reader.data.classes), remedy)

    def _check_saves(self, model: keras.Model) -> None:
        """Before the training and not after its first epoch, when the checkpoint is written."""
        try:
            keras.saving.serialize_keras_object(model)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"Expected {self.config.model} to return a model that Keras can save, received {type(model).__name__}: "
                f"{one_sentence(error, most=150)} Give each class of your own, whose __init__ takes arguments, a "
                "get_config that returns them."
            ) from error


def prepare(config: RunConfig, data: Description) -> Job:
    """Everything that the configuration names, found and fitted together; nothing is trained or written.

    Raises:
        InputError: a split, feature, model, loss, metric or optimizer argument that is not there, or another
            number of classes than the configuration states.
    """
    _check_classes(config, data)
    records = data.split(config.data.train).records
    if config.data.validation is not None:
        data.split(config.data.validation)
    function = named("model", config.model)
    loss = loss_of(config.loss, config.loss_options)
    _check_labels_form(config, loss)
    check_metrics(config.metrics)
    batches = config.steps_per_epoch or steps_per_epoch(records, config.batch_size)
    updates = max(1, round(batches / config.optimizer.gradient_accumulation_steps))
    make_optimizer = optimizer_maker(config.optimizer, updates, config.epochs)
    reader = Reader.of(config.data, data)
    arguments = {"input_shape": reader.input_shape, "classes": len(data.classes), **config.model_options}
    expected = arguments | dict.fromkeys(_required(function) & MEASURED - arguments.keys())
    check_arguments("model", config.model, function, expected, GIVEN | MEASURED)
    return Job(config, reader, function, arguments, loss, make_optimizer)


def _required(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.default is each.empty}


def _check_classes(config: RunConfig, data: Description) -> None:
    stated, found = config.data.classes, len(data.classes)
    if stated is not None and stated != found:
        raise InputError(
            f"Expected a data set of {stated} classes, as data.classes states, received {found} in {data.folder!r} "
            f"({data.source}). Correct data.path, or set data.classes=null to train on any number."
        )


def _check_labels_form(config: RunConfig, loss: Any) -> None:
    wanted = {keras.losses.SparseCategoricalCrossentropy: False, keras.losses.CategoricalCrossentropy: True}
    if config.data.one_hot != wanted.get(type(loss), config.data.one_hot):
        raise InputError(
            f"Expected data.one_hot={str(not config.data.one_hot).lower()} for loss={config.loss}, which takes "
            f"{'numbers of classes' if config.data.one_hot else 'a vector for each label'}, received "
            f"{str(config.data.one_hot).lower()}. Set one of the two."
        )


def _check_outputs(name: str, outputs: Any, loss: Any, classes: int, remedy: str) -> None:
    """Fewer outputs than classes would be found when the first label of a missing one comes up."""
    over_classes = (keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy)
    shape = getattr(outputs, "shape", (None,))
    last = shape[-1] if shape else 1
    if isinstance(loss, over_classes) and last is not None and last < classes:
        raise InputError(
            f"Expected {name} to end in {classes} outputs, one for each class of the data, received {last}. {remedy} "
            "classes."
        )


def _loaded(path: Path, own: dict[str, Any]) -> keras.Model:
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"Expected a model in Keras' format at {str(path)!r}, received another kind of file. Name one that "
            "`distfit train` or keras.Model.save left as .keras."
        )
    try:
        return keras.models.load_model(path, custom_objects=own, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(
            f"Expected a model that Keras loads from {str(path)!r}, received {type(error).__name__}: "
            f"{one_sentence(error)} "
            "Layers of your own load when their classes lie in the module that `model:` names and have a get_config; "
            "Lambda layers hold code and do not: write them as classes."
        ) from error
