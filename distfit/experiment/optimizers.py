"""The optimizer and its learning rate: Keras' own, so that the model is saved as plain Keras.

make = optimizer_maker(config.optimizer, updates_per_epoch=45, epochs=20)
model.compile(make(), ...)
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from distfit.config import Optimizer
from distfit.errors import InputError

_ARGUMENTS = {"momentum", "nesterov", "weight_decay", "clipnorm", "global_clipnorm"}


def optimizer_maker(
    settings: Optimizer, updates_per_epoch: int, epochs: int
) -> Callable[[], keras.optimizers.Optimizer]:
    """A function that makes the optimizer, because its variables belong to one model.

    Weight decay is Keras': beside the gradient, and therefore not multiplied by momentum. A recipe that adds
    an L2 term to the loss and has momentum m takes about 1 / (1 - m) times as much per update.

    Args:
        updates_per_epoch: of the weights.
        epochs: of the whole run.

    Raises:
        InputError: a setting that this optimizer does not have, or a warm-up as long as the run.
    """
    kind = _kinds()[settings.name]
    arguments = settings.model_dump(include=_ARGUMENTS, exclude_none=True)
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise InputError(
            f"Expected settings that Keras' {kind.__name__} has, received optimizer.{unknown[0]}="
            f"{arguments[unknown[0]]}. Leave it out, or set optimizer.name to sgd."
        )
    if settings.no_weight_decay and not arguments.get("weight_decay", parameters["weight_decay"].default):
        raise InputError(
            f"Expected optimizer.weight_decay above 0 beside optimizer.no_weight_decay={list(settings.no_weight_decay)}"
            ", received none. Set it, or leave no_weight_decay out."
        )
    rate = _learning_rate(settings, updates_per_epoch, epochs)

    def make() -> keras.optimizers.Optimizer:
        # Keras takes None for an update every batch and refuses 1.
        batches = settings.gradient_accumulation_steps
        accumulation = {"gradient_accumulation_steps": batches} if batches > 1 else {}
        optimizer = kind(learning_rate=rate(), **arguments, **accumulation)
        if settings.no_weight_decay:
            optimizer.exclude_from_weight_decay(var_names=list(settings.no_weight_decay))
        return optimizer

    return make


def check_excluded(settings: Optimizer, model: keras.Model) -> None:
    """Refuse names of `no_weight_decay` that no weight of the model has.

    Raises:
        InputError: one of them is in no weight's name.
    """
    names = sorted({variable.name for variable in model.trainable_variables})
    for part in settings.no_weight_decay:
        if not any(part in name for name in names):
            raise InputError(
                f"Expected optimizer.no_weight_decay to name weights of the model, received {part!r}, which is in "
                f"none of {', '.join(names)}. Correct it or leave it out."
            )


def _kinds() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Keras' optimizers by their names in lower case; keras.optimizers.get does not know all of them (lamb)."""
    return {name.lower(): kind for name, kind in vars(keras.optimizers).items() if inspect.isclass(kind)}


def _learning_rate(settings: Optimizer, updates_per_epoch: int, epochs: int) -> Callable[[], Any]:
    warmup = round(settings.warmup_epochs * updates_per_epoch)
    if warmup and warmup >= updates_per_epoch * epochs:
        raise InputError(
            f"Expected optimizer.warmup_epochs to be less than epochs, received {settings.warmup_epochs:g} of "
            f"{epochs}, {warmup} of {updates_per_epoch * epochs} updates: the run would end before the learning rate "
            "is reached. Lower it, or set epochs."
        )
    falls = settings.schedule == "cosine"
    if not warmup and not falls:
        return lambda: settings.learning_rate
    return lambda: keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else settings.learning_rate,
        decay_steps=updates_per_epoch * epochs - warmup,
        # The share of the learning rate that is left at the end: 1 leaves the warm-up alone.
        alpha=0.0 if falls else 1.0,
        warmup_target=settings.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
