"""The loss and metrics that a configuration names.

loss_of("categorical_crossentropy", {"label_smoothing": 0.1})
check_metrics(("accuracy",))
"""

import inspect
from typing import Any

import keras

from distfit.errors import InputError, nearest
from distfit.experiment.names import call, check_arguments, named


def loss_of(name: str, options: dict[str, Any]) -> Any:
    """A loss by Keras' name or by `package.module:function`.

    Keras' losses that have `from_logits` get True unless the options say otherwise: models here end without
    an activation.

    Raises:
        InputError: there is no such loss, or it does not take these options.
    """
    if ":" in name:
        return _own(name, options)
    try:
        function = keras.losses.get(name)
    except ValueError as error:
        raise InputError(
            f"Expected loss to be a Keras loss such as sparse_categorical_crossentropy, or "
            f"package.module:function, received {name!r}; {nearest(name, _snake_names(keras.losses))}"
        ) from error
    kind = _classes()[function.__name__.replace("_", "")]
    if "from_logits" in inspect.signature(kind).parameters:
        options = {"from_logits": True, **options}
    check_arguments("loss", name, kind, options, set())
    return call("loss_options", kind, **options)


def check_metrics(names: tuple[str, ...]) -> None:
    """Refuse metrics that Keras does not have.

    Raises:
        InputError: one of them.
    """
    for name in names:
        try:
            keras.metrics.get(name)
        except ValueError as error:
            raise InputError(
                f"Expected metrics of Keras, such as accuracy, received {name!r}; "
                f"{nearest(name, ['accuracy', *_snake_names(keras.metrics)])}"
            ) from error


def _own(path: str, options: dict[str, Any]) -> Any:
    """A user's function of (y, y_pred), or class of losses, which is made with the options."""
    loss = named("loss", path)
    if inspect.isclass(loss):
        check_arguments("loss", path, loss, options, set())
        return call("loss", loss, **options)
    if options:
        raise InputError(
            f"Expected loss_options for a class of losses, received {sorted(options)} for the function {path}. Leave "
            "them out, or name a subclass of keras.losses.Loss."
        )
    return loss


def _classes() -> dict[str, Any]:
    """Keras' classes of losses by the names of their functions without underscores, as KLDivergence has none."""
    kinds = {name: value for name, value in vars(keras.losses).items() if inspect.isclass(value)}
    return {name.lower(): kind for name, kind in kinds.items()}


def _snake_names(module: Any) -> list[str]:
    """The functions of a Keras module: `mean_squared_error` and its kin."""
    return [name for name in dir(module) if name.islower() and not name.startswith("_") and "_" in name]
