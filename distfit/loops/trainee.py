"""Everything that the steps of a hand-written loop change, as one keras.Model, which is what engines adopt.

trainee = Trainee([generator, discriminator], [g_optimizer, d_optimizer], metrics=[g_loss], variables=[])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from distfit.errors import InputError


class Trainee(keras.Model):
    """Holds models, optimizers, metrics and variables; it cannot be called.

    Args:
        models: built.
        optimizers: built; a single one is built here, with the trainable weights of a single model.
        metrics: whose states are summed over replicas.
        variables: keras.Variable that steps change, of which each replica keeps its own part.

    Raises:
        InputError: something else was given, or is not built.
    """

    def __init__(
        self, models: Sequence[Any], optimizers: Sequence[Any], metrics: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        super().__init__()
        _check_kinds("models", models, keras.Model)
        _check_kinds("optimizers", optimizers, keras.optimizers.Optimizer)
        _check_kinds("metrics", metrics, keras.metrics.Metric)
        _check_kinds("variables", variables, keras.Variable)
        _check_names(metrics)
        _check_built(models)
        _build_optimizers(models, optimizers)
        self.models = list(models)
        self.optimizers = list(optimizers)
        self.given_metrics = list(metrics)
        # In a tuple in a dictionary Keras does not take them for weights.
        self._parts = {"parts": tuple(variables)}
        self.built = True

    @property
    def first(self) -> keras.Model:
        """The model that callbacks see."""
        return self.models[0]

    @property
    def metrics_variables(self) -> list[Any]:
        """What each replica has its own part of: the metrics' states, and the variables that were given."""
        return [*super().metrics_variables, *self._parts["parts"]]


def trainee_of(models: Any, optimizers: Any, metrics: Any, variables: Any) -> Trainee:
    """From what `Session.training` was given: one of each, several, or none."""
    return Trainee(as_list(models), as_list(optimizers), as_list(metrics), as_list(variables))


def as_list(given: Any) -> list[Any]:
    """One or several.

    >>> as_list(None), as_list("a"), as_list(("a", "b"))
    ([], ['a'], ['a', 'b'])
    """
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _check_kinds(name: str, given: Sequence[Any], kind: type) -> None:
    for one in given:
        if not isinstance(one, kind):
            raise InputError(
                f"Expected {name} of a hand-written training to be keras {kind.__name__} objects, received "
                f"{type(one).__name__}. Pass what the step uses: session.training(model, optimizer, data, "
                "metrics=[...], variables=[...])."
            )
    if not given and name == "models":
        raise InputError(
            "Expected at least one model to train, received none. Pass it to session.training(model, ...)."
        )


def _check_names(metrics: Sequence[Any]) -> None:
    names = [metric.name for metric in metrics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"Expected metrics of different names, which their results go by, received {', '.join(twice)} more than "
            "once. Pass name=... to each."
        )


def _check_built(models: Sequence[Any]) -> None:
    for model in models:
        if not all(layer.built for layer in model._flatten_layers()):
            raise InputError(
                f"Expected models whose weights are made, as replicas will share them, received "
                f"{type(model).__name__} {model.name!r}, which is not built. Call it on one batch, or begin it with "
                "keras.Input(shape), before session.training."
            )


def _build_optimizers(models: Sequence[Any], optimizers: Sequence[Any]) -> None:
    if len(models) == len(optimizers) == 1 and not optimizers[0].built:
        optimizers[0].build(models[0].trainable_variables)
    for optimizer in optimizers:
        if not optimizer.built:
            raise InputError(
                f"Expected optimizers whose state is made, as replicas will share it, received "
                f"{type(optimizer).__name__} {optimizer.name!r}, which has not seen its variables. Call "
                "optimizer.build(variables) with those that it updates, before session.training."
            )
