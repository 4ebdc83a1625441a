"""The run configuration: what `distfit train CONFIG.yaml key=value ...` reads, typed and frozen.

    config = load("configs/digits.yaml", ["epochs=2", "optimizer.learning_rate=0.01"])
    config.batch_size, config.optimizer.name
    save(config, "runs/digits/config.yaml")
    schema()                                        # for editors: its JSON Schema

Every field says in one sentence what it means; an error about it repeats that sentence. An unknown key, a
key given twice and a value of another type are refused, nothing is guessed. No TensorFlow.
"""

import difflib
import operator
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from distfit.errors import InputError

Positive = Annotated[int, Field(ge=1)]
# YAML has lists where a frozen configuration has tuples; what is in them stays strict.
Size = Annotated[tuple[Positive, Positive], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
# True and 1.0 equal 1, and would pass for it among the choices of a Literal.
NoStandIn = pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, (bool, float)) else value)
IMPORT_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class _Section(BaseModel):
    """Strict, so that `epochs: "3"` and `epochs: true` are errors and not guesses."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Image(_Section):
    """How a stored image becomes the model's input."""

    size: Size | None = Field(
        default=None, description="[height, width] to resize images to; null keeps them as stored"
    )
    fit: Literal["stretch", "pad", "crop"] = Field(
        default="stretch",
        description="how images of other proportions get the size: stretched, with black borders, or cut to the middle",
    )
    channels: Annotated[Literal[1, 3], NoStandIn] = Field(default=1, description="1 for gray images, 3 for colour")
    standardise: bool = Field(
        default=False,
        description="whether each image is shifted and scaled to mean 0 and variance 1 instead of to 0..1",
    )


class Data(_Section):
    """Which records are trained on."""

    path: str = Field(description="the folder with TFRecord shards and dataset.json; relative to the current folder")
    train: str = Field(default="train", description="the split of the data set to train on")
    validation: str | None = Field(
        default="validation", description="the split to validate on after every epoch; null for none"
    )
    classes: Positive | None = Field(
        default=None, description="how many classes the data set has to have, or it is refused; null takes any number"
    )
    inputs: str = Field(
        default="image",
        min_length=1,
        description="the stored feature that the model gets: encoded images are decoded, numbers are taken as they are",
    )
    image: Image = Field(default=Image(), description="how a stored image becomes the model's input")
    one_hot: bool = Field(
        default=False,
        description="whether labels become vectors of 0 and a 1, as categorical_crossentropy takes them",
    )
    transform: str | None = Field(
        default=None,
        pattern=IMPORT_PATH,
        description="package.module:function from (input, label) of one record to those the model gets; null for none",
    )


class Optimizer(_Section):
    """The Keras optimizer."""

    name: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "lamb", "lion"] = Field(
        default="adam", description="which of Keras' optimizers updates the weights"
    )
    learning_rate: float = Field(
        default=0.001,
        gt=0,
        description="the size of the updates, or the largest under a schedule, for the global batch",
    )
    learning_rate_scaling: Literal["linear", "sqrt"] | None = Field(
        default=None,
        description="for who raises batch_size with the replicas: multiplies the learning rate by their number, or by "
        "its square root; null leaves it",
    )
    schedule: Literal["cosine"] | None = Field(
        default=None, description="cosine lowers the learning rate to zero over the whole run; null keeps it"
    )
    warmup_epochs: float = Field(
        default=0.0,
        ge=0,
        description="over how many epochs at the start the learning rate rises from zero; they count as part of epochs",
    )
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of the last update that is kept, for sgd and rmsprop; null is Keras' default",
    )
    nesterov: bool | None = Field(
        default=None, description="whether sgd and its kin look ahead along the momentum; null is Keras' default"
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="each update takes learning_rate * weight_decay of every weight away; null is Keras' default",
    )
    no_weight_decay: Names = Field(
        default=(), description="weights without weight decay: names, or parts of them, such as bias, gamma and beta"
    )
    clipnorm: float | None = Field(
        default=None, gt=0, description="the largest norm of each variable's gradient; null for any"
    )
    global_clipnorm: float | None = Field(
        default=None, gt=0, description="the largest norm of all gradients together; null for any"
    )
    gradient_accumulation_steps: Positive = Field(
        default=1,
        description="batches whose gradients make one update: k times the rows of a batch at the memory of one, and "
        "one communication (with mixed_float16 one a batch)",
    )


class Checkpoints(_Section):
    """When the state of a run is saved into run_dir/checkpoint, and what stays: see `distfit.Checkpoint`."""

    every_steps: Positive | None = Field(default=None, description="save after every so many steps; null does not")
    every_seconds: float | None = Field(
        default=None, gt=0, description="save when so many seconds have passed; null is 300 without every_steps"
    )
    keep: Positive = Field(default=3, description="so many of the newest stay")
    best: str | None = Field(
        default=None, description="a metric such as val_accuracy: the best epoch's state is saved, and stays"
    )
    mode: Literal["auto", "min", "max"] = Field(
        default="auto", description="which of two values of that metric is better; auto goes by its name"
    )
    every_hours: float | None = Field(
        default=None, gt=0, description="of each span of so many hours, one stays for good; null: none does"
    )
    model: Literal["end", "epoch"] | None = Field(
        default="end", description="when model.keras is written: at the end, after each epoch as well, or (null) never"
    )


class RunConfig(_Section):
    """One training run."""

    data: Data = Field(description="which records are trained on")
    model: str = Field(
        default="distfit.models:digits_cnn",
        pattern=IMPORT_PATH,
        description="package.module:function from input_shape and classes to an uncompiled model",
    )
    model_options: dict[str, Any] = Field(default={}, description="further arguments of the model's function, by name")
    optimizer: Optimizer = Field(default=Optimizer(), description="the Keras optimizer")
    loss: str = Field(
        default="sparse_categorical_crossentropy",
        min_length=1,
        description="Keras' name of the loss or package.module:function; cross-entropy is from logits",
    )
    loss_options: dict[str, Any] = Field(
        default={}, description="arguments of the loss by name, such as label_smoothing of categorical_crossentropy"
    )
    metrics: Names = Field(default=("accuracy",), description="Keras' names of the metrics, as in model.compile")
    batch_size: Positive = Field(default=32, description="the records of one step over all replicas")
    epochs: Positive = Field(
        default=10, description="how often every record is trained on, unless steps_per_epoch says otherwise"
    )
    steps_per_epoch: Positive | None = Field(
        default=None,
        description="steps of each epoch, which goes on where the last one stopped; null is once through the records",
    )
    validation_steps: Positive | None = Field(
        default=None, description="steps of each validation; null is once through the split"
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="decides the first weights, the order of records and all random layers",
    )
    strategy: str = Field(
        default="auto", description="auto, or the engine that runs the replicas: single, mirrored, horovod"
    )
    devices: Positive | None = Field(
        default=None,
        description="devices of each process, logical CPUs where there are no GPUs; null takes what is there",
    )
    dtype: Literal["float32", "float64", "mixed_bfloat16", "mixed_float16"] = Field(
        default="float32", description="the type that layers compute in: Keras' dtype policy"
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="whether BatchNormalization takes the moments of the global batch, as one device does, or each "
        "replica its own rows'",
    )
    reduction_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None,
        description="the type in which gradients travel between replicas and are added; the shorter ones round them, "
        "null leaves each its own",
    )
    in_sync_steps: Positive = Field(
        default=1000, description="after how many steps replicas compare their weights and optimizer state again"
    )
    run_dir: str = Field(
        default="runs/default",
        min_length=1,
        description="the folder for logs, checkpoints and results; relative to the current folder",
    )
    checkpoint: Checkpoints = Field(
        default=Checkpoints(), description="when the state of the run is saved, and which states stay"
    )
    resume: bool = Field(
        default=True, description="go on where run_dir/checkpoint has been saved; false moves what is there aside"
    )
    allow: Names = Field(
        default=(), description="what may have changed since then, by the names that a refusal says, such as epochs"
    )
    verbose: Annotated[Literal["auto", 0, 1, 2], NoStandIn] = Field(
        default="auto",
        description="0 is silent, 1 a progress line, 2 a line an epoch; auto lets distfit choose",
    )
    stall_limit_s: float = Field(
        default=600.0,
        gt=0,
        description="how many seconds a step may wait for another rank before the run ends",
    )


def load(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The configuration in a YAML file, with fields replaced from the command line.

    Args:
        path: of the YAML file.
        overrides: `key=value` each: a dotted field, and a value in YAML (`devices=null`,
            `data.image.size=[28, 28]`). Later ones win.

    Raises:
        InputError: the file cannot be read or is no YAML, an override is no `key=value`, a key is unknown, or
            a value is of the wrong type or out of its range.
    """
    path = os.fspath(path)
    fields = _read(path)
    sources = {_override(fields, text): f"the override {text!r}" for text in overrides}
    try:
        return RunConfig.model_validate(fields)
    except pydantic.ValidationError as error:
        raise InputError(_explain(error, path, sources)) from error


def save(config: RunConfig, path: str | os.PathLike, header: str = "") -> None:
    """Writes the resolved configuration as YAML, whole or not at all; `load` reads it back.

    Args:
        config: what to write, every field named.
        path: of the file; its folder is there.
        header: lines for a comment at the top.
    """
    from distfit.data.records import whole_file

    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with whole_file(path) as file:
        file.write((comment + text).encode())


def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors and validators.

    >>> schema()["properties"]["batch_size"]["minimum"]
    1
    """
    fields = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A training run of distfit"} | {
        name: value for name, value in fields.items() if name != "title"
    }


def descriptions(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field with its dotted name and its meaning, in order.

    >>> dict(descriptions())["optimizer.schedule"]
    'cosine lowers the learning rate to zero over the whole run; null keeps it'
    """
    for name, field in section.model_fields.items():
        yield prefix + name, str(field.description)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from descriptions(field.annotation, f"{prefix}{name}.")


def values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no group, with its dotted name and its value, in order.

    >>> dict(values(Image(channels=3), "data.image."))["data.image.channels"]
    3
    """
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-3` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS:
                raise yaml.constructor.ConstructorError(None, None, "a key that is no name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a dot before an exponent: it takes 1e-3 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"Expected a configuration in YAML at {path!r}, received: {reason}. Correct the path; an example "
            "is configs/digits.yaml."
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"Expected YAML in {path!r}, received {_problem(error)}. Correct that line.") from error
    if not isinstance(fields, dict):
        raise InputError(
            f"Expected a configuration of `field: value` lines in {path!r}, received {_shown(fields)}. "
            "An example is configs/digits.yaml."
        )
    return fields


def _problem(error: yaml.YAMLError) -> str:
    """What YAML met and where, without its picture of the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _override(fields: dict, text: str) -> tuple[str, ...]:
    """Puts one `a.b=value` into nested mappings; returns where."""
    key, equals, value = text.partition("=")
    names = tuple(key.strip().split("."))
    if not equals or not all(names):
        raise InputError(
            f"Expected overrides such as epochs=5 or optimizer.learning_rate=0.01, received {text!r}. "
            "Write the field's dotted name, an equals sign and a value, without spaces or in quotes."
        )
    *parents, name = names
    for parent in parents:
        if not isinstance(fields.get(parent), dict):
            fields[parent] = {}
        fields = fields[parent]
    try:
        fields[name] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(
            f"Expected a value in YAML after {key}=, received {value!r}, {_problem(error)}. "
            "Put a text with special characters into quotes."
        ) from error
    return names


def _explain(error: pydantic.ValidationError, path: str, sources: dict[tuple[str, ...], str]) -> str:
    # The first only, and an unknown key before a missing one: a misspelt field is both.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = tuple(str(part) for part in first["loc"])
    # An override may lie below what is wrong (`seed.x=1`) or above it (`metrics=[1]`).
    mine = (said for key, said in sources.items() if all(map(operator.eq, key, where)))
    source = next(mine, path)
    if first["type"] == "extra_forbidden":
        return _unknown(where, source)
    meanings = dict(descriptions())
    # An error inside a list ends with a position, which is no field's name.
    field = next(name for n in range(len(where), 0, -1) if (name := ".".join(where[:n])) in meanings)
    if first["type"] == "missing" and field == ".".join(where):
        return f"Expected the field {field!r} in {source}, received none. Its meaning: {meanings[field]}."
    return (
        f"Expected {field} in {source} to be {_expected(first)}, received {_shown(first['input'])}. "
        f"Its meaning: {meanings[field]}."
    )


def _unknown(where: tuple[str, ...], source: str) -> str:
    key, prefix = ".".join(where), "".join(f"{name}." for name in where[:-1])
    meanings = dict(descriptions())
    siblings = [name.removeprefix(prefix) for name in meanings if name.rpartition(".")[0] == prefix[:-1]]
    near = [prefix + name for name in difflib.get_close_matches(where[-1], siblings, n=1)]
    # `learning_rate` at the top is right but for its place.
    near += [name for name in meanings if name.rpartition(".")[2] == where[-1]]
    if near:
        return f"unknown key {key!r} in {source}: did you mean {near[0]!r}? ({meanings[near[0]]})"
    return f"unknown key {key!r} in {source}: known are {', '.join(prefix + name for name in siblings)}."


def _expected(error: Any) -> str:
    """Pydantic's sentence, in YAML's words where it speaks of Python's."""
    kind = error["type"]
    if kind in ("model_type", "dict_type"):
        return "a group of `field: value` lines"
    if kind == "string_pattern_mismatch":
        return "of the form package.module:function"
    if kind == "tuple_type":
        return "a list"
    if kind in ("missing", "too_long"):
        return "a list of two"
    return error["msg"].removeprefix("Input should be ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
